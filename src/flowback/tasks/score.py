"""What an exact density says of images: how normal they are, where they are not, and what speaks for a class.

Densities are of images with the noise of training, or of latents with it: they compare under one flow only. Likelihoods are
nats, summed over an image; a map `[rows, columns]` has a number for each token, in the places of the image.

- **log_prob**: `log p(x) = log mean_k p(x | k)`, marginal over equally likely classes.
- **ratio**: `log p(x) - log p_0(x)`, in which what all images share cancels (arXiv 1906.02845). `p_0` is a background flow,
  or the same flow without a label.
- **typicality**: whether held-out images are as far from the middle of their densities (arXiv 1906.02994). An image that is
  far likelier than all of them, like one without any detail, is as strange as an unlikely one.
- **evidence**: token by token `log p(x | a) - log p(x | b)`, which sums to the log-odds of the two classes.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.files import read_record, write_record
from flowback.data.images import Images
from flowback.flow.tarflow import TarFlow
from flowback.latents import Flow, LatentFlow, as_data
from flowback.tasks.classify import class_maps

FILE, FORMAT = "held_out.json", 1
LEAST = 20  # held-out images of which a p-value says something


@dataclass
class HeldOut:
    """The densities of held-out images, which those of others are measured against; `flowback evaluate` stores them.

    Args:
        log_prob: marginal, of each image, ascending.
        ratio: to the same flow without a label, ascending; empty for an unconditional flow.
        mean: of the maps of the likeliest class, `[rows][columns]`.
        std: their standard deviation.
        draws: of noise, that all of these average.
    """

    log_prob: list[float]
    ratio: list[float]
    mean: list[list[float]]
    std: list[list[float]]
    draws: int

    @classmethod
    def of(cls, score: "Score") -> "HeldOut":
        """Of the score of held-out images.

        Raises:
            InputError: if there are fewer than 20 whose densities are finite.
        """
        maps = score.maps[score.log_prob.isfinite()].cpu().double()
        if len(maps) < LEAST:
            raise InputError(f"p-values need at least {LEAST} held-out images with finite densities, got {len(maps)}")
        ratio = [] if score.background is None else _ascending(score.ratio)
        std = maps.std(dim=0).clamp(min=1e-6)
        return cls(_ascending(score.log_prob), ratio, maps.mean(dim=0).tolist(), std.tolist(), score.draws)

    def save(self, folder: Path) -> None:
        """Write `held_out.json`."""
        write_record(folder / FILE, FORMAT, asdict(self))

    @classmethod
    def load(cls, flow: Flow) -> "HeldOut | None":
        """Read it from the flow's folder, if it is there.

        Raises:
            InputError: if it is something else, or of another flow.
        """
        folder = flow.core.folder
        if folder is None or not (folder / FILE).is_file():
            return None
        with read_record(folder / FILE, FORMAT, "delete it and run `flowback evaluate` again") as content:
            found = cls(**content)
            for name, shape in (("mean", flow.grid), ("std", flow.grid), ("log_prob", (-1,)), ("ratio", (-1,))):
                numbers = torch.tensor(getattr(found, name), dtype=torch.float64)
                if not numbers.isfinite().all() or numbers.view(shape).shape != numbers.shape:
                    raise ValueError(f"{name} are not finite numbers of the flow's grid {list(flow.grid)}")
            if len(found.log_prob) < LEAST or not isinstance(found.draws, int) or found.draws < 1:
                raise ValueError(f"it has fewer than {LEAST} images, or no draws")
            return found


def _ascending(values: Tensor) -> list[float]:
    return values[values.isfinite()].cpu().double().sort().values.tolist()


@dataclass
class Score:
    """What a flow's density says of a batch of images; all tensors are where the flow is.

    Args:
        class_maps: the share of each token in `class_log_prob`, `[B, K, rows, columns]`; K is 1 for an unconditional flow.
        background: `log p_0(x)`, `[B]`; None if there is none.
        draws: of noise, that these average.
        held_out: what p-values are counted against, if that is known.
    """

    class_maps: Tensor
    background: Tensor | None
    draws: int
    held_out: HeldOut | None

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
    def typicality(self) -> Tensor:
        """A p-value `[B]` in (0, 1]: the share of typical images whose density is as far from the middle as the image's.

        Of images from where the held-out ones are from, at most the share p has a typicality of p or less, whatever their
        distribution (conformal p-values, arXiv 2104.08279).

        Raises:
            InputError: if the densities of held-out images are not known, or average other draws of noise.
        """
        return self.p_value("log_prob", both_sides=True)

    def p_value(self, name: str, both_sides: bool = False) -> Tensor:
        """A p-value `[B]` of the hypothesis that an image is of those that the held-out images are of.

        Args:
            name: log_prob or ratio: the share of images for which it is not above that of the image.
            both_sides: or twice the share on that side of the image on which fewer lie.

        Raises:
            InputError: as `typicality`, and if the ratio of the held-out images is not known.
        """
        known = sorted(getattr(self._needed(), name))
        if not known:
            raise InputError(f"the {name} of held-out images is not known")
        values = getattr(self, name).cpu().double()  # some accelerators have no float64
        ascending = torch.tensor(known, dtype=values.dtype)
        below = torch.searchsorted(ascending, values, right=True)
        rank = torch.where(values.isfinite(), below, 0) + 1
        if both_sides:
            above = len(ascending) - torch.searchsorted(ascending, values)
            rank = 2 * torch.minimum(rank, above + 1)
        return (rank.double() / (len(ascending) + 1)).clamp(max=1).to(self.class_maps)

    def outliers(self, false_alarms: float = 0.01) -> Tensor:
        """Whether `typicality` is at most `false_alarms`, `[B]`: so many of the typical images are taken for outliers, too.

        Raises:
            InputError: as `typicality`, and if there are too few held-out images for such a small share.
        """
        count = len(self._needed().log_prob)
        if not 2 / (count + 1) <= false_alarms < 1:
            least = f"{2 / (count + 1):.2g}, for {count} held-out images"
            raise InputError(f"the share of false alarms must be from {least}, to below 1, got {false_alarms}")
        return self.typicality <= false_alarms

    @property
    def anomaly(self) -> Tensor:
        """How many standard deviations each token of `maps` is below those of held-out images, `[B, rows, columns]`.

        Raises:
            InputError: as `typicality`.
        """
        known = self._needed()
        mean, std = (self.class_maps.new_tensor(values) for values in (known.mean, known.std))
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
                "held_out=HeldOut.of(score(flow, images))"
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
    """Measure the densities of clean images: K + 1 forward passes an image and draw.

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
    return score_data(flow.core, as_data(flow, images), background_of(flow, background), held_out, draws, batch_size, seed)


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
    generator, size = torch.Generator().manual_seed(seed), max(1, batch_size // max(1, flow.num_classes))
    noisy = [flow.perturb(x, generator).split(size) for _ in range(draws)]
    maps = torch.stack([torch.cat([_maps(flow, part, batch_size) for part in parts]) for parts in noisy]).mean(dim=0)
    p_0 = None
    if background is not None:
        p_0 = torch.stack([torch.cat([background.log_prob(part) for part in parts]) for parts in noisy]).mean(dim=0)
    return Score(maps, p_0, draws, held_out)


def _maps(flow: TarFlow, x: Tensor, batch_size: int) -> Tensor:
    """`class_maps`, or the one map of an unconditional flow, `[B, 1, rows, columns]`."""
    return class_maps(flow, x, None if flow.num_classes else torch.full((len(x), 1), -1), batch_size)
