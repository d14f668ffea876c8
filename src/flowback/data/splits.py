"""Labelled images by number, and how a data set is divided."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


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


def split_indices(labels: Tensor, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Training and held-out indices, ascending; of every class the share `holdout`, at least one, is held out."""
    generator = torch.Generator().manual_seed(seed)
    held = []
    for members in labels.argsort(stable=True).split(labels.unique(return_counts=True)[1].tolist()):
        count = max(1, round(holdout * len(members)))
        held.append(members[torch.randperm(len(members), generator=generator)[:count]])
    held_out = torch.cat(held).sort().values
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held_out] = False
    return rest.nonzero()[:, 0], held_out
