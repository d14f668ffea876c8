"""Feature extractors in the form that torch-fidelity takes, by name; those that it lacks are here."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from flowback.core.devices import put
from flowback.core.errors import InputError
from flowback.core.files import check_zip
from flowback.encoders import load_encoder

SPATIAL_CHANNELS = 7  # of ADM's sFID (arXiv 2105.05233), at 17x17: as many numbers as pool3 has, nearly


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


def registered(extractor: str, device: torch.device) -> str:
    """The name under which torch-fidelity knows an extractor that computes on a device.

    Raises:
        InputError: if there is no such extractor.
    """
    if extractor not in EXTRACTORS:
        raise InputError(f"extractor must be one of {', '.join(EXTRACTORS)}, got {extractor!r}")
    name, own = EXTRACTORS[extractor]
    if own is not None and name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, own)
    if device.type == "cpu":
        return name
    placed = f"{name}-{device.type}-{device.index}"
    if placed not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(placed, _on_device(FEATURE_EXTRACTORS_REGISTRY[name], device))
    return placed


def _on_device(extractor: Any, device: torch.device) -> type[FeatureExtractorBase]:
    """A kind of extractor that computes on a device what images on the CPU have as features there."""

    class Placed(extractor):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.to(device)

        def forward(self, input: Tensor) -> tuple[Tensor, ...]:
            return tuple(features.cpu() for features in super().forward(put(input, device)))

    return Placed


def checked_weights(weights: str | None, extractor: str) -> str | None:
    """A local file of weights, once it is sure that it holds nothing but tensors: torch-fidelity would unpickle all."""
    if weights is None or weights == "random":
        return weights
    if not Path(weights).is_file():
        raise InputError(f"extractor weights {weights} are not a file; expected a local file of tensors")
    own = EXTRACTORS[extractor][1]
    reads_safetensors = own is not None and issubclass(own, TimmExtractor)
    if not (reads_safetensors and weights.endswith(".safetensors")):
        try:
            check_zip(Path(weights))
            state = torch.load(weights, weights_only=True, map_location="cpu")
        except Exception as error:  # unpickling raises many kinds
            raise InputError(
                f"extractor weights {weights} hold more than tensors ({str(error).splitlines()[0]})"
            ) from error
        if not isinstance(state, dict):
            raise InputError(f"extractor weights {weights} are not a state_dict; expected one")
    return weights


@torch.no_grad()
def pooled_features(
    images: Dataset[Tensor], extractor: str = "efficientnet_lite0", weights: str | None = None, batch_size: int = 64
) -> Tensor:
    """The extractor's pooled features `[n, dim]` of images, for a probe on samples."""
    _, own = EXTRACTORS[extractor]
    cls: Any = own or FeatureExtractorInceptionV3
    layer = cls.get_default_feature_layer_for_metric("fid")
    model: nn.Module = cls(extractor, [layer], feature_extractor_weights_path=checked_weights(weights, extractor))
    loader = DataLoader(images, batch_size)
    return torch.cat([model.eval()(batch)[0].float() for batch in loader])
