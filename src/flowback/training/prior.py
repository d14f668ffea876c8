"""The fitted prior of a run: of the images that it trained on, chosen by those that it held out."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from flowback.core.errors import InputError
from flowback.data import ImageSet, Split
from flowback.data.splits import spread
from flowback.latents import Flow
from flowback.measure.density import seen
from flowback.runs.config import RunConfig
from flowback.runs.folder import run_data, run_of
from flowback.tasks.prior import PriorFit, fit_prior

IMAGES = 10_000
BATCH = 256


def data_of(run: str | Path) -> ImageSet:
    """The data of a run, or of the run that a checkpoint is of.

    Raises:
        InputError: if it is neither, or the data is gone.
    """
    folder = run_of(run)
    if folder is None:
        raise InputError(f"{run} has no config.yaml that names its data; expected the folder of a run")
    return run_data(folder, RunConfig.read(folder / "config.yaml").data)


def fit_to(flow: Flow, data: ImageSet, images: int = IMAGES, seed: int = 0) -> PriorFit:
    """Fit a prior to training images, and choose its shares by held-out ones; the flow gets it if anything is gained.

    Args:
        flow: the flow, which `flow.core.fitted_prior` is set of.
        data: its data.
        images: how many of each part, at most, evenly spread; each costs 1.25 passes.
        seed: of the noise of training.

    Raises:
        InputError: if there are too few images.
    """
    if images < 1:
        raise InputError(f"images must be a whole number of at least 1, got {images}")

    def batches(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        indices = spread(len(split), images)
        for start in range(0, len(indices), BATCH):
            yield seen(flow, split, indices[start : start + BATCH], data.levels)

    with torch.no_grad():
        fit = fit_prior(flow.core, batches(data.train), batches(data.held_out), seed)
    flow.core.fitted_prior = fit.prior
    return fit


def told(fit: PriorFit) -> str:
    """What came of it, in a sentence."""
    s = fit.shares
    shares = f"means {s['mean']:g} (of classes {s['classes']:g}), variances {s['numbers']:g}, covariance {s['all']:g} in "
    shares += f"{s['directions']:g} directions, of classes {s['own']:g} in {s['own_directions']:g}"
    kept = "" if fit.prior else "; nothing is gained, so that nothing is kept"
    return f"prior     {fit.gained:+.5f} nats/dim of held-out images; shares: {shares}; {fit.seconds:.0f} s{kept}"
