"""Arrays that are computed once for each image of a data set and kept on disk: encoder features, VAE latents.

A cache is a folder, named by its kind and a hash of everything that its values depend on (its facts):

    features-1c41d1e2e23c5b0a/
      header.json        the facts and the layout
      shard_00000.npy    the first images: an array [rows, variants, *shape] for `numpy.load(file, mmap_mode="r")`
      shard_00000.json   its manifest: size and checksum. It is written last and marks a complete shard
      shard_00001.npy    ...

Every file is written under another name and then renamed. So any number of processes can fill and read one folder without
a lock, and work that is done twice only costs time.
"""

import hashlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.files import file_hash, read_json, write_whole
from flowback.core.units import from_levels
from flowback.data.batches import Reader, Tolerance, read_ahead
from flowback.data.splits import Split

FORMAT = 2  # in format 1 the checksum of a shard followed its array
DTYPES = ("float16", "float32")
SHARD_BYTES = 256 * 2**20
SAVE_SECONDS = 60.0  # of work that a kill loses at most; an exception loses one batch
ANNOUNCED = 128 * 2**10  # bytes; smaller arrays are in what the system reads ahead anyway
OPEN_MAPS = 192  # at most, for one cache; each holds a file descriptor, and macOS gives a process 256


class ArrayCache:
    """Rows `[n, variants, *shape]`, one for each of n images, in shards on disk; variant 1 is of the mirrored image.

    Made by `plan`, which writes nothing, and then filled; or by `open`, for reading. A pickled copy maps the files anew.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], count: int, variants: int, shape: Sequence[int], dtype: str, rows: int
    ) -> None:
        self.folder, self.facts = Path(folder), _plain(facts)
        self.count, self.variants, self.shape = count, variants, tuple(shape)
        self.dtype, self.rows = dtype, rows
        if variants not in (1, 2):
            raise InputError(f"variants must be 1, or 2 for mirrored images too, got {variants}")
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        for name, value in (("count", count), ("rows", rows), *(("shape", size) for size in self.shape)):
            if value < 1:
                raise InputError(f"{name} of a cache must be at least 1, got {value}")
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
        """A cache to be filled, or filled further. Nothing is written yet.

        Args:
            folder: where; new, empty, or begun with the same facts (its shards then keep their size).
            facts: everything that the values depend on, JSON scalars and lists; "kind" names what they are.
            count: number of images.
            variants: 1, or 2 for mirrored images too.
            shape: of the array of one image.
            dtype: float16 or float32.
            shard_bytes: approximate size of a shard, which holds at least one image.

        Raises:
            InputError: if a value is impossible, or the folder holds something else.
        """
        planned = cls(folder, facts, count, variants, shape, dtype, rows=1)
        planned.rows = max(1, min(count, shard_bytes // planned.row_bytes))
        if planned._header.exists():
            begun = cls._read(planned.folder)
            planned.rows = begun.rows
            begun._refuse_other(begun.facts, planned.facts)
            begun._refuse_other(begun._as_json(), planned._as_json())
        elif planned.folder.is_file():
            raise InputError(f"{folder} is a file; choose a new or empty folder, or one of a cache")
        elif planned.folder.is_dir() and any(not file.name.startswith(".") for file in planned.folder.iterdir()):
            raise InputError(f"{folder} holds files and no header.json; choose a new or empty folder, or one of a cache")
        return planned

    @classmethod
    def open(cls, folder: Path, facts: Mapping[str, Any] | None = None) -> "ArrayCache":
        """A complete cache, for reading.

        Args:
            folder: of the cache.
            facts: that it must have been made with; None accepts any.

        Raises:
            InputError: if it is missing, incomplete, or made with other facts.
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
        """Bytes on disk of all arrays."""
        return sum(self._size(shard) for shard in range(self.shards))

    def missing(self) -> list[int]:
        """Shards that are not on disk, have a wrong size or no manifest."""
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
        source: "ArrayCache | None" = None,
    ) -> None:
        """Compute what is missing and write it. What is on disk, even of an interrupted shard, is not computed again.

        Batches begin at fixed images, so the values depend neither on interruptions nor on the parts.

        Args:
            split: the images.
            compute: images `[B, C, H, W]` in [-1, 1] to arrays `[B, *shape]`, on any device.
            levels: of the pixels.
            report: called with the number of images of this part that are done.
            part: (i, k) computes the shards i, i + k, ...: k processes or machines share the work.
            batch_size: images computed at once.
            workers: processes that read images ahead; 0 reads in this one.
            tolerance: for images that cannot be read, which get the arrays of the next one; None allows none.
            source: a complete cache of the same images, whose arrays `compute` gets in place of images.

        Raises:
            InputError: if the disk is full, an image cannot be read, or a value is not finite in the cache's dtype.
        """
        own, missing = self._shards_of(part), self.missing()
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if len(split) != self.count:
            raise InputError(f"the cache {self.folder} needs {self.count} images, got {len(split)}")
        # there must be room for the shards of all parts, and for the progress that each part saves beside them
        needed = sum(self._size(shard) for shard in missing) + min(part[1], len(missing)) * self._size(0)
        free = shutil.disk_usage(next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())).free
        if needed > free:
            raise InputError(
                f"the cache {self.folder} needs {needed:,} bytes and {free:,} are free; choose a folder on another disk, "
                "for example by FLOWBACK_CACHE"
            )
        if not self._header.exists():
            _write(self._header, lambda path: path.write_text(f"{json.dumps(self._as_json(), indent=1)}\n"))
        if self._read(self.folder)._as_json() != self._as_json():
            raise InputError(f"{self.folder} was begun with another layout since this cache was planned; plan it again")
        report = report or (lambda done: None)
        tolerance = tolerance or Tolerance(0.0, self.count)

        def inputs(ranges: list[range]) -> Iterator[list[Tensor]]:  # of a batch, for each variant
            if source is not None:
                for indices in (torch.as_tensor(part) for part in ranges):
                    yield [source(indices, torch.full_like(indices, v, dtype=torch.bool)) for v in range(self.variants)]
                return
            for raw in read_ahead(Reader(split), ranges, workers):
                tolerance.note(raw.unreadable)
                x = from_levels(cast(Tensor, raw.images), levels)
                yield [x, x.flip(-1)][: self.variants]

        done = 0
        for shard in own:
            if not self._is_whole(shard):
                self._fill_shard(shard, inputs, compute, batch_size, report, done)
            done += self._length(shard)
            report(done)
        if not self.missing():
            for leftover in (*self.folder.glob(".shard_*"), *self.folder.glob(".partial-*")):
                with suppress(OSError):  # Windows keeps what another process has open, which deletes it itself
                    leftover.unlink()

    def verify(self, report: Callable[[int], None] | None = None) -> None:
        """Compare every shard with its manifest.

        Args:
            report: called with the number of images that were compared.

        Raises:
            InputError: if the cache is incomplete; or a shard is not as written, or not of this cache: names the first.
        """
        self._refuse_incomplete()
        for shard in range(self.shards):
            try:
                stated = read_json(self._file(shard, ".json"))
            except ValueError:
                stated = None
            if stated != self._manifest(shard):
                raise InputError(
                    f"{self._file(shard)} does not match its checksum; delete it and run flowback cache again, which "
                    "computes it anew"
                )
            if report:
                report(min((shard + 1) * self.rows, self.count))

    def __call__(self, indices: Tensor, flipped: Tensor) -> Tensor:
        """Arrays `[B, *shape]` of images `indices [B]`, mirrored where `flipped [B]` says so.

        Raises:
            InputError: if there is no such image, no mirrored ones, or a shard cannot be read.
        """
        numbers, variants = indices.cpu().numpy(), flipped.long().cpu().numpy()
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.count:
            wrong = numbers.min() if numbers.min() < 0 else numbers.max()
            raise InputError(f"an image of {self.folder} must be from 0 to {self.count - 1}, got {wrong}")
        if variants.any() and self.variants == 1:
            raise InputError(f"{self.folder} has no mirrored images; make a cache of 2 variants, or mirror none")
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

    def _file(self, shard: int, suffix: str = ".npy") -> Path:
        return self.folder / f"shard_{shard:05d}{suffix}"

    def _progress(self, shard: int) -> Path:
        """The rows of a shard that an interrupted process left: an .npz, whose format has checksums."""
        return self.folder / f".shard_{shard:05d}.progress"

    def _length(self, shard: int) -> int:
        """Number of images in a shard."""
        return min(self.rows, self.count - shard * self.rows)

    def _array_shape(self, shard: int) -> tuple[int, ...]:
        return (self._length(shard), self.variants, *self.shape)

    def _start(self, shard: int, row: int = 0, variant: int = 0) -> int:
        """The offset in a shard's file of the array of one image, bytes."""
        head = _head_bytes(self._array_shape(shard), self.dtype)
        return head + (row * self.variants + variant) * self.row_bytes // self.variants

    def _size(self, shard: int) -> int:
        """Bytes of a shard's array on disk."""
        return self._start(shard, row=self._length(shard))

    def _is_whole(self, shard: int) -> bool:
        with suppress(FileNotFoundError):
            return self._file(shard).stat().st_size == self._size(shard) and self._file(shard, ".json").exists()
        return False

    def _identity(self, shard: int) -> dict[str, Any]:
        """What tells a shard from all others, of this cache or another one."""
        return {"cache": hashlib.sha256(json.dumps(self._as_json(), sort_keys=True).encode()).hexdigest(), "shard": shard}

    def _manifest(self, shard: int) -> dict[str, Any]:
        """What the manifest of a shard says of the file that is on disk now."""
        file = self._file(shard)
        return {**self._identity(shard), "bytes": file.stat().st_size, "sha256": file_hash(file)}

    def _shards_of(self, part: tuple[int, int]) -> range:
        number, parts = part
        if not 1 <= number <= parts:
            raise InputError(f"part must be 1 to {parts}, of at least 1, got {number} of {parts}")
        return range(number - 1, self.shards, parts)

    def _announce(self, shard: int, row: int, variant: int) -> None:
        """Have the system fetch the array of one image, without waiting: a disk reads a batch faster than one by one."""
        size = self.row_bytes // self.variants
        if size >= ANNOUNCED and hasattr(os, "posix_fadvise"):
            with suppress(OSError), self._file(shard).open("rb", buffering=0) as stream:  # what fails here fails in reading
                os.posix_fadvise(stream.fileno(), self._start(shard, row, variant), size, os.POSIX_FADV_WILLNEED)

    def _read_into(self, out: np.ndarray, shard: int, row: int, variant: int) -> None:
        """Read the array of one image. The first shards to be read stay mapped, others are opened each time."""
        file = self._file(shard)
        try:
            if shard not in self._maps and len(self._maps) < OPEN_MAPS:
                self._maps[shard] = np.asarray(np.load(file, mmap_mode="r"))
            if shard in self._maps:
                out[...] = self._maps[shard][row, variant]
                return
            with file.open("rb", buffering=0) as stream:
                stream.seek(self._start(shard, row, variant))
                if stream.readinto(out.data) != out.nbytes:
                    raise ValueError("it ends too early")
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read ({error}); delete it and run flowback cache again") from error

    def _as_json(self) -> dict[str, Any]:
        layout = {"count": self.count, "variants": self.variants, "shape": list(self.shape), "dtype": self.dtype}
        return {"format": FORMAT, "facts": self.facts, **layout, "rows": self.rows}

    @classmethod
    def _read(cls, folder: Path) -> "ArrayCache":
        """The cache that a folder's header describes, complete or not."""
        file = folder / "header.json"
        try:
            header = read_json(file)
            if (version := header.pop("format")) != FORMAT:
                raise ValueError(f"another version of flowback wrote format {version}, this one reads {FORMAT}")
            return cls(folder, **header)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{folder} is not a cache: it has no header.json; run flowback cache to make one") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{file} cannot be read ({error}); delete {folder} and run flowback cache again") from error

    def _refuse_other(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        if difference := _difference(found, wanted):
            raise InputError(f"{self.folder} {difference}; use a cache made with the same, or none")

    def _refuse_incomplete(self) -> None:
        if missing := self.missing():
            raise InputError(
                f"{self.folder} is incomplete: {len(missing)} of {self.shards} shards are missing or of a wrong size, "
                f"first {self._file(missing[0]).name}; run flowback cache again, which resumes"
            )

    def _fill_shard(
        self,
        shard: int,
        inputs: Callable[[list[range]], Iterator[list[Tensor]]],
        compute: Callable[[Tensor], Tensor],
        batch_size: int,
        report: Callable[[int], None],
        before: int,
    ) -> None:
        first, array = shard * self.rows, np.empty(self._array_shape(shard), self.dtype)
        done = saved = self._restore(shard, array, batch_size)
        saved_at, end = time.monotonic(), first + len(array)
        try:
            for batch in inputs([range(k, min(k + batch_size, end)) for k in range(first + done, end, batch_size)]):
                computed = self._compute(compute, batch, first + done)
                array[done : done + len(computed)] = computed
                done += len(computed)
                report(before + done)
                if time.monotonic() - saved_at > SAVE_SECONDS:
                    self._save(shard, array[:done])
                    saved, saved_at = done, time.monotonic()
        except BaseException:  # Ctrl-C too
            if done > saved:
                self._save(shard, array[:done])
            raise
        if not self._is_whole(shard):  # or else another process was faster; Windows replaces no file that is in use
            _write(self._file(shard), lambda path: np.save(path, array))
            manifest = json.dumps(self._manifest(shard), indent=1)
            _write(self._file(shard, ".json"), lambda path: path.write_text(f"{manifest}\n"))
        with suppress(OSError):
            self._progress(shard).unlink()

    def _save(self, shard: int, array: np.ndarray) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as stream:
                np.savez(stream, rows=array, identity=json.dumps(self._identity(shard)))

        _write(self._progress(shard), write)

    def _restore(self, shard: int, array: np.ndarray, batch_size: int) -> int:
        """Read what was saved of a shard into the front of `array`; returns the number of images that are done."""
        try:
            with np.load(self._progress(shard)) as saved:
                if str(saved["identity"]) != json.dumps(self._identity(shard)):
                    return 0
                rows = saved["rows"]
            done = len(rows)
            array[:done] = rows
        except Exception:  # it is not there or damaged, which raises many kinds
            return 0
        return done if done == len(array) else done - done % batch_size

    def _compute(self, compute: Callable[[Tensor], Tensor], batch: list[Tensor], first: int) -> np.ndarray:
        """Arrays `[B, variants, *shape]` of a batch of each variant, the numbers `first`, `first + 1`, ... of the split."""
        variants = []
        for variant, x in enumerate(batch):
            with torch.no_grad():
                values = compute(x)
            if values.shape != (len(x), *self.shape):
                raise InputError(f"computed arrays must have shape {list(self.shape)}, got {list(values.shape[1:])}")
            kept = values.to(getattr(torch, self.dtype))
            finite = kept.isfinite()
            if not finite.all():
                image = int((~finite).reshape(len(x), -1).any(dim=1).nonzero()[0])
                value = values[image][~finite[image]].flatten()[0].item()
                raise InputError(
                    f"values in a cache of {self.dtype} must be finite numbers up to {torch.finfo(kept.dtype).max:g}, got "
                    f"{value} for image {first + image}{', mirrored' if variant else ''}"
                )
            variants.append(kept.cpu().numpy())
        return np.stack(variants, axis=1)


def cache_key(facts: Mapping[str, Any]) -> str:
    """A short hash of the facts, the same whatever their order, and of the format: caches of another one are not found."""
    return hashlib.sha256(json.dumps([FORMAT, _plain(facts)], sort_keys=True).encode()).hexdigest()[:16]


def find(root: Path, facts: Mapping[str, Any]) -> ArrayCache | None:
    """The cache in `root` that was made with these facts; None if there is none.

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
    """Why the most similar cache of this kind in `root` does not fit, one sentence; None if there is none."""
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
        raise InputError(f"the kind of a cache must be a word such as features or latents, got {kind!r}")
    return json.loads(json.dumps(dict(facts)))


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first fact that differs, in the order of `wanted`, as the rest of a sentence about the cache."""
    for name in {**wanted, **found}:
        if name not in found or name not in wanted or found[name] != wanted[name]:
            made_with = f"{name} {found[name]!r}" if name in found else f"no {name}"
            return f"was made with {made_with}, this run has {repr(wanted[name]) if name in wanted else 'none'}"
    return None


def _write(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file of a cache, which other processes may write at the same time."""
    try:
        with suppress(FileNotFoundError):  # another process found all shards complete and tidied up
            write_whole(file, write)
    except OSError as error:
        raise InputError(
            f"{file} cannot be written ({error.strerror or error}); make room on the disk and run the command again, which "
            "resumes"
        ) from error


@lru_cache
def _head_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes before the values in the file that `numpy.save` writes of an array."""
    stream = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return len(stream.getvalue())
