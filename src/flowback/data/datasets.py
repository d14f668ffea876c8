"""Data sets by name: `digits` and `fashion_mnist` in memory; `folder`, `imagenet` and `shards` read as they are needed."""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from flowback.core.errors import InputError
from flowback.core.units import as_size
from flowback.data.folders import FolderSource
from flowback.data.shards import ShardSource
from flowback.data.sources import DiskSplit, Report, Source
from flowback.data.splits import MemorySplit, Split, split_by_name, split_indices

FASHION_CLASSES = [
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]
OWN = "own"  # the name of what is given in Python
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are split.

    Args:
        name: digits (8x8, ships with scikit-learn), fashion_mnist (28x28), folder (a tree class/image.png, or train/class/
            and val/class/, with val held out; or images alone, for a flow without classes), imagenet (the same), or shards
            (WebDataset's tar files).
        path: where the data lies: a tree; a folder of .tar files or a pattern such as train-{000..146}.tar; optional for
            fashion_mnist (a folder of its IDX files).
        image_size: height and width of the images, pixels, or one number for both. Those on disk are resized and
            center-cropped to it; those of fashion_mnist are padded with background (32 makes 16x16 tokens in patches of 2);
            null for the data's own.
        channels: of images on disk: 3 for color, 1 for grey; null to look at some, and take 1 if all of them are grey.
        holdout: share of each class that is held out, where the data has no held-out part of its own (fashion_mnist's
            test images, val of a tree or of shards).
        split_seed: seed of the held-out split.
        limit: number of training images to use, drawn by split_seed; null for all.
        workers: processes that read images ahead; 0 reads in the main process, best for sets in memory.
        unreadable: share of the training images, and of the held-out ones, that may be unreadable; each is named, and the
            next one taken instead.

    Raises:
        InputError: if a value is impossible.
    """

    name: str = "digits"
    path: str | None = None
    image_size: int | tuple[int, int] | None = None
    channels: int | None = None
    holdout: float = 0.2
    split_seed: int = 0
    limit: int | None = None
    workers: int = 0
    unreadable: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_size(self.image_size, "data.image_size"))
        names = [*LOADERS, *SOURCES]
        if self.name not in names:
            raise InputError(f"data.name must be one of {', '.join(names)}, got {self.name!r}")
        if not 0 < self.holdout < 1:
            raise InputError(f"data.holdout must be a share between 0 and 1, both excluded, got {self.holdout}")
        if not 0 <= self.unreadable < 1:
            raise InputError(f"data.unreadable must be a share from 0 to 1, 1 excluded, got {self.unreadable}")
        if self.channels not in (None, 1, 3):
            raise InputError(f"data.channels must be 1 (grey) or 3 (color), or null, got {self.channels}")
        for name, least in (("limit", 1), ("workers", 0), ("split_seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"data.{name} must be a whole number of at least {least}, got {value}")
        for name, most in (("workers", 1000), ("split_seed", 2**63 - 1)):
            if getattr(self, name) > most:
                raise InputError(f"data.{name} must be at most {most}, got {getattr(self, name)}")


@dataclass(frozen=True)
class ImageSet:
    """A data set: its training and held-out images, and what a flow has to know of it."""

    name: str
    train: Split
    held_out: Split
    classes: list[str]  # empty where images have none; all labels are 0 then
    image_size: int | tuple[int, int]  # a number for squares, or height and width, pixels
    channels: int
    levels: int  # values that a pixel can take
    notes: tuple[str, ...] = ()  # sentences for people on what was found

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)


def load_data(config: DataConfig, report: Report | None = None, earlier: bool = False) -> ImageSet:
    """Load the data set that `config` names; of images on disk, find out where each lies.

    Args:
        config: the data set.
        report: called with the number of folders scanned or shards indexed, and of all, while that goes on.
        earlier: find and divide images on disk as version 0.1.0 did, for its runs.

    Raises:
        InputError: if the data is not there or not usable.
    """
    return LOADERS[config.name](config) if config.name in LOADERS else _on_disk(config, report, earlier)


def limit_indices(count: int, config: DataConfig) -> Tensor:
    """Indices of the training images to use, ascending."""
    if config.limit is None or config.limit >= count:
        return torch.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.split_seed))
    return order[: config.limit].sort().values


def _digits(config: DataConfig) -> ImageSet:
    if config.image_size not in (None, 8):
        raise InputError(f"data.image_size must be 8, or null, for digits, got {config.image_size}")
    table = torch.from_numpy(_digits_table())
    images, labels = table[:, :64].view(-1, 1, 8, 8), table[:, 64].long()
    train, held_out = split_indices(labels, config.holdout, config.split_seed)
    train = train[limit_indices(len(train), config)]
    return ImageSet(
        name="digits",
        train=MemorySplit(images[train], labels[train]),
        held_out=MemorySplit(images[held_out], labels[held_out]),
        classes=[str(k) for k in range(10)],
        image_size=8,
        channels=1,
        levels=17,
    )


def _digits_table() -> np.ndarray:
    """scikit-learn's digits, uint8 `[1797, 65]`: 64 pixels and the label; importing it all takes longer than its file."""
    found = find_spec("sklearn")
    if found is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    file = Path(next(iter(found.submodule_search_locations or ()))) / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        return np.loadtxt(file, np.uint8, delimiter=",")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.column_stack([images, labels]).astype(np.uint8)


def _fashion_mnist(config: DataConfig) -> ImageSet:
    folder = _fashion_mnist_folder(config.path)
    images, labels = (_read_idx(folder, f"train-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    test_images, test_labels = (_read_idx(folder, f"t10k-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    keep = limit_indices(len(labels), config)
    own = images.shape[-1]
    size = config.image_size or own
    height, width = size if isinstance(size, tuple) else (size, size)
    if min(height, width) < own:
        raise InputError(f"data.image_size must be at least {own} for fashion_mnist, by padding, got {size}")
    left, above = (width - own) // 2, (height - own) // 2
    margins = (left, width - own - left, above, height - own - above)  # of zeros, the background
    return ImageSet(
        name="fashion_mnist",
        train=MemorySplit(pad(images[keep][:, None], margins), labels[keep].long()),
        held_out=MemorySplit(pad(test_images[:, None], margins), test_labels.long()),
        classes=FASHION_CLASSES,
        image_size=size,
        channels=1,
        levels=256,
    )


def _fashion_mnist_folder(path: str | None) -> Path:
    """The folder of the four IDX files: the given one, Debian's, or torchvision's after a download."""
    if path is not None:
        return Path(path)
    if DEBIAN_FASHION_MNIST.is_dir():
        return DEBIAN_FASHION_MNIST
    from torchvision.datasets import FashionMNIST

    root = Path.home() / ".cache" / "flowback"
    try:
        FashionMNIST(str(root), download=True)
    except Exception as error:  # the download raises many kinds
        raise InputError(
            f"fashion_mnist is not on this machine and cannot be downloaded ({str(error).splitlines()[0]}); "
            "use a network, the Debian package dataset-fashion-mnist, or data.path, a folder of its IDX files"
        ) from error
    return root / "FashionMNIST" / "raw"


def _read_idx(folder: Path, name: str) -> Tensor:
    """An IDX file of bytes (big-endian header: magic, sizes), plain or gzipped, as a uint8 tensor."""
    for file, opener in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if file.is_file():
            try:
                with opener(file, "rb") as stream:
                    raw = bytes(stream.read())
                ndim = raw[3]
                shape = np.frombuffer(raw, ">u4", count=ndim, offset=4)
                return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy())
            except (OSError, EOFError, ValueError, IndexError) as error:
                raise InputError(f"{file} is not a whole IDX file ({error})") from error
    raise InputError(f"{folder} has no {name} or {name}.gz; data.path must be a folder of Fashion-MNIST's IDX files")


def _on_disk(config: DataConfig, report: Report | None, earlier: bool) -> ImageSet:
    """A data set whose images are read as they are needed."""
    kind, layout = SOURCES[config.name]
    if config.path is None:
        raise InputError(f"data.path is missing; {config.name} needs {layout}")
    if config.image_size is None:
        raise InputError(f"data.image_size is missing; {config.name} needs the size of its images, pixels")
    source, size = kind(config.path, report, earlier), config.image_size
    grey = config.channels != 1 and not earlier and source.grey()
    channels = config.channels or (1 if grey else 3)
    notes = [*source.notes]
    if grey:
        does = "data.channels is 1" if channels == 1 else "data.channels 1 fits better than 3 that are equal"
        notes.append(f"the images that were looked at are all grey: {does}")
    if source.held_out.any():
        train, held_out = (~source.held_out).nonzero()[:, 0], source.held_out.nonzero()[:, 0]
    elif earlier:
        train, held_out = split_indices(source.labels, config.holdout, config.split_seed)
    else:
        names = [name.split(b"/", 1)[-1] for name in source.names(range(len(source.labels)))]
        train, held_out = split_by_name(names, source.labels, config.holdout, config.split_seed)
    train = train[limit_indices(len(train), config)]
    return ImageSet(
        name=config.name,
        train=DiskSplit(source, train, size, channels),
        held_out=DiskSplit(source, held_out, size, channels),
        classes=source.classes,
        image_size=size,
        channels=channels,
        levels=256,
        notes=tuple(notes),
    )


def _own(config: DataConfig) -> ImageSet:
    raise InputError(f"data.name is {OWN}: the images were given in Python; pass them to train(config, data=...)")


LOADERS = {"digits": _digits, "fashion_mnist": _fashion_mnist, OWN: _own}
SOURCES: dict[str, tuple[Callable[[str, Report | None, bool], Source], str]] = {
    "folder": (FolderSource, "the tree of class/image files, or of train/class/image and val/class/image files"),
    "imagenet": (FolderSource, "the folder that holds train/class/image and val/class/image files"),
    "shards": (ShardSource, "a folder of .tar files, or a pattern of their paths"),
}
