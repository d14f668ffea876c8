import copy
import math
import pickle
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.functional import jacobian

from builders import SMALL, attributes, gradients, images, labels, random_flow
from flowback import InputError, TarFlow, classify
from flowback.core.units import LOG_2PI, bin_width
from flowback.flow.block import FlowBlock
from flowback.flow.config import FlowConfig
from flowback.flow.patches import patchify

OPTIONS = st.fixed_dictionaries(
    {
        "patch_size": st.integers(1, 2),
        "image_size": st.sampled_from([2, 4, (2, 4), (4, 2)]),
        "channels": st.integers(1, 3),
        "blocks": st.integers(1, 3),
        "layers": st.integers(1, 2),
        "num_classes": st.sampled_from([0, 1, 3]),
        "log_scale_bound": st.sampled_from([None, 0.5, 8.0]),
        "head_dim": st.sampled_from([4, 16]),
        "mlp_ratio": st.sampled_from([0.5, 4.0]),
        "mlp": st.sampled_from(["gelu", "swiglu"]),
        "positions": st.sampled_from(["learned", "rotary"]),
        "prior": st.sampled_from(["standard", "scaled"]),
    }
)
LABELS = st.sampled_from(["none", "dropped", "hard", "mixed", "soft"])


def make_labels(flow, kind, n):
    K = flow.num_classes
    if kind == "none" or (not K and kind != "dropped"):
        return None
    if kind == "dropped":
        return torch.full((n,), -1)
    if kind == "hard":
        return torch.arange(n) % K
    if kind == "mixed":
        return torch.arange(n) % (K + 1) - 1
    return torch.randn(n, K, generator=torch.Generator().manual_seed(3)).softmax(dim=1).to(next(flow.parameters()))


# ---- the properties that make it a flow -------------------------------------------------------------------------


@given(options=OPTIONS, kind=LABELS)
def test_decode_inverts_encode(options, kind):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        flow = random_flow(dtype, std=0.1, **options)
        x = images(flow)
        y = make_labels(flow, kind, len(x))
        z, log_det = flow.encode(x, y)
        assert z.shape == (len(x), *flow.token_shape)
        assert log_det.shape == (len(x),)
        assert z.dtype == log_det.dtype == dtype
        assert (flow.decode(z, y) - x).abs().max() < tolerance


@given(options=OPTIONS, kind=LABELS)
def test_log_det_is_that_of_the_jacobian(options, kind):
    flow = random_flow(std=0.1, **options)
    x = images(flow)
    y = make_labels(flow, kind, len(x))
    for i in range(len(x)):
        yi = None if y is None else y[i : i + 1]
        J = jacobian(lambda v, yi=yi: flow.encode(v, yi)[0].flatten(), x[i : i + 1]).reshape(flow.dims, flow.dims)
        _, expected = torch.linalg.slogdet(J)
        assert abs(flow.encode(x, y)[1][i] - expected) < 1e-8


@given(options=OPTIONS)
def test_eval_equals_train(options):
    flow = random_flow(**options)
    x, y = images(flow), labels(flow)
    z, log_det = flow.eval().encode(x, y)
    z_train, log_det_train = flow.train().encode(x, y)
    assert torch.equal(z, z_train)
    assert torch.equal(log_det, log_det_train)


@given(options=OPTIONS)
def test_a_fresh_flow_is_the_identity(options):
    flow = TarFlow(**{**options, "width": 16})
    x, y = images(flow), labels(flow)
    z, log_det = flow.encode(x, y)
    assert torch.equal(z, patchify(x, flow.config.patch_size))
    assert log_det.abs().max() == 0
    assert torch.equal(flow.decode(z, y), x)


@given(options=OPTIONS)
def test_every_parameter_gets_a_gradient(options):
    if options["image_size"] == options["patch_size"]:
        options = {**options, "patch_size": 1}  # a single token passes unchanged and asks nobody
    flow = random_flow(**options)
    x = images(flow)
    flow.log_prob(x, labels(flow)).sum().backward()
    without = [name for name, grad in gradients(flow).items() if not grad.abs().max() > 0]
    assert without == []


@given(options=OPTIONS)
def test_images_of_a_batch_do_not_meet(options):
    flow = random_flow(**options)
    x, y = images(flow, 4), labels(flow, 4)
    z, log_det = flow.encode(x, y)
    decoded = flow.decode(z, y)
    for i in range(4):
        yi = None if y is None else y[i : i + 1]
        alone, alone_det = flow.encode(x[i : i + 1], yi)
        assert torch.allclose(alone[0], z[i], rtol=1e-9, atol=1e-9)
        assert torch.allclose(alone_det[0], log_det[i], rtol=1e-9, atol=1e-9)
        assert torch.allclose(flow.decode(z[i : i + 1], yi)[0], decoded[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_token_zero_passes_the_first_block_and_the_last_token_the_second(blocks):
    flow = random_flow(blocks=blocks)
    x, y = images(flow), labels(flow)
    _, _, trace = flow.encode(x, y, trace=[])
    tokens = [*(trace.inputs[t] for t in sorted(trace.inputs)), flow.encode(x, y)[0]]
    for t in range(blocks):
        passed = (tokens[t + 1] == tokens[t]).flatten(2).all(dim=2).all(dim=0).nonzero().flatten().tolist()
        assert passed == [0 if t % 2 == 0 else flow.token_shape[0] - 1]


def test_density_integrates_to_one():
    # four dimensions, trapezoidal rule: for a smooth density that vanishes at the border it converges exponentially
    flow = random_flow(image_size=2, channels=1, patch_size=1, width=8, blocks=2, layers=1, num_classes=2, std=0.25)
    axis = torch.linspace(-6.5, 6.5, 25, dtype=torch.float64)
    step = (axis[1] - axis[0]).item()
    rest = torch.cartesian_prod(axis, axis, axis)
    total, mean_z, volume = 0.0, torch.zeros(4, dtype=torch.float64), 0.0
    with torch.no_grad():
        for first in axis:
            x = torch.cat([first.expand(len(rest), 1), rest], dim=1).view(-1, 1, 2, 2)
            z, log_det = flow.encode(x, torch.ones(len(x), dtype=torch.long))
            log_prob = -0.5 * (z.square() + LOG_2PI).sum(dim=(1, 2)) + log_det
            p = log_prob.exp() * step**4
            total += p.sum().item()
            mean_z += (p[:, None] * z.flatten(1)).sum(dim=0)
            volume += (p * log_det).sum().item()
    assert total == pytest.approx(1, abs=1e-4)
    assert mean_z.abs().max() < 1e-4  # under the flow's own density, z is standard normal
    assert abs(volume) > 0.05  # the volume does change, so the log-determinant mattered


def test_log_prob_is_the_change_of_variables():
    flow = random_flow()
    x, y = images(flow), labels(flow)
    z, log_det = flow.encode(x, y)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    assert torch.allclose(flow.log_prob(x, y), normal.log_prob(z).sum(dim=(1, 2)) + log_det, atol=1e-10)


def test_forward_is_encode():
    flow = random_flow()
    x, y = images(flow), labels(flow)
    for called, encoded in zip(flow(x, y), flow.encode(x, y), strict=True):
        assert torch.equal(called, encoded)


def test_encode_ends_in_float32_under_autocast():
    flow = random_flow(torch.float32, std=0.08)
    x, y = images(flow), labels(flow)
    with torch.autocast("cpu", torch.bfloat16):
        z, log_det = flow.encode(x, y)
        decoded = flow.decode(z, y)
    exact, exact_det = flow.encode(x, y)
    assert z.dtype == log_det.dtype == decoded.dtype == torch.float32
    assert torch.allclose(z, exact, atol=0.05)
    assert torch.allclose(log_det, exact_det, atol=0.5)
    assert torch.allclose(decoded, x, atol=0.05)


def test_decode_leaves_z_alone():
    flow = random_flow()
    x, y = images(flow), labels(flow)
    z = flow.encode(x, y)[0].detach()
    before = z.clone()
    flow.decode(z, y)
    flow.decode(z, y, guidance=2.0)
    assert torch.equal(z, before)


# ---- images that are not square, other sizes, copies ------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_images_need_not_be_square(positions):
    flow = random_flow(image_size=(4, 6), channels=1, positions=positions)
    assert (flow.image_size, flow.data_shape, flow.grid) == ((4, 6), (1, 4, 6), (2, 3))
    x, y = images(flow), labels(flow)
    z, log_det = flow.encode(x, y)
    assert z.shape == (3, 6, 4)
    assert torch.allclose(flow.decode(z, y), x, atol=1e-10)
    for i in range(3):
        J = jacobian(lambda v, i=i: flow.encode(v, y[i : i + 1])[0].flatten(), x[i : i + 1]).reshape(24, 24)
        assert abs(torch.linalg.slogdet(J)[1] - log_det[i]) < 1e-9
    drawn, log_prob = flow.sample(3, y=2, denoise=False, return_log_prob=True)
    assert drawn.shape == (3, 1, 4, 6)
    assert torch.allclose(flow.log_prob(drawn, 2), log_prob, atol=1e-9)
    assert flow.sample(2).shape == (2, 1, 4, 6)
    with pytest.raises(InputError, match=r"images must have the shape \[B, 1, 4, 6\], got \[3, 1, 6, 4\]"):
        flow.encode(x.mT, y)


def test_tokens_of_a_wide_image_are_in_raster_order():
    flow = TarFlow(image_size=(2, 6), channels=1, patch_size=2, width=16, head_dim=8, blocks=1, layers=1)
    x = torch.arange(12.0).view(1, 1, 2, 6)
    assert flow.encode(x)[0].tolist() == [[[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]]


def test_a_flow_with_rotary_positions_serves_other_sizes():
    flow = random_flow(positions="rotary", noise_std=0.2)
    for size in (8, (4, 10)):
        other = flow.resized(size)
        height, width = (size, size) if isinstance(size, int) else size
        assert other.image_size == (height, width)
        assert other.token_shape == (height * width // 4, 8)
        x = images(other)
        assert torch.allclose(other.decode(other.encode(x, 1)[0], 1), x, atol=1e-9)
        assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), other.parameters(), strict=True))
        assert other.dtype == flow.dtype
        assert not other.training
    same = flow.resized(6)
    assert torch.equal(same.encode(images(flow))[0], flow.encode(images(flow))[0])
    same.blocks[0].proj_in.weight.data += 1
    assert not torch.equal(same.blocks[0].proj_in.weight, flow.blocks[0].proj_in.weight)


@pytest.mark.parametrize("options", [{}, {"positions": "rotary", "prior": "scaled"}])
def test_positions_and_priors_that_belong_to_a_size_are_not_resized(options):
    with pytest.raises(InputError, match="rotary positions and the standard prior"):
        random_flow(**options).resized(8)
    with pytest.raises(InputError, match="patch_size 2 does not divide the image size 7"):
        random_flow(positions="rotary").resized(7)


@pytest.mark.parametrize("options", [{}, {"positions": "rotary", "prior": "scaled", "image_size": (4, 6)}])
def test_copies_pickles_and_state_dicts_give_equal_outputs(options):
    flow = random_flow(**options)
    x, y = images(flow), labels(flow)
    loaded = TarFlow(flow.config).double()
    assert loaded.load_state_dict(flow.state_dict()).missing_keys == []
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), loaded):
        assert other.config == flow.config
        assert torch.equal(other.log_prob(x, y), flow.log_prob(x, y))
        assert torch.equal(other.sample(2, seed=0), flow.sample(2, seed=0))
        other.blocks[0].proj_in.weight.data += 1
        assert not torch.equal(other.log_prob(x, y), flow.log_prob(x, y))


# ---- labels -----------------------------------------------------------------------------------------------------


def test_dropped_label_is_the_mean_class():
    flow = random_flow(num_classes=3)
    x = images(flow)
    expected = flow.encode(x, torch.full((3, 3), 1 / 3, dtype=torch.float64))
    for y in (torch.full((3,), -1), None, [-1, -1, -1], -1):
        z, log_det = flow.encode(x, y)
        assert torch.allclose(z, expected[0], rtol=1e-12, atol=1e-12)
        assert torch.allclose(log_det, expected[1], rtol=1e-12, atol=1e-12)


def test_label_is_the_one_hot_weight():
    flow = random_flow(num_classes=3)
    x = images(flow)
    weights = torch.eye(3, dtype=torch.float64)[[2, 0, 1]]
    assert torch.equal(flow.encode(x, torch.tensor([2, 0, 1]))[0], flow.encode(x, weights)[0])
    assert torch.equal(flow.encode(x, [2, 0, 1])[0], flow.encode(x, weights)[0])


def test_labels_matter_and_each_acts_on_its_own_image():
    flow = random_flow()
    x = images(flow)[:1].expand(5, -1, -1, -1)
    log_prob = flow.log_prob(x, torch.tensor([0, 1, 2, 3, -1]))
    assert (log_prob[:, None] - log_prob[None]).abs()[~torch.eye(5, dtype=torch.bool)].min() > 1e-4


def test_unconditional_flow_takes_no_label_for_an_answer():
    flow = random_flow(num_classes=0)
    x = images(flow)
    assert torch.equal(flow.encode(x)[0], flow.encode(x, torch.full((3,), -1))[0])
    assert not any("class_embed" in name for name in flow.state_dict())


# ---- trace ------------------------------------------------------------------------------------------------------


def test_trace_holds_every_blocks_input_and_the_asked_states():
    flow = random_flow()
    x, y = images(flow), labels(flow)
    z, log_det, trace = flow.encode(x, y, trace=[(3, 2), (1, 1), (3, 1), (1, 1)])
    assert torch.equal(z, flow.encode(x, y)[0])
    assert sorted(trace.inputs) == [1, 2, 3]
    assert sorted(trace.hidden) == [(1, 1), (3, 1), (3, 2)]
    classes = flow.class_weights(y, len(x))
    tokens, total = patchify(x, 2), torch.zeros(len(x), dtype=torch.float64)
    for t, block in enumerate(flow.blocks, start=1):
        assert torch.equal(trace.inputs[t], tokens)
        out = block(tokens, classes, hidden=[1, 2])
        for layer in (1, 2):
            if (t, layer) in trace.hidden:
                assert trace.hidden[t, layer].shape == (len(x), flow.token_shape[0], flow.config.width)
                assert torch.equal(trace.hidden[t, layer], out.hidden[layer])
        tokens, total = out.z, total + out.log_det
    assert torch.equal(z, tokens)
    assert torch.allclose(log_det, total, atol=1e-12)


@pytest.mark.parametrize("i", [0, 4, 8])
def test_traced_states_of_a_flipped_block_are_in_raster_order(i):
    flow = random_flow(blocks=2)
    x, y = images(flow), labels(flow)
    _, _, trace = flow.encode(x, y, trace=[(2, 2)])
    inputs = trace.inputs[2].clone()
    inputs[:, i] += torch.randn(flow.token_shape[1])
    moved = flow.blocks[1](inputs, flow.class_weights(y, 3), hidden=[2]).hidden[2]  # the flipped block alone
    changed = ((moved - trace.hidden[2, 2]).abs().amax(dim=(0, 2)) > 1e-9).tolist()
    assert changed == [d <= i for d in range(9)]


def test_a_trace_is_on_the_graph():
    flow = random_flow()
    x = images(flow).requires_grad_()
    _, _, trace = flow.encode(x, labels(flow), trace=[(2, 1)])
    (grad,) = torch.autograd.grad(trace.hidden[2, 1].square().sum(), x)
    assert grad.abs().max() > 0


# ---- noise of training ------------------------------------------------------------------------------------------


def test_gaussian_noise_has_its_standard_deviation():
    flow = random_flow(image_size=8, noise_std=0.3)
    noise = flow.perturb(torch.zeros(500, 2, 8, 8, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)


def test_uniform_noise_fills_the_bin():
    flow = random_flow(image_size=8, noise="uniform", levels=17)
    noise = flow.perturb(torch.zeros(500, 2, 8, 8, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert noise.abs().max() <= bin_width(17) / 2
    assert noise.max() - noise.min() > 0.99 * bin_width(17)
    assert noise.std().item() == pytest.approx(bin_width(17) / math.sqrt(12), rel=0.02)


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
def test_noise_follows_the_generator_and_leaves_the_images_alone(noise):
    flow = random_flow(noise=noise)
    x = images(flow)
    before = x.clone()
    first, second, other = (flow.perturb(x, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(x, before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("image_size", 0, r"flow\.image_size must be a whole number of at least 1.*, got 0"),
        ("image_size", None, r"needs image_size"),
        ("image_size", 7.0, r"flow\.image_size must be .*, got 7\.0"),
        ("channels", 0, r"flow\.channels must be .*, got 0"),
        ("num_classes", -1, r"flow\.num_classes must be a whole number of at least 0, got -1"),
        ("levels", 1, r"flow\.levels must be a whole number of at least 2, got 1"),
        ("patch_size", 4, r"flow\.patch_size 4 does not divide the image size 6; expected 1, 2, 3, 6$"),
        ("patch_size", 0, r"flow\.patch_size must be .*, got 0"),
        ("patch_size", "2", r"flow\.patch_size must be .*, got '2'"),
        ("width", 0, r"flow\.width must be .*, got 0"),
        ("head_dim", 5, r"flow\.head_dim 5 does not divide flow\.width 16; expected 1, 2, 4, 8, 16$"),
        ("blocks", 0, r"flow\.blocks must be .*, got 0"),
        ("layers", -2, r"flow\.layers must be .*, got -2"),
        ("layers", [2, 0, 1], r"flow\.layers must be .* or a list of 3 of them, got \[2, 0, 1\]"),
        ("layers", [2, 2], r"flow\.layers must be .* or a list of 3 of them, got \[2, 2\]"),
        ("mlp", "relu", r"flow\.mlp must be one of gelu.*, got 'relu'"),
        ("mlp_ratio", 0, r"flow\.mlp_ratio must be .*, got 0"),
        ("positions", "none", r"flow\.positions must be one of learned.*, got 'none'"),
        ("log_scale_bound", 0, r"flow\.log_scale_bound must be above 0, or null, got 0"),
        ("log_scale_bound", -1.0, r"flow\.log_scale_bound must be .*, got -1\.0"),
        ("noise", "laplace", r"flow\.noise must be one of gaussian, uniform, got 'laplace'"),
        ("noise_std", -0.1, r"flow\.noise_std must be at least 0, got -0\.1"),
        ("noise_std", float("inf"), r"flow\.noise_std must be .*, got inf"),
        ("noise_std", float("nan"), r"flow\.noise_std must be .*, got nan"),
        ("depth", 3, r"no option 'depth'; expected image_size, .*prior$"),
    ],
)
def test_impossible_options_are_named(option, value, message):
    with pytest.raises(InputError, match=message):
        TarFlow(**{**SMALL, option: value})


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 4]), r"label 4 is out of range; expected 0 to 3, or -1 for no label"),
        (torch.tensor([0, -2, 3]), r"label -2 is out of range"),
        (torch.tensor([0, 1]), r"labels must have the shape \[3\], .*got \[2\]"),
        (torch.tensor([[0], [1], [2]]), r"labels must .* got \[3, 1\]"),
        (torch.full((3, 5), 0.2), r"class weights must have the shape \[3, 4\], got \[3, 5\]"),
        (torch.full((2, 4), 0.25), r"class weights must .* got \[2, 4\]"),
    ],
)
def test_impossible_labels_are_named(y, message):
    flow = random_flow()
    z = torch.zeros(3, *flow.token_shape, dtype=torch.float64)
    for call in (lambda: flow.encode(images(flow), y), lambda: flow.log_prob(images(flow), y), lambda: flow.decode(z, y)):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("y", [torch.tensor([0, 0, 0]), torch.full((3, 4), 0.25)])
def test_labels_of_an_unconditional_flow_are_refused(y):
    flow = random_flow(num_classes=0)
    with pytest.raises(InputError, match=r"unconditional|class weights"):
        flow.encode(images(flow), y)


@pytest.mark.parametrize("shape", [(3, 2, 6, 5), (3, 1, 6, 6), (2, 6, 6), (3, 2, 8, 8)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match=r"images must have the shape \[B, 2, 6, 6\], got"):
        random_flow().encode(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 9, 7), (3, 8, 8), (9, 8)])
def test_z_of_another_shape_is_refused(shape):
    with pytest.raises(InputError, match=r"z must have the shape \[B, 9, 8\], got"):
        random_flow().decode(torch.zeros(shape, dtype=torch.float64))


def test_unknown_decoder_is_refused():
    with pytest.raises(InputError, match=r"decoding method must be one of auto, sequential.*, got 'newton'"):
        random_flow().decode(torch.zeros(1, 9, 8, dtype=torch.float64), method="newton")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((4, 1), "block must be 1 to 3, got 4"),
        ((0, 1), "block must be 1 to 3, got 0"),
        ((2, 3), "layer 3 .* block 2; expected 1 to 2"),
        ((2, 0), "layer 0"),
    ],
)
def test_impossible_trace_is_refused(pair, message):
    flow = random_flow()
    with pytest.raises(InputError, match=message):
        flow.encode(images(flow), trace=[pair])


def test_a_call_that_fails_midway_leaves_nothing_behind(monkeypatch):
    flow = random_flow()
    x, y = images(flow), labels(flow)
    z = flow.encode(x, y)[0].detach()
    expected, before = flow.decode(z, y), attributes(flow)
    original, calls = FlowBlock.predict_next, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 12:  # within the second block that is decoded
            raise RuntimeError("power cut")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FlowBlock, "predict_next", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            flow.sample(y=y)
    assert attributes(flow) == before
    assert torch.equal(flow.decode(z, y), expected)


def test_ordinary_calls_leave_nothing_behind():
    flow = random_flow()
    before = attributes(flow)
    flow.encode(images(flow), labels(flow), trace=[(1, 1)])
    flow.sample(3, guidance=1.0)
    classify(flow, images(flow), "exact")
    classify(flow, images(flow), "single_gradient")
    assert attributes(flow) == before


def test_config_knows_all_options_of_the_flow():
    flow = random_flow(mlp_ratio=2.0, noise="uniform")
    assert {f.name for f in fields(FlowConfig)} >= set(SMALL)
    assert (flow.config.mlp_ratio, flow.config.noise, flow.config.levels) == (2.0, "uniform", 256)
    assert (flow.grid, flow.token_shape, flow.dims) == ((3, 3), (9, 8), 72)


WRONG_TYPES = [("num_classes", 1.5), ("levels", "x"), ("levels", 2.5), ("mlp", ["gelu"]), ("mlp_ratio", None)]
WRONG_TYPES += [("mlp_ratio", math.inf), ("mlp_ratio", 1e-9), ("log_scale_bound", "x"), ("noise_std", None)]
WRONG_TYPES += [("patch_size", None), ("width", True)]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_option_of_another_type_is_refused(name, value):
    with pytest.raises(InputError, match=f"flow.{name} must be"):
        TarFlow(**{"image_size": 8, "patch_size": 2, "width": 32, name: value})
