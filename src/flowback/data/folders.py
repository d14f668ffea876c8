"""Folders of image files: scanned once, remembered, and known again by the times of their folders.

torchvision's ImageFolder scans at every start, keeps a tuple and a string for each image in every worker, and has no
held-out part.
"""

import os
import re
import stat
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flowback.core.errors import InputError
from flowback.data.images import EARLIER_SUFFIXES, IMAGE_SUFFIXES, looks_like_image
from flowback.data.sources import Report, Source, Texts, counted, in_threads, listed, load_index, save_index, shown

INDEXED = 10_000  # images; a smaller tree is scanned at every start, in a fraction of a second
SETTLED = 2.0  # seconds; a folder that changed this shortly before a scan may change again within the clock's tick
SUFFIXES = {suffix.encode() for suffix in IMAGE_SUFFIXES}
KIND = re.compile(rb"\.[a-z]\w{0,7}")  # of a file; what else stands after a dot, as in `cat.0001`, says nothing
TRAIN = (b"train", b"training")
VALIDATION = (b"val", b"valid", b"validation", b"dev")
HELD_OUT = (*VALIDATION, b"test", b"testing", b"eval", b"evaluation")  # the first of them that is there
Unit = tuple[bytes, bytes, bool]  # path, class (empty for none) and whether it is held out
LEFTOVERS = {
    b"__MACOSX",
    b"@eaDir",
    b"lost+found",
    b"$RECYCLE.BIN",
    b"System Volume Information",
}  # of systems, not of people


@dataclass(frozen=True)
class Listing:
    """What a scan finds. Paths are relative to the root, with / on every system: order and fingerprint depend on them."""

    folders: Texts  # all that were looked into
    times: np.ndarray  # int64, when each was modified, ns
    units: Texts  # the class folders, or folders of images without classes
    classes: Texts  # the class of each; empty for none
    held_out: np.ndarray  # bool, whether it is held out
    counts: np.ndarray  # int64, images in each
    files: Texts  # the images, by unit, then by path
    sizes: np.ndarray  # int64, bytes
    left_aside: Texts  # what was not taken, in words


class FolderSource(Source):
    """A tree `class/image.jpg`, or `train/class/image.jpg` beside `val/class/image.jpg`, or a folder of images alone.

    The parts are `train` or `training`, and the first of `val`, `valid`, `validation`, `dev`, `test`, `testing`,
    `eval`, `evaluation`, in any case, which is held out (of the last four, if they have no other classes); folders of
    these names are classes where there is no `train` with class folders. Images may lie deeper inside their class
    folder. A folder without class folders has images of no class.

    Images are told by their suffix, or by their first bytes where they have none. What else lies there is counted. Hidden
    files and folders are skipped; links to folders are followed where they stand for a class.

    A scan asks for the size of every file. What it finds in a large tree is kept in the cache folder, and used by later
    starts if no folder's time has changed, as it does when a file is added, removed or renamed. A file of a large
    tree that is overwritten in place is therefore not noticed; touching its folder makes the next start look again.

    Args:
        path: of the root.
        report: called with the number of class folders scanned, and of all.
        earlier: see only the files that version 0.1.0 saw.

    Raises:
        InputError: if it is no such tree.
    """

    def __init__(self, path: str, report: Report | None = None, earlier: bool = False) -> None:
        root = Path(path)
        if not root.is_dir():
            raise InputError(f"data.path {root} is not a folder; expected a tree of class/image files")
        self.root, self.notes = root, []
        listing = _remembered(root) or _scanned(root, report)
        self.files, self.sizes, unit_of = listing.files, listing.sizes, np.arange(len(listing.units)).repeat(listing.counts)
        if earlier:
            seen = [os.path.splitext(file)[1].lower().decode("latin-1") in EARLIER_SUFFIXES for file in self.files]
            kept = np.flatnonzero(seen)
            self.files, self.sizes, unit_of = Texts.of(self.files.select(kept)), self.sizes[kept], unit_of[kept]
        aside = "; ".join(text.decode() for text in listing.left_aside)
        names = [os.fsdecode(name) for name in listing.classes]
        classes = sorted({name for name, held in zip(names, listing.held_out, strict=True) if name and not held})
        number = {"": 0, **{name: k for k, name in enumerate(classes)}}
        counts = np.bincount(unit_of, minlength=len(names))
        for unit, name, count in zip(listing.units, names, counts.tolist(), strict=True):
            least = 1 if listing.held_out.any() else 2
            if count < least:
                what = "class folder" if name else "folder"
                found = f"{what} {root / os.fsdecode(unit)} has {count} images; expected at least {least}"
                raise InputError(f"{found}; left aside: {aside}" if aside else found)
            if name not in number:
                train = root / os.fsdecode(listing.units[0]).partition("/")[0]
                raise InputError(f"class folder {root / os.fsdecode(unit)} is not in {train}; expected its classes")
        self.classes = [shown(name) for name in classes]
        self.labels = torch.from_numpy(np.array([number[name] for name in names], np.int64)[unit_of])
        self.held_out = torch.from_numpy(listing.held_out[unit_of])
        if aside:
            self.notes.append(f"left aside in {root}: {aside}")
        if len(names) == 1 and self.files[0].count(b"/") > 1:
            only = root / names[0]
            self.notes.append(f"all images lie in folders of {only}; if these are classes or parts, give data.path {only}")

    def read(self, index: int) -> bytes:
        """The whole file of an image."""
        try:
            return Path(self.where(index)).read_bytes()
        except OSError as error:
            raise InputError(f"image {self.where(index)} cannot be read ({error.strerror})") from error

    def where(self, index: int) -> str:
        """The path of the image."""
        return str(self.root / os.fsdecode(self.files[index]))

    def names(self, indices: Sequence[int]) -> list[bytes]:
        """Paths relative to the root."""
        return self.files.select(indices)


def _remembered(root: Path) -> Listing | None:
    """What an earlier start found, if the folders are as they were."""
    found = load_index("folders", str(root))
    if found is None:
        return None
    listing = Listing(**found)
    base = os.fsencode(root)
    try:
        times = in_threads(lambda folder: os.stat(os.path.join(base, folder)).st_mtime_ns, list(listing.folders), None)
    except OSError:
        return None
    return listing if times == listing.times.tolist() else None


def _scanned(root: Path, report: Report | None) -> Listing:
    """What is there now; kept for later starts if the tree is large and has settled."""
    started, base = time.time(), os.fsencode(root)
    try:
        layout = _layout(base)
        found = in_threads(lambda unit: _scan(base, unit), layout.units, report)
        few = len(found) == 1 or not any(members for _, members, _ in found)
        if few and layout.loose[0][1] and not layout.aside:  # its images are what counts, and folders are no classes
            layout = Layout(layout.seen, [(b"", b"", False)], [], [])
            found = [_scan(base, layout.units[0])]
    except OSError as error:
        raise InputError(f"folder {os.fsdecode(error.filename)} cannot be read ({error.strerror})") from error
    seen = dict([*layout.seen, *(folder for folders, _, _ in found for folder in folders)])
    files = [file for _, members, _ in found for file in members]
    other = sum((kinds for _, _, kinds in found), Counter())
    aside = [counted(other)] if other else []
    for folder, count in ((folder, count) for folder, count in layout.loose if count):
        where = shown(os.fsdecode(folder)) or "it"
        aside.append(f"{count} image{'s' * (count != 1)} in {where}, beside its folders")
    if layout.aside:
        aside.append(listed("folder", [shown(os.fsdecode(name)) for name in layout.aside]))
    if not files and not any(name for _, name, _ in layout.units):
        none = f"data.path {root} has 0 class folders and no images; expected at least 2 classes, or images"
        raise InputError("; left aside: ".join([none, *aside]))
    units, classes, held_out = zip(*layout.units, strict=True)
    listing = Listing(
        folders=Texts.of(list(seen)),
        times=np.array(list(seen.values()), np.int64),
        units=Texts.of(units),
        classes=Texts.of(classes),
        held_out=np.array(held_out, bool),
        counts=np.array([len(members) for _, members, _ in found], np.int64),
        files=Texts.of([path for path, _ in files]),
        sizes=np.array([size for _, size in files], np.int64),
        left_aside=Texts.of([text.encode() for text in aside]),
    )
    if len(files) >= INDEXED and listing.times.max() < (started - SETTLED) * 1e9:
        save_index("folders", str(root), vars(listing))
    return listing


@dataclass(frozen=True)
class Layout:
    """How a tree is laid out, above its class folders."""

    seen: list[tuple[bytes, int]]  # folders that were looked into, with their times
    units: list[Unit]
    loose: list[tuple[bytes, int]]  # folders that have class folders, and images beside these
    aside: list[bytes]  # folders that are no part


def _layout(base: bytes) -> Layout:
    """The class folders of a tree, or the folders of images without classes.

    Raises:
        InputError: if a part has class folders and the other has not, or there are two parts for training.
    """
    modified, folders, images = _look(base)
    train = [name for name in folders if name.lower() in TRAIN]
    held_out = sorted((name for name in folders if name.lower() in HELD_OUT), key=lambda name: HELD_OUT.index(name.lower()))
    others = set(folders) - {*train, *held_out}
    looked = {part: _look(os.path.join(base, part)) for part in (*train, *held_out)} if train else {}
    seen = [(b"", modified), *((part, time) for part, (time, _, _) in looked.items())]
    trained = [part for part in train if looked[part][1]]
    validation = [part for part in held_out if part.lower() in VALIDATION]
    classes = {name for part in trained for name in looked[part][1]}  # a test may have others, or one folder `unknown`
    inside = {part: looked[part][1] for part in held_out if looked}
    with_classes = [part for part in inside if inside[part] and (part in validation or classes.issuperset(inside[part]))]
    if (trained and (with_classes or validation)) or (train and (not others or {*with_classes} & {*validation})):
        if len(train) > 1:
            raise InputError(
                f"data.path {os.fsdecode(base)} has folders {' and '.join(map(os.fsdecode, train))}; expected one of them"
            )
        bare = validation[0] if trained and validation and not with_classes else train[0]
        if not looked[bare][1] and (trained or with_classes):
            where = os.fsdecode(os.path.join(base, bare))
            raise InputError(f"data.path {where} has no class folders; expected the same in train and val")
        flat = [part for part in held_out if looked[part][2]] if not trained else []
        parts = [(train[0], False), *((part, True) for part in (with_classes or flat)[:1])]
        if trained:
            units = [(part + b"/" + name, name, held) for part, held in parts for name in looked[part][1]]
        else:
            units = [(part, b"", held) for part, held in parts]
        loose = [(b"", images), *((part, looked[part][2]) for part, _ in parts if trained)]
        return Layout(seen, units, loose, sorted({*folders} - {part for part, _ in parts}))
    if folders:
        return Layout(seen, [(name, name, False) for name in folders], [(b"", images)], [])
    return Layout(seen, [(b"", b"", False)], [(b"", 0)], [])


def _look(folder: bytes) -> tuple[int, list[bytes], int]:
    """When a folder was modified, ns, the folders in it, by name, and how many images."""
    modified = os.stat(folder).st_mtime_ns  # before its entries: a change in between makes the time an old one
    folders, images = [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[:1] == b"." or entry.name in LEFTOVERS:
                continue
            if entry.is_dir():
                folders.append(entry.name)
            else:
                images += _size(entry) is not None and _other_kind(entry) is None
    return modified, sorted(folders), images


def _scan(base: bytes, unit: Unit) -> tuple[list[tuple[bytes, int]], list[tuple[bytes, int]], Counter[str]]:
    """The folders of one class with their times, its images by path with their sizes, and kinds of other files.

    Args:
        base: the root.
        unit: the class folder, relative to it.
    """
    folders, files, kinds, waiting = [], [], Counter(), [unit[0]]
    while waiting:
        folder = waiting.pop()
        path = os.path.join(base, folder)
        folders.append((folder, os.stat(path).st_mtime_ns))
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name[:1] == b"." or entry.name in LEFTOVERS:
                    continue
                name = folder + b"/" + entry.name if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(name)
                elif (size := _size(entry)) is None:
                    continue
                elif kind := _other_kind(entry):
                    kinds[kind] += 1
                else:
                    files.append((name, size))
    return folders, sorted(files), kinds


def image_files(folder: str | os.PathLike[str]) -> Iterator[str]:
    """The image files in a folder and those below it, by path, told as `FolderSource` tells them; one folder at a time."""
    with os.scandir(os.fsencode(folder)) as entries:
        found = sorted((entry for entry in entries if entry.name[:1] != b"." and entry.name not in LEFTOVERS), key=_name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from image_files(os.fsdecode(entry.path))
        elif _size(entry) is not None and _other_kind(entry) is None:
            yield os.fsdecode(entry.path)


def _name(entry: os.DirEntry[bytes]) -> bytes:
    return entry.name


def _other_kind(entry: os.DirEntry[bytes]) -> str | None:
    """What a file is that is no image, in words; None for an image."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in SUFFIXES:
        return None
    if KIND.fullmatch(suffix):
        return suffix.decode()
    try:
        with open(entry.path, "rb") as stream:
            return None if looks_like_image(stream.read(16)) else "without a suffix"
    except OSError:
        return "without a suffix"


def _size(entry: os.DirEntry[bytes]) -> int | None:
    """Bytes of a file; 0 where a link leads nowhere, an error only when it is read; None for what is no file, as a pipe."""
    try:
        found = entry.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else None
