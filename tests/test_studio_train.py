"""Training in the studio: the page, Python and the command train the same; a training is started, stopped, and goes on."""

import os
import re
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flowback
from builders import SMALL_RUN
from flowback import InputError
from flowback.cli import build_parser, main
from flowback.cli.training import _run_config
from flowback.core.console import command
from flowback.runs.checkpoint import State, newest
from flowback.runs.config import RunConfig, descriptions, recipe, recipes
from flowback.studio import train
from flowback.studio.app import page
from flowback.studio.common import Studio
from flowback.studio.shelf import Shelf
from forked import Forked, program

CPU = torch.device("cpu")
SMALL = dict(word.removeprefix("--").split("=") for word in SMALL_RUN)


@pytest.fixture
def shelf(small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "runs" / "begun")
    return Shelf([str(tmp_path / "runs")], CPU)


def controls(shelf, source="recipe: digits", **changes):
    """What the controls say: of the recipe or run, but for changes (with __ for the dot)."""
    found = train.flat(train.yaml.safe_load(RunConfig.read(train.base(shelf, source)[0]).to_yaml()))
    shown = {option.name: option.shown(found[option.name]) for option in train.options()}
    assert not (unknown := {name.replace("__", ".") for name in changes} - set(shown)), unknown
    return list((shown | {name.replace("__", "."): value for name, value in changes.items()}).values())


def small(shelf, **changes):
    """The controls of a training of seconds."""
    few = {name.replace(".", "__"): value if name == "data.limit" else float(value) for name, value in SMALL.items()}
    return controls(shelf, **{**few, "alignment__strategy": "none", **changes})


def test_choices_are_those_of_the_dataclasses():
    for option in train.options():
        section, name = option.name.split(".")
        if set(option.kinds) <= {str, type(None)}:
            try:
                replace(getattr(RunConfig(), section), **{name: "?"})
                said = None
            except InputError as error:
                said = re.search(r"must be one of (.+), got '\?'", str(error))
            found = None if said is None else set(said[1].split(", ")) - {"own"}
            assert found == (set(train.CHOICES[option.name]) if option.name in train.CHOICES else None), option.name


def test_every_option_has_a_control_with_a_label_and_what_it_means():
    found = {option.name for option in train.options()}
    every = set(train.flat(train.yaml.safe_load(RunConfig().to_yaml())))
    assert found == every - {"run", *train.HIDDEN}
    defaults = train.flat(train.yaml.safe_load(RunConfig().to_yaml()))
    for option in train.options():
        control = option.control(defaults[option.name])
        assert control.label == option.name.split(".")[1]
        assert control.info
    kinds = {option.name: type(option.control(defaults[option.name])).__name__ for option in train.options()}
    assert kinds["train.hflip"] == "Checkbox"
    assert kinds["alignment.strategy"] == "Dropdown"
    assert kinds["train.lr"] == kinds["flow.blocks"] == "Number"
    assert kinds["data.limit"] == kinds["alignment.at"] == kinds["data.path"] == kinds["flow.layers"] == "Textbox"


@pytest.mark.parametrize("name", recipes())
def test_an_untouched_recipe_is_the_recipe(shelf, name):
    start = train.started(shelf, f"recipe: {name}", "new", controls(shelf, f"recipe: {name}"))
    assert start.changes == {}
    assert start.config() == replace(RunConfig.read(recipe(name)), run=str(start.folder))


CHANGES = {
    "flow__width": 32.0,
    "flow__layers": "[1, 2, 1, 2]",
    "flow__log_scale_bound": "",
    "alignment__at": "[[3, 1]]",
    "alignment__gradient": "2",
    "train__lr": 1e-5,
    "train__betas": "[0.8, 0.9]",
    "train__hflip": True,
    "train__init": "~/some where",
    "data__limit": "100",
    "data__image_size": "[8, 8]",
}


def test_page_python_and_command_train_the_same(shelf, monkeypatch):
    start = train.started(shelf, "recipe: digits", "new", controls(shelf, **CHANGES))
    assert set(start.changes) == {name.replace("__", ".") for name in CHANGES}
    config = start.config()
    assert (config.flow.layers, config.alignment.gradient, config.train.betas) == ([1, 2, 1, 2], 2, (0.8, 0.9))
    shown = shlex.split(command("flowback", *start.words()))
    assert shown[1:] == start.words()
    options = build_parser("train")[0].parse_args(shown[1:])
    by_command = _run_config(build_parser("train")[1]["train"][0].instantiate(options.train))
    given = []
    monkeypatch.setattr(flowback, "train", given.append)
    exec(start.python(), {})
    assert (
        by_command.to_yaml()
        == config.to_yaml().replace("~", str(Path.home()))
        == given[0].to_yaml().replace("~", str(Path.home()))
    )


def test_a_dry_run_says_what_the_command_says(shelf, capsys):
    start = train.started(shelf, "recipe: digits", "new", small(shelf))
    assert main([*start.words(), "--dry-run"]) == 0
    assert capsys.readouterr().out.strip() == train.budget(start)
    assert not start.folder.exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "/tmp/x", ".hidden", "-x", "x" * 65, "x y", "x\n", "é", None, "begun"])
def test_the_name_of_a_run_is_no_path(shelf, name):
    with pytest.raises(InputError, match="name"):
        train.started(shelf, "recipe: digits", name, controls(shelf))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"flow__width": 33.0}, "does not divide flow.width 33"),
        ({"flow__width": 32.5}, "width"),
        ({"flow__width": None}, "width"),
        ({"alignment__at": "[[3,"}, "alignment.at cannot be read"),
        ({"alignment__at": "x"}, "at"),
        ({"data__name": "passwd"}, "data.name must be one of"),
        ({"train__lr": -1.0}, "train.lr must be above 0"),
        ({"train__betas": "[1]"}, "betas"),
        ({"train__steps": "; rm"}, "steps"),
    ],
)
def test_values_are_refused_in_a_sentence(shelf, changes, said):
    with pytest.raises(InputError, match=said):
        train.started(shelf, "recipe: digits", "new", controls(shelf, **changes))


def test_data_are_checked_as_the_command_checks_them(shelf):
    start = train.started(
        shelf, "recipe: digits", "new", small(shelf, data__name="folder", data__path="/nothing here", data__image_size="8")
    )
    with pytest.raises(InputError, match="/nothing here"):
        train.budget(start)


@pytest.mark.parametrize("source", ["", "recipe: ../x", "recipe: nothing", "run: /etc", "run: ", "digits", None])
def test_what_to_begin_with_is_one_of_the_list(shelf, source):
    with pytest.raises(InputError, match="one of the list"):
        train.base(shelf, source)


def test_new_runs_go_where_the_studio_looks(shelf, small_run, tmp_path):
    assert train.runs_folder(shelf) == tmp_path / "runs"
    assert train.runs_folder(Shelf([str(small_run)], CPU)) == Path("runs")
    assert train.free_name(tmp_path / "runs", "begun") == "begun-2"


class Page:
    """The tab as a browser uses it: its functions by name, and what it last showed."""

    def __init__(self, shelf):
        self.blocks = page(Studio(shelf, folder=Path(shelf.places[0])))
        self.fns = {f.name: f.fn for f in self.blocks.fns.values() if f.fn and "studio.train" in f.fn.__module__}
        self.shown, self.seen = {}, None

    def look(self, source="recipe: digits"):
        result = self.fns["look"](source, "loss", self.seen)
        if isinstance(result, dict) and "__type__" not in result:
            for component, value in result.items():
                self.shown[component] = value
                self.seen = value if type(component).__name__ == "State" else self.seen
        return " ".join(str(value) for value in self.shown.values())

    def until(self, text, seconds=60):
        end = time.monotonic() + seconds
        while text not in (said := self.look()):
            assert time.monotonic() < end, said
            time.sleep(0.2)
        return said


def into(file, words):
    """The program, which writes into a file."""
    with open(file, "wb", 0) as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    return program(words)


@pytest.fixture
def forked(monkeypatch):
    """Trainings are processes of the fork server; the tests of a failing one and of the browser start true ones."""

    def start(words, *, stdout, env, **_):
        return Forked(into, stdout.name, words[words.index("flowback") + 1 :], environment=env)

    monkeypatch.setattr(train.subprocess, "Popen", start)


@pytest.mark.usefixtures("forked")
def test_a_training_starts_stops_and_goes_on(shelf, tmp_path):
    values = small(shelf, train__steps=1_000_000.0, train__log_every=1.0, train__checkpoint_every=1_000_000.0)
    first, run = Page(shelf), tmp_path / "runs" / "new"
    texts = first.fns["begin"]("recipe: digits", "new", *values)
    assert any(f"--run={run}" in text for text in texts.values())
    with pytest.raises(Exception, match="is in training; stop it"):
        first.fns["begin"]("recipe: digits", "other", *values)
    first.until("In training")
    first.until("step 1")
    first.fns["end"]()
    said = first.until("Stopped")
    step = State.read(newest(run)).step
    assert f"step {step:,} is saved" in said
    assert "--train.resume" in str(first.fns["go_on"]())
    first.until(f"resumed from step {step}")
    first.until("In training")
    first.fns["end"]()
    first.until("Stopped")
    with pytest.raises(Exception, match="nothing is in training"):
        first.fns["end"]()
    assert State.read(newest(run)).step > step
    assert "runs/new" in shelf.refresh()
    assert "begun: step 2 of 2" in first.look("run: runs/begun")
    start = train.started(shelf, "run: runs/new", None, controls(shelf, "run: runs/new", train__eval_images=10.0))
    assert start.resume
    assert start.changes == {"train.eval_images": 10}
    assert "1,000,000" in Page(shelf).look("run: runs/new")  # of another page, which started nothing


def test_a_training_that_fails_says_why(shelf, tmp_path):
    tab = Page(shelf)
    tab.fns["begin"](
        "recipe: digits", "new", *small(shelf, data__name="folder", data__path="/nothing <b>here", data__image_size="8")
    )
    said = tab.until("Failed")
    assert "/nothing &lt;b&gt;here" in said
    assert not (tmp_path / "runs" / "new").exists()


def test_options_come_in_the_order_in_which_the_page_has_their_controls():
    sections = list(dict.fromkeys(option.name.split(".")[0] for option in train.options()))
    assert sections == [section for section in descriptions(RunConfig) if section in sections]
