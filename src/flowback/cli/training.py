"""`flowback quickstart`, `flowback train` and `flowback cache`."""

from dataclasses import fields, replace
from pathlib import Path

from jsonargparse import Namespace

from flowback.cli.common import Parser, Verb, say
from flowback.core.console import console
from flowback.core.distributed import is_first
from flowback.core.errors import InputError
from flowback.quickstart import quickstart, recipe
from flowback.runs.config import RunConfig
from flowback.training import train
from flowback.training.budget import Device, plan
from flowback.training.caches import make_caches


def add(verb: Verb) -> None:
    """Add these verbs to the command line."""
    command = verb(
        "quickstart",
        _quickstart,
        "Train a plain and an aligned flow on digits and write a report. Takes minutes and needs no network.",
    )
    command.add_argument("--run", type=str, default="runs/quickstart", help="folder of the two runs and the report")
    command.add_argument("--steps", type=int, default=None, help="training steps of each flow (default: the recipe's)")
    command.add_argument("--seed", type=int, default=0, help="seed of both runs")

    command = verb(
        "train",
        _train,
        "Train a flow. Options come from a YAML file (--config, see configs/) and from the command line, which wins.",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: print parameters, operations, memory, days and disk, on 1, 8 and 64 devices such as the "
        "following three options describe",
    )
    command.add_argument(
        "--device-tflops", type=float, default=Device.tflops, help="peak, 10^12 operations/s (default: an H100 in bfloat16)"
    )
    command.add_argument("--device-gb", type=float, default=Device.gigabytes, help="memory, 10^9 bytes (default: 80)")
    command.add_argument("--utilization", type=float, default=Device.utilization, help="share of the peak that is reached")
    _add_recipe(command)

    command = verb(
        "cache",
        _cache,
        "Compute a recipe's latents and encoder features once, for training to read. Interrupted, the same command goes "
        "on; several at once share the work with --part.",
    )
    command.add_argument(
        "-o", "--output", type=str, default=None, help="folder for train.caches (default: the user's cache)"
    )
    command.add_argument("--part", type=str, default="1/1", help="which share of the work: i/k does the i-th of k")
    command.add_argument("--verify", type=bool, default=False, help="true compares what is there with checksums instead")
    command.add_argument("--plan", type=bool, default=False, help="true only says how large the caches will be")
    _add_recipe(command)


def _add_recipe(command: Parser) -> None:
    command.add_argument("--config", action="config", help="a recipe, or the config.yaml of a run")
    command.add_class_arguments(RunConfig)


def _quickstart(options: Namespace) -> int:
    command = Parser()
    _add_recipe(command)
    changes = [f"--run={options.run}", f"--train.seed={options.seed}"]
    changes += [f"--train.steps={options.steps}"] if options.steps is not None else []
    config = _run_config(
        command.instantiate(command.parse_args([f"--config={recipe('digits')}", *changes])), options.device
    )
    report = quickstart(config)
    if not report:
        console.print(f"interrupted; go on with: flowback quickstart --run {options.run}", highlight=False)
        return 130
    for name in ("plain", "aligned"):
        figures = report[name]
        shares = ", ".join(f"{rule.replace('_', ' ')} {100 * v:.1f} %" for rule, v in figures["accuracy"].items())
        console.print(
            f"{name:8} accuracy: {shares}   {figures['nats_per_dim']:.4f} nats/dim   "
            f"{figures['bits_per_dim']:.3f} bits/dim   {figures['seconds']:.0f} s",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"report   {Path(options.run) / 'report.html'}", highlight=False, soft_wrap=True)
    return 0


def _train(options: Namespace) -> int:
    config = _run_config(options, options.device)
    if options.dry_run:
        with console.status("counting one step on 1, 8 and 64 devices …"):
            budget = plan(config, Device(options.device_tflops, options.device_gb, options.utilization))
        say(str(budget))
        return 0
    result = train(config)
    ends_early = result.interrupted and result.state.step != config.train.until
    if is_first():
        said = f"finished {result.run} at step {result.state.step}"
        if result.interrupted:
            said = (
                f"stopped at step {result.state.step} of {config.train.steps}; go on with: "
                f"flowback train --config {result.run / 'config.yaml'} --run {result.run} --train.resume"
            )
        console.print(said, highlight=False, soft_wrap=True)
    return 130 if ends_early else 0


def _cache(options: Namespace) -> int:
    try:
        number, parts = (int(word) for word in options.part.split("/"))
    except ValueError:
        raise InputError(f"--part {options.part} is not a share; allowed is something like 1/4") from None
    root = None if options.output is None else Path(options.output)
    task = "plan" if options.plan else "verify" if options.verify else "fill"
    make_caches(_run_config(options, options.device), root, (number, parts), task)
    return 0


def _run_config(options: Namespace, device: str) -> RunConfig:
    """The configuration that the options describe, on a device; auto leaves that to the recipe."""
    config = RunConfig(**{field.name: options[field.name] for field in fields(RunConfig)})
    return config if device == "auto" else replace(config, train=replace(config.train, accelerator=device))
