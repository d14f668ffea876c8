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
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metrics import calculate_metrics
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from flowback.core.devices import put
from flowback.core.errors import InputError
from flowback.core.files import cache_folder
from flowback.core.units import from_levels, to_uint8
from flowback.data import ImageSet, Split
from flowback.data.images import decode
from flowback.encoders import load_encoder

METRICS = ("fid", "sfid", "is", "kid", "prc")
SPATIAL_CHANNELS = 7  # of ADM's sFID (arXiv 2105.05233), at 17x17: as many numbers as pool3 has, nearly


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
    """The first, evenly spread `count` images of a split, each uint8 `[3, H, W]`."""

    def __init__(self, split: Split, levels: int, count: int) -> None:
        self.split, self.levels = split, levels
        self.indices = torch.linspace(0, len(split) - 1, min(count, len(split))).round().long().tolist()

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
            raise InputError(f"{folder} has no .png; allowed is a folder that `flowback sample` wrote, or an .npz")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        image = decode(self.files[index], "RGB").image.convert("RGB")
        self.size = self.size or image.size
        if image.size != self.size:
            raise InputError(f"image {self.files[index]} is of {image.size} pixels; allowed are {self.size}, as others are")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def open_images(path: Path) -> Dataset[Tensor]:
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
        raise InputError(f"{path} holds no samples ({error}); allowed: a folder of PNGs, or an .npz with arr_0") from None


def _rgb(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1).contiguous()


class TimmExtractor(FeatureExtractorBase):
    """A timm model as an extractor: its pooled features, and its logits if it has any."""

    encoder_name = "efficientnet_lite0"
    grid: tuple[int, int] | None = None  # None for the model's own input size

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **options: Any
    ) -> None:
        super().__init__(name, features_list)
        self.encoder = load_encoder(self.encoder_name, feature_extractor_weights_path, self.grid)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """What it offers."""
        return ("pooled", "logits_unbiased")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Logits for IS, pooled features for all else."""
        return "logits_unbiased" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        """It is not needed."""
        return False

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Images uint8 `[B, 3, H, W]` to the features asked for, `[B, dim]` each."""
        encoder: Any = self.encoder
        x = F.interpolate(input.float() / 127.5 - 1, encoder.size, mode="bicubic", antialias=True, align_corners=False)
        x = ((x + 1) / 2 - encoder.mean) / encoder.std
        maps = encoder.model.forward_features(x.to(memory_format=torch.channels_last))
        features = {
            "pooled": encoder.model.forward_head(maps, pre_logits=True),
            "logits_unbiased": encoder.model.forward_head(maps),
        }
        return tuple(features[name] for name in self.features_list)


class DinoExtractor(TimmExtractor):
    """DINOv2 ViT-B/14; the class token."""

    encoder_name = "dinov2_b"
    grid = (16, 16)  # of patches: 224 pixels


class SpatialInception(FeatureExtractorInceptionV3):
    """Inception-v3 up to where ADM's sFID looks: the first channels of mixed_6's first branch, at 17x17."""

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What it offers."""
        return ("spatial",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The only one."""
        return "spatial"

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images uint8 `[B, 3, H, W]` to `[B, 7 * 17 * 17]`."""
        return (spatial_features(self, x),)


def spatial_features(inception: Any, x: Tensor) -> Tensor:
    """ADM's spatial features of images uint8 `[B, 3, H, W]`: `[B, 2023]`."""
    seen: list[Tensor] = []
    handle = inception.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    names, inception.features_list = inception.features_list, ["768"]
    try:
        FeatureExtractorInceptionV3.forward(inception, x)
    finally:
        handle.remove()
        inception.features_list = names
    return seen[0][:, :SPATIAL_CHANNELS].flatten(1).float()


# name -> (torch-fidelity's name, class to register if it is not torch-fidelity's own)
EXTRACTORS: dict[str, tuple[str, type[FeatureExtractorBase] | None]] = {
    "efficientnet_lite0": ("flowback-efficientnet-lite0", TimmExtractor),
    "dinov2": ("flowback-dinov2", DinoExtractor),
    "inception": ("inception-v3-compat", None),
    "inception_spatial": ("flowback-inception-spatial", SpatialInception),
}


def fidelity(
    samples: Dataset[Tensor],
    reference: Dataset[Tensor],
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
        extractor: a key of `EXTRACTORS`.
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
            raise InputError(f"metric {name!r} does not exist; allowed: {', '.join(METRICS)}")
    if extractor not in EXTRACTORS:
        raise InputError(f"extractor {extractor!r} does not exist; allowed: {', '.join(EXTRACTORS)}")
    check_sfid(metrics, extractor)
    if min(len(samples), len(reference)) < 2:  # pyright: ignore[reportArgumentType]
        raise InputError("one image has no spread; allowed are at least 2 samples and 2 real images")
    options: dict[str, Any] = {
        "input1": samples,
        "input2": reference,
        "input2_cache_name": reference_name,
        "cache_root": str(cache_folder() / "fidelity"),
        "cuda": False,  # it knows no other accelerator; the extractor moves images itself
        "batch_size": batch_size,
        "feature_extractor_weights_path": _checked_weights(weights, extractor),
        "kid_subset_size": min(1000, len(samples), len(reference)),  # pyright: ignore[reportArgumentType]
        "save_cpu_ram": True,  # also: no worker processes
        "verbose": False,
    }
    figures: dict[str, Any] = {}
    wanted = {"isc": "is" in metrics, "fid": "fid" in metrics, "kid": "kid" in metrics, "prc": "prc" in metrics}
    if any(wanted.values()):
        found = _calculate(extractor, torch.device(device), **options, **wanted)
        names = {"frechet_inception_distance": "fid", "inception_score_mean": "is", "inception_score_std": "is_std"}
        names |= {"kernel_inception_distance_mean": "kid", "kernel_inception_distance_std": "kid_std"}
        figures |= {names.get(name, name): value for name, value in found.items() if name != "f_score"}
    if "sfid" in metrics:
        found = _calculate("inception_spatial", torch.device(device), **options, fid=True)
        figures["sfid"] = found["frechet_inception_distance"]
    counts = {"samples": len(samples), "reference_images": len(reference)}  # pyright: ignore[reportArgumentType]
    return figures | {"extractor": extractor, **counts}


def check_sfid(metrics: Collection[str], extractor: str) -> None:
    """Refuse sfid of another extractor than inception.

    Raises:
        InputError: if it is asked for.
    """
    if "sfid" in metrics and extractor != "inception":
        raise InputError(f"sfid is a figure of inception, not of {extractor}; allowed: extractor inception, or no sfid")


def reference_of(data: ImageSet, count: int, training: bool = True) -> tuple[Dataset[Tensor], str]:
    """`count` real images of a data set and the name to cache them under, which changes when the images do."""
    split = data.train if training else data.held_out
    images = SplitImages(split, data.levels, count)
    part = "train" if training else "held-out"
    return images, f"{data.name}-{part}-{len(images)}-{data.image_size}-{split.fingerprint()}"


def _calculate(extractor: str, device: torch.device, **options: Any) -> dict[str, float]:
    name, own = EXTRACTORS[extractor]
    if own is not None and name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, own)
    if device.type != "cpu":
        placed = f"{name}-{device.type}-{device.index}"
        if placed not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(placed, _on_device(FEATURE_EXTRACTORS_REGISTRY[name], device))
        name = placed
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return calculate_metrics(feature_extractor=name, **options)
    except InputError:
        raise
    except OSError as error:  # URLError and its kind
        raise InputError(
            f"the weights of extractor {extractor} cannot be had ({error}); allowed: a network, or a local file"
        ) from None
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise InputError(f"the weights given do not fit extractor {extractor}: {str(error).splitlines()[0]}") from None


def _on_device(extractor: Any, device: torch.device) -> type[FeatureExtractorBase]:
    """A kind of extractor that computes on a device what images on the CPU have as features there."""

    class Placed(extractor):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.to(device)

        def forward(self, input: Tensor) -> tuple[Tensor, ...]:
            return tuple(features.cpu() for features in super().forward(put(input, device)))

    return Placed


def _checked_weights(weights: str | None, extractor: str) -> str | None:
    """A local file of weights, once it is sure that it holds nothing but tensors: torch-fidelity would unpickle all."""
    if weights is None or weights == "random":
        return weights
    if not Path(weights).is_file():
        raise InputError(f"extractor weights {weights} are not a file; allowed is a local file of tensors")
    own = EXTRACTORS[extractor][1]
    reads_safetensors = own is not None and issubclass(own, TimmExtractor)
    if not (reads_safetensors and weights.endswith(".safetensors")):
        try:
            state = torch.load(weights, weights_only=True, map_location="cpu")
        except Exception as error:  # unpickling raises many kinds
            raise InputError(f"extractor weights {weights} hold more than tensors ({str(error).splitlines()[0]})") from None
        if not isinstance(state, dict):
            raise InputError(f"extractor weights {weights} are not a state_dict; allowed is one")
    return weights


Extract = Callable[[Tensor], Tensor]


@torch.no_grad()
def pooled_features(
    images: Dataset[Tensor], extractor: str = "efficientnet_lite0", weights: str | None = None, batch_size: int = 64
) -> Tensor:
    """The extractor's pooled features `[n, dim]` of images, for a probe on samples."""
    _, own = EXTRACTORS[extractor]
    cls: Any = own or FeatureExtractorInceptionV3
    layer = cls.get_default_feature_layer_for_metric("fid")
    model: nn.Module = cls(extractor, [layer], feature_extractor_weights_path=_checked_weights(weights, extractor))
    loader = torch.utils.data.DataLoader(images, batch_size)
    return torch.cat([model.eval()(batch)[0].float() for batch in loader])
