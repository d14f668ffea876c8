"""Figures of runs, drawn with matplotlib."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

COLOURS = ("#6b7280", "#2563eb", "#d97706", "#059669")


def draw_curves(runs: list[Any]) -> Figure:
    """Likelihood, alignment and accuracy against steps, one panel each."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, draw in zip(panels, (draw_likelihood, draw_cosine, draw_accuracy), strict=True):
        draw(panel, runs)
    return figure


def draw_overview(runs: list[Any], samples: np.ndarray, what: str) -> Figure:
    """Samples beside the curves of likelihood and accuracy: a run in one picture."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[0.8, 1, 1])
    panels[0].imshow(samples, interpolation="nearest")
    panels[0].set_title(what, fontsize=9.5, loc="left")
    panels[0].set_axis_off()
    draw_likelihood(panels[1], runs)
    draw_accuracy(panels[2], runs)
    return figure


def draw_likelihood(panel: Axes, runs: list[Any]) -> None:
    """Nats per dimension, of training as a line and of held-out images as dots."""
    for run, colour in zip(runs, COLOURS, strict=False):
        panel.plot(*_series(run.rows, "nats_per_dim"), color=colour, lw=1, alpha=0.45)
        panel.plot(*_series(run.rows, "held_out_nats_per_dim"), "o-", ms=3, color=colour, label=run.title)
    ends = [value for run in runs for value in _series(run.rows, "held_out_nats_per_dim")[1]]
    if ends:  # the first steps would squeeze the rest into a line
        margin = max(ends) - min(ends) + 0.04
        panel.set_ylim(min(ends) - 0.1 * margin, max(ends) + 0.25 * margin)
    _finish(panel, "nats per dimension (line: training, dots: held out)")


def draw_cosine(panel: Axes, runs: list[Any]) -> None:
    """Mean cosine between projected hidden states and the encoder's features, of aligned runs."""
    for run, colour in zip(runs, COLOURS, strict=False):
        steps, align = _series(run.rows, "align")
        if steps:
            panel.plot(steps, [-value for value in align], color=colour, label=run.title)
    _finish(panel, "cosine with the encoder's features")


def draw_accuracy(panel: Axes, runs: list[Any]) -> None:
    """Held-out accuracy by each rule."""
    for run, colour in zip(runs, COLOURS, strict=False):
        for rule, style in (("single_gradient", "o--"), ("exact", "o-")):
            steps, share = _series(run.rows, f"held_out_{rule}")
            label = f"{run.title}, {rule.replace('_', ' ')}"
            panel.plot(steps, [100 * s for s in share], style, ms=3, color=colour, label=label)
    _finish(panel, "held-out accuracy, % (one noise draw)")


def _finish(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=9.5, loc="left")
    panel.set_xlabel("step", fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=7.5, frameon=False)


def draw_confusion(counts: Tensor, classes: list[str]) -> Figure:
    """Counts `[K, K]`, row the true class and column the predicted one, shaded by the share of the true class."""
    side = min(9.0, 1.6 + 0.32 * len(classes))
    figure = Figure(figsize=(side, side), layout="constrained")
    panel = figure.subplots()
    panel.imshow((counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy(), cmap="Blues", vmin=0, vmax=1)
    panel.set_xticks(range(len(classes)), classes, fontsize=8, rotation=45 if max(map(len, classes)) > 2 else 0)
    panel.set_yticks(range(len(classes)), classes, fontsize=8)
    panel.set_xlabel("predicted", fontsize=9)
    panel.set_ylabel("true", fontsize=9)
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            if count:
                colour = "white" if count > 0.5 * sum(row) else "black"
                panel.text(j, i, str(count), ha="center", va="center", fontsize=7, color=colour)
    return figure


def draw_against(records: Sequence[Any], against: str, curves: dict[str, tuple[str, bool]]) -> Figure:
    """Held-out figures of several runs against steps or seconds, a panel each."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for panel, (column, (title, _)) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for record, colour in zip(records, cycle(COLOURS)):
            panel.plot(*record.series(column, against), "o-", ms=3, color=colour, label=record.name)
        _finish(panel, title)
        panel.set_xlabel("seconds of training" if against == "seconds" else against, fontsize=9)
    return figure


def draw_cost_accuracy(evaluation: dict[str, Any]) -> Figure:
    """Accuracy of each rule against its passes, as `cost_accuracy` measured them."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    panel = figure.subplots()
    rows = sorted(evaluation["classification"], key=lambda row: row["passes"])
    for i, row in enumerate(rows):
        panel.plot(row["passes"], 100 * row["accuracy"], "o", color=COLOURS[1])
        name, at = row["rule"].replace("_", " "), (row["passes"], 100 * row["accuracy"])
        place, side = ((6, -9), "left") if i % 2 else ((-4, 6), "right")  # close ones would cover each other's names
        panel.annotate(name, at, place, textcoords="offset points", fontsize=7.5, ha=side)
    _finish(panel, f"accuracy, % of {rows[0]['images']} held-out images")
    panel.set_xlabel("forward passes an image", fontsize=9)
    panel.margins(x=0.25, y=0.15)
    return figure


def draw_probe(evaluation: dict[str, Any]) -> Figure:
    """Accuracy of the probe at every (block, layer), and the flow's own as lines across (arXiv 2511.22345, figure 4)."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    panel = figure.subplots()
    rows = evaluation["probe"]
    layers = max(row["layer"] for row in rows)
    for block in sorted({row["block"] for row in rows}):
        own = [row for row in rows if row["block"] == block]
        panel.plot([(block - 1) * layers + row["layer"] for row in own], [100 * row["accuracy"] for row in own], "o-", ms=3)
        panel.axvline(block * layers + 0.5, color="#e5e7eb", lw=0.8)
    blocks = len(rows) // layers
    panel.set_xticks([(b + 0.5) * layers + 0.5 for b in range(blocks)], [str(b + 1) for b in range(blocks)])
    for rule, style in (("single_gradient", ":"), ("exact", "--")):
        if rule in evaluation.get("accuracy", {}):
            label = f"the flow itself, {rule.replace('_', ' ')}"
            panel.axhline(100 * evaluation["accuracy"][rule], color="black", lw=1, ls=style, label=label)
    _finish(panel, "accuracy of a linear probe, %")
    panel.set_xlabel(f"block, from the data (1) to the noise; {layers} layers in each", fontsize=9)
    return figure


def draw_sweep(rows: list[dict[str, Any]]) -> Figure:
    """FID against the guidance scale (arXiv 2511.22345, figure 5)."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    panel = figure.subplots()
    panel.plot([row["guidance"] for row in rows], [row["fid"] for row in rows], "o-", color=COLOURS[1])
    _finish(panel, f"FID, {rows[0]['extractor']}, {rows[0]['samples']} samples")
    panel.set_xlabel("guidance scale", fontsize=9)
    return figure


def _series(rows: list[dict[str, float]], column: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[column]) for row in rows if column in row]
    return [step for step, _ in found], [value for _, value in found]
