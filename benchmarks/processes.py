"""Throughput of a run shared by two processes against one, and what each thread of a process adds.

    python benchmarks/processes.py [--recipe fashion_mnist] [--steps 40] [--repeats 3] [--json FILE]

The recipe's flow, aligned as the recipe says but with an encoder of random weights, is trained for a few steps by `flowback
train`: by one process with one thread and with two, and by two processes of one thread each, by ddp and by fsdp. Images per
second are those of metrics.csv, first row left out; medians of alternating repeats. The largest difference of the loss from
that of the first way says that all train the same flow.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from flowback.core.devices import machine
from flowback.runs.config import recipe
from flowback.runs.log import read_metrics

# processes, threads of each, strategy
WAYS = {
    "1 process, 1 thread": (1, 1, "ddp"),
    "1 process, 2 threads": (1, 2, "ddp"),
    "2 processes, ddp": (2, 1, "ddp"),
    "2 processes, fsdp": (2, 1, "fsdp"),
}


def trained(o: argparse.Namespace, processes: int, threads: int, strategy: str) -> list[dict[str, float]]:
    """The rows of metrics.csv of a short run."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"run": folder, "data.limit": 1024, "alignment.encoder_weights": "random", "train.precision": o.precision}
        options |= {"train.until": o.steps, "train.log_every": 10, "train.accelerator": "cpu"}
        options |= {"train.devices": processes, "train.strategy": strategy}
        options |= dict.fromkeys(("train.eval_every", "train.sample_every", "train.checkpoint_every"), 10**6)
        command = [sys.executable, "-m", "flowback", "train", "--config", str(recipe(o.recipe))]
        command += [f"--{name}={value}" for name, value in options.items()]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True, capture_output=True)
        return [row for row in read_metrics(Path(folder) / "metrics.csv") if "loss" in row]


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", default="fashion_mnist")
    options.add_argument("--precision", default="bf16-mixed")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--json", default=None)
    o = options.parse_args()
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {}
    trained(o, *WAYS["1 process, 1 thread"])  # makes the cache of features
    for _ in range(o.repeats):
        for way, how in WAYS.items():
            rows = trained(o, *how)
            speeds[way].append(median(row["images_per_second"] for row in rows[1:]))
            losses[way] = [row["loss"] for row in rows]
    one = next(iter(WAYS))
    rows = []
    for way, found in speeds.items():
        row = {
            "way": way,
            "images_per_second": round(median(found), 1),
            "times_one": round(median(found) / median(speeds[one]), 2),
        }
        row["largest_loss_difference"] = max(abs(a - b) for a, b in zip(losses[way], losses[one], strict=True))
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    facts = {"machine": machine(), "recipe": o.recipe, "precision": o.precision, "repeats": o.repeats, "rows": rows}
    if o.json:
        Path(o.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
