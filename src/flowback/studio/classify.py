"""The tab in which image files are classified, and their likelihoods shown."""

import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from flowback.core.errors import InputError, plain
from flowback.latents import Flow, as_data
from flowback.measure.density import densities
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
from flowback.tasks.classify import (
    RULES,
    ClassStatistics,
    FileScores,
    classify_files,
    likeliest,
    readable,
    rule_named,
    usual_rule,
)

NAME = "Classify"
BATCH = 16  # files between two looks at the page
EVERY = "every rule"


def rules_for(flow: Flow) -> list[str]:
    """The rules that can be used, the usual one first; none of an unconditional flow."""
    if not flow.num_classes:
        return []
    statistics = ClassStatistics.load(flow.core.folder, flow.num_classes)
    rules = list(RULES) if statistics else ["single_gradient", "exact"]
    return sorted(rules, key=lambda rule: rule != usual_rule(statistics))


def requested(flow: Flow, files: Any, rule: Any, top: Any, draws: Any) -> tuple[list[str], list[str], int, int]:
    """What the controls ask for: files, rules, classes to show, noise draws.

    Raises:
        InputError: if a value is not usable.
    """
    files, rules = some_files(files), rules_for(flow)
    if rules and rule not in (*rules, EVERY):
        raise InputError(f"the rule must be one of {', '.join(rules)}, or {EVERY}, got {rule!r}")
    chosen = [rule] if rule in rules else rules
    top = number(top, "the number of classes", 1, 100, whole=True)
    return files, chosen, min(top, flow.num_classes), number(draws, "noise draws", 1, 64, whole=True)


def header(flow: Flow, top: int) -> list[str]:
    """The columns of the table."""
    likelihoods = ["log-likelihood (nats)"] + ["bits/dim"] * (flow is flow.core)
    if not flow.num_classes:
        return ["file", *likelihoods]
    others = [f"{title} {i}" for i in range(2, top + 1) for title in ("class", "value")]
    return ["file", "class", "value", "rule", *likelihoods, "values are", "passes", *others]


def rows_of(
    flow: Flow, part: FileScores, statistics: ClassStatistics | None, names: list[str], top: int, draws: int
) -> list[Row]:
    """The table's rows of a batch: one for each file and rule, with the likelihood given the class that the rule takes."""
    if not part.files:
        return []
    files = [plain(Path(file).name) for file in part.files]
    if not flow.num_classes:
        none = torch.full((len(files),), -1)
        return [[file, *rest] for file, rest in zip(files, likelihoods(flow, part.x, none), strict=True)]
    by_rule: list[list[Row]] = []
    for rule, scores in part.scores.items():
        values, kind = readable(rule, scores, statistics)
        values, classes = (found.tolist() for found in values.topk(top, dim=1))
        passes, y = rule_named(rule, flow.num_classes)[1] * draws, likeliest(scores)
        rows: list[Row] = []
        for i, rest in enumerate(likelihoods(flow, part.x, y)):
            pairs = zip(classes[i], values[i], strict=True)
            best: Row = [text for k, value in pairs for text in (names[k], rounded(value))]
            told = kind
            if y[i] < 0:
                best[:], told = [None] * len(best), "no score is a finite number"
            rows.append([files[i], *best[:2], rule, *rest, told, passes, *best[2:]])
        by_rule.append(rows)
    return [row for rows in zip(*by_rule, strict=True) for row in rows]


def likelihoods(flow: Flow, x: Tensor, y: Tensor) -> list[list[float | None]]:
    """Log-likelihoods of images `[B, C, H, W]` given their labels `[B]`: nats and, but of latents, bits per dimension."""
    core = flow.core
    measured = densities(core, as_data(flow, x), y, latents=flow is not core)
    columns = [-measured["nats_per_dim"] * core.dims, *([measured["bits_per_dim"]] if flow is core else [])]
    return [[rounded(value) for value in row] for row in torch.stack(columns, dim=1).tolist()]


def texts(place: str, files: Sequence[str], rules: Sequence[str], top: int, draws: int) -> tuple[str, str]:
    """The same in Python and on the command line, of files by their names."""
    names = [Path(file).name for file in files]
    used = "ClassStatistics, classify_files, likeliest, readable" if rules else "classify_files"
    python = "import torch\n\nfrom flowback.latents import as_data\nfrom flowback.measure.density import densities\n"
    python += f"from flowback.tasks.classify import {used}\n{python_of(place)}\n"
    python += "statistics = ClassStatistics.load(flow.core.folder, flow.num_classes)\n" if rules else ""
    given = f"{list(rules)!r}, draws={draws}, batch_size={BATCH}"
    python += f"for part in classify_files(flow, {names!r}, {given}):\n"
    if rules:
        python += "    for rule, scores in part.scores.items():\n        y = likeliest(scores)\n"
        python += "        print(part.files, rule, y, *readable(rule, scores, statistics))\n    "
    else:
        python += "    y = torch.full((len(part.files),), -1)\n"
    python += "    print(densities(flow.core, as_data(flow, part.x), y, latents=flow is not flow.core))"
    options = [f"--top={top}", f"--draws={draws}", f"--batch-size={BATCH}"]
    commands = [shell("classify", place, *map(Path, names), f"--rule={rule}", *options) for rule in rules]
    return python, "\n".join(commands) or "# no command prints likelihoods of single images"


def costs(flow: Flow) -> str:
    """What the rules cost, or why there are none."""
    if not flow.num_classes:
        return "This flow is unconditional: it knows no classes, so only log-likelihoods are shown."
    rules = rules_for(flow)
    each = ", ".join(f"{rule} {rule_named(rule, flow.num_classes)[1]:,}" for rule in rules)
    better = "" if "z_score" in rules else " `flowback evaluate` makes better rules, and calibrates them."
    return f"Forward passes for an image and a noise draw: {each}.{better}"


def summary(flow: Flow, read: int, unread: Sequence[str], seconds: float) -> str:
    """What was done, in HTML: what the likelihoods are of, and the files that cannot be read."""
    x, given = "image" if flow is flow.core else "latents", " | class of the row" if flow.num_classes else ""
    text = f"{read} files in {seconds:.1f} s. The log-likelihood is log p({x}{given}), with the noise of training"
    text += "; bits/dim are an upper bound for the pixels." if flow is flow.core else "."
    return text + "".join(f"<br>{escape(plain(sentence))}" for sentence in unread)


def build(studio: Studio, chosen: gr.Dropdown) -> None:
    """Add the tab to the page."""
    shelf = studio.shelf

    def controls(name: str) -> tuple[gr.Dropdown, gr.Slider, gr.Slider, gr.Markdown]:
        flow = shelf.flow(name)
        rules, K = rules_for(flow), flow.num_classes
        return (
            gr.Dropdown([*rules, EVERY], value=rules[0] if rules else EVERY, label="Rule", visible=bool(K)),
            gr.Slider(1, max(2, min(10, K)), min(3, max(1, K)), step=1, label="Classes to show", visible=K > 1),
            gr.Slider(1, 16, 4, step=1, label="Noise draws", info="whose scores are averaged", visible=bool(K)),
            gr.Markdown(costs(flow)),
        )

    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            files = gr.File(label=f"Image files, at most {MOST}", file_count="multiple", height=180)
            own = gr.Button("Use images of the flow", size="sm")
            settings = controls(chosen.value)
            with gr.Row():
                go = gr.Button("Classify", variant="primary", min_width=100)
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML("", elem_classes="said")
            previews = gr.Gallery(
                label="Images as the flow sees them",
                columns=8,
                object_fit="contain",
                height="auto",
                format="png",
                buttons=["fullscreen"],
            )
            table = gr.Dataframe(label="A row for each file and rule", interactive=False, column_widths=["180px"])
            download = gr.File(label="Download", interactive=False, visible=False)
            python, command = same()

    @says_problems
    def run(name: str, *values: Any) -> Iterator[dict[Any, Any]]:
        flow, names = shelf.flow(name), shelf.classes(name)
        paths, rules, count, noises = requested(flow, *values)
        statistics = ClassStatistics.load(flow.core.folder, flow.num_classes) if rules else None
        titles, rows, images, unread = header(flow, count), [], [], []
        kinds: Any = ["str" if title.startswith(("file", "rule", "class", "values")) else "number" for title in titles]

        def table_of(rows: list[Any]) -> gr.Dataframe:
            return gr.Dataframe(rows, headers=titles, datatype=kinds, column_count=len(titles))

        yield {
            said: f"classifying {len(paths)} files …",
            previews: [],
            table: table_of([]),
            download: gr.File(visible=False),
            **dict(zip((python, command), texts(shelf.place(name), paths, rules, count, noises), strict=True)),
        }
        started, tiles = time.perf_counter(), studio.new_folder()
        for part in classify_files(flow, paths, rules, noises, BATCH, statistics, lambda file: uploaded(file, flow)):
            new = rows_of(flow, part, statistics, names, count, noises)
            rows, unread = rows + new, unread + part.unread
            for best, x in zip(new[:: len(rules) or 1], part.x, strict=True):
                images.append((shown(x, tiles), (f"{best[1]}: " if rules else "") + f"{best[0]}"))
            yield {
                said: f"{len(images) + len(unread)} of {len(paths)} files …",
                previews: images[:PREVIEWS],
                table: table_of(rows),
            }
        yield {
            said: summary(flow, len(images), unread, time.perf_counter() - started),
            table: table_of(rows),  # again: a busy page may have lost it
            download: gr.File(save_table(studio.new_folder() / "classified.csv", titles, rows), visible=True),
        }

    @says_problems
    def draw_own(name: str) -> list[str]:
        flow, folder = shelf.flow(name), studio.new_folder()
        return [own_image(flow, seed, folder) for seed in range(8)]

    rule, top, draws, told = settings
    outputs = [said, previews, table, download, python, command]
    running = go.click(run, [chosen, files, rule, top, draws], outputs, **ONE_AT_A_TIME)
    stop.click(lambda: "stopped", None, said, cancels=[running], queue=False)
    own.click(draw_own, chosen, files, **ONE_AT_A_TIME)
    chosen.change(says_problems(controls), chosen, [rule, top, draws, told])
