"""Ranking and refinement by the flow's own likelihood, against plain definitions."""

import math

import pytest
import torch

from builders import images, random_flow
from flowback import InputError
from flowback.flow.guidance import Guidance
from flowback.flow.patches import unpatchify
from flowback.tasks.classify import RULES, ClassStatistics, classify
from flowback.tasks.refinement import OBJECTIVES, agreement, best_of, contrast, posterior, refine
from oracle import decode_with_graph

objectives = pytest.mark.parametrize("objective", OBJECTIVES)
rules = pytest.mark.parametrize("rule", RULES)


def a_flow(**options):
    return random_flow(**{"image_size": 4, "noise_std": 0.0, "std": 0.1, **options})


KNOWN = ClassStatistics([0.1 * k for k in range(4)], [1.0 + k for k in range(4)], 9)


@pytest.fixture
def flow(tmp_path):
    """One whose folder holds class statistics."""
    flow = a_flow()
    KNOWN.save(tmp_path)
    flow.folder = tmp_path
    return flow


def noises(flow, *batch, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, *flow.token_shape, generator=generator, dtype=torch.float64)


LABELS = torch.tensor([0, 3, 2, 2, 1, 0])


# ---- what is raised -------------------------------------------------------------------------------------------------


def test_contrast_is_the_ratio_to_the_density_without_label():
    flow = a_flow()
    x, y = images(flow, 3), LABELS[:3]
    expected = flow.log_prob(x, y) - flow.log_prob(x, torch.full((3,), -1))
    assert torch.allclose(contrast(flow, x, y), expected, atol=1e-10)


def test_posterior_is_bayes_rule_under_equally_likely_classes():
    flow = a_flow()
    x, y = images(flow, 3), LABELS[:3]
    joint = torch.stack([flow.log_prob(x, torch.full((3,), k)) for k in range(4)], dim=1).exp() / 4
    expected = joint[range(3), y] / joint.sum(dim=1)
    assert torch.allclose(posterior(flow, x, y).exp(), expected, atol=1e-10)
    over_classes = torch.stack([posterior(flow, x, torch.full((3,), k)) for k in range(4)])
    assert torch.allclose(over_classes.exp().sum(dim=0), torch.ones(3, dtype=torch.float64), atol=1e-12)


@rules
def test_agreement_is_the_share_of_the_label_in_the_scores_of_the_rule(rule, flow):
    x = images(flow, 6)
    scores = classify(flow, x, rule)  # of images without noise, which this flow was trained on
    expected = torch.stack([scores[i, k] - scores[i].logsumexp(0) for i, k in enumerate(LABELS)])
    found = agreement(flow, x, LABELS, rule)
    assert torch.allclose(found, expected, atol=1e-10)
    assert torch.equal(agreement(flow, x, LABELS, rule, statistics=KNOWN), found)
    assert (found < 0).all()
    assert found[found.isfinite()].std() > 1e-3


def test_exact_agreement_is_the_posterior():
    flow = a_flow()
    x = images(flow, 6)
    assert torch.allclose(agreement(flow, x, LABELS), posterior(flow, x, LABELS), atol=1e-10)


@rules
def test_agreement_does_not_depend_on_the_batch_size(rule, flow):
    x = images(flow, 6)
    whole = agreement(flow, x, LABELS, rule)
    for batch_size in (1, 2, 9):
        assert torch.allclose(agreement(flow, x, LABELS, rule, batch_size), whole, atol=1e-10)


# ---- ranking --------------------------------------------------------------------------------------------------------


@rules
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_best_of_takes_the_candidate_that_agrees_most(rule, guidance, flow):
    z = noises(flow, 6, 5)
    picked = []
    for candidates, label in zip(z, LABELS, strict=True):
        y = label.expand(5)
        picked.append(int(agreement(flow, flow.decode(candidates, y, guidance), y, rule).argmax()))
    assert len(set(picked)) > 1
    for batch_size in (1, 4, 64):
        assert torch.equal(best_of(flow, z, LABELS, guidance, rule, batch_size=batch_size), z[range(6), picked])


def test_best_of_of_a_single_candidate_is_that_one():
    flow = a_flow()
    z = noises(flow, 6, 1)
    assert torch.equal(best_of(flow, z, LABELS), z[:, 0])


def test_best_of_never_takes_an_image_that_is_not_finite():
    flow = a_flow()
    z = noises(flow, 2, 3)
    z[0, :2] = math.nan
    assert torch.equal(best_of(flow, z, LABELS[:2])[0], z[0, 2])


# ---- refinement -----------------------------------------------------------------------------------------------------


def values(flow, z, objective, guidance=0.0, y=LABELS):
    with torch.no_grad():
        return OBJECTIVES[objective](flow, flow.decode(z, y, guidance), y)


@objectives
@pytest.mark.parametrize("angle", [0.05, 0.5, 1.5])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_refining_raises_the_objective_and_keeps_the_length_of_z(objective, angle, guidance):
    flow = a_flow()
    z = noises(flow, 6)
    before, kept = values(flow, z, objective, guidance), z.clone()
    for steps in (1, 4):
        refined = refine(flow, z, LABELS, steps, angle, objective, guidance)
        assert torch.equal(z, kept)
        assert torch.allclose(refined.norm(dim=(1, 2)), z.norm(dim=(1, 2)), rtol=1e-12)
        after = values(flow, refined, objective, guidance)
        assert (after >= before - 1e-9).all()  # of every image
        if steps == 4:
            assert after.mean() > before.mean() + 1e-3


@objectives
def test_more_steps_raise_it_further(objective):
    flow = a_flow()
    z = noises(flow, 6)
    means = [values(flow, refine(flow, z, LABELS, steps, 0.2, objective), objective).mean() for steps in (0, 1, 2, 4)]
    assert means[0] < means[1] < means[2] < means[3]


def test_no_steps_give_z_back():
    flow = a_flow()
    z = noises(flow, 6)
    assert torch.equal(refine(flow, z, LABELS, 0), z)


def test_a_step_that_would_lower_the_objective_is_taken_back():
    """A quarter turn at once is far beyond what the gradient knows: of some images it is not taken."""
    flow = a_flow(std=0.4)
    z = noises(flow, 6)
    stayed = (refine(flow, z, LABELS, 1, 1.5, "contrast") == z).all(dim=2).all(dim=1)
    assert 0 < stayed.sum() < 6
    smaller = refine(flow, z, LABELS, 8, 1.5, "contrast")  # the angle is halved until it helps
    assert not (smaller[stayed] == z[stayed]).all(dim=2).all(dim=1).any()


@objectives
@pytest.mark.parametrize(("blocks", "guidance"), [(1, 0.0), (2, 0.0), (3, 0.0), (2, 2.0)])
def test_the_first_step_follows_the_gradient_through_the_decoder(objective, blocks, guidance):
    flow = a_flow(blocks=blocks)
    z, angle, h = noises(flow, 6), 1e-3, 1e-5
    steps = h * torch.eye(z[0].numel(), dtype=z.dtype).view(-1, *flow.token_shape)  # along each coordinate
    y = LABELS.repeat_interleave(len(steps))
    ahead, back = ((z[:, None] + sign * steps).flatten(0, 1) for sign in (1, -1))
    rise = values(flow, ahead, objective, guidance, y) - values(flow, back, objective, guidance, y)
    gradient = rise.view_as(z) / (2 * h)
    z_hat = z / z.norm(dim=(1, 2), keepdim=True)
    tangent = gradient - (gradient * z_hat).sum(dim=(1, 2), keepdim=True) * z_hat
    tangent = tangent / tangent.norm(dim=(1, 2), keepdim=True)
    turned = refine(flow, z, LABELS, 1, angle, objective, guidance)
    found = (turned / z.norm(dim=(1, 2), keepdim=True) - math.cos(angle) * z_hat) / math.sin(angle)
    assert (found - tangent).norm(dim=(1, 2)).max() < 1e-3  # the decoder's tolerance over h


def refined_plainly(flow, z, y, steps, angle, objective, guidance):
    """One image `[1, N, D]`, with autograd through the token-by-token decode."""
    guide = Guidance(guidance) if guidance else None
    classes = flow.class_weights(y, 1)
    classes = torch.cat([classes, torch.full_like(classes, 1 / flow.num_classes)]) if guidance else classes

    def value_and_gradient(z):
        tokens = z = z.detach().requires_grad_()
        for block in reversed(flow.blocks):
            tokens = decode_with_graph(block, tokens, classes, guide)
        value = objective(flow, unpatchify(tokens, flow.config.patch_size, flow.image_size), y)
        return value.item(), torch.autograd.grad(value, z)[0]

    value, gradient = value_and_gradient(z)
    for _ in range(steps):
        z_hat = z / z.norm()
        tangent = gradient - (gradient * z_hat).sum() * z_hat
        turned = z.norm() * (math.cos(angle) * z_hat + math.sin(angle) * tangent / tangent.norm())
        new_value, new_gradient = value_and_gradient(turned)
        if new_value > value:
            z, value, gradient = turned, new_value, new_gradient
        else:
            angle /= 2
    return z


@objectives
@pytest.mark.parametrize("angle", [0.1, 1.5])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_refining_is_a_plain_ascent_on_the_sphere(objective, angle, guidance):
    flow = a_flow()
    z, arguments = noises(flow, 6), (4, angle, OBJECTIVES[objective], guidance)
    expected = [refined_plainly(flow, z[i : i + 1], LABELS[i : i + 1], *arguments) for i in range(6)]
    assert torch.allclose(refine(flow, z, LABELS, 4, angle, objective, guidance), torch.cat(expected), atol=1e-6)


def test_refining_does_not_depend_on_the_batch_size():
    flow = a_flow()
    z = noises(flow, 6)
    whole, *others = (refine(flow, z, LABELS, 2, batch_size=size) for size in (64, 1, 2, 4))
    assert (whole - z).abs().max() > 0.1
    for parts in others:
        assert (whole - parts).abs().max() < 1e-3


@objectives
def test_an_image_that_is_not_finite_leaves_the_others_alone(objective):
    flow = a_flow()
    z = noises(flow, 6)
    z[0] = math.nan
    refined = refine(flow, z, LABELS, 2, objective=objective)
    assert refined[1:].isfinite().all()
    assert (values(flow, refined, objective) > values(flow, z, objective))[1:].all()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_mode_gives_the_same_and_no_graph_or_gradient_is_left_behind(mode, flow):
    z, x = noises(flow, 6), images(flow, 6)
    work = {
        "refine": lambda: refine(flow, z.clone(), LABELS.clone(), 2),
        "best_of": lambda: best_of(flow, z[:, None].clone(), LABELS.clone()),
        **{rule: lambda rule=rule: agreement(flow, x.clone(), LABELS.clone(), rule) for rule in RULES},
    }
    for name, do in work.items():
        expected = do()
        with mode():
            found = do()
            assert torch.equal(found, expected), name
        assert not found.requires_grad, name
    assert all(p.grad is None for p in flow.parameters())


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_an_unconditional_flow_is_refused():
    flow = a_flow(num_classes=0)
    z, none = noises(flow, 6), torch.full((6,), -1)
    for call in (
        lambda: refine(flow, z, none),
        lambda: best_of(flow, z[:, None], none),
        lambda: agreement(flow, images(flow, 6), none),
    ):
        with pytest.raises(InputError, match=r"^labels need a class-conditional flow"):
            call()


BAD = [
    ({"y": torch.tensor([0, -1, 1, 1, 1, 1])}, "^labels to refine towards must be at least 0, got -1$"),
    ({"objective": "beauty"}, "^objective must be one of contrast, posterior, got 'beauty'$"),
    ({"steps": -1}, "^steps must be at least 0, got -1$"),
    ({"angle": 0.0}, r"^angle must be above 0 .*, got 0\.0$"),
    ({"angle": -0.1}, r"^angle .* got -0\.1$"),
    ({"angle": 1.6}, r"^angle .* got 1\.6$"),
    ({"angle": math.nan}, r"^angle .* got nan$"),
    ({"y": torch.tensor([0, 4, 1, 1, 1, 1])}, "^label 4 is out of range"),
    ({"z": torch.zeros(6, 4, 7, dtype=torch.float64)}, r"^z must have the shape .*, got \[6, 4, 7\]$"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_refused(change, message):
    flow = a_flow()
    with pytest.raises(InputError, match=message):
        refine(**{"flow": flow, "z": noises(flow, 6), "y": LABELS, **change})


def test_an_unknown_rule_is_refused():
    flow = a_flow()
    with pytest.raises(InputError, match=r"rule must be .*single_gradient, z_score.*, got 'guess'"):
        best_of(flow, noises(flow, 6, 2), LABELS, rule="guess")
