"""One report on one or several runs: report.html, self-contained, and report.json with the same figures.

report.json: {"runs": {name: what evaluation.json holds, and "steps", "seconds_of_training"}, "config_differences":
{option: [values]}, "crossings": [rows of `crossings`], "not_comparable": [sentences]}.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.files import read_json
from flowback.data import ImageSet, load_data
from flowback.data.pictures import grid_array
from flowback.latents import Flow
from flowback.measure.density import held_out
from flowback.reports.figures import draw_against, draw_cost_accuracy, draw_probe, draw_sweep
from flowback.reports.report import as_picture, as_svg
from flowback.runs.checkpoint import load_flow
from flowback.runs.config import RunConfig, flat
from flowback.runs.log import read_metrics
from flowback.tasks.classify import classify
from flowback.tasks.sampling import class_grid

# what a run is judged by while it trains: column of metrics.csv -> (title, whether larger is better)
CURVES = {
    "held_out_exact": ("exact accuracy, held out", True),
    "held_out_single_gradient": ("single-gradient accuracy, held out", True),
    "held_out_nats_per_dim": ("nats per dimension, held out", False),
}
SHOWN = 8  # images a row


BITS = {
    "bits_per_dim": "bits per dimension, at most",
    "bits_per_dim_importance_weighted": "… importance-weighted",
    "latent_bits_per_dim": "bits per latent dimension, of noised latents",
}


@dataclass
class Record:
    """A run and all that is known of it."""

    name: str
    folder: Path
    flow: Flow
    data: ImageSet
    config: dict[str, Any]  # flat, by dotted names
    rows: list[dict[str, float]]  # of metrics.csv
    evaluation: dict[str, Any]

    def series(self, column: str, against: str = "step") -> tuple[list[float], list[float]]:
        """A column of metrics.csv against steps or seconds."""
        found = [(row[against], row[column]) for row in self.rows if column in row and against in row]
        return [x for x, _ in found], [value for _, value in found]


def load_record(run: str, device: torch.device | str = "cpu") -> Record:
    """Read a run that was evaluated, its flow on a device.

    Raises:
        InputError: if the folder holds no run, or one that was never evaluated.
    """
    folder = Path(run)
    for name, what in (("config.yaml", "train"), ("metrics.csv", "train"), ("evaluation.json", "evaluate")):
        if not (folder / name).is_file():
            raise InputError(f"{run} has no {name}; allowed are runs on which `flowback {what}` was run")
    config = RunConfig.read(folder / "config.yaml")
    flow, _ = load_flow(run, device=device)
    try:
        evaluation = read_json(folder / "evaluation.json")
    except ValueError as error:
        raise InputError(f"{folder / 'evaluation.json'} cannot be read ({error}); evaluate the run again") from None
    data, options = load_data(config.data), flat(yaml.safe_load(config.to_yaml()))
    return Record(folder.name, folder, flow, data, options, read_metrics(folder / "metrics.csv"), evaluation)


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
    for column, (title, larger) in CURVES.items():
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


def not_comparable(records: list[Record]) -> list[str]:
    """What must not be read side by side, a sentence each."""
    sentences = []
    if len({record.evaluation.get("data") for record in records}) > 1:
        sentences.append("The runs were measured on different data sets: no figure of one compares with the other's.")
    for name in ("extractor", "samples", "reference", "guidance"):
        values = [record.evaluation["fidelity"][name] for record in records if "fidelity" in record.evaluation]
        if any(value != values[0] for value in values):
            listed = ", ".join(map(str, values))
            sentences.append(f"Fidelity was measured with another {name} ({listed}): those figures do not compare.")
    options = ("latents.autoencoder", "flow.noise", "flow.noise_std")
    if len({tuple(record.config.get(name) for name in options) for record in records}) > 1:
        sentences.append("The flows see other latents or other noise: their nats do not compare; bits of pixels do.")
    if len({record.evaluation.get("noise_draws") for record in records}) > 1:
        sentences.append("Accuracies average different numbers of noise draws.")
    if len({record.evaluation.get("held_out_images") for record in records}) > 1:
        sentences.append("The figures are of different numbers of held-out images.")
    return sentences


def table(records: list[Record]) -> list[tuple[str, list[str]]]:
    """Figures by name, one text a run."""
    rows: dict[str, list[str]] = {}

    def put(title: str, i: int, text: str) -> None:
        rows.setdefault(title, ["-"] * len(records))[i] = text

    for i, record in enumerate(records):
        e = record.evaluation
        for row in e.get("classification", []):
            put(f"accuracy, {row['rule'].replace('_', ' ')} ({row['passes']} passes)", i, f"{100 * row['accuracy']:.1f} %")
        if "nats_per_dim" in e:
            put("nats per dimension", i, f"{e['nats_per_dim']:.4f}")
        for name, title in BITS.items():
            if name in e:
                put(title, i, f"{e[name]:.3f}")
        f = e.get("fidelity", {})
        for name in ("fid", "sfid", "is", "kid", "precision", "recall"):
            if name in f:
                put(
                    f"{name.upper() if len(name) < 5 else name} ({f['extractor']}, {f['samples']} samples)",
                    i,
                    f"{f[name]:.3f}",
                )
        if e.get("probe"):
            best = max(e["probe"], key=lambda row: row["accuracy"])
            put("best linear probe", i, f"{100 * best['accuracy']:.1f} % (block {best['block']}, layer {best['layer']})")
        put("training steps", i, f"{record.rows[-1]['step']:.0f}")
        put("seconds of training", i, f"{max(row.get('seconds', 0) for row in record.rows):.0f}")
        put("parameters", i, f"{sum(p.numel() for p in record.flow.parameters()) / 1e6:.2f} M")
        put("measured with", i, str(e.get("weights")))
    return list(rows.items())


def best_and_worst(record: Record, images: int = 300) -> tuple[Tensor, list[str]]:
    """Held-out images `[2 * SHOWN, C, H, W]`: those taken most surely for what they are, and those least; and captions."""
    x, y = held_out(record.data, images)
    sure = classify(record.flow, x, "exact").log_softmax(dim=1).cpu()
    own = sure.gather(1, y[:, None])[:, 0]  # labels and pictures are on the CPU
    order = own.argsort(descending=True)
    chosen = torch.cat([order[:SHOWN], order.flip(0)[:SHOWN]])
    names = record.data.classes
    captions = [f"{names[int(y[i])]}, taken for {names[int(sure[i].argmax())]}" for i in chosen[SHOWN:]]
    return x[chosen], captions


def write_comparison(runs: list[str], folder: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Write report.html and report.json on one or several evaluated runs into `folder`. Returns what report.json holds.

    What the page shows is drawn and classified on `device`.

    Raises:
        InputError: if a run is not one, was not evaluated, or stands there twice.
    """
    from jinja2 import Environment, PackageLoader

    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise InputError("a run stands there twice; allowed are different ones")
    records = [load_record(run, device) for run in runs]
    facts: dict[str, Any] = {
        "runs": {
            record.name: record.evaluation
            | {"steps": record.rows[-1]["step"], "seconds_of_training": max(r.get("seconds", 0) for r in record.rows)}
            for record in records
        },
        "config_differences": config_differences(records),
        "crossings": crossings(records),
        "not_comparable": not_comparable(records),
    }
    sections = []
    for record in records:
        picture, captions = best_and_worst(record) if record.flow.num_classes else (None, [])
        sweep = record.evaluation.get("guidance_sweep")
        sections.append(
            {
                "name": record.name,
                "samples": as_picture(grid_array(class_grid(record.flow, SHOWN), SHOWN, smallest=32)),
                "judged": None if picture is None else as_picture(grid_array(picture, SHOWN, smallest=32)),
                "captions": captions,
                "probe": as_svg(draw_probe(record.evaluation)) if record.evaluation.get("probe") else None,
                "curve": as_svg(draw_cost_accuracy(record.evaluation)) if record.evaluation.get("classification") else None,
                "sweep": as_svg(draw_sweep(sweep)) if sweep else None,
            }
        )
    html = (
        Environment(loader=PackageLoader("flowback.reports"), autoescape=True)
        .get_template("compare.html")
        .render(
            records=records,
            sections=sections,
            table=table(records),
            facts=facts,
            by_step=as_svg(draw_against(records, "step", CURVES)),
            by_seconds=as_svg(draw_against(records, "seconds", CURVES)),
            chance=1 / max(1, records[0].flow.num_classes),
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(facts, indent=2, default=_plain) + "\n")
    (folder / "report.html").write_text(html, encoding="utf-8")
    return facts


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value)} cannot be written")
