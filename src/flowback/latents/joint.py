"""An autoencoder that is trained together with the flow in its latents, and the figures that show whether it collapses.

A latent is `z = E(x) + s e` with standard normal e and a *fixed* s (SimFlow, arXiv 2512.04084). All that a learned s could
gain by growing small is gone: the entropy of z given x is constant. The likelihood still gains where E(x) says less of x,
down to a point; what holds against it is the reconstruction from z, and how far it went is seen in E(x) itself (`signal`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowback.core.errors import InputError

WIDEST = 4  # the most channels of a stage, as a multiple of the first one's
GROUPS = 8  # of GroupNorm


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """An autoencoder that is trained together with the flow (`latents.joint`).

    Args:
        channels: of the latents.
        downsample: image pixels per latent, along a side.
        width: channels of the convolutions at full resolution; they double with every step down, up to four times.
        depth: residual blocks at each resolution but the full one.
        noise_std: s, the standard deviation of the noise on the latents, fixed; the flow's own noise is this one.
        nll_weight: of the flow's negative log-likelihood, nats per dimension, against the reconstruction loss.
        mask: share of an image's patches that the encoder does not see in training (MIMFlow, arXiv 2606.26016).
        mask_patch: side of such a patch, in latents.
        dead_below: a channel of the latents is dead if its signal is weaker than this multiple of noise_std.
        most_dead: share of dead channels above which training ends.

    Raises:
        InputError: if a value is impossible.
    """

    channels: int = 16
    downsample: int = 4
    width: int = 32
    depth: int = 1
    noise_std: float = 0.5
    nll_weight: float = 0.1
    mask: float = 0.0
    mask_patch: int = 1
    dead_below: float = 0.1
    most_dead: float = 0.5

    def __post_init__(self) -> None:
        least = dict.fromkeys(("channels", "width", "depth", "mask_patch"), 1) | {"downsample": 2}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise InputError(f"joint.{name} must be a whole number of at least {minimum}, got {getattr(self, name)}")
        if not 0 < self.noise_std < math.inf:
            raise InputError(f"joint.noise_std must be above 0, got {self.noise_std}")
        for name in ("nll_weight", "dead_below"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"joint.{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.mask < 1:
            raise InputError(f"joint.mask must be a share from 0 to 1, 1 excluded, got {self.mask}")
        if not 0 <= self.most_dead <= 1:
            raise InputError(f"joint.most_dead must be a share from 0 to 1, got {self.most_dead}")

    def collapsed(self, dead_share: float) -> bool:
        """Whether so many channels are dead that the latents say too little of the images to go on."""
        return dead_share > self.most_dead


class Residual(nn.Sequential):
    """`x + f(x)` with f two 3x3 convolutions, each after GroupNorm and SiLU; zero at the start. `[B, width, h, w]`."""

    def __init__(self, width: int) -> None:
        super().__init__(*_convolution(width, width), *_convolution(width, width))
        nn.init.zeros_(self[-1].weight)  # pyright: ignore[reportArgumentType]

    def forward(self, input: Tensor) -> Tensor:
        """`[B, width, h, w]` to the same shape."""
        return input + super().forward(input)


class ConvEncoder(nn.Sequential):
    """Images `[B, image_channels, H, W]` to `[B, config.channels, h, w]`: E.

    For every prime factor p of `downsample` a convolution of p x p pixels, side by side, and `depth` residual blocks.
    """

    def __init__(self, config: JointConfig, image_channels: int) -> None:
        factors, widths = _stages(config)
        layers: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 3, padding=1)]
        for factor, width, wider in zip(factors, widths, widths[1:], strict=False):
            layers += [nn.Conv2d(width, wider, factor, stride=factor)]
            layers += [Residual(wider) for _ in range(config.depth)]
        super().__init__(*layers, *_convolution(widths[-1], config.channels))


class ConvDecoder(nn.Sequential):
    """Latents `[B, config.channels, h, w]` to images `[B, image_channels, H, W]`: D, the mirror image of `ConvEncoder`."""

    def __init__(self, config: JointConfig, image_channels: int) -> None:
        factors, widths = (values[::-1] for values in _stages(config))
        layers: list[nn.Module] = [nn.Conv2d(config.channels, widths[0], 3, padding=1)]
        for factor, width, narrower in zip(factors, widths, widths[1:], strict=False):
            layers += [Residual(width) for _ in range(config.depth)]
            layers += [nn.ConvTranspose2d(width, narrower, factor, stride=factor)]
        super().__init__(*layers, *_convolution(widths[-1], image_channels))


def hide(images: Tensor, value: Tensor, noise: Tensor, share: float) -> Tensor:
    """Images without a share of their patches.

    Args:
        images: `[B, C, H, W]`.
        value: `[C, 1, 1]`, in place of what is hidden.
        noise: `[B, rows, columns]`, uniform in [0, 1), one number for each patch; the lowest are hidden. Patches at the
            right and the lower edge may be cut.
        share: of the patches that are hidden, in [0, 1), rounded down.

    Returns:
        `[B, C, H, W]`.
    """
    rank = noise.flatten(1).argsort(dim=1).argsort(dim=1).view_as(noise)
    hidden = (rank < int(share * noise[0].numel()))[:, None]
    height, width = images.shape[2:]
    side = -(-height // noise.shape[1])
    hidden = hidden.repeat_interleave(side, dim=2)[:, :, :height].repeat_interleave(side, dim=3)[:, :, :, :width]
    return torch.where(hidden, value, images)


def signal(mean: Tensor, noise_std: float) -> Tensor:
    """How much each channel of the latents says of the images: the standard deviation of E(x) between images, over s.

    Args:
        mean: E(x) of at least 2 images, `[B, channels, h, w]`.
        noise_std: s.

    Returns:
        `[channels]`. The variance is taken at each place, and averaged over places: a pattern that all images share says
        nothing of any, and costs a flow no likelihood.
    """
    return mean.detach().float().var(dim=0).mean(dim=(1, 2)).sqrt() / noise_std


def signal_figures(mean: Tensor, config: JointConfig) -> dict[str, Tensor]:
    """What is logged of E(x) `[B, channels, h, w]` of a batch: mean and least signal of a channel, share of dead ones."""
    found = signal(mean, config.noise_std)
    dead = (found < config.dead_below).float().mean()
    return {"signal": found.mean(), "least_signal": found.min(), "dead_channels": dead}


def _convolution(width: int, out: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    return nn.GroupNorm(math.gcd(GROUPS, width), width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)


def _stages(config: JointConfig) -> tuple[list[int], list[int]]:
    """The factors by which the resolution falls, and the width at every resolution, the full one first."""
    factors = list(_prime_factors(config.downsample))
    return factors, [config.width * min(2**k, WIDEST) for k in range(len(factors) + 1)]


def _prime_factors(n: int) -> Iterator[int]:
    p = 2
    while n > 1:
        while n % p == 0:
            yield p
            n //= p
        p += 1
