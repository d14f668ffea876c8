"""Fit a prior to the z of noised training images: as much of what they show as held-out images agree with.

A freely fitted covariance copies the training images. So all that is estimated is shrunk, by shares that held-out images
choose by their likelihood, one after the other: the means of classes towards the mean of all and towards 0; the variance
of each number, the covariance of all classes, and that of each class, towards the identity. z lie in a temporary file, and
are read in chunks; covariances are estimated in float64.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import IO

import numpy as np
import torch
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.seeds import keyed_generator
from flowback.core.units import LOG_2PI
from flowback.flow.io import fingerprint
from flowback.flow.labels import class_weights
from flowback.flow.prior import FittedPrior
from flowback.flow.tarflow import TarFlow

LEAST = 20  # images to fit to, to choose by, and to measure on
UNLABELED = 4  # one image in so many is mapped without its label, too
SHARES = tuple(share / 10 for share in range(11))  # of what is estimated
RANKS, OWN_RANKS = (16, 64, 256, 1024), (4, 8, 16, 32)
MOST_OWN = 2**24  # numbers in the directions of all classes alone
MOST_DENSE = 4096  # numbers in a z whose whole covariance is computed; of larger ones only the largest directions are
CHUNK = 1024


@dataclass(frozen=True)
class PriorFit:
    """What came of fitting a prior.

    Args:
        prior: None where held-out images gain nothing by it, or less than two standard errors.
        gained: mean log-likelihood of held-out images, that nothing was chosen by, above the standard prior's, nats/dim.
        shares: what was chosen: of the mean and of the class means in it, of variances, of the covariance of all and of
            its directions, of the classes' own covariances and of their directions.
        images: that it was fitted to.
        seconds: that it took.
    """

    prior: FittedPrior | None
    gained: float
    shares: dict[str, float]
    images: int
    seconds: float


Batches = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def fit_prior(flow: TarFlow, training: Batches, held_out: Batches, seed: int = 0) -> PriorFit:
    """Fit a prior to a flow's z; neither the flow nor its folder is changed.

    Args:
        flow: the flow.
        training: clean images as the flow sees them, `[B, *data_shape]`, and their labels `[B]`, in batches.
        held_out: other images. A half chooses the shares, the others say what is gained.
        seed: of the noise of training, which is added here.

    Raises:
        InputError: if there are fewer than 20 images in a part whose z are finite.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile() as a, tempfile.TemporaryFile() as b, tempfile.TemporaryFile() as c:
        own, chosen, measured = (_Stored(file, flow) for file in (a, b, c))
        noise, others, halves = (keyed_generator(seed + i) for i in range(3))
        for x, y in training:
            own.add(x, y, noise)
        for x, y in held_out:  # by chance, since classes may take turns
            first = torch.rand(len(x), generator=halves) < 0.5
            chosen.add(x[first], y[first], others)
            measured.add(x[~first], y[~first], others)
        for part in (own, chosen, measured):
            part.finish()
        for name, part in (("training", own), ("held-out", chosen), ("held-out", measured)):
            if len(part.y) < LEAST:
                raise InputError(f"a prior needs at least {LEAST} {name} images with finite z, got {len(part.y)}")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)  # of randomized singular value decompositions
            prior, shares = _fitted(own, chosen, flow.num_classes + 1, flow.token_shape)
        gains = _gains(prior, measured, flow) / flow.dims
    prior = prior.to(flow.device, flow.data_dtype)
    prior.mean, prior.scale = flow.to_prior(prior.mean), flow.to_prior(prior.scale)
    prior.weights = fingerprint(flow.state_dict())
    gained, error = float(gains.mean()), float(gains.std()) / len(gains) ** 0.5
    return PriorFit(prior if gained > 2 * error else None, gained, shares, own.images, time.perf_counter() - started)


def _gains(prior: FittedPrior, z: "_Stored", flow: TarFlow) -> Tensor:
    """The log-density of each row above that of N(0, I), nats."""
    gains = []
    for rows, y in z.labeled():
        rows = rows.view(-1, *flow.token_shape)
        classes = class_weights(torch.where(y < flow.num_classes, y, -1), len(y), flow.num_classes, rows.dtype, rows.device)
        standard = -0.5 * (rows.square() + LOG_2PI).sum(dim=(1, 2))
        gains.append(prior.log_prob(rows, classes) - standard)
    return torch.cat(gains)


def _fitted(z: "_Stored", held: "_Stored", components: int, shape: tuple[int, int]) -> tuple[FittedPrior, dict[str, float]]:
    """The prior of rows z, and the shares that the rows held chose. Step by step both become more standard, in place."""
    dims = math.prod(shape)
    counts = torch.bincount(z.y, minlength=components)
    means = torch.zeros(components, dims, dtype=torch.float64)
    for rows, y in z.labeled():
        means.index_add_(0, y, rows)
    means /= counts.clamp(min=1)[:, None]
    center = means[counts > 0].mean(dim=0)
    means[counts == 0] = center

    def mean(share: float, apart: float) -> Tensor:
        return share * (center + apart * (means - center))

    def error(of: Tensor) -> float:
        return sum(float((rows - of[y]).square().sum()) for rows, y in held.labeled())

    apart = min(SHARES[::2], key=lambda apart: error(mean(1, apart)))
    share = min(SHARES, key=lambda share: error(mean(share, apart)))
    found = mean(share, apart)
    for part in (z, held):
        part.map(lambda rows, y: rows - found[y])

    variance, seen = (_mean(part, lambda rows: rows.square().sum(dim=0)) for part in (z, held))
    of_numbers, _ = _chosen(variance, seen, [dims])
    scale = _shrunk(variance, of_numbers).sqrt()
    for part in (z, held):
        part.map(lambda rows, _: rows / scale)

    variance, basis = _directions(z, dims)
    seen = _mean(held, lambda rows: (rows @ basis).square().sum(dim=0))
    of_all, rank = _chosen(variance, seen, [n for n in RANKS if n < len(seen)] + [len(seen)])
    shared, basis = _shrunk(variance, of_all)[:rank] - 1, basis[:, :rank]
    for part in (z, held):
        part.map(lambda rows, _: rows + (rows @ basis) * (shared.add(1).rsqrt() - 1) @ basis.T)

    ranks = [n for n in OWN_RANKS if n <= dims and n * components * dims <= MOST_OWN]
    own_basis = torch.zeros(components, dims, max(ranks, default=0), dtype=torch.float64)
    variance = torch.ones(components, own_basis.shape[2], dtype=torch.float64)
    seen, weights = variance.clone(), torch.bincount(held.y, minlength=components)[:, None]
    for k in range(components if ranks else 0):
        rows, n = z.of(k), min(own_basis.shape[2], int(counts[k]))
        _, deviations, own_basis[k, :, :n] = (part[..., :n] for part in torch.svd_lowrank(rows, min(2 * n, *rows.shape)))
        variance[k, :n] = deviations.square() / max(1, len(rows))
        if weights[k]:
            seen[k] = (held.of(k) @ own_basis[k]).square().mean(dim=0)
    of_own, rank = _chosen(variance, seen, ranks or [0], weights)
    own, own_basis = _shrunk(variance, of_own)[:, :rank] - 1, own_basis[..., :rank]
    shares = {"mean": share, "classes": apart, "numbers": of_numbers, "all": of_all, "directions": len(shared)}
    shares |= {"own": of_own, "own_directions": own.shape[1]}
    return FittedPrior(found.view(-1, *shape), scale.view(shape), basis, shared, own_basis, own), shares


def _shrunk(variance: Tensor, share: float) -> Tensor:
    return 1 + share * (variance - 1)


def _chosen(variance: Tensor, seen: Tensor, ranks: list[int], weights: Tensor | float = 1.0) -> tuple[float, int]:
    """The share of the variances `[..., r]` of training images, and how many of these, that held-out images choose.

    Args:
        variance: along directions, the most telling ones first; 1 is standard.
        seen: the mean squares of held-out images along them.
        ranks: what is tried.
        weights: of the components that variances are of.
    """

    def gain(choice: tuple[float, int]) -> float:
        share, rank = choice
        used = _shrunk(variance[..., :rank], share)
        return float((weights * (seen[..., :rank] * (1 - 1 / used) - used.log())).sum())

    share, rank = max(product(SHARES, ranks), key=gain)
    return share, rank if share else 0


def _directions(z: "_Stored", dims: int) -> tuple[Tensor, Tensor]:
    """The variances of rows along directions, the most telling ones first, and these directions `[dims, r]`."""
    if dims <= MOST_DENSE:
        variance, basis = torch.linalg.eigh(_mean(z, lambda rows: rows.T @ rows))
    else:  # of float32, which is what the rows are
        _, deviations, basis = torch.svd_lowrank(torch.from_numpy(z.rows), min(RANKS[-1], len(z.y)), niter=1)
        variance, basis = deviations.double().square() / len(z.y), basis.double()
    variance = variance.clamp(min=1e-6)
    first = (variance - 1 - variance.log()).argsort(descending=True)[: RANKS[-1]]
    return variance[first], basis[:, first]


def _mean(z: "_Stored", of: Callable[[Tensor], Tensor]) -> Tensor:
    """A sum over chunks of rows, by their number."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in z.chunks():
        total = total + of(rows)
    return total / len(z.y)


class _Stored:
    """The z of images in a file, as rows `[rows, N * D]` in units of the standard prior, with the number of their class."""

    y: Tensor
    rows: np.ndarray

    def __init__(self, file: IO[bytes], flow: TarFlow) -> None:
        self.file, self.flow, self.images = file, flow, 0
        self.labels = [torch.empty(0, dtype=torch.long)]

    def add(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """Write the z of images, with noise, under their labels, and some of them under none, too."""
        flow, K = self.flow, self.flow.num_classes
        if not len(x):
            return
        self.images += len(x)
        x, y = flow.perturb(x, generator), y if K else torch.full_like(y, -1)
        again = slice(0, len(x) if K else 0, UNLABELED)
        x, y = torch.cat([x, x[again]]), torch.cat([y, torch.full_like(y[again], -1)])
        z = flow.to_noise(flow.encode(x, y)[0]).flatten(1).float().cpu()
        good = z.isfinite().all(dim=1)
        self.file.write(z[good].numpy().tobytes())
        self.labels.append(torch.where(y < 0, K, y)[good])

    def finish(self) -> None:
        """Open what was written."""
        self.y = torch.cat(self.labels)
        self.file.flush()
        shape = (len(self.y), self.flow.dims)
        self.rows = np.memmap(self.file, np.float32, "r+", shape=shape) if len(self.y) else np.empty(shape, np.float32)

    def chunks(self) -> Iterator[Tensor]:
        """The rows in float64."""
        for start in range(0, len(self.y), CHUNK):
            yield torch.from_numpy(np.array(self.rows[start : start + CHUNK], np.float64))

    def labeled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows with their class numbers."""
        yield from zip(self.chunks(), self.y.split(CHUNK), strict=True)

    def of(self, component: int) -> Tensor:
        """The rows of a class, in float64."""
        return torch.from_numpy(self.rows[(self.y == component).numpy()].astype(np.float64))

    def map(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace rows `[n, N * D]` with class numbers `[n]` by what `change` makes of them."""
        for i, (rows, y) in enumerate(self.labeled()):
            self.rows[i * CHUNK : i * CHUNK + len(rows)] = change(rows, y).numpy()
