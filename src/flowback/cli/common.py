"""What the verbs share: the parser, and the options that several of them take."""

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, Protocol

import docstring_parser
import torch
from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from torch import Tensor

from flowback.core.console import console
from flowback.core.errors import InputError
from flowback.core.files import read_json
from flowback.data import as_images
from flowback.flow.io import find_folder
from flowback.latents import Flow
from flowback.runs.checkpoint import load_flow
from flowback.tasks.classify import classify


class Parser(ArgumentParser):
    """An argument parser whose errors are one line and exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Print the message in one line and exit with status 2."""
        fail(message)

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a configuration file.

        Raises:
            InputError: if it is not text, or empties a section.
        """
        try:
            found = super().parse_path(cfg_path, *args, **kwargs)
        except UnicodeDecodeError:
            raise InputError(f"{cfg_path} is not text in UTF-8; allowed is a recipe, or the config.yaml of a run") from None
        for name, value in vars(found).items():
            if value is None and any(action.dest.startswith(f"{name}.") for action in self._actions):
                raise InputError(f"{cfg_path} has {name} without options; allowed are some, or to leave {name} out")
        return found


def fail(message: str) -> NoReturn:
    """Print one clear line and exit with status 2."""
    print(f"flowback: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


class Verb(Protocol):
    """Adds a verb: its name, the function that runs it and returns the exit status, and its help text."""

    def __call__(self, name: str, run: Callable[[Namespace], int], text: str) -> Parser:
        """Returns the verb's own parser, for its options."""
        ...


def add_flow(command: Parser) -> None:
    """The options of every verb that needs a trained flow."""
    command.add_argument("run", type=str, help="a run's folder, a checkpoint, a folder or hub id of a flow")
    command.add_argument("--weights", type=str, default="ema", help="ema (averaged) or raw (of the last step)")


def add_options(command: Parser, config: type, *skip: str) -> None:
    """The fields of a dataclass as options, with the types, defaults and descriptions that stand there."""
    descriptions = {each.arg_name: each.description for each in docstring_parser.parse(config.__doc__ or "").params}
    for field in (field for field in fields(config) if field.name not in skip):
        kind: dict[str, Any] = (
            {"action": ActionYesNo(no_prefix="no-"), "nargs": "?"} if field.type is bool else {"type": field.type}
        )
        name = f"--{field.name.replace('_', '-')}"
        command.add_argument(name, default=field.default, help=descriptions[field.name], **kind)


def add_images(command: Parser) -> None:
    """The options of every verb that takes image files."""
    command.add_argument("images", type=str, nargs="+", help="image files")
    command.add_argument("--labels", type=str, default=None, help="their classes (default: as the flow classifies them)")


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
        raise InputError(f"{len(labels)} labels do not fit {images} images; allowed is one for all, or one for each")
    return torch.tensor(labels * (images if len(labels) == 1 else 1))


def checked_output(options: Namespace, *suffixes: str) -> Path:
    """`--output`, if it ends as one of `suffixes`; an empty one stands for a folder."""
    output = Path(options.output)
    if output.suffix.lower() not in suffixes:
        allowed = " or ".join(f"a {suffix} file" if suffix else "a folder" for suffix in suffixes)
        raise InputError(f"output {output} is not known; allowed is {allowed}")
    return output


def class_names(run: str, flow: Flow) -> list[str]:
    """The class names that training left in the run's folder, or that lie with a flow of the hub; or else the numbers."""
    file = find_folder(run) / "classes.json"
    try:
        names = read_json(file) if file.is_file() else []
    except ValueError as error:
        raise InputError(f"{file} cannot be read ({error}); allowed is a list of names, or no such file") from None
    known = isinstance(names, list) and len(names) == flow.num_classes
    return [str(name) for name in names] if known else [str(k) for k in range(flow.num_classes)]


def chosen_labels(text: str | None, names: list[str], flow: Flow) -> list[int]:
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
