"""How well a flow classifies: accuracy by rule against its cost, and probabilities that mean what they say."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowback.core.devices import synchronize
from flowback.core.errors import InputError
from flowback.data.splits import spread
from flowback.flow.tarflow import TarFlow
from flowback.measure.density import confusion
from flowback.tasks.classify import (
    NEVER,
    ClassStatistics,
    calibrated,
    calibration_error,
    class_scores,
    class_scores_by_all,
    fit_statistics,
    likeliest,
    listed_only,
    rule_named,
)

CURVE = ("single_gradient", "z_score", "shortlist_2", "shortlist_3", "shortlist_5", "exact")
UNLABELLED = 512  # training images, without their labels, that z_score's statistics are learned from
TIMED = 64  # images that a rule's seconds are measured on; all others share what the rules have in common
MOST_TIMED = 4096  # passes that this may take
PASSES = (3, 11)  # of an image: of the rules of `CURVE` that take no likelihood; of all but exact
MOST_CLASSES = 20  # of a confusion matrix
CALIBRATION = 1000  # at most so many held-out images fit temperatures


def cost_accuracy(
    flow: TarFlow,
    x: Tensor,
    y: Tensor,
    unlabelled: Tensor,
    draws: int = 1,
    rules: Sequence[str] = CURVE,
    seed: int = 0,
    exact_images: int | None = None,
) -> tuple[list[dict[str, Any]], ClassStatistics, dict[str, Tensor]]:
    """The cost-accuracy table of a flow on held-out images.

    A quarter of the images, at most 1,000, fits a temperature for each rule, and the calibration errors are of the
    others. Accuracies are of all images: neither the rules nor their statistics use a label.

    Args:
        flow: a class-conditional flow.
        x: clean held-out images, as the flow sees them, `[B, *data_shape]`.
        y: their labels, `[B]`, on the CPU.
        unlabelled: clean training images for the class statistics, `[n, *data_shape]`.
        draws: noise draws whose scores are averaged; they multiply the passes.
        rules: names of rules.
        seed: of the choice of the images that fit temperatures.
        exact_images: an even spread of so many images is what the rule exact is measured on, 0 for none; None for all.

    Returns:
        A row for each rule: "rule", "passes" (forward passes per image), "accuracy", "images", "seconds_per_image",
        "temperature", "ece_before" and "ece_after" (the temperature), and "not_finite", the images that have a score which
        is not a number, if any do: it does not count as the highest. The statistics, to be stored with the flow; and the
        scores of each rule, `[B, K]`, on the CPU.

    Raises:
        InputError: if there are fewer than 4 images, of which one fits temperatures.
    """
    if len(x) < 4:
        raise InputError(f"an accuracy needs at least 4 held-out images, got {len(x)}")
    statistics = fit_statistics(flow, unlabelled)
    some = spread(len(x), exact_images) if exact_images != 0 else []
    cheap = [rule for rule in rules if rule != "exact" or len(some) == len(x)]
    found = class_scores_by_all(flow, x, cheap, statistics, draws)
    if "exact" in rules and 0 < len(some) < len(x):
        found["exact"] = class_scores(flow, x[some], "exact", draws)
    found = {rule: scores.cpu() for rule, scores in found.items()}  # some accelerators have no float64 for temperatures
    rows = []
    for rule, scores in found.items():
        own = y if len(scores) == len(x) else y[some]
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
        fit, others = order.split([fitting := min(CALIBRATION, len(own) // 4), len(own) - fitting])
        statistics.calibrate(rule, scores[fit], own[fit])
        passes = rule_named(rule, flow.num_classes)[1] * draws
        timed = x[: max(1, min(TIMED, MOST_TIMED // passes))]
        synchronize(flow.device)
        started = time.perf_counter()
        class_scores(flow, timed, rule, draws, statistics=statistics)
        synchronize(flow.device)
        row = {
            "rule": rule,
            "passes": passes,
            "accuracy": float((likeliest(scores) == own).double().mean()),
            "images": len(own),
            "seconds_per_image": (time.perf_counter() - started) / len(timed),
            "temperature": statistics.temperatures[rule],
            "ece_before": calibration_error(calibrated(scores[others], 1.0, NEVER), own[others]),
            "ece_after": calibration_error(statistics.probabilities(rule, scores[others]), own[others]),
        }
        not_finite = int((scores.isnan() | scores.isposinf()).any(dim=1).sum())
        rows.append(row | ({"not_finite": not_finite} if not_finite else {}))
    return rows, statistics, found


def judged(scores: Tensor, y: Tensor, images: Sequence[int], most: int = 8) -> dict[str, list[list[int]]]:
    """What the scores `[B, K]` take images with labels `y [B]` for.

    Returns:
        "confusion": counts `[K][K]`, true classes in rows, predicted ones in columns; left out if there are more than 20.
        Images that have no finite score are in none of these.
        "best", "worst" and "doubtful": the `most` images whose own class is the likeliest and the least likely, and those
        whose two likeliest classes are nearest to each other: number (of `images`), class, predicted class, and the class
        that the prediction is to be compared with: the own one, or if this is the predicted one the second likeliest.
    """
    scores = listed_only(scores)
    two = scores.topk(min(2, scores.shape[1]), dim=1)
    predicted, second = likeliest(scores), two.indices[:, -1]
    rows = torch.stack([torch.as_tensor(images), y, predicted, torch.where(predicted == y, second, y)], dim=1)
    known = predicted >= 0
    rows, own = rows[known], scores.log_softmax(dim=1).gather(1, y[:, None])[known, 0]
    rows_by = {"best": own.argsort(descending=True), "worst": own.argsort()}
    rows_by["doubtful"] = (two.values[:, 0] - two.values[:, -1])[known].nan_to_num(torch.inf).argsort()
    found = {name: rows[order[:most]].tolist() for name, order in rows_by.items()}
    few = scores.shape[1] <= MOST_CLASSES
    return found | ({"confusion": confusion(rows[:, 2], rows[:, 1], scores.shape[1]).tolist()} if few else {})
