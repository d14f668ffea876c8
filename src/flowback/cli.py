"""The command line: one thin command per verb."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import torch
from jsonargparse import ArgumentParser, Namespace

from flowback import __version__
from flowback.classify import RULES, classify
from flowback.data import load_data, load_image
from flowback.errors import InputError
from flowback.evaluation.metrics import METRICS, measure
from flowback.evaluation.pictures import save_grid, to_uint8
from flowback.flows import Guidance, TarFlow
from flowback.flows.guidance import SCHEDULES
from flowback.quickstart import machine, quickstart, recipe
from flowback.training import AlignmentConfig, RunConfig, TrainConfig, train
from flowback.training.checkpoint import load_flow
from flowback.training.log import console
from flowback.units import from_levels

SWITCHES = tuple(
    f"--{section}.{field.name}"
    for section, config in (("train", TrainConfig), ("alignment", AlignmentConfig))
    for field in fields(config)
    if field.type is bool
)


class Parser(ArgumentParser):
    """An argument parser whose errors are one line and exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Print the message in one line and exit with status 2."""
        fail(message)


def fail(message: str) -> NoReturn:
    """Print one clear line and exit with status 2."""
    print(f"flowback: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 130 after an interruption; bad input exits with 2."""
    parser, commands = build_parser()
    words = _with_switches(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parser.parse_args(words)
        command, run = commands[options.command]
        return run(command.instantiate(options[options.command]))
    except InputError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("flowback: interrupted", file=sys.stderr)
        return 130


def build_parser() -> tuple[Parser, dict[str, tuple[Parser, Callable[[Namespace], int]]]]:
    """The parser, and for every verb its own parser and the function that runs it."""
    parser = Parser(
        prog="flowback",
        version=__version__,
        description="Image normalizing flows aligned with vision foundation models: train, sample, classify, evaluate.",
    )
    verbs = parser.add_subcommands(dest="command", metavar="COMMAND")
    commands: dict[str, tuple[Parser, Callable[[Namespace], int]]] = {}

    def verb(name: str, run: Callable[[Namespace], int], text: str) -> Parser:
        command = Parser(description=text)
        verbs.add_subcommand(name, command, help=text.split(". ")[0])
        commands[name] = (command, run)
        return command

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
    command.add_argument("--config", action="config", help="a recipe, or the config.yaml of a run")
    command.add_class_arguments(RunConfig)

    command = verb("sample", _sample, "Draw images from a trained flow. Writes one grid (PNG) or a folder of PNGs.")
    _add_flow(command)
    command.add_argument("--labels", type=str, default=None, help="classes by number or name, like 3,7 (default: all)")
    command.add_argument("--num", type=int, default=64, help="number of images; the labels take turns")
    command.add_argument("--guidance", type=float, default=0.0, help="guidance scale; 0 for none")
    command.add_argument("--schedule", type=str, default="linear", help=f"of the guidance: {' or '.join(SCHEDULES)}")
    command.add_argument("--temperature", type=float, default=1.0, help="standard deviation of the latent noise")
    command.add_argument("--no-denoise", action="store_true", help="keep the training noise in the images")
    command.add_argument("--seed", type=int, default=0, help="seed of the images")
    command.add_argument("--batch-size", type=int, default=64, help="images decoded at once; bounds the memory")
    command.add_argument("-o", "--output", type=str, default="samples.png", help="a .png file for a grid, or a folder")

    command = verb("classify", _classify, "Classify image files with the flow's own likelihood. No classifier is trained.")
    _add_flow(command)
    command.add_argument("images", type=str, nargs="+", help="image files")
    command.add_argument("--rule", type=str, default="exact", help=f"how classes are scored: {' or '.join(RULES)}")
    command.add_argument("--top", type=int, default=3, help="classes to print for each image")
    command.add_argument("--draws", type=int, default=4, help="draws of the training noise that are averaged")

    command = verb(
        "evaluate", _evaluate, "Measure a run on its held-out images. Prints the figures and writes evaluation.json."
    )
    _add_flow(command)
    command.add_argument("--metrics", type=str, default=",".join(METRICS), help=f"any of: {', '.join(METRICS)}")
    command.add_argument("--images", type=int, default=None, help="held-out images to use (default: all)")
    return parser, commands


def _add_flow(command: Parser) -> None:
    command.add_argument("run", type=str, help="a run's folder, a checkpoint, a folder or hub id of a flow")
    command.add_argument("--weights", type=str, default="ema", help="ema (averaged) or raw (of the last step)")


def _quickstart(options: Namespace) -> int:
    command = build_parser()[1]["train"][0]
    changes = [f"--run={options.run}", f"--train.seed={options.seed}"]
    changes += [f"--train.steps={options.steps}"] if options.steps is not None else []
    config = _run_config(command.instantiate(command.parse_args([f"--config={recipe('digits')}", *changes])))
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
    config = _run_config(options)
    result = train(config)
    if result.interrupted:
        console.print(
            f"stopped at step {result.state.step} of {config.train.steps}; go on with: "
            f"flowback train --config {result.run / 'config.yaml'} --run {result.run} --train.resume",
            highlight=False,
            soft_wrap=True,
        )
        return 0 if config.train.until is not None and result.state.step == config.train.until else 130
    console.print(f"finished {result.run} at step {result.state.step}", highlight=False, soft_wrap=True)
    return 0


def _sample(options: Namespace) -> int:
    if options.num < 1 or options.batch_size < 1:
        raise InputError(f"--num {options.num} and --batch-size {options.batch_size}: allowed are numbers of at least 1")
    output = Path(options.output)
    if output.suffix and output.suffix.lower() != ".png":
        raise InputError(f"output {output} is not known; allowed is a .png file for a grid, or a folder")
    flow, _ = load_flow(options.run, options.weights)
    labels = _labels(options.labels, _class_names(options.run, flow), flow)
    y = torch.tensor([labels[i % len(labels)] for i in range(options.num)])
    x = flow.sample(
        y,
        guidance=Guidance(options.guidance, options.schedule),
        temperature=options.temperature,
        denoise=not options.no_denoise,
        generator=torch.Generator().manual_seed(options.seed),
        batch_size=options.batch_size,
    )
    if output.suffix:
        save_grid(x, output, columns=max(1, round(options.num**0.5)))
    else:
        from torchvision.io import write_png

        output.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(to_uint8(x)):
            write_png(image, str(output / f"{i:06d}.png"))
    console.print(f"{options.num} images in {output}", highlight=False, soft_wrap=True)
    return 0


def _classify(options: Namespace) -> int:
    flow, _ = load_flow(options.run, options.weights)
    names = _class_names(options.run, flow)
    images = torch.stack([load_image(Path(file), flow.image_size, flow.channels) for file in options.images])
    scores = classify(flow, from_levels(images), rule=options.rule, draws=options.draws)
    shown = scores.softmax(dim=1) if options.rule == "exact" else scores
    top = shown.topk(min(max(options.top, 1), flow.num_classes), dim=1)
    for file, values, classes in zip(options.images, top.values.tolist(), top.indices.tolist(), strict=True):
        form = "{} {:.3f}" if options.rule == "exact" else "{} {:+.2f}"
        ranked = (form.format(names[k], value) for k, value in zip(classes, values, strict=True))
        console.print(f"{file}: {', '.join(ranked)}", highlight=False, soft_wrap=True, markup=False)
    return 0


def _evaluate(options: Namespace) -> int:
    metrics = tuple(options.metrics.split(","))
    for name in metrics:
        if name not in METRICS:
            raise InputError(f"metric {name!r} does not exist; allowed: {', '.join(METRICS)}")
    if options.images is not None and options.images < 1:
        raise InputError(f"--images {options.images} is not usable; allowed is a whole number of at least 1")
    flow, weights = load_flow(options.run, options.weights)
    file = Path(options.run) / "config.yaml"
    if not file.is_file():
        raise InputError(f"{options.run} has no config.yaml that names its data; allowed is the folder of a run")
    data = load_data(RunConfig.from_yaml(file.read_text()).data)
    figures = {"data": data.name, "weights": weights, "machine": machine()}
    figures |= measure(flow, data, metrics, options.images)
    (Path(options.run) / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        console.print(f"{name:16} {value}", highlight=False, soft_wrap=True)
    return 0


def _run_config(options: Namespace) -> RunConfig:
    return RunConfig(**{field.name: options[field.name] for field in fields(RunConfig)})


def _class_names(run: str, flow: TarFlow) -> list[str]:
    """The class names that training left in the run's folder, or else the numbers."""
    file = Path(run) / "classes.json"
    names = json.loads(file.read_text()) if file.is_file() else None
    return names if names and len(names) == flow.num_classes else [str(k) for k in range(flow.num_classes)]


def _labels(text: str | None, names: list[str], flow: TarFlow) -> list[int]:
    """`--labels` as class numbers; all classes by default, -1 for an unconditional flow."""
    if not flow.num_classes and text is not None:
        raise InputError(f"labels {text} do not fit an unconditional flow; allowed is none")
    if text is None:
        return list(range(flow.num_classes)) or [-1]
    labels = []
    for word in (word.strip() for word in text.split(",")):
        if word in names:
            labels.append(names.index(word))
        elif word.isdecimal() and int(word) < flow.num_classes:
            labels.append(int(word))
        else:
            raise InputError(f"label {word!r} does not exist; allowed: 0 to {flow.num_classes - 1}, or {', '.join(names)}")
    return labels


def _with_switches(words: Sequence[str]) -> list[str]:
    """A bare switch, such as `--train.resume`, means true."""
    following = (*words, "-")[1:]
    return [
        f"{word}=true" if word in SWITCHES and after.startswith("-") else word
        for word, after in zip(words, following, strict=True)
    ]
