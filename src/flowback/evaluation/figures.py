"""Figures of runs, drawn with matplotlib."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from flowback.evaluation.metrics import Measured

COLOURS = ("#6b7280", "#2563eb", "#d97706", "#059669")


def draw_curves(runs: list[Measured]) -> Figure:
    """Likelihood, alignment and accuracy against steps, one panel each."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, draw in zip(panels, (draw_likelihood, draw_cosine, draw_accuracy), strict=True):
        draw(panel, runs)
    return figure


def draw_overview(runs: list[Measured], samples: np.ndarray, what: str) -> Figure:
    """Samples beside the curves of likelihood and accuracy: a run in one picture."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[0.8, 1, 1])
    panels[0].imshow(samples, interpolation="nearest")
    panels[0].set_title(what, fontsize=9.5, loc="left")
    panels[0].set_axis_off()
    draw_likelihood(panels[1], runs)
    draw_accuracy(panels[2], runs)
    return figure


def draw_likelihood(panel: Axes, runs: list[Measured]) -> None:
    """Nats per dimension, of training as a line and of held-out images as dots."""
    for run, colour in zip(runs, COLOURS, strict=False):
        panel.plot(*_series(run.rows, "nats_per_dim"), color=colour, lw=1, alpha=0.45)
        panel.plot(*_series(run.rows, "held_out_nats_per_dim"), "o-", ms=3, color=colour, label=run.title)
    ends = [value for run in runs for value in _series(run.rows, "held_out_nats_per_dim")[1]]
    if ends:  # the first steps would squeeze the rest into a line
        margin = max(ends) - min(ends) + 0.04
        panel.set_ylim(min(ends) - 0.1 * margin, max(ends) + 0.25 * margin)
    _finish(panel, "nats per dimension (line: training, dots: held out)")


def draw_cosine(panel: Axes, runs: list[Measured]) -> None:
    """Mean cosine between projected hidden states and the encoder's features, of aligned runs."""
    for run, colour in zip(runs, COLOURS, strict=False):
        steps, align = _series(run.rows, "align")
        if steps:
            panel.plot(steps, [-value for value in align], color=colour, label=run.title)
    _finish(panel, "cosine with the encoder's features")


def draw_accuracy(panel: Axes, runs: list[Measured]) -> None:
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


def _series(rows: list[dict[str, float]], column: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[column]) for row in rows if column in row]
    return [step for step, _ in found], [value for _, value in found]
