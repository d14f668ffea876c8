"""`flowback quickstart`, `flowback train` and `flowback cache`."""

import signal
from dataclasses import fields, replace
from pathlib import Path

import yaml
from jsonargparse import Namespace, set_loader

from flowback.cli.common import add_output, say
from flowback.cli.parser import Parser, Verb
from flowback.core.console import command, console
from flowback.core.distributed import end_with_input, is_first
from flowback.core.errors import InputError
from flowback.runs.config import RunConfig, load_yaml, recipe
from flowback.training import train
from flowback.training.budget import Device, plan
from flowback.training.build import first_flow, settle
from flowback.training.caches import make_caches

set_loader("yaml", load_yaml, (yaml.YAMLError,))  # a config.yaml of an earlier version has other names


def add(verb: Verb) -> None:
    """Add these verbs to the command line."""
    command = verb("quickstart", _quickstart)
    command.add_argument("--run", type=str, default="runs/quickstart", help="folder of the two runs and the report")
    command.add_argument("--steps", type=int, default=600, help="training steps of each flow")
    command.add_argument("--seed", type=int, default=0, help="seed of both runs")

    command = verb("train", _train)
    command.add_argument(
        "--dry-run",
        type=bool,
        default=False,
        help="train nothing: print parameters, operations, memory, days and disk, on 1, 8 and 64 devices as the --plan "
        "options describe",
    )
    command.add_class_arguments(Device, "plan")
    _add_recipe(command)

    command = verb("cache", _cache)
    add_output(command, None, "folder for train.caches (default: the user's cache)")
    command.add_argument("--part", type=str, default="1/1", help="which share of the work: i/k does the i-th of k")
    command.add_argument("--verify", type=bool, default=False, help="compare what is there with its checksums instead")
    command.add_argument("--plan", type=bool, default=False, help="only say how large the caches will be")
    _add_recipe(command)


def _add_recipe(command: Parser) -> None:
    command.add_recipe("a recipe (a file, or the name of one of the package, such as digits), or the config.yaml of a run")
    command.add_argument("--init", type=str | None, default=None, help="short for --train.init")
    command.add_class_arguments(RunConfig)


def _quickstart(options: Namespace) -> int:
    from flowback.quickstart import quickstart  # with its figures, which training does not need

    digits = RunConfig.read(recipe("digits"))
    length = replace(digits.train, steps=options.steps, seed=options.seed)
    config = _placed(replace(digits, run=options.run, train=length), options.device)
    report = quickstart(config)
    if not report:
        say(f"interrupted; to resume: {command('flowback', 'quickstart', '--run', Path(options.run))}")
        return 130
    for name in ("plain", "aligned"):
        figures = report[name]
        shares = ", ".join(f"{rule.replace('_', ' ')} {100 * v:.1f} %" for rule, v in figures["accuracy"].items())
        say(
            f"{name:8} accuracy: {shares}   {figures['nats_per_dim']:.4f} nats/dim   "
            f"{figures['bits_per_dim']:.3f} bits/dim   {figures['seconds']:.0f} s"
        )
    say(f"report   {Path(options.run) / 'report.html'}")
    return 0


def _train(options: Namespace) -> int:
    end_with_input(lambda: signal.raise_signal(signal.SIGTERM))
    config = _run_config(options)
    if options.dry_run:
        with console.status("counting one step on 1, 8 and 64 devices …"):
            budget = plan(settle(config, flow=first_flow(config)[0]), options.plan)
        say(str(budget))
        return 0
    result = train(config)
    ends_early = result.interrupted and result.state.step != config.train.until
    if is_first():
        again = command("flowback", "train", "--config", result.run / "config.yaml", "--train.resume")
        stopped = f"stopped at step {result.state.step} of {config.train.steps}; to resume: {again}"
        say(stopped if result.interrupted else f"finished {result.run} at step {result.state.step}")
    return 130 if ends_early else 0


def _cache(options: Namespace) -> int:
    try:
        number, parts = (int(word) for word in options.part.split("/"))
    except ValueError as error:
        raise InputError(f"--part must be a share of the work, like 1/4, got {options.part}") from error
    root = None if options.output is None else Path(options.output)
    task = "plan" if options.plan else "verify" if options.verify else "fill"
    make_caches(_run_config(options), root, (number, parts), task)
    return 0


def _run_config(options: Namespace) -> RunConfig:
    """The configuration that the options describe."""
    config = RunConfig(**{field.name: options[field.name] for field in fields(RunConfig)})
    if options.init is not None:
        config = replace(config, train=replace(config.train, init=options.init))
    return _placed(config, options.device)


def _placed(config: RunConfig, device: str) -> RunConfig:
    """The configuration on a device; auto leaves that to the recipe."""
    return config if device == "auto" else replace(config, train=replace(config.train, accelerator=device))
