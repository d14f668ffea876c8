"""Whether samples copy training images: how near the nearest one is, beside how near held-out images come to one.

Distances are root mean squares over the pixels, on the [-1, 1] scale, of images averaged to at most 32x32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import Subset

from flowback.measure.fidelity import Images

MOST_SIDE, MOST_TRAINING, MOST_IMAGES = 32, 50_000, 1000
QUANTILE = 0.01  # of the distances of held-out images, below which a sample is close
BATCH = 512


def nearest(
    images: Images | Subset[Tensor], training: Images | Subset[Tensor], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The distance of each image to its nearest training image, `[n]`, and the number of that, `[n]`, on the CPU."""
    x = torch.cat(list(_small(images, device)))
    best, index = x.new_full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.long, device=x.device)
    for number, part in enumerate(_small(training, device)):
        distance, found = torch.cdist(x, part, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        index = torch.where(distance < best, found + number * BATCH, index)
        best = torch.minimum(best, distance)
    return (best / x.shape[1] ** 0.5).cpu(), index.cpu()


def copies(
    samples: Images | Subset[Tensor],
    held_out: Images | Subset[Tensor],
    training: Images | Subset[Tensor],
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Look for copies.

    Returns:
        The medians of both distances, the share of samples closer than 99 % of held-out images are (0.01 where nothing is
        copied), and the number of training images; and the numbers of the samples, the closest first, each with that of
        its training image.
    """
    (own, index), (others, _) = nearest(samples, training, device), nearest(held_out, training, device)
    figures = {"nearest": own.median(), "nearest_of_held_out": others.median()}
    figures["close"] = (own < others.quantile(QUANTILE)).float().mean()
    order = own.argsort()
    figures = {name: float(value) for name, value in figures.items()} | {"training_images": len(training)}
    return figures, list(zip(order.tolist(), index[order].tolist(), strict=True))


def _small(images: Images | Subset[Tensor], device: torch.device | str) -> Iterator[Tensor]:
    for start in range(0, len(images), BATCH):
        x = torch.stack([images[i] for i in range(start, min(start + BATCH, len(images)))]).to(device).float() / 127.5 - 1
        height, width = (min(MOST_SIDE, side) for side in x.shape[2:])
        yield adaptive_avg_pool2d(x, (height, width)).flatten(1)
