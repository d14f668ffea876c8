"""The command line: one thin command per verb, those of a kind in one module."""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from jsonargparse import Namespace

from flowback import __version__
from flowback.cli import editing, importing, measuring, publishing, sampling, training
from flowback.cli.common import Parser, fail
from flowback.core.errors import InputError
from flowback.runs.config import AlignmentConfig, TrainConfig
from flowback.training.parallel import PeerLost

SWITCHES = tuple(
    f"--{section}.{field.name}"
    for section, config in (("train", TrainConfig), ("alignment", AlignmentConfig))
    for field in fields(config)
    if field.type is bool
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 130 after an interruption; bad input exits with 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes that no encoding has
    parser, commands = build_parser()
    words = _with_switches(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parser.parse_args(words)
        command, run = commands[options.command]
        return run(command.instantiate(options[options.command]))
    except InputError as error:
        fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename} cannot be used ({error.strerror})")
    except PeerLost as error:
        print(f"flowback: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        fail("there is not enough memory for this; allowed are sizes and counts that fit it")
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
        command.add_argument(
            "--device",
            type=str,
            default="auto",
            help="where to run: auto (an accelerator, if there is one), cpu, cuda:1, …",
        )
        verbs.add_subcommand(name, command, help=text.split(". ")[0])
        commands[name] = (command, run)
        return command

    for module in (training, sampling, editing, measuring, importing, publishing):
        module.add(verb)
    return parser, commands


def _with_switches(words: Sequence[str]) -> list[str]:
    """A bare switch, such as `--train.resume`, means true."""
    following = (*words, "-")[1:]
    return [
        f"{word}=true" if word in SWITCHES and after.startswith("-") else word
        for word, after in zip(words, following, strict=True)
    ]
