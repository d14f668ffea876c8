"""The options of a flow, checked where they enter."""

import math
from dataclasses import dataclass
from typing import Any

from flowback.errors import InputError
from flowback.nn.transformer import MLPS

POSITIONS = ("learned", "rotary")
PRIORS = ("standard", "scaled")
POSTERIORS = ("mean", "sample")
NOISES = ("gaussian", "uniform")
MOST_BLOCKS = 1000  # and most layers of a block


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The options of a flow; a checkpoint carries all of them.

    Args:
        image_size: side H = W of the images, pixels; a recipe leaves it to the data set.
        channels: C, 1 for grey and 3 for colour; a recipe leaves it to the data set.
        num_classes: K; 0 makes an unconditional flow; a recipe leaves it to the data set.
        levels: number of values that a pixel of the data can take; a recipe leaves it to the data set.
        patch_size: side p of a token's patch, in pixels, or of a latent flow in its latents; divides their side.
        width: size of the transformers' residual stream.
        blocks: T, the number of autoregressive blocks.
        layers: number of transformer layers in a block, or a list of T numbers, block 1 (the one next to the data) first.
        head_dim: size of an attention head; divides width.
        mlp: kind of MLP, gelu or swiglu (of equal size).
        mlp_ratio: hidden size of the MLP as a multiple of width.
        positions: how tokens know their place, learned or rotary.
        log_scale_bound: bound on |a|, the log-scale of one block, for numerical safety; null for none, as published.
        noise: what training adds to what the flow sees, gaussian or uniform (dequantisation of pixels).
        noise_std: standard deviation of the Gaussian noise; score denoising removes it from samples.
        prior: of z: standard, N(0, I), or scaled, with a deviation for each number (of imported checkpoints).
        autoencoder: a VAE whose latents the flow models instead of pixels: a folder or hub id of a diffusers
            AutoencoderKL; null for pixels.
        latent_channels: of the latents; like the next four read off the autoencoder where it is not given.
        latent_downsample: image pixels per latent, along a side.
        latent_scale: the flow sees `(latent - latent_shift) * latent_scale`.
        latent_shift: see latent_scale.
        latent_weights: hash of the autoencoder's weights; others are refused.
        latent_posterior: which latent of an image: the mean of the autoencoder's posterior, or a sample of it.

    Raises:
        InputError: if a value is impossible.
    """

    image_size: int | None = None
    channels: int | None = None
    num_classes: int | None = None
    levels: int | None = None
    patch_size: int = 4
    width: int = 128
    blocks: int = 4
    layers: int | list[int] = 4
    head_dim: int = 32
    mlp: str = "gelu"
    mlp_ratio: float = 4.0
    positions: str = "learned"
    log_scale_bound: float | None = 8.0
    noise: str = "gaussian"
    noise_std: float = 0.05
    prior: str = "standard"
    autoencoder: str | None = None
    latent_channels: int | None = None
    latent_downsample: int | None = None
    latent_scale: float | None = None
    latent_shift: float | None = None
    latent_weights: str | None = None
    latent_posterior: str = "mean"

    def __post_init__(self) -> None:
        least = dict.fromkeys(("image_size", "channels", "patch_size", "width", "blocks", "head_dim"), 1)
        least |= {"num_classes": 0, "levels": 2, "latent_channels": 1, "latent_downsample": 1}
        open_until_known = ("image_size", "channels", "num_classes", "levels", "latent_channels", "latent_downsample")
        for name, minimum in least.items():
            value = getattr(self, name)
            if not _is_whole(value, minimum) and not (value is None and name in open_until_known):
                raise InputError(f"flow.{name} is {value!r}; allowed is a whole number of at least {minimum}")
        if self.blocks > MOST_BLOCKS:
            raise InputError(f"flow.blocks is {self.blocks}; allowed is at most {MOST_BLOCKS}")
        depths = self.layers if isinstance(self.layers, list) else [self.layers]
        if not all(_is_whole(depth, 1) and depth <= MOST_BLOCKS for depth in depths) or (
            isinstance(self.layers, list) and len(depths) != self.blocks
        ):
            raise InputError(
                f"flow.layers is {self.layers!r}; allowed is a whole number from 1 to {MOST_BLOCKS}, "
                f"or a list of {self.blocks} of them"
            )
        self._check_sides()
        if self.width % self.head_dim:
            raise InputError(
                f"flow.head_dim {self.head_dim} does not divide flow.width {self.width}; "
                f"allowed: {', '.join(str(d) for d in divisors(self.width))}"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise InputError(f"flow.head_dim is {self.head_dim}; allowed with rotary positions is an even number")
        named = {"mlp": MLPS, "positions": POSITIONS, "noise": NOISES, "prior": PRIORS, "latent_posterior": POSTERIORS}
        for name, table in named.items():
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in table:
                raise InputError(f"flow.{name} is {getattr(self, name)!r}; allowed: {', '.join(table)}")
        if not (_is_finite(self.mlp_ratio) and self.mlp_ratio * self.width >= 1):
            raise InputError(f"flow.mlp_ratio is {self.mlp_ratio!r}; allowed is a number of at least 1/width")
        if self.log_scale_bound is not None and not (_is_finite(self.log_scale_bound) and self.log_scale_bound > 0):
            raise InputError(f"flow.log_scale_bound is {self.log_scale_bound!r}; allowed is a number above 0, or null")
        if not (_is_finite(self.noise_std) and self.noise_std >= 0):
            raise InputError(f"flow.noise_std is {self.noise_std!r}; allowed is a number of at least 0")
        if self.autoencoder is not None and self.noise != "gaussian":
            raise InputError(
                f"flow.noise is {self.noise!r}; allowed in an autoencoder's latents, which have no bins: gaussian"
            )

    def _check_sides(self) -> None:
        """Whether latents fit the image and patches fit what the flow sees, as far as the sizes are known."""
        side, of = self.image_size, "image size"
        if side is not None and self.autoencoder is not None and self.latent_downsample is not None:
            if side % self.latent_downsample:
                raise InputError(
                    f"flow.image_size {side} does not fit the autoencoder; "
                    f"allowed are multiples of {self.latent_downsample}"
                )
            side, of = side // self.latent_downsample, "side of the latents,"
        elif self.autoencoder is not None:
            return
        if side is not None and side % self.patch_size:
            raise InputError(
                f"flow.patch_size {self.patch_size} does not divide the {of} {side}; "
                f"allowed: {', '.join(str(p) for p in divisors(side))}"
            )

    @property
    def depths(self) -> list[int]:
        """The number of layers of every block, block 1 first."""
        return list(self.layers) if isinstance(self.layers, list) else [self.layers] * self.blocks


def _is_whole(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def divisors(n: int) -> list[int]:
    """The divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]
