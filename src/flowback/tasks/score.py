"""What an exact density says of images: how normal they are, where they are not, and what speaks for a class.

Densities are of images with the noise of training, or of latents with it: they compare under one flow only. Likelihoods are
nats, summed over an image; a map `[rows, columns]` has a number for each token, in the places of the image.

- **log_prob**: `log p(x) = log mean_k p(x | k)`, marginal over equally likely classes.
- **ratio**: `log p(x) - log p_0(x)`, in which what all images share cancels (arXiv 1906.02845). `p_0` is a background flow,
  or the same flow without a label.
- **distance**: how far the parts of which the log-density is the sum, for each token what the prior and each block add, are
  from those of training images (Mahalanobis; after arXiv 2006.09273). An image without detail can be likelier than all
  others, and an unlikely part can be made up for by a likely one; neither hides here.
- **typicality**: the p-value of the distance, counted among held-out images (arXiv 2104.08279).
- **evidence**: token by token `log p(x | a) - log p(x | b)`, which sums to the log-odds of the two classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from flowback.core.errors import InputError
from flowback.core.files import save_tensors
from flowback.core.seeds import keyed_generator
from flowback.core.units import bits_per_dim, nats_per_dim
from flowback.data.images import Images
from flowback.flow.tarflow import TarFlow
from flowback.latents import Flow, LatentFlow, as_data
from flowback.tasks.classify import class_maps

FILE, FORMAT = "held_out.safetensors", "1"
LEAST = 20  # images, held out or not, of which a p-value says something
MOST_CELLS = 8  # of parts, along a side: larger grids are averaged


@dataclass
class HeldOut:
    """What is known of images that a flow takes for typical; `flowback evaluate` stores it with the flow.

    Args:
        log_prob: of held-out images, ascending, `[n]`, nats.
        distance: of these, ascending.
        center: mean of the parts of training images, `[P]`.
        precision: inverse of their covariance, `[P, P]`.
        mean: of the held-out images' maps under their likeliest class, `[rows, columns]`.
        std: standard deviation of these.
        draws: of noise, that all numbers average.
    """

    log_prob: Tensor
    distance: Tensor
    center: Tensor
    precision: Tensor
    mean: Tensor
    std: Tensor
    draws: int

    @classmethod
    def fit(cls, held_out: "Score", training: "Score | Tensor") -> Self:
        """Of the score of held-out images, and that of training images, of which the `parts` suffice.

        The covariance is shrunk as by Ledoit and Wolf (2004), so that fewer images than parts do.

        Raises:
            InputError: if there are fewer than 20 of them whose densities are finite.
        """
        from sklearn.covariance import LedoitWolf

        parts = _pooled(training.parts if isinstance(training, Score) else training, held_out.maps.shape[1:])
        parts = parts[parts.isfinite().all(dim=1)].numpy()
        maps = held_out.maps[held_out.log_prob.isfinite()].cpu().double()
        for what, count in (("held-out", len(maps)), ("training", len(parts))):
            if count < LEAST:
                raise InputError(f"p-values need at least {LEAST} {what} images with finite densities, got {count}")
        fitted = LedoitWolf().fit(parts)
        center, precision = (torch.from_numpy(value).float().double() for value in (fitted.location_, fitted.precision_))
        found = cls(
            log_prob=_ascending(held_out.log_prob),
            distance=center.new_empty(0),
            center=center,
            precision=precision,
            mean=maps.mean(dim=0),
            std=maps.std(dim=0).clamp(min=1e-6),
            draws=held_out.draws,
        )
        return replace(found, distance=_ascending(replace(held_out, held_out=found).distance))

    def check_false_alarms(self, share: float) -> None:
        """Check a share of false alarms.

        Raises:
            InputError: if there are too few images for such a small one, or it is none.
        """
        count = len(self.distance)
        if not 1 / (count + 1) <= share < 1:
            least = f"{1 / (count + 1):.2g}, for {count} held-out images"
            raise InputError(f"the share of false alarms must be from {least}, to below 1, got {share}")

    def save(self, folder: Path) -> None:
        """Write `held_out.safetensors`."""
        tensors = {name: value.float() for name, value in vars(self).items() if isinstance(value, Tensor)}
        save_tensors(tensors, folder / FILE, {"format": FORMAT, "draws": str(self.draws)})

    @classmethod
    def load(cls, flow: Flow) -> Self | None:
        """Read it from the flow's folder, if it is there.

        Raises:
            InputError: if it is something else, or of another flow.
        """
        folder = flow.core.folder
        if folder is None or not (folder / FILE).is_file():
            return None
        try:
            with safe_open(folder / FILE, "pt") as file:
                facts = file.metadata() or {}
                if facts.get("format") != FORMAT:
                    raise ValueError(f"it is not of format {FORMAT}")
                tensors = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118  (not a dictionary)
                found = cls(**tensors, draws=int(facts["draws"]))
            P = math.prod(_cells(flow.grid)) * (flow.config.blocks + 1)
            shapes: dict[str, tuple[int, ...]] = {"center": (P,), "precision": (P, P), "mean": flow.grid, "std": flow.grid}
            shapes |= {name: (len(getattr(found, name)),) for name in ("log_prob", "distance")}
            for name, shape in shapes.items():
                value = getattr(found, name)
                if value.shape != shape or not value.isfinite().all():
                    raise ValueError(f"{name} must be finite numbers {list(shape)}, got {list(value.shape)}")
            if min(len(found.log_prob), len(found.distance)) < LEAST or found.draws < 1:
                raise ValueError(f"it has fewer than {LEAST} images, or no draws")
            return found
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{folder / FILE} cannot be used ({error}); delete it and run `flowback evaluate` again"
            ) from error


def _ascending(values: Tensor) -> Tensor:
    return values[values.isfinite()].cpu().double().sort().values


def _cells(grid: tuple[int, int]) -> tuple[int, int]:
    return (min(grid[0], MOST_CELLS), min(grid[1], MOST_CELLS))


def _pooled(parts: Tensor, grid: tuple[int, int] | torch.Size) -> Tensor:
    """Parts `[B, T + 1, N]` as vectors `[B, P]`, on the CPU in float64; large grids averaged."""
    rows, columns = grid
    return adaptive_avg_pool2d(parts.cpu().double().unflatten(2, (rows, columns)), _cells((rows, columns))).flatten(1)


@dataclass
class Score:
    """What a flow's density says of a batch of images; all tensors are where the flow is.

    Args:
        class_maps: the share of each token in `class_log_prob`, `[B, K, rows, columns]`; K is 1 for an unconditional flow.
        parts: of the log-density without a label, `[B, T + 1, N]`, see `TarFlow.log_prob_parts`.
        background: `log p_0(x)`, `[B]`; None if there is none.
        draws: of noise, that these average.
        held_out: what p-values are counted against, if that is known.
        bits_per_dim: of the discrete pixels, an upper bound, `[B]`; None of latents.
    """

    class_maps: Tensor
    parts: Tensor
    background: Tensor | None
    draws: int
    held_out: HeldOut | None
    bits_per_dim: Tensor | None = None

    @property
    def class_log_prob(self) -> Tensor:
        """`log p(x | k)`, nats, `[B, K]`."""
        return self.class_maps.sum(dim=(2, 3))

    @property
    def log_prob(self) -> Tensor:
        """`log p(x)`, nats, `[B]`: marginal over equally likely classes."""
        return self.class_log_prob.logsumexp(dim=1) - math.log(self.class_maps.shape[1])

    @property
    def likeliest(self) -> Tensor:
        """The class under which each image is likeliest, `[B]`."""
        return self.class_log_prob.argmax(dim=1)

    @property
    def maps(self) -> Tensor:
        """The share of each token in the log-density of the likeliest class, `[B, rows, columns]`."""
        return self.class_maps[torch.arange(len(self.class_maps)), self.likeliest]

    @property
    def ratio(self) -> Tensor:
        """`log p(x) - log p_0(x)`, nats, `[B]`.

        Raises:
            InputError: if there is no background.
        """
        if self.background is None:
            raise InputError("the ratio of an unconditional flow needs a background flow: score(…, background=flow)")
        return self.log_prob - self.background

    @property
    def distance(self) -> Tensor:
        """How far the parts of the log-density are from those of training images, `[B]`: the squared Mahalanobis distance.

        Raises:
            InputError: if that is not known.
        """
        known = self._needed()
        off = _pooled(self.parts, self.class_maps.shape[2:]) - known.center
        return ((off @ known.precision) * off).sum(dim=1).to(self.class_maps)

    @property
    def typicality(self) -> Tensor:
        """A p-value `[B]` in (0, 1]: the share of typical images that are as distant as the image.

        Of images from where the held-out ones are from, the share p has a typicality of p or less, whatever their
        distribution is (conformal p-values, arXiv 2104.08279).

        Raises:
            InputError: if held-out images are not known, or average other draws of noise.
        """
        return self.p_value("distance")

    def p_value(self, name: str) -> Tensor:
        """The share `[B]` of held-out images that are as strange as an image, this one counted.

        Args:
            name: what by: "log_prob", the lower the stranger, or "distance", the larger the stranger.

        Raises:
            InputError: as `typicality`, and if there is no such figure.
        """
        if name not in ("log_prob", "distance"):
            raise InputError(f"a p-value must be of log_prob or distance, got {name!r}")
        sign = 1 if name == "log_prob" else -1
        known = sign * getattr(self._needed(), name)
        values = sign * getattr(self, name).cpu().double()  # not all devices have float64
        stranger = (known <= values[:, None]).sum(dim=1)
        stranger = torch.where(values.isfinite(), stranger, 0)
        return ((stranger + 1).double() / (len(known) + 1)).to(self.class_maps)

    def outliers(self, false_alarms: float = 0.01) -> Tensor:
        """Whether `typicality` is at most `false_alarms`, `[B]`: so many of the typical images are taken for outliers, too.

        Raises:
            InputError: as `typicality`, and if there are too few held-out images for such a small share.
        """
        self._needed().check_false_alarms(false_alarms)
        return self.typicality <= false_alarms

    @property
    def anomaly(self) -> Tensor:
        """How many standard deviations each token of `maps` is below those of held-out images, `[B, rows, columns]`.

        Raises:
            InputError: as `typicality`.
        """
        known = self._needed()
        mean, std = (value.to(self.class_maps) for value in (known.mean, known.std))
        return (mean - self.maps) / std

    def evidence(self, a: int | Tensor, b: int | Tensor) -> Tensor:
        """What each token says for class a and against class b, nats, `[B, rows, columns]`.

        Their sum is `class_log_prob[:, a] - class_log_prob[:, b]`, the log-odds of two equally likely classes.

        Args:
            a: a class for all images, or one for each, `[B]`.
            b: the same.

        Raises:
            InputError: if one is no class of the flow.
        """
        return self._class_map(a) - self._class_map(b)

    def _class_map(self, label: int | Tensor) -> Tensor:
        count, K = self.class_maps.shape[:2]
        k = torch.as_tensor(label, device=self.class_maps.device).expand(count)
        if not ((k >= 0) & (k < K)).all():
            raise InputError(f"a class must be from 0 to {K - 1}, got {label}")
        return self.class_maps[torch.arange(count, device=k.device), k]

    def _needed(self) -> HeldOut:
        if self.held_out is None:
            raise InputError(
                "p-values need the densities of held-out images, and this flow has none: run `flowback evaluate`, or give "
                "held_out=HeldOut.fit(score(flow, held_out_images), score(flow, training_images))"
            )
        if self.held_out.draws != self.draws:
            raise InputError(f"p-values need the {self.held_out.draws} draws of noise of held-out images, got {self.draws}")
        return self.held_out


@torch.no_grad()
def score(
    flow: Flow,
    images: Images,
    background: Flow | None = None,
    held_out: HeldOut | None = None,
    draws: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> Score:
    """Measure the densities of clean images: K + 1 forward passes an image and draw, and one for the bits of pixels.

    Args:
        flow: a flow; also an unconditional one.
        images: a tensor `[B, C, H, W]` in [-1, 1], or what else `flowback.data.as_images` takes: PIL images, arrays, paths.
        background: a flow of the same space with the same noise, whose density without a label is `p_0`; None for the flow
            itself, if it has classes.
        held_out: of this flow; None for that in the folder that it was loaded from, where `flowback evaluate` put it.
        draws: noise draws whose log-densities are averaged; None for those of the held-out images, or 1.
        batch_size: rows that the flow sees at once; bounds the memory. Of each image a map for each class is kept.
        seed: of the noise of training, which is added here.

    Raises:
        InputError: if images do not fit, there are no draws, or the background flow is of another space.
    """
    held_out = held_out or HeldOut.load(flow)
    draws = draws or (held_out.draws if held_out else 1)
    x = as_data(flow, images)
    found = score_data(flow.core, x, background_of(flow, background), held_out, draws, batch_size, seed)
    return (
        found if isinstance(flow, LatentFlow) else replace(found, bits_per_dim=_bits(flow, x, found.likeliest, batch_size))
    )


def background_of(flow: Flow, background: Flow | None) -> TarFlow | None:
    """The flow whose density is `p_0`.

    Raises:
        InputError: if it is of another space, or of the same with other noise.
    """
    if background is None:
        return flow.core if flow.num_classes else None
    space, other = (_space(one) for one in (flow, background))
    if space != other:
        raise InputError(f"the background flow must model {space}, got one of {other}")
    return background.core


def _space(flow: Flow) -> str:
    what = f"latents of {flow.autoencoder.config.title}" if isinstance(flow, LatentFlow) else "images"
    return f"{what} {list(flow.core.data_shape)} with {flow.core.config.noise} noise {flow.core.config.noise_std}"


@torch.no_grad()
def score_data(
    flow: TarFlow,
    x: Tensor,
    background: TarFlow | None,
    held_out: HeldOut | None = None,
    draws: int = 1,
    batch_size: int = 256,
    seed: int = 0,
) -> Score:
    """`score` in the flow's own space, of clean `x [B, *data_shape]`."""
    for name, value in (("draws", draws), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value}")
    noisy = _noisy(flow, x, draws, seed)
    size = max(1, batch_size // max(1, flow.num_classes))
    maps = [torch.cat([_maps(flow, part, batch_size) for part in one.split(size)]) for one in noisy]
    parts = _mean_parts(flow, noisy, batch_size)
    p_0 = None
    if background is not None:
        p_0 = (parts if background is flow else _mean_parts(background, noisy, batch_size)).sum(dim=(1, 2))
    return Score(torch.stack(maps).mean(dim=0), parts, p_0, draws, held_out)


@torch.no_grad()
def log_prob_parts(flow: TarFlow, x: Tensor, draws: int = 1, batch_size: int = 256, seed: int = 0) -> Tensor:
    """The `parts` of `score_data`, alone: one pass an image and draw."""
    return _mean_parts(flow, _noisy(flow, x, draws, seed), batch_size)


def _noisy(flow: TarFlow, x: Tensor, draws: int, seed: int) -> list[Tensor]:
    """`x` with noise, draw by draw. All images have the same, so that figures do not depend on others beside them."""
    return [flow.perturb(x, [keyed_generator(seed, draw) for _ in x]) for draw in range(draws)]


def _mean_parts(flow: TarFlow, noisy: Sequence[Tensor], batch_size: int) -> Tensor:
    parts = [torch.cat([flow.log_prob_parts(part) for part in one.split(batch_size)]) for one in noisy]
    return torch.stack(parts).mean(dim=0)


def _bits(flow: TarFlow, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """An upper bound of the marginal's bits per dimension: `p(x) >= p(x | y) / K`, whatever y is."""
    labels = y if flow.num_classes else torch.full_like(y, -1)
    parts = zip(
        flow.dequantize(x, [keyed_generator(0) for _ in x]).split(batch_size), labels.split(batch_size), strict=True
    )
    log_prob = torch.cat([flow.log_prob(*part) for part in parts]) - math.log(max(1, flow.num_classes))
    return bits_per_dim(log_prob, flow.dims, flow.levels)


@torch.no_grad()
def evidence(
    flow: Flow, images: Images, a: Tensor, b: Tensor, draws: int = 1, batch_size: int = 256, seed: int = 0
) -> Tensor:
    """`score(…).evidence(a, b)` of clean images in 2 passes an image and draw, however many classes there are.

    Args:
        flow: a class-conditional flow.
        images: as in `score`.
        a: the classes that are argued for, `[B]`.
        b: the classes that are argued against, `[B]`.
        draws: noise draws that are averaged.
        batch_size: rows that the flow sees at once.
        seed: of the noise.

    Returns:
        Nats, `[B, rows, columns]`.
    """
    x = as_data(flow, images)
    labels, size, total = torch.stack([a, b], dim=1).to(x.device), max(1, batch_size // 2), []
    for noisy in _noisy(flow.core, x, draws, seed):
        parts = zip(noisy.split(size), labels.split(size), strict=True)
        total.append(torch.cat([class_maps(flow.core, *part) for part in parts]))
    maps = torch.stack(total).mean(dim=0)
    return maps[:, 0] - maps[:, 1]


def _maps(flow: TarFlow, x: Tensor, batch_size: int) -> Tensor:
    """`class_maps`, or the one map of an unconditional flow, `[B, 1, rows, columns]`."""
    return class_maps(flow, x, None if flow.num_classes else torch.full((len(x), 1), -1), batch_size)


def figures(flow: Flow, found: Score, names: Sequence[str], false_alarms: float = 0.01) -> list[dict[str, Any]]:
    """What is known of each image, as a row of a table: nats, bits, p-values, and the likeliest class with its posterior.

    Args:
        flow: that scored them.
        found: their score.
        names: of the classes.
        false_alarms: as in `Score.outliers`.
    """
    columns: dict[str, list[Any]] = {"log_prob": found.log_prob.tolist()}
    columns["nats_per_dim"] = nats_per_dim(found.log_prob, flow.dims).tolist()
    if found.bits_per_dim is not None:
        columns["bits_per_dim"] = found.bits_per_dim.tolist()
    if found.held_out is not None:
        columns |= {"typicality": found.typicality.tolist(), "outlier": found.outliers(false_alarms).tolist()}
    if found.background is not None:
        columns["ratio"] = found.ratio.tolist()
    if flow.num_classes:
        posterior = found.class_log_prob.softmax(dim=1).amax(dim=1)
        columns |= {"class": [names[k] for k in found.likeliest.tolist()], "posterior": posterior.tolist()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
