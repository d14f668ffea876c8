"""A causal pre-norm transformer over tokens `[B, N, C]`, with features by request and a KV cache that is passed, not kept.

The architecture is TARFlow's (arXiv 2412.06329, section 3.2): LayerNorm, attention with heads of `head_dim`, LayerNorm,
MLP; no norm at the end, so that the residual stream is read directly.

Rotary positions (RoPE, arXiv 2104.09864) count tokens in the order in which they are *read*, from 0, so that in a block
that reads backwards, too, a larger position is always a later token: the causal mask then shows attention nothing but
distances "so many tokens ago", the same in every block, and a cache that is appended to needs no shift. Rotated are pairs
(i, i + head_dim / 2), not neighbours: two contiguous halves, which compilers and kernels like, and the same model up to the
order of the channels of q and k.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GeluMLP(nn.Sequential):
    """The transformer's usual MLP: `width -> ratio * width -> width` with GELU."""

    def __init__(self, width: int, ratio: float) -> None:
        hidden = int(ratio * width)
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class SwiGLU(nn.Module):
    """A gated MLP, `W_out (silu(W_gate x) * W_up x)` (arXiv 2002.05202), with about as many parameters as `GeluMLP`.

    Its three matrices share what the two of an MLP of `ratio` have: the hidden size is 2/3 of `ratio * width`, rounded to
    a multiple of 32.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = max(32, 32 * round(2 / 3 * ratio * width / 32))
        self.gate_up = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width] -> [..., width]`."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


MLPS: dict[str, Callable[[int, float], nn.Module]] = {"gelu": GeluMLP, "swiglu": SwiGLU}

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [n, head_dim / 2]


def rotations(count: int, head_dim: int, base: float = 10_000.0) -> Rotation:
    """The turns of positions 0 … `count - 1`: pair i turns by `position / base^(2 i / head_dim)` radians."""
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * base ** (-pair / head_dim)
    dtype = torch.get_default_dtype()
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Queries or keys `[B, heads, n, head_dim]`, turned to their positions; the dtype stays."""
    cos, sin = by
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


Places = slice | Tensor  # of consecutive tokens, in the order of reading: from start to stop, or their numbers [n]


class Cache(ABC):
    """What attention needs of a cache: where the next tokens stand, what they may see, and room for their keys and values.

    A cache belongs to one call and to no module. `filled` tokens are in it. Whoever lowers that number takes tokens back:
    the next ones are written over them.
    """

    filled: int = 0

    def places(self, count: int) -> Places:
        """Of the next `count` tokens."""
        return slice(self.filled, self.filled + count)

    def mask(self, count: int, device: torch.device) -> Tensor | None:
        """Which of the tokens that `append` returns the next `count` may see, `[count, all]`; None for those before."""
        if not self.filled or count == 1:
            return None
        return torch.ones(count, self.filled + count, dtype=torch.bool, device=device).tril(self.filled)

    @abstractmethod
    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k, v [B, heads, n, head_dim]` of the next n tokens; return those of all tokens so far."""

    def advance(self, count: int) -> None:
        """Note that all layers have stored the next `count` tokens."""
        self.filled += count


class KVCache(Cache):
    """Keys and values of every layer, allocated once for all tokens, of which attention sees a slice that grows.

    Args:
        shape: layers, batch, heads, tokens, head_dim.
        device: of the keys.
        dtype: of the keys.
    """

    def __init__(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        self.keys, self.values = (torch.empty(*shape, device=device, dtype=dtype) for _ in range(2))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k, v [B, heads, n, head_dim]` of the next n tokens; return those of all tokens so far."""
        end = self.filled + k.shape[2]
        self.keys[layer, :, :, self.filled : end] = k
        self.values[layer, :, :, self.filled : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class StaticCache(Cache):
    """The same with shapes that never change, so that a compiler sees one program for every token.

    The places of the next tokens are a tensor on the device, and attention sees all keys under a mask.

    Args:
        shape: layers, batch, heads, tokens, head_dim.
        device: of the keys.
        dtype: of the keys.
        count: how many tokens are appended at once, always.
    """

    def __init__(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype, count: int = 1) -> None:
        # zeros: what no token has written yet is multiplied by a weight of zero, and must be a number
        self.keys, self.values = (list(torch.zeros(*shape, device=device, dtype=dtype)) for _ in range(2))
        self.all = torch.arange(shape[3], device=device)
        self.at = self.all[:count].clone()

    def places(self, count: int) -> Places:
        """Of the next tokens."""
        return self.at

    def mask(self, count: int, device: torch.device) -> Tensor:
        """Every token and those before it."""
        return self.all <= self.at[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k, v [B, heads, n, head_dim]` of the next n tokens; return those of all tokens, seen or not."""
        return self.keys[layer].index_copy_(2, self.at, k), self.values[layer].index_copy_(2, self.at, v)

    def advance(self, count: int) -> None:
        """Do nothing: whoever appends moves `at`."""


def slow_attention_gradient(q: Tensor) -> bool:
    """Whether the fused attention's gradient for queries `[B, heads, n, head_dim]` takes longer than plain products.

    So it is for bfloat16 on CPUs: 5 times at 49 tokens, forward pass included. At 256 they are equal.
    """
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and q.shape[2] <= 128


def products(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Attention of as many queries as keys, `[B, heads, n, head_dim]`, as two products and a softmax."""
    B, heads, n, d = q.shape
    q, k, v = (part.reshape(B * heads, n, d) for part in (q, k, v))
    future = torch.zeros(n, n, dtype=q.dtype, device=q.device)
    if causal:
        future = future.fill_(float("-inf")).triu(1)
    with torch.autocast(q.device.type, enabled=False):  # softmax sums in float32 whatever it is given
        weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=d**-0.5).softmax(-1)
        return torch.bmm(weights, v).view(B, heads, n, d)


class Attention(nn.Module):
    """Causal self-attention over `[B, n, C]`; with a cache, the n tokens follow those that the cache holds.

    `mask` and `turn` are what `CausalTransformer` makes once for all layers: None where a token may see every key, and
    where positions are not rotary.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.heads = width // head_dim
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        layer: int = 0,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        turn: Rotation | None = None,
    ) -> Tensor:
        """`[B, n, C] -> [B, n, C]`, the update of the residual stream."""
        B, n, C = x.shape
        qkv = self.qkv(self.norm(x)).view(B, n, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, n, head_dim]
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if cache is None and slow_attention_gradient(q):
            out = products(q, k, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=n > 1 and mask is None)
        return self.proj(out.transpose(1, 2).reshape(B, n, C))


class Layer(nn.Module):
    """One transformer layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, width: int, head_dim: int, mlp: str, mlp_ratio: float) -> None:
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.norm = nn.LayerNorm(width)
        self.mlp = MLPS[mlp](width, mlp_ratio)

    def forward(
        self,
        x: Tensor,
        layer: int = 0,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        turn: Rotation | None = None,
    ) -> Tensor:
        """`[B, n, C] -> [B, n, C]`."""
        x = x + self.attention(x, layer, cache, mask, turn)
        return x + self.mlp(self.norm(x))


class CausalTransformer(nn.Module):
    """A stack of layers. Hidden states are returned on request; layers count from 1.

    Args:
        width: size C of the residual stream.
        layers: number of layers.
        head_dim: size of an attention head; divides `width`.
        mlp: kind of MLP, a key of `MLPS`.
        mlp_ratio: hidden size of the MLP as a multiple of `width`.
        rotary: for how many tokens queries and keys are turned to their positions; 0 for no rotary positions.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, width: int, layers: int, head_dim: int, mlp: str = "gelu", mlp_ratio: float = 4.0, rotary: int = 0
    ) -> None:
        super().__init__()
        self.rotary = rotary > 0
        for name, table in zip(("cos", "sin"), rotations(rotary, head_dim), strict=True):
            self.register_buffer(name, table, persistent=False)
        self.layers = nn.ModuleList(Layer(width, head_dim, mlp, mlp_ratio) for _ in range(layers))
        self.heads, self.head_dim = width // head_dim, head_dim

    def forward(
        self, x: Tensor, *, hidden: Collection[int] = (), cache: Cache | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run `x [B, n, C]` through all layers.

        Returns:
            The output `[B, n, C]`, and the states `[B, n, C]` after each layer named in `hidden`.
        """
        states, count = {}, x.shape[1]
        places = slice(0, count) if cache is None else cache.places(count)
        mask = None if cache is None else cache.mask(count, x.device)
        turn = (self.cos[places], self.sin[places]) if self.rotary else None
        for i, layer in enumerate(self.layers):
            x = layer(x, i, cache, mask, turn)
            if i + 1 in hidden:
                states[i + 1] = x
        if cache is not None:
            cache.advance(count)
        return x, states

    def new_cache(self, like: Tensor, length: int) -> KVCache:
        """An empty cache for `length` tokens of the batch and device of `like [B, ...]`, in the dtype of the keys."""
        return KVCache(*self._room(like, length))

    def new_static_cache(self, like: Tensor, length: int, count: int = 1) -> StaticCache:
        """The same with shapes that never change, to which `count` tokens are appended at once."""
        return StaticCache(*self._room(like, length), count)

    def _room(self, like: Tensor, length: int) -> tuple[tuple[int, ...], torch.device, torch.dtype]:
        device = like.device.type
        dtype = next(self.parameters()).dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return (len(self.layers), like.shape[0], self.heads, length, self.head_dim), like.device, dtype
