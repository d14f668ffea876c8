"""Question 7: how exact's gradient of the alignment differs from one_step's, over the checkpoints of runs.

    python studies/alignment_2/gradients.py RUN … [--images 256]

RUN is the folder of a run of study.py. results/gradients/RUN.json has, for each checkpoint that the run kept, gradients
with respect to the flow's parameters, with its raw weights and without autocast: norms of the likelihood's and of the
alignment's (of weight 1, by strategy) and their cosines, both also block by block; and by token, in a block's own order,
the RMS of exact's cotangent of the block's input, and of what exact adds there to the first term. A plain run gets the
alignment of one_step, with a projector that is fitted to each checkpoint while the flow is frozen. What is there is not
measured again.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from alignment_2 import study
from common import write_result
from flowback.alignment import Alignment, gradients
from flowback.core.devices import pick_device
from flowback.runs import checkpoint
from flowback.runs.checkpoint import State, load_flow
from flowback.runs.config import AlignmentConfig, RunConfig
from flowback.runs.folder import run_data
from flowback.training.build import make_alignment
from flowback.training.inputs import Batch, Inputs

KINDS: dict[str, tuple[str, str | int]] = {  # strategy and gradient
    "forward": ("forward", "one_step"),
    "detach": ("detach", "one_step"),
    "one_step": ("reverse", "one_step"),
    "two_terms": ("reverse", 1),
    "exact": ("reverse", "exact"),
}
PAIRS = list(combinations(("likelihood", *KINDS), 2))
FIT_STEPS, FIT_RATE = 100, 1e-3  # of the projector of a plain run
Gradient = dict[str, Tensor]


def measured(run: Path, images: int = 256) -> dict[str, Any]:
    """What was measured of a run, or is measured now and written."""
    file = study.RESULTS / "gradients" / f"{run.name}.json"
    if not file.is_file():
        if not checkpoint.all_of(run):
            sys.exit(f"{run} has no checkpoints; study.py --only {run.name.rsplit('-', 1)[0]} makes them")
        write_result(file, {"run": run.name, "images": images, "checkpoints": measure(run, images)})
    return json.loads(file.read_text())


def measure(run: Path, images: int) -> list[dict[str, Any]]:
    """A row for each checkpoint of a run, oldest first."""
    config = RunConfig.read(run / "config.yaml")
    if config.alignment.strategy == "none":
        config = replace(config, alignment=AlignmentConfig(**(study.COMMON | study.aligned())))
    data, device = run_data(run, config.data), pick_device("auto")
    rows = []
    for folder in reversed(checkpoint.all_of(run)):
        flow, _ = load_flow(folder, "raw", device)
        torch.manual_seed(0)
        align = make_alignment(replace(config.alignment, strategy="reverse"), flow.core)
        align.weight = 1.0
        inputs = Inputs(config, data, flow.core, None, align, device)
        first = config.train.steps  # later than all that was trained on: the order is another one
        batches = [inputs.prepare(raw, first + i) for i, raw in enumerate(inputs.stream(first, first + FIT_STEPS))]
        own = {k.removeprefix("weights.projector."): v for k, v in load_file(folder / "training.safetensors").items()}
        own = {name: own[name] for name in align.projector.state_dict() if name in own}
        if own:
            align.projector.load_state_dict(own)
        else:
            fit_projector(align, batches)
        some = batches[: -(-images // config.train.batch_size)]
        rows.append({"step": State.read(folder).step, "projector": "its own" if own else "fitted"} | compare(align, some))
    return rows


def fit_projector(align: Alignment, batches: list[Batch]) -> None:
    """Train the projector alone."""
    optimizer = torch.optim.Adam(align.projector.parameters(), lr=FIT_RATE)
    align.flow.requires_grad_(False)
    align.strategy = "forward"
    for batch in batches:
        optimizer.zero_grad()
        align(batch.x, batch.y, targets=batch.targets)[0].backward()
        optimizer.step()
    align.flow.requires_grad_(True)


def compare(align: Alignment, batches: list[Batch]) -> dict[str, Any]:
    """Norms and cosines of the gradients of all batches together, and where exact's cotangents differ."""
    align.active = False
    found = {"likelihood": gradient(align, batches)}
    align.active = True
    by_token: dict[str, Any] = {}
    for kind, (align.strategy, align.gradient) in KINDS.items():
        with cotangents() as pairs:
            whole = gradient(align, batches)
        found[kind] = {name: g - found["likelihood"][name] for name, g in whole.items()}
        if kind == "exact":
            by_token = per_token(align, pairs)
    blocks = {str(t): f"blocks.{t - 1}." for t in range(1, align.flow.config.blocks + 1)}
    row: dict[str, Any] = figures(found)
    row["blocks"] = {
        t: figures({kind: {n: g for n, g in own.items() if n.startswith(prefix)} for kind, own in found.items()})
        for t, prefix in blocks.items()
    }
    return row | {"tokens": by_token}


def gradient(align: Alignment, batches: list[Batch]) -> Gradient:
    """The gradient with respect to the flow's parameters, the mean over batches."""
    align.zero_grad(set_to_none=True)
    for batch in batches:
        (align(batch.x, batch.y, targets=batch.targets)[0] / len(batches)).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in align.flow.named_parameters()}


def figures(found: dict[str, Gradient]) -> dict[str, Any]:
    """Norms of gradients, and cosines of pairs; a pair of which one is zero has none."""
    vectors = {kind: torch.cat([g.flatten() for g in own.values()]) for kind, own in found.items()}
    norms = {kind: float(v.norm()) for kind, v in vectors.items()}
    cosines = {
        f"{a} {b}": float(vectors[a] @ vectors[b]) / (norms[a] * norms[b]) if norms[a] * norms[b] else None
        for a, b in PAIRS
    }
    return {"norms": norms, "cosines": cosines}


@contextmanager
def cotangents() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects what the adjoint of each block is given, and what comes out, in the order of the calls."""
    real, pairs = gradients.solve_adjoint, []

    def watched(g: Tensor, *arguments: Any) -> tuple[Tensor, int]:
        u, taken = real(g, *arguments)
        pairs.append((g, u))
        return u, taken

    gradients.solve_adjoint = watched
    try:
        yield pairs
    finally:
        gradients.solve_adjoint = real


def per_token(align: Alignment, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Block -> RMS by token, in the block's own order, of exact's cotangent and of what it adds to the first term."""
    blocks = range(align.at[0][0], align.flow.config.blocks + 1)
    rows: dict[str, Any] = {}
    for i, t in enumerate(blocks):
        own = pairs[i :: len(blocks)]
        flipped: Any = align.flow.blocks[t - 1].flip
        for name, parts in (("exact", [u for _, u in own]), ("added", [u - g for g, u in own])):
            rms = torch.cat(parts).square().mean(dim=(0, 2)).sqrt()
            rows.setdefault(str(t), {})[name] = (rms.flip(0) if flipped else rms).tolist()
    return rows


def main() -> None:
    """Measure, and print a line a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--images", type=int, default=256, help="training images that a gradient is the mean of")
    o = parser.parse_args()
    for run in o.runs:
        for row in measured(run, o.images)["checkpoints"]:
            longer, cosine = row["norms"]["exact"] / row["norms"]["one_step"], row["cosines"]["one_step exact"]
            print(f"{run.name}, step {row['step']}: exact is {longer:.2f} times as long, cosine {cosine:.2f}", flush=True)


if __name__ == "__main__":
    main()
