"""`flowback export`."""

from pathlib import Path

from jsonargparse import Namespace

from flowback.cli.common import add_flow, say
from flowback.cli.parser import Verb
from flowback.core.errors import InputError
from flowback.flow.io import check_repo_id
from flowback.reports.card import export, push_folder


def add(verb: Verb) -> None:
    """Add this verb to the command line."""
    command = verb("export", _export)
    add_flow(command)
    command.add_argument("folder", type=str, help="where to write; new or empty")
    command.add_argument("--push", type=str, default=None, help="a repository on the hub to upload to, owner/name")
    command.add_argument("--private", type=bool, default=False, help="make that repository private")
    command.add_argument("--license", type=str, default=None, help="the hub's name of one, like apache-2.0 (default: none)")
    command.add_argument(
        "--with-autoencoder",
        type=bool,
        default=False,
        help="copy a latent flow's autoencoder even if it is on the hub",
    )


def _export(options: Namespace) -> int:
    folder = Path(options.folder)
    if options.push is not None:
        check_repo_id(options.push)
    elif options.private:
        raise InputError("--private is of a repository on the hub; use --private with --push owner/name")
    export(options.run, folder, options.weights, options.license, options.with_autoencoder, options.push)
    say(f"the flow and its model card are in {folder}")
    if options.push is not None:
        say(f"uploaded to {push_folder(folder, options.push, options.private)}")
    return 0
