"""A causal pre-norm transformer over tokens `[B, N, C]`, with features by request and a KV cache that is passed, not kept.

The architecture is TARFlow's (arXiv 2412.06329, section 3.2): LayerNorm, attention with heads of `head_dim`, LayerNorm,
MLP; no norm at the end, so that the residual stream is read directly.
"""

from collections.abc import Callable, Collection
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GeluMLP(nn.Sequential):
    """The transformer's usual MLP: `width -> ratio * width -> width` with GELU."""

    def __init__(self, width: int, ratio: float) -> None:
        hidden = int(ratio * width)
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


MLPS: dict[str, Callable[[int, float], nn.Module]] = {"gelu": GeluMLP}


class Cache(Protocol):
    """What attention needs of a cache: how many tokens it holds, and a place for those of the next ones."""

    filled: int

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k, v [B, heads, n, head_dim]` of the next n tokens; return those of all tokens so far."""
        ...


class KVCache:
    """Keys and values of every layer, allocated once for `length` tokens and filled from the front.

    `length` tokens of a batch are decoded with one cache; it belongs to that call and to no module. Whoever lowers
    `filled` takes tokens back: the next ones are written over them.
    """

    def __init__(
        self, layers: int, batch: int, heads: int, length: int, head_dim: int, like: Tensor, dtype: torch.dtype
    ) -> None:
        shape = (layers, batch, heads, length, head_dim)
        self.keys = torch.empty(shape, device=like.device, dtype=dtype)
        self.values = torch.empty(shape, device=like.device, dtype=dtype)
        self.filled = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k, v [B, heads, n, head_dim]` of the next n tokens; return those of all tokens so far."""
        end = self.filled + k.shape[2]
        self.keys[layer, :, :, self.filled : end] = k
        self.values[layer, :, :, self.filled : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention over `[B, n, C]`; with a cache, the n tokens follow those that the cache holds.

    `mask` is what `CausalTransformer` makes once for all layers: None where a token may see every key.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.heads = width // head_dim
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, layer: int = 0, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        """`[B, n, C] -> [B, n, C]`, the update of the residual stream."""
        B, n, C = x.shape
        qkv = self.qkv(self.norm(x)).view(B, n, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, n, head_dim]
        if cache is not None:
            k, v = cache.append(layer, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=n > 1 and mask is None)
        return self.proj(out.transpose(1, 2).reshape(B, n, C))


class Layer(nn.Module):
    """One transformer layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, width: int, head_dim: int, mlp: str, mlp_ratio: float) -> None:
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.norm = nn.LayerNorm(width)
        self.mlp = MLPS[mlp](width, mlp_ratio)

    def forward(self, x: Tensor, layer: int = 0, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        """`[B, n, C] -> [B, n, C]`."""
        x = x + self.attention(x, layer, cache, mask)
        return x + self.mlp(self.norm(x))


class CausalTransformer(nn.Module):
    """A stack of layers. Hidden states are returned on request; layers count from 1.

    Args:
        width: size C of the residual stream.
        layers: number of layers.
        head_dim: size of an attention head; divides `width`.
        mlp: kind of MLP, a key of `MLPS`.
        mlp_ratio: hidden size of the MLP as a multiple of `width`.
    """

    def __init__(self, width: int, layers: int, head_dim: int, mlp: str = "gelu", mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, head_dim, mlp, mlp_ratio) for _ in range(layers))
        self.heads, self.head_dim = width // head_dim, head_dim

    def forward(
        self, x: Tensor, *, hidden: Collection[int] = (), cache: Cache | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run `x [B, n, C]` through all layers.

        Returns:
            The output `[B, n, C]`, and the states `[B, n, C]` after each layer named in `hidden`.
        """
        states = {}
        mask = None
        if cache is not None and cache.filled and x.shape[1] > 1:  # several tokens after a prefix
            n, before = x.shape[1], cache.filled
            mask = torch.ones(n, before + n, dtype=torch.bool, device=x.device).tril(before)
        for i, layer in enumerate(self.layers):
            x = layer(x, i, cache, mask)
            if i + 1 in hidden:
                states[i + 1] = x
        if cache is not None:
            cache.filled += x.shape[1]
        return x, states

    def new_cache(self, like: Tensor, length: int) -> KVCache:
        """An empty cache for `length` tokens of the batch and device of `like [B, ...]`, in the dtype of the keys."""
        device = like.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else like.dtype
        return KVCache(len(self.layers), like.shape[0], self.heads, length, self.head_dim, like, dtype)
