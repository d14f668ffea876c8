"""Tar files in WebDataset's layout, read at random: an index says where in which tar each image begins.

The package webdataset streams shards. Then what a step sees depends on the number of readers, and a run cannot be resumed
exactly. The package braceexpand keeps all numbers of `{0..99999999999}` in memory, where `expand_braces` refuses them.
"""

import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from glob import escape, glob
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.files import parse_json, read_at
from flowback.data.images import EARLIER_SUFFIXES, IMAGE_SUFFIXES
from flowback.data.sources import Report, Source, Texts, counted, in_threads, listed, load_index, save_index, shown

TRAIN = re.compile(r"(?<![a-z])(train|training)(?![a-z])")
VALIDATION = re.compile(r"(?<![a-z])(val|valid|validation)(?![a-z])")
TEST = re.compile(r"(?<![a-z])(dev|test|testing|eval|evaluation)(?![a-z])")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_CLASSES = MAX_SHARDS = 1_000_000
OPEN_SHARDS = 128  # each holds a file descriptor, of which a process often has 1024
END = bytes(512)  # an empty block, which ends a tar


class ShardSource(Source):
    """The samples of tar files, in the order of the tars' paths.

    What a step sees is a function of (seed, step), so every image is read by its place. The index of places is built once
    for each shard and kept in the cache folder.

    Files with the same key (the path up to the first dot of its last part, or, where samples would lack their image so, up
    to the last dot) are one sample: an image by its extension, and a class number in `.cls` (text) or `.json` ("label", or
    else "cls"). Where no sample has a number, the folder part of the key is the class; where none has a folder, images have
    no class. `classes.json` (a list) or `classes.txt` (one a line) beside the tars names the classes in order.

    Tars with the word `train` in their names are for training, those with `val`, `valid` or `validation`, or, if there is
    none, `dev`, `test` or `eval`, held out, and others left aside; if none has `train`, all count and none is held out.

    Args:
        path: a folder of .tar files, or a pattern of them with `*`, `?`, `[…]`, `{a,b}` or `{000..146}`.
        report: called with the number of shards whose index is known, and of all.
        earlier: take the tars that version 0.1.0 took.

    Raises:
        InputError: if there are no such files, or one is not a whole tar of images.
    """

    def __init__(self, path: str, report: Report | None = None, earlier: bool = False) -> None:
        train, held_out, aside = find_shards(path, earlier)
        self.shards = [*train, *held_out]
        indices = in_threads(_index, self.shards, report)
        counts = np.array([len(index["sizes"]) for index in indices])
        if not counts[: len(train)].any():
            raise InputError(f"data.path {path} has no sample for training; expected shards of images")
        self.stamps = [tuple(index["stamp"].tolist()) for index in indices]
        self.members = Texts.joined([index["names"] for index in indices])
        self.offsets, self.sizes = (np.concatenate([index[name] for index in indices]) for name in ("offsets", "sizes"))
        self.shard_of = np.arange(len(counts)).repeat(counts)
        self.held_out = torch.from_numpy(self.shard_of >= len(train))
        given = _class_names(self.shards[0].parent)
        by_number = any((index["numbers"] >= 0).any() for index in indices)
        self.labels, self.classes = (self._numbered if by_number else self._in_folders)(indices, given)
        alone = (self.labels.bincount() == 1).nonzero()
        if len(alone) and not self.held_out.any():
            which = f"class {self.classes[int(alone[0])]} of {path}" if self.classes else f"data.path {path}"
            raise InputError(f"{which} has 1 image; expected at least 2")
        other = Counter[str]()
        for index in indices:
            for kind, count in zip(index["kinds"], index["kind_counts"].tolist(), strict=True):
                other[kind.decode()] += count
        left = [counted(other)] * bool(other)
        left += [listed("shard", [shard.name for shard in aside])] * bool(aside)
        self.notes = [f"left aside in {path}: {'; '.join(left)}"] * bool(left)

    def _numbered(self, indices: list[dict[str, Any]], given: list[str] | None) -> tuple[Tensor, list[str]]:
        """Labels and classes where samples carry numbers."""
        labels = torch.from_numpy(np.concatenate([index["numbers"] for index in indices]))
        classes = given or [str(k) for k in range(int(labels[~self.held_out].max()) + 1)]
        for i in ((labels < 0) | (labels >= len(classes))).nonzero()[:1, 0].tolist():
            if labels[i] < 0:
                raise InputError(f"image {self.where(i)} has no class number; expected .cls or .json, as others have it")
            raise InputError(f"image {self.where(i)} has class number {labels[i]}; expected at most {len(classes) - 1}")
        return labels, classes

    def _in_folders(self, indices: list[dict[str, Any]], given: list[str] | None) -> tuple[Tensor, list[str]]:
        """Labels and classes where the folders in the tars are the classes."""
        folders = [shown(os.fsdecode(name)) for index in indices for name in index["folders"]]
        starts = np.cumsum([0, *(len(index["folders"]) for index in indices)])
        folder_of = np.concatenate([index["folder_of"] + start for index, start in zip(indices, starts[:-1], strict=True)])
        seen = np.unique(folder_of[~self.held_out.numpy()]).tolist()
        classes = given or sorted({folders[k] for k in seen} - {""})
        if not {*folders} - {""}:
            return torch.zeros(len(folder_of), dtype=torch.int64), []
        number = {name: k for k, name in enumerate(classes)}
        labels = np.array([number.get(name, -1) for name in folders], np.int64)[folder_of]
        for i in np.flatnonzero(labels < 0)[:1].tolist():
            folder = folders[folder_of[i]]
            if not folder:
                raise InputError(f"image {self.where(i)} has no label; expected .cls, .json, or a folder in its name")
            raise InputError(f"image {self.where(i)} is of class {folder}; expected the classes of the training images")
        return torch.from_numpy(labels), classes

    def read(self, index: int) -> bytes:
        """The image's bytes, out of the middle of its tar."""
        shard, size = self.shard_of[index], int(self.sizes[index])
        try:
            handle = _opened(self.shards[shard], self.stamps[shard])
            data = read_at(handle.descriptor, size, int(self.offsets[index]))
        except OSError as error:
            raise InputError(f"image {self.where(index)} cannot be read ({error.strerror})") from error
        if len(data) < size:
            raise InputError(f"image {self.where(index)} cannot be read (the tar ends within it)")
        return data

    def where(self, index: int) -> str:
        """The image's name in its tar, and the tar's path."""
        return f"{os.fsdecode(self.members[index])} of {self.shards[self.shard_of[index]]}"

    def names(self, indices: Sequence[int]) -> list[bytes]:
        """Names of tar and image, as in `train-000.tar/0001.jpg`."""
        tars = [os.fsencode(shard.name) for shard in self.shards]
        members = self.members.select(indices)
        return [tars[k] + b"/" + member for k, member in zip(self.shard_of[indices], members, strict=True)]


def find_shards(path: str, earlier: bool = False) -> tuple[list[Path], list[Path], list[Path]]:
    """The tars for training, those held out, and those left aside, by path; `earlier` holds out no test.

    Raises:
        InputError: if there are none.
    """
    if os.path.isdir(path):
        files = glob(os.path.join(escape(path), "*.tar"))
        if not files:
            raise InputError(
                f"data.path {path} has no .tar files; expected a folder of shards, or a pattern of their paths"
            )
    else:
        files = []
        for pattern in expand_braces(path):
            found = glob(pattern)
            if not found:
                raise InputError(f"data.path {path} names {pattern}, which does not exist; expected .tar files on disk")
            files += found
    shards = sorted({Path(file) for file in files}, key=lambda shard: shard.parts)  # Windows would ignore case
    train = [shard for shard in shards if TRAIN.search(shard.name.lower())]
    if not train:
        return shards, [], []
    others = [shard for shard in shards if shard not in train]
    held_out = [shard for shard in others if VALIDATION.search(shard.name.lower())]
    if not held_out and not earlier:
        held_out = [shard for shard in others if TEST.search(shard.name.lower())]
    return train, held_out, [shard for shard in others if shard not in held_out]


def expand_braces(pattern: str) -> list[str]:
    """What a shell makes of `{a,b}` and `{000..146}`.

    Raises:
        InputError: if that is more than a million names.

    >>> expand_braces("{a,b}-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    """
    literal_or_inner = BRACES.split(pattern)
    choices = [[text] if k % 2 == 0 else _choices(text) for k, text in enumerate(literal_or_inner)]
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise InputError(f"{pattern} stands for too many names; expected {MAX_SHARDS}")
    return ["".join(parts) for parts in product(*choices)]


def _choices(inner: str) -> list[str]:
    bounds = RANGE.fullmatch(inner)
    if bounds is None:
        return inner.split(",") if "," in inner else [f"{{{inner}}}"]
    first, last = bounds.groups()
    width = len(first) if first.startswith("0") else 0
    numbers = range(int(first), int(last) + 1)[: MAX_SHARDS + 1]
    return [f"{k:0{width}}" for k in numbers]


def split_name(name: str) -> tuple[str, str]:
    """The key of a file in a tar and its extension, in small letters; both empty for hidden files and those without a dot.

    >>> split_name("./n01440764/n01440764_10026.seg.PNG")
    ('n01440764/n01440764_10026', 'seg.png')
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def split_dotted(name: str) -> tuple[str, str]:
    """As `split_name`, but the extension begins at the last dot.

    >>> split_dotted("2024.05.01_cat.PNG")
    ('2024.05.01_cat', 'png')
    """
    stem, extension = os.path.splitext(name.removeprefix("./"))
    return (stem, extension[1:].lower()) if extension[1:] else ("", "")


def _index(shard: Path) -> dict[str, Any]:
    """The index of a tar, as an earlier start kept it or as it is found now.

    Returns:
        stamp: size of the tar, bytes, and its time, ns. names, offsets, sizes: of the images in it, bytes. numbers:
        of their classes, -1 for none. folders: the different folder parts of their keys; folder_of: which of them each has.
        kinds, kind_counts: of files that have no use.
    """
    try:
        stamp = _stamp(os.stat(shard))
        known = load_index("shards", str(shard))
        if known is not None and tuple(known["stamp"].tolist()) == stamp:
            return known
        with shard.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            members = [member for member in tar if member.isreg()]
            for member in members:
                if member.issparse() or member.offset_data + member.size > stamp[0]:  # its size is whatever it says
                    raise tarfile.ReadError(f"{member.name} has holes, or ends beyond the tar")
            stream.seek(tar.offset)
            if stream.read(len(END)) != END:
                raise tarfile.ReadError("it has no end mark where its last file ends")
            index = _samples(shard, stream, members)
    except (OSError, tarfile.TarError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"shard {shard} cannot be read ({reason}); expected a whole tar without compression") from error
    index["stamp"] = np.array(stamp, np.int64)
    save_index("shards", str(shard), index)
    return index


def _samples(shard: Path, stream: BinaryIO, members: list[tarfile.TarInfo]) -> dict[str, Any]:
    """The samples that a tar's files make up."""
    try:
        samples = _grouped(shard, members, split_name)
    except InputError:
        try:
            samples = _grouped(shard, members, split_dotted)
        except InputError:
            samples = None
        if samples is None:
            raise
    images, numbers, folders, kinds = [], [], [], Counter[str]()
    for key, (image, files) in samples.items():
        images.append(image)
        numbers.append(_class_number(stream, files, f"sample {key} of {shard}"))
        folders.append(os.fsencode(key.rpartition("/")[0]))
        kinds.update(f".{kind}" for kind, file in files.items() if file is not image and kind not in ("cls", "json"))
    bare = sum("." not in (base := member.name.rpartition("/")[2]) or base.endswith(".") for member in members)
    kinds.update(["without a suffix"] * bare)
    different = sorted(set(folders))
    place = {folder: k for k, folder in enumerate(different)}
    return {
        "names": Texts.of([os.fsencode(image.name) for image in images]),
        "offsets": np.array([image.offset_data for image in images], np.int64),
        "sizes": np.array([image.size for image in images], np.int64),
        "numbers": np.array(numbers, np.int64),
        "folders": Texts.of(different),
        "folder_of": np.array([place[folder] for folder in folders], np.int64),
        "kinds": Texts.of([os.fsencode(kind) for kind in kinds]),
        "kind_counts": np.array(list(kinds.values()), np.int64),
    }


def _grouped(
    shard: Path, members: list[tarfile.TarInfo], split: Callable[[str], tuple[str, str]]
) -> dict[str, tuple[tarfile.TarInfo, dict[str, tarfile.TarInfo]]]:
    """The image of each sample, and its files by extension, by key.

    Raises:
        InputError: if a sample has no image, several, or two files of a name.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        key, extension = split(member.name)
        if key and samples.setdefault(key, {}).setdefault(extension, member) is not member:
            raise InputError(f"shard {shard} has {member.name} twice; expected one file of a name")
    images = {}
    for key, files in samples.items():
        found = [kind for kind in files if f".{kind}" in EARLIER_SUFFIXES]
        found = found or [kind for kind in files if f".{kind}" in IMAGE_SUFFIXES]
        if len(found) != 1:
            has = f"images {' and '.join(found)}" if found else "no image"
            raise InputError(f"sample {key} of {shard} has {has}; expected one, of {' '.join(sorted(IMAGE_SUFFIXES))}")
        images[key] = files[found[0]], files
    return images


def _class_number(stream: BinaryIO, files: dict[str, tarfile.TarInfo], sample: str) -> int:
    """The class number in .cls or .json, -1 where there is none."""
    extension = "cls" if "cls" in files else "json"
    if extension not in files:
        return -1
    content = read_at(stream.fileno(), files[extension].size, files[extension].offset_data)
    try:
        value = int(content) if extension == "cls" else parse_json(content)
    except ValueError as error:
        kind = "a whole number" if extension == "cls" else "JSON"
        raise InputError(f"{sample} has {content[:20]!r} in .{extension}; expected {kind}") from error
    if extension == "json":
        value = value.get("label", value.get("cls")) if isinstance(value, dict) else None
        if value is None:
            return -1
    if type(value) is not int or not 0 <= value < MAX_CLASSES:
        raise InputError(f"{sample} has class {value!r} in .{extension}; expected 0 to {MAX_CLASSES - 1}")
    return value


def _class_names(folder: Path) -> list[str] | None:
    """The names in classes.json or classes.txt, if there is one."""
    for file in (folder / "classes.json", folder / "classes.txt"):
        if file.is_file():
            try:
                text = file.read_text("utf-8")
                names = parse_json(text) if file.suffix == ".json" else text.split("\n")
            except (OSError, ValueError) as error:
                raise InputError(f"{file} cannot be read ({error})") from error
            if file.suffix == ".txt":
                names = [name.strip() for name in names if name.strip()]
            strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
            if not strings or len(set(names)) < len(names):
                raise InputError(f"{file} is no list of classes; expected their names in order, each once")
            return names
    return None


class _Handle:
    """A tar open for reading at any place (`flowback.core.files.read_at`)."""

    def __init__(self, shard: Path) -> None:
        self.descriptor = os.open(shard, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=OPEN_SHARDS)
def _opened(shard: Path, stamp: tuple[int, int]) -> _Handle:
    handle = _Handle(shard)
    if _stamp(os.fstat(handle.descriptor)) != stamp:
        raise InputError(f"shard {shard} has changed since this run began; start again with another --run")
    return handle


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns
