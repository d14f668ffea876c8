"""Choosing the best of several candidates by the flow's own classification, against plain definitions."""

import math
from functools import cache

import pytest
import torch

from builders import images, random_flow
from flowback import InputError
from flowback.tasks import refinement
from flowback.tasks.classify import RULES, ClassStatistics, classify
from flowback.tasks.refinement import agreement, best_of

rules = pytest.mark.parametrize("rule", RULES)


def a_flow(**options):
    return random_flow(**{"image_size": 4, "noise_std": 0.1, "std": 0.1, **options})


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


# ---- agreement ------------------------------------------------------------------------------------------------------


@rules
def test_agreement_is_the_share_of_the_label_in_the_scores_of_the_rule(rule, tmp_path):
    flow = a_flow(noise_std=0.0)  # so that classify adds no noise
    KNOWN.save(tmp_path)
    flow.folder = tmp_path
    x = images(flow, 6)
    scores = classify(flow, x, rule)
    expected = torch.stack([scores[i, k] - scores[i].logsumexp(0) for i, k in enumerate(LABELS)])
    found, agrees = agreement(flow, x, LABELS, rule)
    assert torch.allclose(found, expected, atol=1e-10)
    assert torch.equal(agrees, scores.argmax(dim=1) == LABELS)
    assert torch.equal(agreement(flow, x, LABELS, rule, statistics=KNOWN)[0], found)
    assert found[found.isfinite()].std() > 1e-3
    for batch_size in (1, 2, 9):
        assert torch.allclose(agreement(flow, x, LABELS, rule, batch_size)[0], found, atol=1e-10)


def test_exact_agreement_is_bayes_rule_under_equally_likely_classes():
    flow = a_flow()
    x = images(flow, 6)
    joint = torch.stack([flow.log_prob(x, torch.full((6,), k)) for k in range(4)], dim=1).exp() / 4
    found, _ = agreement(flow, x, LABELS, "exact")
    assert torch.allclose(found.exp(), joint[range(6), LABELS] / joint.sum(dim=1), atol=1e-10)


# ---- choosing -------------------------------------------------------------------------------------------------------


def chosen_plainly(values, agrees, least):
    """Of one image, with the agreement of all its candidates: which one is kept, and how many were drawn."""
    best = 0
    for r, value in enumerate(values):
        if r >= least and agrees[best]:
            return best, r
        best = r if value > values[best] else best
    return best, len(values)


@cache
def drawn_plainly(guidance):
    """Five candidates for each label, one after the other."""
    flow = a_flow()
    z = noises(flow, 6, 5)
    return z, [flow.denoise(flow.decode(z[:, r], LABELS, guidance, "sequential"), LABELS) for r in range(5)]


@pytest.mark.parametrize(("rule", "guidance"), zip(RULES, (0.0, 1.0) * len(RULES), strict=False))
def test_the_candidate_that_agrees_most_is_kept_and_drawing_ends_once_it_agrees(rule, guidance, flow):
    z, x = drawn_plainly(guidance)
    values, agrees = (torch.stack(part, dim=1) for part in zip(*(agreement(flow, a, LABELS, rule) for a in x), strict=True))
    for least, batch_size in ((1, 64), (2, 4), (5, 1)):
        expected = [chosen_plainly(*one, least) for one in zip(values.tolist(), agrees.tolist(), strict=True)]
        picked, draws = map(list, zip(*expected, strict=True))
        assert len(set(picked)) > 1 if least == 5 else least in draws
        found = best_of(flow, z, LABELS, guidance, rule, least, batch_size=batch_size)
        assert torch.equal(found.z, z[range(6), picked])
        assert found.draws.tolist() == draws


@pytest.mark.parametrize("method", ["sequential", "jacobi", "gauss_seidel"])
@pytest.mark.parametrize("least", [1, 3])
def test_what_is_kept_is_the_exact_decode_of_its_noise(method, least):
    flow = a_flow()
    found = best_of(flow, noises(flow, 6, 3), LABELS, 1.0, least=least, method=method)
    x = flow.decode(found.z, LABELS, 1.0, "sequential")
    assert torch.allclose(found.x, x, atol=1e-8)
    assert torch.allclose(found.denoised, flow.denoise(x, LABELS), atol=1e-7)
    assert (found.denoised - found.x).abs().max() > 0.01
    assert {solved.solver.method for solved in found.report} == {method}


def test_an_image_that_agrees_is_left_alone(monkeypatch):
    """The first two agree with their labels at once, the third never does."""
    flow = a_flow()
    z, sure = noises(flow, 3, 4), iter([[True, True, False], [False], [False], [False]])
    rows = []

    def told(flow, x, y, *_):
        rows.append(len(x))
        right = torch.tensor(next(sure))
        return torch.where(right, -0.1, -1.0 / len(rows)).double(), right

    monkeypatch.setattr(refinement, "agreement", told)
    found = best_of(flow, z, LABELS[:3], least=1)
    assert rows == [3, 1, 1, 1]
    assert found.draws.tolist() == [1, 1, 4]
    assert torch.equal(found.z, torch.stack([z[0, 0], z[1, 0], z[2, 3]]))
    assert torch.allclose(found.x, flow.decode(found.z, LABELS[:3]), atol=1e-8)


def test_choosing_raises_what_the_flow_thinks_of_the_images():
    flow = a_flow()
    z = noises(flow, 6, 8)
    means = []
    for R in (1, 2, 4, 8):
        found = best_of(flow, z[:, :R], LABELS, 1.0, least=R)
        means.append(agreement(flow, found.denoised, LABELS)[0].mean())
    assert means[0] < means[1] < means[2] < means[3]


def test_best_of_of_a_single_candidate_is_that_one():
    flow = a_flow()
    z = noises(flow, 6, 1)
    found = best_of(flow, z, LABELS)
    assert torch.equal(found.z, z[:, 0])
    assert found.draws.tolist() == [1] * 6


@pytest.mark.parametrize("least", [1, 3])
def test_best_of_never_takes_an_image_that_is_not_finite(least):
    flow = a_flow()
    z = noises(flow, 2, 3)
    z[0, :2] = math.nan
    found = best_of(flow, z, LABELS[:2], least=least)
    assert torch.equal(found.z[0], z[0, 2])
    assert found.denoised.isfinite().all()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_mode_gives_the_same_and_no_graph_or_gradient_is_left_behind(mode, flow):
    z, x = noises(flow, 6, 2), images(flow, 6)
    work = {
        "best_of": lambda: best_of(flow, z.clone(), LABELS.clone()).denoised,
        **{rule: lambda rule=rule: agreement(flow, x.clone(), LABELS.clone(), rule)[0] for rule in RULES},
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
    for call in (lambda: best_of(flow, z[:, None], none), lambda: agreement(flow, images(flow, 6), none)):
        with pytest.raises(InputError, match=r"^labels need a class-conditional flow"):
            call()


BAD = [
    ({"y": torch.tensor([0, 4, 1, 1, 1, 1])}, "^label 4 is out of range"),
    ({"z": torch.zeros(6, 2, 4, 7, dtype=torch.float64)}, r"^z must have the shape .*, got \[6, 4, 7\]$"),
    ({"rule": "guess"}, r"rule must be .*single_gradient, z_score.*, got 'guess'"),
    ({"rule": "z_score"}, "^z_score and shortlists need class statistics"),
    ({"least": 0}, "^least must be at least 1, got 0$"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_refused(change, message):
    flow = a_flow()
    with pytest.raises(InputError, match=message):
        best_of(**{"flow": flow, "z": noises(flow, 6, 2), "y": LABELS, **change})
