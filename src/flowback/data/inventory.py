"""What the data of a run was when it began, by which it is known again, and its split kept."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from flowback.core.errors import InputError
from flowback.data.datasets import ImageSet
from flowback.data.images import load_image
from flowback.data.sources import CONTENT_BYTES, UNREADABLE, DiskSplit, Source, Texts, read_arrays, some, write_arrays
from flowback.data.splits import Split

TRAINED, HELD_OUT, ASIDE = range(3)  # parts


@dataclass(frozen=True)
class Inventory:
    """Classes and images of a data set. Of images in memory there are the hashes of both splits and no names."""

    classes: Texts
    hashes: Texts  # of the training and the held-out images and labels in memory
    names: Texts  # of the n images on disk
    labels: np.ndarray  # int32 [n]
    parts: np.ndarray  # uint8 [n]
    marks: np.ndarray  # int64 [n]: a piece of the hash of each file, or its size; -1 where it cannot be read
    by_content: np.ndarray  # bool, scalar: which of them

    @classmethod
    def of(cls, data: ImageSet) -> "Inventory":
        """What a data set is now."""
        classes, nothing = Texts.of([name.encode("utf-8", "surrogatepass") for name in data.classes]), np.zeros(0, np.int64)
        if not isinstance(data.train, DiskSplit) or not isinstance(data.held_out, DiskSplit):
            hashes = Texts.of([_hash(split) for split in (data.train, data.held_out)])
            return cls(classes, hashes, Texts.of([]), nothing, nothing, nothing, np.array(False))
        source = data.train.source
        parts = np.full(len(source.sizes), ASIDE, np.uint8)
        parts[data.train.indices.numpy()], parts[data.held_out.indices.numpy()] = TRAINED, HELD_OUT
        by_content = bool(source.sizes.sum() <= CONTENT_BYTES)
        everything = np.arange(len(parts))
        names, labels = Texts.of(_names(source)), source.labels.numpy().astype(np.int32)
        return cls(
            classes, Texts.of([]), names, labels, parts, _marks(source, everything, by_content), np.array(by_content)
        )

    @classmethod
    def read(cls, file: Path) -> "Inventory | None":
        """What `write` kept; None if there is no such file.

        Raises:
            InputError: if it cannot be read.
        """
        try:
            return cls(**read_arrays(file))
        except FileNotFoundError:
            return None
        except (*UNREADABLE, TypeError) as error:
            raise InputError(f"{file} cannot be read ({error}); it says which images were trained on") from error

    def write(self, file: Path) -> None:
        """Keep it in a file.

        Raises:
            OSError: if it cannot be written.
        """
        write_arrays(file, vars(self))

    def split(self, data: ImageSet, exact: bool, unreadable: float = 0.0) -> ImageSet:
        """The data with the classes and the split that it had.

        Args:
            data: as found now.
            exact: whether all must be as it was; or else images that came, went or changed are left out, and counted in
                the notes.
            unreadable: share of the images that may be damaged since.

        Raises:
            InputError: if classes have other names, or an image another class; with `exact`, if anything differs; or if no
                image of a split is left.
        """
        classes = [name.decode("utf-8", "surrogatepass") for name in self.classes]
        refuse_other_classes(classes, data.classes)
        if not isinstance(data.train, DiskSplit) or not isinstance(data.held_out, DiskSplit):
            for name, split, was in zip(("training", "held-out"), (data.train, data.held_out), self.hashes, strict=False):
                if _hash(split) != was:
                    raise InputError(f"the {name} images are others than when this run began; expected the same")
            return data
        source = data.train.source
        if not len(self.names):
            raise InputError("this run began with images in memory; expected the same")
        names = Texts.of(_names(source))
        if names.same(self.names):
            was = np.arange(len(names))  # of each image now, its number then
        else:
            place = {name: k for k, name in enumerate(self.names)}
            was = np.array([place.get(name, -1) for name in names])
        number = {_composed(name): k for k, name in enumerate(classes)}
        labels = np.array([number.get(_composed(name), -1) for name in data.classes] or [0])[source.labels.numpy()]
        known = np.flatnonzero(was >= 0)
        for k in known[labels[known] != self.labels[was[known]]][:1].tolist():
            before, now = classes[self.labels[was[k]]], data.classes[source.labels[k]]
            raise InputError(
                f"class {before} is now {now}, by {source.where(k)}; expected the classes of when this run began"
            )
        changed = known[_marks(source, known, bool(self.by_content)) != self.marks[was[known]]]
        if len(changed) <= unreadable * len(names):
            changed = np.array([k for k in changed.tolist() if _is_readable(source, k)], int)
        missing = np.setdiff1d(np.arange(len(self.names)), was)
        gone = [name.decode("utf-8", "replace") for name in self.names.select(missing.tolist())]
        new, others = ([source.where(k) for k in rows.tolist()] for rows in (np.flatnonzero(was < 0), changed))
        sayings = [_counted(gone, "gone"), _counted(new, "new"), _counted(others, "changed")]
        said = ", ".join(text for text in sayings if text)
        if said and exact:
            raise InputError(
                f"the data is not what it was when this run began: {said}; expected the same, or another --run"
            )
        parts = np.where(was < 0, ASIDE, self.parts[was])
        parts[changed] = ASIDE
        source.labels, source.classes = torch.from_numpy(labels), classes
        rows = [torch.from_numpy(np.flatnonzero(parts == part)) for part in (TRAINED, HELD_OUT)]
        if not all(map(len, rows)):
            raise InputError(f"the data is not what it was when this run began: {said}; expected some of its images")
        train, held_out = (DiskSplit(source, row, data.image_size, data.channels) for row in rows)
        notes = (f"since this run began: {said}; only what was there then and has not changed is used",) if said else ()
        return replace(data, train=train, held_out=held_out, classes=source.classes, notes=notes)

    def unseen(self, data: ImageSet) -> ImageSet:
        """Data of any kind without those held-out images that were trained on: of the same content, or name and size.

        Raises:
            InputError: if no image is left.
        """
        held_out = data.held_out
        if not isinstance(held_out, DiskSplit) or not len(self.names):
            return data
        rows, by_content = held_out.indices.numpy(), bool(self.by_content)
        names, trained = _names(held_out.source), self.parts == TRAINED
        marks = _marks(held_out.source, rows, by_content).tolist()
        here = marks if by_content else [(names[k], mark) for k, mark in zip(rows.tolist(), marks, strict=True)]
        seen = set(self.marks[trained].tolist())
        if not by_content:
            seen = set(zip(self.names.select(np.flatnonzero(trained).tolist()), self.marks[trained].tolist(), strict=True))
        left = [k for k, mark in zip(rows.tolist(), here, strict=True) if mark not in seen]
        if len(left) == len(rows):
            return data
        if not left:
            raise InputError("all of the held-out images were trained on; expected others")
        note = f"{len(rows) - len(left)} of {len(rows)} held-out images were trained on, and are left out"
        split = DiskSplit(held_out.source, torch.tensor(left), data.image_size, data.channels)
        return replace(data, held_out=split, notes=(*data.notes, note))


def refuse_other_classes(before: Sequence[str], now: Sequence[str]) -> None:
    """Refuse data that lacks classes that there were.

    Raises:
        InputError: if it does; names what is in their place.
    """
    was, found = {*map(_composed, before)}, {*map(_composed, now)}
    gone, new = sorted(was - found), sorted(found - was)
    if not gone:
        return
    said = f"{some(gone)} of the classes {'is' if len(gone) == 1 else 'are'} gone" + f", {some(new)} new" * bool(new)
    if len(gone) == len(new) == 1:
        said = f"class {gone[0]} is now {new[0]}"
    raise InputError(f"{said}; expected the {len(before)} classes of when this run began")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _hash(split: Split) -> bytes:
    return f"{split.fingerprint()} {hashlib.sha256(split.labels.numpy().tobytes()).hexdigest()[:16]}".encode()


def _names(source: Source) -> list[bytes]:
    """The names of all images; one that occurs again has its number added, as in tars of the same name.

    Letters with accents are as one character, whatever file system they come from.
    """
    names, seen = source.names(range(len(source.sizes))), Counter[bytes]()
    names = [name if name.isascii() else os.fsencode(_composed(os.fsdecode(name))) for name in names]
    if len(set(names)) == len(names):
        return names
    unique = []
    for name in names:
        unique.append(name + b"\0%d" % seen[name] if seen[name] else name)
        seen[name] += 1
    return unique


def _marks(source: Source, rows: np.ndarray, by_content: bool) -> np.ndarray:
    """What tells the files of some images from others, int64."""
    if not by_content:
        return source.sizes[rows]
    marks = np.empty(len(rows), np.int64)
    for i, k in enumerate(rows.tolist()):
        try:
            marks[i] = int.from_bytes(source.digest(k)[:8], "little", signed=True)
        except InputError:
            marks[i] = -1
    return marks


def _is_readable(source: Source, index: int) -> bool:
    try:
        return load_image(source.read(index), 1, 1) is not None
    except InputError:
        return False


def _counted(names: list[str], what: str) -> str:
    """How many images are gone, new or changed, in words; empty for none."""
    if not names:
        return ""
    return f"{len(names)} {'image is' if len(names) == 1 else 'images are'} {what}, the first: {names[0]}"
