"""What the tabs share: how images are shown, results are kept for download, and problems are said."""

import csv
import functools
import inspect
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from flowback.core.errors import InputError, plain
from flowback.core.units import from_levels, to_uint8
from flowback.data import load_image
from flowback.data.pictures import save_png
from flowback.latents import Flow
from flowback.studio.shelf import Shelf
from flowback.tasks.sampling import Request, as_pixels, draw_batches

SHOWN = 112  # pixels of a side, at least, in which an image is shown
MOST = 500  # files at once
PREVIEWS = 64  # images that are shown
KEPT_SECONDS = 3600  # that results are kept for download
UPLOAD = 20 * 2**20  # bytes of a file, at most
SERVED = "GRADIO_TEMP_DIR"  # in the environment: where Gradio keeps what was uploaded and what is shown
FORMULAS = tuple("=+-@")  # with which a spreadsheet begins one
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "flow", "concurrency_limit": 1}  # whatever computes shares one place

Row = list[str | float | int | None]


@dataclass
class Studio:
    """What a tab is built on.

    Args:
        shelf: the flows.
        local: whether only this machine reaches the page: then it may train.
        folder: where results wait for their download, until the studio ends.
    """

    shelf: Shelf
    local: bool = True
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="flowback-studio-")))

    def __enter__(self) -> "Studio":
        return self

    def __exit__(self, *_: Any) -> None:
        if os.environ.get(SERVED) == str(self.folder / "served"):
            del os.environ[SERVED]
        shutil.rmtree(self.folder, ignore_errors=True)

    def new_folder(self) -> Path:
        """A folder for the files of one result; those that are old go."""
        for old in self.folder.glob("result-*"):
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix="result-", dir=self.folder))


def tile(image: Tensor, least: int = SHOWN) -> Image.Image:
    """An image `[C, H, W]`, uint8 or in [-1, 1], as it is shown: enlarged to `least` pixels without smoothing."""
    pixels = image if image.dtype == torch.uint8 else to_uint8(torch.where(image.isfinite(), image, 0))
    pixels = pixels.cpu().expand(3, -1, -1) if len(pixels) == 1 else pixels.cpu()
    factor = max(1, math.ceil(least / min(pixels.shape[1:])))
    pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def shown(image: Tensor, folder: Path, least: int = SHOWN) -> str:
    """A file in the folder with an image as it is shown, for results that hold it again and again.

    Gradio writes an image anew whenever a result holds it, while a browser reads it; a file is copied once.
    """
    with tempfile.NamedTemporaryFile(suffix=".png", dir=folder, delete=False) as stream:
        tile(image, least).save(stream)
    return stream.name


def picture(**options: Any) -> gr.Image:
    """An image to upload, of which handlers get the path: nothing but `uploaded` opens it, which says what is wrong."""
    image = gr.Image(**options)
    image.preprocess = lambda payload: payload and payload.path  # pyright: ignore[reportAttributeAccessIssue]
    return image


def uploaded(file: str | None, flow: Flow) -> Tensor:
    """An uploaded file as the flow sees it: its center, resized, `[1, C, H, W]` in [-1, 1].

    Raises:
        InputError: if there is none, or it is no image.
    """
    if not file:
        raise InputError("there is no image yet; upload one, or use one of the flow")
    return from_levels(load_image(file, flow.image_size, flow.channels, Path(file).name)[None])


def some_files(files: Any) -> list[str]:
    """Uploaded files.

    Raises:
        InputError: if there are none, or too many.
    """
    files = list(files or [])
    if not 1 <= len(files) <= MOST:
        found = f"{len(files)}; take them in parts, or use the command" if files else "none; drop some above"
        raise InputError(f"there must be 1 to {MOST} files, got {found}")
    return files


def own_image(flow: Flow, seed: int, folder: Path) -> str:
    """A file with an image that the flow drew, to try things with; classes are cycled by the seed."""
    request = Request(num=1, labels=(seed % flow.num_classes if flow.num_classes else -1,), seed=seed)
    file = folder / f"drawn_{seed}.png"
    save_png(as_pixels(next(draw_batches(flow, request, [0])).x)[0], file)
    return str(file)


def problem(error: Exception) -> gr.Error:
    """What the page says of an error: its sentence, in which nothing is markup."""
    return gr.Error(escape(plain(str(error))), duration=None, title="This does not work", print_exception=False)


def says_problems(work: Callable[..., Any]) -> Callable[..., Any]:
    """A function, or a generator, whose InputErrors are said on the page."""

    @functools.wraps(work)
    def stepwise(*inputs: Any) -> Iterator[Any]:
        try:
            yield from work(*inputs)
        except InputError as error:
            raise problem(error) from error

    @functools.wraps(work)
    def whole(*inputs: Any) -> Any:
        try:
            return work(*inputs)
        except InputError as error:
            raise problem(error) from error

    return stepwise if inspect.isgeneratorfunction(work) else whole


def same() -> tuple[gr.Code, gr.Code]:
    """Where an action is shown as Python and as a command."""
    with gr.Accordion("The same in Python and on the command line", open=False):
        python = gr.Code(
            language="python", label="Python", interactive=False, wrap_lines=True, show_line_numbers=False, max_lines=20
        )
        shell = gr.Code(
            language="shell", label="command", interactive=False, wrap_lines=True, show_line_numbers=False, max_lines=20
        )
    return python, shell


def number(value: Any, name: str, least: float, most: float, whole: bool = False) -> Any:
    """A number from the page.

    Raises:
        InputError: if it is none, or out of bounds.
    """
    good = (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= most
    )
    if not good or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise InputError(f"{name} must be {kind} of {least:g} to {most:g}, got {value!r}")
    return int(value) if whole else float(value)


def class_numbers(chosen: list[str] | str | None, names: list[str]) -> list[int]:
    """Chosen classes as numbers; all if none was chosen, and none of an unconditional flow.

    Raises:
        InputError: if one is not the flow's.
    """
    words = [chosen] if isinstance(chosen, str) else list(chosen or [])
    unknown = [word for word in words if word not in names]
    if unknown:
        raise InputError(f"the flow has no class {unknown[0]!r}; choose again")
    return [names.index(word) for word in words] if words else list(range(len(names)))


def rounded(value: float) -> float | None:
    """A figure as a table shows it; none if it is not finite."""
    return round(value, 4) if math.isfinite(value) else None


def save_table(file: Path, titles: Sequence[str], rows: Sequence[Row]) -> str:
    """A table as a CSV file, in which nothing is a formula; returns its path."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([[_cell(value) for value in row] for row in (titles, *rows)])
    return str(file)


def _cell(value: str | float | int | None) -> str | float | int | None:
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(FORMULAS) else value
