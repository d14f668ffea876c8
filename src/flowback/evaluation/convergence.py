"""How fast parallel decoding closes in on the sequential loop, block by block."""

from typing import Any

import torch

from flowback.flows import Guidance, TarFlow
from flowback.flows.decoders import CausalMap, Solver, solve, sweep

SMALLEST = 1e-5  # below it, float32 is at its own rounding


@torch.no_grad()
def errors_by_sweep(flow: TarFlow, batch: int) -> dict[int, list[float]]:
    """Block -> the error before any sweep and after each, until it is below `SMALLEST`.

    The error is the largest difference of any number of any of the `batch` samples from the sequential loop's.
    """
    tokens = flow.enter(torch.randn(batch, *flow.token_shape, generator=torch.Generator().manual_seed(0)))
    classes = flow.class_weights(torch.arange(batch) % flow.num_classes if flow.num_classes else None, batch)
    errors = {}
    for t in range(flow.config.blocks, 0, -1):
        block: Any = flow.blocks[t - 1]
        F = CausalMap(block, tokens, classes, Guidance())
        tokens, _ = solve(F, Solver("sequential"), 0.0)
        true, x = F.block.reorder(tokens), F.start()
        errors[t] = [float((x - true).abs().max())]
        while errors[t][-1] > SMALLEST and len(errors[t]) <= F.tokens:
            x, _ = sweep(F, x)
            errors[t].append(float((x - true).abs().max()))
    return errors


def sweeps_until(errors: list[float], target: float) -> int:
    """The first number of sweeps after which the error stays below the target."""
    return next(sweep for sweep in range(len(errors)) if all(error <= target for error in errors[sweep:]))
