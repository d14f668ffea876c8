"""Which decoder for which block: as measured on a machine (`flowback.tasks.autotune`), stored with the model."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from flowback.core.devices import device_name
from flowback.core.errors import InputError
from flowback.core.files import read_record, write_record
from flowback.flow.decoding import DECODERS, Solver

FILE, FORMAT = "decoding.json", 1
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
class Autotune:
    """For one machine: rows -> one measurement a block, block 1 first."""

    machine: str
    rows: dict[int, list[Measurement]] = field(default_factory=dict)

    def solvers(self, rows: int) -> list[Solver]:
        """The solvers measured for the nearest number of rows, on a logarithmic scale."""
        nearest = min(self.rows, key=lambda measured: abs(math.log(measured / max(rows, 1))))
        return [measurement.solver for measurement in self.rows[nearest]]

    def save(self, folder: Path) -> None:
        """Write `decoding.json`."""
        write_record(folder / FILE, FORMAT, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Autotune | None":
        """Read `decoding.json`, if there is one.

        Raises:
            InputError: if it is something else.
        """
        if not (folder / FILE).is_file():
            return None
        with read_record(folder / FILE, FORMAT, "delete it and run `flowback autotune` again") as content:
            rows = {
                int(rows): [Measurement(**{**m, "solver": Solver(**m["solver"])}) for m in measurements]
                for rows, measurements in content["rows"].items()
            }
            if min(rows, default=1) < 1:
                raise ValueError(f"{min(rows)} rows")
            return cls(content["machine"], rows)


def machine_name(device: torch.device) -> str:
    """What a measured speed depends on."""
    version = torch.__version__.split("+")[0]
    name = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device_name(device)
    return f"{name}, torch {version}"


def solvers(
    method: str | Sequence[str], measured: "Autotune | None", blocks: int, rows: int, device: torch.device
) -> list[Solver]:
    """The solver of each block, block 1 first.

    Args:
        method: as in `TarFlow.decode`.
        measured: what "auto" goes by; None where nothing was measured.
        blocks: T.
        rows: images in a batch, twice with guidance.
        device: where they are decoded.

    Raises:
        InputError: if a method does not exist, or their number is not that of the blocks.
    """
    names = [method] * blocks if isinstance(method, str) else list(method)
    for name in names:
        if name != "auto" and name not in DECODERS:
            raise InputError(f"decoding method must be one of auto, {', '.join(DECODERS)}, got {name!r}")
    if len(names) != blocks:
        raise InputError(f"decoding methods must be one, or one for each of {blocks} blocks, got {len(names)}")
    automatic = choose(measured, blocks, rows, device) if "auto" in names else []
    return [automatic[i] if name == "auto" else Solver(name) for i, name in enumerate(names)]


def choose(measured: "Autotune | None", blocks: int, rows: int, device: torch.device) -> list[Solver]:
    """The solvers of `method="auto"`, block 1 first.

    As measured, if that was on a machine like this one. Else the block that sees z first, which depends on long chains of
    tokens, is decoded token by token, and the others in sweeps as long as there are few `rows`.
    """
    T = blocks
    if measured is not None and measured.machine == machine_name(device) and measured.rows:
        solvers = measured.solvers(rows)
        if len(solvers) == T:
            return solvers
    if rows > FEW_ROWS:
        return [Solver("sequential")] * T
    return [Solver("gauss_seidel")] * (T - 1) + [Solver("sequential")]
