"""Arrays that are computed once for each image of a data set and kept on disk: encoder features, VAE latents.

A cache is a folder, named by its kind and a hash of all that its values depend on (its facts):

    features-1c41d1e2e23c5b0a/
      header.json        the facts, and how the arrays lie on disk
      shard_00000.npy    the first images: an array [rows, variants, *shape], after it the 32 bytes of its checksum
      shard_00001.npy    ...

A shard is written under a name of its own beside its place, then renamed, so that any number of processes can fill and
read one folder without a lock: a name always means a whole file, and work that is done twice is only lost time.
"""

import hashlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.files import read_json
from flowback.core.units import from_levels
from flowback.data.batches import Reader, Tolerance, read_ahead
from flowback.data.datasets import Split

FORMAT = 1
DTYPES = ("float16", "float32")
SHARD_BYTES = 256 * 2**20
CHECKSUM_BYTES = 32  # of a SHA-256
SAVE_SECONDS = 60.0  # of work that a kill loses at most; an exception loses one batch
ANNOUNCED = 128 * 2**10  # bytes; smaller arrays come by themselves, with their neighbours, in what a system reads ahead
OPEN_MAPS = 192  # at most, for one cache; each holds a file descriptor, of which macOS gives a process 256


class ArrayCache:
    """Rows `[n, variants, *shape]`, one for each of n images, in shards on disk; variant 1 is of the mirrored image.

    Made by `plan`, which writes nothing, and then filled; or by `open`, for reading. It can be pickled: the other process
    maps the files anew.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], count: int, variants: int, shape: Sequence[int], dtype: str, rows: int
    ) -> None:
        self.folder, self.facts = Path(folder), _plain(facts)
        self.count, self.variants, self.shape = count, variants, tuple(shape)
        self.dtype, self.rows = dtype, rows
        if variants not in (1, 2):
            raise InputError(f"variants is {variants}; allowed: 1, or 2 for mirrored images too")
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
        for name, value in (("count", count), ("rows", rows), *(("shape", size) for size in self.shape)):
            if value < 1:
                raise InputError(f"{name} of a cache is {value}; allowed is a whole number of at least 1")
        self._maps: dict[int, np.ndarray] = {}

    @classmethod
    def plan(
        cls,
        folder: Path,
        facts: Mapping[str, Any],
        count: int,
        variants: int,
        shape: Sequence[int],
        dtype: str = "float16",
        shard_bytes: int = SHARD_BYTES,
    ) -> "ArrayCache":
        """A cache that is to be filled, or filled further; nothing is written yet.

        Args:
            folder: where; new, empty, or begun with the same facts (its shards then keep their size).
            facts: all that the values depend on, JSON scalars and lists; "kind" names what they are.
            count: number of images.
            variants: 1, or 2 for mirrored images too.
            shape: of the array of one image.
            dtype: float16 or float32.
            shard_bytes: size of a shard, about; at least one image goes into it.

        Raises:
            InputError: if a value is impossible, or the folder holds something else.
        """
        planned = cls(folder, facts, count, variants, shape, dtype, rows=1)
        planned.rows = max(1, min(count, shard_bytes // planned.row_bytes))
        if not planned._header.exists():
            _refuse_foreign(planned.folder)
            return planned
        begun = cls._read(planned.folder)
        begun._refuse_other({**begun.facts, **begun._layout()}, {**planned.facts, **planned._layout()})
        return begun

    @classmethod
    def open(cls, folder: Path, facts: Mapping[str, Any] | None = None) -> "ArrayCache":
        """A whole cache, for reading.

        Args:
            folder: of the cache.
            facts: what this run needs it to be made with; None takes what is there.

        Raises:
            InputError: if it is not there, not whole, or made with other facts.
        """
        cache = cls._read(Path(folder))
        if facts is not None:
            cache._refuse_other(cache.facts, _plain(facts))
        cache._refuse_incomplete()
        return cache

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's arrays."""
        return self.variants * math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """Bytes on disk of all shards."""
        return sum(self._size(shard) for shard in range(self.shards))

    def missing(self) -> list[int]:
        """Shards that are not on disk, or whose files have a wrong size."""
        return [shard for shard in range(self.shards) if not self._is_whole(shard)]

    def part_images(self, part: tuple[int, int]) -> int:
        """Number of images in part i of k, `part = (i, k)`."""
        return sum(self._length(shard) for shard in self._shards_of(part))

    def fill(
        self,
        split: Split,
        compute: Callable[[Tensor], Tensor],
        levels: int,
        report: Callable[[int], None] | None = None,
        part: tuple[int, int] = (1, 1),
        batch_size: int = 64,
        workers: int = 0,
        tolerance: Tolerance | None = None,
    ) -> None:
        """Compute what is missing and put it on disk; what is there, even of an interrupted shard, is not computed again.

        Batches begin at fixed images, so the values depend neither on interruptions nor on the parts.

        Args:
            split: the images.
            compute: images `[B, C, H, W]` in [-1, 1] to arrays `[B, *shape]`, on any device.
            levels: of the pixels.
            report: called with the number of images of this part that are done.
            part: (i, k) does the shards i, i + k, ...: k processes or machines share the work.
            batch_size: images computed at once.
            workers: processes that read images ahead; 0 reads in this one.
            tolerance: for images that cannot be read, whose arrays are those of the next one; None for none.

        Raises:
            InputError: if the disk has no room, an image cannot be read, or a value is not finite in the cache's dtype.
        """
        own = self._shards_of(part)
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; allowed is a whole number of at least 1")
        if len(split) != self.count:
            raise InputError(f"there are {len(split)} images to cache; allowed for {self.folder} are its {self.count}")
        self._refuse_full_disk(part[1])
        if not self._header.exists():
            _make_folder(self.folder)
            _write_whole(self._header, f"{json.dumps(self._as_json(), indent=1)}\n".encode())
        elif self._read(self.folder)._as_json() != self._as_json():
            raise InputError(f"{self.folder} was begun otherwise since this cache was planned; allowed: to plan again")
        report, done = report or _say_nothing, 0
        tolerance = tolerance or Tolerance(0, len(split))
        for shard in own:
            if not self._is_whole(shard):
                self._fill_shard(shard, split, compute, levels, report, done, batch_size, workers, tolerance)
            done += self._length(shard)
            report(done)
        if not self.missing():
            for leftover in self.folder.glob(".shard_*"):
                with suppress(OSError):  # Windows keeps what another process has open, which deletes it itself
                    leftover.unlink()

    def verify(self, report: Callable[[int], None] | None = None) -> None:
        """Read every shard and compare it with its checksum, which covers the header too.

        Args:
            report: called with the number of images that were compared.

        Raises:
            InputError: if the cache is not whole; names the first shard that is not as it was written.
        """
        self._refuse_incomplete()
        for shard in range(self.shards):
            digest, left = self._new_digest(shard), self._size(shard) - CHECKSUM_BYTES
            with self._file(shard).open("rb") as stream:
                while left and (piece := stream.read(min(left, 2**20))):
                    digest.update(piece)
                    left -= len(piece)
                if stream.read() != digest.digest():
                    raise InputError(
                        f"{self._file(shard)} does not match its checksum; allowed: to delete it and run flowback cache "
                        "again, which computes it anew"
                    )
            if report is not None:
                report(min((shard + 1) * self.rows, self.count))

    def __call__(self, indices: Tensor, flipped: Tensor) -> Tensor:
        """Arrays `[B, *shape]` of images `indices [B]`, mirrored where `flipped [B]` says so.

        Raises:
            InputError: if there is no such image, or no mirrored ones.
        """
        numbers, variants = indices.cpu().numpy(), flipped.long().cpu().numpy()
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.count:
            wrong = numbers.min() if numbers.min() < 0 else numbers.max()
            raise InputError(f"image {wrong} is not in {self.folder}; allowed: 0 to {self.count - 1}")
        if variants.any() and self.variants == 1:
            raise InputError(f"{self.folder} has no mirrored images; allowed: a cache of 2 variants, or to mirror none")
        out = np.empty((len(numbers), *self.shape), self.dtype)
        order = numbers.argsort(kind="stable")  # shard after shard, each from front to back
        places = [(*divmod(int(numbers[i]), self.rows), int(variants[i])) for i in order]
        for place in places:
            self._announce(*place)
        for i, place in zip(order, places, strict=True):
            self._read_into(out[i], *place)
        return torch.from_numpy(out)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    @property
    def _header(self) -> Path:
        return self.folder / "header.json"

    def _file(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:05d}.npy"

    def _progress(self, shard: int) -> Path:
        """The rows of a shard that an interrupted process left, and their checksum."""
        return self.folder / f".shard_{shard:05d}.progress"

    def _length(self, shard: int) -> int:
        """Number of images in a shard."""
        return min(self.rows, self.count - shard * self.rows)

    def _array_shape(self, shard: int) -> tuple[int, ...]:
        return (self._length(shard), self.variants, *self.shape)

    def _size(self, shard: int) -> int:
        """Bytes of a shard's file."""
        header = _npy_header(self._array_shape(shard), self.dtype)
        return len(header) + self._length(shard) * self.row_bytes + CHECKSUM_BYTES

    def _is_whole(self, shard: int) -> bool:
        try:
            return self._file(shard).stat().st_size == self._size(shard)
        except FileNotFoundError:
            return False

    def _shards_of(self, part: tuple[int, int]) -> range:
        number, parts = part
        if not 1 <= number <= parts:
            raise InputError(f"part {number} of {parts} does not exist; allowed: 1 to {parts}, of at least 1")
        return range(number - 1, self.shards, parts)

    def _start(self, shard: int, row: int, variant: int) -> int:
        """Where in a shard's file the array of one image begins, bytes."""
        header = _npy_header(self._array_shape(shard), self.dtype)
        return len(header) + (row * self.variants + variant) * self.row_bytes // self.variants

    def _announce(self, shard: int, row: int, variant: int) -> None:
        """Have the system fetch the array of one image, without waiting: a disk does a batch faster than one by one."""
        size = self.row_bytes // self.variants
        if size >= ANNOUNCED and hasattr(os, "posix_fadvise"):
            with suppress(OSError), self._file(shard).open("rb", buffering=0) as stream:  # what fails here fails in reading
                os.posix_fadvise(stream.fileno(), self._start(shard, row, variant), size, os.POSIX_FADV_WILLNEED)

    def _read_into(self, out: np.ndarray, shard: int, row: int, variant: int) -> None:
        """Read the array of one image. The shards that are asked for first stay mapped, others are opened each time."""
        file, shape = self._file(shard), self._array_shape(shard)
        if shard not in self._maps and len(self._maps) < OPEN_MAPS:
            self._maps[shard] = np.asarray(np.memmap(file, self.dtype, "r", self._start(shard, 0, 0), shape))
        if shard in self._maps:
            out[...] = self._maps[shard][row, variant]
            return
        with file.open("rb", buffering=0) as stream:
            stream.seek(self._start(shard, row, variant))
            if stream.readinto(out.data) != out.nbytes:
                raise InputError(f"{file} ends too early; allowed: to delete it and run flowback cache again")

    def _layout(self) -> dict[str, Any]:
        """How the arrays lie on disk, as far as a caller decides."""
        return {"count": self.count, "variants": self.variants, "shape": list(self.shape), "dtype": self.dtype}

    def _as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "facts": self.facts, **self._layout(), "rows": self.rows}

    @classmethod
    def _read(cls, folder: Path) -> "ArrayCache":
        """The cache that a folder's header describes, whole or not."""
        file = folder / "header.json"
        try:
            header = read_json(file)
            version = header.pop("format")
            cache = cls(folder, **header) if version == FORMAT else None
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{folder} is not a cache: it has no header.json; run flowback cache to make one") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{file} cannot be read ({error}); allowed: to delete {folder} and to cache again") from None
        if cache is None:
            raise InputError(f"{file} has format {version}; allowed here: {FORMAT}")
        return cache

    def _refuse_other(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        if difference := _difference(found, wanted):
            raise InputError(f"{self.folder} {difference}; allowed: a cache made with the same, or none")

    def _refuse_incomplete(self) -> None:
        if missing := self.missing():
            raise InputError(
                f"{self.folder} is incomplete: {len(missing)} of {self.shards} shards are missing or of a wrong size, "
                f"first {self._file(missing[0]).name}; run flowback cache again, which goes on where it stopped"
            )

    def _refuse_full_disk(self, parts: int) -> None:
        """All parts go into one folder, so there must be room for all, and for the progress that each saves beside it."""
        missing = self.missing()
        needed = sum(self._size(shard) for shard in missing) + min(parts, len(missing)) * self._size(0)
        there = next(place for place in (self.folder, *self.folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise InputError(
                f"the cache {self.folder} needs {needed:,} bytes and {free:,} are free; allowed: a folder with more room, "
                "as FLOWBACK_CACHE may name"
            )

    def _fill_shard(
        self,
        shard: int,
        split: Split,
        compute: Callable[[Tensor], Tensor],
        levels: int,
        report: Callable[[int], None],
        before: int,
        batch_size: int,
        workers: int,
        tolerance: Tolerance,
    ) -> None:
        first, array = shard * self.rows, np.empty(self._array_shape(shard), self.dtype)
        done = saved = self._restore(shard, array, batch_size)
        saved_at = time.monotonic()
        starts = range(first + done, first + len(array), batch_size)
        ranges = [range(start, min(start + batch_size, first + len(array))) for start in starts]
        try:
            for raw in read_ahead(Reader(split), ranges, workers):
                tolerance.note(raw.unreadable)
                images = cast(Tensor, raw.images)
                array[done : done + len(images)] = self._compute(compute, from_levels(images, levels), first + done)
                done += len(images)
                report(before + done)
                if time.monotonic() - saved_at > SAVE_SECONDS:
                    self._save(shard, array[:done])
                    saved, saved_at = done, time.monotonic()
        except BaseException:  # Ctrl-C too
            if done > saved:
                self._save(shard, array[:done])
            raise
        head = _npy_header(self._array_shape(shard), self.dtype)
        if not self._is_whole(shard):  # or else another process was faster; Windows replaces no file that is in use
            _write_whole(self._file(shard), head, _raw(array), self._new_digest(shard, head, _raw(array)).digest())
        with suppress(OSError):
            self._progress(shard).unlink()

    def _save(self, shard: int, array: np.ndarray) -> None:
        _write_whole(self._progress(shard), _raw(array), self._new_digest(shard, _raw(array)).digest())

    def _restore(self, shard: int, array: np.ndarray, batch_size: int) -> int:
        """Read what was saved of a shard into the front of `array`; the number of images that are done."""
        try:
            saved = self._progress(shard).read_bytes()
        except FileNotFoundError:
            return 0
        content, checksum = saved[:-CHECKSUM_BYTES], saved[-CHECKSUM_BYTES:]
        if self._new_digest(shard, content).digest() != checksum:
            return 0
        done = len(content) // self.row_bytes
        array[:done] = np.frombuffer(content, self.dtype).reshape(done, *array.shape[1:])
        return done if done == len(array) else done - done % batch_size

    def _compute(self, compute: Callable[[Tensor], Tensor], x: Tensor, first: int) -> np.ndarray:
        """Arrays `[B, variants, *shape]` of images `x [B, C, H, W]`, the numbers `first`, `first + 1`, ... of the split."""
        variants = []
        for variant in range(self.variants):
            with torch.no_grad():
                values = compute(x.flip(-1) if variant else x)
            if values.shape != (len(x), *self.shape):
                raise InputError(f"computed arrays have shape {list(values.shape[1:])}; allowed here: {list(self.shape)}")
            kept = values.to(getattr(torch, self.dtype))
            finite = kept.isfinite()
            if not finite.all():
                image = int((~finite).reshape(len(x), -1).any(dim=1).nonzero()[0])
                value = values[image][~finite[image]].flatten()[0].item()
                raise InputError(
                    f"image {first + image}{', mirrored,' if variant else ''} has the value {value}; allowed in a cache of "
                    f"{self.dtype} are finite numbers up to {torch.finfo(kept.dtype).max:g}"
                )
            variants.append(kept.cpu().numpy())
        return np.stack(variants, axis=1)

    def _new_digest(self, shard: int, *content: Any) -> Any:
        """A checksum of the header, the shard's number and its content: a shard of another cache has another one."""
        digest = hashlib.sha256(f"{json.dumps(self._as_json(), sort_keys=True)} {shard}".encode())
        for piece in content:
            digest.update(piece)
        return digest


def cache_key(facts: Mapping[str, Any]) -> str:
    """A short hash of the facts, the same whatever their order."""
    return hashlib.sha256(json.dumps(_plain(facts), sort_keys=True).encode()).hexdigest()[:16]


def find(root: Path, facts: Mapping[str, Any]) -> ArrayCache | None:
    """The cache in `root` that was made with these facts; None where there is none.

    Raises:
        InputError: if it is incomplete.
    """
    wanted = _plain(facts)
    for folder in _folders(root, wanted):
        try:
            cache = ArrayCache._read(folder)
        except InputError:
            continue
        if cache.facts == wanted:
            cache._refuse_incomplete()
            return cache
    return None


def nearest_mismatch(root: Path, facts: Mapping[str, Any]) -> str | None:
    """Why the most similar cache of this kind in `root` is not the one wanted, a sentence; None where there is none."""
    wanted, sentences = _plain(facts), []
    for folder in _folders(root, wanted):
        try:
            found = ArrayCache._read(folder).facts
        except InputError as error:
            sentences.append((math.inf, str(error)))
            continue
        if difference := _difference(found, wanted):
            differing = sum(found.get(name) != wanted.get(name) for name in {**wanted, **found})
            sentences.append((differing, f"{folder} {difference}"))
    return min(sentences)[1] if sentences else None


def _folders(root: Path, facts: Mapping[str, Any]) -> list[Path]:
    return sorted(Path(root).glob(f"{facts['kind']}-*"))


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as JSON gives them back: tuples become lists."""
    kind = facts.get("kind")
    if not isinstance(kind, str) or not kind.isidentifier():
        raise InputError(f"the kind of a cache is {kind!r}; allowed is a word, like features or latents")
    return json.loads(json.dumps(dict(facts)))


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first fact that differs, in the order of `wanted`, as the rest of a sentence about the cache."""
    for name in {**wanted, **found}:
        if name not in found:
            return f"was made with no {name}, this run has {wanted[name]!r}"
        if name not in wanted:
            return f"was made with {name} {found[name]!r}, this run has none"
        if found[name] != wanted[name]:
            return f"was made with {name} {found[name]!r}, this run has {wanted[name]!r}"
    return None


def _refuse_foreign(folder: Path) -> None:
    if folder.is_file():
        raise InputError(f"{folder} is a file; allowed is a new or empty folder, or one of a cache")
    if folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise InputError(f"{folder} holds files and no header.json; allowed is a new or empty folder, or one of a cache")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the cache {folder} cannot be made ({error.strerror}); allowed is a folder to write in") from None


def _write_whole(file: Path, *content: Any) -> None:
    """Write beside the file under a name that nobody else uses, then rename: the name always means a whole file."""
    partial = file.with_name(f".{file.name.removeprefix('.')}.{uuid4().hex}")
    try:
        with partial.open("wb") as stream:
            for piece in content:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())  # on disk before the name says so
        with suppress(FileNotFoundError):  # a process that found all shards there has tidied up
            partial.replace(file)
    except OSError as error:
        raise InputError(
            f"{file} cannot be written ({error.strerror}); allowed is a disk with room; what is done stays"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


@lru_cache
def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """What makes the bytes of an array a file that `numpy.load` reads."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _raw(array: np.ndarray) -> np.ndarray:
    """The bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8)


def _say_nothing(done: int) -> None:
    """Report to nobody."""
