"""The options of a flow, checked where they enter."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from flowback.core.errors import InputError
from flowback.core.units import as_size
from flowback.flow.transformer import MLPS

POSITIONS = ("learned", "rotary")
PRIORS = ("standard", "scaled")
NOISES = ("gaussian", "uniform")
MOST_BLOCKS = 1000  # and most layers of a block


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The options of a flow; a checkpoint carries all of them.

    Args:
        image_size: height and width of the images, pixels, or one number for both; a recipe leaves it to the data set.
        channels: C, 1 for grey and 3 for color; a recipe leaves it to the data set.
        num_classes: K; 0 makes an unconditional flow; a recipe leaves it to the data set.
        levels: number of values that a pixel of the data can take; a recipe leaves it to the data set.
        patch_size: side p of a token's patch, in pixels (or latents); divides the images' sides.
        width: size of the transformers' residual stream.
        blocks: T, the number of autoregressive blocks.
        layers: number of transformer layers in a block, or a list of T numbers, block 1 (the one next to the data) first.
        head_dim: size of an attention head; divides width.
        mlp: kind of MLP, gelu or swiglu (of equal size).
        mlp_ratio: hidden size of the MLP as a multiple of width.
        positions: how tokens know their place, learned or rotary.
        log_scale_bound: bound on |a|, the log-scale of one block, for numerical safety; null for none, as published.
        noise: what training adds to what the flow sees, gaussian or uniform (dequantization of pixels).
        noise_std: standard deviation of the Gaussian noise; score denoising removes it from samples.
        prior: of z: standard, N(0, I), or scaled, with a deviation for each number (of imported checkpoints).

    Raises:
        InputError: if a value is impossible.
    """

    image_size: int | tuple[int, int] | None = None
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_size(self.image_size, "flow.image_size"))
        least = dict.fromkeys(("channels", "patch_size", "width", "blocks", "head_dim"), 1)
        least |= {"num_classes": 0, "levels": 2}
        open_until_known = ("channels", "num_classes", "levels")
        for name, minimum in least.items():
            value = getattr(self, name)
            if not _is_whole(value, minimum) and not (value is None and name in open_until_known):
                raise InputError(f"flow.{name} must be a whole number of at least {minimum}, got {value!r}")
        if self.blocks > MOST_BLOCKS:
            raise InputError(f"flow.blocks must be at most {MOST_BLOCKS}, got {self.blocks}")
        depths = self.layers if isinstance(self.layers, list) else [self.layers]
        if not all(_is_whole(depth, 1) and depth <= MOST_BLOCKS for depth in depths) or (
            isinstance(self.layers, list) and len(depths) != self.blocks
        ):
            raise InputError(
                f"flow.layers must be a whole number from 1 to {MOST_BLOCKS}, or a list of {self.blocks} of them, "
                f"got {self.layers!r}"
            )
        self._check_sides()
        if self.width % self.head_dim:
            raise InputError(
                f"flow.head_dim {self.head_dim} does not divide flow.width {self.width}; "
                f"expected {', '.join(str(d) for d in divisors(self.width))}"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise InputError(f"flow.head_dim must be even with rotary positions, got {self.head_dim}")
        named = {"mlp": MLPS, "positions": POSITIONS, "noise": NOISES, "prior": PRIORS}
        for name, table in named.items():
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in table:
                raise InputError(f"flow.{name} must be one of {', '.join(table)}, got {getattr(self, name)!r}")
        if not (_is_finite(self.mlp_ratio) and self.mlp_ratio * self.width >= 1):
            raise InputError(f"flow.mlp_ratio must be at least 1/width, got {self.mlp_ratio!r}")
        if self.log_scale_bound is not None and not (_is_finite(self.log_scale_bound) and self.log_scale_bound > 0):
            raise InputError(f"flow.log_scale_bound must be above 0, or null, got {self.log_scale_bound!r}")
        if not (_is_finite(self.noise_std) and self.noise_std >= 0):
            raise InputError(f"flow.noise_std must be at least 0, got {self.noise_std!r}")

    def _check_sides(self) -> None:
        """Whether patches fit the images, as far as their size is known."""
        for side in () if self.image_size is None else self.size:
            if side % self.patch_size:
                raise InputError(
                    f"flow.patch_size {self.patch_size} does not divide the image size {side}; "
                    f"expected {', '.join(str(p) for p in divisors(side))}"
                )

    @classmethod
    def complete(cls, config: "FlowConfig | None" = None, options: dict[str, Any] | None = None) -> "FlowConfig":
        """A configuration, or one of keywords, in which nothing is left open: 3 channels, no classes, 256 levels.

        Raises:
            InputError: if both are given, an option does not exist, or the image size is missing.
        """
        options = options or {}
        if config is not None and (options or not isinstance(config, FlowConfig)):
            raise InputError("a flow is made of one FlowConfig or of keywords; give one of the two")
        if config is None:
            for name in options:
                if name not in (known := [f.name for f in fields(cls)]):
                    raise InputError(f"TarFlow has no option {name!r}; expected {', '.join(known)}")
            config = cls(**options)
        if config.image_size is None:
            raise InputError("TarFlow needs image_size, the size of its images in pixels")
        open_ = {"channels": 3, "num_classes": 0, "levels": 256}
        return replace(config, **{name: value for name, value in open_.items() if getattr(config, name) is None})

    def check_pairs(self, pairs: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
        """(block, layer) pairs, both counted from 1, as a sorted list without repeats.

        Raises:
            InputError: if a block or layer does not exist.
        """
        depths, checked = self.depths, set()
        for pair in pairs:
            if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(n, int) for n in pair):
                raise InputError(f"{pair!r} is not a pair of block and layer; expected whole numbers, like [4, 2]")
            t, layer = pair
            if not 1 <= t <= len(depths):
                raise InputError(f"block must be 1 to {len(depths)}, got {t}")
            if not 1 <= layer <= depths[t - 1]:
                raise InputError(f"layer {layer} does not exist in block {t}; expected 1 to {depths[t - 1]}")
            checked.add((t, layer))
        return sorted(checked)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        assert self.image_size is not None
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

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
