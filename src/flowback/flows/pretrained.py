"""Flows from disk or from the hub: strict, and never a pickle."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flowback.errors import InputError
from flowback.files import read_json
from flowback.flows.calibration import FILE as CALIBRATION

STANDARDS = "classification.json"
FILES = ("config.json", "model.safetensors", CALIBRATION, STANDARDS, "classes.json", "autoencoder/*")

if TYPE_CHECKING:
    from flowback.flows.tarflow import TarFlow


def save_folder(flow: "TarFlow", folder: Path) -> None:
    """Write what `TarFlow.from_pretrained` reads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in flow.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    config = {"model": "TarFlow", "format": 1, **asdict(flow.config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, extra in ((CALIBRATION, flow.calibration), (STANDARDS, flow.standards)):
        if extra is not None:
            extra.save(folder)
        else:
            (folder / name).unlink(missing_ok=True)  # of another flow


def load_standards(folder: Path, classes: int) -> Any:
    """The standards of classification in a folder, `flowback.classify.Standards`, or None."""
    from flowback.classify import Standards

    return Standards.load(folder / STANDARDS, classes)


def read_config(folder: Path) -> dict[str, Any]:
    """The options of the flow in a folder.

    Raises:
        InputError: if its config.json is missing, or of something else.
    """
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no readable config.json of a flow ({error})") from None
    if not isinstance(config, dict) or config.pop("model", None) != "TarFlow" or config.pop("format", None) != 1:
        raise InputError(f"{folder / 'config.json'} does not describe a TarFlow of format 1")
    return config


def load_tensors(module: nn.Module, file: Path) -> None:
    """Load a safetensors file into a module, strictly; the module takes the precision of the file, at least float32.

    Half precision saves room on disk. Exact inverses and likelihoods need more, and `torch.autocast` is there for speed.

    Raises:
        InputError: naming the first tensor that is missing, superfluous or of another shape, or an unreadable file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as safetensors ({error})") from None
    expected = module.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise InputError(f"{file} lacks the tensor {name}")
        if name not in expected:
            raise InputError(f"{file} has a tensor {name} that the model does not know")
        if expected[name].shape != found[name].shape:
            raise InputError(
                f"{file} has {name} of shape {list(found[name].shape)}; allowed is {list(expected[name].shape)}"
            )
    dtype = torch.promote_types(next(iter(found.values())).dtype, torch.float32)
    module.to(dtype).load_state_dict(found)


def pretrained_folder(path_or_hub_id: str, files: Sequence[str] = FILES) -> Path:
    """The folder of a flow, or of another model of these `files`: a local one, or the Hugging Face hub's `owner/name`.

    Raises:
        InputError: if there is neither.
    """
    folder = Path(path_or_hub_id)
    if folder.exists():
        return folder
    if path_or_hub_id.count("/") != 1 or path_or_hub_id.startswith((".", "/", "~")):
        raise InputError(f"{path_or_hub_id} is neither a folder nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=list(files)))
    except Exception as error:  # the hub client raises many kinds: offline, unknown name, no access
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path_or_hub_id} is no local folder and the hub did not give it ({reason})") from None
