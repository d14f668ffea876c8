"""`flowback classify` and `flowback evaluate`."""

import json
from pathlib import Path

from jsonargparse import Namespace

from flowback.classify import RULES, classify
from flowback.cli.common import (
    Verb,
    add_flow,
    class_names,
    flow_and_clean_images,
)
from flowback.data import load_data
from flowback.errors import InputError
from flowback.evaluation.metrics import METRICS, measure
from flowback.quickstart import machine
from flowback.training import RunConfig
from flowback.training.checkpoint import load_flow
from flowback.training.log import console


def add(verb: Verb) -> None:
    """Add these verbs to the command line."""
    command = verb("classify", _classify, "Classify image files with the flow's own likelihood. No classifier is trained.")
    add_flow(command)
    command.add_argument("images", type=str, nargs="+", help="image files")
    command.add_argument("--rule", type=str, default="exact", help=f"how classes are scored: {' or '.join(RULES)}")
    command.add_argument("--top", type=int, default=3, help="classes to print for each image")
    command.add_argument("--draws", type=int, default=4, help="draws of the training noise that are averaged")

    command = verb(
        "evaluate", _evaluate, "Measure a run on its held-out images. Prints the figures and writes evaluation.json."
    )
    add_flow(command)
    command.add_argument("--metrics", type=str, default=",".join(METRICS), help=f"any of: {', '.join(METRICS)}")
    command.add_argument("--images", type=int, default=None, help="held-out images to use (default: all)")


def _classify(options: Namespace) -> int:
    flow, images = flow_and_clean_images(options)
    names = class_names(options.run, flow)
    scores = classify(flow, images, rule=options.rule, draws=options.draws)
    shown = scores.softmax(dim=1) if options.rule == "exact" else scores
    top = shown.topk(min(max(options.top, 1), flow.num_classes), dim=1)
    for file, values, classes in zip(options.images, top.values.tolist(), top.indices.tolist(), strict=True):
        form = "{} {:.3f}" if options.rule == "exact" else "{} {:+.2f}"
        ranked = (form.format(names[k], value) for k, value in zip(classes, values, strict=True))
        console.print(f"{file}: {', '.join(ranked)}", highlight=False, soft_wrap=True, markup=False)
    return 0


def _evaluate(options: Namespace) -> int:
    metrics = tuple(options.metrics.split(","))
    for name in metrics:
        if name not in METRICS:
            raise InputError(f"metric {name!r} does not exist; allowed: {', '.join(METRICS)}")
    if options.images is not None and options.images < 1:
        raise InputError(f"--images {options.images} is not usable; allowed is a whole number of at least 1")
    flow, weights = load_flow(options.run, options.weights)
    file = Path(options.run) / "config.yaml"
    if not file.is_file():
        raise InputError(f"{options.run} has no config.yaml that names its data; allowed is the folder of a run")
    data = load_data(RunConfig.from_yaml(file.read_text()).data)
    figures = {"data": data.name, "weights": weights, "machine": machine()}
    figures |= measure(flow, data, metrics, options.images)
    (Path(options.run) / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        console.print(f"{name:16} {value}", highlight=False, soft_wrap=True)
    return 0
