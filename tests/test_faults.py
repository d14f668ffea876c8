"""Several processes, and what goes wrong: a run ends as it would have ended undisturbed, or says why not."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowback.core.errors import InputError
from flowback.runs import checkpoint
from flowback.runs.log import read_metrics
from forked import Forked, program

SMALL = ["--flow.width=32", "--flow.blocks=3", "--flow.layers=1", "--flow.patch_size=2", "--data.limit=128"]
SMALL += [
    "--train.batch_size=32",
    "--train.warmup=2",
    "--train.eval_images=20",
    "--train.log_every=1",
    "--train.hflip=true",
]
SMALL += ["--train.accelerator=cpu", "--alignment.strategy=reverse", "--alignment.at=[[2,1],[3,1]]"]
SMALL += ["--alignment.projector_width=16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


def start(folder: Path, run: str, *options: str, function=program) -> Forked:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLOWBACK_CACHE": str(folder / "cache")}
    return Forked(function, ["train", f"--run={folder / run}", *SMALL, *options], environment=environment)


def finish(process: Forked, status: int = 0) -> str:
    text = "".join(process.communicate())
    assert process.returncode == status, text
    return text


def train(folder: Path, run: str, *options: str) -> Path:
    finish(start(folder, run, *options))
    return folder / run


def losses(run: Path) -> list[list[float]]:
    rows = [row for row in read_metrics(run / "metrics.csv") if "loss" in row]
    return [[row["loss"], row["nll"], row["align"], row["grad_norm"]] for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.newest(run) / "training.safetensors") | load_file(
        checkpoint.newest(run) / "model.safetensors"
    )


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(folder):
    """An undisturbed run of 12 steps in one process."""
    return train(folder, "whole", "--train.steps=12", "--train.checkpoint_every=2", "--train.keep=20")


def test_two_processes_that_the_first_one_starts_have_the_curve_of_one_and_speak_with_one_voice(folder, whole):
    text = finish(start(folder, "two", "--train.steps=12", "--train.devices=2", "--train.strategy=fsdp"))
    assert torch.allclose(torch.tensor(losses(folder / "two")), torch.tensor(losses(whole)), atol=1e-5)
    assert text.count("finished") == 1


def test_killed_at_any_moment_and_resumed_a_run_ends_as_if_undisturbed(folder, whole):
    options = ["--train.steps=12", "--train.checkpoint_every=2", "--train.keep=20"]
    run = folder / "killed"
    process = start(folder, "killed", *options)
    for step, delay in ((2, 0.0), (6, 0.05)):  # just after a checkpoint has its name, and a moment later
        while process.poll() is None and not (run / "checkpoints" / f"step_{step:08d}").exists():
            time.sleep(0.005)
        time.sleep(delay)
        process.kill()
        process.wait()
        process = start(folder, "killed", *options, "--train.resume")
    finish(process)
    assert same(run, whole)


@pytest.mark.soak
def test_killed_at_thirty_random_moments_a_run_ends_as_if_undisturbed(folder):
    options = ["--train.steps=1000", "--train.checkpoint_every=2", "--train.keep=3"]
    whole, run = train(folder, "long", *options), folder / "often killed"
    generator = random.Random(0)
    process = start(folder, run.name, *options)
    for kill in range(30):
        if kill % 5 != 4:  # every fifth one comes while the process starts or resumes, the others between checkpoints
            before = checkpoint.newest(run)
            while process.poll() is None and checkpoint.newest(run) == before:
                time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.2 if kill % 5 != 4 else 5))
        assert process.poll() is None, "the run ended before it was killed"
        process.kill()
        process.wait()
        process = start(folder, run.name, *options, "--train.resume")
    finish(process)
    assert same(run, whole)


def test_a_run_is_trained_by_one_process_at_a_time(folder):
    first = start(folder, "busy", "--train.steps=100000")
    while first.poll() is None and not (folder / "busy" / "config.yaml").exists():
        time.sleep(0.01)
    text = finish(start(folder, "busy", "--train.steps=100000"), status=2)
    assert "another process trains in" in text
    first.send_signal(signal.SIGTERM)
    assert "ending after this step" in finish(first, status=130)


@pytest.mark.parametrize(("victim", "strategy"), [("the first", "ddp"), ("the other", "fsdp")])
def test_without_the_other_process_one_ends_soon_and_says_so(folder, victim, strategy):
    run = folder / f"pair {victim}"
    options = ["--train.devices=2", f"--train.strategy={strategy}", "--train.checkpoint_every=1"]
    pair = start(folder, run.name, "--train.steps=100000", *options)
    while pair.poll() is None and checkpoint.newest(run) is None:
        time.sleep(0.02)
    listed = subprocess.run(["pgrep", "-g", str(pair.pid)], capture_output=True, text=True).stdout.split()
    others = [int(word) for word in listed if int(word) != pair.pid]
    killed = time.monotonic()
    os.kill(pair.pid if victim == "the first" else others[0], signal.SIGKILL)
    text = "".join(pair.communicate(timeout=60))  # until nobody holds the pipes
    assert time.monotonic() - killed < 60
    assert "another process of this run is gone; the last checkpoint is whole" in text
    assert "Traceback" not in text
    assert pair.returncode != 0
    assert checkpoint.damage(checkpoint.newest(run)) is None


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "training.safetensors", "state.json", "checksums.json"]
)
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_known(whole, tmp_path, name, how):
    folder = tmp_path / "step_00000012"
    shutil.copytree(checkpoint.newest(whole), folder)
    assert checkpoint.damage(folder) is None
    file = folder / name
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    else:
        content[len(content) // 2] ^= 4
        file.write_bytes(content if how == "flipped" else content[: len(content) // 2])
    assert str(folder) in checkpoint.damage(folder)


def test_the_one_before_a_damaged_checkpoint_is_gone_on_from(folder, whole):
    shutil.copytree(whole, folder / "damaged")
    file = folder / "damaged" / "checkpoints" / "step_00000012" / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    text = finish(start(folder, "damaged", "--train.steps=12", "--train.checkpoint_every=2", "--train.resume"))
    assert "passed over" in text
    assert "resumed from step 10" in text
    assert same(folder / "damaged", whole)


def limited(size: int, words: list[str]) -> int:
    """The program where no file may be larger than `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return program(words)


def test_a_full_disk_ends_the_run_and_loses_nothing(folder, whole):
    shutil.copytree(whole, folder / "full")
    for newer in checkpoint.all_of(folder / "full")[:-2]:
        shutil.rmtree(newer)
    largest = max(file.stat().st_size for file in checkpoint.newest(whole).iterdir())
    started = start(folder, "full", "--train.steps=12", "--train.resume", function=partial(limited, largest // 2))
    _, errors = started.communicate()
    assert started.returncode == 2, errors
    assert "cannot be written" in errors
    assert "step_00000004 is untouched" in errors
    assert len(errors.strip().splitlines()) == 1
    assert [found.name for found in checkpoint.all_of(folder / "full")] == ["step_00000004", "step_00000002"]
    assert checkpoint.damage(checkpoint.newest(folder / "full")) is None
    train(folder, "full", "--train.steps=12", "--train.resume")
    assert same(folder / "full", whole)


def test_the_best_checkpoint_is_kept_beside_the_newest(folder):
    options = ["--train.steps=8", "--train.checkpoint_every=1", "--train.eval_every=1", "--train.keep=2", "--train.lr=10"]
    run = train(folder, "best", *options, "--train.grad_clip=null")
    kept = [found.name for found in checkpoint.all_of(run)]
    rows = [row for row in read_metrics(run / "metrics.csv") if "held_out_nats_per_dim" in row]
    best = min(rows, key=lambda row: row["held_out_nats_per_dim"])["step"]
    assert set(kept) == {"step_00000008", "step_00000007", f"step_{int(best):08d}"}


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    from flowback.runs.config import RunConfig, TrainConfig
    from flowback.training import train as run_training

    with pytest.raises(
        InputError, match=r"batch_size must be a multiple of 4 for 2 processes and train\.grad_accum_steps 2, got 10"
    ):
        run_training(RunConfig(run=str(tmp_path), train=TrainConfig(batch_size=10, devices=2, grad_accum_steps=2)))
