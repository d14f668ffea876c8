"""`flowback autoencoder train`, `evaluate` and `export`."""

import signal
from dataclasses import fields, replace
from pathlib import Path

from jsonargparse import Namespace

from flowback.cli.common import add_data, add_options, add_output, given_data, read_options, say
from flowback.cli.parser import Verb
from flowback.core.console import command
from flowback.core.distributed import end_with_input, is_first
from flowback.reports.autoencoder import ReconstructionTest, evaluate_autoencoder, export_autoencoder
from flowback.runs.config import AutoencoderRunConfig
from flowback.training.autoencoders import train_autoencoder

RUN = "a run that trained an autoencoder, alone or with a flow; a checkpoint of it, a folder or hub id of an autoencoder"


def add(verb: Verb) -> None:
    """Add these verbs to the command line."""
    command = verb("autoencoder train", _train)
    command.add_recipe(
        "a recipe (a file, or the name of one of the package, such as autoencoder/emoji), or the config.yaml of a run"
    )
    command.add_class_arguments(AutoencoderRunConfig)

    command = verb("autoencoder evaluate", _evaluate)
    command.add_argument("run", type=str, help=RUN)
    add_options(command, ReconstructionTest)
    add_output(command, None, "a folder for reconstruction.json and .png (default: the run's own folder)")
    add_data(command)

    command = verb("autoencoder export", _export)
    command.add_argument("run", type=str, help=RUN)
    command.add_argument("folder", type=str, help="where to write; new or empty")


def _train(options: Namespace) -> int:
    end_with_input(lambda: signal.raise_signal(signal.SIGTERM))
    config = AutoencoderRunConfig(**{field.name: options[field.name] for field in fields(AutoencoderRunConfig)})
    if options.device != "auto":
        config = replace(config, train=replace(config.train, accelerator=options.device))
    result = train_autoencoder(config)
    if is_first():
        again = command("flowback", "autoencoder", "train", "--config", result.run / "config.yaml", "--train.resume")
        stopped = f"stopped at step {result.state.step} of {config.train.steps}; to resume: {again}"
        use = command("flowback", "train", "--latents.autoencoder", result.run)
        say(stopped if result.interrupted else f"finished at step {result.state.step}; a flow in its latents: {use}")
    return 130 if result.interrupted and result.state.step != config.train.until else 0


def _evaluate(options: Namespace) -> int:
    data = given_data(options)
    test = read_options(options, ReconstructionTest)
    found, file = evaluate_autoencoder(options.run, test, options.device, data, options.output)
    for name, value in found.items():
        text = ", ".join(f"{k} {_short(v)}" for k, v in value.items()) if isinstance(value, dict) else _short(value)
        say(f"{name:14} {text}")
    say(f"all in {file} and reconstruction.png beside it")
    return 0


def _export(options: Namespace) -> int:
    export_autoencoder(options.run, Path(options.folder))
    say(f"the autoencoder is in {options.folder}; a flow in its latents: --latents.autoencoder {options.folder}")
    return 0


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
