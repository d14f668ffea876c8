"""Training-free classification by the flow's own likelihood (arXiv 2511.22345, section 3.4).

Every rule maps noised images, one or several draws of `[B, C, H, W]`, to scores `[B, K]`, larger is likelier. Accuracies
are only comparable under the same rule. Costs are in forward passes of one image; a backward pass counts two.

- **single_gradient** (3 passes, whatever K is): the published rule, `d log p(x | softmax(lam)) / d lam` at `lam = 0`.
- **z_score** (3): the same, each class' gradient standardized by its mean and standard deviation over unlabelled images.
- **shortlist_m** (3 + m): the exact likelihoods of the m classes that z_score ranks highest.
- **exact** (K): all likelihoods, `log p(x | k)`.
- **exact_fitted** (K): the same with the fitted prior in place of the standard one (`flowback.flow.prior`).

The raw gradient is biased. It is `(g . (E_k - mean E)) / K`, summed over blocks, where g is the likelihood's slope in the
space of class embeddings. A class whose embedding is far from the mean has a large slope *of either sign* on every image,
and so is chosen too often; and the curvature that the slope ignores lowers the likelihood of exactly these classes. Both
depend on the class far more than on the image, so they can be estimated from unlabelled images.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowback.core.devices import put
from flowback.core.errors import InputError
from flowback.core.files import read_record, write_record
from flowback.data.images import Images, as_images
from flowback.flow.tarflow import TarFlow
from flowback.latents import Flow, as_data

FILE, FORMAT = "classification.json", 1
LEAST = 64  # images of which an accuracy says something
RULES = ("single_gradient", "z_score", "shortlist_3", "exact")
NEVER = (-30.0, 0.0)  # of `ClassStatistics.left_out`: the right class is always among those that are scored


@dataclass
class ClassStatistics:
    """What z_score and probabilities need to know of a flow: estimated from images, without training the flow.

    Args:
        mean: of each class' gradient over unlabelled noised images, `[K]`.
        std: its standard deviation, `[K]`.
        images: how many were used.
        temperatures: rule -> temperature by which its scores are divided before the softmax, fitted on labelled images.
        left_out: rule -> intercept and slope of the logit of the probability that the right class is one that the rule
            does not score, as a function of the largest probability of those that it scores.
    """

    mean: list[float]
    std: list[float]
    images: int
    temperatures: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, tuple[float, float]] = field(default_factory=dict)

    def calibrate(self, rule: str, scores: Tensor, y: Tensor) -> None:
        """Fit what `probabilities` needs to a rule's scores `[B, K]` of images with labels `y [B]`."""
        self.temperatures[rule], self.left_out[rule] = fit_calibration(scores, y)

    def probabilities(self, rule: str, scores: Tensor) -> Tensor:
        """A rule's scores `[B, K]` as calibrated probabilities `[B, K]`, also of the classes that it does not score."""
        return calibrated(scores, self.temperatures[rule], self.left_out.get(rule, NEVER))

    def standardized(self, gradient: Tensor) -> Tensor:
        """Gradients `[B, K]`, standardized class by class."""
        mean, std = (put(torch.tensor(values, dtype=gradient.dtype), gradient.device) for values in (self.mean, self.std))
        return (gradient - mean) / std

    def save(self, folder: Path) -> None:
        """Write `classification.json`."""
        write_record(folder / FILE, FORMAT, asdict(self))

    @classmethod
    def load(cls, folder: Path | None, classes: int) -> "ClassStatistics | None":
        """Read a folder's `classification.json`, if there is one.

        Raises:
            InputError: if it is something else, or of another number of classes.
        """
        if folder is None or not (folder / FILE).is_file():
            return None
        with read_record(folder / FILE, FORMAT, "delete it and run `flowback evaluate` again") as content:
            statistics = cls(**content)
            if len(statistics.mean) != classes or len(statistics.std) != classes:
                raise ValueError(f"it has {len(statistics.mean)} classes, the flow {classes}")
            numbers = [*statistics.mean, *statistics.std, *statistics.temperatures.values()]
            numbers += [number for intercept, slope in statistics.left_out.values() for number in (intercept, slope)]
            if not torch.tensor(numbers, dtype=torch.float64).isfinite().all():
                raise ValueError("it has numbers that are not finite")
            return statistics


ROWS = 256  # that the flow sees at once, unless told otherwise
Score = Callable[..., Tensor]  # of a flow, its noised images, statistics, and rows that it may see at once


def single_gradient(
    flow: TarFlow, noisy: Sequence[Tensor], statistics: ClassStatistics | None = None, batch_size: int = ROWS
) -> Tensor:
    """One gradient for all classes: `d log p(x | softmax(lam)) / d lam` at `lam = 0`, where all weights are 1/K."""
    start = noisy[0].new_zeros(len(noisy[0]), flow.num_classes)
    return torch.stack([_logit_gradient(flow, x, start) for x in noisy]).mean(0)


def z_score(flow: TarFlow, noisy: Sequence[Tensor], statistics: ClassStatistics | None, batch_size: int = ROWS) -> Tensor:
    """`single_gradient`, standardized class by class; without `statistics` by those in the flow's folder."""
    return _needed(flow, statistics).standardized(single_gradient(flow, noisy))


def _needed(flow: TarFlow, statistics: ClassStatistics | None) -> ClassStatistics:
    statistics = statistics or ClassStatistics.load(flow.folder, flow.num_classes)
    if statistics is None:
        raise InputError(
            "z_score and shortlists need class statistics, and this flow has none: run `flowback evaluate`, or give "
            "statistics=fit_statistics(flow, images); single_gradient and exact need none"
        )
    return statistics


def shortlist(m: int) -> Score:
    """The rule `shortlist_m`: log-likelihoods, nats, of the m classes that z_score takes first, and of no others."""

    def score(flow: TarFlow, noisy: Sequence[Tensor], statistics: ClassStatistics | None, batch_size: int = ROWS) -> Tensor:
        chosen = listed_only(z_score(flow, noisy, statistics)).topk(m, dim=1).indices
        with torch.no_grad():
            log_probs = torch.stack([class_log_probs(flow, x, chosen, batch_size) for x in noisy]).mean(0)
        return _only(chosen, log_probs, flow.num_classes)

    return score


def _only(chosen: Tensor, scores: Tensor, classes: int) -> Tensor:
    """Scores of the `chosen` classes `[B, m]`, and minus infinity for all others, `[B, classes]`."""
    return scores.new_full((len(chosen), classes), -torch.inf).scatter(1, chosen, scores)


@torch.no_grad()
def exact(
    flow: TarFlow, noisy: Sequence[Tensor], statistics: ClassStatistics | None = None, batch_size: int = ROWS
) -> Tensor:
    """The K conditional log-likelihoods `log p(x | k)`, nats."""
    return torch.stack([class_log_probs(flow, x, batch_size=batch_size) for x in noisy]).mean(0)


@torch.no_grad()
def exact_fitted(
    flow: TarFlow, noisy: Sequence[Tensor], statistics: ClassStatistics | None = None, batch_size: int = ROWS
) -> Tensor:
    """`exact` under the fitted prior."""
    density = partial(flow.log_prob, prior="fitted")
    return torch.stack([_by_class(flow, density, x, None, batch_size) for x in noisy]).mean(0)


def class_log_probs(flow: TarFlow, x: Tensor, labels: Tensor | None = None, batch_size: int | None = None) -> Tensor:
    """`log p(x | k)`, nats, for the `labels [B, m]` of each image, or all K: `[B, m]`, on the graph of x.

    Of all labels in one batch, or of as many at once as `batch_size` rows hold.
    """
    return _by_class(flow, flow.log_prob, x, labels, batch_size)


def class_maps(flow: TarFlow, x: Tensor, labels: Tensor | None = None, batch_size: int | None = None) -> Tensor:
    """The share of each token in `class_log_probs`, nats, `[B, m, rows, columns]`; arguments as there."""

    def density(rows: Tensor, y: Tensor) -> Tensor:
        return flow.log_prob_parts(rows, y).sum(dim=1).unflatten(1, flow.grid)

    return _by_class(flow, density, x, labels, batch_size)


def _by_class(
    flow: TarFlow, density: Callable[..., Tensor], x: Tensor, labels: Tensor | None, batch_size: int | None
) -> Tensor:
    if labels is None:
        labels = torch.arange(flow.num_classes, device=x.device).expand(len(x), -1)
    columns = labels.split(max(1, batch_size // max(1, len(x))) if batch_size else labels.shape[1], dim=1)
    found = [density(x.repeat_interleave(own.shape[1], dim=0), own.flatten()).unflatten(0, own.shape) for own in columns]
    return torch.cat(found, dim=1)


def _logit_gradient(flow: TarFlow, x: Tensor, lam: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        lam = lam.clone().requires_grad_()
        log_prob = flow.log_prob(x.clone(), lam.softmax(dim=1))
        (gradient,) = torch.autograd.grad(log_prob.sum(), lam)
    return gradient


def rule_named(name: str, classes: int) -> tuple[Score, int, int]:
    """A rule by name: its function, its passes per image, and the rows that it puts into one batch for an image.

    Raises:
        InputError: if there is none of that name.
    """
    fixed: dict[str, tuple[Score, int, int]] = {
        "single_gradient": (single_gradient, 3, 1),
        "z_score": (z_score, 3, 1),
        "exact": (exact, classes, classes),
        "exact_fitted": (exact_fitted, classes, classes),
    }
    if name in fixed:
        return fixed[name]
    found = re.fullmatch(r"shortlist_([1-9]\d{0,4})", name)
    if found is None:
        raise InputError(f"rule must be one of {', '.join(fixed)}, or shortlist_ and a number, got {name!r}")
    m = min(int(found[1]), classes)
    return shortlist(m), 3 + m, m


def classify(
    flow: Flow,
    images: Images,
    rule: str = "shortlist_3",
    draws: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    statistics: ClassStatistics | None = None,
) -> Tensor:
    """Score clean images under every class, without any training.

    Args:
        flow: a class-conditional flow.
        images: a tensor `[B, C, H, W]` in [-1, 1], or what else `flowback.data.as_images` takes: PIL images, arrays, paths.
        rule: one of `RULES`, shortlist_m for another m, or exact_fitted. It is never replaced by another one.
        draws: noise draws whose scores are averaged.
        batch_size: rows that the flow sees at once; bounds the memory.
        seed: of the noise of training, which is added here.
        statistics: of this flow; None for those in the folder that it was loaded from, where `flowback evaluate` put them.

    Returns:
        Scores `[B, K]`, larger is likelier, where the flow is.

    Raises:
        InputError: if the flow is unconditional, the rule does not exist or lacks its statistics, or there are no draws.
    """
    return class_scores(flow.core, as_data(flow, images), rule, draws, batch_size, seed, statistics)


def class_scores(
    flow: TarFlow,
    x: Tensor,
    rule: str,
    draws: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    statistics: ClassStatistics | None = None,
    own: slice = slice(None),
) -> Tensor:
    """`classify` in the flow's own space, of clean `x [B, *data_shape]`.

    Processes that share the work each score their `own` images; the noise does not depend on who scores which.
    """
    if not flow.num_classes:
        raise InputError("an unconditional flow cannot classify: num_classes must be at least 1, got 0")
    for name, value in (("draws", draws), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value}")
    score, _, rows = rule_named(rule, flow.num_classes)
    generator = torch.Generator().manual_seed(seed)
    noisy = [flow.perturb(x, generator)[own].split(max(1, batch_size // rows)) for _ in range(draws)]
    return torch.cat([score(flow, parts, statistics, batch_size) for parts in zip(*noisy, strict=True)])


def class_scores_by_all(
    flow: TarFlow,
    x: Tensor,
    rules: Sequence[str],
    statistics: ClassStatistics | None,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Tensor]:
    """`class_scores` by several rules: rule -> scores `[B, K]`. Gradients and likelihoods are computed once for all."""
    options: dict[str, Any] = {"draws": draws, "seed": seed, "statistics": statistics, "batch_size": batch_size}
    gradient = class_scores(flow, x, "single_gradient", **options)
    scores = {"single_gradient": gradient}
    if set(rules) - {"single_gradient", "exact"}:
        scores["z_score"] = _needed(flow, statistics).standardized(gradient)
    if "exact" in rules:
        scores["exact"] = class_scores(flow, x, "exact", **options)
    lists = {rule: rule_named(rule, flow.num_classes)[2] for rule in rules if rule.startswith("shortlist_")}
    known = scores.get("exact")
    for rule, m in sorted(lists.items(), key=lambda item: -item[1]):  # a shorter list is part of a longer one
        if known is None:
            known = scores[rule] = class_scores(flow, x, rule, **options)
        else:
            chosen = listed_only(scores["z_score"]).topk(m, dim=1).indices
            scores[rule] = _only(chosen, known.gather(1, chosen), flow.num_classes)
    return {rule: scores[rule] for rule in rules}


def fit_statistics(flow: Flow, images: Images, batch_size: int = 256, seed: int = 1) -> ClassStatistics:
    """Estimate what z_score needs from unlabelled clean images, in the forms of `classify`; some hundred are enough.

    Raises:
        InputError: if the flow is unconditional or there are fewer than two images whose gradients are finite.
    """
    scores = classify(flow, images, "single_gradient", batch_size=batch_size, seed=seed)
    scores = scores[scores.isfinite().all(dim=1)]
    if len(scores) < 2:
        raise InputError(
            f"class statistics need at least 2 images with finite gradients, better some hundred, got {len(scores)}"
        )
    std = scores.std(dim=0).clamp(min=1e-12)
    return ClassStatistics(scores.mean(dim=0).tolist(), std.tolist(), len(scores))


def calibrated(scores: Tensor, temperature: float, left_out: tuple[float, float]) -> Tensor:
    """Probabilities `[B, K]` of scores `[B, K]`; classes without a score (-inf) share the probability of `left_out`."""
    scores = listed_only(scores)
    missing = ~scores.isfinite()
    among = torch.where(missing.all(dim=1, keepdim=True), 0, scores / temperature).softmax(dim=1)
    count = missing.sum(dim=1, keepdim=True)
    chance = torch.sigmoid(left_out[0] + left_out[1] * among.amax(dim=1, keepdim=True))
    chance = torch.where(count == 0, 0, chance)
    return among * (1 - chance) + missing * chance / count.clamp(min=1)


def fit_calibration(scores: Tensor, y: Tensor) -> tuple[float, tuple[float, float]]:
    """The `temperature` and `left_out` of `calibrated` that make labels `y [B]` likeliest.

    After Guo et al. (arXiv 1706.04599), who fit a temperature alone. A rule that scores only some classes would then be
    as confident as if the right one were always among them; a logistic regression estimates how likely that is, and the
    temperature is fitted to the images for which it is so. A score that is not a number counts as none.
    """
    scores = listed_only(scores.double())
    known = scores.gather(1, y[:, None])[:, 0].isfinite()
    if not known.any():
        return 1.0, (-NEVER[0], 0.0)
    listed = scores[known].clamp(min=-1e30)  # -inf has no gradient in T
    start = (scores[scores.isfinite()].std(correction=0) + 1e-12).log()
    (log_t,) = _minimum(lambda v: F.cross_entropy(listed / (start + v).exp(), y[known]), 1)
    temperature = float((start + log_t).exp())
    if not 0 < temperature < math.inf:
        return 1.0, NEVER
    if known.all():
        return temperature, NEVER
    sure = (scores / temperature).softmax(dim=1).amax(dim=1)
    missed = (~known).double()
    fit = _minimum(lambda v: F.binary_cross_entropy_with_logits(v[0] + v[1] * sure, missed) + 1e-3 * v[1] ** 2, 2)
    return temperature, (float(fit[0]), float(fit[1]))


def _minimum(loss: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Where a convex function of `size` numbers is smallest."""
    values = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([values], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(values)
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return values.detach()


def calibration_error(probabilities: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over equally wide bins of confidence."""
    if not len(y):
        return math.nan
    confidence, predicted = probabilities.max(dim=1)
    right = (predicted == y).to(probabilities.dtype)
    places = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=probabilities.dtype).index_add(0, places, right - confidence)
    return float(gaps.abs().sum() / len(y))


def listed_only(scores: Tensor) -> Tensor:
    """Scores in which what is not finite is minus infinity, as the scores of classes that a rule leaves out are."""
    return torch.where(scores.isfinite(), scores, -torch.inf)


def likeliest(scores: Tensor) -> Tensor:
    """The class `[B]` with the highest score of each image, of scores `[B, K]`; -1 where no score is a finite number."""
    best, classes = listed_only(scores).max(dim=1)
    return torch.where(best.isfinite(), classes, -1)


def likely_labels(flow: Flow, images: Images) -> Tensor:
    """The class of each image by the rule exact, `[B]`, on the CPU; -1 from an unconditional flow.

    Images are in the forms of `classify`.
    """
    if not flow.num_classes:
        return torch.full((len(as_images(images, flow.image_size, flow.channels)),), -1)
    return likeliest(classify(flow, images, rule="exact")).cpu()


def usual_rule(statistics: ClassStatistics | None) -> str:
    """The rule for those who ask for none: a cheap one, and the best of these that can be used."""
    return "shortlist_3" if statistics else "single_gradient"


def readable(rule: str, scores: Tensor, statistics: ClassStatistics | None) -> tuple[Tensor, str]:
    """A rule's scores `[B, K]` as people read them, larger is likelier, and in words what these numbers are."""
    if statistics is not None and rule in statistics.temperatures:
        return statistics.probabilities(rule, scores), "calibrated probabilities"
    if rule == "exact" or rule.startswith("shortlist"):
        return listed_only(scores).softmax(dim=1), "probabilities, not calibrated"
    return listed_only(scores), "scores"


@dataclass(frozen=True)
class FileScores:
    """A batch of image files under every class."""

    files: list[str]  # those that can be read
    x: Tensor  # [B, C, H, W], their images; without a batch dimension if there are none
    scores: dict[str, Tensor]  # rule -> scores [B, K], on the CPU
    unread: list[str]  # a sentence on each of the others


def classify_files(
    flow: Flow,
    files: Sequence[str],
    rules: Sequence[str],
    draws: int = 1,
    batch_size: int = 64,
    statistics: ClassStatistics | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> Iterator[FileScores]:
    """`classify` image files, a batch after the other; those that cannot be read are named, and the others classified.

    Args:
        flow: a flow; without classes, no rules can be asked for.
        files: their paths.
        rules: as in `classify`, any number of them; what they share is computed once.
        draws: noise draws whose scores are averaged.
        batch_size: files that are read at once, and rows that the flow sees at once.
        statistics: of this flow, as in `classify`.
        read: makes an image `[1, C, H, W]` of a file; `as_images` by default.

    Raises:
        InputError: as `classify`.
    """
    for known, x, unread in read_files(flow, files, batch_size, read):
        scores: dict[str, Tensor] = {}
        if known and len(rules) == 1:
            scores = {rules[0]: class_scores(flow.core, as_data(flow, x), rules[0], draws, batch_size, 0, statistics)}
        elif known and rules:
            scores = class_scores_by_all(flow.core, as_data(flow, x), rules, statistics, draws, 0, batch_size)
        yield FileScores(known, x, {rule: found.cpu() for rule, found in scores.items()}, unread)


def read_files(
    flow: Flow, files: Iterable[str], batch_size: int = 64, read: Callable[[str], Tensor] | None = None
) -> Iterator[tuple[list[str], Tensor, list[str]]]:
    """Image files, a batch after the other.

    Args:
        flow: which they are for.
        files: their paths.
        batch_size: files that are read at once.
        read: makes an image `[1, C, H, W]` of a file; `as_images` by default.

    Yields:
        The files that can be read; their images `[B, C, H, W]`, without a batch dimension if there are none; and a sentence
        on each of the others.
    """
    read = read or (lambda file: as_images(file, flow.image_size, flow.channels))
    left = iter(files)
    while part := list(islice(left, batch_size)):
        known, images, unread = [], [], []
        for file in part:
            try:
                images.append(read(file))
                known.append(file)
            except InputError as error:
                unread.append(str(error))
        yield known, torch.cat(images) if images else torch.empty(0), unread


def accuracies(
    flow: TarFlow, x: Tensor, y: Tensor, draws: int = 1, rules: Sequence[str] = ("single_gradient", "exact")
) -> dict[str, float]:
    """Share of images whose label scores highest, by the name of the rule."""
    return {rule: float((predict(flow, x, rule, draws).cpu() == y.cpu()).float().mean()) for rule in rules}


def predict(flow: TarFlow, x: Tensor, rule: str, draws: int = 1, own: slice = slice(None)) -> Tensor:
    """The likeliest class of each image, `[B]`, or of a process' `own`."""
    return likeliest(class_scores(flow, x, rule, draws, own=own))


@dataclass(frozen=True)
class Effort:
    """How much of a measurement a budget of forward passes allows."""

    images: int  # for all that costs the same whatever K is
    exact: int  # of these, for the exact likelihoods of all classes; 0 for none
    passes: int  # forward passes of one image, in all
    classes: int  # K

    def __str__(self) -> str:
        few = "" if self.exact == self.images else f" for {self.exact:,} of them" if self.exact else " left out"
        exact = f", exact likelihoods of {self.classes:,} classes{few}" if self.classes else ""
        return f"{self.images:,} held-out images{exact}, {self.passes:,} forward passes"


def effort(images: int, classes: int, passes: int, each: int, draws: int = 1) -> Effort:
    """What of a measurement `passes` forward passes allow, whatever the number of classes is.

    Exact likelihoods are of fewer images where the passes do not suffice, and are left out where these would be fewer than
    `LEAST`; if the rest costs too much, there are fewer images.

    Args:
        images: that there are.
        classes: K; 0 for an unconditional flow.
        passes: the budget.
        each: passes that an image takes without the exact likelihoods.
        draws: noise draws that an exact likelihood averages.
    """
    images = max(1, min(images, passes // each))
    exact_images = min(images, max(0, passes - images * each) // (classes * draws)) if classes else 0
    exact_images = exact_images if exact_images >= min(images, LEAST) else 0
    return Effort(images, exact_images, images * each + exact_images * classes * draws, classes)
