"""A frozen autoencoder (diffusers' AutoencoderKL) whose latents a flow models instead of pixels.

The flow sees `(latent - shift) * scale`, which has about unit variance (Rombach et al., arXiv 2112.10752); both numbers are
those of the autoencoder's configuration. They, the hash of the weights and the kind of latent are saved with the flow:
another autoencoder than the one of training is refused.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowback.core.devices import put
from flowback.core.errors import InputError, only_errors
from flowback.core.files import file_hash, read_json, typed_path
from flowback.core.seeds import Generators, draw
from flowback.flow.io import find_folder, tensor_shapes

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = ("config.json", WEIGHTS, "vae/config.json", f"vae/{WEIGHTS}")
BATCH = 16  # images at once; an autoencoder's first layers are the largest thing in memory
POSTERIORS = ("mean", "sample")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What a flow has to know of its autoencoder; it is saved with the flow.

    Args:
        name: a folder or hub id of a diffusers AutoencoderKL.
        channels: of the latents.
        downsample: image pixels per latent, along a side.
        scale, shift: the flow sees `(latent - shift) * scale`.
        weights: hash of the weights; others are refused.
        posterior: which latent of an image: the mean of the autoencoder's posterior, or a sample of it.
        image_channels: of the images.

    Raises:
        InputError: if a value is impossible.
    """

    name: str
    channels: int
    downsample: int
    scale: float
    shift: float
    weights: str
    posterior: str = "mean"
    image_channels: int = 3

    def __post_init__(self) -> None:
        if self.posterior not in POSTERIORS:
            raise InputError(f"latents.posterior must be one of {', '.join(POSTERIORS)}, got {self.posterior!r}")
        for name in ("channels", "downsample", "image_channels"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise InputError(f"the autoencoder's {name} must be a whole number of at least 1, got {value!r}")
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or (name == "scale" and not value):
                raise InputError(f"the autoencoder's {name} must be a finite number, of a scale not 0, got {value!r}")

    @classmethod
    def of(cls, name: str, posterior: str = "mean") -> "AutoencoderConfig":
        """Read it from the autoencoder in a folder, or on the hub.

        Raises:
            InputError: if there is none.
        """
        folder = _folder(name)
        config = _config(folder)
        local = Path(typed_path(name))
        return cls(
            name=str(local.resolve()) if local.is_dir() else name,
            channels=config["latent_channels"],
            downsample=2 ** (len(config["block_out_channels"]) - 1),
            scale=config["scaling_factor"],
            shift=config.get("shift_factor") or 0.0,
            weights=_weights_hash(folder),
            posterior=posterior,
            image_channels=config["in_channels"],
        )

    @property
    def moments(self) -> int:
        """How many numbers describe a latent: its mean, and where latents are samples its standard deviation."""
        return 2 if self.posterior == "sample" else 1

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the latents of images of a size.

        Raises:
            InputError: if the autoencoder does not take images of this size.
        """
        if size[0] % self.downsample or size[1] % self.downsample:
            raise InputError(f"the autoencoder's image size must be a multiple of {self.downsample}, got {list(size)}")
        return size[0] // self.downsample, size[1] // self.downsample


class Autoencoder(nn.Module):
    """Images to latents and back, by a frozen model, which stays in eval mode. Inputs are moved to its device.

    Differentiable in images and latents, not in its own weights.

    Args:
        model: a diffusers AutoencoderKL.
        config: what a flow has to know of it.
    """

    def __init__(self, model: nn.Module, config: AutoencoderConfig) -> None:
        super().__init__()
        self.model, self.config = model.requires_grad_(False).eval(), config

    def train(self, mode: bool = True) -> "Autoencoder":
        """Stays in eval mode: the autoencoder is frozen."""
        return super().train(False)

    def encode(self, images: Tensor, generator: Generators = None) -> Tensor:
        """Images `[B, C, H, W]` in [-1, 1] to latents `[B, channels, H/downsample, W/downsample]`, as a flow sees them."""
        return self.from_moments(self.moments(images), generator)

    def moments(self, images: Tensor) -> Tensor:
        """The posterior's mean, `[B, channels, …]`; where latents are samples, then its standard deviation, as channels."""
        model: Any = self.model
        parts = []
        for part in put(images, model.device).split(BATCH):
            posterior = model.encode(part.to(model.dtype)).latent_dist
            both = [posterior.mean] if self.config.posterior == "mean" else [posterior.mean, posterior.std]
            parts.append(torch.cat(both, dim=1).to(images.dtype))
        return torch.cat(parts)

    def from_moments(self, moments: Tensor, generator: Generators = None) -> Tensor:
        """Latents as a flow sees them of what `moments` returned; a sample is drawn from `generator`."""
        latent = moments
        if self.config.posterior == "sample":
            mean, std = moments.chunk(2, dim=1)
            latent = mean + std * draw(torch.randn, mean, generator)
        return (latent - self.config.shift) * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as a flow sees them to images `[B, C, H, W]`, nearly in [-1, 1]."""
        model: Any = self.model
        parts = (put(latents, model.device) / self.config.scale + self.config.shift).split(BATCH)
        return torch.cat([model.decode(part.to(model.dtype)).sample.to(latents.dtype) for part in parts])


@torch.inference_mode(False)  # tensors that are made in it never get a gradient
def load_autoencoder(config: str | AutoencoderConfig, posterior: str = "mean") -> Autoencoder:
    """Load an autoencoder by name, or the one that a flow was trained with.

    Args:
        config: a folder or hub id; or what a flow knows of its own.
        posterior: with a name: "mean" or "sample", which latent stands for an image.

    Raises:
        InputError: if there is none, or its weights are not those that the flow was trained with.
    """
    name = config if isinstance(config, str) else config.name
    found = AutoencoderConfig.of(name, posterior)
    if isinstance(config, str):
        config = found
    elif found.weights != config.weights:
        raise InputError(
            f"the autoencoder {name} must have the weights {config.weights}, in whose latents the flow was trained, "
            f"got {found.weights}"
        )
    for size in ("channels", "downsample", "image_channels"):
        if getattr(found, size) != getattr(config, size):
            raise InputError(f"the autoencoder {name} has {size} {getattr(found, size)}, the flow {getattr(config, size)}")
    return Autoencoder(_load(_folder(name)), config)


def copy_files(name: str, target: Path) -> None:
    """Copy the files of an autoencoder, by folder or hub id, into a folder.

    Raises:
        InputError: if there is none.
    """
    source = _folder(name)
    _config(source)
    target.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", WEIGHTS):
        shutil.copyfile(source / file, target / file)


def _load(folder: Path) -> nn.Module:
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise InputError("latents need the package diffusers: pip install 'flowback[latent]'") from error
    if (folder / f"{WEIGHTS}.index.json").exists():  # it would be read instead, and may name files anywhere
        raise InputError(f"the autoencoder in {folder} is cut into several files; expected {WEIGHTS} alone")
    _check_size(AutoencoderKL, folder)
    options = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        with only_errors("diffusers"):
            model, loaded = cast(Any, AutoencoderKL.from_pretrained(folder, **options))
    except Exception as error:  # its loader raises many kinds
        raise InputError(f"the autoencoder in {folder} cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    wrong = [*loaded["missing_keys"], *loaded["unexpected_keys"]]  # of which it only warns
    if wrong:
        raise InputError(f"the weights in {folder} are not those of its config.json: {wrong[0]} is missing or superfluous")
    return model


def _check_size(kind: Any, folder: Path) -> None:
    """Whether a config.json describes as many numbers as there are, before any memory is taken for them.

    Raises:
        InputError: if it does not.
    """
    config, held = _config(folder), tensor_shapes(folder / WEIGHTS)
    try:
        if int(config.get("layers_per_block", 1)) > len(held):
            raise ValueError(f"it has more layers in a block than the weights have tensors, {len(held)}")
        with torch.device("meta"), only_errors("diffusers"):
            described = sum(tensor.numel() for tensor in kind.from_config(config).state_dict().values())
        if described > sum(map(math.prod, held.values())):
            raise ValueError(f"it describes {described} numbers, more than the weights have")
    except Exception as error:  # whatever diffusers raises of what it cannot be made of
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the weights in {folder} are not those of its config.json ({reason})") from error


def _folder(name: str) -> Path:
    folder = find_folder(name, FILES)
    return folder / "vae" if (folder / "vae").is_dir() else folder  # of a whole pipeline


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no readable config.json of an autoencoder ({error})") from error
    needed = ("in_channels", "latent_channels", "block_out_channels", "scaling_factor")
    known = isinstance(config, dict) and config.get("_class_name") == "AutoencoderKL"
    if not known or any(config.get(name) is None for name in needed) or not isinstance(config["block_out_channels"], list):
        raise InputError(f"{folder / 'config.json'} does not describe a diffusers AutoencoderKL")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise InputError(f"{folder} scales every channel by itself; expected an autoencoder with one scaling_factor")
    return config


def _weights_hash(folder: Path) -> str:
    try:
        return file_hash(folder / WEIGHTS)[:16]
    except OSError as error:
        raise InputError(f"{folder} has no {WEIGHTS}; expected an autoencoder saved as safetensors") from error
