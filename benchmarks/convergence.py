"""How many parallel sweeps each block needs, plotted: error of Jacobi decoding by sweep, for one or more trained flows.

    python benchmarks/convergence.py RUN... [--batch 16] [--output runs/convergence.png] [--json FILE]

The error is the largest difference of any number of any of the batch's images from the sequential loop's.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from flowback.flow.decoding import CausalMap, Solver, solve, sweep
from flowback.flow.guidance import Guidance
from flowback.flow.tarflow import TarFlow
from flowback.runs.checkpoint import load_flow

TARGET = 1e-4
SMALLEST = 1e-5  # below it, float32 is at its own rounding


@torch.no_grad()
def errors_by_sweep(flow: TarFlow, batch: int) -> dict[int, list[float]]:
    """Block -> the error before any sweep and after each, until it is below `SMALLEST`.

    The error is the largest difference of any number of any of the `batch` samples from the sequential loop's.
    """
    tokens = flow.enter(torch.randn(batch, *flow.token_shape, generator=torch.Generator().manual_seed(0)))
    classes = flow.class_weights(torch.arange(batch) % flow.num_classes if flow.num_classes else None, batch)
    errors = {}
    for t in range(flow.config.blocks, 0, -1):
        block: Any = flow.blocks[t - 1]
        F = CausalMap(block, tokens, classes, Guidance())
        tokens, _ = solve(F, Solver("sequential"), 0.0)
        true, x = F.block.reorder(tokens), F.start()
        errors[t] = [float((x - true).abs().max())]
        while errors[t][-1] > SMALLEST and len(errors[t]) <= F.tokens:
            x, _ = sweep(F, x)
            errors[t].append(float((x - true).abs().max()))
    return errors


def sweeps_until(errors: list[float], target: float) -> int:
    """The first number of sweeps after which the error stays below the target."""
    return next(sweep for sweep in range(len(errors)) if all(error <= target for error in errors[sweep:]))


def main() -> None:
    """Measure, print, plot."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="+")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--output", default="runs/convergence.png")
    options.add_argument("--json", default=None)
    o = options.parse_args()
    figure = Figure(figsize=(3.8 * len(o.runs), 3.4), layout="constrained")
    facts = {}
    panels = figure.subplots(1, len(o.runs), squeeze=False, sharey=True)[0]
    for panel, run in zip(panels, o.runs, strict=True):
        flow, weights = load_flow(run)
        errors = errors_by_sweep(flow, o.batch)
        needed = {t: sweeps_until(e, TARGET) for t, e in errors.items()}
        name, N = Path(run).name, flow.token_shape[0]
        words = ", ".join(f"block {t}: {k}" for t, k in needed.items())
        print(f"{name} ({weights}), {N} tokens: sweeps until {TARGET:g}: {words}")
        facts[name] = {"weights": weights, "tokens": N, "batch": o.batch, "sweeps_until_1e-4": needed, "errors": errors}
        for t, series in errors.items():
            shade = (t - 1) / max(1, flow.config.blocks - 1)
            panel.semilogy(
                series, "o-", ms=2.5, lw=1.2, color=(0.15 + 0.7 * shade, 0.35, 0.85 - 0.7 * shade), label=f"block {t}"
            )
        panel.axhline(TARGET, color="black", lw=0.8, ls=":")
        panel.set_title(f"{name}, {N} tokens", fontsize=9.5, loc="left")
        panel.set_xlabel("sweeps", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7, frameon=False)
    panels[0].set_ylabel("largest error", fontsize=9)
    figure.savefig(o.output, dpi=130)
    if o.json:
        Path(o.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
