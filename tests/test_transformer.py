import itertools
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from builders import attributes, normal_
from flowback.alignment.projectors import ConvProjector, Projector
from flowback.flow.transformer import (
    CausalTransformer,
    GeluMLP,
    SwiGLU,
    products,
    rotate,
    rotations,
    slow_attention_gradient,
)

N, WIDTH, LAYERS, HEAD_DIM = 7, 16, 3, 8
KINDS = {"learned, gelu": {}, "rotary, swiglu": {"rotary": N, "mlp": "swiglu"}}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def transformer(request):
    return normal_(exact_turns(CausalTransformer(WIDTH, LAYERS, HEAD_DIM, **request.param).double()), 0.2)


def exact_turns(transformer):
    """Turns in float64 instead of those of float32, converted."""
    if transformer.rotary:
        speed = 10_000.0 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
        angles = torch.arange(N).double()[:, None] * speed
        transformer.cos, transformer.sin = angles.cos(), angles.sin()
    return transformer


def turned(heads, rotary):
    """Vectors `[B, N, head_dim]` as complex numbers, channel i with i + head_dim / 2, turned by their positions."""
    if not rotary:
        return heads
    numbers = torch.complex(*heads.chunk(2, dim=-1))
    speed = 10_000.0 ** (-torch.arange(HEAD_DIM // 2).double() / (HEAD_DIM // 2))
    numbers = numbers * torch.exp(1j * torch.arange(N)[:, None] * speed)
    return torch.cat([numbers.real, numbers.imag], dim=-1)


@pytest.fixture
def x():
    return torch.randn(2, N, WIDTH, dtype=torch.float64)


def plain(transformer, x):
    """The transformer's equations with loops over heads and tokens."""
    for layer in transformer.layers:
        attention = layer.attention
        normed = F.layer_norm(x, (WIDTH,), attention.norm.weight, attention.norm.bias)
        q, k, v = (normed @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, dim=-1)
        out = torch.zeros_like(x)
        for head in range(WIDTH // HEAD_DIM):
            part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            q_head, k_head = turned(q[..., part], transformer.rotary), turned(k[..., part], transformer.rotary)
            for t in range(x.shape[1]):
                scores = (k_head[:, : t + 1] @ q_head[:, t, :, None])[..., 0] / HEAD_DIM**0.5
                out[:, t, part] = (scores.softmax(dim=1)[..., None] * v[:, : t + 1, part]).sum(dim=1)
        x = x + out @ attention.proj.weight.T + attention.proj.bias
        normed = F.layer_norm(x, (WIDTH,), layer.norm.weight, layer.norm.bias)
        if isinstance(layer.mlp, SwiGLU):
            gate, up = (normed @ layer.mlp.gate_up.weight.T + layer.mlp.gate_up.bias).chunk(2, dim=-1)
            inner, last = gate * torch.sigmoid(gate) * up, layer.mlp.out
        else:
            inner, last = F.gelu(normed @ layer.mlp[0].weight.T + layer.mlp[0].bias), layer.mlp[2]
        x = x + inner @ last.weight.T + last.bias
    return x


def test_equals_its_equations(transformer, x):
    assert torch.allclose(transformer(x)[0], plain(transformer, x), atol=1e-12)


def test_rotary_attention_sees_only_how_far_back_a_token_is():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, N, HEAD_DIM, generator=generator)
    cos, sin = rotations(2 * N, HEAD_DIM)

    def scores(start):
        turn = cos[start : start + N], sin[start : start + N]
        return rotate(q, turn) @ rotate(k, turn).transpose(-1, -2)

    assert torch.allclose(scores(0), scores(4), atol=1e-5)
    assert not torch.allclose(scores(0), q @ k.transpose(-1, -2), atol=1e-2)


def test_the_gated_mlp_has_the_size_of_the_plain_one():
    for width in (96, 256, 1024):
        plain_size, gated = (sum(p.numel() for p in kind(width, 4.0).parameters()) for kind in (GeluMLP, SwiGLU))
        assert abs(gated / plain_size - 1) < 0.03


@pytest.mark.parametrize("t", range(N))
def test_output_depends_on_no_later_token(transformer, x, t):
    moved = x.clone()
    moved[:, t] += torch.randn(WIDTH)  # not a constant, which the norms would remove
    change = (transformer(moved)[0] - transformer(x)[0]).abs().amax(dim=(0, 2))
    assert (change[:t] <= 1e-12).all()
    assert (change[t:] > 1e-6).all()


@pytest.mark.parametrize("prefix", [1, 3, N])
def test_cached_tokens_equal_one_pass(transformer, x, prefix):
    expected, expected_states = transformer(x, hidden=[1, 3])
    cache = transformer.new_cache(x, N)
    parts = [transformer(x[:, :prefix], hidden=[1, 3], cache=cache)]
    parts += [transformer(x[:, t : t + 1], hidden=[1, 3], cache=cache) for t in range(prefix, N)]
    assert cache.filled == N
    assert torch.allclose(torch.cat([out for out, _ in parts], dim=1), expected, atol=1e-10)
    for layer, state in expected_states.items():
        assert torch.allclose(torch.cat([states[layer] for _, states in parts], dim=1), state, atol=1e-10)


@pytest.mark.parametrize("prefix", [0, 1, 2, 4])
@pytest.mark.parametrize("window", [2, 3, N])
def test_several_cached_tokens_at_once_equal_one_pass(transformer, x, prefix, window):
    expected, expected_states = transformer(x, hidden=[2])
    cache = transformer.new_cache(x, N)
    places = [*range(prefix), *range(prefix, N, window), N]  # the prefix token by token, then in windows
    parts = [transformer(x[:, i:j], hidden=[2], cache=cache) for i, j in pairwise(places)]
    assert cache.filled == N
    assert torch.allclose(torch.cat([out for out, _ in parts], dim=1), expected, atol=1e-10)
    assert torch.allclose(torch.cat([states[2] for _, states in parts], dim=1), expected_states[2], atol=1e-10)


@pytest.mark.parametrize("kept", [0, 1, 3, 5])
@pytest.mark.parametrize("window", [1, 2, N])
def test_tokens_taken_back_from_the_cache_leave_no_trace(transformer, x, kept, window):
    other = torch.cat([x[:, :kept], torch.randn(2, N - kept, WIDTH, dtype=torch.float64)], dim=1)
    expected = transformer(other)[0]
    cache = transformer.new_cache(x, N)
    transformer(x[:, :5], cache=cache)
    transformer(x[:, 5:], cache=cache)
    cache.filled = kept
    found = [transformer(other[:, i : i + window], cache=cache)[0] for i in range(kept, N, window)]
    assert cache.filled == N
    assert torch.allclose(torch.cat(found, dim=1), expected[:, kept:], atol=1e-10)


def test_cache_is_allocated_once_and_nothing_stays_on_the_modules(transformer, x):
    before = attributes(transformer)
    cache = transformer.new_cache(x, N)
    places = cache.keys.data_ptr(), cache.values.data_ptr()
    assert cache.keys.shape == cache.values.shape == (LAYERS, 2, WIDTH // HEAD_DIM, N, HEAD_DIM)
    assert cache.keys.dtype == x.dtype
    for t in range(N):
        transformer(x[:, t : t + 1], cache=cache)
        assert (cache.keys.data_ptr(), cache.values.data_ptr()) == places
        assert cache.filled == t + 1
    assert attributes(transformer) == before


def test_a_call_without_cache_has_no_memory(transformer, x):
    expected = transformer(x)[0]
    transformer(torch.randn_like(x), cache=transformer.new_cache(x, N))
    assert torch.equal(transformer(x)[0], expected)


def test_hidden_states_are_those_of_a_truncated_stack(transformer, x):
    out, states = transformer(x, hidden=[1, 2, 3])
    assert sorted(states) == [1, 2, 3]
    for layers, state in states.items():
        rotary, mlp = (N, "swiglu") if transformer.rotary else (0, "gelu")
        truncated = exact_turns(CausalTransformer(WIDTH, layers, HEAD_DIM, mlp, rotary=rotary).double())
        truncated.load_state_dict({k: v for k, v in transformer.state_dict().items() if k in truncated.state_dict()})
        assert torch.equal(truncated(x)[0], state)
    assert torch.equal(states[3], out)


def test_only_requested_states_are_returned(transformer, x):
    assert transformer(x)[1] == {}
    assert list(transformer(x, hidden=[2])[1]) == [2]


def test_cache_under_autocast_has_the_dtype_of_the_keys(transformer):
    model = CausalTransformer(WIDTH, LAYERS, HEAD_DIM)
    x = torch.randn(2, N, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(x, N)
        assert cache.keys.dtype == torch.bfloat16
        cached = torch.cat([model(x[:, t : t + 1], cache=cache)[0] for t in range(N)], dim=1)
        whole = model(x)[0]
    assert torch.allclose(cached, whole, atol=0.05)


def test_mlp_ratio_sets_the_hidden_size():
    mlp = CausalTransformer(WIDTH, 1, HEAD_DIM, mlp_ratio=2.5).layers[0].mlp
    assert mlp[0].out_features == mlp[2].in_features == 40


def test_projector_is_three_layers_token_by_token():
    projector = normal_(Projector(6, 3, hidden=10).double(), 0.5)
    h = torch.randn(2, 4, 6, dtype=torch.float64)
    first, second, third = (m for m in projector if isinstance(m, nn.Linear))
    expected = third(F.silu(second(F.silu(first(h)))))
    assert projector(h).shape == (2, 4, 3)
    assert torch.allclose(projector(h), expected, atol=1e-12)
    assert torch.allclose(projector(h[:, 2]), projector(h)[:, 2], atol=1e-12)


def test_conv_projector_sees_the_eight_neighbours_on_the_grid():
    rows, columns = 4, 3
    projector = normal_(ConvProjector(6, 5, (rows, columns)).double(), 0.5)
    h = torch.randn(2, 3, rows * columns, 6, dtype=torch.float64)
    found = projector(h)
    assert found.shape == (2, 3, rows * columns, 5)
    padded = F.pad(h.view(2, 3, rows, columns, 6), (0, 0, 1, 1, 1, 1))
    for n, (row, column) in enumerate(itertools.product(range(rows), range(columns))):
        near = padded[:, :, row : row + 3, column : column + 3]
        expected = torch.einsum("abrci,oirc->abo", near, projector.weight) + projector.bias
        assert torch.allclose(found[:, :, n], expected, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [2, 7, 49])
def test_products_equal_the_fused_attention(n, causal):
    q, k, v = (torch.randn(3, 2, n, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    cotangent = torch.randn(3, 2, n, 8, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    found = products(q, k, v, causal)
    assert torch.allclose(found, expected, atol=1e-12)
    grads = (torch.autograd.grad(out, (q, k, v), cotangent) for out in (found, expected))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_products_are_taken_for_bfloat16_gradients_on_a_cpu_only():
    trained = torch.zeros(1, 1, 49, 8, dtype=torch.bfloat16, requires_grad=True)
    assert slow_attention_gradient(trained)
    others = [trained.detach(), trained.float(), trained.to("meta"), trained.expand(1, 1, 49, 8).repeat(1, 1, 3, 1)]
    assert [slow_attention_gradient(q) for q in others] == [False] * 4


def test_bfloat16_gradients_keep_the_direction():
    torch.manual_seed(0)
    model, x = normal_(CausalTransformer(WIDTH, LAYERS, HEAD_DIM), 0.2), torch.randn(8, N, WIDTH)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, _ = model(x)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(out.float().square().mean(), model.parameters())]))
    assert torch.cosine_similarity(*found, dim=0) > 0.999
