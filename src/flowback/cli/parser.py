"""The parser of every verb: errors in one line, switches, recipes in UTF-8."""

from collections.abc import Callable, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NoReturn, Protocol

from jsonargparse import ArgumentParser, Namespace

from flowback.cli import GROUPS, fail
from flowback.core.errors import InputError
from flowback.core.files import typed_path

Run = Callable[[Namespace], int]


class Parser(ArgumentParser):
    """An argument parser whose errors are one line and exit status 2, and whose options of type bool are switches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, print_config=None, **kwargs)

    def add_recipe(self, what: str) -> None:
        """Add `--config`, a file of options, and `--print_config`, which prints them as such a file."""
        self.add_argument("--config", action="config", help=what)
        self.add_argument(
            "--print_config",
            type=bool,
            default=False,
            help="print the configuration that comes of all options, as a file for --config, and do nothing else",
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Print the message in one line and exit with status 2."""
        fail(message)

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any) -> Namespace:
        """Parse words. A bare switch, such as `--compile`, means true; `--compile false` and `--no-compile` mean false.

        A recipe comes before all options, wherever it stands: they change it. It is a file, or one of the package.
        """
        words: list[str] = []
        for word in map(_typed, _recipe_first(list(args or ()))):
            if words and words[-1] in self._switches and word in ("true", "false"):
                words[-1] += f"={word}"
            else:
                words.append(f"--{word[5:]}=false" if f"--{word[5:]}" in self._switches and word[:5] == "--no-" else word)
        if "--config" in self._option_string_actions:
            from flowback.runs.config import recipe_file

            words = [f"--config={recipe_file(w[9:])}" if w.startswith("--config=") else w for w in words]
        return super().parse_args([f"{w}=true" if w in self._switches else w for w in words], *others, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help, in which the value of a switch is optional."""
        for action in filter(_is_bool, self._actions):
            action.metavar = "[true|false]"
        return super().format_help(*args, **kwargs)

    @property
    def _switches(self) -> set[str]:
        return {name for action in self._actions if _is_bool(action) for name in action.option_strings}

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a configuration file in UTF-8.

        Raises:
            InputError: if it is not text, or a section in it has no options.
        """
        from flowback.runs.config import is_of_run

        path = Path(typed_path(str(path)))
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not text in UTF-8; expected a recipe, or the config.yaml of a run") from error
        found = self.parse_string(text, str(path), *args, **kwargs)
        if is_of_run(path):
            found["run"] = str(path.parent)  # wherever it was moved
        for name, value in vars(found).items():
            if value is None and any(action.dest.startswith(f"{name}.") for action in self._actions):
                raise InputError(f"{path} has {name} without options; give some, or leave {name} out")
        return found


def _recipe_first(words: list[str]) -> list[str]:
    verb = list(takewhile(lambda word: not word.startswith("-"), words[: 2 if words[:1] and words[0] in GROUPS else 1]))
    recipes, others, rest = [], [], iter(words[len(verb) :])
    for word in rest:
        if word == "--config":
            recipes += [f"{word}={path}" for path in islice(rest, 1)] or [word]
        else:
            (recipes if word.startswith("--config=") else others).append(word)
    return [*verb, *recipes, *others]


class Verb(Protocol):
    """Adds a verb: its name, and the function that runs it and returns the exit status."""

    def __call__(self, name: str, run: Run) -> Parser:
        """Returns the verb's own parser, for its options."""
        ...


def _typed(word: str) -> str:
    """A word whose path is as on disk: shells know no ~ after an equals sign, and leave Unicode's forms as they are."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + typed_path(value)


def _is_bool(action: Any) -> bool:
    return getattr(action, "_typehint", None) in (bool, bool | None)
