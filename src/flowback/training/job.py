"""What the loop trains: a flow, an autoencoder, both, or a student."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowback.data import ImageSet
from flowback.flow.student import Student
from flowback.latents import Autoencoder, Flow
from flowback.runs.checkpoint import buffers
from flowback.runs.config import Recipe
from flowback.training.inputs import Source
from flowback.training.optim import update_ema


class Job:
    """An objective, the modules that it trains, their averages, and how these are measured and shown.

    Args:
        config: of the run.
        data: its images.
        inputs: what a step reads.
        objective: takes images, labels and what else a `Batch` has, and returns the loss and its parts. Parts that are
            tensors are logged.
        trained: the modules that are optimized, by name.
        averages: those of them of which an average is kept, by the same names.
        average: what is saved, measured and shown: made of these.
    """

    columns: list[str]  # of metrics.csv

    def __init__(
        self,
        config: Recipe,
        data: ImageSet,
        inputs: Source,
        objective: nn.Module,
        trained: dict[str, nn.Module],
        averages: dict[str, nn.Module],
        average: Flow | Autoencoder | Student,
    ) -> None:
        self.config, self.data, self.inputs, self.objective = config, data, inputs, objective
        self.trained, self.averages, self.average = trained, averages, average
        pairs = [(module, trained[name]) for name, module in averages.items()]
        self.buffers = [pair for a, b in pairs for pair in zip(buffers(a).values(), buffers(b).values(), strict=True)]

    def apply(self) -> None:
        """Apply what the configuration asks for to the modules, such as compilation, before they are set up."""

    def begin_step(self, step: int) -> None:
        """Whatever changes with the step, from 0."""

    @torch.no_grad()
    def update_averages(self, step: int) -> None:
        """Take the weights after `step` steps into the averages."""
        for name, module in self.averages.items():
            update_ema(module.parameters(), self.trained[name].parameters(), self.config.train.ema, step)
        for average, current in self.buffers:
            average.copy_(current)

    def settle(self) -> None:
        """What follows from the averages and is saved with them."""

    def row(self, means: dict[str, float]) -> dict[str, float]:
        """What a row of metrics.csv says besides the means of the loss and its parts."""
        return {}

    def check(self, step: int, row: dict[str, float]) -> None:
        """Whether it makes sense to go on after `step` steps and this row of the log, the same in all processes.

        Raises:
            InputError: if it does not.
        """

    def status(self, row: dict[str, float]) -> str:
        """A row in a few words."""
        raise NotImplementedError

    def measure(self, fabric: Any) -> dict[str, float]:
        """The held-out figures of the averages; each process measures its share of the images."""
        raise NotImplementedError

    def picture(self) -> Tensor:
        """Images `[n, C, H, W]` in [-1, 1] that show the averages, in rows of 8."""
        raise NotImplementedError


def offer(model: Autoencoder | Student, place: Path) -> None:
    """Put a trained model into the folder where flows look for it, in place of an earlier one."""
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)
