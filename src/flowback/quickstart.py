"""The main job, small: a plain and an aligned flow on digits, with the same seed and steps, and a report on both."""

from dataclasses import replace
from typing import Any

from flowback.core.console import console
from flowback.reports.compare import write_comparison
from flowback.reports.evaluate import EvaluationConfig, evaluate
from flowback.runs import checkpoint
from flowback.runs.config import RunConfig
from flowback.training import train

DRAWS = 4  # noise draws averaged in an accuracy


def quickstart(config: RunConfig) -> dict[str, Any]:
    """Train `config` without and with its alignment, evaluate both, and write a report on both into its folder.

    Interrupted runs are resumed, and finished ones are not trained again.

    Args:
        config: an aligned run; its folder gets the two runs `plain` and `aligned`, and what `write_comparison` writes.

    Returns:
        The content of report.json, or an empty dictionary if training was interrupted.

    Raises:
        InputError: as `flowback.training.train` does.
    """
    runs, device = [], None
    for name, alignment in (("plain", replace(config.alignment, strategy="none")), ("aligned", config.alignment)):
        run = config.folder / name
        resume = checkpoint.newest(run) is not None
        result = train(replace(config, run=str(run), alignment=alignment, train=replace(config.train, resume=resume)))
        if result.interrupted:
            return {}
        console.print(f"measuring {name} on {len(result.data.held_out)} held-out images …", highlight=False)
        device = result.flow.device
        evaluate(str(run), EvaluationConfig(draws=DRAWS), device)
        runs.append(str(run))
    return write_comparison(runs, config.folder, device or "cpu")
