import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from builders import PatchEncoder, attributes, flat, gradients, images, labels, normal_, random_flow
from flowback import InputError
from flowback.alignment import Alignment
from flowback.alignment import gradients as strategies
from flowback.alignment.alignment import spatially_normalized
from flowback.core.units import nll_per_dim
from flowback.encoders import match_grid
from flowback.training.meter import Meter

AT = [(2, 1), (3, 2)]
KINDS = [
    ("forward", "one_step"),
    ("detach", "one_step"),
    ("reverse", "cached"),
    ("reverse", "one_step"),
    ("reverse", 1),
    ("reverse", 2),
    ("reverse", "exact"),
    ("reverse", "sequential"),
]
kinds = pytest.mark.parametrize(("strategy", "gradient"), KINDS)


def make(strategy="reverse", gradient="one_step", at=AT, weight=0.1, dtype=torch.float64, std=0.12, grid=None, **options):
    flow = random_flow(dtype, std=std, **options)
    align = Alignment(flow, PatchEncoder(flow, grid=grid), at, strategy, gradient, weight, projector_width=8)
    normal_(align.projector.to(dtype), 0.4)
    return align


def batch(align, n=4):
    """Noisy images, labels, clean images."""
    return images(align.flow, n, seed=1), labels(align.flow, n), images(align.flow, n, seed=2)


def total_gradients(align, *arguments, **named):
    align.zero_grad(set_to_none=True)
    align.loss(*arguments, **named)[0].backward()
    return gradients(align)


def assert_close(found, expected, tolerance=1e-12):
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=tolerance, atol=tolerance), name


# ---- values ---------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("num_classes", [0, 4])
def test_loss_is_the_weighted_sum_of_its_definitions(strategy, gradient, num_classes):
    align = make(strategy, gradient, weight=0.7, num_classes=num_classes)
    x, y, clean = batch(align)
    loss, parts = align.loss(x, y, clean)
    z, log_det, trace = align.flow.encode(x, y, trace=AT)
    nll = z.square().mean() / 2 - log_det.mean() / align.flow.dims
    targets = align.encoder(clean)
    cosines = [F.cosine_similarity(align.projector(h), targets, dim=-1) for h in trace.hidden.values()]
    expected = -torch.stack(cosines).mean()
    assert abs(parts["nll"] - nll) < 1e-12
    assert abs(parts["align"] - expected) < 1e-12
    assert abs(loss - (nll + 0.7 * expected)) < 1e-12
    assert -1 <= parts["align"] <= 1


@kinds
def test_parts_are_plain_values(strategy, gradient):
    align = make(strategy, gradient)
    _, parts = align.loss(*batch(align))
    assert not parts["nll"].requires_grad
    assert not parts["align"].requires_grad
    with_terms = strategy == "reverse" and gradient not in ("cached", "sequential")
    assert sorted(parts) == sorted(["nll", "align"] + ["terms"] * with_terms)
    if with_terms:
        assert sorted(parts["terms"]) == [2, 3]  # the blocks from the first aligned one up
        if isinstance(gradient, int):
            assert set(parts["terms"].values()) == {gradient}
        elif gradient == "one_step":
            assert set(parts["terms"].values()) == {0}


def test_alignment_does_not_care_about_the_length_of_features():
    align = make()
    x, y, clean = batch(align)
    targets = align.targets(clean)
    loss = align.loss(x, y, targets=targets)[0]
    assert align.loss(x, y, targets=targets * torch.rand(4, 9, 1).double().add(0.1))[0].item() == pytest.approx(loss.item())
    assert align.loss(x, y, targets=-targets)[1]["align"].item() == pytest.approx(
        -align.loss(x, y, clean)[1]["align"].item()
    )


def test_call_is_loss():
    align = make()
    x, y, clean = batch(align)
    assert torch.equal(align(x, y, clean)[0], align.loss(x, y, clean)[0])
    assert torch.equal(align(x, y, x_clean=clean)[0], align.loss(x, y, clean)[0])


# ---- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [None, (4, 5)])
def test_targets_are_features_on_the_flows_grid(grid):
    align = make(grid=grid)
    _, _, clean = batch(align)
    targets = align.targets(clean)
    assert targets.shape == (4, 9, 5)
    assert not targets.requires_grad
    assert torch.equal(targets, match_grid(align.encoder(clean), align.encoder.grid, (3, 3)))


@kinds
def test_given_targets_equal_computed_ones(strategy, gradient):
    align = make(strategy, gradient)
    x, y, clean = batch(align)
    computed = total_gradients(align, x, y, clean)
    given = total_gradients(align, x, y, targets=align.targets(clean))
    assert all(torch.equal(given[name], computed[name]) for name in computed)


def test_given_targets_spare_the_encoder(monkeypatch):
    align = make()
    x, y, clean = batch(align)
    targets = align.targets(clean)
    monkeypatch.setattr(PatchEncoder, "forward", lambda *a: pytest.fail("the encoder ran"))
    align.loss(x, y, targets=targets)


@kinds
def test_no_gradient_leaks_to_the_encoder_or_the_clean_images(strategy, gradient):
    align = make(strategy, gradient)
    x, y, clean = batch(align)
    clean.requires_grad_()
    align.loss(x, y, clean)[0].backward()
    assert clean.grad is None
    assert all(not p.requires_grad and p.grad is None for p in align.encoder.parameters())


# ---- gradients ------------------------------------------------------------------------------------------------------


@kinds
def test_options_choose_the_strategy(strategy, gradient):
    align = make(strategy, gradient, weight=0.7)
    x, y, clean = batch(align)
    unit = F.normalize(align.targets(clean), dim=-1)
    N = align.flow.token_shape[0]

    def loss(hidden):
        h = torch.stack(list(hidden.values()))
        return -(F.normalize(align.projector(h), dim=-1) * unit).sum(-1).mean()

    arguments = align.flow, x, y, AT, loss
    if strategy == "forward":
        l_nf, l_align = strategies.forward(*arguments)
    elif gradient == "sequential":
        l_nf, l_align = strategies.sequential(*arguments)
    else:
        terms = {"cached": None, "one_step": 0, "exact": N - 1}.get(gradient, gradient)
        l_nf, l_align, _ = strategies.isolated(*arguments, None if strategy == "detach" else terms, 0.0)
    (l_nf + 0.7 * l_align).backward()
    expected = gradients(align)
    assert_close(total_gradients(align, x, y, clean), expected, 1e-10)


def test_every_kind_is_another_gradient_but_cached_which_is_detach():
    found = {}
    for kind in KINDS:
        align = make(*kind, weight=10.0)
        found[kind] = flat(total_gradients(align, *batch(align)))
    assert torch.equal(found.pop(("reverse", "cached")), found["detach", "one_step"])
    assert torch.allclose(found.pop(("reverse", "sequential")), found["reverse", "exact"], rtol=1e-9, atol=1e-11)
    for first, second in itertools.combinations(found.values(), 2):
        assert (first - second).norm() > 1e-3 * first.norm()


@pytest.mark.parametrize("at", [[(1, 2)], AT, [(3, 1)]])
def test_exact_equals_sequential_for_every_parameter(at):
    exact, sequential = make("reverse", "exact", at, weight=1.0), make("reverse", "sequential", at, weight=1.0)
    expected, found = (total_gradients(a, *batch(a)) for a in (sequential, exact))
    for name, g in expected.items():
        if g.norm() > 0:
            assert (found[name] - g).norm() < 1e-9 * g.norm(), name


def test_exact_ends_early_where_the_rest_is_negligible():
    options = {"at": [(1, 2)], "weight": 1.0, "std": 0.05, "image_size": 8}
    exact, sequential = make("reverse", "exact", **options), make("reverse", "sequential", **options)
    terms = exact.loss(*batch(exact))[1]["terms"]
    assert all(2 < k < exact.flow.token_shape[0] - 1 for k in terms.values())
    expected, found = (flat(total_gradients(a, *batch(a))) for a in (sequential, exact))
    assert (found - expected).norm() < 1e-9 * expected.norm()


@kinds
def test_weight_zero_is_the_plain_likelihood(strategy, gradient):
    align = make(strategy, gradient, weight=0.0)
    x, y, clean = batch(align)
    found = total_gradients(align, x, y, clean)
    align.zero_grad()
    (-align.flow.log_prob(x, y).mean() / align.flow.dims).backward()
    assert_close(found, gradients(align), 1e-11)


def gradient_of_images(align, x, y, clean):
    x = x.clone().requires_grad_()
    align.loss(x, y, clean)[0].backward()
    return x.grad


@kinds
@pytest.mark.parametrize("at", [[(1, 1), (3, 2)], AT])
def test_the_likelihoods_gradient_reaches_what_the_images_were_made_by(strategy, gradient, at):
    """Where they are latents of an autoencoder that is trained too; that of the alignment only if forward, and asked."""
    align = make(strategy, gradient, at=at)
    x, y, clean = batch(align)
    (wanted,) = torch.autograd.grad(nll_per_dim(*align.flow.encode(x.requires_grad_(), y)), x)
    align.to_input = False
    assert torch.allclose(gradient_of_images(align, x.detach(), y, clean), wanted, rtol=1e-10, atol=1e-14)
    align.to_input = True
    found = gradient_of_images(align, x.detach(), y, clean)
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-14) == (strategy != "forward")


@pytest.mark.parametrize("to_input", [False, True])
def test_where_the_gradient_ends_changes_none_of_the_weights(to_input):
    align = make("forward")
    x, y, clean = batch(align)
    wanted = total_gradients(align, x, y, clean)
    align.to_input = to_input
    assert_close(total_gradients(align, x.requires_grad_(), y, clean), wanted)


@kinds
def test_scaled_loss_scales_every_gradient(strategy, gradient):
    align = make(strategy, gradient)
    x, y, clean = batch(align)
    expected = total_gradients(align, x, y, clean)
    align.zero_grad()
    (align.loss(x, y, clean)[0] / 2).backward()
    assert_close(gradients(align), {name: g / 2 for name, g in expected.items()})


@kinds
def test_micro_batches_add_up_to_the_batch(strategy, gradient):
    align = make(strategy, gradient)
    x, y, clean = batch(align)
    expected = total_gradients(align, x, y, clean)
    align.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        (align.loss(x[part], y[part], clean[part])[0] / 2).backward()
    assert_close(gradients(align), expected, 1e-10)


@kinds
def test_every_parameter_is_trained(strategy, gradient):
    align = make(strategy, gradient, at=[(1, 2)])
    grads = total_gradients(align, *batch(align))
    without = [name for name, g in grads.items() if not g.abs().max() > 0]
    assert without == []


@kinds
def test_order_of_the_pairs_does_not_matter(strategy, gradient):
    align, other = make(strategy, gradient), make(strategy, gradient, at=[[3, 2], (2, 1), (3, 2)])
    assert other.at == AT
    expected, found = (total_gradients(a, *batch(a)) for a in (align, other))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@kinds
def test_a_step_along_the_gradient_lowers_the_loss(strategy, gradient):
    align = make(strategy, gradient, weight=0.5, std=0.08)
    x, y, clean = batch(align)
    optimizer = torch.optim.SGD([*align.flow.parameters(), *align.projector.parameters()], lr=0.02)
    before = align.loss(x, y, clean)[0].item()
    for _ in range(5):
        optimizer.zero_grad()
        align.loss(x, y, clean)[0].backward()
        optimizer.step()
    assert align.loss(x, y, clean)[0].item() < before - 1e-3


@kinds
def test_bfloat16_autocast_keeps_the_direction(strategy, gradient):
    align = make(strategy, gradient, dtype=torch.float32, std=0.1)
    x, y, clean = batch(align, 8)
    expected = total_gradients(align, x, y, clean)
    align.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = align.loss(x, y, clean)
    assert loss.dtype == torch.float32
    loss.backward()
    found = gradients(align)
    assert all(g.dtype == torch.float32 for g in found.values())
    assert torch.cosine_similarity(flat(found), flat(expected), dim=0) > 0.99
    assert not torch.equal(flat(found), flat(expected))
    assert parts["nll"].item() == pytest.approx(align.loss(x, y, clean)[1]["nll"].item(), abs=0.02)


@kinds
def test_a_step_leaves_nothing_behind(strategy, gradient):
    align = make(strategy, gradient)
    x, y, clean = batch(align)
    before = attributes(align), attributes(align.encoder)
    align.loss(x, y, clean)[0].backward()
    assert (attributes(align), attributes(align.encoder)) == before


def test_projector_fits_between_flow_and_encoder():
    align = make()
    h = torch.randn(2, 9, 16, dtype=torch.float64)
    assert align.projector(h).shape == (2, 9, align.encoder.dim)
    linear = [m for m in align.projector if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [8, 8, 5]


def variant(strategy="reverse", gradient="one_step", **options):
    flow = random_flow(torch.float64, std=0.12)
    align = Alignment(flow, PatchEncoder(flow), AT, strategy, gradient, 0.7, projector_width=8, **options)
    normal_(align.projector.double(), 0.4)
    return align


def test_spatially_normalized_targets_have_mean_0_and_variance_1_over_patches():
    align = variant(spatial_norm=True)
    x, y, clean = batch(align)
    v = align.targets(clean)
    expected = (v - v.mean(1, keepdim=True)) / (v.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    _, _, trace = align.flow.encode(x, y, trace=AT)
    cosines = [F.cosine_similarity(align.projector(h), expected, dim=-1) for h in trace.hidden.values()]
    assert abs(align.loss(x, y, clean)[1]["align"] + torch.stack(cosines).mean()) < 1e-12
    assert torch.allclose(spatially_normalized(v), spatially_normalized(v + 5), atol=1e-9)


def test_spatially_normalized_targets_are_finite_where_all_patches_are_equal():
    assert torch.equal(spatially_normalized(torch.full((2, 9, 4), 3.0)), torch.zeros(2, 9, 4))


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_exact_equals_the_sequential_oracle_with_every_projector(projector):
    exact, oracle = (variant(gradient=g, projector=projector, spatial_norm=True) for g in ("exact", "sequential"))
    oracle.load_state_dict(exact.state_dict())
    assert_close(total_gradients(exact, *batch(exact)), total_gradients(oracle, *batch(exact)), 1e-9)


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_separate_projectors_map_each_pair_by_its_own(projector):
    align = variant(projector=projector, separate_projectors=True)
    x, y, clean = batch(align)
    _, _, trace = align.flow.encode(x, y, trace=AT)
    v, (first, second) = align.targets(clean), align.projector
    cosines = [F.cosine_similarity(p(trace.hidden[pair]), v, dim=-1) for p, pair in zip((first, second), AT, strict=True)]
    assert not torch.allclose(*cosines)
    assert abs(align.loss(x, y, clean)[1]["align"] + torch.stack(cosines).mean()) < 1e-12
    found = total_gradients(align, x, y, clean)
    assert all(g.any() for name, g in found.items() if name.startswith("projector"))


@kinds
def test_inactive_alignment_costs_what_a_plain_flow_does(strategy, gradient):
    align = make(strategy, gradient, dtype=torch.float32)
    x, y, _ = batch(align)
    align.active = False
    with Meter() as inactive:
        align.loss(x, y)[0].backward()
    with Meter() as plain:
        nll_per_dim(*align.flow.encode(x, y)).backward()
    assert inactive.flops == plain.flops > 0


@kinds
def test_inactive_alignment_is_the_plain_likelihood(strategy, gradient):
    align = make(strategy, gradient)
    x, y, _ = batch(align)
    align.active = False
    found = total_gradients(align, x, y)
    loss, parts = align.loss(x, y)
    assert parts.keys() == {"nll"}
    assert loss.item() == parts["nll"].item()
    align.zero_grad()
    nll_per_dim(*align.flow.encode(x, y)).backward()
    expected = gradients(align.flow)
    assert all(torch.equal(found[f"flow.{name}"], g) for name, g in expected.items())
    assert not any(g.any() for name, g in found.items() if name.startswith("projector"))


# ---- whatever the encoder is ----------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Somebody's own encoder, that is another one in training mode."""

    def __init__(self, flow, dim=5):
        super().__init__()
        self.grid, self.dim = flow.grid, dim
        self.conv = nn.Conv2d(flow.channels, dim, 2, stride=2)
        self.norm, self.dropout = nn.BatchNorm2d(dim), nn.Dropout(0.5)
        self.double()

    def forward(self, x):
        return self.dropout(self.norm(self.conv(x))).flatten(2).transpose(1, 2)


def with_own_encoder(**options):
    flow = random_flow()
    return Alignment(flow, Noisy(flow).train(), AT, projector_width=8, **options).double()


@kinds
def test_any_encoder_is_frozen_and_stays_in_eval_mode(strategy, gradient):
    align = with_own_encoder(strategy=strategy, gradient=gradient)
    x, y, clean = batch(align)
    before = copy.deepcopy(align.encoder.state_dict())
    expected = align.targets(clean)
    for change in (align.train, align.requires_grad_, align.eval, align.train):
        change()
        assert not any(module.training for module in align.encoder.modules())
        assert not any(p.requires_grad for p in align.encoder.parameters())
    align.loss(x, y, clean)[0].backward()
    assert torch.equal(align.targets(clean), expected)
    assert all(torch.equal(value, before[name]) for name, value in align.encoder.state_dict().items())
    assert align.flow.training  # unlike the encoder


def test_parameters_and_state_are_those_of_flow_and_projector():
    align = with_own_encoder()
    parts = [*align.flow.parameters(), *align.projector.parameters()]
    assert {id(p) for p in align.parameters()} == {id(p) for p in parts}
    assert all(p.requires_grad for p in align.parameters())
    names = [f"flow.{name}" for name in align.flow.state_dict()]
    names += [f"projector.{name}" for name in align.projector.state_dict()]
    assert list(align.state_dict()) == names


def test_state_is_loaded_strictly_whatever_the_encoder_is():
    align, other = with_own_encoder(), make(weight=0.1)
    assert any(not torch.equal(p, q) for p, q in zip(align.parameters(), other.parameters(), strict=True))
    other.load_state_dict(align.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(align.parameters(), other.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"projector\.0\.bias"):
        other.load_state_dict({name: p for name, p in align.state_dict().items() if name != "projector.0.bias"})


def test_the_encoder_moves_with_the_alignment():
    align = with_own_encoder()
    for dtype in (torch.float32, torch.float64):
        assert align.to(dtype) is align
        assert {p.dtype for p in (*align.encoder.parameters(), *align.parameters())} == {dtype}
        x, y, clean = (t if t is None or not t.is_floating_point() else t.to(dtype) for t in batch(align))
        assert align.loss(x, y, clean)[0].dtype == dtype


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda align: pickle.loads(pickle.dumps(align))])
def test_copies_have_an_encoder_of_their_own(duplicate):
    align = with_own_encoder()
    again = duplicate(align)
    assert again.encoder is not align.encoder
    assert torch.equal(again.loss(*batch(align))[0], align.loss(*batch(align))[0])
    assert not again.train().encoder.training


def test_an_encoder_may_be_a_function():
    flow = random_flow()

    def encoder(x):
        return F.adaptive_avg_pool2d(x, flow.grid).flatten(2).transpose(1, 2)

    encoder.grid, encoder.dim = flow.grid, flow.channels
    align = Alignment(flow, encoder, AT, projector_width=8).double().train()
    loss, parts = align.loss(*batch(align))
    loss.backward()
    assert -1 <= parts["align"] <= 1


@pytest.mark.parametrize("grid", [(3, 3), (2, 2)])
def test_features_of_another_shape_than_the_encoder_says_are_refused(grid):
    align = make()
    align.encoder.grid, align.encoder.forward = grid, lambda x: x.new_zeros(len(x), 7, 5)
    x, y, clean = batch(align)
    with pytest.raises(InputError, match=rf"features must have the shape \[4, {grid[0] ** 2}, 5\], got \[4, 7, 5\]"):
        align.loss(x, y, clean)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": []}, "at must hold at least one pair"),
        ({"at": [(9, 1)]}, "block must be 1 to 3, got 9"),
        ({"at": [(0, 1)]}, "block must be 1 to 3, got 0"),
        ({"at": [(1, 1), (2, 0)]}, "layer 0 does not exist in block 2; expected 1 to 2"),
        ({"at": [(2, 3)]}, "layer 3 does not exist in block 2"),
        ({"strategy": "backward"}, "strategy .*forward, detach, reverse, got 'backward'"),
        ({"gradient": "two_step"}, "gradient .*cached, one_step, exact, sequential, or.*, got 'two_step'"),
        ({"gradient": -1}, "gradient .*a whole number of at least 0, got -1"),
        ({"weight": -0.1}, r"weight must be at least 0, got -0\.1"),
        ({"weight": float("nan")}, "weight .* got nan"),
        ({"weight": float("inf")}, "weight .* got inf"),
        ({"projector": "linear"}, "projector .*mlp, conv, got 'linear'"),
        ({"encoder": "dinov2_b"}, "encoder must be a module that has grid and dim, got str"),
        ({"encoder": nn.Conv2d(2, 5, 1)}, "encoder must be a module that has grid and dim, got Conv2d"),
    ],
)
def test_impossible_alignments_are_named(arguments, message):
    flow = random_flow()
    with pytest.raises(InputError, match=message):
        Alignment(flow, **{"encoder": PatchEncoder(flow), "at": AT, **arguments})


def test_clean_images_or_targets_are_needed():
    align = make()
    x, y, _ = batch(align)
    with pytest.raises(InputError, match="needs x_clean, or targets"):
        align.loss(x, y)


@kinds
def test_impossible_batches_are_named(strategy, gradient):
    align = make(strategy, gradient)
    x, y, clean = batch(align)
    with pytest.raises(InputError, match="label 6 is out of range"):
        align.loss(x, y + 4, clean)
    with pytest.raises(InputError, match=r"labels .*\[4\].*got \[3\]"):
        align.loss(x, y[:3], clean)
    with pytest.raises(InputError, match=r"images .*\[B, 2, 6, 6\], got \[4, 2, 4, 4\]"):
        align.loss(x[..., :4, :4], y, clean)


@pytest.mark.parametrize("shape", [(1, 9, 5), (3, 9, 1), (3, 4, 5)])
def test_targets_of_another_shape_are_refused(shape):
    flow = random_flow()
    align = Alignment(flow, PatchEncoder(flow), at=[(2, 1)]).double()
    with pytest.raises(InputError, match=r"targets must have the shape \[3, 9, 5\], got"):
        align.loss(images(flow), labels(flow), targets=torch.zeros(shape, dtype=torch.float64))


def test_no_more_terms_are_taken_than_there_can_be():
    flow = random_flow()
    align = Alignment(flow, PatchEncoder(flow), at=[(2, 1)], gradient=1000).double()
    assert align.loss(images(flow), labels(flow), images(flow))[1]["terms"] == {2: 8, 3: 8}


@pytest.mark.parametrize("gradient", [0.5, True, None, -1, "two_step"])
def test_gradient_that_does_not_exist_is_refused(gradient):
    flow = random_flow()
    with pytest.raises(InputError, match=r"gradient must be one of .*, got"):
        Alignment(flow, PatchEncoder(flow), at=[(2, 1)], gradient=gradient)


@pytest.mark.parametrize("at", [[(1.7, 2)], ["12"], [1, 2], [(1, 2, 3)]])
def test_what_is_no_pair_is_refused(at):
    flow = random_flow()
    with pytest.raises(InputError, match="is not a pair of block and layer"):
        Alignment(flow, PatchEncoder(flow), at=at)


@pytest.mark.parametrize("tolerance", [-1e-3, 1.0, float("nan")])
def test_impossible_tolerance_is_refused(tolerance):
    flow = random_flow()
    with pytest.raises(InputError, match=r"tolerance must be at least 0 and below 1, got"):
        Alignment(flow, PatchEncoder(flow), at=[(2, 1)], gradient="exact", tolerance=tolerance)


def test_a_looser_tolerance_takes_fewer_terms():
    flow = random_flow(image_size=12)
    x, y = images(flow), labels(flow)
    terms = []
    for tolerance in (0.0, 1e-6, 1e-2):
        align = Alignment(flow, PatchEncoder(flow), at=[(2, 1)], gradient="exact", tolerance=tolerance).double()
        terms.append(align.loss(x, y, x)[1]["terms"][2])
    assert terms[0] == 35
    assert terms[0] > terms[1] > terms[2] >= 1


@kinds
def test_the_loss_has_its_value_where_no_gradient_is_wanted(strategy, gradient):
    align = make(strategy, gradient)
    x, y, clean = batch(align)
    expected = align.loss(x, y, clean)[0]
    with torch.no_grad():
        loss, _ = align.loss(x, y, clean)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
