"""What a run tells: a progress bar (or plain lines where there is no terminal), metrics.csv and TensorBoard events."""

import csv
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from flowback.core.console import say
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
        columns: names of the numbers.
    """

    def __init__(self, run: Path, step: int, columns: Sequence[str] = COLUMNS) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter

        self.file, self.columns, self.fails = run / "metrics.csv", columns, False
        self.events: Any = None
        with self.or_without():
            kept = [row for row in read_metrics(self.file) if row["step"] <= step] if self.file.exists() and step else []
            write_whole(self.file, lambda file: _write_rows(file, "w", kept, self.columns))
        with self.or_without():
            self.events = SummaryWriter(str(run / "events"), purge_step=step + 1)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self.or_without():
            if self.events is not None:
                self.events.close()

    def write(self, step: int, **values: float) -> None:
        """Append one row."""
        with self.or_without():
            _write_rows(self.file, "a", [{"step": step, **values}], self.columns)
        with self.or_without():
            if self.events is not None:
                for name, value in values.items():
                    self.events.add_scalar(name, value, step)

    @contextmanager
    def or_without(self) -> Iterator[None]:
        """What cannot be written in here does not end the run; it is said once."""
        try:
            yield
        except OSError as error:
            if not self.fails:
                sentence = f"the log in {self.file.parent} cannot be written ({error}); training continues"
                say(sentence)
            self.fails = True


def _write_rows(file: Path, mode: str, rows: list[dict[str, float]], columns: Sequence[str]) -> None:
    with file.open(mode, newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")  # rows of an earlier version
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)


def series(rows: list[dict[str, float]], column: str, against: str = "step") -> tuple[list[float], list[float]]:
    """A column of metrics.csv against steps or seconds, without what is not finite."""
    found = [(row[against], row[column]) for row in rows if column in row and against in row]
    found = [(x, value) for x, value in found if math.isfinite(value)]
    return [x for x, _ in found], [value for _, value in found]


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, as numbers; empty fields are left out, and lines that are not whole or no numbers.

    Raises:
        OSError: if the file cannot be read.
    """
    header, *lines = file.read_text("utf-8", errors="replace").split("\n")[:-1] or [""]
    names, rows = header.strip().split(","), []
    names = names if "step" in names else COLUMNS  # where the first line is damaged
    for fields in (line.strip().split(",") for line in lines):
        with suppress(ValueError):  # of other numbers of fields, and of what is no number
            row = {name: float(field) for name, field in zip(names, fields, strict=True) if field}
            if math.isfinite(row.get("step", math.nan)):
                rows.append(row)
    return rows
