"""What a run tells: a progress bar (or plain lines where there is no terminal), metrics.csv and TensorBoard events."""

import csv
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from flowback.core.console import console
from flowback.core.files import write_whole

COLUMNS = [
    "step",
    "seconds",
    "lr",
    "loss",
    "nll",
    "align",
    "nats_per_dim",
    "grad_norm",
    "images_per_second",
    "data_wait",  # share of the time until the batch is there, encoder included where its features are not cached
    "skipped",
    "held_out_nats_per_dim",
    "held_out_single_gradient",
    "held_out_exact",
]


class MetricsLog:
    """Rows of numbers by step, in metrics.csv and as TensorBoard events. What cannot be written does not end a run.

    Args:
        run: the run's folder.
        step: rows after this step, left by a run that was cut off, are dropped.
    """

    def __init__(self, run: Path, step: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter

        self.file, self.fails = run / "metrics.csv", False
        self.events: Any = None
        kept = [row for row in read_metrics(self.file) if row["step"] <= step] if self.file.exists() and step else []
        with self._or_without():
            write_whole(self.file, lambda file: _write_rows(file, "w", kept))
            self.events = SummaryWriter(str(run / "events"), purge_step=step + 1)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._or_without():
            if self.events is not None:
                self.events.close()

    def write(self, step: int, **values: float) -> None:
        """Append one row."""
        with self._or_without():
            _write_rows(self.file, "a", [{"step": step, **values}])
            if self.events is not None:
                for name, value in values.items():
                    self.events.add_scalar(name, value, step)

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        """What fails in here is said once."""
        try:
            yield
        except OSError as error:
            if not self.fails:
                sentence = f"the log in {self.file.parent} cannot be written ({error}); training continues"
                console.print(sentence, highlight=False, soft_wrap=True, markup=False)
            self.fails = True


def _write_rows(file: Path, mode: str, rows: list[dict[str, float]]) -> None:
    with file.open(mode, newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, as numbers; empty fields are left out, and lines that were not written to their end."""
    rows: list[dict[str, float]] = []
    lines = file.read_text("utf-8", errors="replace").splitlines(keepends=True)
    for row in csv.DictReader(line for line in lines if line.endswith("\n")):
        with suppress(ValueError, TypeError):
            rows.append({name: float(value) for name, value in row.items() if value})
    return [row for row in rows if "step" in row]
