"""`flowback distill`."""

import signal
from dataclasses import fields, replace

from jsonargparse import Namespace

from flowback.cli.common import say
from flowback.cli.parser import Verb
from flowback.core.console import command
from flowback.core.distributed import end_with_input, is_first
from flowback.runs.config import DistillRunConfig
from flowback.training.distillation import distill


def add(verb: Verb) -> None:
    """Add this verb to the command line."""
    command = verb("distill", _distill)
    command.add_recipe("the config.yaml of a run that trains a student")
    command.add_argument("flow", type=str | None, nargs="?", default=None, help="short for --teacher")
    command.add_class_arguments(DistillRunConfig)


def _distill(options: Namespace) -> int:
    end_with_input(lambda: signal.raise_signal(signal.SIGTERM))
    config = DistillRunConfig(**{field.name: options[field.name] for field in fields(DistillRunConfig)})
    if options.flow is not None:
        config = replace(config, teacher=options.flow)
    if options.device != "auto":
        config = replace(config, train=replace(config.train, accelerator=options.device))
    result = distill(config)
    if is_first():
        again = command("flowback", "distill", "--config", result.run / "config.yaml", "--train.resume")
        stopped = f"stopped at step {result.state.step} of {config.train.steps}; to resume: {again}"
        learned = ("--denoiser", "learned") if config.method == "denoiser" else ("--sampler", "student")
        use = command("flowback", "sample", str(config.teacher), *learned)
        say(stopped if result.interrupted else f"finished {result.run} at step {result.state.step}; to draw: {use}")
    return 130 if result.interrupted and result.state.step != config.train.until else 0
