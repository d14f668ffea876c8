"""The command line: one thin command per verb."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from flowback import __version__
from flowback.classify import RULES, classify
from flowback.data import load_data, load_image
from flowback.editing import inpaint, interpolate, swap_class
from flowback.errors import InputError
from flowback.evaluation.metrics import METRICS, measure
from flowback.evaluation.pictures import save_grid, save_images
from flowback.flows import TarFlow
from flowback.flows.calibration import FILE, ROWS, calibrate
from flowback.flows.decoders import DECODERS
from flowback.flows.guidance import SCHEDULES, TARGETS
from flowback.quickstart import machine, quickstart, recipe
from flowback.sampling import Request, sample_to_disk
from flowback.training import AlignmentConfig, RunConfig, TrainConfig, train
from flowback.training.checkpoint import flow_folder, load_flow
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

    command = verb(
        "sample",
        _sample,
        "Draw images from a trained flow. Writes a grid (.png), an .npz in the ADM evaluation format, or a folder of PNGs. "
        "Interrupted, the same command goes on.",
    )
    _add_flow(command)
    command.add_argument("-o", "--output", type=str, default="samples.png", help="a .png or .npz file, or a folder")
    command.add_argument("--labels", type=str, default=None, help="classes by number or name, like 3,7 (default: all)")
    command.add_argument("--num", type=int, default=64, help="number of images; the labels take turns")
    command.add_argument("--guidance", type=float, default=0.0, help="guidance scale; 0 for none")
    command.add_argument("--schedule", type=str, default="linear", help=f"of the guidance: {' or '.join(SCHEDULES)}")
    command.add_argument("--guide", type=str, default="both", help=f"what is guided: {', '.join(TARGETS)}")
    command.add_argument("--temperature", type=float, default=1.0, help="standard deviation of the latent noise")
    command.add_argument("--no-denoise", action="store_true", help="keep the training noise in the images")
    command.add_argument("--rank", type=int, default=1, help="draw so many for each image and keep the flow's favourite")
    command.add_argument("--refine", type=int, default=0, help="gradient steps on z that raise log p(label | image)")
    command.add_argument("--seed", type=int, default=0, help="seed; an image is a function of it and of its number")
    command.add_argument("--precision", type=str, default="32-true", help="32-true or bf16-mixed")
    command.add_argument("--method", type=str, default="auto", help=f"of decoding: auto, {', '.join(DECODERS)}")
    command.add_argument("--batch-size", type=int, default=64, help="images decoded at once; bounds the memory")
    command.add_argument("--processes", type=int, default=1, help="processes that share the cores or accelerators")
    command.add_argument("--device", type=str, default="auto", help="where to run; auto takes what is there")

    command = verb(
        "calibrate",
        _calibrate,
        "Measure which decoder is fastest for each block on this machine. Stored with the model, for sampling to use.",
    )
    _add_flow(command)
    command.add_argument(
        "--rows", type=str, default=",".join(map(str, ROWS)), help="batch sizes; guided images count twice"
    )

    command = verb("encode", _encode, "Map image files to noise. Writes z, log-likelihoods and labels as .safetensors.")
    _add_flow(command)
    _add_images(command)
    command.add_argument("-o", "--output", type=str, default="z.safetensors", help="a .safetensors file")

    command = verb("decode", _decode, "Map noise, as encode wrote it, back to images. Writes one grid or a folder of PNGs.")
    _add_flow(command)
    command.add_argument("file", type=str, help="a .safetensors file of encode")
    command.add_argument("--labels", type=str, default=None, help="classes to decode with (default: those in the file)")
    command.add_argument("-o", "--output", type=str, default="decoded.png", help="a .png file for a grid, or a folder")

    command = verb("interpolate", _interpolate, "Walk from image to image through z. Writes one grid, a row a pair.")
    _add_flow(command)
    _add_images(command)
    command.add_argument("--steps", type=int, default=8, help="images on the way, ends included")
    command.add_argument("-o", "--output", type=str, default="interpolation.png", help="a .png file")

    command = verb("swap", _swap, "Draw images as other classes, with their z kept. Writes one grid: image, then classes.")
    _add_flow(command)
    _add_images(command)
    command.add_argument("--to", type=str, default=None, help="classes, by number or name (default: all)")
    command.add_argument("-o", "--output", type=str, default="swapped.png", help="a .png file")

    command = verb("inpaint", _inpaint, "Draw a region of images anew, given the rest. Writes one grid, a row an image.")
    _add_flow(command)
    _add_images(command)
    command.add_argument("--mask", type=str, default=None, help="an image file: bright where to draw")
    command.add_argument("--box", type=str, default=None, help="or LEFT,TOP,WIDTH,HEIGHT in pixels")
    command.add_argument("--num", type=int, default=4, help="drawings of each image")
    command.add_argument("--steps", type=int, default=100, help="Langevin steps after the first guess")
    command.add_argument("--seed", type=int, default=0, help="seed of the drawings")
    command.add_argument("-o", "--output", type=str, default="inpainted.png", help="a .png file")

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


def _add_images(command: Parser) -> None:
    command.add_argument("images", type=str, nargs="+", help="image files")
    command.add_argument("--labels", type=str, default=None, help="their classes (default: as the flow classifies them)")


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
    flow, _ = load_flow(options.run, options.weights)
    names = _class_names(options.run, flow)
    request = Request(
        run=options.run,
        weights=options.weights,
        num=options.num,
        labels=tuple(_labels(options.labels, names, flow) if options.labels else range(flow.num_classes)) or (-1,),
        denoise=not options.no_denoise,
        **{name: options[name] for name in ("guidance", "schedule", "guide", "temperature", "seed", "precision")},
        **{name: options[name] for name in ("rank", "refine")},
    )
    notes = sample_to_disk(
        request, Path(options.output), options.method, options.batch_size, options.processes, options.device
    )
    _say(f"{options.num} images in {options.output}")
    residual, fell_back = max(note.residual for note in notes), sum(note.fell_back for note in notes)
    if residual or fell_back:
        _say(f"largest residual of parallel decoding {residual:.1e}; {fell_back} blocks went over to the sequential loop")
    not_finite = sum(note.not_finite for note in notes)
    if not_finite:
        _say(f"{not_finite} images had numbers that are not finite (grey there); less guidance or temperature may help")
    return 0


def _calibrate(options: Namespace) -> int:
    flow, _ = load_flow(options.run, options.weights)
    try:
        rows = [int(word) for word in options.rows.split(",")]
    except ValueError:
        raise InputError(f"--rows {options.rows} is not a list of numbers; allowed is something like 1,8,32") from None
    folder = flow_folder(options.run)
    calibrate(flow, rows, report=_say).save(folder)
    _say(f"stored in {folder / FILE}")
    return 0


def _encode(options: Namespace) -> int:
    from safetensors.torch import save_file

    output = _output(options, ".safetensors")
    flow, images, y = _flow_and_images(options)
    with torch.no_grad():
        z, log_det = flow.encode(images, y)
        log_prob = flow.log_prob(images, y)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({"z": z, "log_det": log_det, "log_prob": log_prob, "labels": y}, output)
    _say(f"z {list(z.shape)}, log_det, log_prob and labels of {len(z)} images in {output}")
    return 0


def _decode(options: Namespace) -> int:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    output = _output(options, ".png", "")
    flow, _ = load_flow(options.run, options.weights)
    try:
        content = load_file(options.file)
        z, y = content["z"], content["labels"]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{options.file} is not a file that encode wrote ({error})") from None
    if options.labels:
        y = _one_each(_labels(options.labels, _class_names(options.run, flow), flow), len(z))
    save_images(flow.decode(z, y), output)
    _say(f"{len(z)} images in {output}")
    return 0


def _interpolate(options: Namespace) -> int:
    output = _output(options, ".png")
    flow, images, y = _flow_and_images(options)
    if len(images) < 2:
        raise InputError(f"{len(images)} image has no other to go to; allowed are at least 2")
    x = interpolate(flow, images[:-1], images[1:], options.steps, y[:-1], y[1:])
    save_grid(x.flatten(0, 1), output, columns=options.steps)
    _say(f"{len(x)} walks of {options.steps} images in {output}")
    return 0


def _swap(options: Namespace) -> int:
    output = _output(options, ".png")
    flow, images, y = _flow_and_images(options)
    targets = _labels(options.to, _class_names(options.run, flow), flow)
    columns = [images, *(swap_class(flow, images, y, torch.full_like(y, k)) for k in targets)]
    save_grid(torch.stack(columns, dim=1).flatten(0, 1), output, columns=len(columns))
    _say(f"{len(images)} images as {len(targets)} classes in {output}")
    return 0


def _inpaint(options: Namespace) -> int:
    output = _output(options, ".png")
    if options.num < 1:
        raise InputError(f"--num {options.num} is not usable; allowed is a whole number of at least 1")
    flow, images, y = _flow_and_images(options)
    mask = _mask(options, flow)
    many = images.repeat_interleave(options.num, dim=0)
    generator = torch.Generator().manual_seed(options.seed)
    result = inpaint(flow, many, mask, y.repeat_interleave(options.num), options.steps, generator)
    drawn = result.x.view(len(images), options.num, *images.shape[1:])
    masked = torch.where(mask, torch.zeros_like(images), images)
    save_grid(torch.cat([images[:, None], masked[:, None], drawn], dim=1).flatten(0, 1), output, columns=options.num + 2)
    accepted = "" if not options.steps else f"; {100 * float(result.acceptance.mean()):.0f} % of the steps were accepted"
    _say(f"{len(many)} drawings in {output}{accepted}")
    return 0


def _classify(options: Namespace) -> int:
    flow, images = _flow_and_clean_images(options)
    names = _class_names(options.run, flow)
    scores = classify(flow, images, rule=options.rule, draws=options.draws)
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


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _flow_and_clean_images(options: Namespace) -> tuple[TarFlow, Tensor]:
    """The flow, and the image files as it wants them, `[B, C, H, W]` in [-1, 1]."""
    flow, _ = load_flow(options.run, options.weights)
    pixels = torch.stack([load_image(Path(file), flow.image_size, flow.channels) for file in options.images])
    return flow, from_levels(pixels)


def _flow_and_images(options: Namespace) -> tuple[TarFlow, Tensor, Tensor]:
    """The flow, the images, and their labels `[B]`: given, or the likeliest, or -1 for an unconditional flow."""
    flow, images = _flow_and_clean_images(options)
    if options.labels:
        y = _one_each(_labels(options.labels, _class_names(options.run, flow), flow), len(images))
    elif flow.num_classes:
        y = classify(flow, images, rule="exact").argmax(dim=1)
    else:
        y = torch.full((len(images),), -1)
    return flow, images, y


def _one_each(labels: list[int], images: int) -> Tensor:
    if len(labels) not in (1, images):
        raise InputError(f"{len(labels)} labels do not fit {images} images; allowed is one for all, or one for each")
    return torch.tensor(labels * (images if len(labels) == 1 else 1))


def _output(options: Namespace, *suffixes: str) -> Path:
    output = Path(options.output)
    if output.suffix.lower() not in suffixes:
        allowed = " or ".join(f"a {suffix} file" if suffix else "a folder" for suffix in suffixes)
        raise InputError(f"output {output} is not known; allowed is {allowed}")
    return output


def _mask(options: Namespace, flow: TarFlow) -> Tensor:
    """Where to draw, booleans `[1, 1, H, W]`."""
    size = flow.image_size
    if (options.mask is None) == (options.box is None):
        raise InputError("where to draw is not clear; allowed is either --mask or --box")
    if options.mask is not None:
        return (load_image(Path(options.mask), size, 1) > 127)[None]
    try:
        left, top, width, height = (int(word) for word in options.box.split(","))
    except ValueError:
        raise InputError(f"--box {options.box} is not a box; allowed are four numbers, LEFT,TOP,WIDTH,HEIGHT") from None
    if not (0 <= left < left + width <= size and 0 <= top < top + height <= size):
        raise InputError(f"--box {options.box} does not lie in the image; allowed is what lies within {size}x{size} pixels")
    mask = torch.zeros(1, 1, size, size, dtype=torch.bool)
    mask[..., top : top + height, left : left + width] = True
    return mask


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
