"""Data sets by name: `digits` and `fashion_mnist` in memory, `folder` read from disk as it is needed."""

import gzip
import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowback.errors import InputError

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
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are split.

    Args:
        name: digits (8x8, ships with scikit-learn), fashion_mnist (28x28), or folder (a tree class/image.png).
        path: where the data lies; required for folder, optional for fashion_mnist (a folder of its IDX files).
        image_size: side of the images, pixels. A folder's images are resized and centre-cropped to it; those of
            fashion_mnist are padded with background (32 makes 16x16 tokens in patches of 2); null for the data's own.
        channels: folder only: 3 for colour, 1 for grey.
        holdout: share of each class that is held out; fashion_mnist has its own test images instead.
        split_seed: seed of the held-out split.
        limit: number of training images to use, drawn by split_seed; null for all.
        workers: processes that read images ahead; 0 reads in the main process, best for sets in memory.

    Raises:
        InputError: if a value is impossible.
    """

    name: str = "digits"
    path: str | None = None
    image_size: int | None = None
    channels: int = 3
    holdout: float = 0.2
    split_seed: int = 0
    limit: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if self.name not in LOADERS:
            raise InputError(f"data.name is {self.name!r}; allowed: {', '.join(LOADERS)}")
        if not 0 < self.holdout < 1:
            raise InputError(f"data.holdout is {self.holdout}; allowed is a share between 0 and 1, both excluded")
        if self.channels not in (1, 3):
            raise InputError(f"data.channels is {self.channels}; allowed: 1 (grey) or 3 (colour)")
        for name, least in (("image_size", 1), ("limit", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"data.{name} is {value}; allowed is a whole number of at least {least}")


class Split(ABC):
    """Labelled images: `split[[3, 5]]` is `(uint8 [2, C, H, W], int64 [2])`; `labels` holds all labels."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the images do."""


class MemorySplit(Split):
    """Images held in memory, uint8 `[n, C, H, W]`."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(indices)
        return self.images[index], self.labels[index]

    def fingerprint(self) -> str:
        """Hash of all pixels."""
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()[:16]


class FolderSplit(Split):
    """Images read from files when they are asked for."""

    def __init__(self, files: list[Path], labels: Tensor, image_size: int, channels: int) -> None:
        self.files, self.labels = files, labels
        self.image_size, self.channels = image_size, channels

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = [load_image(self.files[i], self.image_size, self.channels) for i in indices]
        return torch.stack(images), self.labels[torch.as_tensor(indices)]

    def fingerprint(self) -> str:
        """Hash of paths, sizes and times of the files, and of the transform."""
        digest = hashlib.sha256(f"{self.image_size} {self.channels}".encode())
        for file in self.files:
            stat = file.stat()
            digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ImageSet:
    """A data set: its training and held-out images, and what a flow has to know of it."""

    name: str
    train: Split
    held_out: Split
    classes: list[str]
    image_size: int
    channels: int
    levels: int  # values that a pixel can take


def load_data(config: DataConfig) -> ImageSet:
    """Load the data set that `config` names.

    Raises:
        InputError: if the data is not there or not usable.
    """
    return LOADERS[config.name](config)


def load_image(file: Path, image_size: int, channels: int) -> Tensor:
    """Read one image: upright by its EXIF tag, short side resized to `image_size`, centre crop; uint8 `[C, S, S]`.

    Raises:
        InputError: if the file is not an image that can be read whole.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"image {file} cannot be read ({str(error).splitlines()[0] if str(error) else error!r})") from None
    image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    array = np.asarray(image, dtype=np.uint8).reshape(image_size, image_size, channels)
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def split_indices(labels: Tensor, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Training and held-out indices, ascending; of every class the share `holdout`, at least one, is held out."""
    generator = torch.Generator().manual_seed(seed)
    held = []
    for k in labels.unique():
        members = (labels == k).nonzero()[:, 0]
        count = max(1, round(holdout * len(members)))
        held.append(members[torch.randperm(len(members), generator=generator)[:count]])
    held_out = torch.cat(held).sort().values
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held_out] = False
    return rest.nonzero()[:, 0], held_out


def limit_indices(count: int, config: DataConfig) -> Tensor:
    """Indices of the training images to use, ascending."""
    if config.limit is None or config.limit >= count:
        return torch.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.split_seed))
    return order[: config.limit].sort().values


def _digits(config: DataConfig) -> ImageSet:
    from sklearn.datasets import load_digits

    if config.image_size not in (None, 8):
        raise InputError(f"data.image_size is {config.image_size}; allowed for digits is 8, or null")
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]  # pyright: ignore[reportAttributeAccessIssue]
    labels = torch.from_numpy(bunch.target).long()  # pyright: ignore[reportAttributeAccessIssue]
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


def _fashion_mnist(config: DataConfig) -> ImageSet:
    folder = _fashion_mnist_folder(config.path)
    images, labels = (_read_idx(folder, f"train-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    test_images, test_labels = (_read_idx(folder, f"t10k-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    keep = limit_indices(len(labels), config)
    size = config.image_size or images.shape[-1]
    if size < images.shape[-1]:
        raise InputError(f"data.image_size is {size}; allowed for fashion_mnist is at least {images.shape[-1]}, by padding")
    return ImageSet(
        name="fashion_mnist",
        train=MemorySplit(_padded(images[keep][:, None], size), labels[keep].long()),
        held_out=MemorySplit(_padded(test_images[:, None], size), test_labels.long()),
        classes=FASHION_CLASSES,
        image_size=size,
        channels=1,
        levels=256,
    )


def _padded(images: Tensor, size: int) -> Tensor:
    """Images `[n, C, S, S]` in the middle of a background of zeros, `[n, C, size, size]`."""
    before = (size - images.shape[-1]) // 2
    after = size - images.shape[-1] - before
    return torch.nn.functional.pad(images, (before, after, before, after))


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
            "allowed: a network, the Debian package dataset-fashion-mnist, or data.path, a folder of its IDX files"
        ) from None
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
                raise InputError(f"{file} is not a whole IDX file ({error})") from None
    raise InputError(f"{folder} has no {name} or {name}.gz; data.path must be a folder of Fashion-MNIST's IDX files")


def _folder(config: DataConfig) -> ImageSet:
    if config.path is None:
        raise InputError("data.path is missing; a folder data set needs the tree of class/image files that it names")
    if config.image_size is None:
        raise InputError("data.image_size is missing; a folder data set needs the side of its images, pixels")
    root = Path(config.path)
    if not root.is_dir():
        raise InputError(f"data.path {root} is not a folder; allowed is a tree of class/image files")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files: list[Path] = []
    labels: list[int] = []
    for k, name in enumerate(classes):
        members = sorted(file for file in (root / name).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if len(members) < 2:
            raise InputError(f"class folder {root / name} has {len(members)} images; allowed is at least 2")
        files += members
        labels += [k] * len(members)
    if len(classes) < 2:
        raise InputError(f"data.path {root} has {len(classes)} class folders; allowed is at least 2")
    all_labels = torch.tensor(labels)
    train, held_out = split_indices(all_labels, config.holdout, config.split_seed)
    train = train[limit_indices(len(train), config)]
    size, channels = config.image_size, config.channels
    return ImageSet(
        name="folder",
        train=FolderSplit([files[i] for i in train], all_labels[train], size, channels),
        held_out=FolderSplit([files[i] for i in held_out], all_labels[held_out], size, channels),
        classes=classes,
        image_size=size,
        channels=channels,
        levels=256,
    )


LOADERS = {"digits": _digits, "fashion_mnist": _fashion_mnist, "folder": _folder}
