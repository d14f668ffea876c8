"""Trees of image files, a folder a class: scanned once, remembered, and known again by the times of their folders.

torchvision's ImageFolder scans at every start, keeps a tuple and a string for each image in every worker, and has no
held-out part.
"""

import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flowback.core.errors import InputError
from flowback.data.images import IMAGE_SUFFIXES
from flowback.data.sources import Report, Source, Texts, in_threads, load_index, save_index, shown

INDEXED = 10_000  # images; a smaller tree is scanned at every start, in a fraction of a second
SETTLED = 2.0  # seconds; a folder that changed this shortly before a scan may change again within the clock's tick
SUFFIXES = {suffix.encode() for suffix in IMAGE_SUFFIXES}
PAIR = (b"train", b"val")


@dataclass(frozen=True)
class Listing:
    """What a scan finds. Paths are relative to the root, with / on every system: order and fingerprint depend on them."""

    folders: Texts  # all that were looked into
    times: np.ndarray  # int64, when each was modified, ns
    units: Texts  # the class folders
    counts: np.ndarray  # int64, images in each
    files: Texts  # the images, by class folder, then by path
    sizes: np.ndarray  # int64, bytes


class FolderSource(Source):
    """A tree `class/image.jpg`, or a pair `train/class/image.jpg` and `val/class/image.jpg`, of which val is held out.

    It is a pair if the root has the folders `train` and `val` with class folders in both. Images may lie deeper inside
    their class folder. Hidden files and folders are skipped; links to folders are followed where they stand for a class.

    A scan asks for the size of every file. What it finds in a large tree is kept in the cache folder, and used by later
    starts if no folder's time has changed, as it does when a file is added, removed or renamed. A file of a large
    tree that is overwritten in place is therefore not noticed; touching its folder makes the next start look again.

    Args:
        path: of the root.
        report: called with the number of class folders scanned, and of all.

    Raises:
        InputError: if it is no such tree.
    """

    def __init__(self, path: str, report: Report | None = None) -> None:
        root = Path(path)
        if not root.is_dir():
            raise InputError(f"data.path {root} is not a folder; expected a tree of class/image files")
        self.root = root
        listing = _remembered(root) or _scanned(root, report)
        self.files, self.sizes = listing.files, listing.sizes
        places = [os.path.split(os.fsdecode(unit)) for unit in listing.units]
        self.classes = sorted({name for part, name in places if part != "val"})
        if len(self.classes) < 2:
            raise InputError(f"data.path {root} has {len(self.classes)} class folders; expected at least 2")
        number = {name: k for k, name in enumerate(self.classes)}
        for (part, name), count in zip(places, listing.counts.tolist(), strict=True):
            least = 1 if part else 2
            if count < least:
                raise InputError(f"class folder {root / part / name} has {count} images; expected at least {least}")
            if name not in number:
                raise InputError(f"class folder {root / part / name} is not in {root / 'train'}; expected its classes")
        counts = torch.from_numpy(listing.counts)
        self.classes = [shown(name) for name in self.classes]
        self.labels = torch.tensor([number[name] for _, name in places]).repeat_interleave(counts)
        self.held_out = torch.tensor([part == "val" for part, _ in places]).repeat_interleave(counts)

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
        seen, units = _units(base)
        found = in_threads(lambda unit: _scan(base, unit), units, report)
    except OSError as error:
        raise InputError(f"folder {os.fsdecode(error.filename)} cannot be read ({error.strerror})") from error
    seen += [folder for folders, _ in found for folder in folders]
    files = [file for _, members in found for file in members]
    listing = Listing(
        folders=Texts.of([path for path, _ in seen]),
        times=np.array([modified for _, modified in seen], np.int64),
        units=Texts.of(units),
        counts=np.array([len(members) for _, members in found], np.int64),
        files=Texts.of([path for path, _ in files]),
        sizes=np.array([size for _, size in files], np.int64),
    )
    if len(files) >= INDEXED and listing.times.max() < (started - SETTLED) * 1e9:
        save_index("folders", str(root), vars(listing))
    return listing


def _units(base: bytes) -> tuple[list[tuple[bytes, int]], list[bytes]]:
    """The folders above the class folders with their times, and the class folders."""
    modified, units = _look(base)
    if not set(PAIR) <= set(units):
        return [(b"", modified)], units
    times, inner = zip(*(_look(os.path.join(base, part)) for part in PAIR), strict=True)
    if all(inner):
        pairs = [part + b"/" + name for part, names in zip(PAIR, inner, strict=True) for name in names]
        return [(b"", modified), *zip(PAIR, times, strict=True)], pairs
    if any(inner) or set(units) <= {*PAIR, b"test"}:
        bare = os.path.join(base, PAIR[bool(inner[0])])
        raise InputError(f"data.path {os.fsdecode(bare)} has no class folders; expected the same in train and val")
    return [(b"", modified)], units


def _look(folder: bytes) -> tuple[int, list[bytes]]:
    """When a folder was modified, ns, and the folders in it, by name."""
    modified = os.stat(folder).st_mtime_ns  # before its entries: a change in between makes the time an old one
    with os.scandir(folder) as entries:
        return modified, sorted(entry.name for entry in entries if entry.name[:1] != b"." and entry.is_dir())


def _scan(base: bytes, unit: bytes) -> tuple[list[tuple[bytes, int]], list[tuple[bytes, int]]]:
    """The folders of one class with their times, and its images, by path, with their sizes."""
    folders, files, waiting = [], [], [unit]
    while waiting:
        folder = waiting.pop()
        path = os.path.join(base, folder)
        folders.append((folder, os.stat(path).st_mtime_ns))
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name[:1] == b".":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(folder + b"/" + entry.name)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and (size := _size(entry)) is not None:
                    files.append((folder + b"/" + entry.name, size))
    return folders, sorted(files)


def _size(entry: os.DirEntry[bytes]) -> int | None:
    """Bytes of a file; 0 where a link leads nowhere, an error only when it is read; None for what is no file, as a pipe."""
    try:
        found = entry.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else None
