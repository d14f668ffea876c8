"""What the verbs share: the options that several of them take, and what these stand for."""

import difflib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import torch
from jsonargparse import Namespace
from torch import Tensor

from flowback.cli.parser import Parser
from flowback.core.console import say
from flowback.core.errors import InputError
from flowback.core.files import check_place, names_folder, write_whole
from flowback.data import DataConfig, as_images
from flowback.latents import Flow
from flowback.runs.checkpoint import class_names
from flowback.runs.config import descriptions
from flowback.tasks.classify import likely_labels

T = TypeVar("T")
SHOWN = 5  # files that cannot be read and are named


def add_flow(command: Parser) -> None:
    """The options of every verb that needs a trained flow."""
    command.add_argument("run", type=str, help="a run's folder, a checkpoint, a folder or hub id of a flow")
    command.add_argument("--weights", type=str, default="ema", help="ema (averaged) or raw (of the last step)")


def add_options(command: Parser, config: type, *skip: str) -> None:
    """Options for the fields of a dataclass, with the types, defaults and descriptions of it; tuples have commas."""
    about, types = descriptions(config), get_type_hints(config)
    for field in (field for field in fields(config) if field.name not in skip):
        kind, default, text = types[field.name], field.default, about[field.name]
        if isinstance(default, tuple):
            kind, default, text = str, ",".join(map(str, default)), f"{text} With commas."
        command.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=default, help=text)


def add_data(command: Parser) -> None:
    """Options of `DataConfig` in place of the run's own, read by `given_data`."""
    types, texts = get_type_hints(DataConfig), descriptions(DataConfig)
    for name in (name for name in texts if name != "workers" and name in types):
        about = f"in place of the run's: {texts[name]}"
        command.add_argument(f"--data.{name}", type=types[name] | None, default=None, help=about)


def given_data(options: Namespace) -> dict[str, Any] | None:
    """The options of `add_data` that were given; None if none was."""
    return {name: value for name, value in vars(options.data).items() if value is not None} or None


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


def add_images(command: Parser, about: str = "image files") -> None:
    """The options of every verb that takes image files."""
    command.add_argument("images", type=str, nargs="+", help=about)
    command.add_argument("--batch-size", type=int, default=64, help="images at once; bounds the memory")


def check_counts(options: Namespace, *names: str) -> None:
    """Check options that count something, and may be None.

    Raises:
        InputError: if one is less than 1.
    """
    for name in names:
        value = options[name]
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be a whole number of at least 1, got {value}")


def refuse_unread(unread: Sequence[str]) -> None:
    """End a verb that did its work on all files but these.

    Args:
        unread: a sentence on each; the first ones are said.

    Raises:
        InputError: if there are any.
    """
    if unread:
        more = f"; {len(unread) - SHOWN} more cannot be read" if len(unread) > SHOWN else ""
        raise InputError("; ".join(unread[:SHOWN]) + more)


def add_output(command: Parser, default: str | None, text: str) -> None:
    """The option of every verb that writes a file or a folder."""
    command.add_argument("-o", "--output", type=str, default=default, help=text)


def labelled_batches(options: Namespace, flow: Flow, size: int, overlap: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The image files `[B, C, H, W]` and their labels `[B]` (given, the likeliest, or -1 for none), both on the CPU.

    All files are read once before the first batch is given: the last one may be damaged, and hours away.

    Args:
        options: with images and labels.
        flow: which the images are for.
        size: of a batch, at most.
        overlap: so many images begin the next batch again, beyond its size.

    Raises:
        InputError: if an image, label or size is not usable.
    """
    if size < 1:
        raise InputError(f"--batch-size must be at least 1, got {size}")
    files, given = options.images, None
    if options.labels:
        given = one_each(chosen_labels(options.labels, class_names(options.run, flow), flow), len(files))
    for file in files:
        as_images(file, flow.image_size, flow.channels)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, max(1, len(files) - overlap), size):
            part = slice(start, start + size + overlap)
            x = as_images(files[part], flow.image_size, flow.channels)
            yield x, likely_labels(flow, x) if given is None else given[part]

    return batches()


@contextmanager
def kept(output: Path, write: Callable[[Path, list[T]], Any]) -> Iterator[list[T]]:
    """A list of results, which `write` puts into the file `output` at the end; also what there is of them at an early end.

    Raises:
        OSError: if it cannot be written.
    """
    results: list[T] = []
    try:
        yield results
    except BaseException:
        if results:
            write_whole(output, lambda file: write(file, results))
            say(f"what was done before it ended is in {output}")
        raise
    write_whole(output, lambda file: write(file, results))


def one_each(labels: list[int], images: int) -> Tensor:
    """Labels `[images]` from one for all or one for each."""
    if len(labels) not in (1, images):
        raise InputError(f"{len(labels)} labels do not fit {images} images; expected one for all, or one for each")
    return torch.tensor(labels * (images if len(labels) == 1 else 1))


def checked_output(options: Namespace, *suffixes: str) -> Path:
    """`--output`, if it ends as one of `suffixes` and can be written; an empty one stands for a folder.

    Raises:
        InputError: if it is something else, is there as something else, or is one of the files that are read.
    """
    output, text = Path(options.output), options.output
    suffix = "" if names_folder(text) else output.suffix.lower()
    if not text or suffix not in suffixes or (suffix and output.is_dir()):
        allowed = " or ".join(f"a {suffix} file" if suffix else "a folder" for suffix in suffixes)
        found = f"{text or repr(text)}, which is a folder" if output.is_dir() and text else text or repr(text)
        raise InputError(f"output must be {allowed}, got {found}")
    read = [*(options.get("images") or ()), options.get("file"), options.get("mask")]
    for file in filter(None, read):
        if output.exists() and Path(file).exists() and output.samefile(file):
            raise InputError(f"output {output} is one of the files that are read; use another place")
    check_place(output)
    return output


def chosen_labels(text: str | None, names: list[str], flow: Flow) -> list[int]:
    """`--labels` as class numbers; all classes by default, -1 for an unconditional flow."""
    if not flow.num_classes and text is not None:
        raise InputError(f"labels {text} do not fit an unconditional flow; expected none")
    if text is None:
        return list(range(flow.num_classes)) or [-1]
    known, words, labels = {_form(name): k for k, name in reversed(list(enumerate(names)))}, text.split(","), []
    numbered = any(name.isdecimal() for name in names)  # then a number is a name
    while words:
        for length in range(len(words), 0, -1):  # names have commas, too: the longest one is meant
            name = ",".join(words[:length]).strip()
            if name in names or _form(name) in known:
                labels.append(names.index(name) if name in names else known[_form(name)])
                break
            if length == 1 and name.isdecimal() and name.isascii() and not numbered and int(name) < flow.num_classes:
                labels.append(int(name))
                break
        else:
            shown = [*names[:20], "…"] if len(names) > 20 else names
            near = difflib.get_close_matches(words[0].strip(), names, n=1)
            hint = f"; near it: {near[0]}" if near else ""
            numbers = "" if numbered else f"0 to {flow.num_classes - 1}, or "
            raise InputError(f"label must be one of {numbers}{', '.join(shown)}, got {words[0].strip()!r}{hint}")
        words = words[length:]
    return labels


def _form(name: str) -> str:
    """A name in the one of Unicode's forms that all its spellings share, without spaces at its ends."""
    return unicodedata.normalize("NFC", name).strip()
