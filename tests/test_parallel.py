"""Several processes share a run by ddp or fsdp: its curve, its checkpoints and its refusals are those of one process.

One start of them takes several runs, one after the other.
"""

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from builders import encoders_made_once
from flowback.core.errors import InputError
from flowback.data import DataConfig
from flowback.flow.config import FlowConfig
from flowback.flow.tarflow import TarFlow
from flowback.latents.joint import JointConfig
from flowback.runs import checkpoint
from flowback.runs.checkpoint import load_flow
from flowback.runs.config import AlignmentConfig, LatentConfig, RunConfig, TrainConfig
from flowback.runs.log import read_metrics
from flowback.training import train
from flowback.training.inputs import Inputs
from forked import torchrun

OBJECTIVES = ("none", "forward", "detach", "reverse", "joint")
STRATEGIES = ("ddp", "fsdp")
HALF, WHOLE = 3, 6  # steps


def config(run: Path | str, objective: str = "reverse", **options: Any) -> RunConfig:
    settings = {"steps": WHOLE, "batch_size": 24, "warmup": 2, "log_every": 1, "eval_every": 100, "eval_images": 20}
    settings |= {"sample_every": 100, "checkpoint_every": 100, "hflip": True, "accelerator": "cpu"}
    until = WHOLE - 1 if objective == "detach" else None  # one of the objectives ends before its run does
    joint, strategy = objective == "joint", "none" if objective == "joint" else objective
    return RunConfig(
        run=str(run),
        data=DataConfig(limit=64),
        flow=FlowConfig(patch_size=1 if joint else 4, width=32, blocks=2, layers=1, noise_std=0.2),
        latents=LatentConfig(joint=joint),
        joint=JointConfig(channels=4, width=32, noise_std=0.2, mask=0.3),
        alignment=AlignmentConfig(strategy=strategy, at=[[1, 1], [2, 1]], projector_width=16, until=until),
        train=TrainConfig(**(settings | options)),
    )


@contextmanager
def fault(kind: str | None, rank: int) -> Iterator[None]:
    """What goes wrong in this process."""
    real, unlimited = Inputs.prepare, resource.getrlimit(resource.RLIMIT_FSIZE)

    def poison(inputs: Inputs, raw: Any, step: int) -> Any:
        batch = real(inputs, raw, step)
        return replace(batch, x=batch.x * float("nan")) if step == 1 else batch

    if kind == f"poison {rank}":
        Inputs.prepare = poison
    if kind == f"full disk {rank}":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    try:
        yield
    finally:
        Inputs.prepare = real
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@encoders_made_once()
def work(cache: str, jobs: list[dict[str, Any]]) -> None:
    """Take the runs; what one of them refuses is left in its folder."""
    os.environ["FLOWBACK_CACHE"] = cache
    rank, devices = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for job in jobs:
        kind = job.pop("fault", None)
        with fault(kind, rank):
            try:
                train(config(devices=devices, **job))
            except InputError as error:
                (Path(job["run"]) / f"refused {rank}").write_text(str(error))


def start(processes: int, jobs: list[dict[str, Any]]) -> None:
    torchrun(processes, work, os.environ["FLOWBACK_CACHE"], jobs)


def curve(run: Path) -> torch.Tensor:
    rows = [row for row in read_metrics(run / "metrics.csv") if "loss" in row]
    return torch.tensor([[row["loss"], row["nll"], row["grad_norm"]] for row in rows])


def held_out(run: Path) -> float:
    return read_metrics(run / "metrics.csv")[-1]["held_out_nats_per_dim"]


def near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=2e-5) for name in a)


def resumed(folder: Path, name: str, run: str, **options: Any) -> dict[str, Any]:
    """The job of going on with a run under another name."""
    shutil.copytree(folder / run, folder / name, dirs_exist_ok=True)
    return {"run": str(folder / name), "objective": run.split()[-1], "resume": True, **options}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    os.environ["FLOWBACK_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def alone(folder):
    """For each objective an undisturbed run in one process, and the half of one."""
    for objective in OBJECTIVES:
        train(config(folder / f"alone {objective}", objective))
    train(config(folder / "half reverse", until=HALF))
    with fault("poison 0", rank=0):
        train(config(folder / "poisoned reverse"))
    return folder


@pytest.fixture(scope="module")
def pair(alone):
    """Half of each run by two processes, and some that go on, or go wrong."""
    jobs = [
        {"run": str(alone / f"{strategy} {objective}"), "objective": objective, "strategy": strategy, "until": HALF}
        for strategy in STRATEGIES
        for objective in OBJECTIVES
    ]
    repeat = {"run": str(alone / "in two goes"), "strategy": "fsdp", "deterministic": True, "grad_accum_steps": 2}
    jobs += [{**repeat, "run": str(alone / "at once")}, {**repeat, "until": HALF}, {**repeat, "resume": True}]
    jobs += [resumed(alone, "shared out reverse", "half reverse", strategy="fsdp", checkpoint_activations=True)]
    jobs += [{"run": str(alone / "one poisoned"), "strategy": "fsdp", "fault": "poison 1"}]
    full = {"run": str(alone / "full"), "strategy": "fsdp"}
    jobs += [{**full, "until": HALF}, {**full, "resume": True, "fault": "full disk 1"}]
    start(2, jobs)
    return alone


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_have_the_curve_of_one_which_goes_on_with_their_checkpoint(pair, strategy, objective):
    whole, run = curve(pair / f"alone {objective}"), pair / f"{strategy} {objective}"
    assert len(curve(run)) == HALF
    assert torch.allclose(curve(run), whole[:HALF], atol=2e-6)
    pieces = len(list(checkpoint.newest(run).glob("training*")))
    assert pieces == (2 if strategy == "fsdp" else 1)
    job = resumed(pair, f"{strategy} then alone {objective}", run.name, grad_accum_steps=2)
    flow = train(config(**job)).flow
    assert torch.allclose(curve(Path(job["run"])), whole, atol=1e-5)
    assert near(flow.state_dict(), load_flow(pair / f"alone {objective}")[0].state_dict())


def test_another_number_of_processes_goes_on_by_either_strategy(pair):
    jobs = [
        resumed(pair, "two then three reverse", "fsdp reverse", strategy="fsdp"),
        resumed(pair, "two then three by ddp reverse", "fsdp reverse", strategy="ddp", checkpoint_activations=True),
        resumed(pair, "ddp then three reverse", "ddp reverse", strategy="fsdp"),
    ]
    start(3, jobs)
    for run in [pair / "shared out reverse", *(Path(job["run"]) for job in jobs)]:
        assert torch.allclose(curve(run), curve(pair / "alone reverse"), atol=1e-5), run
        assert held_out(run) == pytest.approx(held_out(pair / "alone reverse"), abs=1e-5)
        for weights in ("ema", "raw"):
            one, many = (load_flow(where, weights)[0].state_dict() for where in (pair / "alone reverse", run))
            assert near(one, many)


def test_slices_are_of_different_rows_and_the_average_is_one_file(pair):
    folder = checkpoint.newest(pair / "fsdp reverse")
    pieces = [load_file(file) for file in sorted(folder.glob("training*"))]
    flow = TarFlow.from_pretrained(folder)
    for name, p in flow.named_parameters():
        rows = [len(piece[key]) for piece in pieces if (key := f"weights.flow.{name}") in piece]
        assert sum(rows) == len(p)
        assert max(rows) == -(-len(p) // 2)
    assert checkpoint.damage(folder) is None
    (folder / "training-00002-of-00002.safetensors").unlink()
    assert "training-00002-of-00002" in checkpoint.damage(folder)


def test_shared_out_a_resumed_run_ends_bit_for_bit_as_the_undisturbed_one(pair):
    one, two = (checkpoint.newest(pair / name) for name in ("at once", "in two goes"))
    for file in ("model.safetensors", "training-00001-of-00002.safetensors", "training-00002-of-00002.safetensors"):
        assert (one / file).read_bytes() == (two / file).read_bytes()


def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_in_all(pair):
    one, many = (load_flow(pair / name, "raw")[0].state_dict() for name in ("poisoned reverse", "one poisoned"))
    assert near(one, many)
    state = json.loads((checkpoint.newest(pair / "one poisoned") / "state.json").read_text())
    assert state["skipped"] == 1


def test_a_slice_that_cannot_be_written_ends_the_run_in_all_processes(pair):
    for rank in (0, 1):
        assert f"step_{HALF:08d} is untouched" in (pair / "full" / f"refused {rank}").read_text()
    assert [found.name for found in (pair / "full" / "checkpoints").iterdir()] == [f"step_{HALF:08d}"]
    assert checkpoint.damage(checkpoint.newest(pair / "full")) is None
