"""Classifier-free guidance of an autoregressive flow (TARFlow, arXiv 2412.06329, section 3.5).

Two rules, for a token that is N(mu, s^2) with its label, where s = exp(a), and N(mu_u, s_u^2) without:

- **linear**: the parameters are extrapolated, `mu + w (mu - mu_u)` and `a + w (a - a_u)`. It overflows at large w.
- **product**: the normal distribution `p^(1 + w) / p_u^w` (STARFlow, arXiv 2506.06276), with the ratio of the variances
  clipped so that there always is one: with `r = min(s / s_u, 1)^2`, `s^2 / (1 + w - w r)` and
  `((1 + w) mu - w r mu_u) / (1 + w - w r)`. It is never wider than the token's own; where s = s_u, mu is that of the linear
  rule.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowback.core.errors import InputError
from flowback.flow.labels import Labels, as_tensor

SCHEDULES = ("constant", "annealed")
TARGETS = ("both", "a", "mu")
RULES = ("linear", "product")


@dataclass(frozen=True)
class Guidance:
    """How the parameters of a block are moved away from the unconditional ones.

    Args:
        scale: w; 0 switches guidance off, and then a single conditional pass is run.
        schedule: "constant" uses w for every token, "annealed" lets it grow from 0 at the first to w at the last.
        guided: which parameters are guided, "both", "a" or "mu".
        rule: "linear" or "product".
        blocks: the numbers of the blocks that are guided; () for all. Others take a single conditional pass.
        tokens: the range of tokens that are guided, in shares of a block's order; the unconditional pass sees all tokens
            anyway, so that a range saves no time.

    Raises:
        InputError: if one of them is not as above.
    """

    scale: float = 0.0
    schedule: str = "constant"
    guided: str = "both"
    rule: str = "linear"
    blocks: tuple[int, ...] = ()
    tokens: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise InputError(f"guidance scale must be at least 0, got {self.scale}")
        if self.schedule not in SCHEDULES:
            raise InputError(f"guidance schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.guided not in TARGETS:
            raise InputError(f"guidance cannot act on {self.guided!r}; expected {', '.join(TARGETS)}")
        if self.rule not in RULES:
            raise InputError(f"guidance rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if not all(isinstance(t, int) and t >= 1 for t in self.blocks):
            raise InputError(f"guided blocks must be whole numbers from 1, got {list(self.blocks)}")
        if len(self.tokens) != 2 or not 0 <= self.tokens[0] < self.tokens[1] <= 1:
            raise InputError(f"guided tokens must be two ascending shares from 0 to 1, got {list(self.tokens)}")

    def of_block(self, t: int) -> "Guidance":
        """The guidance of block t, which may be none."""
        return self if not self.blocks or t in self.blocks else Guidance()

    def weights(self, like: Tensor) -> Tensor:
        """The scale w of every token of `like [B, N, D]`, in the block's order: `[N, 1]`."""
        N = like.shape[1]
        place = torch.arange(N, device=like.device, dtype=like.dtype)
        w = self.scale * place / max(N - 1, 1) if self.schedule == "annealed" else torch.full_like(place, self.scale)
        first, last = (share * N for share in self.tokens)
        return torch.where((place >= first) & (place < last), w, 0)[:, None]

    def apply(self, mu: Tensor, a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Combine the parameters of n tokens, `[2B, n, D]` (conditional, then unconditional half), to `[B, n, D]`.

        `w [n, 1]` is that of these tokens.
        """
        (mu, mu_uncond), (a, a_uncond) = mu.chunk(2), a.chunk(2)
        if self.rule == "linear":
            new_mu, new_a = mu + w * (mu - mu_uncond), a + w * (a - a_uncond)
        else:
            r = torch.exp(2 * (a - a_uncond).clamp(max=0))
            narrowed = 1 + w * (1 - r)  # at least 1
            new_mu, new_a = mu + w * r * (mu - mu_uncond) / narrowed, a - 0.5 * narrowed.log()
        return (mu if self.guided == "a" else new_mu), (a if self.guided == "mu" else new_a)


def checked(guidance: float | Guidance, y: Labels, classes: int, blocks: int) -> Guidance:
    """A scale or a guidance as a guidance, for the labels `y` of a flow of so many classes and blocks.

    Raises:
        InputError: if there is guidance, but no label to guide towards, or it is of blocks that do not exist.
    """
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    if max(guidance.blocks, default=1) > blocks:
        raise InputError(f"guided blocks must be 1 to {blocks}, got {list(guidance.blocks)}")
    if guidance.scale and not classes:
        raise InputError(f"guidance must be 0 for an unconditional flow, got {guidance.scale}")
    on_host = not isinstance(y, Tensor) or y.device.type == "cpu"
    if guidance.scale and (y is None or (on_host and bool((as_tensor(y) == -1).all()))):
        raise InputError(f"guidance {guidance.scale} needs labels y to guide towards; there are none")
    return guidance
