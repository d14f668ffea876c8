"""`flowback score`."""

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from jsonargparse import Namespace
from torch import Tensor

from flowback.cli.common import add_flow, add_images, check_counts, refuse_unread, say
from flowback.cli.parser import Verb
from flowback.core.errors import InputError
from flowback.core.files import check_place, typed_path, write_whole
from flowback.core.units import to_uint8
from flowback.data.folders import image_files
from flowback.data.pictures import save_grid, with_map
from flowback.runs.checkpoint import class_names, load_flow
from flowback.tasks.classify import read_files
from flowback.tasks.score import HeldOut, background_of, figures, score

SIDE = 128  # pixels of a picture, at least


def add(verb: Verb) -> None:
    """Add this verb to the command line."""
    command = verb("score", _score)
    add_flow(command)
    add_images(command, "image files, and folders of them")
    command.add_argument("--csv", type=str, default=None, help="a .csv file for a row of figures for each image")
    command.add_argument("--maps", type=str, default=None, help="a folder for a picture of each image: where it is unusual")
    command.add_argument(
        "--false-alarms", type=float, default=0.01, help="share of typical images that may be taken for outliers"
    )
    command.add_argument("--background", type=str, default=None, help="a flow whose density the ratio divides by")
    command.add_argument("--draws", type=int, default=None, help="draws of noise that are averaged (default: as evaluated)")


def _score(options: Namespace) -> int:
    check_counts(options, "batch_size", "draws")
    table, maps = (None if place is None else Path(place) for place in (options.csv, options.maps))
    if table is not None and table.suffix.lower() != ".csv":
        raise InputError(f"--csv must be a .csv file, got {table}")
    if maps is not None and maps.is_dir() and any(maps.iterdir()):
        raise InputError(f"--maps must be a new or empty folder, but {maps} holds other files")
    for place in filter(None, (table, maps)):
        check_place(place)
    for folder in filter(Path.is_dir, map(Path, options.images)):
        if maps is not None and maps.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--maps must be outside of the folders that are read, got {maps} in {folder}")
    flow, _ = load_flow(options.run, options.weights, options.device)
    if options.weights != "ema":
        flow.core.folder = None  # what is stored there is of the averaged weights
    background = load_flow(options.background, options.weights, options.device)[0] if options.background else None
    background_of(flow, background)
    held_out, names = HeldOut.load(flow), class_names(options.run, flow)
    if held_out is not None:
        held_out.check_false_alarms(options.false_alarms)
    elif maps is not None:
        raise InputError("--maps needs the densities of held-out images, which this flow lacks; run `flowback evaluate`")
    count = outliers = 0
    unread: list[str] = []
    with growing(table) as write:
        for files, x, wrong in read_files(flow, _files(options.images), options.batch_size):
            unread += wrong
            if not files:
                continue
            s = score(flow, x, background, held_out, options.draws, options.batch_size)
            rows = figures(flow, s, names, options.false_alarms)
            for number, (file, row) in enumerate(zip(files, rows, strict=True)):
                if maps is not None:
                    row["map"] = str(maps / f"{count + number:06d}.png")
                    _draw(x[number], s.anomaly[number], Path(row["map"]))
                if table is None:
                    say(f"{file}: {', '.join(f'{name} {_short(value)}' for name, value in row.items())}")
                write({"file": file} | row)
            count += len(files)
            outliers += sum(row.get("outlier", False) for row in rows)
    if not count and not unread:
        raise InputError(f"there is no image in {', '.join(options.images[:5])}")
    if held_out is None:
        say("no p-values: `flowback evaluate` stores the densities of held-out images that they need")
    else:
        share = f"of {len(held_out.log_prob)} held-out images {100 * options.false_alarms:.3g} % would be, too"
        say(f"{outliers} of {count} images are outliers; {share}")
    if table is not None and count:
        say(f"all in {table}")
    refuse_unread(unread)
    return 0


def _files(places: Iterable[str]) -> Iterator[str]:
    """Files as they are named, and the image files in folders."""
    for place in places:
        path = typed_path(place)
        yield from image_files(path) if Path(path).is_dir() else (place,)


@contextmanager
def growing(file: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What takes the rows of a table: `file` at the end, beside it until then; at an early end the rows that there are.

    Raises:
        OSError: if it cannot be written.
    """
    if file is None:
        yield lambda row: None
        return
    partial = file.with_name(f".partial-{uuid4().hex}-{file.name[-40:]}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        columns: list[str] = []

        def write(row: dict[str, Any]) -> None:
            columns.extend([] if columns else row)
            table = csv.DictWriter(stream, columns)
            if not stream.tell():
                table.writeheader()
            table.writerow(row)
            stream.flush()

        try:
            yield write
        except BaseException:
            if columns:
                partial.replace(file)
                say(f"what was done before it ended is in {file}")
            raise
        finally:
            if not columns:
                partial.unlink()
    if columns:
        partial.replace(file)


def _draw(x: Tensor, anomaly: Tensor, file: Path) -> None:
    """The image `[C, H, W]` beside itself under the map `[rows, columns]` of how unusual its places are."""
    both = torch.cat([to_uint8(x.cpu()).expand(3, -1, -1)[None], with_map(x[None], anomaly[None])])
    write_whole(file, lambda partial: save_grid(both, partial, columns=2, smallest=SIDE))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
