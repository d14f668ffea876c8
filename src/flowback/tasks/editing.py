"""What exact invertibility makes possible with one's own images: interpolation, another class, inpainting.

Images are clean: a tensor `[B, C, H, W]` in [-1, 1], or whatever `flowback.data.as_images` takes. Encode and decode
themselves are methods of the flow.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from flowback.core.devices import put
from flowback.core.errors import InputError
from flowback.core.seeds import draw
from flowback.data.images import Images, as_images
from flowback.flow.labels import Labels
from flowback.flow.tarflow import TarFlow
from flowback.latents import Flow

ACCEPTANCE = 0.574  # share of proposals at which Metropolis-adjusted Langevin steps are most efficient


@torch.no_grad()
def interpolate(flow: Flow, x_a: Images, x_b: Images, steps: int, y_a: Labels = None, y_b: Labels = None) -> Tensor:
    """Walk from one image to another through z: along the great circle, so that every z on the way is typical.

    Args:
        flow: the flow.
        x_a: where to start, `[B, C, H, W]`.
        x_b: where to end, `[B, C, H, W]`.
        steps: images on the way, ends included.
        y_a: labels `[B]` of the first images, -1 or None for none.
        y_b: labels of the last ones; where they differ, the class moves with z, by mixing the class embeddings.

    Returns:
        `[B, steps, C, H, W]`; the ends are the images given, to rounding.

    Raises:
        InputError: if shapes, labels or the number of steps do not fit.
    """
    if steps < 2:
        raise InputError(f"steps must be at least 2, got {steps}")
    x_a, x_b = _data(flow, x_a), _data(flow, x_b)
    if x_a.shape != x_b.shape:
        raise InputError(f"images of shapes {list(x_a.shape)} and {list(x_b.shape)} do not fit each other")
    whole, flow, B = flow, flow.core, len(x_a)
    weights_a, weights_b = flow.class_weights(y_a, B), flow.class_weights(y_b, B)
    (z_a, _), (z_b, _) = flow.encode(x_a, weights_a), flow.encode(x_b, weights_b)
    images = []
    for s in torch.linspace(0, 1, steps).tolist():
        weights = None if weights_a is None or weights_b is None else torch.lerp(weights_a, weights_b, s)
        images.append(whole.to_images(flow.decode(slerp(z_a, z_b, s), weights)))
    return torch.stack(images, dim=1)


def slerp(z_a: Tensor, z_b: Tensor, s: float) -> Tensor:
    """The point at share s of the way from `z_a` to `z_b [B, N, D]`: directions turn evenly, lengths change evenly."""
    a, b = z_a.flatten(1), z_b.flatten(1)
    length_a, length_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    cosine = ((a / length_a) * (b / length_b)).sum(dim=1, keepdim=True).clamp(-1, 1)
    angle = torch.acos(cosine)
    parts = torch.sin((1 - s) * angle) * a / length_a + torch.sin(s * angle) * b / length_b
    direction = torch.where(angle.abs() < 1e-4, torch.lerp(a / length_a, b / length_b, s), parts / torch.sin(angle))
    return (direction * torch.lerp(length_a, length_b, s)).view_as(z_a)


@torch.no_grad()
def swap_class(flow: Flow, x: Images, y: Labels, y_new: Labels) -> Tensor:
    """Images of another class from the same noise: encoded with label `y [B]`, decoded with `y_new [B]`; `[B, C, H, W]`."""
    z, _ = flow.core.encode(_data(flow, x), y)
    return flow.decode(z, y_new)


@dataclass(frozen=True)
class Inpainting:
    """Images whose masked pixels were drawn anew."""

    x: Tensor  # [B, C, H, W], the pixels that were kept exactly as given
    log_prob: Tensor  # [B, steps + 1], nats, of the noised images after each step; the first before any
    acceptance: Tensor  # [B], share of the steps that were accepted; nan without steps


def inpaint(
    flow: Flow,
    x: Images,
    mask: Tensor,
    y: Labels = None,
    steps: int = 100,
    tries: int = 8,
    generator: torch.Generator | None = None,
) -> Inpainting:
    """Draw the masked pixels of images from what the flow expects there, given all others.

    First a guess in one decode: block 1, the last when generating, is given the known pixels and continues them. In a flow
    of one block whose order runs from the known to the masked pixels that is a draw from the conditional density itself.
    In all others it is not, since the blocks before did not see the known pixels: there, Metropolis-adjusted Langevin
    steps (Roberts and Tweedie, 1996) on the masked pixels follow, whose stationary density is the conditional one,
    exactly, because the flow's likelihood is exact. Each costs a forward and a backward pass. Step sizes adapt in the
    first half. They are local: so several first guesses are made, and the likeliest is where they start.

    Args:
        flow: the flow.
        x: images `[B, C, H, W]`; what they hold where masked does not matter.
        mask: booleans that broadcast to x, true where pixels are to be drawn.
        y: labels `[B]`, or None.
        steps: Langevin steps.
        tries: first guesses, each a decode.
        generator: source of all noise.

    Raises:
        InputError: if shapes or labels do not fit, or the number of steps or tries is impossible.
    """
    if steps < 0 or tries < 1:
        raise InputError(f"{steps} steps after {tries} tries cannot be taken; allowed: at least 0, and at least 1")
    if mask.dtype != torch.bool:
        raise InputError(f"mask must be boolean (True = inpaint), got {mask.dtype}")
    whole, x = flow, _data(flow, x)
    flow, pixels = whole.core, (len(x), *whole.data_shape)
    try:
        mask = put(mask.expand(pixels), flow.device)
    except RuntimeError as error:
        raise InputError(f"mask of shape {list(mask.shape)} does not fit images of shape {list(pixels)}") from error
    if whole is not flow:  # a latent is drawn if one of its pixels is
        mask = adaptive_max_pool2d(mask[:, :1].float(), x.shape[2:]).bool().expand_as(x)
    noisy = flow.perturb(torch.where(mask, torch.zeros_like(x), x), generator)
    current = _likeliest_guess(flow, noisy, mask, y, tries, generator)
    log_prob, score = _score(flow, current, y, mask)
    trace, accepted = [log_prob], []
    size = x.new_full((len(x), 1, 1, 1), max(flow.config.noise_std, 0.02) ** 2)
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
    drawn = torch.where(mask, flow.denoise(current, y), x)
    rate = torch.stack(accepted).mean(0) if accepted else log_prob.new_full((len(x),), math.nan)
    return Inpainting(whole.to_images(drawn), torch.stack(trace, dim=1), rate)


def _data(flow: Flow, images: Images) -> Tensor:
    """Images as the flow sees them."""
    return flow.to_data(as_images(images, flow.image_size, flow.channels), torch.Generator().manual_seed(0))


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
