"""The page: a flow to choose, and a tab for each job. A new job is a module with a NAME and a `build`, named in TABS."""

import os
import secrets
from types import ModuleType

import gradio as gr
from gradio.themes import Base, Default
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from flowback.core.console import say
from flowback.core.errors import InputError
from flowback.studio import classify, compare, draw, edit, score, train
from flowback.studio.common import SERVED, UPLOAD, Studio, says_problems

TABS: tuple[ModuleType, ...] = (draw, classify, score, edit, compare)
LOCAL_TABS: tuple[ModuleType, ...] = (train,)  # that only this machine may use: they start processes and write runs
WAITING = 64  # people in the queue, at most
HERE = ["127.0.0.1", "localhost"]  # names that a browser may know this machine by: no page of a foreign one becomes ours
SESSIONS = 200  # pages whose state is kept, at most
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # none is fetched
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
CSS = """
.card { border-collapse: collapse; font-size: 0.9rem; }
.card th { text-align: left; font-weight: 600; padding-right: 1rem; vertical-align: top; white-space: nowrap; }
.card td { overflow-wrap: anywhere; }
.figures { overflow-x: auto; }
.figures .card :is(th, td) { white-space: normal; padding: 0.25rem 0.5rem; }
.figures .card td { min-width: 4.5em; }
.figures .card th { min-width: 6em; overflow-wrap: anywhere; }
.options .form { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
.grid-container img, .pixels img, figure img { image-rendering: pixelated; }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)) !important; padding-top: 2rem !important; }
.grid-wrap.fixed-height { min-height: 0 !important; height: auto !important; max-height: 75vh !important; }
button[role=tab].selected { color: var(--body-text-color) !important; }
.pixels img { width: 100%; height: 100%; object-fit: contain; }
"""


def page(studio: Studio) -> gr.Blocks:
    """The page, not served yet."""
    names, first = studio.shelf.refresh(), studio.shelf.first()
    with gr.Blocks(title="flowback studio", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown("# flowback studio")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                chosen = gr.Dropdown(names, value=first, label="Flow", filterable=True)
                again = gr.Button("Look for new runs", size="sm")
            with gr.Column(scale=3, min_width=300), gr.Accordion("About this flow", open=False):
                card = gr.HTML(studio.shelf.card(first))
        with gr.Tabs():
            for tab in (*TABS, *(LOCAL_TABS if studio.local else ())):
                with gr.Tab(tab.NAME):
                    tab.build(studio, chosen)
        chosen.change(says_problems(studio.shelf.card), chosen, card)

        @says_problems
        def offered(name: str | None = None) -> gr.Dropdown:
            names = studio.shelf.refresh()
            return gr.Dropdown(names, value=name if name in names else studio.shelf.first())

        again.click(offered, chosen, chosen, api_name="look_again")
        blocks.load(offered, None, chosen, api_name="offered")
    return blocks.queue(max_size=WAITING, default_concurrency_limit=8)


def theme() -> Base:
    """Gradio's own look, with the system's fonts, and with small print and buttons that can be read."""
    colors = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}
    colors |= {"block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_300"}
    for name in ("button_primary_background_fill", "button_primary_background_fill_dark"):
        colors |= {name: "*primary_700", name.replace("fill", "fill_hover"): "*primary_800"}
    return Default(font=FONTS, font_mono=MONO).set(**colors)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at this address."""
    return host in ("127.0.0.1", "localhost", "::1")


def serve(studio: Studio, host: str = "127.0.0.1", port: int | None = None, password: str | None = None) -> gr.Blocks:
    """Serve the page from threads of its own.

    Args:
        studio: what is served.
        host: address to listen at: 127.0.0.1 for this machine alone, 0.0.0.0 for others, who need the password.
        port: of the server; None for the first free one from 7860.
        password: for others; None for one that is made up and said. The name is `flowback`.

    Returns:
        The page, which `close` ends.

    Raises:
        InputError: if the port is not free or not one.
    """
    if port is not None and not 1 <= port <= 65535:
        raise InputError(f"port must be from 1 to 65535, got {port}")
    auth = None
    if not is_loopback(host) or password is not None:
        auth = ("flowback", password or secrets.token_urlsafe(9))
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault(SERVED, str(studio.folder / "served"))  # which ends with the studio
    try:
        blocks = page(studio)
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            theme=theme(),
            css=CSS,
            max_file_size=UPLOAD,
            state_session_capacity=SESSIONS,
            allowed_paths=[],
            app_kwargs={
                "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=HERE if is_loopback(host) else ["*"])]
            },
            share=False,
            quiet=True,
            footer_links=[],
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise InputError(f"port {port or 'from 7860'} cannot be used ({error}); choose another") from error
    say(f"the studio is at {address}" + (f", name flowback, password {auth[1]}" if auth and not password else ""))
    return blocks
