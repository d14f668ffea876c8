"""The studio in a real browser: every job on a small real flow, at two sizes, by keyboard, without a network."""

import re
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import TimeoutError, sync_playwright
from safetensors.torch import load_file

from flowback.core.units import to_uint8
from flowback.data.pictures import save_png
from flowback.studio import draw
from flowback.studio import score as studio_score
from flowback.studio.app import serve
from flowback.studio.common import UPLOAD, Studio
from flowback.studio.shelf import Shelf

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT = 90_000  # ms, on a busy machine
NASTY = "<img src=x onerror=document.title='taken'>"


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"needs a browser: {', '.join(NAMES)} (Debian's package chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(small_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("studio")
    for name in ("aligned", "plain"):
        shutil.copytree(small_run, folder / name)
    return folder


@pytest.fixture(scope="module")
def server(runs):
    with Studio(Shelf([str(runs)], torch.device("cpu"))) as studio:
        blocks = serve(studio)
        yield blocks.local_url
        blocks.close(verbose=False)


@pytest.fixture
def page(browser, server):
    """A visitor's page, which asks nobody but the server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(WAIT)
    asked = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(server)
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    yield page
    context.close()
    assert asked
    assert [url for url in asked if not url.startswith((server, "data:", "blob:"))] == []


@pytest.fixture
def slow(monkeypatch):
    """Drawing waits before each row until the event is set."""
    go_on, real = threading.Event(), draw.draw_batches

    def waiting(*arguments):
        for part in real(*arguments):
            go_on.wait(60)
            yield part

    monkeypatch.setattr(draw, "draw_batches", waiting)
    yield go_on
    go_on.set()


def click(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def ask(page, name, answer):
    """Press a button until its answer is there: Gradio's page may lose what is asked for while something else comes."""
    for timeout in (WAIT / 30, WAIT / 10, WAIT / 3, WAIT):
        click(page, name)
        try:
            answer.wait_for(timeout=timeout)
            return
        except TimeoutError:
            if timeout == WAIT:
                raise


def done(page, text="16 images, seed 0,"):
    page.get_by_text(text).first.wait_for()


def upload(page, files, said):
    """Give files to the open tab; again where the page was not ready for them."""
    for timeout in (WAIT / 30, WAIT / 10, WAIT / 3, WAIT):
        page.locator("input[type=file]").first.set_input_files(files)
        try:
            page.get_by_text(said).first.wait_for(timeout=timeout)
            return
        except TimeoutError:
            if timeout == WAIT:
                raise


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def test_it_draws_gives_the_files_and_names_what_one_can_use(page, tmp_path):
    click(page, "Draw")
    done(page)
    assert page.locator(".grid-container img, .grid-wrap img").count() == 16
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select, img')]
        .filter(e => e.offsetParent && e.type !== 'file')
        .filter(e => !(e.innerText || e.alt || e.title || e.ariaLabel || (e.labels && e.labels.length) || e.closest('label')
            || e.getAttribute('aria-labelledby')))
        .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    for name in ("samples.png", "samples.npz", "z.safetensors"):
        with page.expect_download() as download:
            page.locator(f"a.download-link[download='{name}'], a[href$='/{name}']").first.click()
        download.value.save_as(tmp_path / name)
    assert Image.open(tmp_path / "samples.png").size == (138, 138)  # 4 x 4, with lines between
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (16, 8, 8, 1)
    assert load_file(tmp_path / "z.safetensors")["labels"].tolist() == [*range(10), *range(6)]


def test_stop_ends_a_drawing(page, slow):
    click(page, "Draw")
    page.get_by_text("drawing 16 images").first.wait_for()
    click(page, "Stop")
    page.get_by_text("stopped").first.wait_for()
    slow.set()
    page.wait_for_timeout(1000)  # nobody is faster; Gradio's page may lose what is asked for in the same moment
    click(page, "Draw")
    done(page)


def test_a_reload_in_the_middle(page, slow):
    click(page, "Draw")
    page.get_by_text("drawing 16 images").first.wait_for()
    page.reload()
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    slow.set()
    click(page, "Draw")
    done(page)


def test_two_people_at_once(browser, server, slow):
    contexts = [browser.new_context() for _ in range(2)]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        page.goto(server)
    click(pages[0], "Draw")
    pages[0].get_by_text("drawing 16 images").first.wait_for()
    click(pages[1], "Draw")
    pages[1].get_by_text("queue: 1/1").first.wait_for()  # sees the place
    slow.set()
    for page in pages:
        done(page)
    for context in contexts:
        context.close()


def test_a_server_that_was_started_again(browser, runs):
    with Studio(Shelf([str(runs)], torch.device("cpu"))) as studio:
        blocks = serve(studio)
        port, page = blocks.server_port, browser.new_context().new_page()
        page.goto(blocks.local_url)
        click(page, "Draw")
        done(page)
        blocks.close(verbose=False)
        blocks = serve(studio, port=port)
        page.reload()
        click(page, "Draw")
        done(page)
        page.context.close()
        blocks.close(verbose=False)


def test_one_image_is_looked_into(page):
    click(page, "Draw")
    done(page)
    ask(page, "Show it block by block", page.get_by_text("from noise, block by block"))
    ask(page, "Draw more like it", page.get_by_text("other noise"))


def test_small_screens(page):
    page.set_viewport_size({"width": 390, "height": 800})
    click(page, "Draw")
    done(page)
    for scheme, dark in (("light", False), ("dark", True)):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function("dark => document.body.classList.contains('dark') == dark", arg=dark)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_by_keyboard(page):
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText == 'Draw' && document.activeElement.role != 'tab'"):
            break
    page.keyboard.press("Enter")
    done(page)


def test_it_classifies_its_own_images(page):
    open_tab(page, "Classify")
    click(page, "Use images of the flow")
    page.get_by_text(".png").first.wait_for()
    ask(page, "Classify", page.get_by_text("8 files in"))
    page.get_by_role("gridcell").first.wait_for()


def test_it_scores_a_folder_on_a_small_screen_and_by_keyboard(page, digits, tmp_path):
    page.set_viewport_size({"width": 390, "height": 800})
    for i, x in enumerate(digits[0][:3]):
        save_png(to_uint8(x), tmp_path / f"digit_{i}.png")
    (tmp_path / "notes.txt").write_text("left aside")
    open_tab(page, "Score")
    page.get_by_text("no anomaly map: run").wait_for()  # the flow was not evaluated
    page.locator("input[type=file][webkitdirectory]").set_input_files(tmp_path)
    page.get_by_text("digit_2").first.wait_for()
    page.get_by_role("button", name="Score", exact=True).press("Enter")
    page.get_by_text("3 files in").wait_for()
    page.get_by_text(re.compile(r"\d against \d: .* nats")).first.wait_for()
    page.get_by_role("gridcell", name="digit_0.png").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    with page.expect_download() as download:
        page.locator("a.download-link[download='scores.csv'], a[href$='/scores.csv']").first.click()
    download.value.save_as(tmp_path / "scores.csv")
    assert (tmp_path / "scores.csv").read_text().startswith("file,log_prob,nats_per_dim,bits_per_dim,ratio,class,")


def test_stop_ends_a_scoring(page, monkeypatch):
    go_on, real = threading.Event(), studio_score.score

    def waiting(*arguments, **options):
        go_on.wait(60)
        return real(*arguments, **options)

    monkeypatch.setattr(studio_score, "score", waiting)
    open_tab(page, "Score")
    ask(page, "Use the flow's own", page.get_by_text("drawn_7").locator("visible=true").first)
    click(page, "Score")
    page.get_by_text("scoring 8 files").first.wait_for()
    page.get_by_role("button", name="Stop", exact=True).locator("visible=true").click()
    page.get_by_text("stopped").first.wait_for()
    go_on.set()
    page.wait_for_timeout(1000)  # nobody is faster; Gradio's page may lose what is asked for in the same moment
    click(page, "Score")
    page.get_by_text("8 files in").wait_for()


def test_files_that_are_no_images_are_named(page, tmp_path):
    bad = {"text.png": b"not an image", "empty.png": b"", "cut.gif": b"GIF89a" + b"\xff" * 20}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    open_tab(page, "Classify")
    upload(page, [tmp_path / name for name in bad], "26.0 B")  # of the last one; names are shortened
    ask(page, "Classify", page.get_by_text("cannot be read").first)
    for name in bad:
        page.get_by_text(f"image {name} cannot be read").first.wait_for()


def test_a_huge_file_is_refused(page, tmp_path):
    with open(tmp_path / "huge.png", "wb") as stream:
        stream.truncate(UPLOAD + 1)
    open_tab(page, "Classify")
    upload(page, tmp_path / "huge.png", re.compile("maximum allowed size|exceeds", re.IGNORECASE))


def test_it_edits(page):
    open_tab(page, "Edit")
    click(page, "Use an image of the flow")
    page.get_by_label("Or a box").fill("0,0,4,4")
    ask(page, "Draw anew", page.get_by_text("accepted").first)


def test_it_compares(page):
    open_tab(page, "Compare")
    ask(page, "Compare", page.get_by_text("16 images by each with seed 0,").first)


def test_it_trains_stops_and_goes_on(page, runs):
    open_tab(page, "Train")
    name = page.get_by_label("Name of the new run")
    while name.input_value() != "browser":  # the page sets it once it is loaded
        name.fill("browser")
        page.wait_for_timeout(1000)
    page.get_by_text("alignment: with what").click()
    strategy = page.get_by_label("strategy").locator("visible=true").first
    strategy.fill("none")
    strategy.press("Enter")
    click(page, "Start")
    under_way = page.get_by_text(re.compile(r"step [1-9]\d* of 1,?000")).first
    under_way.wait_for(timeout=3 * WAIT)
    page.reload()  # it goes on meanwhile
    open_tab(page, "Train")
    under_way.wait_for(timeout=3 * WAIT)  # a click on a page that knows of no training yet is lost
    stop = page.get_by_role("button", name="Stop", exact=True).locator("visible=true")
    stop.click()
    page.get_by_role("button", name="Go on").locator("visible=true").and_(page.locator(":enabled")).wait_for(
        timeout=3 * WAIT
    )
    assert list((runs / "browser" / "checkpoints").glob("step_*"))
