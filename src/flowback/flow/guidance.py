"""Classifier-free guidance of an autoregressive flow (TARFlow, arXiv 2412.06329, section 3.5)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowback.core.errors import InputError
from flowback.flow.labels import Labels, as_tensor

SCHEDULES = ("constant", "annealed")
TARGETS = ("both", "a", "mu")


@dataclass(frozen=True)
class Guidance:
    """How the parameters of a block are extrapolated away from the unconditional ones: `p + w (p - p_uncond)`.

    Args:
        scale: w; 0 switches guidance off, and then a single conditional pass is run.
        schedule: "constant" uses w for every token, "annealed" lets it grow from 0 at the first to w at the last.
        guided: which parameters are guided, "both", "a" or "mu".

    Raises:
        InputError: if one of them is not as above.
    """

    scale: float = 0.0
    schedule: str = "constant"
    guided: str = "both"

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise InputError(f"guidance scale must be at least 0, got {self.scale}")
        if self.schedule not in SCHEDULES:
            raise InputError(f"guidance schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.guided not in TARGETS:
            raise InputError(f"guidance cannot act on {self.guided!r}; expected {', '.join(TARGETS)}")

    def weights(self, like: Tensor) -> Tensor:
        """The scale w of every token of `like [B, N, D]`, in the block's order: `[N, 1]`."""
        tokens = like.shape[1]
        if self.schedule == "annealed":
            place = torch.arange(tokens, device=like.device, dtype=like.dtype)
            return (self.scale * place / max(tokens - 1, 1))[:, None]
        return torch.full((tokens, 1), self.scale, device=like.device, dtype=like.dtype)

    def apply(self, mu: Tensor, a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Combine the parameters of n tokens, `[2B, n, D]` (conditional, then unconditional half), to `[B, n, D]`.

        `w [n, 1]` is that of these tokens.
        """
        (mu, mu_uncond), (a, a_uncond) = mu.chunk(2), a.chunk(2)
        if self.guided != "a":
            mu = mu + w * (mu - mu_uncond)
        if self.guided != "mu":
            a = a + w * (a - a_uncond)
        return mu, a


def checked(guidance: float | Guidance, y: Labels, classes: int) -> Guidance:
    """A scale or a guidance as a guidance, for the labels `y` of a flow of `classes`.

    Raises:
        InputError: if there is guidance, but no label to guide towards.
    """
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    if guidance.scale and not classes:
        raise InputError(f"guidance must be 0 for an unconditional flow, got {guidance.scale}")
    on_host = not isinstance(y, Tensor) or y.device.type == "cpu"
    if guidance.scale and (y is None or (on_host and bool((as_tensor(y) == -1).all()))):
        raise InputError(f"guidance {guidance.scale} needs labels y to guide towards; there are none")
    return guidance
