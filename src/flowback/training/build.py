"""The flow and the alignment that a configuration describes."""

from dataclasses import replace
from pathlib import Path

import torch

from flowback.alignment import Alignment, load_encoder
from flowback.data import ImageSet
from flowback.errors import InputError
from flowback.flows import FlowConfig, TarFlow
from flowback.training.config import AlignmentConfig


def build_flow(config: FlowConfig, data: ImageSet) -> TarFlow:
    """The flow for a data set: what the recipe leaves open comes from the data; what it sets must agree.

    Raises:
        InputError: if the recipe's image size, channels or levels are not the data's.
    """
    facts = {"image_size": data.image_size, "channels": data.channels, "levels": data.levels}
    for name, value in facts.items():
        if getattr(config, name) not in (None, value):
            raise InputError(f"flow.{name} is {getattr(config, name)}; allowed for the data set {data.name}: {value}")
    classes = len(data.classes) if config.num_classes is None else config.num_classes
    if classes not in (0, len(data.classes)):
        raise InputError(f"flow.num_classes is {classes}; allowed here: {len(data.classes)}, or 0 for no classes")
    autoencoder = config.autoencoder
    if autoencoder is not None and Path(autoencoder).is_dir():
        autoencoder = str(Path(autoencoder).resolve())  # the checkpoint may be loaded from elsewhere
    return TarFlow(**vars(replace(config, num_classes=classes, autoencoder=autoencoder, **facts)))


def make_alignment(config: AlignmentConfig, flow: TarFlow) -> Alignment:
    """The alignment that a configuration describes. An encoder of random weights has the same ones in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = load_encoder(config.encoder, config.encoder_weights, grid=flow.grid)
    where = config.at, config.strategy, config.gradient
    projector = config.projector_width, config.projector, config.spatial_norm
    return Alignment(flow, encoder, *where, config.weight, *projector)
