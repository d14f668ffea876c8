"""Training-free classification: the flow's own likelihood names the class (arXiv 2511.22345, section 3.4).

Every rule maps noised images, one or several draws of `[B, C, H, W]`, to scores `[B, K]`, larger is likelier. An accuracy
is only comparable under the name of its rule. Costs are in forward passes of one image; a backward pass counts two.

- **single_gradient** (3 passes, whatever K is): the published rule, `d log p(x | softmax(lam)) / d lam` at `lam = 0`.
- **z_score** (3): the same, each class' gradient standardized by its mean and deviation over unlabelled images.
- **shortlist_m** (3 + m): the m best of z_score, decided by their exact likelihoods.
- **exact** (K): all likelihoods, `log p(x | k)`.

Why the raw gradient is biased: it is `(g . (E_k - mean E)) / K`, summed over blocks, where g is the likelihood's slope in
the space of class embeddings. A class whose embedding lies far from the mean has a large slope *of either sign* on every
image, and so wins too often whatever the image is; and the curvature that the slope leaves out lowers the likelihood of
exactly these far classes. Both depend on the class far more than on the image, so that unlabelled images show them.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowback.core.devices import put
from flowback.core.errors import InputError
from flowback.core.files import read_json
from flowback.data.images import Images, as_images
from flowback.flow.tarflow import TarFlow
from flowback.latents import Flow

FILE, FORMAT = "classification.json", 1
RULES = ("single_gradient", "z_score", "shortlist_3", "exact")
NEVER = (-30.0, 0.0)  # of `ClassStatistics.left_out`: the right class is always among those that are scored


@dataclass
class ClassStatistics:
    """What z_score and probabilities need to know of a flow: learned from images without training the flow.

    Args:
        mean: of each class' gradient over unlabelled noised images, `[K]`.
        std: its deviation.
        images: how many were used.
        temperatures: rule -> temperature by which its scores are divided before the softmax, fitted on labelled images.
        left_out: rule -> intercept and slope of the logit of the chance that the right class is among those that it does
            not score, as a function of the largest probability of those that it scores.
    """

    mean: list[float]
    std: list[float]
    images: int
    temperatures: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, tuple[float, float]] = field(default_factory=dict)

    def calibrate(self, rule: str, scores: Tensor, y: Tensor) -> None:
        """Learn from a rule's scores `[B, K]` of images with labels `y [B]` what `probabilities` needs."""
        self.temperatures[rule], self.left_out[rule] = fit_calibration(scores, y)

    def probabilities(self, rule: str, scores: Tensor) -> Tensor:
        """A rule's scores `[B, K]` as calibrated probabilities `[B, K]`, of the classes that it leaves out too."""
        return calibrated(scores, self.temperatures[rule], self.left_out.get(rule, NEVER))

    def standardized(self, gradient: Tensor) -> Tensor:
        """Gradients `[B, K]` with every class' own mean and deviation taken out."""
        mean, std = (put(torch.tensor(values, dtype=gradient.dtype), gradient.device) for values in (self.mean, self.std))
        return (gradient - mean) / std

    def save(self, folder: Path) -> None:
        """Write `classification.json`."""
        (folder / FILE).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path | None, classes: int) -> "ClassStatistics | None":
        """Read a folder's `classification.json`, if there is one.

        Raises:
            InputError: if it is something else, or of another number of classes.
        """
        if folder is None or not (file := folder / FILE).is_file():
            return None
        try:
            content = read_json(file)
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            statistics = cls(**content)
            if len(statistics.mean) != classes or len(statistics.std) != classes:
                raise ValueError(f"{len(statistics.mean)} classes, not {classes}")
            numbers = [*statistics.mean, *statistics.std, *statistics.temperatures.values()]
            numbers += [number for intercept, slope in statistics.left_out.values() for number in (intercept, slope)]
            torch.tensor(numbers, dtype=torch.float64)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{file} cannot be used ({error}); it can be deleted and made anew by evaluate") from None
        return statistics


Score = Callable[[TarFlow, Sequence[Tensor], "ClassStatistics | None"], Tensor]


def single_gradient(flow: TarFlow, noisy: Sequence[Tensor], statistics: ClassStatistics | None = None) -> Tensor:
    """One gradient for all classes: `d log p(x | softmax(lam)) / d lam` at `lam = 0`, where all weights are 1/K."""
    start = noisy[0].new_zeros(len(noisy[0]), flow.num_classes)
    return torch.stack([_logit_gradient(flow, x, start) for x in noisy]).mean(0)


def z_score(flow: TarFlow, noisy: Sequence[Tensor], statistics: ClassStatistics | None) -> Tensor:
    """`single_gradient`, standardized class by class."""
    if statistics is None:
        raise InputError(
            "z_score and shortlists need class statistics, of which this flow has none; allowed: single_gradient, exact, or "
            "to run `flowback evaluate` first"
        )
    return statistics.standardized(single_gradient(flow, noisy))


def shortlist(m: int) -> Score:
    """The rule `shortlist_m`: log-likelihoods, nats, of the m classes that z_score takes first, and of no others."""

    def score(flow: TarFlow, noisy: Sequence[Tensor], statistics: ClassStatistics | None) -> Tensor:
        chosen = z_score(flow, noisy, statistics).topk(m, dim=1).indices
        with torch.no_grad():
            log_probs = torch.stack([class_log_probs(flow, x, chosen) for x in noisy]).mean(0)
        return _only(chosen, log_probs, flow.num_classes)

    return score


def _only(chosen: Tensor, scores: Tensor, classes: int) -> Tensor:
    """Scores of the `chosen` classes `[B, m]`, and minus infinity for all others, `[B, classes]`."""
    return scores.new_full((len(chosen), classes), -torch.inf).scatter(1, chosen, scores)


@torch.no_grad()
def exact(flow: TarFlow, noisy: Sequence[Tensor], statistics: ClassStatistics | None = None) -> Tensor:
    """The K conditional log-likelihoods `log p(x | k)`, nats."""
    return torch.stack([class_log_probs(flow, x) for x in noisy]).mean(0)


def class_log_probs(flow: TarFlow, x: Tensor, labels: Tensor | None = None) -> Tensor:
    """`log p(x | k)`, nats, for the `labels [B, m]` of each image, or all K: `[B, m]`, as one batch, on the graph of x."""
    if labels is None:
        labels = torch.arange(flow.num_classes, device=x.device).expand(len(x), -1)
    return flow.log_prob(x.repeat_interleave(labels.shape[1], dim=0), labels.flatten()).view(labels.shape)


def _logit_gradient(flow: TarFlow, x: Tensor, lam: Tensor) -> Tensor:
    with torch.enable_grad():
        lam = lam.detach().requires_grad_()
        log_prob = flow.log_prob(x, lam.softmax(dim=1))
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
    }
    if name in fixed:
        return fixed[name]
    found = re.fullmatch(r"shortlist_([1-9]\d{0,4})", name)
    if found is None:
        allowed = ", ".join(rule for rule in RULES if not rule.startswith("shortlist"))
        raise InputError(f"classification rule {name!r} does not exist; allowed: {allowed}, or shortlist_ and a number")
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
        images: a tensor `[B, C, H, W]` in [-1, 1], or whatever `flowback.data.as_images` takes: PIL images, arrays, paths.
        rule: one of `RULES`, or shortlist_m for another m. Another rule than this is never used.
        draws: noise draws whose scores are averaged.
        batch_size: rows that the flow sees at once; bounds the memory.
        seed: of the noise of training, which is added here.
        statistics: of this flow; None for those in the folder that it was loaded from, where `flowback evaluate` left them.

    Returns:
        Scores `[B, K]`, larger is likelier, where the flow is.

    Raises:
        InputError: if the flow is unconditional, the rule does not exist or lacks its statistics, or there are no draws.
    """
    x = flow.to_data(as_images(images, flow.image_size, flow.channels), torch.Generator().manual_seed(0))
    return class_scores(flow.core, x, rule, draws, batch_size, seed, statistics)


def class_scores(
    flow: TarFlow,
    x: Tensor,
    rule: str,
    draws: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    statistics: ClassStatistics | None = None,
) -> Tensor:
    """`classify` in the flow's own space, of clean `x [B, *data_shape]`."""
    if not flow.num_classes:
        raise InputError("an unconditional flow cannot classify; allowed is a flow with num_classes of at least 1")
    for name, value in (("draws", draws), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value}")
    score, _, rows = rule_named(rule, flow.num_classes)
    statistics = statistics or ClassStatistics.load(flow.folder, flow.num_classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):  # the rules take gradients
        x = flow.enter(x).clone()
        noisy = [flow.perturb(x, generator).split(max(1, batch_size // rows)) for _ in range(draws)]
        return torch.cat([score(flow, parts, statistics) for parts in zip(*noisy, strict=True)])


def class_scores_by_all(
    flow: TarFlow, x: Tensor, rules: Sequence[str], statistics: ClassStatistics, draws: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """`class_scores` by several rules: rule -> scores `[B, K]`. The gradient and the likelihoods are computed once for all."""
    options: dict[str, Any] = {"draws": draws, "seed": seed, "statistics": statistics}
    gradient = class_scores(flow, x, "single_gradient", **options)
    scores = {"single_gradient": gradient, "z_score": statistics.standardized(gradient)}
    if "exact" in rules:
        scores["exact"] = class_scores(flow, x, "exact", **options)
    for rule in rules:
        if rule.startswith("shortlist_") and "exact" in scores:
            chosen = scores["z_score"].topk(rule_named(rule, flow.num_classes)[2], dim=1).indices
            scores[rule] = _only(chosen, scores["exact"].gather(1, chosen), flow.num_classes)
        elif rule not in scores:
            scores[rule] = class_scores(flow, x, rule, **options)
    return {rule: scores[rule] for rule in rules}


def fit_statistics(flow: TarFlow, x: Tensor, batch_size: int = 256, seed: int = 1) -> ClassStatistics:
    """Learn from unlabelled clean images `x [B, C, H, W]` what z_score needs: a pass over some hundred of them.

    Raises:
        InputError: if the flow is unconditional or there are fewer than two images.
    """
    if len(x) < 2:
        raise InputError(f"{len(x)} images have no deviation; allowed are at least 2, better some hundred")
    scores = class_scores(flow, x, "single_gradient", batch_size=batch_size, seed=seed)
    std = scores.std(dim=0).clamp(min=1e-12)
    return ClassStatistics(scores.mean(dim=0).tolist(), std.tolist(), len(x))


def calibrated(scores: Tensor, temperature: float, left_out: tuple[float, float]) -> Tensor:
    """Probabilities `[B, K]` of scores over a temperature; classes without a score (-inf) share `left_out`'s chance."""
    among = (scores / temperature).softmax(dim=1)
    missing = ~scores.isfinite()
    count = missing.sum(dim=1, keepdim=True)
    chance = torch.sigmoid(left_out[0] + left_out[1] * among.amax(dim=1, keepdim=True))
    chance = torch.where(count == 0, 0, chance)
    return among * (1 - chance) + missing * chance / count.clamp(min=1)


def fit_calibration(scores: Tensor, y: Tensor) -> tuple[float, tuple[float, float]]:
    """The temperature and the chance of `calibrated` that make labels `y [B]` likeliest.

    After Guo et al. (arXiv 1706.04599), who have a temperature alone. A rule that scores only some classes would then be
    as sure as if the right one were always among them; a logistic regression says how likely that is, and the temperature
    is fitted where it is so.
    """
    scores = scores.double()
    known = scores.gather(1, y[:, None])[:, 0].isfinite()
    if not known.any():
        return 1.0, (-NEVER[0], 0.0)
    listed = scores[known].clamp(min=-1e30)  # -inf has no gradient in T
    start = (scores[scores.isfinite()].std(correction=0) + 1e-12).log()
    (log_t,) = _minimum(lambda v: F.cross_entropy(listed / (start + v).exp(), y[known]), 1)
    temperature = float((start + log_t).exp())
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
    confidence, predicted = probabilities.max(dim=1)
    right = (predicted == y).to(probabilities.dtype)
    places = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=probabilities.dtype).index_add(0, places, right - confidence)
    return float(gaps.abs().sum() / len(y))


def accuracies(
    flow: TarFlow, x: Tensor, y: Tensor, draws: int = 1, rules: Sequence[str] = ("single_gradient", "exact")
) -> dict[str, float]:
    """Share of images whose label scores highest, by the name of the rule."""
    return {rule: float((predict(flow, x, rule, draws).cpu() == y.cpu()).float().mean()) for rule in rules}


def predict(flow: TarFlow, x: Tensor, rule: str, draws: int = 1) -> Tensor:
    """The likeliest class of each image, `[B]`."""
    return class_scores(flow, x, rule, draws).argmax(dim=1)
