"""`flowback evaluate`, `flowback sweep` and `flowback compare`."""

import math
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from flowback.cli.common import add_data, add_flow, add_options, add_output, given_data, read_options, say
from flowback.cli.parser import Verb
from flowback.flow.defaults import FILE as DEFAULTS
from flowback.reports.compare import write_comparison
from flowback.reports.evaluate import EvaluationConfig, evaluate, evaluation_file
from flowback.reports.sweep import SweepConfig, sweep
from flowback.runs.checkpoint import flow_folder, load_flow
from flowback.training.prior import data_of


def add(verb: Verb) -> None:
    """Add these verbs to the command line."""
    command = verb("evaluate", _evaluate)
    add_flow(command)
    add_options(command, EvaluationConfig, "weights")
    add_output(command, None, "a folder, or a .json file, for what is measured (default: the flow's own folder)")
    add_data(command)

    command = verb("sweep", _sweep)
    command.add_argument("run", type=str, help="a run's folder, or a checkpoint of one")
    add_options(command, SweepConfig)

    command = verb("compare", _compare)
    command.add_argument("runs", type=str, nargs="+", help="folders of runs")
    add_output(command, "runs/comparison", "a folder")


def _evaluate(options: Namespace) -> int:
    data = given_data(options)
    config = read_options(options, EvaluationConfig)
    results = evaluate(options.run, config, options.device, data, options.output, _print)
    _print({"seconds_of_measuring": results["seconds_of_measuring"]})
    if missing := sorted(_not_finite(results)):
        say(f"not finite, and null in evaluation.json: {', '.join(missing)}")
    for name in ("accuracy", "shift", "coverage"):
        if name in config.metrics and name not in results:
            say(f"no {name}: the flow is unconditional")
    run, file = Path(options.run), evaluation_file(options.run, options.output)
    if options.output is None and not data and (run / "metrics.csv").is_file():
        write_comparison([run], run, options.device)
        say(f"all in {file} and report.html beside it")
    else:
        say(f"all in {file}")
    return 0


def _print(results: dict[str, Any]) -> None:
    """What a metric found, a line a row."""
    for name, value in results.items():
        rows = value if isinstance(value, list) else [value]
        for row in rows if name != "judged" else []:  # which is for the page
            text = ", ".join(f"{k} {_short(v)}" for k, v in row.items()) if isinstance(row, dict) else _short(row)
            say(f"{name:14} {text}")


def _not_finite(value: Any, name: str = "") -> set[str]:
    """The names of figures that are no finite numbers."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else ((name, item) for item in value)
        return set().union(*(_not_finite(item, key) for key, item in items))
    return {name} if isinstance(value, float) and not math.isfinite(value) else set()


def _sweep(options: Namespace) -> int:
    config = read_options(options, SweepConfig)
    flow, _ = load_flow(options.run, device=options.device)
    folder = flow_folder(options.run)
    if flow.core.fitted_prior is None:
        say("no prior is fitted: `flowback fit-prior` first lets the sweep try one")
    chosen = sweep(flow, data_of(options.run), config, folder, lambda row: _print({"sweep": row}))
    _print({"chosen": {name: value for name, value in vars(chosen).items() if name != "weights"}})
    say(f"stored in {folder / DEFAULTS}")
    return 0


def _compare(options: Namespace) -> int:
    write_comparison(options.runs, Path(options.output), options.device)
    say(f"report   {Path(options.output) / 'report.html'}")
    return 0


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k} {_short(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
