"""Decisions by probabilities `[B, K]`: which images to leave to a person, and classes whose shares are not as before."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowback.core.errors import InputError

COVERAGES = (0.95, 0.9, 0.8)


def risk_coverage(probabilities: Tensor, y: Tensor) -> Tensor:
    """The share of errors among the i + 1 images of which the classifier is surest, `[B]` (arXiv 1705.08500).

    Args:
        probabilities: of each class, `[B, K]`; how sure it is of an image is the largest of them.
        y: labels, `[B]`.

    Raises:
        InputError: if there are no images.
    """
    if not len(y):
        raise InputError("risk and coverage need at least 1 image, got 0")
    sure, predicted = probabilities.max(dim=1)
    wrong = (predicted != y)[sure.argsort(descending=True, stable=True)].double()
    return wrong.cumsum(0) / torch.arange(1, len(y) + 1, dtype=wrong.dtype)


def rejection(probabilities: Tensor, y: Tensor, coverages: Sequence[float] = COVERAGES) -> dict[str, float]:
    """What a reject option gains: an image is classified if its largest probability is at least a threshold.

    Args:
        probabilities: `[B, K]`.
        y: labels, `[B]`.
        coverages: shares of the images that are to be classified.

    Returns:
        "accuracy" of all images; "aurc", the mean of `risk_coverage`; and for each coverage "risk_0.9", the share of errors
        among the images that are classified, and "threshold_0.9", the smallest of their largest probabilities.
    """
    risk, sure = risk_coverage(probabilities, y), probabilities.amax(dim=1).sort(descending=True).values
    found = {"accuracy": 1 - float(risk[-1]), "aurc": float(risk.mean())}
    for coverage in coverages:
        last = max(1, round(coverage * len(y))) - 1
        found |= {f"risk_{coverage:g}": float(risk[last]), f"threshold_{coverage:g}": float(sure[last])}
    return found


def with_shares(probabilities: Tensor, shares: Tensor, assumed: Tensor | None = None) -> Tensor:
    """Probabilities `[B, K]` where the classes have other shares than a classifier assumed.

    Saerens et al. (2002), equation 4: `p'(k | x)` is proportional to `p(k | x) shares_k / assumed_k`. Images of a class
    look as before, and only their number changes.

    Args:
        probabilities: `[B, K]`.
        shares: of the classes among the images, or weights in proportion to them.
        assumed: the shares that the probabilities hold for; None for equal ones, those of a flow's posterior.

    Raises:
        InputError: if shares are not K numbers of at least 0, or assumed ones not above 0.
    """
    K = probabilities.shape[1]
    shares = _checked("shares", shares, K, probabilities)
    assumed = _checked("assumed shares", torch.ones(K) if assumed is None else assumed, K, probabilities)
    if not (assumed > 0).all():
        raise InputError("assumed shares must be above 0")
    weighted = probabilities * (shares / assumed)
    total = weighted.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weighted / total, shares)  # all that the image could be has the share 0


def estimate_shares(
    probabilities: Tensor, assumed: Tensor | None = None, tolerance: float = 1e-6, most: int = 10_000
) -> Tensor:
    """The shares `[K]` of classes among unlabelled images by maximum likelihood (Saerens et al. 2002, eq. 9; EM).

    They are as good as the probabilities are calibrated. The likelihood has one maximum if the classes' densities differ.

    Args:
        probabilities: of the images, `[B, K]`.
        assumed: as in `with_shares`.
        tolerance: of the sum of changes at which it ends.
        most: steps.
    """
    K = probabilities.shape[1]
    shares = _checked("assumed shares", torch.ones(K) if assumed is None else assumed, K, probabilities)
    for _ in range(most):
        before, shares = shares, with_shares(probabilities, shares, assumed).mean(dim=0)
        if float((shares - before).abs().sum()) < tolerance:
            break
    return shares


def _checked(name: str, shares: Tensor, K: int, like: Tensor) -> Tensor:
    """Shares that sum to 1."""
    if shares.shape != (K,) or not ((shares >= 0) & shares.isfinite()).all() or not shares.any():
        raise InputError(f"{name} must be {K} finite numbers of at least 0, not all 0, got {shares.tolist()}")
    shares = shares.to(like)
    return shares / shares.sum()
