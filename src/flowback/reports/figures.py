"""Figures of runs, drawn with matplotlib."""

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#6b7280", "#2563eb", "#d97706", "#059669")


def draw_curves(records: Sequence[Any], against: str = "step") -> Figure:
    """Likelihood, accuracy and alignment of runs against steps or seconds, one panel each."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for panel, draw in zip(figure.subplots(1, 3), (draw_likelihood, draw_accuracy, draw_cosine), strict=True):
        draw(panel, records, against)
    return figure


def draw_overview(records: Sequence[Any], pictures: dict[str, np.ndarray]) -> Figure:
    """Pictures by title beside the curves of likelihood and accuracy: runs in one picture."""
    names = list(pictures)
    rows = [names[::2], names[1::2]] if len(names) % 2 == 0 else [names]
    figure = Figure(figsize=(7.4 + 3.6 * len(rows[0]), 3.6), layout="constrained")
    panels = figure.subplot_mosaic([[*row, "likelihood", "accuracy"] for row in rows])
    for title, picture in pictures.items():
        panels[title].imshow(picture, interpolation="nearest")
        panels[title].set_title(title, fontsize=9.5, loc="left")
        panels[title].set_axis_off()
    draw_likelihood(panels["likelihood"], records)
    draw_accuracy(panels["accuracy"], records)
    return figure


def draw_likelihood(panel: Axes, records: Sequence[Any], against: str = "step") -> None:
    """Nats per dimension, of training as a line and of held-out images as dots; none of flows in different latents."""
    if len({record.latents for record in records}) > 1:
        panel.text(0.5, 0.5, "likelihoods of different latents\ndo not compare", ha="center", va="center", fontsize=9)
        return panel.set_axis_off()
    ends = []
    for record, color in zip(records, cycle(COLORS)):
        held_out = record.series("held_out_nats_per_dim", against)
        panel.plot(*record.series("nats_per_dim", against), color=color, lw=1, alpha=0.45)
        panel.plot(*held_out, "o-", ms=3, color=color, label=_text(record.name))
        ends += [value for value in held_out[1] if math.isfinite(value)]
    if ends:  # the first steps would squeeze the rest into a line
        margin = max(ends) - min(ends) + 0.04
        panel.set_ylim(min(ends) - 0.1 * margin, max(ends) + 0.25 * margin)
    return _finish(panel, "nats per dimension (line: training, dots: held out)", against)


def draw_accuracy(panel: Axes, records: Sequence[Any], against: str = "step") -> None:
    """Held-out accuracy by two rules."""
    for record, color in zip(records, cycle(COLORS)):
        for rule, style in (("single_gradient", "o:"), ("exact", "o-")):
            x, shares = record.series(f"held_out_{rule}", against)
            label = _text(record.name) if rule == "exact" else None
            panel.plot(x, [100 * share for share in shares], style, ms=3, color=color, label=label)
    _finish(panel, "held-out accuracy, % (dotted: single gradient)", against)


def draw_cosine(panel: Axes, records: Sequence[Any], against: str = "step") -> None:
    """Mean cosine between projected hidden states and the encoder's features, of aligned runs."""
    for record, color in zip(records, cycle(COLORS)):
        x, align = record.series("align", against)
        if x:
            panel.plot(x, [-value for value in align], color=color, label=_text(record.name))
    _finish(panel, "cosine with the encoder's features", against)


def _text(name: str) -> str:
    """A name as it is: for matplotlib dollars begin a formula."""
    return name.replace("$", r"\$")


def _finish(panel: Axes, title: str, x: str) -> None:
    panel.set_title(title, fontsize=9.5, loc="left")
    panel.set_xlabel("seconds of training" if x == "seconds" else x, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=7.5, frameon=False)


def draw_cost_accuracy(evaluation: dict[str, Any]) -> Figure:
    """Accuracy of each rule against its passes, as `cost_accuracy` measured them."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    panel = figure.subplots()
    rows = sorted(evaluation["classification"], key=lambda row: row["passes"])
    for row in rows:
        some = f" ({row['images']} images)" if row["images"] != rows[0]["images"] else ""
        panel.plot(row["passes"], 100 * row["accuracy"], "o", label=row["rule"].replace("_", " ") + some)
    _finish(panel, f"accuracy, % of {rows[0]['images']} held-out images", "forward passes per image")
    return figure


def draw_probe(evaluation: dict[str, Any]) -> Figure:
    """Accuracy of the probe at every (block, layer), and the flow's own as lines across (arXiv 2511.22345, figure 4)."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    panel = figure.subplots()
    blocks: dict[int, list[tuple[int, float]]] = {}
    for place, row in enumerate(evaluation["probe"]):
        blocks.setdefault(row["block"], []).append((place, math.nan if row["accuracy"] is None else 100 * row["accuracy"]))
    for points in blocks.values():
        panel.plot(*zip(*points, strict=True), "o-", ms=3)
        panel.axvline(points[-1][0] + 0.5, color="#e5e7eb", lw=0.8)
    panel.set_xticks([(points[0][0] + points[-1][0]) / 2 for points in blocks.values()], list(map(str, blocks)))
    for rule, style in (("single_gradient", ":"), ("exact", "--")):
        if rule in evaluation.get("accuracy", {}):
            label = f"the flow itself, {rule.replace('_', ' ')}"
            panel.axhline(100 * evaluation["accuracy"][rule], color="black", lw=1, ls=style, label=label)
    _finish(panel, "accuracy of a linear probe, %", "layers, block by block from the data (1) to the noise")
    return figure


def draw_sweep(rows: list[dict[str, Any]]) -> Figure:
    """FID against the guidance scale (arXiv 2511.22345, figure 5)."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    panel = figure.subplots()
    panel.plot([row["guidance"] for row in rows], [row["fid"] for row in rows], "o-", color=COLORS[1])
    _finish(panel, f"FID, {rows[0]['extractor']}, {rows[0]['samples']} samples", "guidance scale")
    return figure
