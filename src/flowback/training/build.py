"""The flow and the alignment that a configuration describes, and what a caller gives in place of what it names."""

import os
import re
from dataclasses import fields, replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from flowback.alignment import Alignment
from flowback.core.errors import InputError
from flowback.core.units import as_size
from flowback.data import DataConfig, ImageSet, Split
from flowback.data.datasets import OWN, SOURCES
from flowback.data.splits import MemorySplit
from flowback.encoders import Encoder, load_encoder
from flowback.flow.config import FlowConfig
from flowback.flow.tarflow import TarFlow
from flowback.latents import Autoencoder, AutoencoderConfig, Flow, LatentFlow, load_autoencoder
from flowback.latents.joint import JointAutoencoder, JointConfig
from flowback.runs.checkpoint import known_classes, load_flow
from flowback.runs.config import AlignmentConfig, LatentConfig, RunConfig

OF_JOINT_TRAINING = ("nll_weight", "align_encoder", "mask_patch", "dead_below", "most_dead")  # they change no weights


def settle(config: RunConfig, data: Any = None, encoder: Encoder | None = None, flow: Flow | None = None) -> RunConfig:
    """The configuration of a run that is given its own data, encoder or flow: it says so, and has the flow's options.

    Raises:
        InputError: if the configuration sets something else.
    """
    if data is not None:
        own = DataConfig(name=OWN, workers=config.data.workers, unreadable=config.data.unreadable)
        config = replace(config, run=str(config.folder), data=own)
    if encoder is not None:
        a, known = config.alignment, fingerprint(encoder)
        if a.strategy == "none":
            raise InputError("alignment.strategy must be forward, detach or reverse with an encoder, got 'none'")
        cache = a.cache and known is not None
        config = replace(config, alignment=replace(a, encoder=OWN, encoder_weights=known, cache=cache))
    begun = config.folder / "config.yaml"
    if flow is not None:
        inside = flow.autoencoder if isinstance(flow, LatentFlow) else None
        joint = inside.options if isinstance(inside, JointAutoencoder) and inside.config.name is None else None
        return _inherit(config, flow.core.config, inside and inside.config, joint, flow.image_size, flow.channels)
    if config.train.init is not None and config.train.resume and begun.is_file():
        run = RunConfig.read(begun)
        joint = run.joint if run.latents.joint else None
        return _inherit(config, run.flow, run.latents, joint, run.data.image_size, run.data.channels)
    return config


def first_flow(config: RunConfig) -> tuple[Flow | None, str]:
    """The flow that a new run begins with, if it names one, and what that is.

    Raises:
        InputError: if it cannot be loaded.
    """
    if config.train.init is None or config.train.resume:
        return None, ""
    flow, weights = load_flow(os.path.expanduser(config.train.init))
    return flow, f"{weights} of {config.train.init}"


def _inherit(
    config: RunConfig,
    has: FlowConfig,
    latents: AutoencoderConfig | LatentConfig | None,
    joint: JointConfig | None,
    image_size: int | tuple[int, int] | None,
    channels: int | None,
) -> RunConfig:
    """The configuration with the options of a flow to begin with, but for those that are the data's.

    Images on disk are read in the flow's size and channels where the configuration leaves these open.
    """
    wanted, data = config.flow, config.data
    if data.name in SOURCES:
        size, channels = data.image_size or image_size, data.channels or channels
        config = replace(config, data=replace(data, image_size=size, channels=channels if channels in (1, 3) else None))
    has = replace(has, num_classes=wanted.num_classes, levels=wanted.levels, prior="standard")  # which is what is trained
    if has.positions == "rotary":
        has = replace(has, image_size=wanted.image_size)
    inside = config.latents
    if joint is not None:
        inside, wanted = replace(inside, joint=True), replace(wanted, noise_std=has.noise_std)
        joint = replace(joint, **{name: getattr(config.joint, name) for name in OF_JOINT_TRAINING})
        _refuse_contradiction("joint", config.joint, joint)
    elif latents is not None:
        name = latents.name if isinstance(latents, AutoencoderConfig) else latents.autoencoder
        inside = replace(inside, autoencoder=name, posterior=latents.posterior)
        _refuse_contradiction("latents", config.rooted().latents, inside)
    _refuse_contradiction("flow", wanted, has)
    return replace(config, flow=has, latents=inside, joint=joint or config.joint)


def kept_classes(start: Flow, classes: list[str]) -> list[int | None]:
    """For each class its number in a flow to begin with; None for a new one.

    Classes are known by name. Where a flow's names are not, they are known by number if they are as many.
    """
    names = known_classes(start)
    if names is None:
        names = classes if len(classes) == start.num_classes else []
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers.get(name) for name in classes]


def describe_start(what: str, start: Flow, classes: list[str]) -> str:
    """What a run begins with, in a line; `classes` are those that its flow has."""
    if not classes:
        return f"begins    with {what}" + ", without its classes" * bool(start.num_classes)
    known = sum(number is not None for number in kept_classes(start, classes))
    by = " by number" * (known > 0 and known_classes(start) is None)
    return f"begins    with {what}: {known} of {len(classes)} classes known{by}, {len(classes) - known} new"


@torch.no_grad()
def _begin_with(built: TarFlow, start: TarFlow, kept: list[int | None]) -> None:
    """Copy the weights of a flow. A new class begins as what the flow does without a label, up to its initialization."""
    own, state = built.state_dict(), start.state_dict()
    state.pop("prior_std", None)
    for number in range(built.config.blocks):
        embed, bias = f"blocks.{number}.class_embed", f"blocks.{number}.proj_in.bias"
        old = state.pop(embed, state[bias].new_zeros(0, built.config.width))
        unlabeled = old.sum(0) / max(1, len(old))
        if embed in own:
            rows = [row + unlabeled if k is None else old[k] for row, k in zip(own[embed], kept, strict=True)]
            state[embed] = torch.stack(rows)
        else:
            state[bias] = state[bias] + unlabeled
    built.load_state_dict(state)


def _refuse_contradiction(section: str, wanted: Any, has: Any) -> None:
    """Whether all options that are set, and so not their defaults, are what the given flow has."""
    for field in fields(wanted):
        value, own = getattr(wanted, field.name), getattr(has, field.name)
        if value not in (field.default, own):
            raise InputError(f"{section}.{field.name} must be {own!r} for this flow, got {value!r}")


def fingerprint(encoder: Encoder) -> str | None:
    """A hash of an encoder's structure and tensors; None if it has no tensors, so that nothing tells it from others."""
    tensors = encoder.state_dict() if isinstance(encoder, nn.Module) else {}
    digest = sha256(re.sub("0x[0-9a-f]+", "", repr(encoder)).encode())  # without addresses
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if tensors else None


def as_image_set(data: Any) -> ImageSet:
    """A data set of one's own: what it does not say is read off its images.

    Args:
        data: an `ImageSet`; or anything with `train` and `held_out`, each a `Split` or a pair of images (uint8
            `[n, C, H, W]`) and labels `[n]`, and, if it likes, `name`, `classes` and `levels`.

    Raises:
        InputError: if it is neither.
    """
    if isinstance(data, ImageSet):
        return data
    try:
        train, held_out = (s if isinstance(s, Split) else MemorySplit(*s) for s in (data.train, data.held_out))
        images, labels = train[[0]][0], torch.cat([train.labels, held_out.labels])
        (_, channels, *size), count = images.shape, int(labels.max()) + 1
        classes = [str(name) for name in getattr(data, "classes", range(count))]
        if images.dtype != torch.uint8 or len(size) != 2 or count > len(classes):
            raise TypeError(f"{images.dtype} {list(images.shape)}, {count} labels, {len(classes)} classes")
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"the data set cannot be used ({error}); expected an ImageSet, or an object with train and held_out, each a "
            "Split or a pair of images, uint8 [n, C, H, W], and labels [n]"
        ) from error
    name, levels = getattr(data, "name", type(data).__name__), getattr(data, "levels", 256)
    return ImageSet(name, train, held_out, classes, as_size(size, "the size"), channels, levels)


def build_flow(
    config: RunConfig, data: ImageSet, autoencoder: AutoencoderConfig | None = None, start: Flow | None = None
) -> TarFlow:
    """The flow for a data set: what the recipe leaves open comes from the data; what it sets must agree.

    Args:
        config: of the run.
        data: its images.
        autoencoder: what is known of the one in whose latents the flow works; None for pixels.
        start: a flow whose weights to begin with, of the same configuration but for what is the data's; None for random
            ones.

    Raises:
        InputError: if the recipe's image size, channels or levels are not the data's, or the autoencoder's.
    """
    flow, of = config.flow, f"the data set {data.name}"
    facts: dict[str, Any] = {"image_size": as_size(data.size, "the size"), "channels": data.channels, "levels": data.levels}
    if autoencoder is not None:
        if autoencoder.image_channels != data.channels:
            raise InputError(
                f"images of {data.channels} channels do not fit {autoencoder.name}; expected {autoencoder.image_channels}, "
                "data.channels"
            )
        if flow.noise != "gaussian":
            raise InputError(f"flow.noise must be gaussian in latents, which have no bins, got {flow.noise!r}")
        size = autoencoder.latent_size(data.size)
        facts, of = {"image_size": as_size(size, "the size"), "channels": autoencoder.channels}, "these latents"
    for name, value in facts.items():
        if getattr(flow, name) not in (None, value):
            why = "" if start is None else ", of the flow to begin with"
            why += "; other sizes need rotary positions" * (bool(why) and name == "image_size")
            raise InputError(f"flow.{name} must be {value} for {of}, got {getattr(flow, name)}{why}")
    classes = len(data.classes) if flow.num_classes is None else flow.num_classes
    if flow.num_classes is None and classes < 2 and config.data.path is not None:
        raise InputError(
            f"data.path {config.data.path} has {classes} class{'es' * (classes != 1)}; expected at least 2; "
            "--flow.num_classes 0 makes an unconditional flow of it"
        )
    if classes not in (0, len(data.classes)):
        raise InputError(f"flow.num_classes must be {len(data.classes)} here, or 0 for no classes, got {classes}")
    built = TarFlow(replace(flow, num_classes=classes, **facts))
    if start is not None:
        _begin_with(built, start.core, kept_classes(start, data.classes if classes else []))
    return built


def make_autoencoder(config: RunConfig, data: ImageSet, start: Flow | None = None) -> Autoencoder | None:
    """The autoencoder that a configuration names, or that is trained with the flow; None where the flow works in pixels.

    Args:
        config: of the run.
        data: its images.
        start: a flow to begin with, whose autoencoder is taken.
    """
    given = start.autoencoder if isinstance(start, LatentFlow) else None
    if config.latents.joint:
        made = JointAutoencoder.new(config.joint, data.size, data.channels)
        if given is not None:
            made.load_state_dict(given.state_dict())
        return made
    if given is not None:
        return given
    return (
        None
        if config.latents.autoencoder is None
        else load_autoencoder(config.latents.autoencoder, config.latents.posterior)
    )


def make_encoder(config: AlignmentConfig, flow: TarFlow, encoder: Encoder | None = None) -> Encoder:
    """The encoder that a configuration names, on the flow's grid, or the given one.

    Raises:
        InputError: if it was given to `train` and is not now.
    """
    if encoder is None and config.encoder == OWN:
        raise InputError(f"alignment.encoder is {OWN}: it was given in Python; pass it to train(config, encoder=...)")
    return encoder or load_encoder(config.encoder, config.encoder_weights, grid=flow.grid)


def make_alignment(config: AlignmentConfig, flow: TarFlow, encoder: Encoder | None = None) -> Alignment:
    """The alignment that a configuration describes, with the encoder of `make_encoder`."""
    encoder = make_encoder(config, flow, encoder)
    where = config.at, config.strategy, config.gradient
    projector = config.projector_width, config.projector, config.spatial_norm
    return Alignment(flow, encoder, *where, config.weight, *projector, separate_projectors=config.separate_projectors)
