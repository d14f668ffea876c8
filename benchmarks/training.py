"""Time of a training step against what its matrix products alone would take at the machine's GEMM speed.

    python benchmarks/training.py [--recipe fashion_mnist] [--width 256] [--batch 32] [--repeats 10]
        [--precisions 32-true,bf16-mixed] [--device auto] [--json FILE]

The step is the recipe's own: encode, loss, backward, clipping, AdamW, EMA, on random images and features, in float32 and
bfloat16, plain and aligned, each as it is, with compiled blocks, and with checkpointed layers. Utilisation is the step's
operations (what checkpointing repeats is not counted) over those that a large square product does in the same time,
measured in the same run; medians of alternating repeats. Memory is the peak of what a step makes, beside weights,
averages and the optimizer; what compiled code makes is not seen.

Then short runs through `flowback.training.train` say which share of the time is spent until a batch is there.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from flowback.alignment import Alignment
from flowback.core.devices import autocast, keep_freed_memory, machine, pick_device, synchronize
from flowback.flow.tarflow import TarFlow
from flowback.runs.config import RunConfig, recipe
from flowback.runs.log import read_metrics
from flowback.training import train
from flowback.training.apply import checkpoint_layers, compile_blocks
from flowback.training.flows import Likelihood
from flowback.training.meter import Meter
from flowback.training.optim import GuardedStep, update_ema

SHAPES = {  # of a recipe's images: side, channels, classes
    "digits": (8, 1, 10),
    "fashion_mnist": (28, 1, 10),
    "fashion_mnist_patch2": (32, 1, 10),
    "imagenet64": (64, 3, 1000),
}
HERE = ("digits", "fashion_mnist")  # recipes whose data needs no path
VARIANTS: dict[str, Callable[[TarFlow], None]] = {
    "eager": lambda flow: None,
    "compiled": compile_blocks,
    "checkpointed": checkpoint_layers,
}


class FixedEncoder(nn.Module):
    """Stands for an encoder whose features are cached, as they are in the recipes."""

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.grid, self.dim = grid, dim


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def gemm_speed(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """A function that measures floating-point operations per second of square products."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    calls = max(1, int((4e10 if device.type == "cpu" else 2e13) / (2 * size**3)))
    return lambda: calls * 2 * size**3 / seconds(lambda: [a @ b for _ in range(calls)], device)


def training_step(
    config: RunConfig, shape: tuple[int, int, int], strategy: str, variant: str, device: torch.device
) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """One step of the recipe, as the training loop takes it, and the tensors that are there before it."""
    a, c, f = config.alignment, config.train, config.flow
    side, channels, classes = shape
    with device:  # some hundred million random numbers take long on a CPU
        flow = TarFlow(**{**vars(f), "image_size": side, "channels": channels, "num_classes": classes})
    VARIANTS[variant](flow)
    objective: nn.Module = Likelihood(flow)
    targets = None
    if strategy != "none":
        encoder = FixedEncoder(flow.grid, 320)
        projector = a.projector_width, a.projector, a.spatial_norm
        at = a.at or [[f.blocks - 1, 1], [f.blocks, 1]]
        objective = Alignment(flow, encoder, at, strategy, a.gradient, a.weight, *projector).to(device)
        targets = torch.randn(c.batch_size, flow.token_shape[0], 320, device=device)
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    average = deepcopy(flow).requires_grad_(False)
    x = torch.rand(c.batch_size, *flow.data_shape, device=device) * 2 - 1
    y = torch.randint(classes, (c.batch_size,), device=device)
    guarded = GuardedStep(optimizer, 1.0)

    def step() -> None:
        with autocast(device, c.precision):
            loss, _ = objective(x, y, targets=targets)
        loss.backward()
        guarded()
        update_ema(average.parameters(), flow.parameters(), 0.99, 1)
        optimizer.zero_grad(set_to_none=True)

    step()
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return step, [*objective.parameters(), *objective.buffers(), *average.parameters(), *average.buffers(), *state]


def steps(
    config: RunConfig, shape: tuple[int, int, int], device: torch.device, repeats: int, precisions: Sequence[str]
) -> list[dict[str, Any]]:
    """Every way to take a step."""
    rows = []
    for precision in precisions:
        dtype = torch.float32 if precision == "32-true" else torch.bfloat16
        config = replace(config, train=replace(config.train, precision=precision))
        peak = gemm_speed(2048 if device.type == "cpu" else 8192, dtype, device)
        peak()
        for strategy in ("none", "reverse"):
            flops = 0
            for variant in VARIANTS:
                step, there = training_step(config, shape, strategy, variant, device)
                memory = None
                if variant != "compiled":
                    with Meter(there) as meter:
                        step()
                    memory, flops = meter.peak, flops or meter.flops
                step()
                measured = [(seconds(step, device), peak()) for _ in range(repeats)]
                time_, peak_ = (median(column) for column in zip(*measured, strict=True))
                row = {"precision": precision, "strategy": strategy, "variant": variant}
                row |= {"step_seconds": round(time_, 4), "images_per_second": round(config.train.batch_size / time_, 1)}
                row |= {"step_gflop": round(flops / 1e9, 1), "gemm_gflops": round(peak_ / 1e9)}
                row |= {"utilization": round(flops / peak_ / time_, 3)}
                rows.append(row | {"memory_gb": None if memory is None else round(memory / 1e9, 3)})
                show(rows)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the last row, and above the first the names of the columns."""
    widths = {name: max(len(name), 12) for name in rows[0]}
    if len(rows) == 1:
        print("  ".join(f"{name:>{width}}" for name, width in widths.items()))
    print("  ".join(f"{rows[-1][name]!s:>{width}}" for name, width in widths.items()), flush=True)


def waits(config: RunConfig) -> list[dict[str, Any]]:
    """Short runs, with features of a random encoder in a cache."""
    rows = []
    for precision, strategy in product(("32-true", "bf16-mixed"), ("none", "reverse")):
        with tempfile.TemporaryDirectory() as folder:
            often = dict.fromkeys(("eval_every", "sample_every", "checkpoint_every"), 1000)
            t = replace(config.train, precision=precision, steps=1000, until=40, log_every=10, eval_images=10, **often)
            a = replace(config.alignment, strategy=strategy, encoder_weights="random")
            data = replace(config.data, limit=512)
            train(replace(config, run=folder, train=t, alignment=a, data=data))
            logged = [row for row in read_metrics(Path(folder) / "metrics.csv") if "data_wait" in row][1:]
        row = {"precision": precision, "strategy": strategy}
        row |= {"images_per_second": round(median(row["images_per_second"] for row in logged), 1)}
        rows.append(row | {"data_wait": round(median(row["data_wait"] for row in logged), 4)})
        show(rows)
    return rows


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", default="fashion_mnist", choices=SHAPES)
    options.add_argument("--width", type=int, default=None)
    options.add_argument("--batch", type=int, default=None)
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--precisions", default="32-true,bf16-mixed")
    options.add_argument("--device", default="auto")
    options.add_argument("--json", default=None)
    o = options.parse_args()
    config = RunConfig.from_yaml(recipe(o.recipe).read_text())
    config = replace(config, flow=replace(config.flow, width=o.width or config.flow.width))
    config = replace(config, train=replace(config.train, batch_size=o.batch or config.train.batch_size))
    device = pick_device(o.device)
    keep_freed_memory(device)
    print(f"{o.recipe}, width {config.flow.width}, {config.train.batch_size} images, on {machine(device)}")
    facts = {"machine": machine(device), "threads": torch.get_num_threads(), "recipe": o.recipe}
    facts |= {"width": config.flow.width, "batch": config.train.batch_size}
    facts |= {"steps": steps(config, SHAPES[o.recipe], device, o.repeats, o.precisions.split(","))}
    facts |= {"data": waits(config)} if o.recipe in HERE and device.type == "cpu" else {}
    if o.json:
        Path(o.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
