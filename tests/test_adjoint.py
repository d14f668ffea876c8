"""Gradients of z along the generative pass, against autograd through a token-by-token decode and finite differences."""

import pytest
import torch

from builders import images, random_flow
from flowback.flow import implicit
from flowback.flow.patches import unpatchify
from oracle import decode_with_graph

FLOWS = {
    "one block": {"blocks": 1},
    "one block, flipped": {"blocks": 1, "flipped": True},
    "two blocks": {"blocks": 2},
    "two blocks, the other way round": {"blocks": 2, "flipped": True},
    "three blocks": {"blocks": 3},
    "three blocks, the other way round": {"blocks": 3, "flipped": True},
    "one number a token, no bound": {"image_size": 4, "channels": 1, "patch_size": 1, "log_scale_bound": None},
    "one token": {"image_size": 2},
    "rotary, gated": {"positions": "rotary", "mlp": "swiglu"},
}
LABELS = {"unconditional": None, "classes": [1, 3, 0], "some without": [-1, 2, -1]}

flows = pytest.mark.parametrize("options", FLOWS.values(), ids=FLOWS)
labels = pytest.mark.parametrize("y", LABELS.values(), ids=LABELS)


def a_flow(options, y):
    options = dict(options)
    flipped = options.pop("flipped", False)
    flow = random_flow(**options, num_classes=0 if y is None else 4)
    for block in flow.blocks:
        block.flip ^= flipped
    return flow, None if y is None else torch.tensor(y)


def a_noise(flow):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(3, *flow.token_shape, generator=generator, dtype=torch.float64)


def decoded_with_graph(flow, z, y):
    classes = flow.class_weights(y, len(z))
    for block in reversed(flow.blocks):
        z = decode_with_graph(block, z, classes)
    return unpatchify(z, flow.config.patch_size, flow.image_size)


def loss(x):
    """A loss whose gradient depends on x and reaches every pixel; `[B]`."""
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    return (weights * torch.tanh(x)).sum(dim=(1, 2, 3)) + 0.1 * x.square().sum(dim=(1, 2, 3))


@pytest.fixture
def gradient(monkeypatch):
    """`gradient(flow, z, y, g, tolerance)`: the cotangent of z of one of the images; of the loss above where g is None."""

    def solve(flow, z, y, g=None, tolerance=1e-14):
        monkeypatch.setitem(implicit.TOLERANCES, torch.float64, tolerance)
        z = z.detach().requires_grad_()
        x = flow.decode(z, y)
        return torch.autograd.grad(loss(x).sum() if g is None else x, z, g)[0]

    return solve


@flows
@labels
def test_equals_autograd_through_the_decode(gradient, options, y):
    flow, y = a_flow(options, y)
    z = a_noise(flow).requires_grad_()
    x = decoded_with_graph(flow, z, y)
    (expected,) = torch.autograd.grad(loss(x).sum(), z)
    found = gradient(flow, z, y)
    assert found.shape == z.shape
    assert (found - expected).norm() < 1e-9 * expected.norm()


@flows
@labels
def test_equals_finite_differences_of_the_library_decoder(gradient, options, y):
    flow, y = a_flow(options, y)
    z = a_noise(flow)
    found = gradient(flow, z, y)
    h, (_, N, D) = 1e-5, z.shape
    with torch.no_grad():
        for n, d in {(0, 0), (N // 2, D - 1), (N - 1, 0)}:
            step = torch.zeros_like(z)
            step[:, n, d] = h
            up, down = (loss(flow.decode(z + sign * step, y, method="sequential")) for sign in (1, -1))
            assert torch.allclose((up - down) / (2 * h), found[:, n, d], rtol=1e-6, atol=1e-7), (n, d)


def test_the_decode_needs_more_than_the_first_term_of_the_series(gradient):
    """Else the tests above could not tell the adjoint from one step of it."""
    flow, y = a_flow(FLOWS["three blocks"], LABELS["classes"])
    exact, first = (gradient(flow, a_noise(flow), y, tolerance=t) for t in (1e-14, 1e9))
    assert (exact - first).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 1e-3])
def test_a_looser_tolerance_errs_by_about_itself(gradient, tolerance):
    flow, y = a_flow(FLOWS["three blocks"], LABELS["classes"])
    exact, found = (gradient(flow, a_noise(flow), y, tolerance=t) for t in (1e-14, tolerance))
    assert 0 < (exact - found).norm() < 10 * tolerance * exact.norm()


def test_it_is_linear_in_the_cotangent(gradient):
    flow, y = a_flow(FLOWS["two blocks"], LABELS["classes"])
    z, a, b = flow.encode(images(flow), y)[0], images(flow, seed=2), images(flow, seed=3)
    parts = [gradient(flow, z, y, g) for g in (a, b, 2 * a - b)]
    assert torch.allclose(2 * parts[0] - parts[1], parts[2], atol=1e-11)


def test_nothing_but_the_result_is_left_behind(gradient):
    flow, y = a_flow(FLOWS["two blocks"], LABELS["classes"])
    found = gradient(flow, a_noise(flow), y)
    assert not found.requires_grad
    assert found.abs().min() > 0
    assert all(p.grad is None for p in flow.parameters())
    assert all(p.requires_grad for p in flow.parameters())


def test_an_image_does_not_depend_on_its_batch(gradient):
    flow, y = random_flow(), torch.tensor([0, 3, -1])
    z, g = flow.encode(images(flow, 3), y)[0], torch.randn(3, 2, 6, 6, dtype=torch.float64)
    g[0] *= 1e6
    together = gradient(flow, z, y, g, tolerance=1e-2)
    for i in range(3):
        alone = gradient(flow, z[i : i + 1], y[i : i + 1], g[i : i + 1], tolerance=1e-2)
        assert torch.allclose(together[i], alone[0], rtol=1e-9)


def test_an_image_that_is_not_finite_leaves_the_others_alone(gradient):
    flow, y = random_flow(), torch.tensor([0, 3])
    z, g = flow.encode(images(flow, 2), y)[0].detach(), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    expected = gradient(flow, z[1:], y[1:], g[1:], tolerance=1e-12)
    z[0] = float("nan")
    assert torch.allclose(gradient(flow, z, y, g, tolerance=1e-12)[1], expected[0], rtol=1e-9)
