"""Does an aligned flow that begins with a plain one get further than one from random weights, at equal further steps?

    python benchmarks/fine_tuning.py [--steps 300] [--further 300] [--seeds 2] [--limit 10000] [--output runs/fine_tuning]

All runs follow `configs/fashion_mnist.yaml`, on some of its images. "plain" is trained for `steps` without alignment; the
others for `further` steps: two that begin with it (`--init`), one of them aligned, and an aligned one from random weights.
The figures are those that training logs at its end, of `--images` held-out images: means over the seeds, and the values.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from flowback.cli import main as flowback
from flowback.core.devices import machine
from flowback.runs.config import recipe
from flowback.runs.log import read_metrics

PLAIN = ["--alignment.strategy=none"]
FIGURES = ("held_out_nats_per_dim", "held_out_single_gradient", "held_out_exact")


def trained(o: argparse.Namespace, run: Path, steps: int, seed: int, options: list[str]) -> dict[str, float]:
    """The last figures of a run, which is resumed if it was interrupted."""
    given = {"run": run, "data.limit": o.limit, "train.steps": steps, "train.seed": seed, "train.eval_images": o.images}
    given["alignment.encoder_precision"] = "32-true"  # fast on any CPU
    given |= {"train.warmup": o.warmup, "train.eval_every": 10**6, "train.resume": (run / "checkpoints").exists()}
    words = ["train", f"--config={recipe('fashion_mnist')}", *(f"--{name}={value}" for name, value in given.items())]
    flowback([word.replace("=True", "=true").replace("=False", "=false") for word in words] + options)
    rows = [row for row in read_metrics(run / "metrics.csv") if row["step"] == steps]
    return {name: value for row in rows for name, value in row.items() if name in (*FIGURES, "seconds")}


def main() -> None:
    """Train, print, and keep the figures in results.json."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("steps", 300),
        ("further", 300),
        ("seeds", 2),
        ("limit", 10000),
        ("images", 2000),
        ("warmup", 50),
    ):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--output", default="runs/fine_tuning", type=Path)
    o = options.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(o.seeds):
        folder = o.output / f"seed_{seed}"
        init = f"--init={folder / 'plain'}"
        for name, steps, changes in (
            ("plain", o.steps, PLAIN),
            ("plain, begun from plain", o.further, [init, *PLAIN]),
            ("aligned, begun from plain", o.further, [init]),
            ("aligned, from random weights", o.further, []),
        ):
            found.setdefault(name, []).append(trained(o, folder / name, steps, seed, changes))
    for name, runs in found.items():
        values = (f"{mean(run[f] for run in runs):.4f} ({', '.join(f'{run[f]:.4f}' for run in runs)})" for f in FIGURES)
        print(f"{name:30}", *values, sep="  ")
    settings = {name: value for name, value in vars(o).items() if name != "output"}
    (o.output / "results.json").write_text(json.dumps({"machine": machine(), **settings, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
