"""How well a flow classifies: accuracy by rule against its cost, and probabilities that mean what they say."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from flowback.classify import (
    Standards,
    calibration_error,
    classify,
    classify_by_all,
    rule_named,
    standardise,
)
from flowback.data import ImageSet
from flowback.devices import synchronize
from flowback.errors import InputError
from flowback.evaluation.metrics import seen, spread
from flowback.flows import TarFlow

CURVE = ("single_gradient", "z_score", "shortlist_2", "shortlist_3", "shortlist_5", "logit_steps", "exact")
UNLABELLED = 512  # training images, without their labels, that z_score's standards are learned from
TIMED = 128  # images that a rule's seconds are measured on; all others share what the rules have in common
CALIBRATION = 1000  # held-out images that temperatures are fitted on, and nothing else


def cost_accuracy(
    flow: TarFlow,
    data: ImageSet,
    images: int | None = None,
    draws: int = 1,
    rules: Sequence[str] = CURVE,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], Standards]:
    """The cost-accuracy table of a flow on held-out images.

    Args:
        flow: a class-conditional flow.
        data: its images. Standards come from unlabelled training images, temperatures from a quarter of the held-out ones
            (at most 1,000), figures from the others.
        images: how many of these others; None for all.
        draws: noise draws whose scores are averaged; they multiply the passes.
        rules: names of rules.
        seed: which held-out images calibrate.

    Returns:
        A row a rule: "rule", "passes" (forward passes an image), "accuracy", "images", "seconds_per_image",
        "temperature", "ece_before" and "ece_after" (the temperature); and the standards, to be stored with the flow.

    Raises:
        InputError: if there are fewer than 4 held-out images, of which one calibrates.
    """
    if len(data.held_out) < 4:
        raise InputError(f"{len(data.held_out)} held-out images are too few for an accuracy; allowed are at least 4")
    standards = standardise(flow, seen(flow, data.train, spread(len(data.train), UNLABELLED), data.levels)[0])
    order = torch.randperm(len(data.held_out), generator=torch.Generator().manual_seed(seed))
    count = min(CALIBRATION, len(order) // 4)
    fit, (x, y) = (
        seen(flow, data.held_out, chosen.sort().values.tolist(), data.levels)
        for chosen in (order[:count], order[count:][:images])
    )
    fitted = classify_by_all(flow, fit[0], rules, standards, draws)
    found = classify_by_all(flow, x, rules, standards, draws, seed=1)
    rows = []
    for rule, scores in found.items():
        scores = scores.cpu()  # as the labels; some accelerators have no float64, in which temperatures are fitted
        _, passes, _ = rule_named(rule, flow.num_classes)
        standards.calibrate(rule, fitted[rule].cpu(), fit[1])
        synchronize(flow.device)
        started = time.perf_counter()
        classify(flow, x[:TIMED], rule, draws, standards=standards)
        synchronize(flow.device)
        seconds = (time.perf_counter() - started) / len(x[:TIMED])
        rows.append(
            {
                "rule": rule,
                "passes": passes * draws,
                "accuracy": float((scores.argmax(dim=1) == y).double().mean()),
                "images": len(x),
                "seconds_per_image": seconds,
                "temperature": standards.temperatures[rule],
                "ece_before": calibration_error(scores.softmax(dim=1), y),
                "ece_after": calibration_error(standards.probabilities(rule, scores), y),
            }
        )
    return rows, standards
