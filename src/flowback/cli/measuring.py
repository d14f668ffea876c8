"""`flowback classify`, `flowback evaluate` and `flowback compare`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from flowback.cli.common import add_flow, class_names, flow_and_clean_images, say
from flowback.cli.parser import Verb
from flowback.core.errors import InputError
from flowback.measure.fidelity import EXTRACTORS
from flowback.reports.compare import write_comparison
from flowback.reports.evaluate import DEFAULT, METRICS, EvaluationConfig, evaluate
from flowback.tasks.classify import RULES, ClassStatistics, classify


def add(verb: Verb) -> None:
    """Add these verbs to the command line."""
    command = verb("classify", _classify)
    add_flow(command)
    command.add_argument("images", type=str, nargs="+", help="image files")
    command.add_argument("--rule", type=str, default=None, help=f"{', '.join(RULES)} (default: as evaluated, see the docs)")
    command.add_argument("--top", type=int, default=3, help="classes to print for each image")
    command.add_argument("--draws", type=int, default=4, help="draws of the training noise that are averaged")

    command = verb("evaluate", _evaluate)
    add_flow(command)
    command.add_argument("--metrics", type=str, default=",".join(DEFAULT), help=f"any of: {', '.join(METRICS)}")
    command.add_argument("--images", type=int, default=None, help="held-out images for bpd, accuracy, probe (default: all)")
    command.add_argument("--draws", type=int, default=1, help="draws of the training noise that an accuracy averages")
    command.add_argument("--samples", type=int, default=4096, help="images drawn for fidelity, against as many real ones")
    command.add_argument("--samples-from", type=str, default=None, help="a folder of PNGs or an .npz to measure instead")
    command.add_argument("--guidance", type=float, default=0.0, help="guidance scale of the samples drawn")
    command.add_argument("--extractor", type=str, default="efficientnet_lite0", help=f"one of: {', '.join(EXTRACTORS)}")
    command.add_argument("--extractor-weights", type=str, default=None, help="a local file of the extractor's weights")
    command.add_argument("--reference", type=str, default="train", help="real images: train or held_out")
    command.add_argument("--seed", type=int, default=0, help="seed of the samples")
    command.add_argument("--compile", type=bool, default=False, help="compile the decoding of the samples; pays for many")
    command.add_argument("--sweep", type=str, default=None, help="guidance scales to measure FID at, like 0,1,2")

    command = verb("compare", _compare)
    command.add_argument("runs", type=str, nargs="+", help="folders of runs")
    command.add_argument("-o", "--output", type=str, default="runs/comparison", help="a folder")


def _classify(options: Namespace) -> int:
    if options.top < 1:
        raise InputError(f"--top {options.top} is not usable; allowed is a whole number of at least 1")
    flow, images = flow_and_clean_images(options)
    names = class_names(options.run, flow)
    statistics = ClassStatistics.load(flow.core.folder, flow.num_classes)
    rule = options.rule or ("shortlist_3" if statistics else "single_gradient")
    scores = classify(flow, images, rule=rule, draws=options.draws).cpu()
    calibrated = statistics is not None and rule in statistics.temperatures
    likely = calibrated or rule == "exact" or rule.startswith("shortlist")
    shown = scores.softmax(dim=1) if likely else scores
    if calibrated and statistics is not None:
        shown = statistics.probabilities(rule, scores)
    top = shown.topk(min(options.top, flow.num_classes), dim=1)
    for file, values, classes in zip(options.images, top.values.tolist(), top.indices.tolist(), strict=True):
        form = "{} {:.3f}" if likely else "{} {:+.2f}"
        say(f"{file}: {', '.join(form.format(names[k], value) for k, value in zip(classes, values, strict=True))}")
    what = "calibrated probabilities" if calibrated else "probabilities, not calibrated" if likely else "scores"
    say(f"{what}, by {rule}" + ("" if statistics else "; `flowback evaluate` makes a better rule and calibrates it"))
    return 0


def _evaluate(options: Namespace) -> int:
    names = [field.name for field in fields(EvaluationConfig) if field.name != "metrics"]
    config = EvaluationConfig(tuple(options.metrics.split(",")), **{name: options[name] for name in names})
    results = evaluate(options.run, config, _scales(options.sweep), options.device)
    for name, value in results.items():
        if isinstance(value, list):
            for row in value:
                say(f"{name:14} {', '.join(f'{k} {_short(v)}' for k, v in row.items())}")
        elif isinstance(value, dict):
            say(f"{name:14} {', '.join(f'{k} {_short(v)}' for k, v in value.items())}")
        else:
            say(f"{name:14} {_short(value)}")
    write_comparison([options.run], Path(options.run), options.device)
    say(f"all in {Path(options.run) / 'evaluation.json'} and report.html beside it")
    return 0


def _compare(options: Namespace) -> int:
    write_comparison(options.runs, Path(options.output), options.device)
    say(f"report   {Path(options.output) / 'report.html'}")
    return 0


def _scales(text: str | None) -> list[float]:
    try:
        return [float(word) for word in text.split(",")] if text else []
    except ValueError as error:
        raise InputError(f"--sweep {text} is not a list of numbers; allowed is something like 0,1,2") from error


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
