"""The tab in which one's own images are edited: painted anew, mixed, made another class, and moved through z by hand."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from flowback.core.errors import InputError
from flowback.core.files import save_tensors
from flowback.core.units import to_uint8
from flowback.data.images import decode
from flowback.data.pictures import save_grid, save_png
from flowback.latents import Flow, as_data
from flowback.studio.common import (
    ONE_AT_A_TIME,
    Studio,
    class_numbers,
    number,
    own_image,
    picture,
    same,
    says_problems,
    shown,
    uploaded,
)
from flowback.studio.draw import SEEDS
from flowback.studio.shelf import python_of, shell, words_of
from flowback.tasks.classify import likely_labels
from flowback.tasks.editing import Inpainting, beside, box_mask, inpaint_by_step, swap_class, turned, walk
from flowback.tasks.sampling import as_pixels, finished, noise, shown_classes

NAME = "Edit"
AUTO = "as the flow classifies it"
CANVAS = 320  # pixels of a side, at least, on which one paints
PAINTED = 0.25  # share of a pixel that is painted, from which on it is drawn anew
EVERY = 10  # steps of inpainting between two looks at it
DIRECTIONS = 4  # of z, a slider each
STARTS = ("the image", "fresh noise")


# ---- what the controls mean ------------------------------------------------------------------------------------------


def painting(**options: Any) -> gr.ImageEditor:
    """An image to paint on, of which handlers get layers as bytes or paths: nothing but `mask_of` opens them."""

    def as_it_came(file: Any, flatten_on_white: bool = False) -> Any:
        return getattr(file, "path", file)

    editor = gr.ImageEditor(**options)
    editor.convert_and_format_image = as_it_came
    return editor


def mask_of(painted: dict[str, Any] | None, box: str | None, flow: Flow) -> Tensor:
    """Where to draw, `[1, 1, H, W]`: in a box, or else the pixels of which enough is painted.

    Args:
        painted: what a `painting` gives; a layer is as large as its canvas, which shows the whole image.
        box: LEFT,TOP,WIDTH,HEIGHT in the flow's pixels, or nothing.
        flow: whose pixels they are.

    Raises:
        InputError: if that is nowhere, or not usable.
    """
    if box and box.strip():
        return box_mask(box.strip()[:100], *flow.image_size)
    mask = torch.zeros(1, 1, *flow.image_size, dtype=torch.bool)
    for layer in (painted or {}).get("layers") or ():
        alpha = decode(layer, "RGB", name="that was painted").image.convert("RGBA").getchannel("A")
        share = adaptive_avg_pool2d(torch.from_numpy(np.array(alpha))[None, None].float() / 255, flow.image_size)
        mask |= share >= PAINTED
    if not mask.any():
        raise InputError("nothing is painted; paint over what is to be drawn anew, or give a box")
    return mask


def labels_of(flow: Flow, x: Tensor, words: Sequence[Any], names: Sequence[str]) -> Tensor:
    """Labels `[B]` of images: of the chosen classes, or what the flow takes the images for.

    Raises:
        InputError: if a class is not the flow's.
    """
    given = [None if word in (None, AUTO) else class_numbers(word, list(names))[0] for word in words]
    likely = likely_labels(flow, x).tolist() if None in given or not flow.num_classes else given
    return torch.tensor([own if label is None else label for own, label in zip(likely, given, strict=True)])


@dataclass(frozen=True)
class Start:
    """Where a walk through z begins."""

    flow: str
    z: Tensor  # [1, N, D]
    y: Tensor  # [1]
    seed: int
    x: Tensor | None  # [1, C, H, W], which z is the code of; None for fresh noise, of whose image the noise is removed


@torch.no_grad()
def moved(flow: Flow, start: Start, angles: Sequence[float], length: float) -> tuple[Tensor, Tensor]:
    """The image `[1, C, H, W]` at angles, degrees, from the start of a walk, and its z `[1, N, D]`; on the CPU."""
    z = turned(start.z[0], [math.radians(angle) for angle in angles], start.seed, length)[None]
    x = flow.core.decode(z, start.y)
    return finished(flow, x, start.y, None if start.x is None else False), z.cpu()


# ---- the same in Python and on the command line ----------------------------------------------------------------------


def _python(place: str, y: Sequence[int], imports: str, lines: str, files: Sequence[str] = ("image.png",)) -> str:
    read = "from flowback.data import as_images\n" if files else ""
    loaded = f"x = as_images({list(files)!r}, flow.image_size, flow.channels)\n" if files else ""
    return f"import torch\n\n{read}{imports}{python_of(place)}\n{loaded}y = torch.tensor({list(y)!r})\n{lines}"


def _labels(y: Sequence[int], names: Sequence[str]) -> list[str]:
    return [f"--labels={words_of(y, names)}"] if names else []


def inpaint_texts(
    place: str, y: Sequence[int], names: Sequence[str], num: int, steps: int, tries: int, seed: int
) -> tuple[str, str]:
    """Inpainting of image.png where mask.png is bright."""
    imports = "from flowback.data import load_image\nfrom flowback.tasks.editing import inpaint\n"
    lines = f"x, y = x.repeat_interleave({num}, 0), y.repeat_interleave({num})\n"
    lines += 'mask = load_image("mask.png", flow.image_size, 1) > 127\n'
    lines += f"generator = torch.Generator().manual_seed({seed})\n"
    lines += f"images = inpaint(flow, x, mask, y, steps={steps}, tries={tries}, generator=generator).x"
    options = [f"--num={num}", f"--steps={steps}", f"--tries={tries}", f"--seed={seed}", "-o", "inpainted.png"]
    words = ["image.png", "--mask=mask.png", *_labels(y, names), *options]
    return _python(place, y, imports, lines), shell("inpaint", place, *words)


def interpolate_texts(place: str, y: Sequence[int], names: Sequence[str], steps: int) -> tuple[str, str]:
    """The walk from image.png to other.png."""
    files = ("image.png", "other.png")
    imports = "from flowback.tasks.editing import interpolate\n"
    lines = f"images = interpolate(flow, x[:1], x[1:], {steps}, y[:1], y[1:])[0]"
    words = [*files, *_labels(y, names), f"--steps={steps}", "-o", "interpolation.png"]
    return _python(place, y, imports, lines, files), shell("interpolate", place, *words)


def swap_texts(place: str, y: Sequence[int], names: Sequence[str], targets: Sequence[int]) -> tuple[str, str]:
    """Other classes for image.png."""
    imports = "from flowback.tasks.editing import swap_class\n"
    lines = f"images = torch.cat([swap_class(flow, x, y, k) for k in {list(targets)}])"
    words = ["image.png", *_labels(y, names), f"--to={words_of(targets, names)}", "-o", "swapped.png"]
    return _python(place, y, imports, lines), shell("swap", place, *words)


def walk_texts(place: str, start: Start, angles: Sequence[float], length: float) -> tuple[str, str]:
    """A place on a walk through z, which begins at image.png or at fresh noise."""
    imports = "from flowback.tasks.editing import turned\n"
    end = f"z = turned(z[0], torch.tensor({list(angles)}).deg2rad().tolist(), seed={start.seed}, length={length})[None]\n"
    if start.x is None:
        imports += "from flowback.tasks.sampling import finished, noise\n"
        lines = f"z = flow.core.to_prior(flow.core.enter(noise(flow.core, {start.seed}, 0)))\n"
        end += "image = finished(flow, flow.core.decode(z, y), y)"
    else:
        lines = "z = flow.encode(x, y)[0]\n"
        end += "image = flow.decode(z, y)"
    python = _python(place, start.y.tolist(), imports, lines + end, () if start.x is None else ("image.png",))
    kept = ", where the noise of training is left" if start.x is None else ""
    command = shell("decode", place, "z.safetensors", "-o", "decoded.png")
    return python, f"# no command walks through z; this one makes an image of z.safetensors{kept}\n{command}"


# ---- the page --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Where an edit shows what it made."""

    said: gr.HTML
    images: gr.Gallery
    files: gr.File
    python: gr.Code
    command: gr.Code

    @classmethod
    def build(cls) -> "Results":
        """Add them to the page."""
        said = gr.HTML("", elem_classes="said")
        images = gr.Gallery(
            label="Results", columns=6, object_fit="contain", height="auto", format="png", buttons=["fullscreen"]
        )
        files = gr.File(label="Download", file_count="multiple", interactive=False, visible=False)
        return cls(said, images, files, *same())

    def __iter__(self) -> Iterator[Any]:
        return iter(vars(self).values())

    def begin(self, text: str, texts: tuple[str, str]) -> dict[Any, Any]:
        """Before any image is there."""
        return {self.said: text, self.images: [], self.files: gr.File(visible=False), **self.same(texts)}

    def same(self, texts: tuple[str, str]) -> dict[Any, Any]:
        """The same in Python and as a command."""
        return {self.python: texts[0], self.command: texts[1]}

    def show(self, text: str, images: Sequence[tuple[str, str]]) -> dict[Any, Any]:
        """Files of images, with captions."""
        return {self.said: text, self.images: list(images)}

    def keep(self, files: list[str]) -> dict[Any, Any]:
        """Files to download."""
        return {self.files: gr.File(files, visible=True)}


def save(folder: Path, grid: str, images: Tensor, **single: Tensor) -> list[str]:
    """A row of images `[B, C, H, W]`, and single ones `[C, H, W]` by name, in [-1, 1] or uint8, as PNG files."""
    save_grid(images, folder / grid, len(images))
    for name, image in single.items():
        save_png(image if image.dtype == torch.uint8 else to_uint8(image), folder / f"{name}.png")
    return [str(file) for file in sorted(folder.iterdir())]


def _run_buttons(text: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(text, variant="primary", min_width=100), gr.Button("Stop", min_width=80)


@dataclass(frozen=True)
class Source:
    """An image to edit, and its class."""

    file: gr.Image
    label: gr.Dropdown

    @classmethod
    def build(cls, studio: Studio, chosen: gr.Dropdown, title: str, seed: int) -> "Source":
        """Add the controls to the page."""
        shelf = studio.shelf

        def classes(name: str) -> gr.Dropdown:
            names = shelf.classes(name)
            return gr.Dropdown([AUTO, *names], value=AUTO, label=f"Class of {title.lower()}", visible=bool(names))

        @says_problems
        def own(name: str, number_: Any) -> str:
            key = number(number_, "the seed", 0, SEEDS, whole=True)
            return own_image(shelf.flow(name), key, studio.new_folder())

        file = picture(
            label=title,
            sources=["upload", "clipboard"],
            height=220,
            elem_classes="pixels",
            format="png",
            buttons=["fullscreen"],
        )
        with gr.Row():
            key = gr.Number(seed, precision=0, minimum=0, maximum=SEEDS, label="Seed", min_width=80)
            draw = gr.Button("Use an image of the flow", size="sm", min_width=140)
        label = classes(chosen.value)
        draw.click(own, [chosen, key], file, **ONE_AT_A_TIME)
        chosen.change(says_problems(classes), chosen, label)
        return cls(file, label)


def build(studio: Studio, chosen: gr.Dropdown) -> None:
    """Add the tab to the page."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            source = Source.build(studio, chosen, "The image", 0)
        with gr.Column(scale=3, min_width=300), gr.Tabs():
            for title, section in SECTIONS.items():
                with gr.Tab(title):
                    section(studio, chosen, source)


def _inpaint(studio: Studio, chosen: gr.Dropdown, source: Source) -> None:
    shelf = studio.shelf
    canvas = painting(
        label="Paint what to draw anew",
        sources=[],
        transforms=[],
        layers=False,
        brush=gr.Brush(default_size=24, colors=["#e6007e"], color_mode="fixed"),
        type="filepath",
        format="png",
        elem_classes="pixels",
    )
    box = gr.Textbox(
        label="Or a box, in pixels of the flow", placeholder="left,top,width,height", max_lines=1, max_length=100
    )
    with gr.Row():
        num = gr.Slider(1, 16, 4, step=1, label="Drawings", min_width=140)
        steps = gr.Slider(0, 500, 100, step=10, label="Steps", info="of Langevin dynamics", min_width=140)
        tries = gr.Slider(1, 32, 8, step=1, label="Tries", info="first guesses", min_width=140)
        seed = gr.Number(0, precision=0, minimum=0, maximum=SEEDS, label="Seed", min_width=100)
    go, stop = _run_buttons("Draw anew")
    out = Results.build()

    @says_problems
    def show(name: str, file: str | None) -> Any:
        return file and shown(uploaded(file, shelf.flow(name))[0], studio.new_folder(), CANVAS)

    @says_problems
    def run(name: str, file: Any, label: Any, painted: Any, box: Any, *values: Any) -> Iterator[dict[Any, Any]]:
        flow, names = shelf.flow(name), shelf.classes(name)
        x, mask = uploaded(file, flow), mask_of(painted, box, flow)
        bounds = (("drawings", 1, 16), ("steps", 0, 500), ("tries", 1, 32), ("the seed", 0, SEEDS))
        n, most, guesses, key = (number(v, *bound, whole=True) for v, bound in zip(values, bounds, strict=True))
        y = labels_of(flow, x, [label], names)
        texts = inpaint_texts(shelf.place(name), y.tolist(), names, n, most, guesses, key)
        yield out.begin(f"drawing {n} times with seed {key} …", texts)
        captions = ["as given", "known", *(f"#{i}" for i in range(n))]
        images, accepted, tiles = x, "", studio.new_folder()
        for i, part in enumerate(drawings(flow, x, mask, y, n, most, guesses, key), start=1):
            images = beside(x, mask, part.x.cpu())[0]
            items = [(shown(image, tiles), caption) for image, caption in zip(images, captions, strict=True)]
            yield out.show(f"step {min(i * EVERY, most)} of {most} …", items)
            accepted = f"; {100 * float(part.acceptance.mean()):.0f} % of the steps were accepted" if most else ""
        files = save(studio.new_folder(), "inpainted.png", images, image=x[0], mask=255 * mask[0].byte())
        yield {out.said: f"{n} drawings, seed {key}{_as_class(y, names)}{accepted}", **out.keep(files)}

    gr.on([source.file.change, chosen.change], show, [chosen, source.file], canvas)
    values = [chosen, source.file, source.label, canvas, box, num, steps, tries, seed]
    running = go.click(run, values, list(out), **ONE_AT_A_TIME)
    stop.click(lambda: "stopped", None, out.said, cancels=[running], queue=False)


def drawings(
    flow: Flow, x: Tensor, mask: Tensor, y: Tensor, num: int, steps: int, tries: int, seed: int
) -> Iterator[Inpainting]:
    """`num` drawings of an image `[1, C, H, W]`, every `EVERY` steps and at the end."""
    many, generator = x.repeat_interleave(num, 0), torch.Generator().manual_seed(seed)
    return inpaint_by_step(flow, many, mask, y.repeat_interleave(num), steps, tries, generator, EVERY)


def _interpolate(studio: Studio, chosen: gr.Dropdown, source: Source) -> None:
    shelf, way = studio.shelf, gr.State(None, time_to_live=3600)
    with gr.Row(equal_height=False):
        with gr.Column(min_width=260):
            other = Source.build(studio, chosen, "The other image", 1)
            steps = gr.Slider(2, 32, 16, step=1, label="Images on the way", info="ends included")
            go, stop = _run_buttons("Go from one to the other")
        with gr.Column(min_width=260):
            there = gr.Image(
                label="On the way",
                interactive=False,
                format="png",
                height=300,
                elem_classes="pixels",
                buttons=["fullscreen"],
                alt_text="on the way",
            )
            place = gr.Slider(0, 100, 50, step=1, label="Place on the way (%)")
    out = Results.build()

    @says_problems
    def run(name: str, file: Any, label: Any, file_b: Any, label_b: Any, steps: Any, at: Any) -> Iterator[dict[Any, Any]]:
        flow, names = shelf.flow(name), shelf.classes(name)
        x = torch.cat([uploaded(file, flow), uploaded(file_b, flow)])
        n, y = number(steps, "images on the way", 2, 32, whole=True), labels_of(flow, x, [label, label_b], names)
        yield out.begin(f"{n} images …", interpolate_texts(shelf.place(name), y.tolist(), names, n)) | {way: None}
        images, items, tiles, data = [], [], studio.new_folder(), as_data(flow, x)
        for i, image in enumerate(walk(flow, data[:1], data[1:], n, y[:1], y[1:])):
            images.append(to_uint8(image[0]).cpu())
            items.append((shown(images[-1], tiles), f"{100 * i / (n - 1):.0f} %"))
            yield out.show(f"{i + 1} of {n} images …", items)
        files = save(studio.new_folder(), "interpolation.png", torch.stack(images), image=x[0], other=x[1])
        strip = [file for file, _ in items]
        yield {out.said: f"{n} images{_as_class(y, names)}", way: strip, there: show(strip, at), **out.keep(files)}

    @says_problems
    def show(strip: list[str] | None, at: Any) -> str | None:
        return nearest(strip, at) if strip else None

    values = [chosen, source.file, source.label, other.file, other.label, steps, place]
    running = go.click(run, values, [*out, way, there], **ONE_AT_A_TIME)
    stop.click(lambda: "stopped", None, out.said, cancels=[running], queue=False)
    place.change(show, [way, place], there, show_progress="hidden", queue=False)


def nearest(strip: list[str], at: Any) -> str | None:
    """Of the images of a walk, the one nearest to a place, per cent; None if it is gone, as results go after an hour."""
    file = strip[round(number(at, "the place", 0, 100) / 100 * (len(strip) - 1))]
    return file if Path(file).is_file() else None


def _swap(studio: Studio, chosen: gr.Dropdown, source: Source) -> None:
    shelf = studio.shelf

    def classes(name: str) -> gr.Dropdown:
        names = shelf.classes(name)
        told = "none chosen: all, or 20 of them" if names else "this flow is unconditional: it knows no classes"
        return gr.Dropdown(names, value=[], multiselect=True, label="Classes to change to", info=told)

    to = classes(chosen.value)
    go, stop = _run_buttons("Change the class")
    out = Results.build()

    @says_problems
    def run(name: str, file: Any, label: Any, chosen_classes: Any) -> Iterator[dict[Any, Any]]:
        flow, names = shelf.flow(name), shelf.classes(name)
        if not names:
            raise InputError("this flow is unconditional: it has no classes to change")
        x = uploaded(file, flow)
        targets = class_numbers(chosen_classes, names) if chosen_classes else shown_classes(flow)
        y = labels_of(flow, x, [label], names)
        yield out.begin("…", swap_texts(shelf.place(name), y.tolist(), names, targets))
        images, tiles = [x[0]], studio.new_folder()
        items = [(shown(x[0], tiles), "as given")]
        for k in targets:
            images.append(swap_class(flow, x, y, torch.full_like(y, k))[0].cpu())
            items.append((shown(images[-1], tiles), f"as {names[k]}"))
            yield out.show(f"{len(images) - 1} of {len(targets)} classes …", items)
        files = save(studio.new_folder(), "swapped.png", torch.stack(images), image=x[0])
        yield {out.said: f"{len(targets)} classes, z kept{_as_class(y, names)}", **out.keep(files)}

    running = go.click(run, [chosen, source.file, source.label, to], list(out), **ONE_AT_A_TIME)
    stop.click(lambda: "stopped", None, out.said, cancels=[running], queue=False)
    chosen.change(says_problems(classes), chosen, to)


def _walk(studio: Studio, chosen: gr.Dropdown, source: Source) -> None:
    shelf, begun = studio.shelf, gr.State(None, time_to_live=3600)
    with gr.Row(equal_height=False):
        with gr.Column(min_width=260):
            start = gr.Radio(STARTS, value=STARTS[0], label="Start at")
            seed = gr.Number(0, precision=0, minimum=0, maximum=SEEDS, label="Seed", info="of the directions, and of noise")
            go = gr.Button("Start", variant="primary")
            angles = [gr.Slider(-90, 90, 0, step=1, label=f"Direction {i + 1} (degrees)") for i in range(DIRECTIONS)]
            length = gr.Slider(0.2, 1.5, 1, step=0.05, label="Length of z", info="a multiple, as the temperature")
        with gr.Column(min_width=260):
            said = gr.HTML("", elem_classes="said")
            there = gr.Image(
                label="Here",
                interactive=False,
                format="png",
                height=300,
                elem_classes="pixels",
                buttons=["fullscreen"],
                alt_text="the image of this z",
            )
            files = gr.File(label="Download", file_count="multiple", interactive=False, visible=False)
    python, command = same()

    @says_problems
    def begin(name: str, file: Any, label: Any, how: Any, key: Any) -> dict[Any, Any]:
        flow, names = shelf.flow(name), shelf.classes(name)
        key = number(key, "the seed", 0, SEEDS, whole=True)
        if how not in STARTS:
            raise InputError(f"the start must be one of {', '.join(STARTS)}, got {how!r}")
        x = None if how == STARTS[1] else uploaded(file, flow)
        if x is None:
            cycled = names[key % len(names)] if label == AUTO and names else label
            y = torch.tensor(class_numbers(cycled, names)[:1] if names else [-1])
            z = flow.core.to_prior(flow.core.enter(noise(flow.core, key, 0)))
        else:
            y = labels_of(flow, x, [label], names)
            with torch.no_grad():
                z = flow.encode(x, y)[0]
        place = Start(name, z.cpu(), y, key, x)
        still: dict[Any, Any] = dict.fromkeys(angles, 0) | {length: 1}
        return {begun: place, **still, **move(place, *still.values())}

    @says_problems
    def move(place: Start | None, *values: Any) -> dict[Any, Any]:
        if place is None:
            raise InputError("the walk has no start yet; press Start first")
        turns, scale = [number(v, "an angle", -180, 180) for v in values[:-1]], number(values[-1], "the length", 0.01, 2)
        image, z = moved(shelf.flow(place.flow), place, turns, scale)
        folder = studio.new_folder()
        save_tensors({"z": z, "labels": place.y}, folder / "z.safetensors")
        for title, x in (("here", image), ("image", place.x)):
            if x is not None:
                save_png(as_pixels(x[0]), folder / f"{title}.png")
        texts = walk_texts(shelf.place(place.flow), place, turns, scale)
        return {
            said: f"seed {place.seed}{_as_class(place.y, shelf.classes(place.flow))}",
            there: shown(image[0], studio.new_folder(), CANVAS),
            files: gr.File([str(file) for file in sorted(folder.iterdir())], visible=True),
            **dict(zip((python, command), texts, strict=True)),
        }

    outputs = [said, there, files, python, command]
    values = [chosen, source.file, source.label, start, seed]
    go.click(begin, values, [begun, *angles, length, *outputs], show_progress_on=there, **ONE_AT_A_TIME)
    sliders = [*angles, length]
    moves: Any = [slider.input for slider in sliders]
    gr.on(moves, move, [begun, *sliders], outputs, trigger_mode="always_last", show_progress="hidden", **ONE_AT_A_TIME)


def _as_class(y: Tensor, names: list[str]) -> str:
    """The classes of some images, in HTML."""
    words = dict.fromkeys(escape(names[k]) for k in y.tolist()) if names else ()
    return f", as {' and '.join(words)}" if words else ""


SECTIONS = {"Inpaint": _inpaint, "Interpolate": _interpolate, "Swap": _swap, "Walk": _walk}
