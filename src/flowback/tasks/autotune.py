"""Measure which decoder is fastest for each block of a flow on this machine."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowback.core.devices import fast_bfloat16, synchronize
from flowback.core.errors import InputError
from flowback.flow.autotune import Autotune, Measurement, machine_name
from flowback.flow.decoding import CausalMap, Solved, Solver, default_tolerance, solve
from flowback.flow.guidance import Guidance
from flowback.flow.tarflow import TarFlow

ROWS = (1, 2, 8, 32)  # batch sizes that are measured; a guided image counts as two rows
FAR_BEHIND = 1.5  # times the best: not worth another run
CLEARLY = 0.97  # of the time of the sequential loop, in every round: what saves less is noise


def candidates(tokens: int, draft: bool = False) -> list[Solver]:
    """The solvers that are compared, the sequential loop first; `draft` adds sweeps that begin in bfloat16.

    Windows of all tokens win where a block converges fast, a quarter of them where it does not. Jacobi's sweeps are those
    of the first with nothing kept, and other windows have not been seen to win.
    """
    windows = dict.fromkeys((None, max(1, tokens // 4)))
    drafted = [Solver("gauss_seidel", draft=True)] if draft else []
    return [Solver("sequential"), *(Solver("gauss_seidel", window) for window in windows), *drafted]


@torch.no_grad()
def autotune(
    flow: TarFlow,
    rows: Sequence[int] = ROWS,
    seed: int = 0,
    repeats: int = 3,
    report: Callable[[str], Any] = lambda line: None,
) -> Autotune:
    """Time all solvers on every block, at several numbers of rows, and keep the fastest.

    Args:
        flow: the flow; its `autotune` is set.
        rows: batch sizes.
        seed: of the images that are decoded, whose labels take turns.
        repeats: rounds in which the solvers take turns; the fastest run of each counts.
        report: called with one line a block.

    Returns:
        What was measured, for `save` into the flow's folder. It holds on machines like this one.

    Raises:
        InputError: if a number of rows is impossible.
    """
    if not rows or min(rows) < 1 or repeats < 1:
        raise InputError(f"rows and repeats must be whole numbers of at least 1, got {list(rows)} and {repeats}")
    like = next(flow.parameters())
    measured = Autotune(machine_name(like.device))
    running = {t: candidates(flow.token_shape[0], fast_bfloat16(flow.device)) for t in range(1, flow.config.blocks + 1)}
    for B in sorted(set(rows)):
        tokens = torch.randn(B, *flow.token_shape, generator=torch.Generator().manual_seed(seed)).to(like)
        classes = flow.class_weights(torch.arange(B) % flow.num_classes if flow.num_classes else None, B)
        best: list[Measurement] = []
        for t in range(flow.config.blocks, 0, -1):
            block: Any = flow.blocks[t - 1]
            F = CausalMap(block, tokens, classes, Guidance())
            fastest, tokens, running[t] = _race(F, running[t], repeats)
            best.insert(0, fastest)
            report(
                f"{B:3} rows  block {t}  {_words(fastest.solver):32} {fastest.seconds:8.4f} s, "
                f"{fastest.sequential_seconds / fastest.seconds:.2f} times as fast as the sequential loop"
            )
        measured.rows[B] = best
    flow.autotune = measured
    return measured


def _race(F: CausalMap, solvers: list[Solver], repeats: int) -> tuple[Measurement, Tensor, list[Solver]]:
    """The fastest solver on one block, the block's input by the sequential loop `[B, N, D]`, and who runs the next race.

    With more rows sweeps only lose against the sequential loop, so that what is far behind now is not tried again.
    """
    tolerance, device = default_tolerance(F.z.dtype, F.z.device), F.z.device
    rounds: list[dict[Solver, float]] = []
    times = dict.fromkeys(solvers, math.inf)
    solved: dict[Solver, Solved] = {}
    exact, sequential = F.z, Solver("sequential")
    for first in (True, *[False] * (repeats - 1)):
        rounds.append({})
        for solver in solvers:
            if not first and times[solver] > FAR_BEHIND * min(times.values()):
                continue
            synchronize(device)
            start = time.perf_counter()
            x, solved[solver] = solve(F, solver, tolerance)
            synchronize(device)
            rounds[-1][solver] = time.perf_counter() - start
            times[solver] = min(times[solver], rounds[-1][solver])
            exact = x if solver == sequential else exact
    best = min(times, key=times.__getitem__)
    if any(found[best] > CLEARLY * found.get(sequential, math.inf) for found in rounds):
        best = sequential  # which is exact, and what other work on the machine slows most
    measured = Measurement(best, times[best], times[sequential], solved[best].sweeps, solved[best].residual)
    return measured, exact, [s for s in solvers if s == sequential or times[s] <= FAR_BEHIND * times[best]]


def _words(solver: Solver) -> str:
    window = f", window {solver.window}" if solver.window else ""
    return f"{solver.method}{window}{', drafted' if solver.draft else ''}"
