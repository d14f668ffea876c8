"""Learning-rate schedule and the moving average of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Rate of step `step` (from 0): linear to `peak` over `warmup` steps, then a half cosine to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@torch.no_grad()
def update_ema(average: Iterable[Tensor], current: Iterable[Tensor], decay: float, step: int) -> None:
    """`average <- d average + (1 - d) current` in place, `d = min(decay, (1 + step) / (10 + step))`.

    The growing decay forgets the random start within the first steps, so that short runs have a useful average.
    """
    d = min(decay, (1 + step) / (10 + step))
    for mean, value in zip(average, current, strict=True):
        mean.lerp_(value, 1 - d)
