import pytest
import torch
from torch.autograd.functional import jacobian

from builders import normal_
from flowback.flow.block import FlowBlock, affine_decode, affine_encode
from flowback.flow.decoding import CausalMap, Solver, solve
from flowback.flow.guidance import Guidance

N, D, WIDTH, K = 5, 3, 16, 4


def make(flip=False, num_classes=K, bound=None, dtype=torch.float64, std=0.2):
    block = FlowBlock(N, D, WIDTH, layers=2, head_dim=8, num_classes=num_classes, flip=flip, log_scale_bound=bound)
    return normal_(block.to(dtype), std)


def inputs(num_classes=K, batch=2):
    classes = torch.rand(batch, num_classes, dtype=torch.float64).softmax(dim=1) if num_classes else None
    return torch.randn(batch, N, D, dtype=torch.float64), classes


both_orders = pytest.mark.parametrize("flip", [False, True])
bounds = pytest.mark.parametrize("bound", [None, 0.4])


@both_orders
@bounds
@pytest.mark.parametrize("num_classes", [0, K])
def test_decode_inverts_encode(flip, bound, num_classes):
    block = make(flip, num_classes, bound)
    x, classes = inputs(num_classes)
    out = block(x, classes)
    assert (out.z - x).abs().max() > 0.1  # the block does something
    decoded, _ = solve(CausalMap(block, out.z, classes, Guidance()), Solver("sequential"), 0.0)
    assert torch.allclose(decoded, x, atol=1e-10)


@both_orders
@bounds
def test_log_det_is_that_of_the_jacobian(flip, bound):
    block = make(flip, bound=bound)
    x, classes = inputs(batch=1)
    J = jacobian(lambda v: block(v, classes).z, x).reshape(N * D, N * D)
    sign, log_det = torch.linalg.slogdet(J)
    assert sign == 1
    assert block(x, classes).log_det.item() == pytest.approx(log_det.item(), abs=1e-8)


@both_orders
def test_jacobian_is_triangular_in_the_blocks_order(flip):
    block = make(flip)
    x, classes = inputs(batch=1)
    J = jacobian(lambda v: block(v, classes).z, x).reshape(N, D, N, D).abs().amax(dim=(1, 3))
    for out in range(N):
        for source in range(N):
            before = source > out if flip else source < out
            if before:
                assert J[out, source] > 1e-4
            elif source != out:
                assert J[out, source] == 0


@both_orders
def test_output_follows_the_equations(flip):
    block = make(flip)
    x, classes = inputs()
    out = block(x, classes)
    assert torch.allclose(out.z, (x - out.mu) * torch.exp(-out.a), atol=1e-12)
    assert torch.allclose(out.log_det, -out.a.sum(dim=(1, 2)), atol=1e-12)
    assert torch.allclose(out.z * torch.exp(out.a) + out.mu, x, atol=1e-12)  # decoding's fixed point


@both_orders
def test_first_token_of_the_order_passes_unchanged(flip):
    block = make(flip)
    x, classes = inputs()
    first = -1 if flip else 0
    out = block(x, classes)
    assert torch.equal(out.z[:, first], x[:, first])
    assert out.a[:, first].abs().max() == 0
    assert out.mu[:, first].abs().max() == 0
    others = [d for d in range(N) if d != first % N]
    assert (out.z[:, others] - x[:, others]).abs().amax(dim=(0, 2)).min() > 1e-3


@both_orders
def test_parameters_come_from_the_transformer_shifted_by_one(flip):
    block = make(flip)
    x, classes = inputs()
    x = block.reorder(x)
    position = block.position.flip(0) if flip else block.position
    h, _ = block.transformer(block.proj_in(x) + position + (classes @ block.class_embed)[:, None])
    after = block.proj_out(h)
    mu, a, _ = block.predict(x, classes)
    assert torch.allclose(mu[:, 1:], after[:, :-1, :D], atol=1e-12)
    assert torch.allclose(a[:, 1:], after[:, :-1, D:], atol=1e-12)
    assert mu[:, 0].abs().max() == a[:, 0].abs().max() == 0


@both_orders
def test_cached_parameters_equal_one_pass(flip):
    block = make(flip)
    x, classes = inputs()
    mu, a, states = block.predict_next(x, classes, hidden=[2])
    cache = block.transformer.new_cache(x, N)
    steps = [block.predict_next(x[:, d : d + 1], classes, cache=cache, hidden=[2]) for d in range(N)]
    assert torch.allclose(torch.cat([s[0] for s in steps], dim=1), mu, atol=1e-10)
    assert torch.allclose(torch.cat([s[1] for s in steps], dim=1), a, atol=1e-10)
    assert torch.allclose(torch.cat([s[2][2] for s in steps], dim=1), states[2], atol=1e-10)


def test_flipped_block_is_the_plain_block_on_reversed_tokens():
    plain, flipped = make(flip=False), make(flip=True)
    flipped.load_state_dict(plain.state_dict())
    flipped.position.data = plain.position.data.flip(0)  # positions belong to places in the image
    x, classes = inputs()
    expected, found = plain(x.flip(1), classes, hidden=[1]), flipped(x, classes, hidden=[1])
    assert torch.allclose(found.z, expected.z.flip(1), atol=1e-12)
    assert torch.allclose(found.log_det, expected.log_det, atol=1e-12)
    assert torch.allclose(found.hidden[1], expected.hidden[1].flip(1), atol=1e-12)


@both_orders
@pytest.mark.parametrize("i", range(N))
def test_hidden_states_are_in_raster_order(flip, i):
    block = make(flip)
    x, classes = inputs()
    moved = x.clone()
    moved[:, i] += 1
    states, moved_states = block(x, classes, hidden=[1, 2]).hidden, block(moved, classes, hidden=[1, 2]).hidden
    for layer in (1, 2):
        changed = ((moved_states[layer] - states[layer]).abs().amax(dim=(0, 2)) > 1e-9).tolist()
        assert changed == [d <= i if flip else d >= i for d in range(N)]


def test_log_scale_stays_within_its_bound():
    block, free = make(bound=0.4, std=0.5), make(std=0.5)
    x, classes = inputs()
    a, raw = block(x, classes).a, free(x, classes).a
    assert raw.abs().max() > 1  # unbounded it would be far above
    assert a.abs().max() <= 0.4
    assert torch.allclose(a, 0.4 * torch.tanh(raw / 0.4), atol=1e-12)


def test_a_wide_bound_changes_small_log_scales_little():
    x, classes = inputs()
    a, raw = make(bound=8.0, std=0.1)(x, classes).a, make(std=0.1)(x, classes).a
    assert torch.allclose(a, raw, rtol=1e-2, atol=1e-4)


def test_class_weights_mix_the_embeddings():
    block = make()
    x, _ = inputs()
    one_hot = torch.eye(K, dtype=torch.float64)[[2, 0]]
    z = block(x, one_hot).z
    assert (z - block(x, None).z).abs().max() > 1e-3
    block.class_embed.data[[1, 3]] += 5  # classes without weight have no say
    assert torch.equal(block(x, one_hot).z, z)


def test_affine_maps_are_inverse():
    x, mu, a = torch.randn(3, 2, N, D, dtype=torch.float64)
    assert torch.allclose(affine_decode(affine_encode(x, mu, a), mu, a), x, atol=1e-12)
    assert affine_encode(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(2.0).log()).item() == pytest.approx(1.0)


def test_map_stays_in_full_precision_under_autocast():
    block = make(dtype=torch.float32, std=0.12)
    x, classes = (t.float() for t in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x, classes, hidden=[1])
    assert out.mu.dtype == out.a.dtype == out.z.dtype == out.log_det.dtype == torch.float32
    exact = block(x, classes)
    assert torch.allclose(out.z, exact.z, atol=0.1)
    assert not torch.equal(out.z, exact.z)  # the transformer itself did run in bfloat16
