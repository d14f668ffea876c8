"""Checkpoints: folders `checkpoints/step_00000500` that hold everything a run needs to go on. Nothing is pickled.

config.json, model.safetensors    the flow with its averaged (EMA) weights, as `TarFlow.save_pretrained` writes it
training.safetensors              all that is trained: the raw weights, buffers, and AdamW's state, tensor by tensor
state.json                        step, seconds of training, steps that were skipped, the last held-out likelihood
checksums.json                    SHA-256 of all the others, by which a damaged checkpoint is known

Processes that hold slices each write theirs, `training-00001-of-00002.safetensors`; any number of processes reads them.
"""

import errno
import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from flowback.core.devices import pick_device
from flowback.core.distributed import in_all, is_shard, unsharded
from flowback.core.errors import InputError
from flowback.core.files import file_hash, read_json
from flowback.flow.defaults import Defaults
from flowback.flow.io import find_folder
from flowback.flow.student import Student
from flowback.latents import Autoencoder, Flow, LatentFlow, from_pretrained, load_autoencoder
from flowback.runs import slices
from flowback.runs.config import CLASSES

STEM = "training"
FLOWS = ("TarFlow", "LatentFlow")  # what config.json calls them
CHECKSUMS = "checksums.json"
NO_FOLDER_SYNC = {errno.EACCES, errno.EISDIR, errno.EBADF, errno.EINVAL}  # where a system or file system has none


@dataclass
class State:
    """Where a run stands."""

    step: int = 0  # steps done
    seconds: float = 0.0  # of training, evaluation excluded
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0
    held_out_nats_per_dim: float | None = None  # as last measured; None where that was not finite
    measured_at: int = 0  # the step of that

    @classmethod
    def read(cls, checkpoint: Path) -> "State":
        """What a checkpoint's state.json says.

        Raises:
            InputError: if it is missing, or says something else.
        """
        try:
            state = cls(**read_json(checkpoint / "state.json"))
            if not all(isinstance(value, int | float | None) for value in vars(state).values()):
                raise TypeError(f"{vars(state)}")
            return state
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{checkpoint} has no usable state.json of a run ({error})") from error


def all_of(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first: of all folders there those that `save` named and finished."""
    return sorted(filter(_is_ours, (run / "checkpoints").glob("step_*")), reverse=True)


def _is_ours(folder: Path) -> bool:
    """Whether `save` wrote a folder, damaged though it may be; not a copy of one under another name."""
    if not re.fullmatch(r"step_[0-9]{8}", folder.name) or not os.path.isfile(folder / CHECKSUMS):
        return False
    try:
        return State.read(folder).step == int(folder.name.removeprefix("step_"))
    except InputError:
        return True


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run, if it has any."""
    return next(iter(all_of(run)), None)


def holds_flow(folder: Path) -> bool:
    """Whether a folder is that of a flow, or of a run that trained one; an autoencoder's is not."""
    try:
        described = read_json((newest(folder) or folder) / "config.json")
    except (OSError, ValueError):
        return newest(folder) is not None  # a damaged one, of which whoever loads it is told
    return isinstance(described, dict) and described.get("model") in FLOWS


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint on disk, a sentence; None if it is what was written."""
    try:
        known = read_json(checkpoint / CHECKSUMS)
        for name, checksum in known.items():
            if Path(name).name != name or not (checkpoint / name).is_file():  # of a stranger's it may be any device
                return f"{checkpoint / CHECKSUMS} names {name}, which is no file beside it"
            if file_hash(checkpoint / name) != checksum:
                return f"{checkpoint / name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{checkpoint} is not whole ({error})"
    for name in ("config.json", "model.safetensors", STEM, "state.json"):
        if not any(file.startswith(name) or file.endswith(f"_{name}") for file in known):
            return f"{checkpoint / CHECKSUMS} lacks {name}"
    return None


def save(
    run: Path,
    state: State,
    average: Flow | Autoencoder | Student,
    trained: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    keep: int,
    fabric: Any,
) -> Path:
    """Write a checkpoint beside the others, then rename it to its name, so that a name always means a whole one.

    Of the others the newest are kept, and the one with the best held-out likelihood that was measured at its step. All
    processes call this; those that hold slices write them, the first one does the rest.

    Args:
        run: the run's folder.
        state: where the run stands.
        average: the flow, or the autoencoder, with averaged weights.
        trained: the modules whose raw parameters are trained, by name.
        optimizer: of exactly those parameters, in their order.
        keep: how many of the newest checkpoints to keep.
        fabric: the run's Fabric.

    Raises:
        InputError: if it cannot be written, to a full disk perhaps; the others are untouched.
    """
    final = run / "checkpoints" / f"step_{state.step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    tensors = _tensors(trained, optimizer)
    writers = fabric.world_size if any(map(is_shard, tensors.values())) else 1
    own = partial / slices.file_name(STEM, fabric.global_rank, writers)

    def begin() -> dict[str, str]:
        if not fabric.is_global_zero:
            return {}
        if partial.exists():
            shutil.rmtree(partial)
        average.save_pretrained(partial)
        (partial / "state.json").write_text(json.dumps(asdict(state), allow_nan=False) + "\n")
        return _synced(*partial.iterdir())

    def write() -> dict[str, str]:
        if fabric.global_rank >= writers:
            return {}
        slices.write(own, tensors)
        return _synced(own)

    def finish() -> None:
        if fabric.is_global_zero:
            checksums = dict(sorted(pair for told in written for pair in told.items()))
            (partial / CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n")
            _sync(partial / CHECKSUMS)
            _sync(partial)
            _make_room(final)
            partial.rename(final)
            _sync(final.parent)

    try:
        with unsharded(average):
            written = in_all(fabric, begin)
        written += in_all(fabric, write)
        in_all(fabric, finish)
    except (OSError, SafetensorError) as error:
        if fabric.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        whole = newest(run)
        raise InputError(
            f"checkpoint {final} cannot be written ({error}); make room on the disk; "
            + (f"{whole.name} is untouched, go on from it with --train.resume" if whole else "there is none before it")
        ) from error
    if fabric.is_global_zero:
        for old in set(all_of(run)[keep:]) - {_best(run)}:
            shutil.rmtree(old, ignore_errors=True)  # another process may be reading it
    return final


def _make_room(final: Path) -> None:
    """Where a checkpoint will be, delete an earlier one of the run; anything else there gets another name."""
    if final.is_symlink() or (final.exists() and not _is_ours(final)):
        final.rename(final.with_name(f"{final.name}_found_{uuid4().hex[:8]}"))
    elif final.exists():
        shutil.rmtree(final)


def _tensors(trained: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a run needs to go on, by name."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(trained):
        tensors[f"weights.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    return tensors | _named_buffers(trained)


def _best(run: Path) -> Path | None:
    """The checkpoint with the best held-out likelihood of those that were measured at their step."""
    measured = []
    for folder in all_of(run):
        try:
            state = State.read(folder)
        except InputError:
            continue
        nats = state.held_out_nats_per_dim
        if nats is not None and math.isfinite(nats) and state.measured_at == state.step:
            measured.append((nats, folder))
    return min(measured)[1] if measured else None


def _synced(*files: Path) -> dict[str, str]:
    """Have files on disk; returns their checksums by name."""
    for file in files:
        _sync(file)
    return {file.name: file_hash(file) for file in files}


def _sync(place: Path) -> None:
    """Have a file or folder on disk, not only in the system's memory; a folder only where the system can do that."""
    is_folder = place.is_dir()
    try:
        descriptor = os.open(place, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows syncs what may be written
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in NO_FOLDER_SYNC:
            raise


def load(
    checkpoint: Path, average: Flow | Autoencoder | Student, trained: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> State:
    """Read a checkpoint back into what `save` was given.

    Raises:
        InputError: if it is not whole, or of another model.
    """
    try:
        reader = slices.Reader(checkpoint, Path(average.weights_file).stem)
        for name, tensor in average.stored.state_dict().items():
            reader.fill(name, tensor)
        reader = slices.Reader(checkpoint, STEM)
        unknown = set(reader.slices)
        for name, parameter in _named(trained):
            reader.fill(f"weights.{name}", parameter)
            prefix = f"optimizer.{name}."
            keys = [key for key in reader.slices if key.startswith(prefix)]
            optimizer.state[parameter] = {key.removeprefix(prefix): _like(parameter, reader, key) for key in keys}
            unknown -= {f"weights.{name}", *keys}
        for name, buffer in _named_buffers(trained).items():
            reader.fill(name, buffer)
            unknown.discard(name)
        state = State.read(checkpoint)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"checkpoint {checkpoint} cannot be read back ({error})") from error
    if unknown:
        raise InputError(f"checkpoint {checkpoint} has a tensor {min(unknown)} that this run does not know")
    return state


def load_flow(run: str | Path, weights: str = "ema", device: torch.device | str = "cpu") -> tuple[Flow, str]:
    """The flow of a run (its newest checkpoint), of a checkpoint, or of any folder or hub id of a flow.

    Args:
        run: folder or hub id.
        weights: "ema" for the averaged weights, "raw" for those of the last step.
        device: where to put the flow; "auto" for the accelerator that is there, or else the CPU.

    Returns:
        The flow, and which weights of which checkpoint it has, to be stamped into what is measured with it.

    Raises:
        InputError: if there is no flow or no such device, or `weights` is something else.
    """
    if weights not in ("ema", "raw"):
        raise InputError(f"weights {weights!r} do not exist; expected ema, raw")
    if not str(run):
        raise InputError("the flow must be a run's folder, a checkpoint, a folder or hub id of a flow, got ''")
    source = newest(Path(run)) or run
    if Path(run).is_dir() and source == run and not (Path(run) / "config.json").exists():
        raise InputError(f"{run} holds no checkpoint and no flow; expected a run's folder, a checkpoint or a flow")
    where = pick_device(device)
    flow = from_pretrained(source)
    if weights == "raw":
        try:
            reader = slices.Reader(Path(source), STEM)
            trained: dict[str, nn.Module] = {"flow": flow.core}
            if isinstance(flow, LatentFlow) and flow.stored is flow:
                trained["autoencoder"] = flow.autoencoder
            for name, parameter in _named(trained):
                reader.fill(f"weights.{name}", parameter)
            flow.core.fitted_prior, flow.core.defaults = None, Defaults()  # those of the folder are of averaged weights
        except OSError as error:
            raise InputError(f"{source} has no raw weights; use ema") from error
        except SafetensorError as error:
            raise InputError(f"{source} has raw weights that cannot be read ({error}); use ema") from error
        except (KeyError, ValueError) as error:
            raise InputError(f"{source} has raw weights of another flow ({error}); use ema") from error
        for student in flow.core.learned.values():  # which are of the averaged weights
            student.stale = True
    name = source.name if isinstance(source, Path) else str(source)
    return flow.to(where), f"{weights} weights of {name}"


def load_trained_autoencoder(run: str | Path) -> Autoencoder:
    """The autoencoder that a run trained, alone or with a flow: that of its newest checkpoint, or of one that is named.

    Raises:
        InputError: if there is none.
    """
    folder = newest(Path(run)) or Path(run)
    if holds_flow(folder):
        flow = from_pretrained(folder)
        if not isinstance(flow, LatentFlow) or flow.stored is not flow:
            raise InputError(f"{run} holds no autoencoder that was trained with the flow; use the folder of its own")
        return flow.autoencoder
    return load_autoencoder(str(folder))


def class_names(run: str, flow: Flow) -> list[str]:
    """The class names that training left in the run's folder, or that lie with a flow of the hub; or else the numbers."""
    file = find_folder(run) / "classes.json"
    try:
        names = read_json(file) if file.is_file() else []
    except ValueError as error:
        raise InputError(f"{file} cannot be read ({error}); expected a list of names, or no such file") from error
    known = isinstance(names, list) and len(names) == flow.num_classes
    return [str(name) for name in names] if known else [str(k) for k in range(flow.num_classes)]


def known_classes(flow: Flow) -> list[str] | None:
    """The names of a flow's classes, beside it or in the run whose checkpoint it is; None where they are not known."""
    folder = flow.core.folder
    if folder is None:
        return None
    place = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    try:
        names = read_json(place / CLASSES)
    except (OSError, ValueError):
        return None
    known = isinstance(names, list) and len(names) == flow.num_classes
    return [str(name) for name in names] if known else None


def flow_folder(run: str | Path) -> Path:
    """The folder that `load_flow` takes the flow from: the newest checkpoint of a run, or the folder itself.

    Raises:
        InputError: if the flow lies in no local folder.
    """
    folder = newest(Path(run)) or Path(run)
    if not folder.is_dir():
        raise InputError(f"{run} is no folder; expected one, since something is to be stored in it")
    return folder


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module that are part of what it learned, by name: those in its `state_dict`."""
    names = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in names}


def _named(trained: dict[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    return [(f"{k}.{name}", p) for k, module in trained.items() for name, p in module.named_parameters()]


def _named_buffers(trained: dict[str, nn.Module]) -> dict[str, Tensor]:
    found = {k: buffers(module) for k, module in trained.items()}
    return {f"buffers.{k}.{name}": buffer for k, own in found.items() for name, buffer in own.items()}


def _like(parameter: nn.Parameter, reader: slices.Reader, name: str) -> Tensor:
    """A tensor of the optimizer, which lives with its parameter: a moment is cut as that is, the count of steps whole."""
    if not reader.shape(name):
        return reader.read(name).clone().to(parameter.device)  # not mapped: the file may be deleted
    value = torch.zeros_like(parameter, requires_grad=False)
    reader.fill(name, value)
    return value
