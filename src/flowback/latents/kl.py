"""The autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752): diffusers' AutoencoderKL, frozen or trained."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from flowback.core.errors import InputError, only_errors
from flowback.flow.io import tensor_shapes
from flowback.latents.autoencoder import Autoencoder, AutoencoderConfig, read_description, weights_hash

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """An AutoencoderKL to train.

    Args:
        channels: of the latents.
        downsample: image pixels per latent, along a side: a power of 2.
        width: channels of the first resolution, a multiple of 8; the others have twice as many.
        layers: residual blocks of each resolution.
        kl_weight: of the Kullback-Leibler divergence of the posterior from N(0, I), nats per image, over the number of its
            pixels and channels.

    Raises:
        InputError: if a value is impossible.
    """

    channels: int = 4
    downsample: int = 4
    width: int = 32
    layers: int = 1
    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("channels", "width", "layers"):
            if getattr(self, name) < 1:
                raise InputError(f"kl.{name} must be at least 1, got {getattr(self, name)}")
        if self.width % 8:
            raise InputError(f"kl.width must be a multiple of 8, got {self.width}")
        if self.downsample < 1 or self.downsample & (self.downsample - 1):
            raise InputError(f"kl.downsample must be a power of 2, got {self.downsample}")
        if not 0 <= self.kl_weight < math.inf:
            raise InputError(f"kl.kl_weight must be at least 0, got {self.kl_weight}")


class KLAutoencoder(Autoencoder):
    """Diffusers' AutoencoderKL as an autoencoder of this package.

    Args:
        model: a diffusers AutoencoderKL.
        config: what a flow has to know of it.
        kl_weight: of the divergence, while it is trained.
    """

    kind = "kl"
    weights_file = WEIGHTS
    files = ("config.json", WEIGHTS)

    def __init__(self, model: nn.Module, config: AutoencoderConfig, kl_weight: float = 0.0) -> None:
        super().__init__(config)
        self.model: Any = model
        self.kl_weight = kl_weight

    @classmethod
    def new(cls, options: KLConfig, image_size: tuple[int, int], image_channels: int) -> Self:
        """One of random weights, to train on images of a size and number of channels.

        Raises:
            InputError: if the size is no multiple of `downsample`.
        """
        levels = options.downsample.bit_length()
        model = _kind()(
            in_channels=image_channels,
            out_channels=image_channels,
            latent_channels=options.channels,
            block_out_channels=(options.width, *(2 * options.width,) * (levels - 1)),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=options.layers,
            norm_num_groups=8,
            mid_block_add_attention=False,
            scaling_factor=1.0,
        )
        config = AutoencoderConfig(
            name=None, channels=options.channels, downsample=options.downsample, image_channels=image_channels
        )
        config.latent_size(image_size)
        return cls(model, config, options.kl_weight)

    @property
    def stored(self) -> nn.Module:
        """The model."""
        return self.model

    def _moments(self, images: Tensor) -> Tensor:
        posterior = self.model.encode(images.to(self.model.dtype)).latent_dist
        both = [posterior.mean] if self.config.posterior == "mean" else [posterior.mean, posterior.std]
        return torch.cat(both, dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents.to(self.model.dtype)).sample

    def reconstruct(
        self, images: Tensor, noise: Tensor, levels: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Autoencoder.reconstruct`: of a sample of the posterior, whatever the levels. The term is "kl"."""
        posterior = self.model.encode(images).latent_dist
        decoded = self.model.decode(posterior.mean + posterior.std * noise).sample
        return decoded, {"kl": self.kl_weight * posterior.kl().mean() / images[0].numel()}

    @torch.no_grad()
    def settle(self, images: Tensor) -> None:
        """Scale latents to unit variance."""
        self.model.register_to_config(scaling_factor=1 / float(self.moments(images).std()))
        self.set_config(replace(self.config, scale=self.model.config.scaling_factor))

    def save_pretrained(self, path: str | Path) -> None:
        """Write the folder as diffusers does, for any tool to read."""
        self.model.save_pretrained(path)

    @classmethod
    def facts(cls, folder: Path, name: str | None, posterior: str) -> AutoencoderConfig:
        """What a flow has to know of the autoencoder in a folder."""
        config = _description(folder)
        scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
        means, deviations = (config.get(f"latents_{name}") for name in ("mean", "std"))
        if means is not None or deviations is not None:  # newer ones scale every channel: (latent - mean) / std * factor
            try:
                scale, shift = tuple(scale / std for std in cast(Any, deviations)), means or 0.0
            except (TypeError, ZeroDivisionError) as error:
                raise InputError(
                    f"{folder / 'config.json'} has latents_std {deviations}; expected a number above 0 for each channel"
                ) from error
        return AutoencoderConfig(
            name=name,
            channels=config["latent_channels"],
            downsample=2 ** (len(config["block_out_channels"]) - 1),
            scale=scale,
            shift=shift,
            weights=weights_hash(folder, WEIGHTS),
            posterior=posterior,
            image_channels=config["in_channels"],
        )

    @classmethod
    def load(cls, folder: Path, config: AutoencoderConfig) -> Self:
        """The autoencoder in a folder, frozen."""
        kind = _kind()
        if (folder / f"{WEIGHTS}.index.json").exists():  # it would be read instead, and may name files anywhere
            raise InputError(f"the autoencoder in {folder} is cut into several files; expected {WEIGHTS} alone")
        _check_size(kind, folder)
        options = {
            "use_safetensors": True,
            "local_files_only": True,
            "low_cpu_mem_usage": False,
            "output_loading_info": True,
        }
        try:
            with only_errors("diffusers"):
                model, loaded = cast(Any, kind.from_pretrained(folder, **options))
        except Exception as error:  # its loader raises many kinds
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"the autoencoder in {folder} cannot be loaded ({reason})") from error
        wrong = [*loaded["missing_keys"], *loaded["unexpected_keys"]]  # of which it only warns
        if wrong:
            raise InputError(
                f"the weights in {folder} are not those of its config.json: {wrong[0]} is missing or superfluous"
            )
        return cls(model, config).freeze()


def _kind() -> Any:
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise InputError("these latents need the package diffusers: pip install 'flowback[latent]'") from error
    return AutoencoderKL


def _check_size(kind: Any, folder: Path) -> None:
    """Whether a config.json describes as many numbers as there are, before any memory is taken for them.

    Raises:
        InputError: if it does not.
    """
    config, held = _description(folder), tensor_shapes(folder / WEIGHTS)
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


def _description(folder: Path) -> dict[str, Any]:
    config = read_description(folder)
    needed = ("in_channels", "latent_channels", "block_out_channels", "scaling_factor")
    known = config.get("_class_name") == "AutoencoderKL"
    if not known or any(config.get(name) is None for name in needed) or not isinstance(config["block_out_channels"], list):
        raise InputError(f"{folder / 'config.json'} does not describe a diffusers AutoencoderKL")
    return config
