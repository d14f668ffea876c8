"""`flowback evaluate` and `flowback compare`."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from flowback.cli.common import add_flow, add_options, add_output, read_options, say
from flowback.cli.parser import Verb
from flowback.reports.compare import write_comparison
from flowback.reports.evaluate import EvaluationConfig, evaluate


def add(verb: Verb) -> None:
    """Add these verbs to the command line."""
    command = verb("evaluate", _evaluate)
    add_flow(command)
    add_options(command, EvaluationConfig, "weights")

    command = verb("compare", _compare)
    command.add_argument("runs", type=str, nargs="+", help="folders of runs")
    add_output(command, "runs/comparison", "a folder")


def _evaluate(options: Namespace) -> int:
    results = evaluate(options.run, read_options(options, EvaluationConfig), options.device)
    results.pop("judged", None)  # for the page
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
