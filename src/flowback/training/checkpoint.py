"""Checkpoints: folders `checkpoints/step_00000500` that hold everything a run needs to go on. Nothing is pickled.

config.json, model.safetensors    the flow with its averaged (EMA) weights, as `TarFlow.save_pretrained` writes it
training.safetensors              the raw weights, the projector, and AdamW's state, tensor by tensor
state.json                        step, seconds of training, steps that were skipped, the last held-out likelihood
checksums.json                    SHA-256 of all the others, by which a damaged checkpoint is known
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowback.errors import InputError
from flowback.files import file_hash
from flowback.flows import TarFlow

CHECKSUMS = "checksums.json"


@dataclass
class State:
    """Where a run stands."""

    step: int = 0  # steps done
    seconds: float = 0.0  # of training, evaluation excluded
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0
    held_out_nats_per_dim: float | None = None  # as last measured
    measured_at: int = 0  # the step of that


def all_of(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((run / "checkpoints").glob("step_*[0-9]"), reverse=True)


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run, if it has any."""
    return next(iter(all_of(run)), None)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint on disk, a sentence; None if it is what was written."""
    try:
        known = json.loads((checkpoint / CHECKSUMS).read_text())
        for name, checksum in known.items():
            if file_hash(checkpoint / name) != checksum:
                return f"{checkpoint / name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{checkpoint} is not whole ({error})"
    missing = {"config.json", "model.safetensors", "training.safetensors", "state.json"} - known.keys()
    return f"{checkpoint / CHECKSUMS} lacks {min(missing)}" if missing else None


def save(
    run: Path,
    state: State,
    average: TarFlow,
    trained: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    """Write a checkpoint beside the others, then rename it to its name, so that a name always means a whole one.

    Of the others the newest are kept, and the one with the best held-out likelihood that was measured at its step.

    Args:
        run: the run's folder.
        state: where the run stands.
        average: the flow with averaged weights.
        trained: the modules whose raw parameters are trained, by name.
        optimizer: of exactly those parameters, in their order.
        keep: how many of the newest checkpoints to keep.

    Raises:
        InputError: if it cannot be written, to a full disk perhaps; the others are untouched.
    """
    final = run / "checkpoints" / f"step_{state.step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _write(partial, state, average, trained, optimizer)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        whole = newest(run)
        raise InputError(
            f"checkpoint {final} cannot be written ({error}); allowed is a disk with room; "
            + (f"{whole.name} is untouched, go on from it with --train.resume" if whole else "there is none before it")
        ) from None
    for old in set(all_of(run)[keep:]) - {_best(run)}:
        shutil.rmtree(old)
    return final


def _write(
    folder: Path,
    state: State,
    average: TarFlow,
    trained: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Everything that belongs to a checkpoint, on disk when this returns."""
    average.save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(trained):
        tensors[f"weights.{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value).contiguous()
    save_file(tensors, folder / "training.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(state)) + "\n")
    checksums = {file.name: file_hash(file) for file in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n")
    for place in (*folder.iterdir(), folder):
        _sync(place)


def _best(run: Path) -> Path | None:
    """The checkpoint with the best held-out likelihood of those that were measured at their step."""
    measured = []
    for folder in all_of(run):
        try:
            state = State(**json.loads((folder / "state.json").read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if state.held_out_nats_per_dim is not None and state.measured_at == state.step:
            measured.append((state.held_out_nats_per_dim, folder))
    return min(measured)[1] if measured else None


def _sync(place: Path) -> None:
    """Have a file or folder on disk, not only in the system's memory."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(checkpoint: Path, average: TarFlow, trained: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> State:
    """Read a checkpoint back into what `save` was given.

    Raises:
        InputError: if it is not whole, or of another model.
    """
    average.load_state_dict(TarFlow.from_pretrained(checkpoint).state_dict())
    try:
        tensors = load_file(checkpoint / "training.safetensors")
        state = State(**json.loads((checkpoint / "state.json").read_text()))
        with torch.no_grad():
            for name, parameter in _named(trained):
                parameter.copy_(tensors.pop(f"weights.{name}"))
                prefix = f"optimizer.{name}."
                keys = [key for key in tensors if key.startswith(prefix)]
                # moments live with the parameter, AdamW's step counter where the optimiser keeps it
                optimizer.state[parameter] = {
                    key.removeprefix(prefix): _placed(tensors.pop(key), parameter) for key in keys
                }
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"checkpoint {checkpoint} cannot be read back ({error})") from None
    if tensors:
        raise InputError(f"checkpoint {checkpoint} has a tensor {next(iter(tensors))} that this run does not know")
    return state


def load_flow(run: str | Path, weights: str = "ema") -> tuple[TarFlow, str]:
    """The flow of a run (its newest checkpoint), of a checkpoint, or of any folder or hub id of a flow.

    Args:
        run: folder or hub id.
        weights: "ema" for the averaged weights, "raw" for those of the last step.

    Returns:
        The flow, and which weights of which checkpoint it has, to be stamped into what is measured with it.

    Raises:
        InputError: if there is no flow, or `weights` is something else.
    """
    if weights not in ("ema", "raw"):
        raise InputError(f"weights {weights!r} do not exist; allowed: ema, raw")
    source = newest(Path(run)) or run
    if Path(run).is_dir() and source == run and not (Path(run) / "config.json").exists():
        raise InputError(f"{run} holds no checkpoint and no flow; allowed is a run's folder, a checkpoint or a flow")
    flow = TarFlow.from_pretrained(source)
    if weights == "raw":
        file = Path(source) / "training.safetensors"
        if not file.is_file():
            raise InputError(f"{source} has no raw weights; allowed here: ema")
        raw = {k.removeprefix("weights.flow."): v for k, v in load_file(file).items() if k.startswith("weights.flow.")}
        flow.load_state_dict(raw)
    name = source.name if isinstance(source, Path) else str(source)
    return flow, f"{weights} weights of {name}"


def flow_folder(run: str | Path) -> Path:
    """The folder that `load_flow` takes the flow from: the newest checkpoint of a run, or the folder itself.

    Raises:
        InputError: if the flow lies in no local folder.
    """
    folder = newest(Path(run)) or Path(run)
    if not folder.is_dir():
        raise InputError(f"{run} is no folder; allowed is one, since something is to be stored in it")
    return folder


def _named(trained: dict[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    return [(f"{k}.{name}", p) for k, module in trained.items() for name, p in module.named_parameters()]


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    return value.to(parameter.device) if value.dim() else value
