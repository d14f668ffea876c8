"""Batches for training. What a step sees is a function of (seed, step), so a resumed run sees what it would have seen."""

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowback.data.datasets import Split
from flowback.errors import InputError
from flowback.seeds import keyed_generator

Raw = tuple[
    Tensor, Tensor | None, Tensor
]  # indices [B], images uint8 [B, C, H, W] or None where nobody needs them, labels [B]


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of everything random in one step: flips, noise, dropped labels."""
    return keyed_generator(seed, 0, step)


class StepOrder:
    """The indices of each step's batch, from step `start` to `stop`: epochs, each in an order of its own, end to end."""

    def __init__(self, count: int, batch_size: int, seed: int, start: int, stop: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.start, self.stop = start, stop
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            yield [self._index(position) for position in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=keyed_generator(self.seed, 1, epoch))
        return int(self._order[offset])


class _Fetch(Dataset[Raw]):
    """Lets a DataLoader fetch a whole batch at once from a `Split`."""

    def __init__(self, split: Split, images: bool) -> None:
        self.split, self.images = split, images

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: Sequence[int]) -> Raw:
        numbers = torch.as_tensor(indices)
        if not self.images:
            return numbers, None, self.split.labels[numbers]
        images, labels = self.split[indices]
        return numbers, images, labels


def _as_is(batch: Any) -> Any:
    return batch


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C is for the main process, which ends its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(
    split: Split, batch_size: int, seed: int, start: int, stop: int, workers: int = 0, images: bool = True
) -> Iterator[Raw]:
    """Yield indices, images (None unless `images`) and labels for the steps `start` … `stop - 1`.

    Raises:
        InputError: if an image cannot be read.
    """
    order = StepOrder(len(split), batch_size, seed, start, stop)
    loader = DataLoader(
        _Fetch(split, images),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_ignore_interrupts,
    )
    try:
        yield from loader
    except InputError as error:  # one raised in a worker arrives as a whole traceback, its own sentence last
        raise InputError(str(error).strip().splitlines()[-1].removeprefix("flowback.errors.InputError: ")) from None
