"""Labelled images by number, and how a data set is divided."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowback.core.seeds import keyed_generator


def spread(count: int, wanted: int | None = None) -> list[int]:
    """An even spread of `wanted` of `count` indices, or all of them."""
    return torch.linspace(0, count - 1, min(wanted or count, count)).round().long().tolist()


def in_shares(labels: Tensor, count: int, seed: int = 0) -> tuple[int, ...]:
    """`count` labels in random order, as often as in `labels`: of each its share of `count`, rounded up or down."""
    order = labels.sort().values
    start = float(torch.rand((), generator=keyed_generator(seed, count)))
    places = ((torch.arange(count, dtype=torch.float64) + start) * (len(order) / count)).long().clamp(max=len(order) - 1)
    return tuple(order[places][torch.randperm(count, generator=keyed_generator(seed, count, 1))].tolist())


class Split(ABC):
    """Labelled images: `split[[3, 5]]` is `(uint8 [2, C, H, W], int64 [2])`; `labels` holds all labels."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the images do."""


class MemorySplit(Split):
    """Images held in memory, uint8 `[n, C, H, W]`."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(indices)
        return self.images[index], self.labels[index]

    def fingerprint(self) -> str:
        """Hash of all pixels."""
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()[:16]


def evaluated(count: int, images: int) -> list[int]:
    """Indices of the held-out images, of `count`, that a run looks at while it trains, ascending."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:images].sort().values.tolist()


def split_by_name(names: Sequence[bytes], labels: Tensor, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Training and held-out indices, ascending; of every class the share `holdout`, and at least one image each.

    Held out are those whose names have the smallest hashes, so that images that come or go hardly move others.

    Args:
        names: of the images in their class, `[n]`.
        labels: `[n]`, each of at least two images.
        holdout: the share.
        seed: of the hash.
    """
    key = hashlib.sha256(str(seed).encode()).digest()
    hashes = [hashlib.blake2b(name, digest_size=8, key=key).digest() for name in names]
    order = np.lexsort((np.frombuffer(b"".join(hashes), ">u8"), labels.numpy()))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for members in torch.from_numpy(order).split(labels.unique(return_counts=True)[1].tolist()):
        held_out[members[: min(max(1, round(holdout * len(members))), len(members) - 1)]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def split_indices(labels: Tensor, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Training and held-out indices, ascending; of every class the share `holdout`, at least one, is held out.

    They are drawn by number: of images in memory, and of all in version 0.1.0.
    """
    generator = torch.Generator().manual_seed(seed)
    held = []
    for members in labels.argsort(stable=True).split(labels.unique(return_counts=True)[1].tolist()):
        count = max(1, round(holdout * len(members)))
        held.append(members[torch.randperm(len(members), generator=generator)[:count]])
    held_out = torch.cat(held).sort().values
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held_out] = False
    return rest.nonzero()[:, 0], held_out
