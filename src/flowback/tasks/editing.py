"""Edits of one's own images by exact inversion: interpolation, another class, inpainting.

Images are clean: a tensor `[B, C, H, W]` in [-1, 1], or what else `flowback.data.as_images` takes. A flow in latents takes
and returns images, too.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from flowback.core.devices import put
from flowback.core.errors import InputError
from flowback.core.seeds import draw, keyed_normal
from flowback.data.images import Images
from flowback.flow.labels import Labels
from flowback.flow.tarflow import TarFlow
from flowback.latents import Flow, as_data

BATCH = 64  # rows that the flow sees at once; bounds the memory
ACCEPTANCE = 0.574  # share of proposals at which Metropolis-adjusted Langevin steps are most efficient


@torch.no_grad()
def interpolate(
    flow: Flow, x_a: Images, x_b: Images, steps: int, y_a: Labels = None, y_b: Labels = None, batch_size: int = BATCH
) -> Tensor:
    """Interpolate between images in z, along the great circle, so that every z on the way is typical.

    Args:
        flow: the flow.
        x_a: B images to start from.
        x_b: B images to end at.
        steps: number of images on the way, ends included.
        y_a: labels `[B]` of the first images, -1 or None for none.
        y_b: labels of the last ones; where they differ, the class moves with z, by mixing the class embeddings.
        batch_size: images that the flow sees at once; bounds the memory.

    Returns:
        `[B, steps, C, H, W]`; the ends are the given images, to rounding, or in latents their reconstructions.

    Raises:
        InputError: if shapes, labels, the number of steps or the size of a batch do not fit.
    """
    for name, value, least in (("steps", steps, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    x_a, x_b = as_data(flow, x_a), as_data(flow, x_b)
    B = len(x_a)
    if len(x_b) != B:
        raise InputError(f"x_b must be as many images as x_a, {B}, got {len(x_b)}")
    weights_a, weights_b = flow.class_weights(y_a, B), flow.class_weights(y_b, B)
    parts = []
    for rows in (slice(start, start + batch_size) for start in range(0, B, batch_size)):
        a, b = (None if weights is None else weights[rows] for weights in (weights_a, weights_b))
        parts.append(torch.stack(list(walk(flow, x_a[rows], x_b[rows], steps, a, b)), dim=1))
    return torch.cat(parts)


@torch.no_grad()
def walk(flow: Flow, x_a: Tensor, x_b: Tensor, steps: int, y_a: Labels = None, y_b: Labels = None) -> Iterator[Tensor]:
    """The images `[B, C, H, W]` of `interpolate`, a step after the other; `x_a` and `x_b` are as the flow sees them."""
    a, b = flow.class_weights(y_a, len(x_a)), flow.class_weights(y_b, len(x_b))
    (z_a, _), (z_b, _) = flow.core.encode(x_a, a), flow.core.encode(x_b, b)
    for s in torch.linspace(0, 1, steps).tolist():
        weights = None if a is None or b is None else torch.lerp(a, b, s)
        yield flow.decode(slerp(z_a, z_b, s), weights)


def slerp(z_a: Tensor, z_b: Tensor, s: float) -> Tensor:
    """The point at share s of the way from `z_a` to `z_b [B, N, D]`: directions turn evenly, lengths change evenly."""
    a, b = z_a.flatten(1), z_b.flatten(1)
    length_a, length_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    cosine = ((a / length_a) * (b / length_b)).sum(dim=1, keepdim=True).clamp(-1, 1)
    angle = torch.acos(cosine)
    parts = torch.sin((1 - s) * angle) * a / length_a + torch.sin(s * angle) * b / length_b
    direction = torch.where(angle.abs() < 1e-4, torch.lerp(a / length_a, b / length_b, s), parts / torch.sin(angle))
    return (direction * torch.lerp(length_a, length_b, s)).view_as(z_a)


def turned(z: Tensor, angles: Sequence[float], seed: int = 0, length: float = 1.0) -> Tensor:
    """Move a z by hand: turn it on its sphere, where it stays typical, and make it longer or shorter.

    Args:
        z: where the walk begins, `[N, D]`.
        angles: radians along seeded directions, which are orthonormal and tangent to the sphere at z; the walk follows the
            great circle of their sum.
        seed: of the directions.
        length: factor of z's length, as a temperature is.

    Returns:
        `[N, D]`, in the type and on the device of z.

    Raises:
        InputError: if z has too few numbers for so many directions.
    """
    if len(angles) >= z.numel():
        raise InputError(f"a z of {z.numel()} numbers has {z.numel() - 1} directions to turn in, got {len(angles)} angles")
    start = z.detach().cpu().double().flatten()
    fresh = [keyed_normal(z.shape, seed, i).double().flatten() for i in range(len(angles))]
    Q, R = torch.linalg.qr(torch.stack([start, *fresh], dim=1))
    Q = Q * R.diagonal().sign()  # the first column is z's direction
    way = Q[:, 1:] @ torch.tensor(angles, dtype=torch.float64)
    angle = way.norm()
    there = Q[:, 0] * angle.cos() + way * torch.sinc(angle / math.pi)
    return put((length * start.norm() * there).view(z.shape).to(z.dtype), z.device)


@torch.no_grad()
def swap_class(flow: Flow, x: Images, y: Labels, y_new: Labels, batch_size: int = BATCH) -> Tensor:
    """Images of another class from the same noise: encoded with label `y [B]`, decoded with `y_new [B]`; `[B, C, H, W]`.

    Raises:
        InputError: if images, labels or the size of a batch do not fit.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    data = as_data(flow, x)
    weights = [flow.class_weights(labels, len(data)) for labels in (y, y_new)]
    parts = []
    for rows in (slice(start, start + batch_size) for start in range(0, len(data), batch_size)):
        before, after = (None if w is None else w[rows] for w in weights)
        parts.append(flow.decode(flow.core.encode(data[rows], before)[0], after))
    return torch.cat(parts)


@dataclass(frozen=True)
class Inpainting:
    """Images whose masked pixels were drawn anew."""

    x: Tensor  # [B, C, H, W]; the other pixels are exactly as given, or in latents decoded from exactly the same latents
    log_prob: Tensor  # [B, steps + 1], nats, of the noised images after each step; the first before any
    acceptance: Tensor  # [B], share of the steps that were accepted; nan without steps


def box_mask(box: str, height: int, width: int) -> Tensor:
    """A box of pixels, LEFT,TOP,WIDTH,HEIGHT, as a mask `[1, 1, height, width]`, true inside.

    Raises:
        InputError: if it is none, or does not lie in the image.
    """
    try:
        left, top, across, down = (int(word) for word in box.split(","))
    except ValueError as error:
        raise InputError(f"box {box} is not a box; expected four numbers, LEFT,TOP,WIDTH,HEIGHT") from error
    if not (0 <= left < left + across <= width and 0 <= top < top + down <= height):
        raise InputError(f"box {box} does not lie in the image; expected what lies within {width}x{height} pixels")
    mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
    mask[..., top : top + down, left : left + across] = True
    return mask


def beside(x: Tensor, mask: Tensor, drawn: Tensor) -> Tensor:
    """Images `[B, C, H, W]`, what is known of them, and `n` drawings of each `[B * n, C, H, W]`: `[B, 2 + n, C, H, W]`."""
    return torch.cat([x[:, None], torch.where(mask, 0, x)[:, None], drawn.unflatten(0, (len(x), -1))], dim=1)


def inpaint(
    flow: Flow,
    x: Images,
    mask: Tensor,
    y: Labels = None,
    steps: int = 100,
    tries: int = 8,
    generator: torch.Generator | None = None,
) -> Inpainting:
    """Draw the masked pixels of images from the flow's density of them given all others.

    It starts with a guess by one decode: block 1, the last when generating, is given the known pixels and continues them.
    In a flow of one block that reads the known pixels before the masked ones, this is a draw from the conditional density.
    In other flows it is not, since the other blocks did not see the known pixels. Therefore Metropolis-adjusted Langevin
    steps (Roberts and Tweedie, 1996) on the masked pixels follow, whose stationary density is exactly the conditional one,
    because the flow's likelihood is exact. Each costs a forward and a backward pass. Step sizes adapt in the first half.
    The steps are local, so they start from the likeliest of several guesses.

    Args:
        flow: the flow.
        x: B images; their content where masked does not matter.
        mask: booleans that broadcast to `[B, C, H, W]`, true where pixels are to be drawn.
        y: labels `[B]`, or None.
        steps: Langevin steps.
        tries: first guesses, each a decode.
        generator: source of all noise.

    Raises:
        InputError: if shapes or labels do not fit, or the number of steps or tries is impossible.
    """
    *_, result = inpaint_by_step(flow, x, mask, y, steps, tries, generator, every=max(1, steps))
    return result


@torch.inference_mode(False)  # it takes gradients
def inpaint_by_step(
    flow: Flow,
    x: Images,
    mask: Tensor,
    y: Labels = None,
    steps: int = 100,
    tries: int = 8,
    generator: torch.Generator | None = None,
    every: int = 10,
) -> Iterator[Inpainting]:
    """`inpaint`, as it is after `every` so many steps, and at the end; looking at it changes nothing."""
    for name, value, least in (("steps", steps, 0), ("tries", tries, 1), ("every", every, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if mask.dtype != torch.bool:
        raise InputError(f"mask must be boolean (True = inpaint), got {mask.dtype}")
    whole, x = flow, as_data(flow, x)
    flow, pixels = whole.core, (len(x), *whole.data_shape)
    try:
        mask = put(mask.expand(pixels), flow.device)
    except RuntimeError as error:
        raise InputError(f"mask must broadcast to the shape {list(pixels)}, got {list(mask.shape)}") from error
    if whole is not flow:  # a latent is drawn if one of its pixels is
        mask = adaptive_max_pool2d(mask[:, :1].float(), x.shape[2:]).bool().expand_as(x)
    noisy = flow.perturb(torch.where(mask, torch.zeros_like(x), x), generator)
    current = _likeliest_guess(flow, noisy, mask, y, tries, generator)
    log_prob, score = _score(flow, current, y, mask)
    trace, accepted = [log_prob], []
    size = x.new_full((len(x), 1, 1, 1), max(flow.config.noise_std, 0.02) ** 2)

    def so_far() -> Inpainting:
        drawn = torch.where(mask, flow.denoise(current, y) if whole.denoises else current, x)
        rate = torch.stack(accepted).mean(0) if accepted else log_prob.new_full((len(x),), math.nan)
        return Inpainting(whole.to_images(drawn), torch.stack(trace, dim=1), rate)

    for step in range(steps):
        ahead = current + 0.5 * size * score
        proposal = torch.where(mask, ahead + size.sqrt() * draw(torch.randn, x, generator), current)
        new_log_prob, new_score = _score(flow, proposal, y, mask)
        back = proposal + 0.5 * size * new_score
        forth_back = [
            (torch.where(mask, difference, 0).square() / (2 * size)).sum(dim=(1, 2, 3))
            for difference in (proposal - ahead, current - back)
        ]
        ratio = new_log_prob - log_prob + forth_back[0] - forth_back[1]  # of densities times proposals, in nats
        accept = draw(torch.rand, ratio, generator).log() < ratio  # never where the ratio is not a number
        current = torch.where(accept[:, None, None, None], proposal, current)
        score = torch.where(accept[:, None, None, None], new_score, score)
        log_prob = torch.where(accept, new_log_prob, log_prob)
        trace.append(log_prob)
        accepted.append(accept.to(x.dtype))
        if step < steps // 2:
            share = ratio.exp().clamp(max=1).nan_to_num(0)[:, None, None, None]
            size = size * torch.exp(0.5 * (share - ACCEPTANCE))
        if (step + 1) % every == 0 and step + 1 < steps:
            yield so_far()
    yield so_far()


@torch.no_grad()
def _likeliest_guess(
    flow: TarFlow, noisy: Tensor, mask: Tensor, y: Labels, tries: int, generator: torch.Generator | None
) -> Tensor:
    best, best_log_prob = noisy, noisy.new_full((len(noisy),), -math.inf)
    for _ in range(tries):
        z = flow.to_prior(draw(torch.randn, noisy.new_empty(len(noisy), *flow.token_shape), generator))
        guess = flow.decode(z, y, known=(noisy, ~mask))
        log_prob = flow.log_prob(guess, y)
        better = log_prob > best_log_prob
        best = torch.where(better[:, None, None, None], guess, best)
        best_log_prob = torch.where(better, log_prob, best_log_prob)
    return best


def _score(flow: TarFlow, x: Tensor, y: Labels, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`log p(x | y) [B]` and its gradient with respect to the masked pixels."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log_prob = flow.log_prob(x, y)
        (score,) = torch.autograd.grad(log_prob.sum(), x)
    return log_prob.detach(), torch.where(mask, score, 0)
