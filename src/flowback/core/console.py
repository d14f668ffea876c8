"""What is said on the terminal: lines, commands that can be pasted, and the progress of long work."""

import os
import shlex
import sys
import time
from contextlib import suppress
from pathlib import PurePath
from types import TracebackType
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowback.core.errors import plain


class Output:
    """Standard output, whichever it is at the moment.

    What it does not take, since the disk is full or the reader is gone, ends no work: it is dropped, and `lost` says why.
    """

    lost: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Print, if that is possible."""
        self._do("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        self._do("flush")

    def _do(self, action: str, *arguments: Any) -> None:
        try:
            if self._stream is not None:
                getattr(self._stream, action)(*arguments)
        except RuntimeError:  # a signal came while it was written to
            pass
        except (OSError, ValueError) as error:  # it is full, gone or closed
            self.lost = self.lost or error
            # what is left in its buffer would fail once more as the process ends
            with suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())

    @property
    def _stream(self) -> Any:
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


output = Output()
console = Console(file=cast(Any, output), emoji=False)


def say(text: str) -> None:
    """Print one line as it is: brackets are no markup, and :dog: is no picture."""
    console.print(plain(text), highlight=False, soft_wrap=True, markup=False)


def command(*words: str | PurePath) -> str:
    """A command that can be pasted into a shell, whatever its paths are called.

    >>> command("flowback", "sample", PurePath("-my [run]"))
    "flowback sample './-my [run]'"
    """
    return " ".join(_quoted(f".{os.sep}{w}" if isinstance(w, PurePath) and str(w)[0] == "-" else str(w)) for w in words)


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    inside = (chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{''.join(inside)}'"  # of bash, zsh and ksh


class Bar:
    """A progress bar on a terminal; elsewhere a line now and then."""

    def __init__(
        self, title: str, total: int, done: int = 0, seconds_between_lines: float = 20, shown: bool = True
    ) -> None:
        self.title, self.total, self.first, self.between = title, total, done, seconds_between_lines
        self.started = self.printed = time.monotonic()
        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        ]
        columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
        self.shown = shown
        self.progress = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
        self.task = self.progress.add_task(plain(title), total=total, completed=done, text="")

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()

    def update(self, done: int, text: str = "") -> None:
        """Show that `done` of the total is done, and `text` beside it."""
        self.progress.update(self.task, completed=done, text=text)
        now = time.monotonic()
        if self.shown and not console.is_terminal and (now - self.printed > self.between or done == self.total):
            self.printed = now
            left = (now - self.started) / max(1, done - self.first) * (self.total - done)
            say(f"{self.title} {done}/{self.total}  {text}  {left:.0f} s left")
