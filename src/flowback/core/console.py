"""What is said on the terminal: lines, and the progress of long work."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()


class _OrNowhere:
    """Standard output that may go away: what cannot be written is dropped, and so is all that follows."""

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(sys.stdout, "rich_proxied_file", sys.stdout), name)

    def write(self, text: str) -> int:
        """Write, or not."""
        self._try(self.__getattr__("write"), text)
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        self._try(self.__getattr__("flush"))

    def _try(self, action: Callable[..., Any], *given: str) -> None:
        try:
            action(*given)
        except (ValueError, RuntimeError):  # it is closed, or a signal came while it was written to
            pass
        except OSError:
            with suppress(OSError, ValueError, AttributeError):  # a stream without a number
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.__getattr__("fileno")())


@contextmanager
def said_if_possible() -> Iterator[None]:
    """Meanwhile nothing ends because nobody listens: a closed terminal or pipe, a full disk under a log."""
    settings = cast(Any, console)
    before, settings.file = settings._file, _OrNowhere()
    try:
        yield
    finally:
        settings.file = before


class Bar:
    """A progress bar on a terminal; elsewhere a line now and then."""

    def __init__(
        self, title: str, total: int, done: int = 0, seconds_between_lines: float = 20, shown: bool = True
    ) -> None:
        self.title, self.total, self.first, self.between = title, total, done, seconds_between_lines
        self.started = self.printed = time.monotonic()
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        ]
        columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
        self.shown = shown
        self.progress = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
        self.task = self.progress.add_task(title, total=total, completed=done, text="")

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
            console.print(f"{self.title} {done}/{self.total}  {text}  {left:.0f} s left", highlight=False, soft_wrap=True)
