"""`flowback export`."""

from pathlib import Path

from jsonargparse import Namespace

from flowback.cli.common import Verb, add_flow, say
from flowback.errors import InputError
from flowback.evaluation.card import check_repo_id, export, push_to_hub


def add(verb: Verb) -> None:
    """Add this verb to the command line."""
    command = verb(
        "export",
        _export,
        "Write a flow for others: a folder with a model card of all that its run knows. Pushes it to the Hugging Face hub "
        "if asked.",
    )
    add_flow(command)
    command.add_argument("folder", type=str, help="where to write; new or empty")
    command.add_argument("--push", type=str, default=None, help="a repository on the hub to upload to, owner/name")
    command.add_argument("--private", action="store_true", help="make that repository private")
    command.add_argument("--licence", type=str, default=None, help="the hub's name of one, like apache-2.0 (default: none)")
    command.add_argument(
        "--with-autoencoder", action="store_true", help="copy the autoencoder of a latent flow even if it is on the hub"
    )


def _export(options: Namespace) -> int:
    folder = Path(options.folder)
    if options.push is not None:
        check_repo_id(options.push)
    elif options.private:
        raise InputError("--private is of a repository on the hub; allowed is --private with --push owner/name")
    export(options.run, folder, options.weights, options.licence, options.with_autoencoder, options.push)
    say(f"the flow and its model card are in {folder}")
    if options.push is not None:
        say(f"uploaded to {push_to_hub(folder, options.push, options.private)}")
    return 0
