"""Latents of a frozen autoencoder (diffusers' AutoencoderKL), in which a flow works instead of in pixels.

What the flow sees is `(latent - shift) * scale`, with both numbers from the autoencoder's own configuration, so that it has
about unit variance (Rombach et al., arXiv 2112.10752). They, the hash of the weights and the kind of latent are options of
the flow and travel in its checkpoint: an autoencoder that is not the one it was trained with is refused.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowback.devices import put
from flowback.errors import InputError, only_errors
from flowback.files import file_hash, read_json
from flowback.flows.config import FlowConfig
from flowback.flows.pretrained import pretrained_folder
from flowback.seeds import Generators, draw

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = ("config.json", WEIGHTS, "vae/config.json", f"vae/{WEIGHTS}")
BATCH = 16  # images at once; an autoencoder's first layers are the largest thing in memory


class Autoencoder:
    """Images to latents and back, by a frozen model. Images and latents are moved to where it is.

    Args:
        model: a diffusers AutoencoderKL.
        scale, shift: the flow sees `(latent - shift) * scale`.
        posterior: "mean" or "sample", which latent stands for an image.
    """

    def __init__(self, model: Any, scale: float, shift: float, posterior: str) -> None:
        self.model: nn.Module = model.requires_grad_(False).eval()
        self.scale, self.shift, self.posterior = scale, shift, posterior

    def __deepcopy__(self, memo: Any) -> "Autoencoder":
        return self  # frozen, so copies of a flow share it

    @torch.no_grad()
    def encode(self, images: Tensor, generator: Generators = None) -> Tensor:
        """Images `[B, C, H, W]` in [-1, 1] to latents `[B, channels, H/downsample, W/downsample]`, as a flow sees them."""
        return self.from_moments(self.moments(images), generator)

    def moments(self, images: Tensor) -> Tensor:
        """The posterior's mean `[B, channels, …]`, and where latents are samples as many channels of its deviation."""
        model: Any = self.model
        parts = []
        with torch.no_grad():
            for part in put(images, model.device).split(BATCH):
                posterior = model.encode(part.to(model.dtype)).latent_dist
                both = [posterior.mean] if self.posterior == "mean" else [posterior.mean, posterior.std]
                parts.append(torch.cat(both, dim=1).to(images.dtype))
        return torch.cat(parts)

    def from_moments(self, moments: Tensor, generator: Generators = None) -> Tensor:
        """What `moments` gives, as latents that a flow sees; a sample is drawn from `generator`."""
        latent = moments
        if self.posterior == "sample":
            mean, std = moments.chunk(2, dim=1)
            latent = mean + std * draw(torch.randn, mean, generator)
        return (latent - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as a flow sees them to images `[B, C, H, W]`, nearly in [-1, 1]."""
        model: Any = self.model
        parts = (put(latents, model.device) / self.scale + self.shift).split(BATCH)
        return torch.cat([model.decode(part.to(model.dtype)).sample.to(latents.dtype) for part in parts])


def facts(options: dict[str, Any]) -> dict[str, Any]:
    """What a flow's options have to say of its autoencoder, read off the autoencoder where it is not among them.

    Args:
        options: of the flow, among them "autoencoder".

    Raises:
        InputError: if the autoencoder cannot be had, or does not fit the images.
    """
    names = ("latent_channels", "latent_downsample", "latent_scale", "latent_shift", "latent_weights")
    if all(options.get(name) is not None for name in names):
        return {}
    folder = _folder(str(options["autoencoder"]))
    config = _config(folder)
    if config["in_channels"] != options["channels"]:
        raise InputError(
            f"images of {options['channels']} channels do not fit {folder}; allowed is {config['in_channels']}"
        )
    return {
        "latent_channels": config["latent_channels"],
        "latent_downsample": 2 ** (len(config["block_out_channels"]) - 1),
        "latent_scale": float(config["scaling_factor"]),
        "latent_shift": float(config.get("shift_factor") or 0.0),
        "latent_weights": _weights_hash(folder),
    }


def load_autoencoder(config: FlowConfig, device: torch.device) -> Autoencoder:
    """The autoencoder of a flow, on a device; flows keep theirs (`TarFlow.autoencoder`).

    Raises:
        InputError: if it cannot be had, or its weights are not those that the flow was trained with.
    """
    assert config.autoencoder is not None
    assert config.latent_scale is not None
    assert config.latent_shift is not None
    model, weights = _load(config.autoencoder)
    if weights != config.latent_weights:
        raise InputError(
            f"the autoencoder {config.autoencoder} has weights {weights}; allowed are {config.latent_weights}, "
            "in whose latents the flow was trained"
        )
    return Autoencoder(model.to(device), config.latent_scale, config.latent_shift, config.latent_posterior)


def _load(name: str) -> tuple[Any, str]:
    folder = _folder(name)
    _config(folder)
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError:
        raise InputError("latents need the package diffusers; allowed is an installation with flowback[latent]") from None
    options = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        with only_errors("diffusers"):
            model, loaded = cast(Any, AutoencoderKL.from_pretrained(folder, **options))
    except Exception as error:  # its loader raises many kinds
        raise InputError(f"the autoencoder in {folder} cannot be loaded ({str(error).strip().splitlines()[0]})") from None
    wrong = [*loaded["missing_keys"], *loaded["unexpected_keys"]]  # of which it only warns
    if wrong:
        raise InputError(f"the weights in {folder} are not those of its config.json: {wrong[0]} is missing or superfluous")
    return model, _weights_hash(folder)


def _folder(name: str) -> Path:
    folder = pretrained_folder(name, FILES)
    return folder / "vae" if (folder / "vae").is_dir() else folder  # of a whole pipeline


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no readable config.json of an autoencoder ({error})") from None
    needed = ("in_channels", "latent_channels", "block_out_channels", "scaling_factor")
    known = isinstance(config, dict) and config.get("_class_name") == "AutoencoderKL"
    if not known or any(config.get(name) is None for name in needed):
        raise InputError(f"{folder / 'config.json'} does not describe a diffusers AutoencoderKL")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise InputError(f"{folder} scales every channel by itself; allowed is an autoencoder with one scaling_factor")
    return config


def _weights_hash(folder: Path) -> str:
    try:
        return file_hash(folder / WEIGHTS)[:16]
    except OSError:
        raise InputError(f"{folder} has no {WEIGHTS}; allowed is an autoencoder saved as safetensors") from None
