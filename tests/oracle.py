"""The decode by its meaning, on the graph of autograd: one token after the other, each from all that came before."""

import torch
from torch import Tensor

from flowback.flow.block import FlowBlock, affine_decode
from flowback.flow.guidance import Guidance
from flowback.flow.transformer import Cache


class GrowingCache(Cache):
    """Keys and values that autograd can follow: they grow by concatenation."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        self.layers[layer] = (k, v)
        return k, v


def decode_with_graph(block: FlowBlock, z: Tensor, classes: Tensor | None, guidance: Guidance | None = None) -> Tensor:
    """What `block` maps to `z [B, N, D]`, raster order, differentiable in z, the class weights and the parameters.

    With guidance the class weights are `[2B, K]`: conditional, then unconditional.
    """
    tokens = block.reorder(z).split(1, dim=1)
    x, cache = [tokens[0]], GrowingCache()
    for d, token in enumerate(tokens[1:], start=1):
        mu, a, _ = block.predict_next(x[-1] if guidance is None else x[-1].repeat(2, 1, 1), classes, cache=cache)
        if guidance is not None:
            mu, a = guidance.apply(mu, a, guidance.weights(z)[d])
        x.append(affine_decode(token, mu, a))
    return block.reorder(torch.cat(x, dim=1))
