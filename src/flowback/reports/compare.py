"""One report on one or several runs that were evaluated: report.html, one self-contained page; report.json; overview.png.

report.json: each run by its name, with what its evaluation.json holds (see `evaluate`); "data" and "machine", of all runs,
or null where they differ; "config_differences": {option: [values]}; "crossings": rows of `crossings`; "not_comparable":
sentences.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.files import check_place, read_json, write_whole
from flowback.core.units import from_levels
from flowback.data import ImageSet
from flowback.data.pictures import grid_array, with_map
from flowback.data.splits import spread
from flowback.latents import Flow, LatentFlow
from flowback.reports import decisions
from flowback.reports.card import FIDELITY
from flowback.reports.evaluate import FILE, write_json
from flowback.reports.figures import draw_cost_accuracy, draw_curves, draw_overview, draw_probe, draw_sweep
from flowback.runs.checkpoint import State, load_flow, newest
from flowback.runs.config import RunConfig, flat
from flowback.runs.folder import run_data
from flowback.runs.log import read_metrics, series
from flowback.tasks.sampling import shown_classes
from flowback.tasks.score import evidence

# what a run is judged by while it trains: column of metrics.csv -> (title, whether larger is better)
CURVES = {
    "held_out_exact": ("exact accuracy, held out", True),
    "held_out_single_gradient": ("single-gradient accuracy, held out", True),
    "held_out_nats_per_dim": ("nats per dimension, held out", False),
}
FIGURES: dict[str, tuple[str, str, Callable[..., Any]]] = {  # of an evaluation: title, format, and which is best
    "nats_per_dim": ("nats per dimension", "{:.4f}", min),
    "bits_per_dim": ("bits per dimension (upper bound)", "{:.3f}", min),
    "bits_per_dim_importance_weighted": ("… importance-weighted", "{:.3f}", min),
    "latent_bits_per_dim": ("bits per latent dimension, of noised latents", "{:.3f}", min),
}
OF_LATENTS = ("nats_per_dim", "latent_bits_per_dim")  # of what the flow sees
LARGER = {"is", "precision", "recall"}  # the better; of the other figures of fidelity the smaller
OWN = {"data", "machine", "config_differences", "crossings", "not_comparable"}  # keys of report.json beside the runs
SHOWN = 8  # images in a row of the page
GUIDANCE = 1.0  # of the guided samples
EVIDENCE_DRAWS = 8  # of noise, that maps of evidence average


@dataclass
class Record:
    """A run and all that is known of it; of a flow that is no run, and of a run that was not evaluated, less is."""

    name: str
    flow: Flow
    folder: Path
    config: dict[str, Any]  # flat, by dotted names
    rows: list[dict[str, float]]  # of metrics.csv
    evaluation: dict[str, Any]

    @cached_property
    def data(self) -> ImageSet:
        """The images of the run, found when they are first asked for."""
        return run_data(self.folder, RunConfig.read(self.folder / "config.yaml").data)

    @property
    def latents(self) -> tuple[str, str] | None:
        """What the flow's likelihoods are of: the autoencoder's weights and which latent they give; None for pixels."""
        if not isinstance(self.flow, LatentFlow):
            return None
        known = self.flow.autoencoder.config
        own = str(self.folder.absolute())  # trained with this flow, and so like no other
        return (own if known.name is None else known.weights), known.posterior

    @property
    def evaluated(self) -> bool:
        """Whether there is an evaluation.json."""
        return "strategy" in self.evaluation

    def series(self, column: str, against: str = "step") -> tuple[list[float], list[float]]:
        """A column of metrics.csv against steps or seconds, without what is not finite."""
        return series(self.rows, column, against)


@dataclass(frozen=True)
class Part:
    """A part of what a page tells before its figures.

    Args:
        title: of the part.
        text: its sentences.
        picture: pixels uint8 `[rows, columns, 3]`, if there is one.
        shows: what the picture shows.
    """

    title: str
    text: str
    picture: Tensor | None = None
    shows: str = ""


def load_record(run: str | Path, name: str, device: torch.device | str = "cpu") -> Record:
    """Read a run that was evaluated, its flow on a device.

    Raises:
        InputError: if the folder holds no run, or one that was never evaluated.
    """
    folder = Path(run)
    for file, what in (("config.yaml", "train"), ("metrics.csv", "train"), (FILE, "evaluate")):
        if not (folder / file).is_file():
            raise InputError(f"{run} has no {file}; expected runs on which `flowback {what}` was run")
    record = read_record(run, name, load_flow(run, device=device)[0])
    _ = record.data  # where it is not there, that is said now, and not after all is drawn
    return record


def read_record(run: str | Path, name: str, flow: Flow) -> Record:
    """What is known of a run, or of a flow that is none: without an evaluation, how long it was trained.

    Raises:
        InputError: if a file that is there cannot be read.
    """
    folder, checkpoint = Path(run), newest(Path(run))
    file, log, found = folder / "config.yaml", folder / "metrics.csv", folder / FILE
    options = flat(yaml.safe_load(RunConfig.read(file).to_yaml())) if file.is_file() else {}
    rows = read_metrics(log) if log.is_file() else []
    if not found.is_file():
        state = None if checkpoint is None else State.read(checkpoint)
        evaluation = {} if state is None else {"steps": state.step, "seconds": state.seconds}
        return Record(name, flow, folder, options, rows, evaluation)
    try:
        evaluation = read_json(found)
        if missing := {"steps", "seconds", "strategy"} - set(evaluation):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}, perhaps of an earlier version")
    except (ValueError, TypeError) as error:
        raise InputError(f"{found} cannot be read ({error}); evaluate the run again") from error
    return Record(name, flow, folder, options, rows, evaluation)


def names_of(runs: Sequence[str | Path]) -> list[str]:
    """A name for each run: that of its folder, or the whole path where that name is taken.

    Raises:
        InputError: if a run is given twice.
    """
    paths = [Path(run).resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise InputError("a run is given twice; expected different ones")
    names = [path.name for path in paths]
    taken = OWN | {name for name in names if names.count(name) > 1}
    return [str(path) if path.name in taken else path.name for path in paths]


def config_differences(records: list[Record]) -> dict[str, list[Any]]:
    """Options that are not the same in all runs, with their values."""
    names = sorted(set().union(*(record.config for record in records)) - {"run", "train.resume"})
    values = {name: [record.config.get(name) for record in records] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def crossings(records: list[Record]) -> list[dict[str, Any]]:
    """Where each run passes every other's final figure: "run", "passes", "figure", "value", "step", "seconds".

    "step" and "seconds" are None where it never does; "speed_up" is the other's steps over this one's, as papers report.
    """
    rows = []
    curves = {name: curve for name, curve in CURVES.items() if name != "held_out_nats_per_dim" or same_latents(records)}
    for column, (title, larger) in curves.items():
        for other in records:
            steps, values = other.series(column)
            for run in records:
                if run is other or not values or not run.series(column)[1]:
                    continue
                own_steps, own = run.series(column)
                passed = [i for i, value in enumerate(own) if (value >= values[-1] if larger else value <= values[-1])]
                step = own_steps[passed[0]] if passed else None
                seconds = run.series(column, "seconds")[0][passed[0]] if passed else None
                row = {"run": run.name, "passes": other.name, "figure": title, "value": values[-1], "step": step}
                rows.append(row | {"seconds": seconds, "speed_up": steps[-1] / step if step else None})
    return rows


def same_latents(records: Sequence[Record]) -> bool:
    """Whether the likelihoods of all flows are of the same latents, or of pixels: of others they are not shown together."""
    return len({record.latents for record in records}) < 2


def not_comparable(records: list[Record]) -> list[str]:
    """What must not be read side by side, a sentence each."""
    sentences = []
    if len({record.evaluation.get("data") for record in records}) > 1:
        sentences.append("The runs were measured on different data sets: no figure of one compares with the other's.")
    for name in ("extractor", "samples", "reference", "guidance", "sampler", "labels"):
        values = [record.evaluation["fidelity"].get(name) for record in records if "fidelity" in record.evaluation]
        if any(value != values[0] for value in values):
            listed = ", ".join(map(str, values))
            sentences.append(f"Fidelity was measured with another {name} ({listed}): those figures do not compare.")
    if not same_latents(records):
        sentences.append("The flows work in different latents: their likelihoods do not compare, and are left out.")
    elif len({tuple(record.config.get(name) for name in ("flow.noise", "flow.noise_std")) for record in records}) > 1:
        sentences.append("The flows see other noise: their nats do not compare; bits of pixels do.")
    if len({record.evaluation.get("noise_draws") for record in records}) > 1:
        sentences.append("Accuracies average different numbers of noise draws.")
    if len({record.evaluation.get("held_out_images") for record in records}) > 1:
        sentences.append("The figures are of different numbers of held-out images.")
    exact = {row["images"] for r in records for row in r.evaluation.get("classification", []) if row["rule"] == "exact"}
    if len(exact) > 1:
        sentences.append("The exact accuracies are of different numbers of held-out images.")
    return sentences


def figures(record: Record) -> Iterator[tuple[str, Any, str, Callable[..., Any] | None]]:
    """What the page's table says of a run: titles, values, their formats, and which of several is best."""
    e = record.evaluation
    for row in e.get("classification", []):
        some = "" if row["images"] == e.get("held_out_images", row["images"]) else f", of {row['images']} images"
        title = f"accuracy, {row['rule'].replace('_', ' ')} ({row['passes']} passes{some})"
        yield title, 100 * row["accuracy"], "{:.1f} %", max
    for name, (title, form, best) in FIGURES.items():
        if name in e:
            yield title, e[name], form, best
    f = e.get("fidelity", {})
    for name, title in FIDELITY.items():
        if name in f:
            yield f"{title} ({f['extractor']}, {f['samples']} samples)", f[name], "{:.3f}", max if name in LARGER else min
    if probe := [row for row in e.get("probe", []) if row["accuracy"] is not None]:
        top = max(probe, key=lambda row: row["accuracy"])
        where = f"(block {top['block']}, layer {top['layer']})"
        yield "best linear probe", 100 * top["accuracy"], "{:.1f} % " + where, max
    if "steps" in e:
        yield "training steps", e["steps"], "{}", None
        yield "seconds of training", e["seconds"], "{:.0f}", None
    yield "parameters", sum(p.numel() for p in record.flow.parameters()) / 1e6, "{:.2f} M", None
    if "weights" in e:
        yield "measured with", e["weights"], "{}", None


def table(records: list[Record]) -> list[tuple[str, list[str], int | None]]:
    """Rows of the page's table: title, a text for each run, and which is best (None where that has no meaning)."""
    left_out = set() if same_latents(records) else {FIGURES[name][0] for name in OF_LATENTS}
    found = [
        {title: (value, form, best) for title, value, form, best in figures(record) if title not in left_out}
        for record in records
    ]
    rows = []
    for title in dict.fromkeys(title for own in found for title in own):
        cells = [own.get(title) for own in found]
        finite = [
            cell is not None and cell[0] is not None and (cell[2] is None or math.isfinite(cell[0])) for cell in cells
        ]
        texts = ["-" if cell is None else "not finite" for cell in cells]
        texts = [
            cell[1].format(cell[0]) if ok and cell else text for cell, ok, text in zip(cells, finite, texts, strict=True)
        ]
        values = [cell[0] for cell, ok in zip(cells, finite, strict=True) if ok and cell]
        best = next(cell[2] for cell in cells if cell is not None)
        differ = len(values) == len(records) and len(set(values)) > 1
        rows.append((title, texts, values.index(best(values)) if best is not None and differ else None))
    return rows


def write_comparison(
    runs: Sequence[str | Path], folder: Path, device: torch.device | str = "cpu", story: Sequence[Part] = ()
) -> dict[str, Any]:
    """Write report.html, report.json and overview.png on one or several evaluated runs into `folder`.

    What the page shows is drawn and classified on `device`. It begins with `story`, and so does the picture.

    Returns:
        The content of report.json.

    Raises:
        InputError: if a run is not one, was not evaluated, or is given twice.
    """
    from jinja2 import Environment, PackageLoader

    records = [load_record(run, name, device) for run, name in zip(runs, names_of(runs), strict=True)]
    check_place(folder / "report.html")
    facts: dict[str, Any] = {
        **{name: _common(record.evaluation.get(name) for record in records) for name in ("data", "machine")},
        **{record.name: record.evaluation for record in records},
        "config_differences": config_differences(records),
        "crossings": crossings(records),
        "not_comparable": not_comparable(records),
    }
    drawn = [samples(record) for record in records]
    page = Environment(loader=PackageLoader("flowback.reports"), autoescape=True).get_template("report.html")
    html = page.render(
        records=records,
        facts=facts,
        story=story,
        table=table(records),
        sections=[section(record, *pictures) for record, pictures in zip(records, drawn, strict=True)],
        curves=[as_svg(draw_curves(records, against)) for against in ("step", "seconds")],
        guidance=GUIDANCE,
        as_png=as_png,
    )
    pictures = {part.title: part.picture for part in story if part.picture is not None}
    pictures = pictures or {f"samples of {records[-1].name}": drawn[-1][-1]}
    overview = draw_overview(records, {title: picture.numpy() for title, picture in pictures.items()})
    write_json(folder / "report.json", facts)
    write_whole(folder / "report.html", lambda file: file.write_text(html, encoding="utf-8"))
    write_whole(folder / "overview.png", lambda file: overview.savefig(file, dpi=120, format="png"))
    return facts


def _common(values: Iterable[Any]) -> Any:
    """The value that all have, or None."""
    first, *others = values
    return first if all(value == first for value in others) else None


def rows_of(flow: Flow) -> Tensor:
    """Labels `[rows * SHOWN]` of what the page shows: a class in each row, some of them if they are many, -1 for none."""
    return torch.tensor(shown_classes(flow) or [-1] * SHOWN).repeat_interleave(SHOWN)


def samples(record: Record) -> list[Tensor]:
    """Pictures of samples, with the labels of `rows_of`: without guidance, and of a flow with classes also with it."""
    scales = (0.0, GUIDANCE) if record.flow.num_classes else (0.0,)
    options: dict[str, Any] = {"seed": 0, "batch_size": 128}
    drawn = [record.flow.sample(y=rows_of(record.flow), guidance=scale, **options) for scale in scales]
    return [_picture(x.cpu()) for x in drawn]


def drafts(record: Record) -> str | None:
    """A picture of what the flow's student draws, in as few steps as it draws by default; None where there is none."""
    student = record.flow.core.student
    if student is None or student.stale:
        return None
    x = record.flow.sample(y=rows_of(record.flow), seed=0, batch_size=128, sampler="student")
    return as_png(_picture(x.cpu()))


def real_images(record: Record) -> Tensor:
    """A picture of held-out images with the labels of `rows_of`, white where there are no more."""
    data, y = record.data, rows_of(record.flow)
    places: list[tuple[int, int]] = list(enumerate(spread(len(data.held_out), len(y))))
    if record.flow.num_classes:
        firsts = ((data.held_out.labels == k).nonzero()[:SHOWN, 0].tolist() for k in y[::SHOWN])
        places = [(row * SHOWN + i, index) for row, own in enumerate(firsts) for i, index in enumerate(own)]
    found = _images(data, [index for _, index in places])
    canvas = found.new_ones(len(y), *found.shape[1:])
    canvas[[place for place, _ in places]] = found
    return _picture(canvas)


def section(record: Record, plain: Tensor, guided: Tensor | None = None) -> dict[str, Any]:
    """What the page shows of one run."""
    e, classes = record.evaluation, record.data.classes
    shown: dict[str, Any] = {"name": record.name, "plain": as_png(plain), "real": as_png(real_images(record))}
    shown |= {"guided": None if guided is None else as_png(guided), "drafts": drafts(record)}
    shown |= {"probe": as_svg(draw_probe(e)) if e.get("probe") else None}
    shown |= {"classes": [classes[k] for k in shown_classes(record.flow)] if record.flow.num_classes else []}
    shown |= {"curve": as_svg(draw_cost_accuracy(e)) if e.get("classification") else None}
    shown["tables"] = list(decisions.tables(e))
    shown |= {"sweep": as_svg(draw_sweep(e["guidance_sweep"])) if e.get("guidance_sweep") else None}
    if "judged" in e:
        groups = [e["judged"][which] for which in ("best", "worst", "doubtful") if which in e["judged"]]
        x = _images(record.data, [row[0] for rows in groups for row in rows])
        shown["judged"] = as_png(_picture(x))
        shown["captions"] = [f"{classes[row[1]]}, taken for {classes[row[2]]}" for row in groups[1]]
        if len(groups) == 3:
            _, _, predicted, other = torch.tensor([row for rows in groups for row in rows]).T
            shown["evidence"] = as_png(_picture(_under_evidence(record.flow, x, predicted, other)))
            shown["doubts"] = [f"{classes[row[2]]} or {classes[row[3]]}" for row in groups[2]]
        counts = e["judged"].get("confusion", [])
        shown["confusion"] = [(name, row, max(1, sum(row))) for name, row in zip(classes, counts, strict=False)]
    return shown


def _under_evidence(flow: Flow, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Images under what speaks for the classes `a [B]` (red) and `b [B]` (blue), uint8 `[B, 3, H, W]`."""
    maps = evidence(flow, x, a, b, draws=EVIDENCE_DRAWS)
    return with_map(x, maps, limit=float(maps.abs().flatten().quantile(0.98).clamp(min=1e-6)))


def _images(data: ImageSet, indices: Sequence[int]) -> Tensor:
    """Held-out images `[n, C, H, W]` in [-1, 1]."""
    return from_levels(data.held_out[list(indices)][0], data.levels)


def _picture(x: Tensor) -> Tensor:
    return grid_array(x, SHOWN, smallest=32)


def as_svg(figure: Any) -> str:
    """A matplotlib figure as a data URI."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return _data_uri("image/svg+xml", stream.getvalue())


def as_png(picture: Tensor) -> str:
    """Pixels uint8 `[rows, columns, 3]` as a data URI."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture.numpy()).save(stream, format="PNG")
    return _data_uri("image/png", stream.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
