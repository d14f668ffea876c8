"""One autoregressive flow block: a causal transformer that predicts an affine map of every token from those before it.

TARFlow (arXiv 2412.06329), equations 3 and 4; `a` and `mu` as in "Flowing Backwards" (arXiv 2511.22345):

    z_d = (x_d - mu(x_<d)) * exp(-a(x_<d))        encode: parallel over d
    x_d = z_d * exp(a(x_<d)) + mu(x_<d)           decode: a fixed point, solved in `flowback.flow.decoding`
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowback.flow.transformer import Cache, CausalTransformer, Places


@dataclass
class BlockOutput:
    """What one block returns; every tensor is in raster order and on the graph of the block's input."""

    z: Tensor  # [B, N, D]
    log_det: Tensor  # [B], nats, the sum over tokens and dimensions
    mu: Tensor  # [B, N, D]
    a: Tensor  # [B, N, D]
    hidden: dict[int, Tensor]  # layer -> [B, N, width]


def affine_encode(x: Tensor, mu: Tensor, a: Tensor) -> Tensor:
    """`z = (x - mu) exp(-a)`, elementwise."""
    return (x - mu) * torch.exp(-a)


def affine_decode(z: Tensor, mu: Tensor, a: Tensor) -> Tensor:
    """`x = z exp(a) + mu`, elementwise."""
    return z * torch.exp(a) + mu


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer in the precision of `x`, whatever that of the weights is."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


class FlowBlock(nn.Module):
    """One block of the flow over tokens `[B, N, D]`, in raster or in flipped order.

    `forward` encodes and speaks raster order. `predict` and `predict_next` are the causal parameters that every inverse
    is built on; they speak the block's own order, to which `reorder` leads and, being its own inverse, from which.

    Args:
        tokens: N, the number of tokens.
        dim: D, the size of a token.
        width: of the causal transformer.
        layers: of it.
        head_dim: of its attention.
        mlp: gelu or swiglu.
        mlp_ratio: of its MLPs.
        num_classes: K; 0 for an unconditional block.
        flip: whether the block reads the tokens from the last to the first.
        positions: "learned", an embedding for every place in the image, or "rotary", by the order of reading.
        log_scale_bound: `|a|` stays below it (`a = bound * tanh(raw / bound)`); None for no bound.
    """

    def __init__(
        self,
        tokens: int,
        dim: int,
        width: int,
        layers: int,
        head_dim: int,
        num_classes: int,
        flip: bool,
        mlp: str = "gelu",
        mlp_ratio: float = 4.0,
        positions: str = "learned",
        log_scale_bound: float | None = None,
    ) -> None:
        super().__init__()
        self.flip, self.log_scale_bound = flip, log_scale_bound
        self.proj_in = nn.Linear(dim, width)
        rotary = tokens if positions == "rotary" else 0
        self.position = None if rotary else nn.Parameter(torch.randn(tokens, width) * 1e-2)  # in raster order
        self.class_embed = nn.Parameter(torch.randn(num_classes, width) * 1e-2) if num_classes else None
        self.transformer = CausalTransformer(width, layers, head_dim, mlp, mlp_ratio, rotary)
        self.proj_out = nn.Linear(width, 2 * dim)
        nn.init.zeros_(self.proj_out.weight)  # the flow starts as the identity
        nn.init.zeros_(self.proj_out.bias)

    def reorder(self, tokens: Tensor) -> Tensor:
        """Raster order `[B, N, ...]` to the block's order, or back."""
        return tokens.flip(1) if self.flip else tokens

    def predict_next(
        self,
        x: Tensor,
        classes: Tensor | None = None,
        *,
        cache: Cache | None = None,
        hidden: Collection[int] = (),
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """The parameters of the token *after* each of `x [B, n, D]`, which follow those already in `cache`.

        Args:
            x: tokens in the block's order.
            classes: weights of the class embeddings, `[B, K]`, each row summing to one; None if unconditional.
            cache: keys and values of the tokens before `x`.
            hidden: layers whose states `[B, n, width]` to return.

        Returns:
            `mu`, `a`, each `[B, n, D]`, and the hidden states, in the block's order.
        """
        device, count = x.device.type, x.shape[1]
        with torch.autocast(device, enabled=False):  # tokens and parameters of the map keep full precision
            h = _linear(x, self.proj_in)
            if self.position is not None:
                h = h + self._positions(self.position, slice(0, count) if cache is None else cache.places(count))
            if self.class_embed is not None and classes is not None:
                h = h + (classes.to(h.dtype) @ self.class_embed.to(h.dtype))[:, None]
        h, states = self.transformer(h.to(self.proj_in.weight.dtype), hidden=hidden, cache=cache)
        with torch.autocast(device, enabled=False):
            mu, a = _linear(h.to(x.dtype), self.proj_out).chunk(2, dim=-1)
            if self.log_scale_bound is not None:
                a = self.log_scale_bound * torch.tanh(a / self.log_scale_bound)
        return mu, a, states

    def _positions(self, raster: Tensor, places: Places) -> Tensor:
        """The embeddings of the tokens at some places, `[n, width]`, in the block's order."""
        if not self.flip:
            return raster[places]
        if isinstance(places, Tensor):
            return raster[len(raster) - 1 - places]
        return raster[len(raster) - places.stop : len(raster) - places.start].flip(0)

    def predict(
        self, x: Tensor, classes: Tensor | None = None, *, hidden: Collection[int] = ()
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """The parameters of each token of `x [B, N, D]` from those before it, in the block's order.

        The first token has none before it and passes unchanged: its `mu` and `a` are zero.
        """
        mu, a, states = self.predict_next(x, classes, hidden=hidden)
        return F.pad(mu[:, :-1], (0, 0, 1, 0)), F.pad(a[:, :-1], (0, 0, 1, 0)), states

    def forward(self, x: Tensor, classes: Tensor | None = None, hidden: Collection[int] = ()) -> BlockOutput:
        """Encode tokens `x [B, N, D]`, raster order; `classes` and `hidden` as in `predict_next`."""
        mu, a, states = self.predict(self.reorder(x), classes, hidden=hidden)
        mu, a = self.reorder(mu), self.reorder(a)
        return BlockOutput(
            z=affine_encode(x, mu, a),
            log_det=-a.sum(dim=(1, 2)),
            mu=mu,
            a=a,
            hidden={layer: self.reorder(h) for layer, h in states.items()},
        )
