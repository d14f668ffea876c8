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
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from flowback.core.errors import InputError
from flowback.core.files import cache_folder, check_zip
from flowback.core.units import from_levels, to_uint8
from flowback.data import ImageSet, Split, load_image
from flowback.data.images import IMAGE_SUFFIXES, decode
from flowback.data.splits import spread

METRICS = ("fid", "sfid", "is", "kid", "prc")
LEAST = {"fid": 2, "sfid": 2, "is": 10, "kid": 2, "prc": 4}  # images: a spread, ten splits, three neighbors of each
SFID, SPATIAL = "inception_spatial", 2023  # the extractor of ADM's sFID, and the numbers of its features
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
    """Images uint8 `[n, C, H, W]`, in memory or memory-mapped, each as `[3, H, W]`; transparent ones on white."""

    def __init__(self, images: Tensor | np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index]
        image = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
        return _rgb(_on_white(Image.fromarray(image.permute(1, 2, 0).numpy())) if len(image) == 4 else image)


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
    """The images in a folder and the folders in it, each uint8 `[3, H, W]`, in the order of their names.

    Args:
        folder: where they lie; what is hidden is left out.
        size: height and width, pixels, to which they are cropped and resized as training data is; None to take them as
            they are, all of one size.

    Raises:
        InputError: if there are none.
    """

    def __init__(self, folder: Path, size: tuple[int, int] | None = None) -> None:
        names = (file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        self.files = sorted(folder / name for name in names if not any(part.startswith(".") for part in name.parts))
        self.size, self.first = size, None
        if not self.files:
            raise InputError(f"{folder} has no images; expected a folder of images, or an .npz with arr_0")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        if self.size:
            return load_image(self.files[index], self.size, 3)
        image = _on_white(decode(self.files[index], "RGB").image)
        self.first = self.first or image.shape[1:]
        if image.shape[1:] != self.first:
            sizes = (f"{width}x{height}" for height, width in (image.shape[1:], self.first))
            raise InputError("image {} is of {} pixels; expected {}, as others are".format(self.files[index], *sizes))
        return image


Images = TensorImages | SplitImages | FolderImages


@dataclass(frozen=True)
class Statistics:
    """What a reference file of ADM's says of Inception's features: mean and covariance, of pool3 and of sFID's."""

    pooled: tuple[np.ndarray, np.ndarray]  # [2048], [2048, 2048]
    spatial: tuple[np.ndarray, np.ndarray] | None
    images: TensorImages | None  # some of those that they are of


def open_images(path: Path, size: tuple[int, int] | None = None) -> Images:
    """Images on disk: a folder of them, or an .npz in the ADM format, which is not read into memory.

    Args:
        path: of the folder or file.
        size: of a folder's images, see `FolderImages`.

    Raises:
        InputError: if it is neither.
    """
    if path.is_dir():
        return FolderImages(path, size)
    try:
        return _as_images(path, _array(path, "arr_0"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} holds no samples ({error}); expected a folder of images, or an .npz with arr_0"
        ) from error


def open_reference(path: Path, size: tuple[int, int]) -> Images | Statistics:
    """A reference on disk: images as `open_images` has them, of a folder resized to `size`, or ADM's statistics.

    Raises:
        InputError: if it is neither.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
        if not {"mu.npy", "sigma.npy"} <= names:
            return open_images(path, size)
        pooled, spatial = (
            (_array(path, f"mu{end}"), _array(path, f"sigma{end}")) if f"mu{end}.npy" in names else None
            for end in ("", "_s")
        )
        for pair, dim in ((pooled, 2048), (spatial, SPATIAL)):
            if pair and ((pair[0].shape, pair[1].shape) != ((dim,), (dim, dim)) or not np.isfinite(pair[1].sum())):
                raise ValueError(
                    f"mu and sigma are {list(pair[0].shape)} and {list(pair[1].shape)}, not finite or not {dim}"
                )
        assert pooled is not None
        return Statistics(pooled, spatial, _as_images(path, _array(path, "arr_0")) if "arr_0.npy" in names else None)
    except (IsADirectoryError, zipfile.BadZipFile, FileNotFoundError):
        return open_images(path, size)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} holds no statistics of ADM's ({error}); expected mu and sigma of Inception") from error


def _array(path: Path, name: str) -> np.ndarray:
    """An array in an .npz, mapped into memory unless it is compressed; nothing is unpickled."""
    check_zip(path)
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{name}.npy")
        with archive.open(entry) as stream:
            version = np.lib.format.read_magic(stream)  # pyright: ignore[reportArgumentType]
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(stream)  # pyright: ignore[reportArgumentType]
            start = stream.tell()
    if entry.compress_type != zipfile.ZIP_STORED or dtype.hasobject:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    with path.open("rb") as raw:  # the local header's own lengths say where the data begins
        raw.seek(entry.header_offset + 26)
        own, extra = np.frombuffer(raw.read(4), "<u2").tolist()
    return np.memmap(path, dtype, "r", entry.header_offset + 30 + own + extra + start, shape, "F" if fortran else "C")


def _as_images(path: Path, array: np.ndarray) -> TensorImages:
    """An array of an .npz as images, once it is sure that it is one of them."""
    some = array[:64]
    from_to = f" from {some.min():g} to {some.max():g}" if some.size and array.dtype.kind in "fiu" else ""
    grey = array[..., None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or not some.size or grey.ndim != 4 or grey.shape[-1] not in (1, 3, 4) or some.max() <= 1:
        raise InputError(
            f"{path} holds {array.dtype} numbers{from_to}, {list(array.shape)}; expected images: uint8 numbers from 0 to "
            "255, [number, height, width, channels]"
        )
    return TensorImages(grey.transpose(0, 3, 1, 2))


def _on_white(image: Image.Image) -> Tensor:
    """An image as uint8 `[3, H, W]`; on white where it is transparent."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def size_of(images: Images) -> tuple[int, ...]:
    """Height and width of images, by the first one."""
    first = images.split[images.indices[:1]][0][0] if isinstance(images, SplitImages) else images[0]
    return tuple(first.shape[1:])


def _rgb(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1).contiguous()


def fidelity(
    samples: Images,
    reference: Images | Statistics,
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
        reference: the same, or statistics of ADM's.
        metrics: of `METRICS`; sfid is one of inception.
        extractor: a key of `flowback.measure.extractors.EXTRACTORS`.
        weights: a local file of its weights; None for the shipped ones, or the net.
        reference_name: under which the reference's features are cached; None for no cache.
        batch_size: images that the extractor sees at once.
        device: where it runs.

    Returns:
        The figures by name, and under "extractor", "samples" and "reference_images" what they hold for (None: not known).

    Raises:
        InputError: if a metric or extractor does not exist, its weights cannot be had, its features are not finite, or
            there are too few images, or of different sizes.
    """
    check(metrics, extractor, len(samples), size_of(samples), reference)
    real = reference.images if isinstance(reference, Statistics) else reference
    options: dict[str, Any] = {
        "input1": samples,
        "input2": real,
        "input2_cache_name": reference_name,
        "cache_root": str(cache_folder() / "fidelity"),
        "cuda": False,  # it knows no other accelerator; the extractor moves images itself
        "batch_size": batch_size,
        "kid_subset_size": min(1000, len(samples), 1000 if real is None else len(real)),
        "save_cpu_ram": True,  # also: no worker processes
        "verbose": False,
    }
    figures: dict[str, Any] = {}
    wanted = {name: short in metrics for name, short in (("isc", "is"), ("fid", "fid"), ("kid", "kid"), ("prc", "prc"))}
    if isinstance(reference, Statistics):
        wanted["fid"] = False
        for name, kind, known in (("fid", extractor, reference.pooled), ("sfid", SFID, reference.spatial)):
            if name in metrics and known is not None:
                figures[name] = _against(known, kind, weights, device, **options)
    elif "sfid" in metrics:
        figures["sfid"] = _calculate(SFID, weights, device, **options, fid=True)["frechet_inception_distance"]
    if any(wanted.values()):
        found = _calculate(extractor, weights, device, **options, **wanted)
        figures |= {NAMES[name]: value for name, value in found.items() if name in NAMES}
    real_images = None if real is None else len(real)
    return figures | {"extractor": extractor, "samples": len(samples), "reference_images": real_images}


def check(
    metrics: Collection[str], extractor: str, samples: int, size: tuple[int, ...], reference: Images | Statistics
) -> None:
    """Refuse metrics that do not exist, or for which there is too little, or another size than that of the samples.

    Raises:
        InputError: naming the metric and what it needs.
    """
    for name in metrics:
        if name not in METRICS:
            raise InputError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    check_sfid(metrics, extractor)
    real = reference.images if isinstance(reference, Statistics) else reference
    if isinstance(reference, Statistics):
        if extractor != "inception":
            raise InputError(
                f"the statistics of the reference are of inception, not of {extractor}; use extractor inception"
            )
        if "sfid" in metrics and reference.spatial is None:
            raise InputError(
                "sfid needs mu_s and sigma_s in the file of statistics; expected them, or a reference of images"
            )
    if real is not None and len(real) and size_of(real) != tuple(size):
        own, others = (f"{width}x{height}" for height, width in (size, size_of(real)))
        raise InputError(f"the samples are of {own} pixels; expected {others}, as the reference is")
    for name in metrics:
        if samples < LEAST[name]:
            raise InputError(f"{name} needs at least {LEAST[name]} samples, got {samples}")
        if name == "is" or (isinstance(reference, Statistics) and name in ("fid", "sfid")):
            continue
        if real is None:
            raise InputError(f"{name} needs real images; the file of statistics has none (arr_0)")
        if len(real) < LEAST[name]:
            raise InputError(f"{name} needs at least {LEAST[name]} real images, got {len(real)}")


def check_sfid(metrics: Collection[str], extractor: str) -> None:
    """Refuse sfid of another extractor than inception.

    Raises:
        InputError: if it is asked for.
    """
    if "sfid" in metrics and extractor != "inception":
        raise InputError(f"sfid is a figure of inception, not of {extractor}; use extractor inception, or leave sfid out")


def check_extractor(metrics: Collection[str], extractor: str, weights: str | None = None) -> None:
    """Load what the metrics need once, before other work.

    Raises:
        InputError: if weights cannot be had, or do not fit.
    """
    for name in [extractor] * (set(metrics) != {"sfid"}) + [SFID] * ("sfid" in metrics):
        _load(name, weights, "cpu", cuda=False, verbose=False)


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

    with _explained(extractor, weights, device) as found:
        return calculate_metrics(**found, **options)


def _against(known: tuple[np.ndarray, np.ndarray], *extractor: Any, **options: Any) -> float:
    """The Fréchet distance of samples from a mean and a covariance."""
    from torch_fidelity.metric_fid import fid_input_id_to_statistics, fid_statistics_to_metric

    model, layer = _load(*extractor, **options)
    with _explained(*extractor):
        own = fid_input_id_to_statistics(1, model, layer, **options)
        pair = [
            {"mu": mu.astype(np.float64), "sigma": sigma.astype(np.float64)}
            for mu, sigma in ((own["mu"], own["sigma"]), known)
        ]
        return fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"]


def _load(extractor: str, weights: str | None, device: torch.device | str, **options: Any) -> tuple[Any, str]:
    """An extractor, and its layer whose features FID compares."""
    from torch_fidelity.utils import create_feature_extractor, resolve_feature_layer_for_metric

    with _explained(extractor, weights, device) as found:
        layer = resolve_feature_layer_for_metric("fid", **found)
        name = found["feature_extractor"]
        return create_feature_extractor(name, [layer], **{**options, **found}), layer


@contextlib.contextmanager
def _explained(extractor: str, weights: str | None, device: torch.device | str) -> Iterator[dict[str, Any]]:
    """The options by which torch-fidelity finds an extractor; what it complains of then is one sentence."""
    from flowback.measure import extractors

    name = extractors.registered(extractor, torch.device(device))
    found = {"feature_extractor": name, "feature_extractor_weights_path": extractors.checked_weights(weights, extractor)}
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield found
    except InputError:
        raise
    except OSError as error:  # URLError and its kind
        raise InputError(
            f"the weights of extractor {extractor} cannot be had ({error}); it needs a network, or give a local file"
        ) from error
    except np.linalg.LinAlgError as error:
        raise InputError(f"extractor {extractor} has features that are not finite; expected other weights") from error
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise InputError(f"the weights given do not fit extractor {extractor}: {str(error).splitlines()[0]}") from error
