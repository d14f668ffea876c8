"""Images that stay on disk: where a million of them lie, kept in a few arrays, and the index files that remember it."""

import hashlib
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
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
from flowback.data.batches import TRIES, Tolerance
from flowback.data.images import MAX_BYTES, READING, is_grey, load_image
from flowback.data.splits import Split

FORMAT = 2  # of the index files
THREADS = 16  # they wait for a disk or the network most of the time
OFFSETS = "_offsets"  # of a text, in a file of arrays
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # what reading such a file raises
CONTENT_BYTES = 32 * 2**20  # images of at most this size are known by their contents, others by names and sizes
LOOKED_AT = 64  # images that show whether a set is grey
SHOWN = 5  # kinds of files, folders, classes in a sentence

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

    def same(self, other: "Texts") -> bool:
        """Whether the items are equal."""
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.blob, other.blob)

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
    classes: list[str]  # empty where images have no label; all labels are 0 then
    held_out: Tensor  # bool [n], true for the images of a held-out part that the data has of its own
    sizes: np.ndarray  # int64 [n], bytes
    notes: list[str]  # sentences on what else lies there

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

    def digest(self, index: int) -> bytes:
        """SHA-256 of an image's file."""
        return hashlib.sha256(self.read(index)).digest()

    def grey(self) -> bool:
        """Whether a look at some of the images finds no color; false where none can be read."""
        count, looked_at = len(self.sizes), 0
        for index in np.linspace(0, count - 1, min(LOOKED_AT, count)).round().astype(int).tolist():
            with suppress(InputError):
                if self.sizes[index] <= MAX_BYTES:
                    if not is_grey(self.read(index)):
                        return False
                    looked_at += 1
        return looked_at > 0


class DiskSplit(Split):
    """Images of a source, read when they are asked for.

    Args:
        source: where they lie.
        indices: which of its images, `[n]`.
        image_size: height and width that each is cropped and resized to, or one number for both, pixels.
        channels: 3 for color, 1 for grey.

    With a `tolerance`, the next image of its class stands for one that cannot be read.
    """

    tolerance: Tolerance | None = None

    def __init__(self, source: Source, indices: Tensor, image_size: int | tuple[int, int], channels: int) -> None:
        self.source, self.indices, self.labels = source, indices, source.labels[indices]
        self.image_size, self.channels = image_size, channels

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(indices)
        return torch.stack([self._image(i) for i in index.tolist()]), self.labels[index]

    def _image(self, index: int) -> Tensor:
        try:
            return self._read(int(self.indices[index]))
        except InputError as error:
            if self.tolerance is None:
                raise
            self.tolerance.note([str(error)])
        alike = (self.labels == self.labels[index]).nonzero()[:, 0]
        for other in alike.roll(-int((alike <= index).sum()))[:TRIES].tolist():
            try:
                return self._read(int(self.indices[other]))
            except InputError as error:
                self.tolerance.note([str(error)])
        raise InputError(f"no image of class {int(self.labels[index])} can be read; expected some")

    def _read(self, number: int) -> Tensor:
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
                digest.update(self.source.digest(i))
        else:
            digest.update(sizes.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def shown(name: str) -> str:
    r"""The name of a folder as text: bytes in it that are no UTF-8, which no file could be written with, are escaped.

    >>> shown(os.fsdecode(b"caf\xe9"))
    'caf\\xe9'
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def listed(what: str, names: Sequence[str]) -> str:
    """Some names and what they are of.

    >>> listed("folder", ["a", "b"])
    'folders a, b'
    """
    return f"{what}{'s' * (len(names) != 1)} {some(names)}"


def some(names: Sequence[str]) -> str:
    """The first of some names, with commas."""
    return ", ".join([*names[:SHOWN], *["…"] * (len(names) > SHOWN)])


def counted(kinds: Counter[str]) -> str:
    """How many files of which other kinds there are, in words.

    >>> counted(Counter({".txt": 3, "without a suffix": 1}))
    '4 files that are no images (3 .txt, 1 without a suffix)'
    """
    most = [f"{count} {kind}" for kind, count in kinds.most_common()]
    files = "1 file that is no image" if kinds.total() == 1 else f"{kinds.total()} files that are no images"
    return f"{files} ({some(most)})"


def load_index(kind: str, place: str) -> dict[str, Any] | None:
    """The arrays and texts that an earlier start kept about a place, by name, or None."""
    with suppress(*UNREADABLE):
        return read_arrays(_index_file(kind, place))
    return None


def save_index(kind: str, place: str, values: Mapping[str, Any]) -> None:
    """Keep arrays and texts about a place for the next start, where the cache folder can be written."""
    with suppress(OSError):  # without an index the next start only takes longer
        write_arrays(_index_file(kind, place), values)


def read_arrays(file: Path) -> dict[str, Any]:
    """The arrays and texts that `write_arrays` kept, by name.

    Raises:
        UNREADABLE: if they cannot be read.
    """
    with np.load(file) as kept:
        arrays = {name: kept[name] for name in kept.files}
    texts = {name: Texts(arrays[name], arrays.pop(name + OFFSETS)) for name in list(arrays) if name + OFFSETS in arrays}
    return arrays | texts


def write_arrays(file: Path, values: Mapping[str, Any]) -> None:
    """Keep arrays and texts in a file, without pickles.

    Raises:
        OSError: if it cannot be written.
    """
    arrays = {}
    for name, value in values.items():
        arrays |= {name: value.blob, name + OFFSETS: value.offsets} if isinstance(value, Texts) else {name: value}
    write_whole(file, lambda path: np.savez_compressed(path, **arrays))


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
