"""The main job, small: a plain and an aligned flow on digits, with the same seed and steps, and a page on what they do."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowback.core.console import console
from flowback.core.seeds import keyed_generator
from flowback.core.units import from_levels
from flowback.data import ImageSet
from flowback.data.pictures import grid_array
from flowback.latents import Flow
from flowback.reports.compare import Part, write_comparison
from flowback.reports.evaluate import EvaluationConfig, evaluate
from flowback.runs import checkpoint
from flowback.runs.checkpoint import load_flow
from flowback.runs.config import RunConfig
from flowback.tasks.editing import inpaint, swap_class
from flowback.tasks.score import score
from flowback.training import train

DRAWS = 4  # noise draws averaged in an accuracy
SHOWN = 10  # images in a row of the page's first pictures
FALSE_ALARMS = 0.05  # share of typical images that are taken for outliers
OVER_SEEDS = (  # by `studies/seeds.py`, with the steps that are the default
    "Over five seeds of 600 steps (mean difference, 95 % interval): exact +0.1 ± 0.5 points, no difference seen; single "
    "gradient +1.6 ± 1.1 points and -0.0043 ± 0.0021 nats per dimension, both better, for 1.7 to 1.9 times the seconds. "
    "Digits leave little to gain; docs/results.md has studies on clothes and emoji."
)


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
    runs: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, alignment in (("plain", replace(config.alignment, strategy="none")), ("aligned", config.alignment)):
        run = config.folder / name
        resume = checkpoint.newest(run) is not None
        result = train(replace(config, run=str(run), alignment=alignment, train=replace(config.train, resume=resume)))
        if result.interrupted:
            return {}
        console.print(f"measuring {name} on {len(result.data.held_out)} held-out images …", highlight=False)
        found[name] = evaluate(str(run), EvaluationConfig(draws=DRAWS), result.flow.device)
        runs[name] = str(run)
    flow, _ = load_flow(runs["aligned"], device=result.flow.device)
    story = [*jobs(flow, result.data, found["aligned"]), changed(found)]
    return write_comparison(list(runs.values()), config.folder, result.flow.device, story)


def jobs(flow: Flow, data: ImageSet, found: dict[str, Any]) -> list[Part]:
    """What a flow does: it draws, classifies, scores and edits.

    Args:
        flow: an evaluated flow with classes.
        data: its images.
        found: its evaluation.
    """
    held_out, y = _held_out(data, range(len(data.held_out)))
    x, y, taken = held_out[:SHOWN], y[:SHOWN], found["judged"]["worst"]
    strange = {
        "left and right exchanged": lambda x: x.roll(x.shape[3] // 2, dims=3),
        "black and white exchanged": torch.neg,
    }
    alarms = {what: score(flow, alter(held_out)).outliers(FALSE_ALARMS) for what, alter in strange.items()}
    shares = " and ".join(f"{100 * alarm.float().mean():.0f} % of those with {what}" for what, alarm in alarms.items())
    right = f"{100 * found['accuracy']['exact']:.1f} % of {len(held_out)} held-out images"
    half = torch.zeros(1, 1, *x.shape[2:], dtype=torch.bool)
    half[:, :, x.shape[2] // 2 :] = True
    filled = inpaint(flow, x, half, y, steps=50, generator=keyed_generator(0)).x
    return [
        Part(
            "It draws",
            "Noise goes back through the flow and becomes an image of the class that is asked for.",
            *_shown("Samples", flow.sample(y=torch.arange(2 * SHOWN) % flow.num_classes, guidance=1.0, seed=0)),
        ),
        Part(
            "It classifies",
            f"{right} are likeliest under their own class. No classifier was trained. These are the least likely to be "
            "what they are, taken for "
            f"{', '.join(data.classes[row[2]] for row in taken)}.",
            *_shown("The images classified worst", held_out[[row[0] for row in taken]]),
        ),
        Part(
            "It scores",
            f"What is less typical than {100 * (1 - FALSE_ALARMS):.0f} % of held-out images (first row) raises an alarm: "
            f"{shares}. The flow never saw such images.",
            *_shown("Held-out images, and two rows of outliers", x, *(alter(x) for alter in strange.values())),
        ),
        Part(
            "It edits",
            "Held-out images; without their lower half; with one drawn from the flow's density given the upper one; and "
            "the next class from the noise of the image.",
            *_shown("Edited images", x, x.masked_fill(half, 1), filled, swap_class(flow, x, y, (y + 1) % flow.num_classes)),
        ),
    ]


def changed(found: dict[str, dict[str, Any]]) -> Part:
    """What alignment changed: in these two runs, and over seeds.

    Args:
        found: the evaluations of `plain` and `aligned`.
    """
    rules = ("exact", "single_gradient")
    gained = {rule: 100 * (found["aligned"]["accuracy"][rule] - found["plain"]["accuracy"][rule]) for rule in rules}
    listed = ", ".join(f"{rule.replace('_', ' ')} {value:+.1f}" for rule, value in gained.items())
    return Part("What alignment changed", f"Points of accuracy gained in these two runs: {listed}. {OVER_SEEDS}")


def _held_out(data: ImageSet, indices: Any) -> tuple[Tensor, Tensor]:
    pixels, y = data.held_out[list(indices)]
    return from_levels(pixels, data.levels), y


def _shown(what: str, *rows: Tensor) -> tuple[Tensor, str]:
    """A picture of rows of images, and what it shows."""
    return grid_array(torch.cat([row.cpu() for row in rows]), SHOWN, smallest=32), what
