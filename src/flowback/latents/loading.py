"""Autoencoders by name: a folder or hub id of any kind."""

import shutil
from pathlib import Path
from typing import Any

import torch

from flowback.core.errors import InputError
from flowback.core.files import typed_path
from flowback.flow.io import find_folder
from flowback.latents.autoencoder import Autoencoder, AutoencoderConfig, read_description
from flowback.latents.joint import JointAutoencoder
from flowback.latents.kl import KLAutoencoder
from flowback.latents.semantic import SemanticAutoencoder

KINDS: dict[str, type[Autoencoder]] = {  # by what their config.json calls them
    "AutoencoderKL": KLAutoencoder,
    "SemanticAutoencoder": SemanticAutoencoder,
    "JointAutoencoder": JointAutoencoder,
}
INSIDE = ("vae", "autoencoder")  # folders of a diffusers pipeline, and of a run that trained one


def read_config(name: str, posterior: str = "mean") -> AutoencoderConfig:
    """What a flow has to know of the autoencoder in a folder, or on the hub.

    Args:
        name: of the folder, or hub id.
        posterior: "mean" or "sample": which latent stands for an image.

    Raises:
        InputError: if there is none.
    """
    folder, local = _folder(name), Path(typed_path(name))
    return _kind_in(folder).facts(folder, str(local.resolve()) if local.is_dir() else name, posterior)


@torch.inference_mode(False)  # tensors that are made in it never get a gradient
def load_autoencoder(config: str | AutoencoderConfig, posterior: str = "mean") -> Autoencoder:
    """Load an autoencoder by name, or the one that a flow was trained with; frozen.

    Args:
        config: a folder or hub id; or what a flow knows of its own.
        posterior: with a name: "mean" or "sample", which latent stands for an image.

    Raises:
        InputError: if there is none, or its weights are not those that the flow was trained with.
    """
    if isinstance(config, str):
        config = read_config(config, posterior)
    assert config.name is not None
    folder, name = _folder(config.name), config.name
    kind = _kind_in(folder)
    found = kind.facts(folder, name, config.posterior)
    if found.weights != config.weights:
        raise InputError(
            f"the autoencoder {name} must have the weights {config.weights}, in whose latents the flow was trained, "
            f"got {found.weights}"
        )
    for fact in ("kind", "channels", "downsample", "image_channels", "image_size"):
        if getattr(found, fact) != getattr(config, fact):
            raise InputError(f"the autoencoder {name} has {fact} {getattr(found, fact)}, the flow {getattr(config, fact)}")
    return kind.load(folder, config)


def build_autoencoder(model: str, description: dict[str, Any], folder: Path) -> Autoencoder:
    """An autoencoder that was trained together with a flow, as the flow's config.json in `folder` describes it; no weights.

    Raises:
        InputError: if it describes none.
    """
    kind = _kind(model, folder)
    if kind is not JointAutoencoder:
        raise InputError(f"{folder / 'config.json'} must name a JointAutoencoder as trained with the flow, got {model}")
    return kind.build(description, kind.known(description, None, "", folder), folder)


def copy_files(name: str, target: Path) -> None:
    """Copy the files of an autoencoder, by folder or hub id, into a folder.

    Raises:
        InputError: if there is none.
    """
    source = _folder(name)
    kind = _kind_in(source)
    kind.facts(source, name, "mean")  # which says what is missing
    target.mkdir(parents=True, exist_ok=True)
    for file in (file for file in kind.files if (source / file).is_file()):
        shutil.copyfile(source / file, target / file)


def _folder(name: str) -> Path:
    patterns = sorted({file for kind in KINDS.values() for file in kind.files})
    folder = find_folder(name, [*patterns, *(f"{inside}/{file}" for inside in INSIDE for file in patterns)])
    found = next((folder / inside for inside in INSIDE if (folder / inside).is_dir()), folder)
    if found == folder and (folder / "checkpoints").is_dir():
        raise InputError(
            f"{name} is a run that has not ended, or one of a flow; use the folder that `flowback autoencoder export` "
            "makes of it"
        )
    return found


def _kind_in(folder: Path) -> type[Autoencoder]:
    """Which kind of autoencoder lies in a folder, by its config.json.

    Raises:
        InputError: if there is none.
    """
    description = read_description(folder)
    return _kind(description.get("_class_name") or description.get("model"), folder)


def _kind(model: Any, folder: Path) -> type[Autoencoder]:
    if not isinstance(model, str) or model not in KINDS:
        raise InputError(f"{folder / 'config.json'} does not describe an autoencoder; expected one of {', '.join(KINDS)}")
    return KINDS[model]
