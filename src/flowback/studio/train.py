"""The tab in which flows are trained, on this machine only: the options of a recipe, what they take, and how it goes on.

A training is a process of its own, the command that the page shows. It outlives the page, not the studio: when its standard
input ends it ends as by SIGTERM, with a checkpoint.
"""

import atexit
import base64
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from html import escape
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import gradio as gr
import yaml

from flowback.alignment.alignment import PROJECTORS
from flowback.alignment.gradients import STRATEGIES
from flowback.core.console import command, say
from flowback.core.distributed import ENDS_WITH_INPUT
from flowback.core.errors import InputError, plain
from flowback.data.datasets import LOADERS, OWN, SOURCES
from flowback.flow.config import NOISES, POSITIONS, PRIORS
from flowback.flow.transformer import MLPS
from flowback.latents.autoencoder import POSTERIORS
from flowback.latents.losses import PIXELS
from flowback.runs.checkpoint import State, newest
from flowback.runs.config import PRECISIONS, SHARING, RunConfig, descriptions, flat, load_yaml, recipe, recipes
from flowback.runs.log import read_metrics
from flowback.studio.common import ONE_AT_A_TIME, Studio, same, says_problems
from flowback.studio.compare import QUANTITIES, curves, quantity
from flowback.studio.shelf import Shelf
from flowback.training.budget import plan
from flowback.training.build import first_flow, settle

NAME = "Train"
EVERY = 2.0  # seconds between looks at a training
LINES = 8  # of its output that are shown
PATIENCE = 120  # seconds that a training has to end when the studio does
LATEST = 4 * 2**20  # bytes of a picture of samples that is shown, at most
CHOICES = {
    "data.name": tuple(name for name in (*LOADERS, *SOURCES) if name != OWN),
    "flow.mlp": tuple(MLPS),
    "flow.positions": POSITIONS,
    "flow.noise": NOISES,
    "flow.prior": PRIORS,
    "latents.posterior": POSTERIORS,
    "reconstruction.pixels": tuple(PIXELS),
    "alignment.strategy": ("none", *STRATEGIES),
    "alignment.encoder_precision": PRECISIONS,
    "alignment.projector": tuple(PROJECTORS),
    "train.precision": PRECISIONS,
    "train.strategy": SHARING,
}
HIDDEN = {"train.resume"}  # what the page sets


@dataclass(frozen=True)
class Option:
    """An option of a run, as its dataclass has it."""

    name: str  # dotted
    kinds: tuple[Any, ...]  # the types of its values
    about: str

    def control(self, value: Any) -> Any:
        """The control for a value as the configuration's YAML has it."""
        about = escape(self.about.replace("\n", " "), quote=False)
        shared: dict[str, Any] = {"label": self.name.split(".")[1], "info": about}
        if self.kinds == (bool,):
            return gr.Checkbox(value, **shared)
        if self.name in CHOICES:
            return gr.Dropdown(list(CHOICES[self.name]), value=value, **shared)
        if self.is_number:
            return gr.Number(value, step=0.001 if float in self.kinds else 1, **shared)
        return gr.Textbox(self.shown(value), lines=1, max_lines=1, placeholder="null", **shared)

    @property
    def is_number(self) -> bool:
        """Whether its values are numbers; those that may be null have a text, since an empty number is shown as 0."""
        return set(self.kinds) <= {int, float}

    def shown(self, value: Any) -> Any:
        """A value of the YAML as the control shows it."""
        if self.kinds == (bool,) or self.name in CHOICES or self.is_number:
            return value
        return "" if value is None else as_word(value)

    def read(self, value: Any) -> Any:
        """What the control says, as a value of the YAML.

        Raises:
            InputError: if a text is none that YAML has.
        """
        if isinstance(value, float) and value.is_integer() and float not in self.kinds:
            return int(value)
        if not isinstance(value, str) or self.name in CHOICES:
            return value
        if not value.strip() and type(None) in self.kinds:
            return None
        try:
            return value.strip() if set(self.kinds) <= {str, type(None)} else load_yaml(value)
        except yaml.YAMLError as error:
            raise InputError(f"{self.name} cannot be read: {value!r}") from error


def options() -> list[Option]:
    """All options of a run but those that the page sets, section by section."""
    found, sections = [], get_type_hints(RunConfig)
    for section in descriptions(RunConfig):  # in the order of the page
        config = sections[section]
        if isinstance(config, type) and is_dataclass(config):
            about, types = descriptions(config), get_type_hints(config)
            for name in (field.name for field in fields(config)):
                kinds = tuple(_kinds(types[name]))
                found.append(Option(f"{section}.{name}", kinds, about[name]))
    return [option for option in found if option.name not in HIDDEN]


def _kinds(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def runs_folder(shelf: Shelf) -> Path:
    """Where new runs go: the first place of the studio that is a folder of runs, or runs/."""
    folders = (Path(place) for place in shelf.places)
    return next((f for f in folders if f.is_dir() and newest(f) is None and not (f / "config.json").exists()), Path("runs"))


def free_name(root: Path, name: str) -> str:
    """A name for a new run that no other has."""
    names = [name, *(f"{name}-{i}" for i in range(2, 1000))]
    return next(each for each in names if not (root / each).exists())


@dataclass(frozen=True)
class Start:
    """What is to be trained: a recipe or run to begin with, and the options that differ from its own.

    Args:
        file: the recipe, or the config.yaml of the run that goes on.
        folder: of the run.
        resume: whether it goes on.
        changes: by dotted names, as in YAML.
    """

    file: Path
    folder: Path
    resume: bool
    changes: dict[str, Any]

    def config(self) -> RunConfig:
        """The configuration of the run.

        Raises:
            InputError: if it is none.
        """
        values = yaml.safe_load(RunConfig.read(self.file).to_yaml())
        for name, value in {**self.changes, "train.resume": self.resume}.items():
            section, option = name.split(".")
            values[section][option] = value
        return RunConfig.from_yaml(yaml.safe_dump({**values, "run": str(self.folder)}))

    def words(self) -> list[str]:
        """Of the command that trains it, `flowback` left out."""
        words = ["train", f"--config={self.file}", *(["--train.resume"] if self.resume else [f"--run={self.folder}"])]
        return words + [f"--{name}={as_word(value)}" for name, value in self.changes.items()]

    def python(self) -> str:
        """The same in Python."""
        config, sections = self.config(), {}
        for name in [*self.changes, *["train.resume"] * self.resume]:
            section, option = name.split(".")
            sections.setdefault(section, {})[option] = getattr(getattr(config, section), option)
        changed = [
            f"{section}=replace(config.{section}, {', '.join(f'{k}={v!r}' for k, v in values.items())})"
            for section, values in sections.items()
        ]
        changed = [f"run={str(self.folder)!r}", *changed]
        return (
            "from dataclasses import replace\nfrom pathlib import Path\n\nfrom flowback import train\n"
            f"from flowback.runs.config import RunConfig\n\nconfig = RunConfig.read(Path({str(self.file)!r}))\n"
            f"train(replace(config, {', '.join(changed)}))"
        )


def as_word(value: Any) -> str:
    """A value of the YAML as it is typed."""
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]


def base(shelf: Shelf, source: str) -> tuple[Path, Path | None]:
    """The configuration to begin with, `recipe: NAME` or `run: NAME`, and the folder of the run that goes on, if one does.

    Raises:
        InputError: if it is not offered, or a run cannot go on.
    """
    kind, _, name = str(source).partition(": ")
    if kind == "recipe" and name in recipes():
        return recipe(name), None
    run = Path(shelf.place(name if kind == "run" else ""))
    if newest(run) is None or not (run / "config.yaml").is_file():
        raise InputError(f"{run} is a flow alone, without the checkpoint of a run; only a run can go on")
    return run / "config.yaml", run


def started(shelf: Shelf, source: str, name: Any, values: Sequence[Any]) -> Start:
    """What the controls ask for.

    Raises:
        InputError: if the name is not one for a new run, or a value is not usable.
    """
    file, run = base(shelf, source)
    config = RunConfig.read(file)
    if run is None:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise InputError(f"the name of a run must be letters, digits, - and _, 64 at most, got {name!r}")
        run = runs_folder(shelf) / name
        if newest(run) is not None:
            raise InputError(f"there is a run {name} already; use another name, or go on with that one")
    before = flat(yaml.safe_load(config.to_yaml()))
    now = {option.name: option.read(value) for option, value in zip(options(), values, strict=True)}
    changes = {option: value for option, value in now.items() if value != before[option]}
    start = Start(file, run, run == file.parent, changes)
    start.config()
    return start


def budget(start: Start) -> str:
    """What the training takes, as `flowback train --dry-run` says it."""
    config = start.config()
    return str(plan(settle(config, flow=first_flow(config)[0])))


class Training:
    """A training that the studio started.

    Args:
        start: what is trained.
    """

    def __init__(self, start: Start) -> None:
        self.start, self.ending = start, False
        self._place = tempfile.TemporaryDirectory(prefix="flowback-training-")
        self.log = Path(self._place.name) / "output.txt"
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flowback", *start.words()],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, ENDS_WITH_INPUT: "1"},
                start_new_session=True,  # so that Ctrl-C reaches the studio alone, which ends it once
            )

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    @property
    def may_go_on(self) -> bool:
        """Whether it ended before its last step, with a checkpoint."""
        checkpoint = None if self.runs else newest(self.start.folder)
        return checkpoint is not None and State.read(checkpoint).step < self.start.config().train.steps

    def end(self) -> None:
        """Ask it to end, with a checkpoint."""
        self.ending = True
        assert self.process.stdin is not None
        self.process.stdin.close()

    def output(self) -> list[str]:
        """The last lines that it printed."""
        text = self.log.read_bytes()[-20_000:].decode("utf-8", "replace")
        return [plain(line) for line in text.splitlines() if line.strip()][-LINES:]


class Trainer:
    """The one training at a time of a studio, whoever looks at it."""

    def __init__(self) -> None:
        self.training: Training | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    @property
    def runs(self) -> bool:
        """Whether a training has not ended."""
        return self.training is not None and self.training.runs

    def begin(self, start: Start) -> None:
        """Start a training.

        Raises:
            InputError: if one has not ended.
        """
        with self._lock:
            if self.training is not None and self.training.runs:
                raise InputError(f"{self.training.start.folder} is in training; stop it, or wait for its end")
            self.training = Training(start)

    def end(self) -> None:
        """Ask the training to end, with a checkpoint.

        Raises:
            InputError: if there is none.
        """
        with self._lock:
            if self.training is None or not self.training.runs:
                raise InputError("nothing is in training")
            self.training.end()

    def close(self) -> None:
        """End the training and wait for it."""
        if self.training is not None and self.training.runs:
            say(f"ending the training in {self.training.start.folder}, with a checkpoint …")
            self.training.end()
            with suppress(subprocess.TimeoutExpired):
                self.training.process.wait(PATIENCE)


def progress(run: Path, training: Training | None) -> str:
    """How far a run is, in HTML: its steps, and what becomes of it."""
    rows = read_metrics(run / "metrics.csv") if (run / "metrics.csv").is_file() else []
    checkpoint, file = newest(run), run / "config.yaml"
    state = State() if checkpoint is None else State.read(checkpoint)
    steps = RunConfig.read(file).train.steps if training is None else training.start.config().train.steps
    step, seconds = max([(row["step"], row.get("seconds", 0.0)) for row in rows] + [(state.step, state.seconds)])
    text = f"{run}: step {step:,.0f} of {steps:,}, {seconds:,.0f} s of training"
    if training is None:
        return _bar(text, step, steps)
    if training.runs:
        left = f", about {(steps - step) * seconds / step:,.0f} s left" if step else ""
        what = "ending after this step, with a checkpoint" if training.ending else "in training"
        return _bar(f"{what}. {text}{left}", step, steps)
    status = training.process.returncode
    kept = "" if checkpoint is None else f"; step {state.step:,} is saved"
    what = {0: "finished", 130: "stopped"}.get(status, "stopped" if training.ending else "failed")
    return _bar(f"{what}. {text}{kept}", step, steps) + (
        f"<p role='alert'>{escape((training.output() or [f'exit status {status}'])[-1])}</p>" if what == "failed" else ""
    )


def _bar(text: str, step: float, steps: int) -> str:
    return (
        f"<p>{escape(plain(text[0].upper() + text[1:]))}</p>"
        f"<progress value='{step:.0f}' max='{steps}' style='width: 100%' aria-label='steps done'></progress>"
    )


def latest_samples(run: Path) -> str:
    """The newest picture of samples of a run, in HTML."""
    pictures = sorted((run / "samples").glob("step_????????.png"))
    if not pictures or pictures[-1].stat().st_size > LATEST:
        return "<p>No samples yet.</p>"
    text = f"samples at step {int(pictures[-1].stem[5:]):,}" if pictures[-1].stem[5:].isdecimal() else "samples"
    source = f"data:image/png;base64,{base64.b64encode(pictures[-1].read_bytes()).decode()}"
    return f"<figure><img src='{source}' alt='{text}' style='max-width: 100%'><figcaption>{text}</figcaption></figure>"


def build(studio: Studio, chosen: gr.Dropdown) -> None:
    """Add the tab to the page."""
    shelf, trainer, known = studio.shelf, Trainer(), options()
    first = RunConfig.read(recipe("digits"))
    before = flat(yaml.safe_load(first.to_yaml()))

    def sources() -> list[str]:
        return [f"recipe: {name}" for name in recipes()] + [f"run: {name}" for name in shelf.entries]

    seen, timer, values = gr.State(None), gr.Timer(EVERY), []
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            source = gr.Dropdown(
                sources(), value="recipe: digits", label="Begin with", info="a recipe, or a run to go on with"
            )
            name = gr.Textbox(
                lambda: free_name(runs_folder(shelf), "digits"),
                label="Name of the new run",
                info="letters, digits, - and _",
                max_lines=1,
                max_length=64,
            )
            for section, about in descriptions(RunConfig).items():
                if own := [option for option in known if option.name.startswith(f"{section}.")]:
                    with gr.Accordion(f"{section}: {about}", open=False, elem_classes="options"):
                        values += [option.control(before[option.name]) for option in own]
            with gr.Row():
                dry = gr.Button("Dry run", min_width=80)
                go = gr.Button("Start", variant="primary", min_width=80)
            takes = gr.Code(label="What it takes", interactive=False, show_line_numbers=False, visible=False)
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML("", elem_classes="said")
            with gr.Row():
                stop = gr.Button("Stop", interactive=False, min_width=80)
                on = gr.Button("Go on", interactive=False, min_width=80)
            column = quantity()
            plot = gr.LinePlot(x="x", y="y", height=340, buttons=["fullscreen"])
            picture = gr.HTML("")
            output = gr.Code(label="Output", interactive=False, wrap_lines=True, show_line_numbers=False)
            python, shell = same()

    def shown(start: Start) -> dict[Any, Any]:
        return {python: start.python(), shell: command("flowback", *start.words())}

    @says_problems
    def fill(source: str) -> dict[Any, Any]:
        file, run = base(shelf, source)
        found = flat(yaml.safe_load(RunConfig.read(file).to_yaml()))
        named = gr.Textbox(free_name(runs_folder(shelf), file.stem), visible=run is None)
        return {name: named, **{c: option.shown(found[option.name]) for c, option in zip(values, known, strict=True)}}

    @says_problems
    def try_out(source: str, name: str, *values: Any) -> dict[Any, Any]:
        start = started(shelf, source, name, values)
        return {takes: gr.Code(budget(start), visible=True), **shown(start)}

    @says_problems
    def begin(source: str, name: str, *values: Any) -> dict[Any, Any]:
        start = started(shelf, source, name, values)
        trainer.begin(start)
        return shown(start)

    @says_problems
    def go_on() -> dict[Any, Any]:
        if trainer.training is None:
            raise InputError("nothing was in training; choose a run to go on with")
        run = trainer.training.start.folder
        start = Start(run / "config.yaml", run, True, {})
        trainer.begin(start)
        return shown(start)

    def look(source: str, column: str, last: Any) -> Any:
        run, training = watched(shelf, trainer.training, source)
        lines = [] if training is None else training.output()
        now = (str(run), column, trainer.runs, training and training.ending, lines, run and _changed(run))
        if now == last or column not in QUANTITIES:
            return gr.skip()
        if run is None:
            return {seen: now, status: "<p>Nothing is in training.</p>"}
        try:
            _offer(shelf, run)
            log = run / "metrics.csv"
            return {
                seen: now,
                status: progress(run, training),
                plot: curves({run.name: read_metrics(log) if log.is_file() else []}, column),
                picture: latest_samples(run),
                output: "\n".join(lines),
                stop: gr.Button(interactive=trainer.runs),
                on: gr.Button(interactive=training is not None and training.may_go_on),
                go: gr.Button(interactive=not trainer.runs),
            }
        except InputError as error:  # a file was damaged meanwhile
            return {seen: now, status: f"<p role='alert'>{escape(plain(str(error)))}</p>"}

    texts = [python, shell]
    source.change(fill, source, [name, *values])
    source.focus(lambda now: gr.Dropdown([*map(str, sources())], value=now), source, source, queue=False)
    dry.click(try_out, [source, name, *values], [takes, *texts], **ONE_AT_A_TIME)
    go.click(begin, [source, name, *values], texts)
    on.click(go_on, None, texts)
    stop.click(says_problems(trainer.end), None, None)
    outputs = [seen, status, plot, picture, output, stop, on, go]
    gr.on([timer.tick, column.change], look, [source, column, seen], outputs, queue=False, show_progress="hidden")


def watched(shelf: Shelf, training: Training | None, source: str) -> tuple[Path | None, Training | None]:
    """The run that is shown, with its training: the one in training, else the chosen one, else the last trained."""
    entry = shelf.entries.get(str(source).removeprefix("run: "))
    chosen = None if entry is None or newest(Path(entry.place)) is None else Path(entry.place)
    if training is not None and (training.runs or chosen in (None, training.start.folder)):
        return training.start.folder, training
    return chosen, None


def _offer(shelf: Shelf, run: Path) -> None:
    """Have the shelf find a run once it has a checkpoint."""
    inside = [run.resolve(), *run.resolve().parents]
    if newest(run) is not None and not any(Path(place).resolve() in inside for place in shelf.places):
        shelf.places.append(str(run))


def _changed(run: Path) -> list[Any]:
    """What differs when there is something new of a run."""
    files = [run / "metrics.csv", run / "checkpoints", run / "samples"]
    return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]
