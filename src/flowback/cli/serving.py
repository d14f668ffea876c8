"""`flowback studio`."""

import signal
import threading
from pathlib import Path

from jsonargparse import Namespace

from flowback.cli.parser import Verb
from flowback.core.console import say
from flowback.core.devices import pick_device
from flowback.flow.io import shipped

DEFAULT = Path("runs")


def add(verb: Verb) -> None:
    """Add this verb to the command line."""
    command = verb("studio", _studio)
    command.add_argument(
        "runs",
        type=str,
        nargs="*",
        help="runs, folders of runs, folders or hub ids of flows (default: what is in runs, and the flows of the package)",
    )
    command.add_argument(
        "--port", type=int | None, default=None, help="of the page (default: the first free one from 7860)"
    )
    command.add_argument(
        "--host", type=str, default="127.0.0.1", help="127.0.0.1 for this machine alone; others need the password"
    )
    command.add_argument("--password", type=str | None, default=None, help="for others (default: one that is made up)")


def _studio(options: Namespace) -> int:
    from flowback.studio.app import is_loopback, serve
    from flowback.studio.common import Studio
    from flowback.studio.shelf import Shelf

    places = options.runs or [*([str(DEFAULT)] if DEFAULT.is_dir() else []), *shipped()]
    shelf, ended = Shelf(places, pick_device(options.device)), threading.Event()
    with Studio(shelf, is_loopback(options.host)) as studio:
        blocks = serve(studio, options.host, options.port, options.password)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
        blocks.close(verbose=False)
    say("the studio has ended")
    return 0
