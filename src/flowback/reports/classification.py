"""How well a flow classifies: accuracy by rule against its cost, and probabilities that mean what they say."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowback.core.devices import synchronize
from flowback.core.errors import InputError
from flowback.flow.tarflow import TarFlow
from flowback.tasks.classify import (
    ClassStatistics,
    calibration_error,
    class_scores,
    class_scores_by_all,
    fit_statistics,
    rule_named,
)

CURVE = ("single_gradient", "z_score", "shortlist_2", "shortlist_3", "shortlist_5", "exact")
UNLABELLED = 512  # training images, without their labels, that z_score's statistics are learned from
TIMED = 128  # images that a rule's seconds are measured on; all others share what the rules have in common
CALIBRATION = 1000  # at most so many held-out images fit temperatures


def cost_accuracy(
    flow: TarFlow,
    x: Tensor,
    y: Tensor,
    unlabelled: Tensor,
    draws: int = 1,
    rules: Sequence[str] = CURVE,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], ClassStatistics]:
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

    Returns:
        A row for each rule: "rule", "passes" (forward passes per image), "accuracy", "images", "seconds_per_image",
        "temperature", "ece_before" and "ece_after" (the temperature); and the statistics, to be stored with the flow.

    Raises:
        InputError: if there are fewer than 4 images, of which one fits temperatures.
    """
    if len(x) < 4:
        raise InputError(f"an accuracy needs at least 4 held-out images, got {len(x)}")
    statistics = fit_statistics(flow, unlabelled)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fitting = min(CALIBRATION, len(x) // 4)
    fit, others = order[:fitting], order[fitting:]
    rows = []
    for rule, scores in class_scores_by_all(flow, x, rules, statistics, draws).items():
        scores = scores.cpu()  # as the labels; some accelerators have no float64, in which temperatures are fitted
        statistics.calibrate(rule, scores[fit], y[fit])
        synchronize(flow.device)
        started = time.perf_counter()
        class_scores(flow, x[:TIMED], rule, draws, statistics=statistics)
        synchronize(flow.device)
        seconds = (time.perf_counter() - started) / len(x[:TIMED])
        rows.append(
            {
                "rule": rule,
                "passes": rule_named(rule, flow.num_classes)[1] * draws,
                "accuracy": float((scores.argmax(dim=1) == y).double().mean()),
                "images": len(x),
                "seconds_per_image": seconds,
                "temperature": statistics.temperatures[rule],
                "ece_before": calibration_error(scores[others].softmax(dim=1), y[others]),
                "ece_after": calibration_error(statistics.probabilities(rule, scores[others]), y[others]),
            }
        )
    return rows, statistics
