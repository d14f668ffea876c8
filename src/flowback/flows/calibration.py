"""Which decoder for which block: measured once on a machine, and stored with the model (`method="auto"`)."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowback.devices import device_name, fast_bfloat16, synchronize
from flowback.errors import InputError
from flowback.files import read_json
from flowback.flows.decoders import CausalMap, Solved, Solver, default_tolerance, solve
from flowback.flows.guidance import Guidance

if TYPE_CHECKING:
    from flowback.flows.tarflow import TarFlow

FILE, FORMAT = "decoding.json", 1
ROWS = (1, 2, 8, 32)  # batch sizes that are measured; a guided image counts as two rows
FAR_BEHIND = 1.5  # times the best: not worth another run
CLEARLY = 0.97  # of the time of the sequential loop: what saves less is noise
FEW_ROWS = 4  # up to so many, sweeps are taken to pay where nothing was measured


@dataclass(frozen=True)
class Measurement:
    """The fastest solver of one block for one number of rows, and what was measured of it."""

    solver: Solver
    seconds: float
    sequential_seconds: float
    sweeps: int
    residual: float


@dataclass(frozen=True)
class Calibration:
    """For one machine: rows -> one measurement a block, block 1 first."""

    machine: str
    rows: dict[int, list[Measurement]] = field(default_factory=dict)

    def solvers(self, rows: int) -> list[Solver]:
        """The solvers measured for the nearest number of rows, on a logarithmic scale."""
        nearest = min(self.rows, key=lambda measured: abs(math.log(measured / max(rows, 1))))
        return [measurement.solver for measurement in self.rows[nearest]]

    def save(self, folder: Path) -> None:
        """Write `decoding.json`."""
        (folder / FILE).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Calibration | None":
        """Read `decoding.json`, if there is one.

        Raises:
            InputError: if it is something else.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            content = read_json(file)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, not {FORMAT}")
            rows = {
                int(rows): [Measurement(**{**m, "solver": Solver(**m["solver"])}) for m in measurements]
                for rows, measurements in content["rows"].items()
            }
            if min(rows, default=1) < 1:
                raise ValueError(f"{min(rows)} rows")
            return cls(content["machine"], rows)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{file} is not a calibration ({error}); it can be deleted and made anew") from None


def machine_name(device: torch.device) -> str:
    """What a measured speed depends on."""
    version = torch.__version__.split("+")[0]
    name = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device_name(device)
    return f"{name}, torch {version}"


def choose(flow: "TarFlow", rows: int) -> list[Solver]:
    """The solvers of `method="auto"`, block 1 first.

    As calibrated, if that was on a machine like this one. Else the block that sees z first, which depends on long chains of
    tokens, goes token by token, and the others in sweeps as long as `rows` (images, twice with guidance) are few.
    """
    device = next(flow.parameters()).device
    calibration, T = flow.calibration, flow.config.blocks
    if calibration is not None and calibration.machine == machine_name(device) and calibration.rows:
        solvers = calibration.solvers(rows)
        if len(solvers) == T:
            return solvers
    if rows > FEW_ROWS:
        return [Solver("sequential")] * T
    return [Solver("gauss_seidel")] * (T - 1) + [Solver("sequential")]


def candidates(tokens: int, draft: bool = False) -> list[Solver]:
    """The solvers that a calibration compares, the sequential loop first; `draft` adds sweeps that begin in bfloat16.

    Windows of all tokens win where a block converges fast, a quarter of them where it does not. Jacobi's sweeps are those
    of the first with nothing kept, and other windows have not been seen to win.
    """
    windows = dict.fromkeys((None, max(1, tokens // 4)))
    drafted = [Solver("gauss_seidel", draft=True)] if draft else []
    return [Solver("sequential"), *(Solver("gauss_seidel", window) for window in windows), *drafted]


@torch.no_grad()
def calibrate(
    flow: "TarFlow",
    rows: Sequence[int] = ROWS,
    seed: int = 0,
    repeats: int = 3,
    report: Callable[[str], Any] = lambda line: None,
) -> Calibration:
    """Time all solvers on every block, at several numbers of rows, and keep the fastest.

    Args:
        flow: the flow; its `calibration` is set.
        rows: batch sizes.
        seed: of the images that are decoded, whose labels take turns.
        repeats: rounds in which the solvers take turns; the fastest run of each counts.
        report: called with one line a block.

    Returns:
        The calibration, for `save` into the flow's folder. It holds on machines like this one.

    Raises:
        InputError: if a number of rows is impossible.
    """
    if not rows or min(rows) < 1 or repeats < 1:
        raise InputError(f"{list(rows)} rows, {repeats} times, cannot be measured; allowed are whole numbers of at least 1")
    like = next(flow.parameters())
    calibration = Calibration(machine_name(like.device))
    running = {t: candidates(flow.token_shape[0], fast_bfloat16(flow.device)) for t in range(1, flow.config.blocks + 1)}
    for B in sorted(set(rows)):
        tokens = torch.randn(B, *flow.token_shape, generator=torch.Generator().manual_seed(seed)).to(like)
        classes = flow.class_weights(torch.arange(B) % flow.num_classes if flow.num_classes else None, B)
        best: list[Measurement] = []
        for t in range(flow.config.blocks, 0, -1):
            block: Any = flow.blocks[t - 1]
            F = CausalMap(block, tokens, classes, Guidance())
            measured, tokens, running[t] = _race(F, running[t], repeats)
            best.insert(0, measured)
            report(
                f"{B:3} rows  block {t}  {_words(measured.solver):32} {measured.seconds:8.4f} s, "
                f"{measured.sequential_seconds / measured.seconds:.2f} times as fast as the sequential loop"
            )
        calibration.rows[B] = best
    flow.calibration = calibration
    return calibration


def _race(F: CausalMap, solvers: list[Solver], repeats: int) -> tuple[Measurement, Tensor, list[Solver]]:
    """The fastest solver on one block, the block's input by the sequential loop `[B, N, D]`, and who runs the next race.

    With more rows sweeps only lose against the sequential loop, so that what is far behind now is not tried again.
    """
    tolerance, device = default_tolerance(F.z.dtype, F.z.device), F.z.device
    times = dict.fromkeys(solvers, math.inf)
    solved: dict[Solver, Solved] = {}
    exact, sequential = F.z, Solver("sequential")
    for first in (True, *[False] * (repeats - 1)):
        for solver in solvers:
            if not first and times[solver] > FAR_BEHIND * min(times.values()):
                continue
            synchronize(device)
            start = time.perf_counter()
            x, solved[solver] = solve(F, solver, tolerance)
            synchronize(device)
            times[solver] = min(times[solver], time.perf_counter() - start)
            exact = x if solver == sequential else exact
    best = min(times, key=times.__getitem__)
    if times[best] > CLEARLY * times[sequential]:
        best = sequential  # which is exact
    measured = Measurement(best, times[best], times[sequential], solved[best].sweeps, solved[best].residual)
    return measured, exact, [s for s in solvers if s == sequential or times[s] <= FAR_BEHIND * times[best]]


def _words(solver: Solver) -> str:
    window = f", window {solver.window}" if solver.window else ""
    return f"{solver.method}{window}{', drafted' if solver.draft else ''}"
