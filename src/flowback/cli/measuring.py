"""`flowback classify`, `flowback evaluate` and `flowback compare`."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from flowback.cli.common import Verb, add_fields, add_flow, class_names, flow_and_clean_images, read_fields, say
from flowback.core.errors import InputError
from flowback.reports.compare import write_comparison
from flowback.reports.evaluate import EvaluationConfig, evaluate
from flowback.tasks.classify import RULES, ClassStatistics, classify


def add(verb: Verb) -> None:
    """Add these verbs to the command line."""
    command = verb("classify", _classify, "Classify image files with the flow's own likelihood. No classifier is trained.")
    add_flow(command)
    command.add_argument("images", type=str, nargs="+", help="image files")
    command.add_argument("--rule", type=str, default=None, help=f"{', '.join(RULES)} (default: as evaluated, see the docs)")
    command.add_argument("--top", type=int, default=3, help="classes to print for each image")
    command.add_argument("--draws", type=int, default=4, help="draws of the training noise that are averaged")

    command = verb(
        "evaluate",
        _evaluate,
        "Measure a run on its data: density, classification, probes, fidelity. Writes evaluation.json and report.html.",
    )
    add_flow(command)
    add_fields(command, EvaluationConfig, skip={"weights"})

    command = verb("compare", _compare, "Compare evaluated runs side by side. Writes report.html and report.json.")
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
    results = evaluate(options.run, read_fields(options, EvaluationConfig), options.device)
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


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
