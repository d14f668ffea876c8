"""Images that are not what a flow was trained on: corrupted ones, and ones of something else; the same in every call.

The corruptions are three of ImageNet-C (arXiv 1903.12261), at five strengths.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.seeds import keyed_generator
from flowback.data import as_images
from flowback.data.splits import spread
from flowback.measure.fidelity import FolderImages

STRENGTHS = (1, 2, 3, 4, 5)


def _blur(x: Tensor, amount: float, seed: int) -> Tensor:
    from torchvision.transforms.v2 import functional

    sigma = amount * min(x.shape[-2:])
    return functional.gaussian_blur(x, [2 * int(np.ceil(3 * sigma)) + 1] * 2, [sigma])


def _noise(x: Tensor, amount: float, seed: int) -> Tensor:
    return x + 2 * amount * torch.randn(x.shape, generator=keyed_generator(seed))


def _contrast(x: Tensor, amount: float, seed: int) -> Tensor:
    middle = x.mean(dim=(2, 3), keepdim=True)
    return middle + amount * (x - middle)


CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, int], Tensor], tuple[float, ...]]] = {  # with their five amounts
    "blur": (_blur, (0.01, 0.02, 0.03, 0.04, 0.06)),  # standard deviation, of the side: twice that of ImageNet-C
    "noise": (_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),  # standard deviation, of the range of pixels
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),  # the share that is left
}


def corrupted(x: Tensor, corruption: str, strength: int, seed: int = 0) -> Tensor:
    """Images `[B, C, H, W]` in [-1, 1] on the CPU, blurred, noised or with less contrast.

    Args:
        x: the images.
        corruption: blur, noise or contrast.
        strength: from 1 to 5.
        seed: of the noise.

    Raises:
        InputError: if there is no such corruption or strength.
    """
    if corruption not in CORRUPTIONS or strength not in STRENGTHS:
        allowed = f"one of {', '.join(CORRUPTIONS)}, with a strength from 1 to {STRENGTHS[-1]}"
        raise InputError(f"a corruption must be {allowed}, got {corruption!r} with {strength}")
    change, amounts = CORRUPTIONS[corruption]
    return change(x, amounts[strength - 1], seed).clamp(-1, 1)


def _digits(like: Tensor, count: int, seed: int) -> Tensor:
    from sklearn.datasets import load_digits

    digits = (load_digits(return_X_y=True)[0].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    return as_images(list(digits[spread(len(digits), count)]), (like.shape[2], like.shape[3]), like.shape[1])


def _upside_down(like: Tensor, count: int, seed: int) -> Tensor:
    return like[spread(len(like), count)].flip(2)


def _random_pixels(like: Tensor, count: int, seed: int) -> Tensor:
    return 2 * torch.rand(count, *like.shape[1:], generator=keyed_generator(seed)) - 1


OUTLIERS = {"digits": _digits, "upside_down": _upside_down, "noise": _random_pixels}


def outliers(name: str, like: Tensor, count: int, seed: int = 0) -> Tensor:
    """At most `count` images of something else, `[n, C, H, W]` in [-1, 1].

    Args:
        name: digits (scikit-learn's), upside_down (of the normal images), noise (uniform pixels), or a folder of images,
            which are cropped and resized, and grey if normal ones are.
        like: normal images, `[B, C, H, W]`.
        count: of outliers.
        seed: of the noise.

    Raises:
        InputError: if there is no such set, or its images cannot be read.
    """
    if name in OUTLIERS:
        return OUTLIERS[name](like, count, seed)
    if not Path(name).is_dir():
        raise InputError(f"outliers must be of {', '.join(OUTLIERS)}, or a folder of images, got {name!r}")
    files = FolderImages(Path(name)).files
    return as_images([files[i] for i in spread(len(files), count)], (like.shape[2], like.shape[3]), like.shape[1])
