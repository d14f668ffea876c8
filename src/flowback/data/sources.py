"""Images that stay on disk: where a million of them lie, kept in a few arrays, and the index files that remember it."""

import hashlib
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.files import cache_folder, write_whole
from flowback.data.images import MAX_BYTES, READING, load_image
from flowback.data.splits import Split

FORMAT = 1  # of the index files
THREADS = 16  # they wait for a disk or the network most of the time
OFFSETS = "_offsets"  # of a text, in an index file
CONTENT_BYTES = 32 * 2**20  # a split of at most this size is known by its contents, a larger one by names and sizes

Report = Callable[[int, int], None]  # how many folders or shards of how many are known by now
In = TypeVar("In")
Out = TypeVar("Out")


class Texts:
    """Byte strings `[n]` in two arrays: a list of a million would take four times the memory, and again in every worker."""

    def __init__(self, blob: np.ndarray, offsets: np.ndarray) -> None:
        self.blob, self.offsets = blob, offsets  # uint8 [bytes], int64 [n + 1]

    @classmethod
    def of(cls, items: Sequence[bytes]) -> "Texts":
        """The items, stored."""
        lengths = np.fromiter(map(len, items), np.int64, len(items))
        return cls(np.frombuffer(b"".join(items), np.uint8), np.concatenate([[0], lengths.cumsum()]))

    @classmethod
    def joined(cls, parts: Sequence["Texts"]) -> "Texts":
        """All items of all parts."""
        starts = np.cumsum([0, *(len(part.blob) for part in parts)])
        offsets = [part.offsets[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(np.concatenate([part.blob for part in parts]), np.concatenate([[0], *offsets]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.select(range(len(self))))

    def select(self, indices: Iterable[int]) -> list[bytes]:
        """Many items at once."""
        blob, offsets = self.blob.tobytes(), self.offsets.tolist()
        return [blob[offsets[i] : offsets[i + 1]] for i in indices]


class Source(ABC):
    """Images on disk by number: the file of each, as it lies there, and its class."""

    labels: Tensor  # int64 [n]
    classes: list[str]
    held_out: Tensor  # bool [n], true for the images of a held-out part that the data has of its own
    sizes: np.ndarray  # int64 [n], bytes

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The whole file of an image.

        Raises:
            InputError: if it cannot be read.
        """

    @abstractmethod
    def where(self, index: int) -> str:
        """Where the image lies, for people."""

    @abstractmethod
    def names(self, indices: Sequence[int]) -> list[bytes]:
        """The names of images, which stay the same when the data is moved as a whole."""


class DiskSplit(Split):
    """Images of a source, read when they are asked for.

    Args:
        source: where they lie.
        indices: which of its images, `[n]`.
        image_size: height and width that each is cropped and resized to, or one number for both, pixels.
        channels: 3 for color, 1 for grey.
    """

    def __init__(self, source: Source, indices: Tensor, image_size: int | tuple[int, int], channels: int) -> None:
        self.source, self.indices, self.labels = source, indices, source.labels[indices]
        self.image_size, self.channels = image_size, channels

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(indices)
        return torch.stack([self._image(i) for i in self.indices[index].tolist()]), self.labels[index]

    def _image(self, number: int) -> Tensor:
        if self.source.sizes[number] > MAX_BYTES:
            raise InputError(f"image {self.source.where(number)} cannot be read (it is larger than {MAX_BYTES} bytes)")
        return load_image(self.source.read(number), self.image_size, self.channels, self.source.where(number))

    def fingerprint(self) -> str:
        """Hash of the transform, and of the images' names and contents, or sizes where the contents are large."""
        indices, sizes = self.indices.tolist(), self.source.sizes[self.indices.numpy()]
        digest = hashlib.sha256(f"{READING} {self.image_size} {self.channels}\n".encode())
        digest.update(b"\0".join(self.source.names(indices)))
        if sizes.sum() <= CONTENT_BYTES:
            for i in indices:
                digest.update(hashlib.sha256(self.source.read(i)).digest())
        else:
            digest.update(sizes.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def shown(name: str) -> str:
    r"""The name of a folder as text: bytes in it that are no UTF-8, which no file could be written with, are escaped.

    >>> shown(os.fsdecode(b"caf\xe9"))
    'caf\\xe9'
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def load_index(kind: str, place: str) -> dict[str, Any] | None:
    """The arrays and texts that an earlier start kept about a place, by name, or None."""
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(_index_file(kind, place)) as file:
        arrays = {name: file[name] for name in file.files}
        texts = {name: Texts(arrays[name], arrays.pop(name + OFFSETS)) for name in file.files if name + OFFSETS in arrays}
        return arrays | texts
    return None


def save_index(kind: str, place: str, values: Mapping[str, Any]) -> None:
    """Keep arrays and texts about a place for the next start, where the cache folder can be written."""
    arrays = {}
    for name, value in values.items():
        arrays |= {name: value.blob, name + OFFSETS: value.offsets} if isinstance(value, Texts) else {name: value}
    with suppress(OSError):  # without an index the next start only takes longer
        write_whole(_index_file(kind, place), lambda path: np.savez(path, **arrays))


def _index_file(kind: str, place: str) -> Path:
    name = hashlib.sha256(f"{FORMAT} {os.path.realpath(place)}".encode(errors="surrogateescape")).hexdigest()[:24]
    return cache_folder() / kind / f"{name}.npz"


def in_threads(work: Callable[[In], Out], items: Sequence[In], report: Report | None) -> list[Out]:
    """`work` done on every item, several at a time; results in the items' order."""
    results = []
    with ThreadPoolExecutor(THREADS) as pool:
        for result in pool.map(work, items):
            results.append(result)
            if report is not None:
                report(len(results), len(items))
    return results
