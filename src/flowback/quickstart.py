"""The main job, small: a plain and an aligned flow on digits, with the same seed and steps, and a report on both."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowback.core.console import console
from flowback.core.devices import machine
from flowback.reports.report import Measured, measure, write_report
from flowback.runs import checkpoint
from flowback.runs.config import RunConfig
from flowback.runs.log import read_metrics
from flowback.training import train

GUIDANCE = 1.0


def recipe(name: str) -> Path:
    """The file of a recipe that ships with the package: `configs/<name>.yaml`."""
    package = Path(__file__).parent
    candidates = (package / "configs" / f"{name}.yaml", package.parents[1] / "configs" / f"{name}.yaml")
    return next(file for file in candidates if file.exists())


def quickstart(config: RunConfig) -> dict[str, Any]:
    """Train `config` without and with its alignment, then write report.html and report.json into its folder.

    Runs that were interrupted go on, and finished ones are not trained again.

    Args:
        config: an aligned run; its folder gets the two runs `plain` and `aligned`.

    Returns:
        The content of report.json, or an empty dictionary if training was interrupted.

    Raises:
        InputError: as `flowback.training.train` does.
    """
    folder, measured = config.folder, []
    for name, alignment in (("plain", replace(config.alignment, strategy="none")), ("aligned", config.alignment)):
        run = folder / name
        resume = checkpoint.newest(run) is not None
        result = train(replace(config, run=str(run), alignment=alignment, train=replace(config.train, resume=resume)))
        if result.interrupted:
            return {}
        console.print(f"measuring {name} on {len(result.data.held_out)} held-out images …", highlight=False)
        figures = measure(result.flow, result.data)
        figures |= {"steps": result.state.step, "seconds": round(result.state.seconds, 1), "weights": "ema"}
        figures |= {"strategy": alignment.strategy, "gradient": alignment.gradient if name == "aligned" else None}
        title = "plain flow" if name == "plain" else f"aligned flow ({alignment.strategy}, {alignment.gradient})"
        measured.append(Measured(name, title, result.flow, read_metrics(run / "metrics.csv"), figures))
        data = result.data
    write_report(folder, data, measured, machine(result.flow.device), GUIDANCE)
    return json.loads((folder / "report.json").read_text())
