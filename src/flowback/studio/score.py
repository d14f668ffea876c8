"""The tab in which images are scored: how usual they are and where not, and what in them speaks for a class."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from flowback.core.errors import InputError, plain
from flowback.data.images import IMAGE_SUFFIXES
from flowback.data.pictures import with_map
from flowback.latents import Flow
from flowback.studio.common import (
    MOST,
    ONE_AT_A_TIME,
    PREVIEWS,
    Row,
    Studio,
    number,
    own_image,
    rounded,
    same,
    save_table,
    says_problems,
    shown,
    some_files,
    uploaded,
)
from flowback.studio.shelf import python_of, shell
from flowback.tasks.classify import ClassStatistics, read_files, readable
from flowback.tasks.score import HeldOut, Score, figures, score

NAME = "Score"
BATCH = 16  # files between two looks at the page
LIKELIEST, OTHER = "the likeliest", "the likeliest other"
UNKNOWN = "does not know"


@dataclass(frozen=True)
class Asked:
    """What the controls ask for."""

    files: list[str]
    false_alarms: float  # share of typical images that are called unusual
    least: float  # probability of the likeliest class, below which the flow does not know
    a: int | None  # the class that evidence is for, None for the likeliest
    b: int | None  # and the one that it is against, None for the likeliest other one


def requested(flow: Flow, names: list[str], files: Any, alarms: Any, least: Any, a: Any, b: Any) -> Asked:
    """What the controls ask for.

    Raises:
        InputError: if a value is not usable.
    """
    files, held_out = some_files(files), HeldOut.load(flow)
    alarms = number(alarms, "the share of false alarms", 0, 1)
    if held_out is not None:
        held_out.check_false_alarms(alarms)
    for label, value, default in (("a", a, LIKELIEST), ("b", b, OTHER)):
        if flow.num_classes > 1 and value not in (default, *names):
            raise InputError(f"class {label} must be one of the list, got {value!r}")
    a, b = (names.index(value) if value in names else None for value in (a, b))
    return Asked(files, alarms, number(least, "the probability", 0, 1), a, b)


def pair(found: Score, asked: Asked) -> tuple[Tensor, Tensor] | None:
    """Of each image the classes a and b of its evidence, `[B]`; None if the flow has no two classes."""
    if found.class_log_prob.shape[1] < 2:
        return None
    a = found.likeliest if asked.a is None else torch.full_like(found.likeliest, asked.a)
    others = found.class_log_prob.scatter(1, a[:, None], -torch.inf)
    return a, others.argmax(dim=1) if asked.b is None else torch.full_like(a, asked.b)


def rows_of(
    flow: Flow, found: Score, statistics: ClassStatistics | None, files: Sequence[str], names: list[str], asked: Asked
) -> list[dict[str, str | float | int | None]]:
    """The table's rows of a batch, each with its titles: those of the command, a decision, and the evidence."""
    rows = figures(flow, found, names, asked.false_alarms)
    table: list[dict[str, Any]] = [{"file": plain(Path(file).name)} | row for file, row in zip(files, rows, strict=True)]
    if flow.num_classes:
        sure = readable("exact", found.class_log_prob, statistics)[0].amax(dim=1).tolist()
        for row, probability in zip(table, sure, strict=True):
            unsure = not probability >= asked.least  # also if it is not a number
            why = "unusual" if row.get("outlier") else "unsure" if unsure else None
            row |= {"probability": probability, "decision": f"{UNKNOWN}: {why}" if why else row["class"]}
    chosen = pair(found, asked)
    if chosen is not None:
        sums = found.evidence(*chosen).sum(dim=(1, 2)).tolist()
        for row, a, b, nats in zip(table, *(k.tolist() for k in chosen), sums, strict=True):
            row |= {"for": names[a], "against": names[b], "evidence": nats}
    return [{k: rounded(v) if isinstance(v, float) else str(v) for k, v in row.items()} for row in table]


def maps_of(found: Score, x: Tensor, asked: Asked) -> dict[str, Tensor]:
    """Images `[B, C, H, W]` under the maps that there are, by name, uint8 `[B, 3, H, W]`.

    The color of evidence is full where that of the image is strongest.
    """
    maps = {} if found.held_out is None else {"anomaly": with_map(x, found.anomaly)}
    chosen = pair(found, asked)
    if chosen is not None:
        evidence = found.evidence(*chosen)
        strongest = evidence.abs().nan_to_num().amax(dim=(1, 2)).clamp(min=1e-12)
        maps["evidence"] = with_map(x, evidence / strongest.view(-1, 1, 1), 1)
    return maps


def texts(flow: Flow, place: str, asked: Asked) -> tuple[str, str]:
    """The same in Python and on the command line, of files by their names."""
    names = [Path(file).name for file in asked.files]
    a = "s.likeliest" if asked.a is None else f"torch.full_like(s.likeliest, {asked.a})"
    b = "others.argmax(dim=1)" if asked.b is None else str(asked.b)
    python = (
        "import torch\n\nfrom flowback.runs.checkpoint import class_names\nfrom flowback.tasks.classify import read_files\n"
    )
    python += f"from flowback.tasks.score import figures, score\n{python_of(place)}\nnames = class_names({place!r}, flow)\n"
    python += f"for files, x, unread in read_files(flow, {names!r}, {BATCH}):\n    s = score(flow, x, batch_size={BATCH})\n"
    python += f"    print(files, figures(flow, s, names, false_alarms={asked.false_alarms}))\n"
    python += "    if s.held_out is not None:\n        print(s.anomaly)\n"
    if flow.num_classes > 1:
        python += f"    a = {a}\n"
        python += "    others = s.class_log_prob.scatter(1, a[:, None], -torch.inf)\n" if asked.b is None else ""
        python += f"    print(s.evidence(a, {b}))\n"
    options = [f"--false-alarms={asked.false_alarms}", f"--batch-size={BATCH}", "--csv=scores.csv"]
    return python, shell("score", place, *map(Path, names), *options)


def told(flow: Flow) -> str:
    """What the figures are of, what they cost, and what is missing."""
    held_out, statistics = HeldOut.load(flow), ClassStatistics.load(flow.core.folder, flow.num_classes)
    text = f"{flow.num_classes + 1 + (flow is flow.core)} forward passes for an image and a noise draw."
    if held_out is None:
        text += " There is no typicality and no anomaly map: run `flowback evaluate`, which stores what they need."
    else:
        text += (
            f" Typicality p is counted against {len(held_out.distance)} held-out images; of images like them the share p "
        )
        text += "has p or less."
    if flow.num_classes and (statistics is None or "exact" not in statistics.temperatures):
        text += " Probabilities are not calibrated: run `flowback evaluate`."
    return text + ("" if flow.num_classes else " This flow is unconditional: it knows no classes, so there is no evidence.")


def summary(read: int, rows: Sequence[dict[str, Any]], unread: Sequence[str], seconds: float) -> str:
    """What was done, in HTML, with the files that cannot be read."""
    text = f"{read} files in {seconds:.1f} s."
    for what, count in (
        ("unusual", sum(row.get("outlier") == "True" for row in rows)),
        ("not known", sum(str(row.get("decision")).startswith(UNKNOWN) for row in rows)),
    ):
        text += f" {count} {what}." if count else ""
    return text + "".join(f"<br>{escape(plain(sentence))}" for sentence in unread)


def caption(row: dict[str, Any]) -> str:
    """Of an image: its file, and what the flow decides of it."""
    usual = {"True": "unusual", "False": "usual"}.get(row.get("outlier", ""), "")
    what = [row.get("decision", usual), f"p = {row['typicality']}" if "typicality" in row else ""]
    return f"{row['file']}: {', '.join(filter(None, what))}"


def build(studio: Studio, chosen: gr.Dropdown) -> None:
    """Add the tab to the page."""
    shelf = studio.shelf

    def controls(name: str) -> tuple[gr.Slider, gr.Slider, gr.Dropdown, gr.Dropdown, gr.Markdown]:
        flow, names = shelf.flow(name), shelf.classes(name)
        held_out = HeldOut.load(flow)
        least = 0.001 if held_out is None else math.ceil(10000 / (len(held_out.distance) + 1)) / 10000
        return (
            gr.Slider(
                least,
                0.2,
                max(0.01, least),
                step=0.0001,
                label="False alarms",
                info="share of usual images that may be called unusual",
                visible=held_out is not None,
            ),
            gr.Slider(
                0,
                1,
                0.5,
                step=0.01,
                label="Least probability",
                info="of the likeliest class; below it the flow does not know",
                visible=bool(names),
            ),
            gr.Dropdown([LIKELIEST, *names], value=LIKELIEST, label="Evidence for a", visible=len(names) > 1),
            gr.Dropdown([OTHER, *names], value=OTHER, label="against b", visible=len(names) > 1),
            gr.Markdown(told(flow)),
        )

    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            files = gr.File(label=f"Image files to score, at most {MOST}", file_count="multiple", height=180)
            with gr.Row():
                folder = gr.UploadButton("Choose a folder", file_count="directory", size="sm", min_width=100)
                own = gr.Button("Use the flow's own", size="sm", min_width=100)
            settings = controls(chosen.value)
            with gr.Row():
                go = gr.Button("Score", variant="primary", min_width=100)
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML("", elem_classes="said")
            galleries = {
                name: gr.Gallery(
                    label=label, columns=8, object_fit="contain", height="auto", format="png", buttons=["fullscreen"]
                )
                for name, label in (
                    ("anomaly", "Where images are unusual: red"),
                    ("evidence", "What speaks for a, red, and for b, blue"),
                )
            }
            table = gr.Dataframe(label="A row for each file", interactive=False, column_widths=["180px"])
            download = gr.File(label="Download", interactive=False, visible=False)
            python, command = same()

    @says_problems
    def run(name: str, *values: Any) -> Iterator[dict[Any, Any]]:
        flow, names = shelf.flow(name), shelf.classes(name)
        asked = requested(flow, names, *values)
        statistics = ClassStatistics.load(flow.core.folder, flow.num_classes)
        rows: list[dict[str, Any]] = []
        pictures: dict[str, list[tuple[str, str]]] = {kind: [] for kind in galleries}
        titles: list[str] = []
        cells: list[Row] = []
        shown_rows = gr.Dataframe([])
        unread, started, tiles = [], time.perf_counter(), studio.new_folder()
        yield {
            said: f"scoring {len(asked.files)} files …",
            **{gallery: [] for gallery in galleries.values()},
            table: shown_rows,
            download: gr.File(visible=False),
            **dict(zip((python, command), texts(flow, shelf.place(name), asked), strict=True)),
        }
        for paths, x, wrong in read_files(flow, asked.files, BATCH, lambda file: uploaded(file, flow)):
            unread += wrong
            if paths:
                found = score(flow, x, batch_size=BATCH)
                new = rows_of(flow, found, statistics, paths, names, asked)
                rows += new
                for kind, images in maps_of(found, x, asked).items():
                    for row, image in zip(new[: PREVIEWS - len(pictures[kind])], images, strict=False):
                        text = (
                            caption(row)
                            if kind == "anomaly"
                            else f"{row['for']} against {row['against']}: {row['evidence']} nats"
                        )
                        pictures[kind].append((shown(image, tiles), text))
            titles = list(rows[0]) if rows else []
            kinds: Any = ["number" if isinstance(value, float) else "str" for value in (rows[0].values() if rows else ())]
            cells = [list(row.values()) for row in rows]
            shown_rows = gr.Dataframe(cells, headers=titles, datatype=kinds, column_count=len(titles))
            yield {
                said: f"{len(rows) + len(unread)} of {len(asked.files)} files …",
                **{gallery: pictures[kind] for kind, gallery in galleries.items()},
                table: shown_rows,
            }
        file = save_table(studio.new_folder() / "scores.csv", titles, cells)
        yield {
            said: summary(len(rows), rows, unread, time.perf_counter() - started),
            table: shown_rows,  # again: a busy page may have lost it
            download: gr.File(file, visible=True),
        }

    @says_problems
    def draw_own(name: str) -> list[str]:
        flow, place = shelf.flow(name), studio.new_folder()
        return [own_image(flow, seed, place) for seed in range(8)]

    outputs = [said, *galleries.values(), table, download, python, command]
    running = go.click(run, [chosen, files, *settings[:4]], outputs, **ONE_AT_A_TIME)
    stop.click(lambda: "stopped", None, said, cancels=[running], queue=False)
    own.click(draw_own, chosen, files, **ONE_AT_A_TIME)
    folder.upload(lambda found: [file for file in found if Path(file).suffix.lower() in IMAGE_SUFFIXES], folder, files)
    chosen.change(says_problems(controls), chosen, list(settings))
