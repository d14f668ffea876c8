"""The report of a comparison: report.html, one self-contained page, and report.json, the same figures for programs.

report.json: {"data", "machine", "runs": …} is flat by run name: each run has "accuracy" {"single_gradient", "exact"}
(shares of the held-out images), "noise_draws" (averaged per accuracy), "nats_per_dim", "bits_per_dim" (an upper bound, see
`flowback.evaluation.metrics.density`), "held_out_images", "steps", "seconds" (of training), "weights", and "strategy".
"""

import base64
import io
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowback.data import ImageSet
from flowback.evaluation.metrics import accuracies, confusion, density, predict
from flowback.evaluation.pictures import class_grid, grid_array
from flowback.flows import TarFlow
from flowback.units import from_levels

METRICS = ("bpd", "accuracy")
DRAWS = 4  # noise draws averaged in a reported accuracy
PER_CLASS = 8
COLOURS = ("#6b7280", "#2563eb", "#d97706", "#059669")


@dataclass
class Measured:
    """A trained flow and what was measured of it."""

    name: str
    title: str
    flow: TarFlow
    rows: list[dict[str, float]]  # of metrics.csv
    figures: dict[str, Any]


def held_out(data: ImageSet, images: int | None = None) -> tuple[Tensor, Tensor]:
    """The held-out images in [-1, 1] and their labels; with `images`, an even spread of that many."""
    count = len(data.held_out)
    indices = torch.linspace(0, count - 1, min(images or count, count)).round().long().tolist()
    pixels, labels = data.held_out[indices]
    return from_levels(pixels, data.levels), labels


def measure(flow: TarFlow, data: ImageSet, metrics: Collection[str] = METRICS, images: int | None = None) -> dict[str, Any]:
    """The figures of a flow on held-out images, in the form of report.json."""
    x, y = held_out(data, images)
    figures: dict[str, Any] = {"held_out_images": len(x)}
    if "accuracy" in metrics and flow.num_classes:
        figures |= {"accuracy": accuracies(flow, x, y, DRAWS), "noise_draws": DRAWS}
    if "bpd" in metrics:
        figures |= density(flow, x, y)
    return figures


def write_report(folder: Path, data: ImageSet, runs: list[Measured], machine: str, guidance: float) -> None:
    """Write report.json and report.html into `folder`."""
    facts = {"data": data.name, "machine": machine, "guidance": guidance}
    figures = facts | {run.name: run.figures for run in runs}
    (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n")

    from jinja2 import Environment, PackageLoader

    x, y = held_out(data)
    sections = []
    for run in runs:
        predicted = predict(run.flow, x, "exact", DRAWS)
        sections.append(
            {
                "title": run.title,
                "plain": _picture(class_grid(run.flow, PER_CLASS)),
                "guided": _picture(class_grid(run.flow, PER_CLASS, guidance)),
                "confusion": _svg(_draw_confusion(confusion(predicted, y, len(data.classes)), data.classes)),
            }
        )
    shown = torch.cat([(y == k).nonzero()[:PER_CLASS, 0] for k in range(len(data.classes))])
    page = Environment(loader=PackageLoader("flowback.evaluation"), autoescape=True).get_template("report.html")
    html = page.render(
        data=data,
        runs=runs,
        sections=sections,
        table=_table(runs),
        curves=_svg(_draw_curves(runs)),
        real=_picture(x[shown]),
        machine=machine,
        guidance=guidance,
        draws=DRAWS,
    )
    (folder / "report.html").write_text(html, encoding="utf-8")


def _table(runs: list[Measured]) -> list[tuple[str, list[str], int | None]]:
    """Rows of the report's table: title, a text for each run, and which is best (None where that has no meaning)."""
    figures = [run.figures for run in runs]
    rules = (("accuracy, exact likelihoods", "exact"), ("accuracy, single gradient", "single_gradient"))
    rows: list[tuple[str, list[float], str, Any]] = [
        (title, [100 * f["accuracy"][rule] for f in figures], "{:.1f} %", max) for title, rule in rules
    ]
    rows += [
        ("nats per dimension", [f["nats_per_dim"] for f in figures], "{:.4f}", min),
        ("bits per dimension (upper bound)", [f["bits_per_dim"] for f in figures], "{:.3f}", min),
        ("training steps", [f["steps"] for f in figures], "{:.0f}", None),
        ("seconds of training", [f["seconds"] for f in figures], "{:.0f}", None),
    ]
    return [
        (title, [text.format(v) for v in values], values.index(best(values)) if best and len(set(values)) > 1 else None)
        for title, values, text, best in rows
    ]


def _draw_curves(runs: list[Measured]) -> Any:
    """Likelihood, alignment and accuracy against steps, one panel each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels: Any = figure.subplots(1, 3)
    for run, colour in zip(runs, COLOURS, strict=False):
        panels[0].plot(*_series(run.rows, "nats_per_dim"), color=colour, lw=1, alpha=0.45)
        panels[0].plot(*_series(run.rows, "held_out_nats_per_dim"), "o-", ms=3, color=colour, label=run.title)
        steps, align = _series(run.rows, "align")
        panels[1].plot(steps, [-value for value in align], color=colour, label=run.title if steps else None)
        for rule, style in (("single_gradient", "o--"), ("exact", "o-")):
            steps, share = _series(run.rows, f"held_out_{rule}")
            label = f"{run.title}, {rule.replace('_', ' ')}"
            panels[2].plot(steps, [100 * s for s in share], style, ms=3, color=colour, label=label)
    titles = ("nats per dimension (line: training, dots: held out)", "cosine with the encoder's features")
    for panel, title in zip(panels, (*titles, "held-out accuracy, % (one noise draw)"), strict=True):
        panel.set_title(title, fontsize=9.5, loc="left")
        panel.set_xlabel("step", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7.5, frameon=False)
    ends = [value for run in runs for value in _series(run.rows, "held_out_nats_per_dim")[1]]
    if ends:  # the first steps would squeeze the rest into a line
        low, high = min(ends), sorted(ends)[-1]
        panels[0].set_ylim(low - 0.08 * (high - low) - 0.01, high + 0.25 * (high - low) + 0.01)
    return figure


def _draw_confusion(counts: Tensor, classes: list[str]) -> Any:
    from matplotlib.figure import Figure

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


def _svg(figure: Any) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return _data_uri("image/svg+xml", stream.getvalue())


def _picture(x: Tensor) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(grid_array(x, PER_CLASS, smallest=32).numpy()).save(stream, format="PNG")
    return _data_uri("image/png", stream.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
