"""The flow and the alignment that a configuration describes."""

from dataclasses import replace
from typing import Any

import torch

from flowback.alignment import Alignment
from flowback.core.errors import InputError
from flowback.core.units import as_size
from flowback.data import ImageSet
from flowback.encoders import load_encoder
from flowback.flow.tarflow import TarFlow
from flowback.latents import Autoencoder, AutoencoderConfig, load_autoencoder
from flowback.runs.config import AlignmentConfig, LatentConfig, RunConfig


def build_flow(config: RunConfig, data: ImageSet, autoencoder: AutoencoderConfig | None = None) -> TarFlow:
    """The flow for a data set: what the recipe leaves open comes from the data; what it sets must agree.

    Args:
        config: of the run.
        data: its images.
        autoencoder: what is known of the one in whose latents the flow works; None for pixels.

    Raises:
        InputError: if the recipe's image size, channels or levels are not the data's, or the autoencoder's.
    """
    flow, size, of = config.flow, data.image_size, f"the data set {data.name}"
    facts: dict[str, Any] = {"image_size": size, "channels": data.channels, "levels": data.levels}
    if autoencoder is not None:
        if autoencoder.image_channels != data.channels:
            raise InputError(
                f"images of {data.channels} channels do not fit {autoencoder.name}; allowed is {autoencoder.image_channels}"
            )
        if flow.noise != "gaussian":
            raise InputError(f"flow.noise is {flow.noise!r}; allowed in latents, which have no bins: gaussian")
        size = autoencoder.latent_size(size if isinstance(size, tuple) else (size, size))
        facts, of = {"image_size": as_size(size, "the size"), "channels": autoencoder.channels}, "these latents"
    for name, value in facts.items():
        if getattr(flow, name) not in (None, value):
            raise InputError(f"flow.{name} is {getattr(flow, name)}; allowed for {of}: {value}")
    classes = len(data.classes) if flow.num_classes is None else flow.num_classes
    if classes not in (0, len(data.classes)):
        raise InputError(f"flow.num_classes is {classes}; allowed here: {len(data.classes)}, or 0 for no classes")
    return TarFlow(replace(flow, num_classes=classes, **facts))


def make_autoencoder(config: LatentConfig) -> Autoencoder | None:
    """The autoencoder that a configuration names, if it does."""
    return None if config.autoencoder is None else load_autoencoder(config.autoencoder, config.posterior)


def make_alignment(config: AlignmentConfig, flow: TarFlow) -> Alignment:
    """The alignment that a configuration describes. An encoder of random weights has the same ones in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = load_encoder(config.encoder, config.encoder_weights, grid=flow.grid)
    where = config.at, config.strategy, config.gradient
    projector = config.projector_width, config.projector, config.spatial_norm
    return Alignment(flow, encoder, *where, config.weight, *projector)
