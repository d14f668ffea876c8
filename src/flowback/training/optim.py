"""Learning-rate schedule, the guarded step, and the moving average of the weights. None makes the host wait."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from flowback.core.distributed import whole


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
    get_ema_multi_avg_fn(d)(list(average), list(current), 0)  # the count is for other averages


class GuardedStep:
    """Clips the gradient and takes the optimizer's step, or leaves everything as it is where the gradient is not finite.

    All of it happens on the device: the host learns of skipped steps when it asks. The optimizer is fused, and takes the
    factor by which the gradient is too long, and whether it is finite, as tensors.

    Args:
        optimizer: a fused AdamW.
        most: the largest norm of the gradient; None for no clipping.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, most: float | None) -> None:
        self.optimizer, self.most = optimizer, most or math.inf
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Returns the gradient's norm before clipping, and 1 where the step was skipped or else 0, both on the device."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        norm = whole(norm)  # the same in all processes
        skipped = (~norm.isfinite()).float()
        guard: Any = self.optimizer
        guard.grad_scale = ((norm + 1e-6) / self.most).clamp(min=1).float()  # by which the gradient is divided
        guard.found_inf = skipped
        self.optimizer.step()
        return norm, skipped
