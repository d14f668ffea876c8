"""Time of a training step as a multiple of what its matrix products alone would take at the machine's GEMM speed.

    python benchmarks/training.py [--recipe fashion_mnist] [--repeats 10] [--json FILE]

The step is the recipe's own: encode, loss, backward, clipping, AdamW, EMA, on random images and features. Its
floating-point operations are counted while it runs; the GEMM speed is measured in the same run, at a large
square product (the machine's best) and at the recipe's own MLP shape. Medians of alternating repeats.
"""

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from statistics import median

import torch
import yaml
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from flowback.alignment import Alignment
from flowback.devices import autocast
from flowback.flows import TarFlow
from flowback.quickstart import machine, recipe
from flowback.training.loop import Likelihood
from flowback.training.optim import update_ema


class Flops(TorchDispatchMode):
    """Counts the operations of matrix products, by PyTorch's own formulas, also where a step calls `autograd.grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and count it."""
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class FixedEncoder(nn.Module):
    """Stands for an encoder whose features are cached, as they are in the recipes."""

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.grid, self.dim = grid, dim


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gemm_speed(m: int, k: int, n: int, dtype: torch.dtype) -> Callable[[], float]:
    """A function that measures floating-point operations per second of `[m, k] @ [k, n]`."""
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    calls = max(1, int(2e10 / (2 * m * k * n)))

    def measure() -> float:
        return calls * 2 * m * k * n / seconds(lambda: [a @ b for _ in range(calls)])

    return measure


def training_step(values: dict, size: int, strategy: str, precision: str) -> Callable[[], None]:
    """One step of the recipe, as the training loop takes it."""
    a, t = values["alignment"], values["train"]
    flow = TarFlow(image_size=size, channels=1, num_classes=10, **values["flow"])
    objective: nn.Module = Likelihood(flow)
    targets = None
    if strategy != "none":
        encoder = FixedEncoder(flow.grid, 320)
        objective = Alignment(flow, encoder, a["at"], strategy, a["gradient"], a["weight"], a["projector_width"])
        targets = torch.randn(t["batch_size"], flow.token_shape[0], 320)
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    average = deepcopy(flow).requires_grad_(False)
    x = torch.rand(t["batch_size"], 1, size, size) * 2 - 1
    y = torch.randint(10, (t["batch_size"],))

    def step() -> None:
        with autocast(torch.device("cpu"), precision):
            loss, _ = objective(x, y, targets=targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update_ema(average.parameters(), flow.parameters(), 0.99, 1)
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", default="fashion_mnist", choices=["digits", "fashion_mnist"])
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--json", default=None)
    o = options.parse_args()
    values = yaml.safe_load(recipe(o.recipe).read_text())
    size = {"digits": 8, "fashion_mnist": 28}[o.recipe]
    width, tokens = values["flow"]["width"], (size // values["flow"]["patch_size"]) ** 2 * values["train"]["batch_size"]

    rows = []
    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        peak, own = gemm_speed(2048, 2048, 2048, dtype), gemm_speed(tokens, width, 4 * width, dtype)
        for strategy in ("none", "reverse"):
            step = training_step(values, size, strategy, precision)
            step()
            with Flops() as counter:
                step()
            measured = [(seconds(step), peak(), own()) for _ in range(o.repeats)]
            time_, peak_, own_ = (median(column) for column in zip(*measured, strict=True))
            flops = counter.total
            rows.append(
                {
                    "precision": precision,
                    "strategy": strategy,
                    "step_seconds": round(time_, 4),
                    "step_gflop": round(flops / 1e9, 2),
                    "gemm_gflops_best": round(peak_ / 1e9),
                    "gemm_gflops_own_shape": round(own_ / 1e9),
                    "gemm_share_of_step_at_best": round(flops / peak_ / time_, 3),
                    "gemm_share_of_step_at_own_shape": round(flops / own_ / time_, 3),
                }
            )
    print(f"{o.recipe} on {machine()}, {torch.get_num_threads()} threads")
    print("  ".join(rows[0]))
    for row in rows:
        print("  ".join(f"{value!s:>{len(name)}}" for name, value in row.items()))
    if o.json:
        with open(o.json, "w") as stream:
            json.dump({"machine": machine(), "recipe": o.recipe, "rows": rows}, stream, indent=2)


if __name__ == "__main__":
    main()
