"""Better samples at test time by the flow's own classification, without training anything. Off unless asked for.

`best_of` draws several candidates and keeps the one whose image the flow assigns to its label most surely. The rule sees
the image without the noise of training, as a person does: under guidance nearly every noisy candidate agrees with its
label, and the rule would rank the noise (docs/decoding.md has the figures, also of what did not pay).

z and x are those of the flow's own space; of a LatentFlow its `core` is used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowback.core.devices import put
from flowback.core.errors import InputError
from flowback.flow.decoding import Solved
from flowback.flow.guidance import Guidance
from flowback.flow.tarflow import TarFlow
from flowback.latents import Flow
from flowback.tasks.classify import ClassStatistics, likeliest, listed_only, rule_named

Draw = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor, list[Solved]]]


@dataclass(frozen=True)
class Best:
    """The candidates that were kept."""

    z: Tensor  # [B, N, D]
    x: Tensor  # [B, *data_shape], as decoded, with the noise of training
    denoised: Tensor  # [B, *data_shape], without it
    draws: Tensor  # [B], candidates that were decoded
    report: list[Solved]  # how blocks were decoded, those of all candidates


@torch.no_grad()
def agreement(
    flow: Flow,
    x: Tensor,
    y: Tensor,
    rule: str = "single_gradient",
    batch_size: int = 256,
    statistics: ClassStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """How surely the flow assigns images `x [B, *data_shape]` to labels `y [B]`, and whether it assigns them at all.

    Args:
        flow: a class-conditional flow.
        x: images as the rule is to see them; no noise is added.
        y: labels.
        rule: a classification rule (`flowback.tasks.classify`); its scores are normalized over the classes.
        batch_size: rows that the flow sees at once.
        statistics: as in `classify`.

    Returns:
        The log-probability `[B]`, nats, of each label, and booleans `[B]`, true where no class has a larger one.

    Raises:
        InputError: if the flow is unconditional or the rule does not exist.
    """
    flow = _conditional(flow)
    score, _, rows = rule_named(rule, flow.num_classes)
    parts = flow.enter(x).split(max(1, batch_size // rows))
    scores = torch.cat([score(flow, [part], statistics, batch_size) for part in parts])
    y = put(y, scores.device)
    return listed_only(scores).log_softmax(dim=1).gather(1, y[:, None])[:, 0], likeliest(scores) == y


@torch.no_grad()
def best_of(
    flow: Flow,
    z: Tensor,
    y: Tensor,
    guidance: float | Guidance = 0.0,
    rule: str = "single_gradient",
    least: int = 2,
    method: str | Sequence[str] = "auto",
    batch_size: int = 64,
    compile: bool = False,
    statistics: ClassStatistics | None = None,
    draw: Draw | None = None,
) -> Best:
    """Of several noises for each image, the one whose denoised image has the largest `agreement` with its label.

    A candidate costs a decode, a score step (about 2 passes) and what the rule does; what is returned is not decoded again.

    Args:
        flow: a class-conditional flow.
        z: R candidates for each image, `[B, R, N, D]`.
        y: labels `[B]`.
        guidance: as in `TarFlow.decode`.
        rule: as in `agreement`.
        least: candidates of each image that are drawn in any case; further ones only until the rule assigns the best so
            far to its label.
        method: as in `TarFlow.decode`.
        batch_size: images at once; bounds the memory.
        compile: as in `TarFlow.decode`, for passes of all images of a batch.
        statistics: as in `classify`.
        draw: what makes images of noise `[b, N, D]`, labels, and whether to compile: with the noise of training, without
            it, and how blocks were decoded; None for a decode and a score step.

    Raises:
        InputError: if the flow is unconditional, the rule does not exist, or least is below 1.
    """
    flow = _conditional(flow)
    if least < 1:
        raise InputError(f"least must be at least 1, got {least}")
    z, y = flow.enter(z), put(y, flow.device)

    def exact(z: Tensor, y: Tensor, compile: bool) -> tuple[Tensor, Tensor, list[Solved]]:
        x, solved = flow.decode_with_report(z, y, guidance, method, compile=compile)
        return x, flow.denoise(x, y, batch_size), solved

    def of(z: Tensor, y: Tensor) -> Best:
        rows, report = torch.arange(len(z), device=z.device), []
        choice, draws = torch.zeros_like(rows), torch.zeros_like(rows)
        value, agrees = z.new_full((len(z),), -torch.inf), torch.zeros_like(rows, dtype=torch.bool)
        kept = z.new_empty(2, len(z), *flow.data_shape)  # noisy and denoised
        for r in range(z.shape[1]):
            if r >= least:
                rows = (~agrees).nonzero()[:, 0]
            if not len(rows):
                break
            whole = compile and len(rows) == len(z)
            x, denoised, solved = (draw or exact)(z[rows, r], y[rows], whole)
            both = torch.stack([x, denoised])
            new, right = agreement(flow, both[1], y[rows], rule, batch_size, statistics)
            better = (new > value[rows]) if r else torch.ones_like(right)
            choice[rows] = torch.where(better, r, choice[rows])
            value[rows] = torch.where(better, new.nan_to_num(-torch.inf), value[rows])
            agrees[rows] = torch.where(better, right, agrees[rows])
            kept[:, rows] = torch.where(better[:, None, None, None], both, kept[:, rows])
            draws[rows] += 1
            report += solved
        return Best(z[torch.arange(len(z), device=z.device), choice], kept[0], kept[1], draws, report)

    parts = [of(*part) for part in zip(z.split(batch_size), y.split(batch_size), strict=True)]
    z, x, denoised, draws = map(torch.cat, zip(*((b.z, b.x, b.denoised, b.draws) for b in parts), strict=True))
    return Best(z, x, denoised, draws, [solved for part in parts for solved in part.report])


def _conditional(flow: Flow) -> TarFlow:
    """The flow in its own space, if it has classes."""
    if not flow.num_classes:
        raise InputError("labels need a class-conditional flow, got an unconditional one")
    return flow.core
