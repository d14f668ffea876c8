"""An autoencoder that is trained together with the flow in its latents, and the figures that show whether it collapses.

A latent is `z = E(x) + s e` with standard normal e and a *fixed* s (SimFlow, arXiv 2512.04084). All that a learned s could
gain by growing small is gone: the entropy of z given x is constant. The likelihood still gains where E(x) says less of x,
down to a point; what holds against it is the reconstruction from z, and how far it went is seen in E(x) itself (`signal`).
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from flowback.core.errors import InputError
from flowback.latents.autoencoder import WEIGHTS, Autoencoder, AutoencoderConfig, check_numbers
from flowback.latents.decoders import GROUPS, LEAST_WIDTH, ConvDecoder, Residual, factors

MOST_LAYERS = 100


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """An autoencoder that is trained together with the flow.

    Args:
        channels: of the latents.
        downsample: image pixels per latent, along a side.
        width: channels of the convolutions at the latents' resolution; each finer one has half of it, and at least 32.
        layers: residual blocks of each resolution; the encoder has none at that of the images.
        noise_std: s, the standard deviation of the noise on the latents, fixed; it is the flow's own noise.
        nll_weight: of the flow's loss, nats per dimension, against that of the reconstruction.
        align_encoder: whether the gradient of a forward alignment goes on into the encoder (REPA-E, arXiv 2504.10483).
        mask: share of an image's patches that the encoder does not see in training (MIMFlow, arXiv 2606.26016).
        mask_patch: side of such a patch, in latents.
        dead_below: a channel of the latents is dead if its signal is weaker than this multiple of noise_std.
        most_dead: share of dead channels above which training ends, once the learning rate has risen.

    Raises:
        InputError: if a value is impossible.
    """

    channels: int = 16
    downsample: int = 4
    width: int = 64
    layers: int = 1
    noise_std: float = 0.5
    nll_weight: float = 0.1
    align_encoder: bool = False
    mask: float = 0.0
    mask_patch: int = 1
    dead_below: float = 0.1
    most_dead: float = 0.75

    def __post_init__(self) -> None:
        for name, least in (("channels", 1), ("downsample", 2), ("layers", 1), ("mask_patch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"joint.{name} must be a whole number of at least {least}, got {getattr(self, name)}")
        if self.layers > MOST_LAYERS:
            raise InputError(f"joint.layers must be at most {MOST_LAYERS}, got {self.layers}")
        if self.width < GROUPS or any(width % GROUPS for width in self.widths):
            raise InputError(
                f"joint.width must be a multiple of {GROUPS}, and so its halves down to {LEAST_WIDTH}, got {self.width}"
            )
        if not 0 < self.noise_std < math.inf:
            raise InputError(f"joint.noise_std must be above 0, got {self.noise_std}")
        for name in ("nll_weight", "dead_below"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"joint.{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.mask < 1:
            raise InputError(f"joint.mask must be a share from 0 to 1, 1 excluded, got {self.mask}")
        if not 0 <= self.most_dead <= 1:
            raise InputError(f"joint.most_dead must be a share from 0 to 1, got {self.most_dead}")

    @property
    def widths(self) -> list[int]:
        """Channels at each resolution, that of the latents first."""
        widths = [self.width]
        for _ in factors(self.downsample):
            widths.append(max(widths[-1] // 2, LEAST_WIDTH))
        return widths


class ConvEncoder(nn.Sequential):
    """Images `[B, image_channels, H, W]` to `[B, config.channels, h, w]`: E, the mirror image of `ConvDecoder`.

    From one resolution to the next by convolutions of patches side by side, then residual blocks.
    """

    def __init__(self, config: JointConfig, image_channels: int) -> None:
        widths, stages = config.widths, []
        for width, finer, factor in zip(widths, widths[1:], factors(config.downsample), strict=False):
            residuals = [Residual(width) for _ in range(config.layers)]
            stages = [nn.Conv2d(finer, width, factor, stride=factor), *residuals, *stages]
        last = nn.GroupNorm(GROUPS, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], config.channels, 3, padding=1)
        super().__init__(nn.Conv2d(image_channels, widths[-1], 3, padding=1), *stages, *last)


class JointAutoencoder(Autoencoder):
    """A small convolutional autoencoder with noise of a fixed strength on its latents.

    Args:
        config: what a flow has to know of it.
        options: its own.
    """

    kind = "joint"

    def __init__(self, config: AutoencoderConfig, options: JointConfig) -> None:
        super().__init__(config)
        self.options, channels = options, config.image_channels
        assert config.image_size is not None
        self.grid = config.latent_size(config.image_size)
        shape = options.channels, channels, self.grid, options.downsample, options.width, options.layers
        self.to_latents, self.to_images = ConvEncoder(options, channels), ConvDecoder(*shape)
        self.unseen = nn.Parameter(torch.zeros(channels, 1, 1)) if options.mask else None

    @classmethod
    def new(cls, options: JointConfig, image_size: tuple[int, int], image_channels: int) -> Self:
        """One of random weights, to train on images of a size and number of channels.

        Raises:
            InputError: if the size is no multiple of `downsample`.
        """
        return cls(cls.planned(options, image_size, image_channels), options)

    @classmethod
    def planned(cls, options: JointConfig, image_size: tuple[int, int], image_channels: int) -> AutoencoderConfig:
        """What a flow will have to know of one that is not made yet.

        Raises:
            InputError: if the size is no multiple of `downsample`.
        """
        return AutoencoderConfig.planned(cls.kind, options, image_size, image_channels)

    def forward(self, images: Tensor, noise: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What training needs.

        Args:
            images: `[B, C, H, W]` in [-1, 1].
            noise: e, standard normal, `[B, channels, h, w]`.
            places: which patches E does not see, `[B, *self.places]`, uniform in [0, 1); needed with `mask`.

        Returns:
            E(x) and z, `[B, channels, h, w]`, and D(z), `[B, C, H, W]`.
        """
        shown, c = images, self.options
        if self.unseen is not None:
            assert places is not None
            shown = hide(images, self.unseen, places, c.mask, c.mask_patch * c.downsample)
        mean = self.to_latents(shown).to(noise.dtype)
        z = mean + c.noise_std * noise
        return mean, z, self._decode(z)

    @property
    def places(self) -> tuple[int, int]:
        """Rows and columns of patches that may be hidden."""
        side = self.options.mask_patch
        return -(-self.grid[0] // side), -(-self.grid[1] // side)

    def _moments(self, images: Tensor) -> Tensor:
        return self.to_latents(images.to(self.scale.dtype))

    def _decode(self, latents: Tensor) -> Tensor:
        return self.to_images(latents.to(self.scale.dtype).flatten(2).transpose(1, 2))

    def describe(self) -> dict[str, Any]:
        """Facts, and the options."""
        return {**super().describe(), "options": asdict(self.options)}

    @classmethod
    def build(cls, description: dict[str, Any], config: AutoencoderConfig, folder: Path) -> Self:
        """The autoencoder that a config.json in `folder` describes, without its weights.

        Raises:
            InputError: if it describes none.
        """
        file = folder / "config.json"
        try:
            options = JointConfig(**description["options"])
            if cls.planned(options, config.image_size or (0, 0), config.image_channels) != replace(
                config, name=None, weights=""
            ):
                raise ValueError("its options do not fit its facts")
            check_numbers(lambda: cls(config, options), folder / WEIGHTS)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file} does not describe a joint autoencoder ({error})") from error
        return cls(config, options)


def hide(images: Tensor, value: Tensor, places: Tensor, share: float, side: int) -> Tensor:
    """Images without a share of their patches.

    Args:
        images: `[B, C, H, W]`.
        value: `[C, 1, 1]`, in place of what is hidden.
        places: `[B, rows, columns]`, uniform in [0, 1), a number for each patch; those of the lowest are hidden. Patches
            at the right and the lower edge may be cut.
        share: of the patches that are hidden, in [0, 1), rounded down.
        side: of a patch, in pixels.

    Returns:
        `[B, C, H, W]`.
    """
    rank = places.flatten(1).argsort(dim=1).argsort(dim=1).view_as(places)
    hidden = (rank < int(share * places[0].numel()))[:, None]
    height, width = images.shape[2:]
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


def check_signal(figures: dict[str, float], config: JointConfig) -> None:
    """Whether latents still say enough of the images, by the means of `signal_figures`.

    Raises:
        InputError: if more than `most_dead` of their channels are dead.
    """
    if figures["dead_channels"] > config.most_dead:
        raise InputError(
            f"the latents collapsed: {100 * figures['dead_channels']:.0f} % of their channels say nothing of the images, "
            f"with a mean signal of {figures['signal']:.2g} of the noise; the last checkpoint is untouched; a smaller "
            "joint.nll_weight or joint.noise_std may help"
        )
