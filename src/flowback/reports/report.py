"""The report of a comparison: report.html, one self-contained page; report.json, the figures for programs; overview.png.

report.json: {"data", "machine", "runs": …} is flat by run name: each run has "accuracy" {"single_gradient", "exact"}
(shares of the held-out images), "noise_draws" (averaged per accuracy), "nats_per_dim", "bits_per_dim" (an upper bound, see
`flowback.measure.density.density`), "held_out_images", "steps", "seconds" (of training), "weights", and "strategy".
"""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowback.data import ImageSet
from flowback.data.pictures import grid_array
from flowback.latents import Flow, LatentFlow
from flowback.measure.density import confusion, density, held_out, seen, spread
from flowback.reports.figures import draw_confusion, draw_curves, draw_overview
from flowback.tasks.classify import accuracies, classify
from flowback.tasks.sampling import class_grid

PER_CLASS = 8
DRAWS = 4  # noise draws averaged in a reported accuracy


@dataclass
class Measured:
    """A trained flow and what was measured of it."""

    name: str
    title: str
    flow: Flow
    rows: list[dict[str, float]]  # of metrics.csv
    figures: dict[str, Any]


def write_report(folder: Path, data: ImageSet, runs: list[Measured], machine: str, guidance: float) -> None:
    """Write report.json, report.html and overview.png into `folder`."""
    facts = {"data": data.name, "machine": machine, "guidance": guidance}
    figures = facts | {run.name: run.figures for run in runs}
    (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n")

    from jinja2 import Environment, PackageLoader

    x, y = held_out(data)
    sections, guided = [], x
    for run in runs:
        predicted = classify(run.flow, x, "exact", DRAWS).argmax(dim=1)
        guided = grid_array(class_grid(run.flow, PER_CLASS, guidance), PER_CLASS, smallest=32)
        sections.append(
            {
                "title": run.title,
                "plain": as_picture(grid_array(class_grid(run.flow, PER_CLASS), PER_CLASS, smallest=32)),
                "guided": as_picture(guided),
                "confusion": as_svg(draw_confusion(confusion(predicted, y, len(data.classes)), data.classes)),
            }
        )
    shown = torch.cat([(y == k).nonzero()[:PER_CLASS, 0] for k in range(len(data.classes))])
    page = Environment(loader=PackageLoader("flowback.reports"), autoescape=True).get_template("report.html")
    html = page.render(
        data=data,
        runs=runs,
        sections=sections,
        table=_table(runs),
        curves=as_svg(draw_curves(runs)),
        real=as_picture(grid_array(x[shown], PER_CLASS, smallest=32)),
        machine=machine,
        guidance=guidance,
        draws=DRAWS,
    )
    (folder / "report.html").write_text(html, encoding="utf-8")
    overview = draw_overview(runs, guided.numpy(), f"samples, {runs[-1].title}")
    overview.savefig(folder / "overview.png", dpi=120)


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


def as_svg(figure: Any) -> str:
    """A matplotlib figure as a data URI."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return _data_uri("image/svg+xml", stream.getvalue())


def as_picture(picture: Tensor) -> str:
    """Pixels uint8 `[rows, columns, 3]` as a data URI."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture.numpy()).save(stream, format="PNG")
    return _data_uri("image/png", stream.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def measure(flow: Flow, data: ImageSet) -> dict[str, Any]:
    """The figures of a flow on all held-out images, in the form of report.json."""
    x, y = seen(flow, data.held_out, spread(len(data.held_out)), data.levels)
    figures: dict[str, Any] = {"held_out_images": len(x)} | density(flow.core, x, y, isinstance(flow, LatentFlow))
    if flow.num_classes:
        figures |= {"accuracy": accuracies(flow.core, x, y, DRAWS), "noise_draws": DRAWS}
    return figures
