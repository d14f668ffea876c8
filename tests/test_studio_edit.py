"""Editing on the page: the same as in Python and by the command; painted masks; walks that stay on their sphere."""

import contextlib
import math
import shlex
import shutil
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from builders import random_flow, tiny_autoencoder
from flowback import InputError, LatentFlow, TarFlow
from flowback.cli import main
from flowback.core.units import to_uint8
from flowback.data.pictures import save_grid, save_png
from flowback.latents import load_autoencoder
from flowback.runs.checkpoint import newest
from flowback.studio import edit as tab
from flowback.studio.common import Studio
from flowback.studio.shelf import Shelf, words_of
from flowback.tasks.editing import inpaint, inpaint_by_step, interpolate, turned, walk
from flowback.tasks.sampling import Request, draw_batches

NAMES = [str(k) for k in range(10)]


@pytest.fixture(scope="module")
def flow(small_run):
    return TarFlow.from_pretrained(newest(small_run)).requires_grad_(False)


@pytest.fixture
def files(digits, tmp_path, monkeypatch):
    """Two digits as files, where the test is."""
    monkeypatch.chdir(tmp_path)
    for name, x in zip(("image.png", "other.png"), digits[0], strict=False):
        save_png(to_uint8(x), tmp_path / name)
    return [str(tmp_path / name) for name in ("image.png", "other.png")]


@pytest.fixture
def page(small_run, tmp_path):
    """The tab's handlers, by their functions' names, in order: from inputs to what components show, by label, each step.

    Flow 0 has classes, flow 1 has none, flow 2 works in latents.
    """
    options = {"image_size": 8, "channels": 1, "patch_size": 4, "width": 32, "blocks": 2, "layers": 1, "num_classes": 0}
    TarFlow(**options).save_pretrained(tmp_path / "unconditional")
    vae = load_autoencoder(str(tiny_autoencoder(tmp_path / "vae")))
    LatentFlow(random_flow(torch.float32, channels=3, image_size=4), vae).save_pretrained(tmp_path / "latents")
    places = [str(small_run), str(tmp_path / "unconditional"), str(tmp_path / "latents")]
    shelf = Shelf(places, torch.device("cpu"))
    folder = tmp_path / "results"
    folder.mkdir()
    with gr.Blocks() as blocks:
        chosen = gr.Dropdown(shelf.refresh(), value=shelf.refresh()[0])
        tab.build(Studio(shelf, folder=folder), chosen)

    def call(name, *inputs, number=0, flow=0):
        fn = [fn for fn in blocks.fns.values() if fn.name == name][number].fn
        steps = fn(shelf.refresh()[flow], *inputs) if name != "move" else fn(*inputs)
        steps = steps if not isinstance(steps, dict) else [steps]
        return [{getattr(c, "label", None) or type(c).__name__: v for c, v in step.items()} for step in steps]

    return call


def run_texts(python, command, grid):
    """What a shown Python text computes, as images `[B, C, H, W]`, and the file that a shown command writes, as pixels."""
    space = {}
    exec(python, space)
    assert main(shlex.split(command, comments=True)[1:]) == 0
    images = space["images" if "images" in space else "image"].detach()
    return images, np.array(Image.open(grid))


def pixels(file):
    return np.array(Image.open(file))


def saved(steps, name):
    """A file that a handler offers."""
    files = next(
        found for step in reversed(steps) if (found := step.get("Download")) and found.constructor_args.get("value")
    )
    return next(file for file in files.constructor_args["value"] if file.endswith(name))


# ---- masks -----------------------------------------------------------------------------------------------------------


def painted(tmp_path, box, size=320):
    layer = Image.new("RGBA", (size, size))
    ImageDraw.Draw(layer).rectangle(box, fill=(230, 0, 126, 255))
    layer.save(tmp_path / "layer.png")
    return {"layers": [str(tmp_path / "layer.png")], "background": None, "composite": None}


def test_what_is_painted_is_masked_in_the_flows_pixels(flow, tmp_path):
    mask = tab.mask_of(painted(tmp_path, (80, 120, 199, 159)), "", flow)  # 40 pixels of the canvas are one
    assert mask.shape == (1, 1, 8, 8)
    assert mask.nonzero()[:, 2:].tolist() == [[3, 2], [3, 3], [3, 4]]
    as_bytes = {"layers": [(tmp_path / "layer.png").read_bytes()]}
    assert torch.equal(tab.mask_of(as_bytes, None, flow), mask)
    slightly = tab.mask_of(painted(tmp_path, (80, 120, 125, 159)), "", flow)  # 6 of 40 columns of the second pixel
    assert slightly.nonzero()[:, 2:].tolist() == [[3, 2]]


def test_a_box_is_a_mask_too(flow, tmp_path):
    mask = tab.mask_of(painted(tmp_path, (0, 0, 319, 319)), " 1,2,3,1 ", flow)
    assert mask.nonzero()[:, 2:].tolist() == [[2, 1], [2, 2], [2, 3]]


@pytest.mark.parametrize(
    ("what", "box", "match"),
    [
        (None, "", "nothing is painted"),
        ({"layers": []}, None, "nothing is painted"),
        ({"layers": None}, None, "nothing is painted"),
        ({"layers": [b"no image"]}, "", "image that was painted cannot be read"),
        (None, "1,2,3", "four numbers"),
        (None, "<img src=x>", "four numbers"),
        (None, "0,0,9,1", "does not lie in the image"),
    ],
)
def test_masks_that_are_none_are_refused(flow, what, box, match):
    with pytest.raises(InputError, match=match):
        tab.mask_of(what, box, flow)


# ---- the same by page, Python and command ----------------------------------------------------------------------------


@pytest.mark.parametrize("label", [tab.AUTO, "3"])
def test_inpainting_is_the_same_everywhere(page, files, flow, tmp_path, label):
    steps = page("run", files[0], label, painted(tmp_path, (80, 120, 199, 199)), "", 3, 20, 2, 5)
    assert len(steps) == 4  # begun, after ten steps, after twenty, done
    shown = pixels(saved(steps, "inpainted.png"))
    mask = pixels(saved(steps, "mask.png")) > 127
    assert mask.sum() == 6
    given = pixels(saved(steps, "image.png"))
    assert np.array_equal(given, pixels(files[0]))
    Image.fromarray(255 * mask.astype(np.uint8)).save("mask.png")
    images, by_command = run_texts(steps[0]["Python"], steps[0]["command"], "inpainted.png")
    assert np.array_equal(shown, by_command)
    save_grid(torch.cat([torch.zeros(2, 1, 8, 8), images]), tmp_path / "python.png", 5)
    assert np.array_equal(pixels("python.png")[:, -90:], shown[:, -90:])
    assert (to_uint8(images)[:, 0].numpy()[:, ~mask] == given[~mask]).all()


def test_looking_at_inpainting_changes_nothing(flow, digits):
    x, mask = digits[0][:2], torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :4, :] = True
    whole = inpaint(flow, x, mask, 1, 7, 2, torch.Generator().manual_seed(0))
    *parts, last = inpaint_by_step(flow, x, mask, 1, 7, 2, torch.Generator().manual_seed(0), every=2)
    assert [part.log_prob.shape[1] for part in parts] == [3, 5, 7]
    assert torch.equal(last.x, whole.x)
    assert torch.equal(last.log_prob, whole.log_prob)
    assert torch.equal(last.acceptance, whole.acceptance)


def test_a_walk_between_images_is_the_same_everywhere(page, files, tmp_path):
    steps = page("run", files[0], tab.AUTO, files[1], "7", 5, 50, number=1)
    assert len(steps) == 7
    strip = steps[-1]["State"]
    assert len(strip) == 5
    images, by_command = run_texts(steps[0]["Python"], steps[0]["command"], "interpolation.png")
    assert np.array_equal(pixels(saved(steps, "interpolation.png")), by_command)
    for file, image in zip(strip, to_uint8(images), strict=True):
        assert np.array_equal(pixels(file)[::14, ::14, 0], image[0])
    assert steps[-1]["On the way"] == strip[2]


def test_the_slider_shows_what_is_computed_already(page, files):
    strip = page("run", files[0], "1", files[1], "7", 3, 0, number=1)[-1]["State"]
    assert [strip.index(tab.nearest(strip, at)) for at in (0, 24, 26, 100)] == [0, 0, 1, 2]
    Path(strip[1]).unlink()
    assert tab.nearest(strip, 50) is None
    with pytest.raises(InputError, match="the place must be"):
        tab.nearest(strip, 101)


def test_walks_are_interpolations(flow, digits):
    a, b = digits[0][:2], digits[0][2:4]
    y = torch.tensor([1, -1])
    whole = interpolate(flow, a, b, 4, y, 3)
    assert torch.equal(torch.stack(list(walk(flow, a, b, 4, y, 3)), 1), whole)


@pytest.mark.parametrize("targets", [["2", "9"], []])
def test_another_class_is_the_same_everywhere(page, files, targets):
    steps = page("run", files[0], tab.AUTO, targets, number=2)
    images, by_command = run_texts(steps[0]["Python"], steps[0]["command"], "swapped.png")
    assert len(images) == (2 if targets else 10)
    assert len(steps) == 2 + len(images)
    assert np.array_equal(pixels(saved(steps, "swapped.png")), by_command)


@pytest.mark.parametrize("how", tab.STARTS)
def test_a_walk_by_hand_is_the_same_everywhere(page, files, flow, how, tmp_path):
    (begun,) = page("begin", files[0], "4", how, 3)
    start = begun["State"]
    (here,) = page("move", start, 30, -20, 0, 10, 1.1)
    z = load_file(saved([here], "z.safetensors"))
    assert z["labels"].tolist() == [4]
    assert z["z"].norm().item() == pytest.approx(1.1 * start.z.norm().item(), rel=1e-5)
    shutil.copy(saved([here], "z.safetensors"), tmp_path)
    image, by_command = run_texts(here["Python"], here["command"], "decoded.png")
    assert np.abs(to_uint8(image)[0, 0].numpy().astype(int) - pixels(saved([here], "here.png"))).max() <= 1
    if how == tab.STARTS[0]:
        assert (
            np.abs(
                by_command.reshape(8, -1, 8, by_command.shape[1] // 8, 3)[:, 0, :, 0, 0].astype(int)
                - to_uint8(image)[0, 0].numpy()
            ).max()
            <= 1
        )


def test_a_walk_begins_at_its_image(page, files, flow):
    (begun,) = page("begin", files[0], "4", tab.STARTS[0], 3)
    image, _ = tab.moved(flow, begun["State"], [0, 0, 0, 0], 1)
    assert np.abs(to_uint8(image)[0, 0].numpy().astype(int) - pixels(files[0])).max() <= 1
    (begun,) = page("begin", None, tab.AUTO, tab.STARTS[1], 13)
    image, _ = tab.moved(flow, begun["State"], [0, 0, 0, 0], 1)
    (drawn,) = draw_batches(flow, Request(1, (3,), seed=13), [0])  # as on the tab where one draws
    torch.testing.assert_close(image, drawn.x, atol=1e-5, rtol=0)


def test_turning_stays_on_the_sphere_and_goes_as_far_as_asked():
    z = torch.randn(6, 4)
    for angles in ([0.5], [0.3, -0.4], [math.pi, 0, 0]):
        there = turned(z, angles, seed=1)
        assert there.norm().item() == pytest.approx(z.norm().item(), rel=1e-6)
        cosine = (there * z).sum() / z.norm() ** 2
        assert cosine.item() == pytest.approx(math.cos(math.hypot(*angles)), abs=1e-6)
    ways = torch.stack([turned(z, [math.pi / 2 * (i == k) for k in range(4)], 2).flatten() for i in range(4)])
    torch.testing.assert_close(ways @ ways.T, z.norm() ** 2 * torch.eye(4), atol=1e-4, rtol=0)
    assert torch.equal(turned(z, [0.0, 0.0]), turned(z, [0.0, 0.0], 7))
    with pytest.raises(InputError, match="a z of 2 numbers has 1 directions to turn in, got 2 angles"):
        turned(torch.ones(1, 2), [0.1, 0.1])


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_said_in_a_sentence(page, files, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    box = "0,0,2,2"
    for inputs, match in [
        ((None, tab.AUTO, None, box, 1, 0, 1, 0), "there is no image yet"),
        ((str(tmp_path / "text.png"), tab.AUTO, None, box, 1, 0, 1, 0), "image text.png cannot be read"),
        ((files[0], "dog", None, box, 1, 0, 1, 0), "no class"),
        ((files[0], tab.AUTO, None, box, 99, 0, 1, 0), "drawings must be a whole number of 1 to 16"),
        ((files[0], tab.AUTO, None, box, 1, 1e9, 1, 0), "steps must be"),
        ((files[0], tab.AUTO, None, box, 1, 0, 0, 0), "tries must be"),
        ((files[0], tab.AUTO, None, box, 1, 0, 1, -1), "the seed must be"),
    ]:
        with pytest.raises(gr.Error, match=match):
            page("run", *inputs)
    for inputs, number, match in [
        ((files[0], tab.AUTO, None, tab.AUTO, 5, 0), 1, "there is no image yet"),
        ((files[0], tab.AUTO, files[1], tab.AUTO, 1, 0), 1, "images on the way must be"),
        ((files[0], tab.AUTO, ["dog"]), 2, "no class"),
    ]:
        with pytest.raises(gr.Error, match=match):
            page("run", *inputs, number=number)
    with pytest.raises(gr.Error, match="no start yet"):
        page("move", None, 0, 0, 0, 0, 1)
    with pytest.raises(gr.Error, match="the start must be one of"):
        page("begin", files[0], tab.AUTO, "elsewhere", 0)


@pytest.mark.parametrize("flow", [1, 2])
def test_flows_without_classes_and_in_latents_edit_too(page, files, tmp_path, flow):
    for steps, grid in (
        (page("run", files[0], tab.AUTO, None, "0,0,4,4", 1, 2, 1, 0, flow=flow), "inpainted.png"),
        (page("run", files[0], None, files[1], None, 3, 50, number=1, flow=flow), "interpolation.png"),
        (page("begin", files[0], tab.AUTO, tab.STARTS[0], 3, flow=flow), "decoded.png"),
        (page("begin", None, tab.AUTO, tab.STARTS[1], 3, flow=flow), "decoded.png"),
    ):
        for name in ("image.png", "mask.png", "other.png", "z.safetensors"):
            with contextlib.suppress(StopIteration):
                shutil.copy(saved(steps, name), tmp_path)
        assert ("--labels" in steps[0]["command"]) == (flow == 2 and grid != "decoded.png")
        run_texts(steps[0]["Python"], steps[0]["command"], grid)
        if grid != "decoded.png":
            assert np.array_equal(pixels(grid), pixels(saved(steps, grid)))


def test_an_unconditional_flow_has_no_classes_to_change(page, files):
    with pytest.raises(gr.Error, match="no classes to change"):
        page("run", files[0], tab.AUTO, [], number=2, flow=1)


def test_classes_are_named_where_numbers_are_names():
    assert words_of([2, 0], ["0", "1", "10"]) == "10,0"
    assert words_of([2, 0], ["cat", "dog", "owl"]) == "2,0"
