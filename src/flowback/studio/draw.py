"""The tab in which images are drawn: new ones, how they come to be, and more like one of them."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch

from flowback.core.errors import InputError
from flowback.core.files import save_tensors
from flowback.data.pictures import save_grid
from flowback.flow.decoding import DECODERS
from flowback.flow.guidance import RULES
from flowback.flow.prior import PRIORS
from flowback.flow.student import SAMPLERS
from flowback.latents import Flow
from flowback.studio.common import ONE_AT_A_TIME, Studio, class_numbers, number, same, says_problems, shown, tile
from flowback.studio.shelf import Shelf, python_of, shell, words_of
from flowback.tasks.sampling import Drawn, Request, alike, as_pixels, draw_batches, trajectory

NAME = "Draw"
MOST = 64  # images at once
ALIKE = 8  # images like a chosen one
SEEDS = 2**31 - 1
MOST_STEPS = 100


@dataclass(frozen=True)
class Drawing:
    """What the page remembers of a drawing: enough to draw any image of it again."""

    flow: str
    request: Request
    method: str
    chosen: int = 0


def columns(images: int) -> int:
    """Of the grid."""
    return max(1, round(images**0.5))


def requested(
    names: list[str],
    classes: Any,
    num: Any,
    guidance: Any,
    temperature: Any,
    rule: Any,
    prior: Any,
    denoise: Any,
    seed: Any,
    sampler: Any = "exact",
    steps: Any = None,
) -> Request:
    """What the controls ask for.

    Raises:
        InputError: if a value is not usable.
    """
    labels = class_numbers(classes, names) or [-1]
    num = number(num, "the number of images", 1, MOST, whole=True)
    if not classes and num < len(labels):  # an even spread, as `flowback sample` draws
        labels = torch.linspace(0, len(labels) - 1, num).round().long().tolist()
    return Request(
        num=num,
        labels=tuple(labels),
        guidance=number(guidance, "guidance", 0, 20),
        guidance_rule=str(rule) if sampler == "exact" else None,
        temperature=number(temperature, "temperature", 0.01, 2),
        prior=str(prior),
        denoise=bool(denoise),
        seed=number(seed, "the seed", 0, SEEDS, whole=True),
        sampler=sampler,
        steps=number(steps, "steps", 1, MOST_STEPS, whole=True) if sampler == "student" and steps else None,
    )


def texts(place: str, drawing: Drawing, names: Sequence[str]) -> tuple[str, str]:
    """The same drawing in Python and on the command line; `names` of the flow's classes."""
    python = "from pathlib import Path\n\nfrom flowback.tasks.sampling import Request, sample_to_disk\n"
    python += f"{python_of(place)}\nrequest = {request_text(drawing.request)}\n"
    python += f"sample_to_disk(flow, request, Path('samples.png'), method={drawing.method!r})"
    return python, sample_command(place, drawing.request, drawing.method, "samples.png", names)


def texts_of_one(place: str, drawing: Drawing, call: str) -> tuple[str, str]:
    """What is done with the chosen image of a drawing: the call of a function of `flowback.tasks.sampling`."""
    name = call.partition("(")[0]
    python = f"from flowback.tasks.sampling import Request, {name}\n{python_of(place)}\n"
    python += f"request = {request_text(drawing.request)}\nimages = {call}"
    return python, "# no command does this"


def request_text(request: Request) -> str:
    """A request in Python, without what is its default."""
    defaults = Request()
    changed = {k: value for k, value in vars(request).items() if value != getattr(defaults, k) or k == "num"}
    return f"Request({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def sample_command(place: str, r: Request, method: str, output: str, names: Sequence[str]) -> str:
    """The command that draws a request into a file; `names` of the flow's classes."""
    words = [
        "-o",
        output,
        f"--num={r.num}",
        f"--seed={r.seed}",
        f"--denoise={str(r.denoise).lower()}",
        f"--method={method}",
    ]
    for name in ("guidance", "guidance_rule", "temperature", "prior"):
        value = getattr(r, name)
        if value is not None:
            words.append(f"--{name.replace('_', '-')}={value if isinstance(value, str) else f'{value:g}'}")
    words += [f"--sampler={r.sampler}"] * (r.sampler != "exact") + [f"--steps={r.steps}"] * (r.steps is not None)
    if min(r.labels) >= 0:
        words.append(f"--labels={words_of(r.labels, names)}")
    return shell("sample", place, *words)


def save(folder: Path, parts: list[Drawn]) -> list[str]:
    """The files of a drawing: a grid, the ADM format, and z with its labels."""
    pixels, y = as_pixels(torch.cat([part.x for part in parts])), torch.cat([part.y for part in parts])
    save_grid(pixels, folder / "samples.png", columns(len(pixels)))
    np.savez(folder / "samples.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy(), arr_1=y.numpy())
    save_tensors({"z": torch.cat([part.z for part in parts]), "labels": y}, folder / "z.safetensors")
    return [str(folder / name) for name in ("samples.png", "samples.npz", "z.safetensors")]


def controls(shelf: Shelf, chosen: gr.Dropdown) -> list[Any]:
    """The controls of a drawing, for the chosen flow: of the method, and of what `requested` takes, in its order."""
    names = shelf.classes(chosen.value)
    classes = gr.Dropdown(names, multiselect=True, label="Classes", info="none chosen: all in turn", visible=bool(names))
    num = gr.Slider(1, MOST, 16, step=1, label="Number of images")
    by_default = shelf.flow(chosen.value).core.defaults
    guidance = gr.Slider(
        *(0, 8, by_default.guidance),
        step=0.1,
        label="Guidance",
        info="away from the average of all classes",
        visible=bool(names),
    )
    temperature = gr.Slider(
        0.05, 1.5, by_default.temperature, step=0.05, label="Temperature", info="standard deviation of z"
    )
    samplers, by_student = _samplers(shelf.flow(chosen.value))
    sampler = gr.Dropdown(samplers, value="exact", label="Sampler", info="a student draws at once", visible=by_student)
    steps = gr.Number(None, precision=0, minimum=1, maximum=MOST_STEPS, label="Steps of the student", visible=by_student)
    with gr.Accordion("More", open=False):
        rule = gr.Dropdown(
            list(RULES), value=by_default.guidance_rule, label="Rule of guidance", info="a product stays stable"
        )
        prior = gr.Dropdown(
            list(PRIORS), value=by_default.prior, label="Prior of z", info="fitted: by `flowback fit-prior`"
        )
        method = gr.Dropdown(
            ["auto", *DECODERS], value="auto", label="Decoding", info="speed only: the images are the same"
        )
        denoise = gr.Checkbox(shelf.flow(chosen.value).denoises, label="Remove the noise of training")
    with gr.Row():
        seed = gr.Number(0, precision=0, minimum=0, maximum=SEEDS, label="Seed", min_width=120)
        other = gr.Button("Other seed", size="sm", min_width=100)
    other.click(lambda: int(torch.randint(SEEDS, ())), None, seed, queue=False)

    def adapt(name: str) -> tuple[Any, ...]:
        names, flow = shelf.classes(name), shelf.flow(name)
        own, (samplers, by_student) = flow.core.defaults, _samplers(flow)
        return (
            gr.Dropdown(names, value=[], visible=bool(names)),
            gr.Slider(value=own.guidance if names else 0, visible=bool(names)),
            gr.Slider(value=own.temperature),
            gr.Dropdown(value=own.guidance_rule),
            gr.Dropdown(value=own.prior),
            gr.Checkbox(flow.denoises),
            gr.Dropdown(samplers, value="exact", visible=by_student),
            gr.Number(None, visible=by_student),
        )

    chosen.change(says_problems(adapt), chosen, [classes, guidance, temperature, rule, prior, denoise, sampler, steps])
    return [method, classes, num, guidance, temperature, rule, prior, denoise, seed, sampler, steps]


def _samplers(flow: Flow) -> tuple[list[str], bool]:
    """Which samplers a flow has, and whether a student is among them."""
    by_student = flow.core.student is not None
    return list(SAMPLERS if by_student else SAMPLERS[:1]), by_student


def build(studio: Studio, chosen: gr.Dropdown) -> None:
    """Add the tab to the page."""
    shelf = studio.shelf
    drawing = gr.State(None, time_to_live=3600)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            values = controls(shelf, chosen)
            with gr.Row():
                go = gr.Button("Draw", variant="primary", min_width=100)
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(scale=3, min_width=300):
            said = gr.Markdown("", elem_classes="said")
            grid = gr.Gallery(
                label="Images", columns=8, object_fit="contain", height="auto", format="png", buttons=["fullscreen"]
            )
            files = gr.File(label="Download", file_count="multiple", interactive=False, visible=False)
            python, command = same()
            with gr.Accordion("One image: how it came to be, and more like it", open=True):
                which = gr.Markdown("Choose an image above.")
                with gr.Row():
                    strength = gr.Slider(0.05, 1, 0.4, step=0.05, label="How different", min_width=200)
                    more = gr.Button("Draw more like it", min_width=140)
                    path = gr.Button("Show it block by block", min_width=140)
                told = gr.Markdown("")
                steps = gr.Gallery(
                    label="From this image",
                    columns=8,
                    object_fit="contain",
                    height="auto",
                    format="png",
                    buttons=["download_all", "fullscreen"],
                )

    @says_problems
    def draw(name: str, method: str, *values: Any) -> Iterator[dict[Any, Any]]:
        flow, request = shelf.flow(name), requested(shelf.classes(name), *values)
        if method not in ("auto", *DECODERS):
            raise InputError(f"decoding must be one of auto, {', '.join(DECODERS)}, got {method!r}")
        made = Drawing(name, request, method)
        texts_ = dict(zip((python, command), texts(shelf.place(name), made, shelf.classes(name)), strict=True))
        started, parts, labels = time.perf_counter(), [], shelf.classes(name)
        images: list[tuple[str, str]] = []
        folder = studio.new_folder()
        yield {
            said: f"drawing {request.num} images with seed {request.seed} …",
            grid: [],
            files: gr.File(visible=False),
            **texts_,
        }
        for part in draw_batches(flow, request, range(request.num), method, columns(request.num)):
            parts.append(part)
            for x, y in zip(part.x, part.y.tolist(), strict=True):
                images.append((shown(x, folder), f"#{len(images)}" + (f", {labels[y]}" if y >= 0 else "")))
            yield {grid: images, said: f"{len(images)} of {request.num} images, seed {request.seed} …"}
        seconds = time.perf_counter() - started
        bad = sum(int((~part.x.isfinite()).flatten(1).any(1).sum()) for part in parts)
        note = f"; {bad} had numbers that are not finite, grey there: less guidance or temperature may help" if bad else ""
        yield {
            said: f"{request.num} images, seed {request.seed}, {seconds:.1f} s{note}",
            files: gr.File(save(folder, parts), visible=True),
            drawing: made,
        }

    @says_problems
    def show_path(made: Drawing | None) -> dict[Any, Any]:
        flow, made = shelf.flow(_there(made).flow), _there(made)
        images = trajectory(flow, made.request, made.chosen, made.method)
        blocks = len(images) - 1
        captions = ["z", *(f"block {blocks - i}" for i in range(blocks))]
        told_ = (
            f"Image #{made.chosen} from noise, block by block: after the last block first. The last image is not denoised."
        )
        call = f"trajectory(flow, request, {made.chosen}, method={made.method!r})"
        texts_ = dict(zip((python, command), texts_of_one(shelf.place(made.flow), made, call), strict=True))
        return {steps: [(tile(x), text) for x, text in zip(images, captions, strict=True)], told: told_, **texts_}

    @says_problems
    def draw_alike(made: Drawing | None, strength: Any, seed: Any) -> dict[Any, Any]:
        made, flow = _there(made), shelf.flow(_there(made).flow)
        share, key = number(strength, "how different", 0, 1), number(seed, "the seed", 0, SEEDS, whole=True)
        images = alike(flow, made.request, made.chosen, share, key + 1, ALIKE, made.method)
        call = f"alike(flow, request, {made.chosen}, {share}, seed={key + 1}, num={ALIKE}, method={made.method!r})"
        texts_ = dict(zip((python, command), texts_of_one(shelf.place(made.flow), made, call), strict=True))
        told_ = f"{ALIKE} images whose z is {100 * share:.0f} % of the way from that of #{made.chosen} to other noise."
        return {steps: [(tile(x), f"like #{made.chosen}, {i}") for i, x in enumerate(images)], told: told_, **texts_}

    def choose(made: Drawing | None, event: gr.SelectData) -> tuple[Drawing | None, str]:
        if made is None:
            return None, "Choose an image above."
        return replace(made, chosen=event.index), f"Image #{event.index} is chosen."

    outputs = [said, grid, files, python, command, drawing]
    running = go.click(draw, [chosen, *values], outputs, **ONE_AT_A_TIME)
    stop.click(lambda: "stopped", None, said, cancels=[running], queue=False)
    grid.select(choose, drawing, [drawing, which], queue=False)
    path.click(show_path, drawing, [steps, told, python, command], **ONE_AT_A_TIME)
    more.click(draw_alike, [drawing, strength, values[8]], [steps, told, python, command], **ONE_AT_A_TIME)


def _there(made: Drawing | None) -> Drawing:
    if made is None:
        raise InputError("there is no image yet; draw some first")
    return made
