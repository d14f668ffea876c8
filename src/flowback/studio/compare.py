"""The tab in which two flows are compared: the same seeds by both, their figures, their options and their curves."""

import csv
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
import torch

from flowback.core.console import command
from flowback.core.errors import InputError, plain
from flowback.data.pictures import save_grid
from flowback.latents import Flow
from flowback.reports.compare import (
    CURVES,
    Record,
    config_differences,
    crossings,
    names_of,
    not_comparable,
    read_record,
    table,
)
from flowback.runs.checkpoint import class_names
from flowback.runs.log import COLUMNS, read_metrics, series
from flowback.studio.common import ONE_AT_A_TIME, Studio, same, says_problems, tile
from flowback.studio.draw import columns, controls, request_text, requested, sample_command
from flowback.studio.shelf import Entry, Shelf
from flowback.tasks.sampling import Drawn, Request, as_pixels, draw_batches

NAME = "Compare"
POINTS = 500  # of a curve, at most
AGAINST = {"step": "steps", "seconds": "seconds of training"}
QUANTITIES = {column: title for column, (title, _) in reversed(CURVES.items())} | {
    "loss": "loss, training",
    "nats_per_dim": "nats per dimension, training",
    "align": "loss of the alignment, training",
    "grad_norm": "norm of the gradient",
    "lr": "learning rate",
    "images_per_second": "images per second",
}
Rows = list[dict[str, float]]


def sibling(entries: Sequence[Entry], name: str) -> str | None:
    """The flow to compare one with unless another is chosen: one of the same folder, or else the first other one."""
    others = [entry for entry in entries if entry.name != name]
    folder = next((Path(entry.place).parent for entry in entries if entry.name == name), None)
    near = [entry.name for entry in others if Path(entry.place).parent == folder]
    return next(iter([*near, *(entry.name for entry in others)]), None)


def records(shelf: Shelf, names: Sequence[str | None]) -> list[Record]:
    """What is known of two flows.

    Raises:
        InputError: if one is not offered or cannot be read, or both are the same.
    """
    if None in names:
        raise InputError("there is no other flow to compare with; train one, or start the studio with more runs")
    places = [shelf.place(str(name)) for name in names]
    short = [plain(name) for name in names_of(places)]
    flows = [shelf.flow(str(name)) for name in names]
    return [read_record(*known) for known in zip(places, short, flows, strict=True)]


def check_pair(shelf: Shelf, names: Sequence[str], short: Sequence[str]) -> None:
    """Whether two flows draw the same kind of images.

    Raises:
        InputError: if their images have other shapes, or other classes.
    """
    flows, classes = [shelf.flow(name) for name in names], [shelf.classes(name) for name in names]
    shapes = [(*flow.image_size, flow.channels) for flow in flows]
    for what, of in (("shapes", shapes), ("classes", classes)):
        if of[0] != of[1]:
            found = [", ".join(map(str, value[:20])) or "none" for value in of]
            listed = " and ".join(f"{text} ({name})" for text, name in zip(found, short, strict=True))
            raise InputError(f"the images of two flows that are compared must have the same {what}, got {listed}")


def pairs(flows: Sequence[Flow], request: Request, method: str = "auto") -> Iterator[list[Drawn]]:
    """The images of a request by each of the flows, a row of the grid after the other."""
    numbers, row = range(request.num), columns(request.num)
    return map(list, zip(*(draw_batches(flow, request, numbers, method, row) for flow in flows), strict=True))


def points(runs: dict[str, Rows], column: str, against: str = "step") -> pd.DataFrame:
    """The curves of runs, long ones thinned: columns x, y and run.

    Raises:
        InputError: if there is no such quantity.
    """
    if column not in QUANTITIES or against not in AGAINST:
        raise InputError("the quantity must be one of the list; choose again")
    found: list[tuple[float, float, str]] = []
    for name, rows in runs.items():
        curve = list(zip(*series(rows, column, against), strict=True))
        found += [(x, y, name) for x, y in curve[:: -max(1, -(-len(curve) // POINTS))][::-1]]  # the last one is kept
    return pd.DataFrame(found, columns=["x", "y", "run"]).astype({"x": float, "y": float, "run": str})


def curves(runs: dict[str, Rows], column: str, against: str = "step") -> gr.LinePlot:
    """A plot of `points`, to show or to update one; empty while there is no line."""
    shown, color = points(runs, column, against), "run" if len(runs) > 1 else None
    titles: dict[str, Any] = {"x_title": AGAINST[against], "y_title": QUANTITIES[column], "color_title": ""}
    return gr.LinePlot(shown if len(shown) > 1 else None, x="x", y="y", color=color, height=340, **titles)


def quantity() -> gr.Dropdown:
    """The control of what a curve shows."""
    first = next(iter(CURVES))
    return gr.Dropdown([(title, name) for name, title in QUANTITIES.items()], value=first, label="Curve")


def as_table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str], int | None]], label: str) -> str:
    """Rows of a title, a text for each run, and which is best, as a table in HTML."""
    cells = [
        [f"<b>{escape(text)}</b>" if i == best else escape(text) for i, text in enumerate(own)] for _, own, best in rows
    ]
    titles = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th scope='row'>{escape(title)}</th>{''.join(f'<td>{cell}</td>' for cell in own)}</tr>"
        for (title, _, _), own in zip(rows, cells, strict=True)
    )
    head_ = f"<thead><tr><td></td>{titles}</tr></thead>"
    return f"<div class='figures'><table class='card' aria-label='{label}'>{head_}<tbody>{body}</tbody></table></div>"


def differences(found: list[Record]) -> str:
    """The options of two runs that differ, as a table in HTML."""
    rows = [(name, [plain(str(value)) for value in values], None) for name, values in config_differences(found).items()]
    head = [record.name for record in found]
    return as_table(head, rows, "options that differ") if rows else "<p>They were trained with the same options.</p>"


def remarks(found: list[Record]) -> list[str]:
    """What is to be known of the figures of two runs, a sentence each."""
    measured = [record for record in found if record.evaluated]
    said = [
        f"{record.name} was not evaluated; to do that: {command('flowback', 'evaluate', record.folder)}"
        for record in found
        if not record.evaluated and record.config
    ]
    said += not_comparable(measured) if len(measured) > 1 else []
    a, b = (record.flow.core.token_shape for record in found)
    if a != b:
        said.append(f"Their z have other shapes, {a} and {b}: the seeds are the same, the noise is not.")
    for row in crossings(found):
        if row["step"] is not None and row["speed_up"] > 1:
            passes = (
                f"{row['run']} passes the final figure of {row['passes']}, {row['value']:.4g}, at step {row['step']:.0f}"
            )
            said.append(f"{row['figure'].capitalize()}: {passes}, {row['speed_up']:.1f} times sooner.")
    return said


def texts(found: list[Record], request: Request, method: str) -> tuple[str, str]:
    """The same comparison in Python and on the command line; its report where both runs were evaluated."""
    a, b = (str(record.folder) for record in found)
    reported = all(record.evaluated for record in found)
    python = ["from pathlib import Path", ""]
    python += ["from flowback.reports.compare import write_comparison"] * reported
    python += [
        "from flowback.runs.checkpoint import load_flow",
        "from flowback.tasks.sampling import Request, sample_to_disk",
    ]
    python += ["", f"runs = {[a, b]!r}", f"request = {request_text(request)}", "for i, run in enumerate(runs):"]
    python += [f"    sample_to_disk(load_flow(run)[0], request, Path(f'samples_{{i}}.png'), method={method!r})"]
    python += ["write_comparison(runs, Path('comparison'))"] * reported
    names = [class_names(run, record.flow) for run, record in zip((a, b), found, strict=True)]
    shell = [sample_command(run, request, method, f"samples_{i}.png", names[i]) for i, run in enumerate((a, b))]
    shell += [command("flowback", "compare", Path(a), Path(b), "-o", "comparison")] * reported
    return "\n".join(python), "\n".join(shell)


def save(folder: Path, parts: list[list[Drawn]], found: list[Record]) -> list[str]:
    """The files of a comparison: the pairs side by side, and the curves."""
    first, second = (as_pixels(torch.cat([part[i].x for part in parts])) for i in range(2))
    save_grid(torch.stack([first, second], 1).flatten(0, 1), folder / "pairs.png", 2 * columns(len(first)))
    with (folder / "curves.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["run", *COLUMNS], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"run": record.name, **row} for record in found for row in record.rows)
    return [str(folder / name) for name in ("pairs.png", "curves.csv")]


def build(studio: Studio, chosen: gr.Dropdown) -> None:
    """Add the tab to the page."""
    shelf = studio.shelf

    def others(name: str, now: str | None = None) -> gr.Dropdown:
        names = [other for other in shelf.entries if other != name]
        value = now if now in names else sibling(list(shelf.entries.values()), name)
        return gr.Dropdown(names, value=value, label="The other flow", filterable=True)

    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            other = others(chosen.value)
            values = controls(shelf, chosen)
            with gr.Row():
                go = gr.Button("Compare", variant="primary", min_width=100)
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(scale=3, min_width=300):
            said = gr.Markdown("", elem_classes="said")
            with gr.Row():
                grids = [
                    gr.Gallery(label=title, columns=4, object_fit="contain", height="auto", format="png", min_width=280)
                    for title in ("The chosen flow", "The other flow")
                ]
            files = gr.File(label="Download", file_count="multiple", interactive=False, visible=False)
            python, shell = same()
            with gr.Accordion("Figures", open=True):
                known = gr.HTML("")
            with gr.Accordion("Options that differ", open=False):
                options = gr.HTML("")
            with gr.Row():
                column = quantity()
                against = gr.Dropdown([(title, name) for name, title in AGAINST.items()], label="Against", value="step")
            plot = gr.LinePlot(x="x", y="y", color="run", height=340, buttons=["fullscreen"])

    @says_problems
    def compare(name: str, second: str | None, column: str, against: str, method: str, *values: Any) -> Iterator[Any]:
        found = records(shelf, [name, second])
        pair, short = [name, str(second)], [record.name for record in found]
        request = requested(shelf.classes(name), *values)
        listed = "".join(f"<li>{escape(plain(text))}</li>" for text in remarks(found))
        yield {
            said: f"drawing {request.num} images by each with seed {request.seed} …",
            files: gr.File(visible=False),
            **{grid: gr.Gallery([], label=title) for grid, title in zip(grids, short, strict=True)},
            **dict(zip((python, shell), texts(found, request, method), strict=True)),
            known: as_table(short, table(found), "figures of both") + f"<ul>{listed}</ul>",
            options: differences(found),
            plot: curves({record.name: record.rows for record in found}, column, against),
        }
        check_pair(shelf, pair, short)
        started, parts, classes = time.perf_counter(), [], shelf.classes(name)
        shown: list[list[tuple[Any, str]]] = [[], []]
        for part in pairs([record.flow for record in found], request, method):
            parts.append(part)
            captions = [(len(shown[0]) + i, y) for i, y in enumerate(part[0].y.tolist())]
            for own, drawn in zip(shown, part, strict=True):
                own += [
                    (tile(x), f"#{i}" + (f", {classes[y]}" if y >= 0 else ""))
                    for x, (i, y) in zip(drawn.x, captions, strict=True)
                ]
            yield {
                said: f"{len(shown[0])} of {request.num} images by each, seed {request.seed} …",
                **dict(zip(grids, shown, strict=True)),
            }
        seconds = time.perf_counter() - started
        yield {
            said: f"{request.num} images by each with seed {request.seed}, {seconds:.1f} s",
            files: gr.File(save(studio.new_folder(), parts, found), visible=True),
        }

    @says_problems
    def again(name: str, second: str | None, column: str, against: str) -> gr.LinePlot:
        places = [shelf.place(each) for each in (name, second) if each]
        logs = [Path(place) / "metrics.csv" for place in places]
        rows = [read_metrics(log) if log.is_file() else [] for log in logs]
        return curves(dict(zip(map(plain, names_of(places)), rows, strict=True)), column, against)

    inputs, outputs = [chosen, other, column, against], [said, *grids, files, python, shell, known, options, plot]
    running = go.click(compare, [*inputs, *values], outputs, **ONE_AT_A_TIME)
    stop.click(lambda: "stopped", None, said, cancels=[running], queue=False)
    gr.on([column.change, against.change], again, inputs, plot)
    gr.on([chosen.change, other.focus], others, [chosen, other], other, queue=False)
