"""The options of a flow, checked where they enter."""

import math
from dataclasses import dataclass
from typing import Any

from flowback.errors import InputError
from flowback.nn.transformer import MLPS

POSITIONS = ("learned",)
NOISES = ("gaussian", "uniform")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The options of a flow; a checkpoint carries all of them.

    Args:
        image_size: side H = W of the images, pixels; a recipe leaves it to the data set.
        channels: C, 1 for grey and 3 for colour; a recipe leaves it to the data set.
        num_classes: K; 0 makes an unconditional flow; a recipe leaves it to the data set.
        levels: number of values that a pixel of the data can take; a recipe leaves it to the data set.
        patch_size: side p of a token's patch, pixels; divides image_size.
        width: size of the transformers' residual stream.
        blocks: T, the number of autoregressive blocks.
        layers: number of transformer layers in a block.
        head_dim: size of an attention head; divides width.
        mlp: kind of MLP, gelu.
        mlp_ratio: hidden size of the MLP as a multiple of width.
        positions: how tokens know their place, learned.
        log_scale_bound: bound on |a|, the log-scale of one block, for numerical safety; null for none, as published.
        noise: what training adds to the images, gaussian or uniform (dequantisation).
        noise_std: standard deviation of the Gaussian noise; score denoising removes it from samples.

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
    layers: int = 4
    head_dim: int = 32
    mlp: str = "gelu"
    mlp_ratio: float = 4.0
    positions: str = "learned"
    log_scale_bound: float | None = 8.0
    noise: str = "gaussian"
    noise_std: float = 0.05

    def __post_init__(self) -> None:
        least = dict.fromkeys(("image_size", "channels", "patch_size", "width", "blocks", "layers", "head_dim"), 1)
        of_data = ("image_size", "channels", "num_classes", "levels")  # may be left open
        for name, minimum in (least | {"num_classes": 0, "levels": 2}).items():
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not (is_whole and value >= minimum) and not (value is None and name in of_data):
                raise InputError(f"flow.{name} is {value!r}; allowed is a whole number of at least {minimum}")
        if self.image_size is not None and self.image_size % self.patch_size:
            raise InputError(
                f"flow.patch_size {self.patch_size} does not divide the image size {self.image_size}; "
                f"allowed: {', '.join(str(p) for p in divisors(self.image_size))}"
            )
        if self.width % self.head_dim:
            raise InputError(
                f"flow.head_dim {self.head_dim} does not divide flow.width {self.width}; "
                f"allowed: {', '.join(str(d) for d in divisors(self.width))}"
            )
        for name, table in (("mlp", MLPS), ("positions", POSITIONS), ("noise", NOISES)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in table:
                raise InputError(f"flow.{name} is {getattr(self, name)!r}; allowed: {', '.join(table)}")
        if not (_is_finite(self.mlp_ratio) and self.mlp_ratio * self.width >= 1):
            raise InputError(f"flow.mlp_ratio is {self.mlp_ratio!r}; allowed is a number of at least 1/width")
        if self.log_scale_bound is not None and not (_is_finite(self.log_scale_bound) and self.log_scale_bound > 0):
            raise InputError(f"flow.log_scale_bound is {self.log_scale_bound!r}; allowed is a number above 0, or null")
        if not (_is_finite(self.noise_std) and self.noise_std >= 0):
            raise InputError(f"flow.noise_std is {self.noise_std!r}; allowed is a number of at least 0")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def divisors(n: int) -> list[int]:
    """The divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]
