"""What a run tells: a progress bar (or plain lines where there is no terminal), metrics.csv and TensorBoard events."""

import csv
import logging
import os
from pathlib import Path
from typing import Any


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
    """Rows of numbers by step, in metrics.csv and as TensorBoard events.

    Args:
        run: the run's folder.
        step: rows after this step, left by a run that was cut off, are dropped.
    """

    def __init__(self, run: Path, step: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter

        self.file = run / "metrics.csv"
        kept = [row for row in read_metrics(self.file) if row["step"] <= step] if self.file.exists() and step else []
        with self.file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        self.events = SummaryWriter(str(run / "events"), purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        """Append one row."""
        with self.file.open("a", newline="") as stream:
            csv.DictWriter(stream, COLUMNS).writerow({"step": step, **values})
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def image(self, step: int, name: str, grid: Any) -> None:
        """Add a picture `[3, H, W]` in [0, 1] to the events."""
        self.events.add_image(name, grid, step)

    def close(self) -> None:
        """Flush what is not on disk yet."""
        self.events.close()


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, as numbers; empty fields are left out."""
    with file.open(newline="") as stream:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(stream)]


