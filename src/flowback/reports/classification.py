"""How well a flow classifies: accuracy by rule against its cost, and probabilities that mean what they say."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from flowback.core.devices import synchronize
from flowback.core.errors import InputError
from flowback.data import ImageSet
from flowback.latents import Flow
from flowback.measure.density import seen, spread
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
CALIBRATION = 1000  # held-out images that temperatures are fitted on, and nothing else


def cost_accuracy(
    flow: Flow,
    data: ImageSet,
    images: int | None = None,
    draws: int = 1,
    rules: Sequence[str] = CURVE,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], ClassStatistics]:
    """The cost-accuracy table of a flow on held-out images.

    Args:
        flow: a class-conditional flow.
        data: its images. ClassStatistics come from unlabelled training images, temperatures from a quarter of the held-out ones
            (at most 1,000), figures from the others.
        images: how many of these others; None for all.
        draws: noise draws whose scores are averaged; they multiply the passes.
        rules: names of rules.
        seed: which held-out images calibrate.

    Returns:
        A row a rule: "rule", "passes" (forward passes an image), "accuracy", "images", "seconds_per_image",
        "temperature", "ece_before" and "ece_after" (the temperature); and the statistics, to be stored with the flow.

    Raises:
        InputError: if there are fewer than 4 held-out images, of which one calibrates.
    """
    if len(data.held_out) < 4:
        raise InputError(f"{len(data.held_out)} held-out images are too few for an accuracy; allowed are at least 4")
    core = flow.core
    statistics = fit_statistics(core, seen(flow, data.train, spread(len(data.train), UNLABELLED), data.levels)[0])
    order = torch.randperm(len(data.held_out), generator=torch.Generator().manual_seed(seed))
    count = min(CALIBRATION, len(order) // 4)
    fit, (x, y) = (
        seen(flow, data.held_out, chosen.sort().values.tolist(), data.levels)
        for chosen in (order[:count], order[count:][:images])
    )
    fitted = class_scores_by_all(core, fit[0], rules, statistics, draws)
    found = class_scores_by_all(core, x, rules, statistics, draws, seed=1)
    rows = []
    for rule, scores in found.items():
        scores = scores.cpu()  # as the labels; some accelerators have no float64, in which temperatures are fitted
        _, passes, _ = rule_named(rule, flow.num_classes)
        statistics.calibrate(rule, fitted[rule].cpu(), fit[1])
        synchronize(flow.device)
        started = time.perf_counter()
        class_scores(core, x[:TIMED], rule, draws, statistics=statistics)
        synchronize(flow.device)
        seconds = (time.perf_counter() - started) / len(x[:TIMED])
        rows.append(
            {
                "rule": rule,
                "passes": passes * draws,
                "accuracy": float((scores.argmax(dim=1) == y).double().mean()),
                "images": len(x),
                "seconds_per_image": seconds,
                "temperature": statistics.temperatures[rule],
                "ece_before": calibration_error(scores.softmax(dim=1), y),
                "ece_after": calibration_error(statistics.probabilities(rule, scores), y),
            }
        )
    return rows, statistics
