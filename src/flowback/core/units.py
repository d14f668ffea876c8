"""Changes of unit, each in one named function.

Three units meet in a flow: the pixel value `0 .. levels-1` of a file, the number in [-1, 1] that the flow sees, and the
likelihood in nats per image. Images sit at the *centres* of the bins that dequantization fills, so that clean, noised and
dequantized images all live on one scale and the data-scaling constant is the papers' `log(levels / 2)` per dimension.
"""

import math
from typing import Any

import torch
from torch import Tensor

from flowback.core.errors import InputError

LOG_2PI = math.log(2 * math.pi)


def from_levels(v: Tensor, levels: int = 256) -> Tensor:
    """Pixel values `v` in 0..levels-1, any shape, to the centres of their bins in [-1, 1]: `(2 v + 1) / levels - 1`."""
    return (2 * v.to(torch.get_default_dtype()) + 1) / levels - 1


def to_levels(x: Tensor, levels: int = 256) -> Tensor:
    """Numbers in [-1, 1] to the pixel value (int64) of the bin they lie in; what lies outside goes to the nearest bin."""
    return ((x + 1) * (levels / 2)).floor().clamp(0, levels - 1).long()


def bin_width(levels: int) -> float:
    """Width of one pixel value's bin on the [-1, 1] scale."""
    return 2 / levels


def nats_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """Negative log-density per dimension, nats, of the density on the [-1, 1] scale."""
    return -log_prob / dims


def nll_per_dim(z: Tensor, log_det: Tensor) -> Tensor:
    """The training loss `mean(z^2)/2 - mean(log|det|)`, nats per dimension, averaged over the batch (TARFlow, eq. 5).

    It is `nats_per_dim` without the prior's constant `log(2 pi) / 2`.
    """
    return 0.5 * z.square().mean() - log_det.mean() / z[0].numel()


def nats_to_bits(nats: float) -> float:
    """The same amount of information in bits."""
    return nats / math.log(2)


def bits_per_dim(log_prob: Tensor, dims: int, levels: int, noise: str = "uniform") -> Tensor:
    """Bits per dimension of *discrete* pixels from the log-density of uniformly dequantized ones.

    `log_prob` is `log p(x + u)` in nats on the [-1, 1] scale, `u` uniform over the pixel's bin of width `2/levels`; the
    constant `log2(levels / 2)` (7 for 256 levels) accounts for that scale. By Jensen's inequality the mean is an upper
    bound of the bits that the model needs.

    Raises:
        InputError: if `noise` says that the images were noised otherwise. A density of Gaussian-noised images says nothing
            of the discrete ones: with more noise it only gets flatter, and its "bits" become whatever one likes.
    """
    if noise != "uniform":
        raise InputError(
            f"the density of images with {noise} noise is not bits per dimension, since it is not one of pixels; expected "
            "images that are dequantized uniformly (TarFlow.dequantize)"
        )
    return (nats_per_dim(log_prob, dims) - math.log(bin_width(levels))) / math.log(2)


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 of the same shape, for files that people look at."""
    return to_levels(x, 256).to(torch.uint8)


def as_size(size: Any, name: str) -> Any:
    """An image size in the form that is kept: None, a number for a square, or (height, width).

    Raises:
        InputError: if it is none of these.
    """
    if isinstance(size, list | tuple) and len(size) == 2:
        size = size[0] if size[0] == size[1] else tuple(size)
    for side in size if isinstance(size, tuple) and len(size) == 2 else (size,):
        whole = isinstance(side, int) and not isinstance(side, bool) and side >= 1
        if not whole and size is not None:
            raise InputError(
                f"{name} must be a whole number of at least 1, or a pair [height, width] of them, got {size!r}"
            )
    return size
