"""What all autoencoders share: images to a grid of latents and back, and what a flow has to know of its own.

A flow sees `(latent - shift) * scale`, which has about unit variance (Rombach et al., arXiv 2112.10752). Both, the hash of
the weights and the kind of latent are saved with the flow: another autoencoder than the one of training is refused.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from flowback.core.devices import put
from flowback.core.errors import InputError
from flowback.core.files import file_hash, read_json, save_tensors, write_whole
from flowback.core.seeds import Generators, draw
from flowback.core.units import as_size
from flowback.encoders import Encoder
from flowback.flow.io import load_tensors, tensor_shapes

BATCH = 16  # images at once; an autoencoder's first layers are the largest thing in memory
FORMAT = 1
POSTERIORS = ("mean", "sample")
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What a flow has to know of its autoencoder; it is saved with the flow.

    Args:
        name: a folder or hub id; null if the autoencoder was trained together with the flow, whose weights hold its own.
        kind: kl, semantic or joint.
        channels: of the latents.
        downsample: image pixels per latent, along a side.
        scale: the flow sees `(latent - shift) * scale`; a number, or one for each channel.
        shift: as `scale`.
        weights: hash of the weights; others are refused.
        posterior: which latent of an image: the mean of the autoencoder's posterior, or a sample of it.
        image_channels: of the images.
        image_size: height and width of the only images that it takes, pixels; null for all that are multiples of
            `downsample`.
        noise_std: the strongest Gaussian noise on a flow's latents that the decoder was trained with. What a flow of at
            most this noise draws is not denoised.

    Raises:
        InputError: if a value is impossible.
    """

    name: str | None
    channels: int
    downsample: int
    scale: float | tuple[float, ...] = 1.0
    shift: float | tuple[float, ...] = 0.0
    weights: str = ""
    posterior: str = "mean"
    image_channels: int = 3
    kind: str = "kl"
    image_size: tuple[int, int] | None = None
    noise_std: float = 0.0

    def __post_init__(self) -> None:
        if self.posterior not in POSTERIORS:
            raise InputError(f"latents.posterior must be one of {', '.join(POSTERIORS)}, got {self.posterior!r}")
        for name in ("channels", "downsample", "image_channels"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise InputError(f"the autoencoder's {name} must be a whole number of at least 1, got {value!r}")
        for name in ("scale", "shift"):
            if isinstance(value := getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(value))
            values = getattr(self, name)
            values = values if isinstance(values, tuple) else (values,)
            if len(values) not in (1, self.channels) or not all(_is_number(v) and (v or name == "shift") for v in values):
                raise InputError(
                    f"the autoencoder's {name} must be a finite number, or one for each of {self.channels} channels, of a "
                    f"scale not 0, got {value!r}"
                )
        if not _is_number(self.noise_std) or self.noise_std < 0:
            raise InputError(f"the autoencoder's noise_std must be a finite number of at least 0, got {self.noise_std!r}")
        if self.image_size is not None:
            size = as_size(self.image_size, "the autoencoder's image_size")
            object.__setattr__(self, "image_size", size if isinstance(size, tuple) else (size, size))
            self.latent_size(self.image_size)

    @classmethod
    def planned(cls, kind: str, options: Any, image_size: tuple[int, int], image_channels: int) -> Self:
        """What a flow will have to know of one that is not made yet, by its options `channels`, `downsample`, `noise_std`.

        Raises:
            InputError: if the size of the images is no multiple of `downsample`.
        """
        sizes: dict[str, Any] = {"image_channels": image_channels, "image_size": image_size}
        sizes |= {name: getattr(options, name) for name in ("channels", "downsample", "noise_std")}
        return cls(name=None, kind=kind, **sizes)

    @property
    def title(self) -> str:
        """What it is called in a sentence."""
        return "an autoencoder trained with the flow" if self.name is None else self.name

    @property
    def moments(self) -> int:
        """How many numbers describe a latent: its mean, and where latents are samples its standard deviation."""
        return 2 if self.posterior == "sample" else 1

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the latents of images of a size.

        Raises:
            InputError: if the autoencoder does not take images of this size.
        """
        if self.image_size not in (None, tuple(size)):
            raise InputError(f"the autoencoder's image size must be {list(self.image_size)}, got {list(size)}")
        if size[0] % self.downsample or size[1] % self.downsample:
            raise InputError(f"the autoencoder's image size must be a multiple of {self.downsample}, got {list(size)}")
        return size[0] // self.downsample, size[1] // self.downsample


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Autoencoder(nn.Module, ABC):
    """Images to latents and back. Inputs are moved to its device.

    A kind writes `_moments`, `_decode` and `reconstruct`. While it is trained it is a module like others; `freeze` ends
    that for good. Frozen, it stays in eval mode, and is differentiable in images and latents, not in its own weights.

    Args:
        config: what a flow has to know of it.
    """

    kind: ClassVar[str]
    weights_file: ClassVar[str] = WEIGHTS
    files: ClassVar[tuple[str, ...]] = ("config.json", WEIGHTS)  # of its folder
    encoder: Encoder | None = None  # a frozen vision model in whose features it works, if it does
    scale: Tensor
    shift: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.frozen = False
        self.set_config(config)

    def set_config(self, config: AutoencoderConfig) -> None:
        """Change what is known of it, and with it the scale and shift of latents."""
        self.config = config
        for name in ("scale", "shift"):
            values = torch.tensor(getattr(config, name), dtype=torch.get_default_dtype()).view(-1, 1, 1)
            before = getattr(self, name, values)
            self.register_buffer(name, values.to(before.device, before.dtype), persistent=False)

    def freeze(self) -> Self:
        """Put it into eval mode for good, without gradients of its weights."""
        self.frozen = True
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """As of other modules; a frozen one stays in eval mode."""
        return super().train(mode and not self.frozen)

    @property
    def core(self) -> Self:
        """What has weights of its own: itself (compare `LatentFlow.core`)."""
        return self

    @property
    def stored(self) -> nn.Module:
        """What has the weights that are written."""
        return self

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.scale.device

    def encode(self, images: Tensor, generator: Generators = None) -> Tensor:
        """Images `[B, C, H, W]` in [-1, 1] to latents `[B, channels, H/downsample, W/downsample]`, as a flow sees them."""
        return self.from_moments(self.moments(images), generator)

    def moments(self, images: Tensor) -> Tensor:
        """The posterior's mean, `[B, channels, …]`; where latents are samples, then its standard deviation, as channels."""
        return torch.cat([self._moments(part).to(images.dtype) for part in put(images, self.device).split(BATCH)])

    def from_moments(self, moments: Tensor, generator: Generators = None) -> Tensor:
        """Latents as a flow sees them of what `moments` returned; a sample is drawn from `generator`."""
        latent = moments
        if self.config.posterior == "sample":
            mean, std = moments.chunk(2, dim=1)
            latent = mean + std * draw(torch.randn, mean, generator)
        return (latent - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as a flow sees them to images `[B, C, H, W]`, nearly in [-1, 1]."""
        parts = (put(latents, self.device) / self.scale + self.shift).split(BATCH)
        return torch.cat([self._decode(part).to(latents.dtype) for part in parts])

    @abstractmethod
    def _moments(self, images: Tensor) -> Tensor:
        """`moments` of a few images."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """A few latents, without scale and shift, to images."""

    def reconstruct(
        self, images: Tensor, noise: Tensor, levels: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode, disturb, decode: what training compares with the images. Only kinds that are trained alone have it.

        Args:
            images: `[B, C, H, W]` in [-1, 1].
            noise: standard normal, `[B, channels, H/downsample, W/downsample]`.
            levels: of the noise, uniform in [0, 1), `[B]`.
            features: of the frozen encoder, `[B, P, F]`, where they were computed before and are of use.

        Returns:
            Images `[B, C, H, W]`, and terms of the loss that are the kind's own, by name, weighted.
        """
        raise NotImplementedError

    def settle(self, images: Tensor) -> None:
        """What follows from trained weights, such as the scale of latents, from some training images `[B, C, H, W]`."""

    def describe(self) -> dict[str, Any]:
        """What config.json holds besides the model's name, for `build`: facts, and the kind's options."""
        facts = asdict(self.config)
        return {"facts": {k: v for k, v in facts.items() if k not in ("name", "kind", "weights", "posterior")}}

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors into the folder `path`."""
        folder = Path(path)
        config = {"model": type(self).__name__, "format": FORMAT, **self.describe()}
        save_tensors(self.state_dict(), folder / WEIGHTS)
        write_whole(folder / "config.json", lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))

    @classmethod
    def facts(cls, folder: Path, name: str | None, posterior: str) -> AutoencoderConfig:
        """What a flow has to know of the autoencoder in a folder.

        Raises:
            InputError: if it is not usable.
        """
        if posterior != "mean":
            raise InputError(f"latents.posterior must be mean with a {cls.kind} autoencoder, got {posterior!r}")
        return cls.known(read_description(folder), name, weights_hash(folder, WEIGHTS), folder)

    @classmethod
    def known(cls, description: dict[str, Any], name: str | None, weights: str, folder: Path) -> AutoencoderConfig:
        """What a flow has to know of the autoencoder that a config.json in `folder` describes.

        Raises:
            InputError: if it describes none.
        """
        try:
            return AutoencoderConfig(name=name, kind=cls.kind, weights=weights, **description["facts"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / 'config.json'} does not describe a {cls.kind} autoencoder ({error})") from error

    @classmethod
    def build(cls, description: dict[str, Any], config: AutoencoderConfig, folder: Path) -> Self:
        """The autoencoder of a config.json in `folder`, without weights; a kind that has its own `load` has none."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path, config: AutoencoderConfig) -> Self:
        """The autoencoder in a folder, frozen.

        Raises:
            InputError: if it is not whole.
        """
        made = cls.build(read_description(folder), config, folder)
        load_tensors(made, folder / WEIGHTS)
        return made.freeze()


def read_description(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says of an autoencoder.

    Raises:
        InputError: if it is missing, or no object.
    """
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no readable config.json of an autoencoder ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} does not describe an autoencoder")
    return config


def check_numbers(make: Callable[[], nn.Module], file: Path) -> None:
    """Whether a description asks for no more numbers than a file of weights has, before any memory is taken for them.

    Raises:
        ValueError: if it does.
        InputError: if the file cannot be read.
    """
    try:
        with torch.device("meta"):
            described = sum(p.numel() for p in make().parameters())
    except RuntimeError as error:  # PyTorch cannot even count them
        raise ValueError(str(error).splitlines()[0]) from error
    if described > (held := sum(map(math.prod, tensor_shapes(file).values()))):
        raise ValueError(f"it describes {described} numbers, the weights have {held}")


def weights_hash(folder: Path, file: str) -> str:
    """The hash by which a flow knows the weights of its autoencoder.

    Raises:
        InputError: if there are none.
    """
    try:
        return file_hash(folder / file)[:16]
    except OSError as error:
        raise InputError(f"{folder} has no {file}; expected an autoencoder saved as safetensors") from error
