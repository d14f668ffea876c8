"""Inverses of a block: free functions over its causal parameters, so that a new decoder touches no model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowback.flows.block import FlowBlock, affine_decode
from flowback.flows.guidance import Guidance


@torch.no_grad()
def sequential(block: FlowBlock, z: Tensor, classes: Tensor | None, guidance: Guidance) -> Tensor:
    """Decode `z [B, N, D]`, raster order, token by token with a KV cache allocated once.

    Args:
        block: the block to invert.
        z: the block's output.
        classes: class weights, `[B, K]`; with guidance `[2B, K]`, the conditional rows before the unconditional ones,
            which then run as one batch.
        guidance: how the two halves are combined.

    Returns:
        The block's input, `[B, N, D]`, raster order.
    """
    z = block.reorder(z)
    N = z.shape[1]
    repeats = 2 if guidance.scale else 1
    x = torch.empty_like(z)
    x[:, 0] = z[:, 0]
    cache = block.transformer.new_cache(z.repeat(repeats, 1, 1), N)
    for d in range(1, N):
        mu, a, _ = block.predict_next(x[:, d - 1 : d].repeat(repeats, 1, 1), classes, cache=cache)
        if guidance.scale:
            mu, a = guidance.apply(mu, a, d, N)
        x[:, d : d + 1] = affine_decode(z[:, d : d + 1], mu, a)
    return block.reorder(x)


Decoder = Callable[[Any, Tensor, Tensor | None, Guidance], Tensor]
DECODERS: dict[str, Decoder] = {"sequential": sequential}
