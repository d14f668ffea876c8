"""`decode` is differentiable: in z, class weights, known images and parameters, under every method and guidance."""

import gc
import weakref

import pytest
import torch
from torch.autograd import gradcheck

from builders import images, labels, random_flow
from flowback import Guidance, InputError, TarFlow
from flowback.flow import implicit
from flowback.flow.autotune import Autotune, Measurement, machine_name
from flowback.flow.block import affine_decode
from flowback.flow.decoding import METHODS, Solver, solve
from flowback.flow.patches import patchify, unpatchify
from oracle import GrowingCache

TINY = {"image_size": 4, "channels": 1, "width": 8, "head_dim": 4, "blocks": 2, "layers": 1, "num_classes": 3, "std": 0.15}
GUIDANCES = [Guidance(), Guidance(1.5), Guidance(0.8, "annealed", "a"), Guidance(2.0, "constant", "mu")]

all_methods = pytest.mark.parametrize("method", METHODS)
all_guidances = pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
both_orders = pytest.mark.parametrize("flipped", [False, True], ids=["as made", "the other way round"])


def tiny(flipped=False, **options):
    flow = random_flow(**{**TINY, **options})
    for block in flow.blocks:
        block.flip ^= flipped
    return flow


def arguments(flow, n=2):
    """z, class weights, and known images with their mask, of which the first two and the images ask for gradients."""
    generator = torch.Generator().manual_seed(6)
    z = torch.randn(n, *flow.token_shape, generator=generator, dtype=torch.float64)
    weights = torch.randn(n, flow.num_classes, generator=generator, dtype=torch.float64).softmax(1)
    mask = torch.rand(n, *flow.data_shape, generator=generator) < 0.3
    return z.requires_grad_(), weights.requires_grad_(), images(flow, n).requires_grad_(), mask


def token_by_token(flow, z, weights, guidance, known=None):
    """Decode by definition, on the graph of autograd: each token after those before it, two passes for guidance."""
    rows = weights if not guidance.scale else torch.cat([weights, torch.full_like(weights, 1 / flow.num_classes)])
    tokens, p, N = z, flow.config.patch_size, z.shape[1]
    given, where = (patchify(part, p) for part in known) if known else (z, torch.zeros_like(z, dtype=torch.bool))
    for t in range(flow.config.blocks, 0, -1):
        block, cache = flow.blocks[t - 1], GrowingCache()
        parts, values, places = (block.reorder(part).split(1, dim=1) for part in (tokens, given, where))
        keep = [torch.where(place, value, 0) if t == 1 else 0 for place, value in zip(places, values, strict=True)]
        free = [~place if t == 1 else 1 for place in places]
        x = [parts[0] * free[0] + keep[0]]
        for d in range(1, N):
            own = x[-1] if not guidance.scale else x[-1].repeat(2, 1, 1)
            mu, a, _ = block.predict_next(own, rows, cache=cache)
            if guidance.scale:
                w = guidance.scale * (d / (N - 1) if guidance.schedule == "annealed" else 1)
                (mu, mu_u), (a, a_u) = mu.chunk(2), a.chunk(2)
                mu = mu + w * (mu - mu_u) if guidance.guided != "a" else mu
                a = a + w * (a - a_u) if guidance.guided != "mu" else a
            x.append(affine_decode(parts[d], mu, a) * free[d] + keep[d])
        tokens = block.reorder(torch.cat(x, dim=1))
    return unpatchify(tokens, p, flow.image_size)


def loss(x):
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(x.dtype)
    return (weights * torch.tanh(x)).sum() + 0.1 * x.square().sum()


# ---- against autograd and finite differences --------------------------------------------------------------------------


@both_orders
@all_methods
@all_guidances
@pytest.mark.parametrize("inpaint", [False, True], ids=["all decoded", "some known"])
def test_every_gradient_equals_autograd_through_the_token_by_token_decode(flipped, method, guidance, inpaint):
    flow = tiny(flipped)
    z, weights, given, mask = arguments(flow)
    known = (given, mask) if inpaint else None
    inputs = [z, weights, *([given] if inpaint else []), *flow.parameters()]
    expected_x = token_by_token(flow, z, weights, guidance, known)
    expected = torch.autograd.grad(loss(expected_x), inputs)
    x = flow.decode(z, weights, guidance, method, tolerance=1e-13, known=known)
    assert torch.allclose(x, expected_x, atol=1e-11)
    for found, wanted in zip(torch.autograd.grad(loss(x), inputs), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-10 * wanted.abs().max())
        assert wanted.abs().max() > 0


@pytest.mark.parametrize("options", [{"positions": "rotary", "mlp": "swiglu"}, {"image_size": (2, 6)}, {"blocks": 3}])
def test_other_flows_too(options):
    flow = tiny(**options)
    z, weights, given, mask = arguments(flow)
    inputs = [z, weights, given, *flow.parameters()]
    expected = torch.autograd.grad(loss(token_by_token(flow, z, weights, GUIDANCES[1], (given, mask))), inputs)
    found = torch.autograd.grad(loss(flow.decode(z, weights, GUIDANCES[1], known=(given, mask))), inputs)
    for one, wanted in zip(found, expected, strict=True):
        assert torch.allclose(one, wanted, rtol=1e-7, atol=1e-9 * wanted.abs().max())


@both_orders
@all_methods
@pytest.mark.parametrize("guidance", GUIDANCES[:2], ids=str)
def test_gradients_equal_finite_differences(flipped, method, guidance):
    flow = tiny(flipped)
    z, weights, given, mask = arguments(flow, 1)

    def decoded(z, weights, given):
        return flow.decode(z, weights, guidance, method, 1e-13, known=(given, mask))

    assert gradcheck(decoded, (z, weights, given), fast_mode=True)
    assert gradcheck(lambda *inputs: flow.decode(*inputs, guidance, method, 1e-13), (z, weights), fast_mode=True)


@pytest.mark.parametrize("name", ["blocks.0.proj_out.bias", "blocks.1.class_embed", "blocks.1.proj_in.weight"])
@pytest.mark.parametrize("guidance", GUIDANCES[:2], ids=str)
def test_gradients_in_a_parameter_equal_finite_differences(name, guidance):
    flow = tiny()
    z, weights, _, _ = arguments(flow)
    parameter = flow.get_parameter(name)
    (found,) = torch.autograd.grad(loss(flow.decode(z, weights, guidance)), parameter)
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    h, values = 1e-6, []
    with torch.no_grad():
        for step in (h, -2 * h):
            parameter += step * direction
            values.append(loss(flow.decode(z, weights, guidance)).item())
    assert (found * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


def test_it_follows_a_measured_solver_and_a_draft():
    flow = tiny()
    z, weights, _, _ = arguments(flow)
    expected = torch.autograd.grad(loss(flow.decode(z, weights, method="sequential")), [z, *flow.parameters()])
    for solver in (Solver("gauss_seidel", 2), Solver("gauss_seidel", draft=True), Solver("jacobi", draft=True)):
        flow.autotune = Autotune(machine_name(flow.device), {1: [Measurement(solver, 1.0, 1.0, 1, 0.0)] * 2})
        x, report = flow.decode_with_report(z, weights)
        assert [solved.solver for solved in report] == [solver] * 2
        for found, wanted in zip(torch.autograd.grad(loss(x), [z, *flow.parameters()]), expected, strict=True):
            assert torch.allclose(found, wanted, rtol=1e-7, atol=1e-9)


def test_decoding_what_was_encoded_has_the_gradient_of_the_identity():
    flow = tiny()
    x, y = images(flow).requires_grad_(), labels(flow)
    back = flow.decode(flow.encode(x, y)[0], y)
    g = torch.randn(x.shape, dtype=torch.float64)
    found = torch.autograd.grad(back, [x, *flow.parameters()], g)
    assert torch.allclose(found[0], g, atol=1e-9)
    assert max(gradient.abs().max() for gradient in found[1:]) < 1e-9  # whatever the parameters, it is x


def test_a_flow_learns_through_its_samples():
    flow = tiny()
    z, target = arguments(flow)[0].detach(), 0.3
    optimizer = torch.optim.Adam(flow.parameters(), 0.02)
    losses = []
    for _ in range(30):
        value = (flow.decode(z, 1) - target).square().mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.3 * losses[0]


# ---- only what is asked for ---------------------------------------------------------------------------------------------


def test_only_what_asks_for_a_gradient_gets_one():
    flow = tiny().requires_grad_(False)
    z, weights, given, mask = (part.detach() for part in arguments(flow))
    assert not flow.decode(z, weights, 1.0, known=(given, mask)).requires_grad
    for i in range(3):
        inputs = [z, weights, given]
        inputs[i] = inputs[i].clone().requires_grad_()
        loss(flow.decode(inputs[0], inputs[1], 1.0, known=(inputs[2], mask))).backward()
        assert [part.grad is not None for part in inputs] == [i == j for j in range(3)]
    flow.blocks[1].proj_in.bias.requires_grad_()
    loss(flow.decode(z, weights)).backward()
    assert [name for name, p in flow.named_parameters() if p.grad is not None] == ["blocks.1.proj_in.bias"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@all_methods
def test_without_gradients_there_is_no_graph(mode, method):
    flow = tiny()
    z, weights, given, mask = arguments(flow)
    with mode():
        assert not flow.decode(z, weights, 1.0, method, known=(given, mask)).requires_grad
        assert not flow.sample(2, seed=0).requires_grad
    assert not flow.sample(2, seed=0).requires_grad
    x = flow.decode(z.detach(), weights.detach(), method=method)
    assert x.requires_grad  # in the parameters
    frozen = flow.requires_grad_(False).decode(z.detach(), weights.detach(), method=method)
    assert not frozen.requires_grad
    assert torch.allclose(x, frozen, atol=1e-12)


def test_a_graph_keeps_no_more_than_the_images_of_every_block():
    """Whatever the number of tokens and layers."""
    flow = tiny(image_size=8, layers=3)
    z, _, _, _ = arguments(flow)
    sizes, own = [], {p.data_ptr() for p in flow.parameters()}

    def pack(t):
        sizes.append(0 if t.data_ptr() in own else t.numel())
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = flow.decode(z, [0, 1], method="gauss_seidel")
    assert x.requires_grad
    assert 0 < sum(sizes) <= 2 * (z.numel() + 2 * flow.num_classes)


@pytest.mark.parametrize("backward", [True, False])
def test_a_graph_goes_with_its_images(backward, monkeypatch):
    flow, maps = tiny(), []

    def spy(F, *args):
        maps.append(weakref.ref(F))
        return solve(F, *args)

    monkeypatch.setattr(implicit, "solve", spy)
    z, weights, given, mask = arguments(flow)
    x = flow.decode(z, weights, 1.0, known=(given, mask))
    if backward:
        loss(x).backward()
    assert maps[0]() is not None
    del x
    gc.collect()
    assert [ref() for ref in maps] == [None, None]


@all_methods
def test_nothing_is_written_to(method):
    flow = tiny()
    z, weights, given, mask = arguments(flow)
    before = [part.detach().clone() for part in (z, weights, given, mask, *flow.parameters())]
    loss(flow.decode(z, weights, 1.0, method, known=(given, mask))).backward()
    for part, then in zip((z, weights, given, mask, *flow.parameters()), before, strict=True):
        assert torch.equal(part, then)


def test_parameters_that_were_changed_in_between_are_noticed():
    flow = tiny()
    x = flow.decode(arguments(flow)[0], 1)
    with torch.no_grad():
        flow.blocks[0].proj_in.bias += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


# ---- modes --------------------------------------------------------------------------------------------------------------


@all_methods
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after"])
def test_gradients_under_autocast_are_near_those_without(method, inside):
    flow = tiny(std=0.1).float()
    inputs = list(flow.parameters())
    z = arguments(flow)[0].float().detach().requires_grad_()

    def gradients(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss(flow.decode(z, [0, 2], 1.0, method))
            if enabled and inside:
                return torch.autograd.grad(value, [z, *inputs])
        return torch.autograd.grad(value, [z, *inputs])

    exact, low = gradients(False), gradients(True)
    assert all(gradient.dtype == torch.float32 for gradient in low)
    exact, low = (torch.cat([gradient.flatten() for gradient in each]) for each in (exact, low))
    assert 0 < (exact - low).norm() < 0.03 * exact.norm()


def test_gradients_of_half_precision_weights():
    flow = tiny(std=0.1)
    z = arguments(flow)[0]
    (exact,) = torch.autograd.grad(loss(flow.decode(z, [0, 2])), z)
    low = flow.bfloat16()
    z32 = z.detach().float().requires_grad_()
    found = torch.autograd.grad(loss(low.decode(z32, [0, 2])), [z32, *low.parameters()])
    assert found[0].dtype == torch.float32
    assert all(gradient.dtype == torch.bfloat16 for gradient in found[1:])
    assert (found[0] - exact).norm() < 0.05 * exact.norm()


def test_tensors_of_inference_mode_are_decoded_outside_or_refused_by_name():
    flow = tiny()
    x = images(flow)
    with torch.inference_mode():
        z, weights = flow.encode(x, 1)[0], flow.class_weights(1, 3)
    back = flow.decode(z, 1)
    assert torch.allclose(back, x, atol=1e-9)
    back.sum().backward()
    assert flow.blocks[0].proj_in.weight.grad is not None
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors"):
        flow.decode(z, weights)


def test_a_second_derivative_is_refused():
    flow = tiny()
    z = arguments(flow)[0]
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(flow.decode(z, 1).square().sum(), z, create_graph=True)


def test_a_graph_can_be_kept_for_a_second_backward_pass():
    flow = tiny()
    z = arguments(flow)[0]
    value = loss(flow.decode(z, 1))
    first, second = (torch.autograd.grad(value, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", METHODS)
def test_a_single_token_has_the_gradient_of_the_identity(method):
    flow = TarFlow(image_size=2, channels=1, patch_size=2, width=8, head_dim=4, blocks=2, layers=1).double()
    z = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    found = torch.autograd.grad(flow.decode(z, method=method), [z, *flow.parameters()], g, allow_unused=True)
    assert torch.equal(found[0], patchify(g, 2))
    assert all(gradient is None or gradient.abs().max() == 0 for gradient in found[1:])


def test_known_images_must_come_with_a_mask_and_for_every_z():
    flow = tiny()
    z, _, given, mask = arguments(flow)
    for known in ((given[:1], mask[:1]), (given, mask.float())):
        with pytest.raises(InputError, match="known must be 2 images and a boolean mask"):
            flow.decode(z, 1, known=known)


def test_gradients_on_another_device(second):
    flow = tiny().float()
    z, weights = (part.detach().float() for part in arguments(flow)[:2])
    names, results = ["z", "weights", *dict(flow.named_parameters())], []
    for device in ("cpu", second):
        flow = flow.to(device)
        inputs = [part.to(device).requires_grad_() for part in (z, weights)]
        value = flow.decode(*inputs, 1.0, tolerance=1e-6).square().sum()
        results.append(torch.autograd.grad(value, [*inputs, *flow.parameters()]))
        assert {gradient.device.type for gradient in results[-1]} == {torch.device(device).type}
    for name, expected, found in zip(names, *results, strict=True):
        assert torch.allclose(found.cpu(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max()), name
