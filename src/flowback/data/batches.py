"""Batches for training. What a step sees is a function of (seed, step), so a resumed run sees what it would have seen."""

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowback.core.distributed import ENDING
from flowback.core.errors import InputError
from flowback.core.seeds import keyed_generator
from flowback.data.splits import Split

TRIES = 100  # images that are tried in the place of one


class Raw(NamedTuple):
    """A batch as it was read."""

    indices: Tensor  # [B]
    images: Tensor | None  # uint8 [B, C, H, W]; None where nobody needs them
    labels: Tensor  # int64 [B]
    unreadable: tuple[str, ...] = ()  # a sentence on each image that could not be read, in whose place the next one stands


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of what a whole step draws at once: flips and dropped labels."""
    return keyed_generator(seed, 0, step)


def sample_generators(seed: int, step: int, first: int, count: int) -> list[torch.Generator]:
    """A generator for each sample `first` … `first + count - 1` of a step's batch, whichever process has it."""
    return [keyed_generator(seed, 2, step, position) for position in range(first, first + count)]


class StepOrder:
    """The indices of each step's batch, from step `start` to `stop`: epochs, each in an order of its own, end to end.

    Of k processes the i-th, `share = (i, k)` counted from 0, takes the i-th of k equal pieces of every batch.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, start: int, stop: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.start, self.stop = start, stop
        size = batch_size // share[1]
        self.first, self.end = share[0] * size, (share[0] + 1) * size
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            before = step * self.batch_size
            yield [self._index(position) for position in range(before + self.first, before + self.end)]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=keyed_generator(self.seed, 1, epoch))
        return int(self._order[offset])


class Reader(Dataset[Raw | InputError]):
    """Reads a whole batch of a `Split` at once.

    An image that cannot be read is replaced by the next one that can, so that the batch stays a function of its indices.
    Errors are returned, not raised: from a DataLoader's process only values come back whole, and at once.
    """

    def __init__(self, split: Split, images: bool = True) -> None:
        self.split, self.images = split, images

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, indices: Sequence[int]) -> Raw | InputError:
        try:
            return self.read(indices)
        except InputError as error:
            return error

    __getitems__ = __getitem__

    def read(self, indices: Sequence[int]) -> Raw:
        """The images and labels of `indices`.

        Raises:
            InputError: if neither an image nor any of the next `TRIES` can be read.
        """
        numbers = torch.as_tensor(indices)
        if not self.images:
            return Raw(numbers, None, self.split.labels[numbers])
        try:
            return Raw(numbers, *self.split[indices])
        except InputError:
            rows = [self._nearest(int(index)) for index in indices]
        numbers = torch.tensor([number for number, _, _ in rows])
        unreadable = tuple(sentence for _, _, sentences in rows for sentence in sentences)
        return Raw(numbers, torch.stack([image for _, image, _ in rows]), self.split.labels[numbers], unreadable)

    def _nearest(self, index: int) -> tuple[int, Tensor, list[str]]:
        sentences = []
        for number in range(index, index + min(TRIES, len(self.split))):
            try:
                return number % len(self.split), self.split[[number % len(self.split)]][0][0], sentences
            except InputError as error:
                sentences.append(str(error))
        raise InputError(sentences[0])


class Tolerance:
    """Counts images that cannot be read, each once, and refuses more than a share of a set.

    Args:
        share: of the images that may be unreadable.
        count: of images.
        say: called with a sentence on each.
    """

    def __init__(self, share: float, count: int, say: Callable[[str], None] | None = None) -> None:
        self.allowed, self.share, self.count, self.say = int(share * count), share, count, say
        self.sentences: set[str] = set()

    def note(self, sentences: Sequence[str]) -> list[str]:
        """Count what a batch met; returns the sentences that are new.

        Raises:
            InputError: if it is too much.
        """
        new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in self.sentences]
        self.sentences.update(new)
        if len(self.sentences) > self.allowed:
            if not self.allowed:
                raise InputError(sentences[0])
            raise InputError(
                f"{len(self.sentences)} of {self.count} images cannot be read, the last: {sentences[-1]}; "
                f"expected at most a share of {self.share:g}, data.unreadable"
            )
        if self.say is not None:
            for sentence in new:
                self.say(f"the next one is taken instead: {sentence}")
        return new


def ignore_interrupts(worker: int) -> None:
    """What ends a run is for the main process, which ends its step first, and then this one."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def read_ahead(reader: Reader, batches: Any, workers: int) -> Iterator[Raw]:
    """Read batch after batch, `workers` processes ahead of the caller; 0 reads when asked.

    Raises:
        InputError: if a batch cannot be read.
    """
    own = torch.Generator()  # for the loader, so that it does not draw from the global one, which a training is seeded with
    options = {"num_workers": workers, "worker_init_fn": ignore_interrupts, "generator": own}
    for raw in DataLoader(reader, batch_size=None, sampler=batches, **options):
        if isinstance(raw, InputError):
            raise raw
        yield raw


def batches(
    split: Split,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    workers: int = 0,
    images: bool = True,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Raw]:
    """Yield this process' share of the batches of the steps `start` … `stop - 1`, with images or without.

    Raises:
        InputError: if no image can be read.
    """
    return read_ahead(Reader(split, images), StepOrder(len(split), batch_size, seed, start, stop, share), workers)
