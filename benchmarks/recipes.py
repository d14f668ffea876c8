"""The ImageNet recipes at full token count and depth, narrow enough for two cores: real steps, memory, kill and resume.

    python benchmarks/recipes.py [--recipes imagenet64,imagenet256,...] [--width 128] [--batch 4] [--json FILE]

Images are crops of scikit-learn's two photographs, in a folder of four classes; the autoencoder is an AutoencoderKL of
random weights with the published one's shape of latents (downsample 8, 4 channels), the encoder DINOv2-B of random
weights. For every recipe it trains three steps, aligned and plain, with caches and without, each in a process of its
own whose peak memory and seconds per step are printed; then kills a run of six steps with SIGKILL after the third,
resumes it, and compares its weights with an undisturbed one.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from flowback.core.devices import machine
from flowback.runs.checkpoint import newest
from flowback.runs.log import read_metrics

RECIPES = ("imagenet64", "imagenet256", "imagenet256_patch1")
STEPS = 3


def make_images(folder: Path, count: int = 64, side: int = 288) -> None:
    """Crops of real photographs as JPEGs, `class/number.jpg`."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    generator = np.random.default_rng(0)
    for number in range(count):
        photo = photos[number % len(photos)]
        top, left = (generator.integers(0, size - side) for size in photo.shape[:2])
        place = folder / f"class_{number % 4}" / f"{number:04d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo[top : top + side, left : left + side]).save(place, quality=90)


def make_autoencoder(folder: Path) -> None:
    """Random weights, narrow, and the latents' shape of sd-vae-ft-ema."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    AutoencoderKL(3, 3, latent_channels=4, scaling_factor=0.18215, **kinds, **widths).save_pretrained(folder)


def command(
    recipe: str, work: Path, run: Path, o: argparse.Namespace, aligned: bool, caches: bool, until: int
) -> list[str]:
    """The command that trains a narrow version of a recipe up to a step."""
    options = {
        "config": f"configs/{recipe}.yaml",
        "run": run,
        "data.name": "folder",
        "data.path": work / "images",
        "data.limit": 32,
        "data.workers": 0,
        "flow.width": o.width,
        "flow.num_classes": "null",
        "alignment.strategy": "reverse" if aligned else "none",
        "alignment.encoder_weights": "random",
        "alignment.projector_width": o.width,
        "alignment.cache": str(caches).lower(),
        "latents.cache": str(caches).lower(),
        "train.batch_size": o.batch,
        "train.log_every": 1,
        "train.checkpoint_every": 1,
        "train.keep": 10,
        "train.until": until,
    }
    if recipe != "imagenet64":
        options |= {"latents.autoencoder": work / "autoencoder"}
    program = Path(sys.executable).with_name("flowback")
    return [str(program), "train", *(f"--{name}={value}" for name, value in options.items())]


def run_to_end(words: list[str], environment: dict[str, str]) -> float:
    """Run a command; its peak memory, bytes."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(words)}\n{text}")
    return 1024.0 * usage.ru_maxrss


def kill_after(words: list[str], environment: dict[str, str], run: Path, step: int) -> None:
    """Start a command and kill it, without warning, once the checkpoint of a step is there."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, env=environment)
    while process.poll() is None and not (run / "checkpoints" / f"step_{step:08d}").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def equal(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, averages and optimizer, bit for bit."""
    ends = [newest(run) for run in (one, other)]
    assert ends[0] is not None
    assert ends[1] is not None
    if ends[0].name != ends[1].name:
        return False
    files = ("model.safetensors", "training.safetensors")
    pairs = [(load_file(ends[0] / name), load_file(ends[1] / name)) for name in files]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def measure(recipe: str, work: Path, o: argparse.Namespace) -> list[dict[str, Any]]:
    """One recipe, every way, and its kill and resume."""
    rows = []
    for aligned in (False, True):
        for caches in (True, False):
            environment = {**os.environ, "FLOWBACK_CACHE": str(work / "cache")}
            run = work / f"{recipe}_{aligned}_{caches}"
            words = command(recipe, work, run, o, aligned, caches, STEPS)
            run_to_end(words, environment)  # makes the caches, whose memory is not a step's
            run = run.with_name(f"{run.name}_again")
            peak = run_to_end(command(recipe, work, run, o, aligned, caches, STEPS), environment)
            seconds = [row["seconds"] for row in read_metrics(run / "metrics.csv") if "loss" in row]
            row = {"recipe": recipe, "aligned": aligned, "caches": caches, "peak_gb": peak / 1e9}
            rows.append(row | {"seconds_per_step": (seconds[-1] - seconds[0]) / (len(seconds) - 1)})
            print(
                f"{recipe:20} {'aligned' if aligned else 'plain':8} caches {'on ' if caches else 'off'} "
                f"{rows[-1]['seconds_per_step']:7.2f} s a step   peak {peak / 1e9:.2f} GB",
                flush=True,
            )
    environment = {**os.environ, "FLOWBACK_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    whole, cut = work / f"{recipe}_whole", work / f"{recipe}_cut"
    run_to_end(command(recipe, work, whole, o, True, True, 2 * STEPS), environment)
    words = command(recipe, work, cut, o, True, True, 2 * STEPS)
    kill_after(words, environment, cut, STEPS)
    run_to_end([*words, "--train.resume=true"], environment)
    rows.append({"recipe": recipe, "killed_and_resumed_equals_undisturbed": equal(whole, cut)})
    print(
        f"{recipe:20} killed after step {STEPS} and resumed: equal to the undisturbed run: {equal(whole, cut)}", flush=True
    )
    return rows


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipes", default=",".join(RECIPES))
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--json", default=None)
    o = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_images(work / "images")
        make_autoencoder(work / "autoencoder")
        rows = [row for recipe in o.recipes.split(",") for row in measure(recipe, work, o)]
    if o.json:
        facts = {"machine": machine(), "width": o.width, "batch": o.batch, "rows": rows}
        Path(o.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
