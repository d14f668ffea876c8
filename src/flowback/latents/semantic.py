"""An autoencoder in whose latents meaning lives: a frozen vision model's features, in few channels.

Images -> encoder -> compressor -> latents (+ noise) -> expander -> decoder -> images, as in FAE (arXiv 2512.07829) and
SRC-Flow (arXiv 2605.18267); the decoder is one of features, and has seen noise (RAE, arXiv 2510.11690). The encoder is
known by its name and weights, and is not saved with the rest unless its weights cannot be had otherwise.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from flowback.core.devices import autocast, put
from flowback.core.errors import InputError
from flowback.core.files import save_tensors
from flowback.encoders import Carrier, TimmEncoder, load_encoder, match_grid
from flowback.latents.autoencoder import BATCH, WEIGHTS, Autoencoder, AutoencoderConfig, check_numbers
from flowback.latents.compressors import COMPRESSORS, Compressor, Learned, make_compressor
from flowback.latents.decoders import DECODERS

ENCODER = "encoder.safetensors"  # beside the weights, where the encoder's are not the published ones
PRECISIONS = ("32-true", "bf16-mixed")
MOST_LATENTS = 2**12  # of an image
MOST_LAYERS = 100


@dataclass(frozen=True, kw_only=True)
class SemanticConfig:
    """An autoencoder in the features of a frozen vision model.

    Args:
        encoder: efficientnet_lite0 (ships with its weights), dinov2_b, dinov2_l, dinov3_b, clip_b, mae_b, siglip_b, or any
            timm model name.
        encoder_weights: a local file of weights, or random; null for the shipped ones or the hub.
        encoder_precision: 32-true, or bf16-mixed (autocast).
        compressor: pca (closed form), attention (one layer, FAE) or transformer (SRC).
        channels: of the latents.
        downsample: image pixels per latent, along a side; the encoder sees images resized so that it has as many features.
        width: of the compressor's transformers, a multiple of 32.
        layers: of them, each way; of attention, of the way back.
        feature_weight: of the squared error of features that come back, over their variance; pca needs none.
        decoder: transformer (a ViT) or conv.
        decoder_width: of its layers, a multiple of 32; conv halves it on each finer grid, down to 32.
        decoder_layers: in all of a transformer; residual blocks on each grid of conv.
        noise_std: the strongest noise on latents that the decoder is trained with; a flow should have at most this.

    Raises:
        InputError: if a value is impossible.
    """

    encoder: str = "efficientnet_lite0"
    encoder_weights: str | None = None
    encoder_precision: str = "32-true"
    compressor: str = "pca"
    channels: int = 32
    downsample: int = 4
    width: int = 256
    layers: int = 4
    feature_weight: float = 1.0
    decoder: str = "conv"
    decoder_width: int = 128
    decoder_layers: int = 2
    noise_std: float = 0.4

    def __post_init__(self) -> None:
        for name, allowed in (("encoder_precision", PRECISIONS), ("compressor", COMPRESSORS), ("decoder", DECODERS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"semantic.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("channels", "downsample", "layers", "decoder_layers"):
            if getattr(self, name) < 1:
                raise InputError(f"semantic.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("layers", "decoder_layers"):
            if getattr(self, name) > MOST_LAYERS:
                raise InputError(f"semantic.{name} must be at most {MOST_LAYERS}, got {getattr(self, name)}")
        for name in ("width", "decoder_width"):
            if getattr(self, name) < 32 or getattr(self, name) % 32:
                raise InputError(f"semantic.{name} must be a multiple of 32, got {getattr(self, name)}")
        for name in ("feature_weight", "noise_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"semantic.{name} must be a number of at least 0, got {getattr(self, name)}")


class SemanticAutoencoder(Carrier, Autoencoder):
    """Compressed features of a frozen encoder as latents.

    Args:
        options: what it is made of.
        config: what a flow has to know of it; with the size of images, for which encoder and positions are made.
        encoder: of the grid of latents.
    """

    kind = "semantic"
    files = ("config.json", WEIGHTS, ENCODER)
    encoder: Any  # a TimmEncoder
    seen: Tensor  # what the encoder makes of a known picture, [F], by which another one is told

    def __init__(self, options: SemanticConfig, config: AutoencoderConfig, encoder: TimmEncoder) -> None:
        super().__init__(config)
        assert config.image_size is not None
        self.options, self.grid = options, config.latent_size(config.image_size)
        self.carry("encoder", encoder)
        self.compressor, self.decoder = _nets(options, config, encoder.dim)
        self.register_buffer("seen", self._look())

    @classmethod
    def new(cls, options: SemanticConfig, image_size: tuple[int, int], image_channels: int) -> Self:
        """One to fit and to train, for images of a size and number of channels.

        Raises:
            InputError: if the size is no multiple of `downsample`, or the encoder cannot be had.
        """
        config = cls.planned(options, image_size, image_channels)
        return cls(options, config, _encoder(options, config, options.encoder_weights))

    @classmethod
    def planned(cls, options: SemanticConfig, image_size: tuple[int, int], image_channels: int) -> AutoencoderConfig:
        """What a flow will have to know of one that is not made yet.

        Raises:
            InputError: if the size is no multiple of `downsample`, or has too many latents.
        """
        planned = AutoencoderConfig.planned(cls.kind, options, image_size, image_channels)
        if math.prod(planned.latent_size(image_size)) > MOST_LATENTS:
            raise InputError(
                f"semantic.downsample must leave at most {MOST_LATENTS} latents of an image of {list(image_size)} pixels, "
                f"got {options.downsample}"
            )
        return planned

    def features(self, images: Tensor) -> Tensor:
        """The encoder's features of images `[B, C, H, W]` on the grid of latents, `[B, P, F]`."""
        with autocast(self.device, self.options.encoder_precision):
            features = self.encoder(put(images, self.device))
        return match_grid(features.to(images.dtype), self.encoder.grid, self.grid)

    def fit(self, images: Iterable[Tensor]) -> None:
        """Mean and spread of the features, and the principal components, of batches of images `[B, C, H, W]`."""
        with torch.no_grad():
            self.compressor.fit(self.features(part) for batch in images for part in batch.split(BATCH))

    def reconstruct(
        self, images: Tensor, noise: Tensor, levels: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Autoencoder.reconstruct`, with noise of `levels * noise_std` on the latents.

        `features` of the images, `[B, P, F]`, spare the encoder. The term of learned compressors is "latents": how far the
        features are off that come back.
        """
        compressor = self.compressor
        if features is None:
            with torch.no_grad():
                features = self.features(images)
        latents = compressor.compress(features)
        noise = noise.flatten(2).transpose(1, 2) * (levels * self.options.noise_std).view(-1, 1, 1)
        back = compressor.standardize(compressor.expand(latents + noise))
        terms = {}
        if isinstance(compressor, Learned):
            terms["latents"] = self.options.feature_weight * (back - compressor.standardize(features)).square().mean()
        return self.decoder(back), terms

    @torch.no_grad()
    def settle(self, images: Tensor) -> None:
        """Give the latents mean 0 and variance 1, which averaged weights no longer have exactly."""
        if isinstance(self.compressor, Learned):
            self.compressor.settle(self.features(part) for part in images.split(BATCH))

    def _moments(self, images: Tensor) -> Tensor:
        return self.compressed(self.features(images))

    def compressed(self, features: Tensor) -> Tensor:
        """What `moments` makes of images with these features `[B, P, F]`."""
        features = put(features, self.device).to(self.scale.dtype)
        return self.compressor.compress(features).transpose(1, 2).unflatten(2, self.grid)

    def _decode(self, latents: Tensor) -> Tensor:
        features = self.compressor.expand(latents.flatten(2).transpose(1, 2))
        return self.decoder(self.compressor.standardize(features))

    def describe(self) -> dict[str, Any]:
        """What config.json holds: facts, and the options."""
        return {**super().describe(), "options": asdict(self.options)}

    def save_pretrained(self, path: str | Path, with_encoder: bool = False) -> None:
        """Write config.json and model.safetensors into the folder `path`.

        And encoder.safetensors, if it is asked for, or if the encoder's weights are not the published ones.
        """
        super().save_pretrained(path)
        if with_encoder or self.options.encoder_weights is not None:
            save_tensors(self.encoder.model.state_dict(), Path(path) / ENCODER)

    @classmethod
    def build(cls, description: dict[str, Any], config: AutoencoderConfig, folder: Path) -> Self:
        """The autoencoder that a config.json in `folder` describes, without its weights; its encoder has them.

        Raises:
            InputError: if it describes none, or the encoder cannot be had.
        """
        own = folder / ENCODER
        try:
            options = SemanticConfig(**description["options"])
            if cls.planned(options, config.image_size or (0, 0), config.image_channels) != replace(
                config, name=None, weights=""
            ):
                raise ValueError("its options do not fit its facts")
            encoder = _encoder(options, config, str(own) if own.is_file() else options.encoder_weights)
            check_numbers(lambda: nn.ModuleList(_nets(options, config, encoder.dim)), folder / WEIGHTS)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{folder / 'config.json'} does not describe a semantic autoencoder ({error})") from error
        return cls(options, config, encoder)

    @classmethod
    def load(cls, folder: Path, config: AutoencoderConfig) -> Self:
        """The autoencoder in a folder, frozen.

        Raises:
            InputError: if it is not whole, or its encoder is not that of training.
        """
        made = super().load(folder, config)
        if (made._look() - made.seen).norm() > 0.05 * made.seen.norm():
            raise InputError(
                f"the encoder {made.options.encoder} must be the one that the autoencoder in {folder} was trained with; "
                "this one sees a known picture otherwise"
            )
        return made

    @torch.no_grad()
    def _look(self) -> Tensor:
        height, width = self.encoder.size
        rows, columns = torch.linspace(0, 9, height)[:, None], torch.linspace(0, 12, width)
        picture = (rows * columns / 3).sin() * (rows - columns).cos()
        return self.features(picture.expand(1, self.config.image_channels, -1, -1).to(self.scale)).mean(dim=(0, 1))


def _nets(options: SemanticConfig, config: AutoencoderConfig, dim: int) -> tuple[Compressor, nn.Module]:
    """The compressor and the decoder, for features of size `dim`."""
    o, grid = options, config.latent_size(cast(Any, config.image_size))
    compressor = make_compressor(o.compressor, dim, o.channels, grid[0] * grid[1], o.width, o.layers)
    sizes = dim, config.image_channels, grid, o.downsample, o.decoder_width, o.decoder_layers
    return compressor, DECODERS[o.decoder](*sizes)


def _encoder(options: SemanticConfig, config: AutoencoderConfig, weights: str | None) -> TimmEncoder:
    """The encoder, for the grid of latents."""
    assert config.image_size is not None
    return load_encoder(options.encoder, weights, config.latent_size(config.image_size))
