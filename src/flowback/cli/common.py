"""What the verbs share: the options that several of them take, and what these stand for."""

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import docstring_parser
import torch
from jsonargparse import Namespace
from torch import Tensor

from flowback.cli.parser import Parser
from flowback.core.console import console
from flowback.core.errors import InputError
from flowback.core.files import read_json
from flowback.data import as_images
from flowback.flow.io import find_folder
from flowback.latents import Flow
from flowback.runs.checkpoint import load_flow
from flowback.tasks.classify import classify

T = TypeVar("T")


def add_flow(command: Parser) -> None:
    """The options of every verb that needs a trained flow."""
    command.add_argument("run", type=str, help="a run's folder, a checkpoint, a folder or hub id of a flow")
    command.add_argument("--weights", type=str, default="ema", help="ema (averaged) or raw (of the last step)")


def add_options(command: Parser, config: type, *skip: str) -> None:
    """Options for the fields of a dataclass, with the types, defaults and descriptions of it; tuples have commas."""
    descriptions = {entry.arg_name: entry.description for entry in docstring_parser.parse(config.__doc__ or "").params}
    types = get_type_hints(config)
    for field in (field for field in fields(config) if field.name not in skip):
        kind, default, text = types[field.name], field.default, descriptions[field.name]
        if isinstance(default, tuple):
            kind, default, text = str, ",".join(map(str, default)), f"{text} With commas."
        command.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=default, help=text)


def read_options(options: Namespace, config: type[T], **given: Any) -> T:
    """The dataclass of the options that `add_options` added, and of the fields that are given.

    Raises:
        InputError: if a list is none, or the dataclass refuses a value.
    """
    types, values = get_type_hints(config), dict(given)
    for field in (field for field in fields(cast(Any, config)) if field.name not in given):
        value = options[field.name]
        if isinstance(field.default, tuple):
            kind = get_args(types[field.name])[0]
            words = value.split(",") if kind is str else number_list(value, field.name, kind) if value else ()
            value = tuple(words)
        values[field.name] = value
    return config(**values)


def number_list(text: str, name: str, kind: type[int] | type[float] = int) -> list[Any]:
    """Numbers with commas.

    Raises:
        InputError: if it is something else.
    """
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError as error:
        what = "whole numbers like 1,8,32" if kind is int else "numbers like 0,1,2"
        raise InputError(f"{name} must be {what}, got {text!r}") from error


def add_images(command: Parser) -> None:
    """The option of every verb that takes image files."""
    command.add_argument("images", type=str, nargs="+", help="image files")


def add_output(command: Parser, default: str | None, text: str) -> None:
    """The option of every verb that writes a file or a folder."""
    command.add_argument("-o", "--output", type=str, default=default, help=text)


def say(text: str) -> None:
    """Print one line."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def flow_and_clean_images(options: Namespace) -> tuple[Flow, Tensor]:
    """The flow, and the image files, `[B, C, H, W]`."""
    flow, _ = load_flow(options.run, options.weights, options.device)
    return flow, as_images(options.images, flow.image_size, flow.channels)


def flow_and_images(options: Namespace) -> tuple[Flow, Tensor, Tensor]:
    """The flow, the images, and their labels `[B]` (on the CPU): given, the likeliest, or -1 for none."""
    flow, images = flow_and_clean_images(options)
    if options.labels:
        y = one_each(chosen_labels(options.labels, class_names(options.run, flow), flow), len(images))
    elif flow.num_classes:
        y = classify(flow, images, rule="exact").argmax(dim=1)
    else:
        y = torch.full((len(images),), -1)
    return flow, images, y.cpu()


def one_each(labels: list[int], images: int) -> Tensor:
    """Labels `[images]` from one for all or one for each."""
    if len(labels) not in (1, images):
        raise InputError(f"{len(labels)} labels do not fit {images} images; expected one for all, or one for each")
    return torch.tensor(labels * (images if len(labels) == 1 else 1))


def checked_output(options: Namespace, *suffixes: str) -> Path:
    """`--output`, if it ends as one of `suffixes`; an empty one stands for a folder."""
    output = Path(options.output)
    if output.suffix.lower() not in suffixes:
        allowed = " or ".join(f"a {suffix} file" if suffix else "a folder" for suffix in suffixes)
        raise InputError(f"output {output} is not known; expected {allowed}")
    return output


def class_names(run: str, flow: Flow) -> list[str]:
    """The class names that training left in the run's folder, or that lie with a flow of the hub; or else the numbers."""
    file = find_folder(run) / "classes.json"
    try:
        names = read_json(file) if file.is_file() else []
    except ValueError as error:
        raise InputError(f"{file} cannot be read ({error}); expected a list of names, or no such file") from error
    known = isinstance(names, list) and len(names) == flow.num_classes
    return [str(name) for name in names] if known else [str(k) for k in range(flow.num_classes)]


def chosen_labels(text: str | None, names: list[str], flow: Flow) -> list[int]:
    """`--labels` as class numbers; all classes by default, -1 for an unconditional flow."""
    if not flow.num_classes and text is not None:
        raise InputError(f"labels {text} do not fit an unconditional flow; expected none")
    if text is None:
        return list(range(flow.num_classes)) or [-1]
    labels = []
    for word in (word.strip() for word in text.split(",")):
        if word in names:
            labels.append(names.index(word))
        elif word.isdecimal() and int(word) < flow.num_classes:
            labels.append(int(word))
        else:
            raise InputError(f"label must be one of 0 to {flow.num_classes - 1}, or {', '.join(names)}, got {word!r}")
    return labels
