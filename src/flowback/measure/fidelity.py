"""How close samples are to real images: FID, IS, KID, precision and recall by torch-fidelity, and ADM's sFID.

A figure means something only beside others with the same extractor, number of samples and reference, so that it always
carries them. Extractors are named:

- **inception**: Inception-v3 with the weights of the papers (torch-fidelity's, from the net or a local file);
- **dinov2**: DINOv2 ViT-B/14 by timm, from the hub or a local file; its class token;
- **efficientnet_lite0**: the one that needs no network. Its figures compare with each other, not with papers.
"""

import contextlib
import io
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowback.core.errors import InputError
from flowback.core.files import cache_folder
from flowback.core.units import from_levels, to_uint8
from flowback.data import ImageSet, Split
from flowback.data.images import decode
from flowback.measure.density import spread

METRICS = ("fid", "sfid", "is", "kid", "prc")
NAMES = {  # of torch-fidelity's figures
    "frechet_inception_distance": "fid",
    "inception_score_mean": "is",
    "inception_score_std": "is_std",
    "kernel_inception_distance_mean": "kid",
    "kernel_inception_distance_std": "kid_std",
    "precision": "precision",
    "recall": "recall",
}


class TensorImages(Dataset[Tensor]):
    """Images uint8 `[n, C, H, W]`, in memory or memory-mapped, each as `[3, H, W]`."""

    def __init__(self, images: Tensor | np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index]
        return _rgb(image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)))


class SplitImages(Dataset[Tensor]):
    """An even spread of `count` images of a split, each uint8 `[3, H, W]`."""

    def __init__(self, split: Split, levels: int, count: int) -> None:
        self.split, self.levels = split, levels
        self.indices = spread(len(split), count)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        image = self.split[[self.indices[index]]][0][0]
        return _rgb(image if self.levels == 256 else to_uint8(from_levels(image, self.levels)))


class FolderImages(Dataset[Tensor]):
    """The PNGs of a folder, each uint8 `[3, H, W]`, in the order of their names."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.png"))
        self.size: tuple[int, int] | None = None  # of the first one that is read
        if not self.files:
            raise InputError(f"{folder} has no .png; expected a folder that `flowback sample` wrote, or an .npz")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        image = decode(self.files[index], "RGB").image.convert("RGB")
        self.size = self.size or image.size
        if image.size != self.size:
            raise InputError(f"image {self.files[index]} is of {image.size} pixels; expected {self.size}, as others are")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


Images = TensorImages | SplitImages | FolderImages


def open_images(path: Path) -> Images:
    """Images on disk: a folder of PNGs, or an .npz in the ADM format, which is not read into memory.

    Raises:
        InputError: if it is neither.
    """
    if path.is_dir():
        return FolderImages(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo("arr_0.npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                return TensorImages(np.load(path)["arr_0"].transpose(0, 3, 1, 2))
            with archive.open(entry) as stream:
                assert isinstance(stream, io.BufferedIOBase)
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                header = stream.tell()
            with path.open("rb") as raw:  # the local header's own lengths say where the data begins
                raw.seek(entry.header_offset + 26)
                name, extra = np.frombuffer(raw.read(4), "<u2").tolist()
            start = entry.header_offset + 30 + name + extra + header
        return TensorImages(np.memmap(path, dtype, "r", start, shape).transpose(0, 3, 1, 2))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} holds no samples ({error}); expected a folder of PNGs, or an .npz with arr_0") from error


def _rgb(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1).contiguous()


def fidelity(
    samples: Images,
    reference: Images,
    metrics: Collection[str] = ("fid",),
    extractor: str = "efficientnet_lite0",
    weights: str | None = None,
    reference_name: str | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measure samples against real images; images are streamed, features kept.

    Args:
        samples: images uint8 `[3, H, W]`.
        reference: the same.
        metrics: of `METRICS`; sfid is one of inception.
        extractor: a key of `flowback.measure.extractors.EXTRACTORS`.
        weights: a local file of its weights; None for the shipped ones, or the net.
        reference_name: under which the reference's features are cached; None for no cache.
        batch_size: images that the extractor sees at once.
        device: where it runs.

    Returns:
        The figures by name, and under "extractor", "samples" and "reference_images" what they hold for.

    Raises:
        InputError: if a metric or extractor does not exist, or its weights cannot be had.
    """
    for name in metrics:
        if name not in METRICS:
            raise InputError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    check_sfid(metrics, extractor)
    if min(len(samples), len(reference)) < 2:
        raise InputError("one image has no spread; expected at least 2 samples and 2 real images")
    options: dict[str, Any] = {
        "input1": samples,
        "input2": reference,
        "input2_cache_name": reference_name,
        "cache_root": str(cache_folder() / "fidelity"),
        "cuda": False,  # it knows no other accelerator; the extractor moves images itself
        "batch_size": batch_size,
        "kid_subset_size": min(1000, len(samples), len(reference)),
        "save_cpu_ram": True,  # also: no worker processes
        "verbose": False,
    }
    figures: dict[str, Any] = {}
    wanted = {name: short in metrics for name, short in (("isc", "is"), ("fid", "fid"), ("kid", "kid"), ("prc", "prc"))}
    if any(wanted.values()):
        found = _calculate(extractor, weights, device, **options, **wanted)
        figures |= {NAMES[name]: value for name, value in found.items() if name in NAMES}
    if "sfid" in metrics:
        found = _calculate("inception_spatial", weights, device, **options, fid=True)
        figures["sfid"] = found["frechet_inception_distance"]
    return figures | {"extractor": extractor, "samples": len(samples), "reference_images": len(reference)}


def check_sfid(metrics: Collection[str], extractor: str) -> None:
    """Refuse sfid of another extractor than inception.

    Raises:
        InputError: if it is asked for.
    """
    if "sfid" in metrics and extractor != "inception":
        raise InputError(f"sfid is a figure of inception, not of {extractor}; use extractor inception, or leave sfid out")


def reference_of(data: ImageSet, count: int, training: bool = True) -> tuple[Images, str]:
    """`count` real images of a data set and the name to cache them under, which changes when the images do."""
    split = data.train if training else data.held_out
    images = SplitImages(split, data.levels, count)
    part = "train" if training else "held-out"
    size = "x".join(map(str, dict.fromkeys(data.size)))
    return images, f"{data.name}-{part}-{len(images)}-{size}-{split.fingerprint()}"


def _calculate(extractor: str, weights: str | None, device: torch.device | str, **options: Any) -> dict[str, float]:
    """What torch-fidelity measures with an extractor."""
    from torch_fidelity.metrics import calculate_metrics

    from flowback.measure import extractors

    name = extractors.registered(extractor, torch.device(device))
    options["feature_extractor_weights_path"] = extractors.checked_weights(weights, extractor)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return calculate_metrics(feature_extractor=name, **options)
    except InputError:
        raise
    except OSError as error:  # URLError and its kind
        raise InputError(
            f"the weights of extractor {extractor} cannot be had ({error}); it needs a network, or give a local file"
        ) from error
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise InputError(f"the weights given do not fit extractor {extractor}: {str(error).splitlines()[0]}") from error
