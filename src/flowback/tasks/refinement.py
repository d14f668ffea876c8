"""Better samples at test time by the flow's own likelihood, without training anything. Off unless asked for.

- **best_of**: draw several candidates, and keep the one that the flow classifies as the asked class with most confidence.
- **refine**: a few gradient steps on z that raise `log p(label | x)`, on the sphere that z lies on.

z and x are those of the flow's own space; of a LatentFlow its `core` is used. Costs are in passes, one forward of all
blocks on one image; a backward pass counts two.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowback.core.devices import put
from flowback.core.errors import InputError
from flowback.flow.guidance import Guidance
from flowback.flow.tarflow import TarFlow
from flowback.latents import Flow
from flowback.tasks.classify import ClassStatistics, class_log_probs, rule_named

Objective = Callable[[TarFlow, Tensor, Tensor], Tensor]


def contrast(flow: TarFlow, x: Tensor, y: Tensor) -> Tensor:
    """`log p(x | y) - log p(x)`, `[B]`, nats, where `log p(x)` is the flow without a label; 2 passes."""
    weights = flow.class_weights(y, len(x))
    assert weights is not None
    both = flow.log_prob(x.repeat(2, 1, 1, 1), torch.cat([weights, torch.full_like(weights, 1 / flow.num_classes)]))
    return both[: len(x)] - both[len(x) :]


def posterior(flow: TarFlow, x: Tensor, y: Tensor) -> Tensor:
    """`log p(y | x)`, `[B]`, nats, under equally likely classes: the exact posterior; K passes."""
    return class_log_probs(flow, x).log_softmax(dim=1).gather(1, y[:, None])[:, 0]


OBJECTIVES: dict[str, Objective] = {"contrast": contrast, "posterior": posterior}


@torch.no_grad()
def agreement(
    flow: Flow,
    x: Tensor,
    y: Tensor,
    rule: str = "exact",
    batch_size: int = 256,
    statistics: ClassStatistics | None = None,
) -> Tensor:
    """The log-probability `[B]`, nats, that the flow gives the labels `y [B]` of noisy images `x [B, *data_shape]`.

    Args:
        flow: a class-conditional flow.
        x: images as decoded, before the score step: with the noise of training.
        y: labels.
        rule: a classification rule (`flowback.tasks.classify`); its scores are normalized over the classes.
        batch_size: rows that the flow sees at once.
        statistics: as in `classify`.

    Raises:
        InputError: if the flow is unconditional or the rule does not exist.
    """
    flow = _conditional(flow)
    score, _, rows = rule_named(rule, flow.num_classes)
    parts = flow.enter(x).split(max(1, batch_size // rows))
    scores = torch.cat([score(flow, [part], statistics) for part in parts])
    return scores.log_softmax(dim=1).gather(1, put(y, scores.device)[:, None])[:, 0]


@torch.no_grad()
def best_of(
    flow: Flow,
    z: Tensor,
    y: Tensor,
    guidance: float | Guidance = 0.0,
    rule: str = "exact",
    method: str | Sequence[str] = "auto",
    batch_size: int = 64,
    compile: bool = False,
) -> Tensor:
    """Of several noises for each image, the one whose image has the largest `agreement` with its label.

    Args:
        flow: a class-conditional flow.
        z: R candidates for each image, `[B, R, N, D]`; each costs a decode and what the rule does.
        y: labels `[B]`.
        guidance: as the images will be decoded.
        rule: as in `agreement`.
        method: as in `TarFlow.decode`.
        batch_size: images at once; bounds the memory.
        compile: as in `TarFlow.decode`.

    Returns:
        The best z of each image, `[B, N, D]`.
    """
    flow, R = _conditional(flow), z.shape[1]
    z, y = flow.enter(z), put(y, flow.device)
    flat, labels = z.flatten(0, 1), y[:, None].expand(-1, R).flatten()
    scores = [
        agreement(flow, flow.decode(z_part, y_part, guidance, method, compile=compile), y_part, rule)
        for z_part, y_part in zip(flat.split(batch_size), labels.split(batch_size), strict=True)
    ]
    best = torch.cat(scores).view(-1, R).nan_to_num(-torch.inf).argmax(dim=1)
    return z[torch.arange(len(z), device=z.device), best]


@torch.inference_mode(False)  # it takes gradients
def refine(
    flow: Flow,
    z: Tensor,
    y: Tensor,
    steps: int = 3,
    angle: float = 0.1,
    objective: str = "posterior",
    guidance: float | Guidance = 0.0,
    batch_size: int = 64,
    compile: bool = False,
) -> Tensor:
    """Turn z so that the flow gives the image's label a higher probability.

    Each step turns z towards the gradient of the objective by `angle`, and keeps its length, and so the density under the
    prior. A step that does not raise the objective is undone, and the angle of its image halved. The gradient is that
    through the decode (`flowback.flow.implicit`).

    Args:
        flow: a class-conditional flow.
        z: noise `[B, N, D]`.
        y: labels `[B]`, none of them -1.
        steps: gradient steps. Each costs a decode, the objective with its backward pass, and about ten passes of adjoint.
        angle: of a step, radians; in hundreds of dimensions 0.1 is small, and 1 makes another image.
        objective: a key of `OBJECTIVES`.
        guidance: as the images will be decoded.
        batch_size: images at once; bounds the memory.
        compile: as in `TarFlow.decode`.

    Returns:
        The new z `[B, N, D]`.

    Raises:
        InputError: if the flow is unconditional, or an argument is impossible.
    """
    flow = _conditional(flow)
    if steps < 0:
        raise InputError(f"steps must be at least 0, got {steps}")
    if not 0 < angle < 1.6:
        raise InputError(f"angle must be above 0 and at most 1.57 radians, got {angle}")
    if objective not in OBJECTIVES:
        raise InputError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if y.device.type == "cpu" and (y < 0).any():
        raise InputError("labels to refine towards must be at least 0, got -1")
    z, y = flow.enter(z), put(y, flow.device).clone()
    parts = zip(z.split(batch_size), y.split(batch_size), strict=True)
    return torch.cat([_refine(flow, *part, steps, angle, OBJECTIVES[objective], guidance, compile) for part in parts])


def _refine(
    flow: TarFlow,
    z: Tensor,
    y: Tensor,
    steps: int,
    angle: float,
    objective: Objective,
    guidance: float | Guidance,
    compile: bool,
) -> Tensor:
    angles = z.new_full((len(z), 1, 1), angle)
    options = {"objective": objective, "guidance": guidance, "compile": compile}
    value, gradient = _value_and_gradient(flow, z, y, **options)
    for step in range(steps):
        length = z.norm(dim=(1, 2), keepdim=True)
        tangent = gradient - (gradient * z).sum(dim=(1, 2), keepdim=True) * z / length.square()
        tangent = tangent / tangent.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        turned = torch.cos(angles) * z + torch.sin(angles) * length * tangent
        turned = torch.where(turned.isfinite().all(dim=2, keepdim=True).all(dim=1, keepdim=True), turned, z)
        new_value, new_gradient = _value_and_gradient(flow, turned, y, **options, last=step == steps - 1)
        better = (new_value > value)[:, None, None]
        z, gradient = torch.where(better, turned, z), torch.where(better, new_gradient, gradient)
        value, angles = torch.where(better[:, 0, 0], new_value, value), torch.where(better, angles, angles / 2)
    return z


def _value_and_gradient(
    flow: TarFlow,
    z: Tensor,
    y: Tensor,
    objective: Objective,
    guidance: float | Guidance,
    compile: bool,
    last: bool = False,
) -> tuple[Tensor, Tensor]:
    """The objective `[B]` of what z is decoded to, and its gradient with respect to z, or zeros if it is the last."""
    with torch.set_grad_enabled(not last):
        z = z.clone().requires_grad_()
        value = objective(flow, flow.decode(z, y, guidance, compile=compile), y)
        if last:
            return value, torch.zeros_like(z)
        (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), gradient


def _conditional(flow: Flow) -> TarFlow:
    """The flow in its own space, if it has classes."""
    if not flow.num_classes:
        raise InputError("labels need a class-conditional flow, got an unconditional one")
    return flow.core
