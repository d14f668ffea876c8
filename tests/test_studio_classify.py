"""Classifying on the page: the same as in Python and by the command, whatever the files are, and safely told."""

import csv
import re
import shlex
import shutil

import gradio as gr
import pytest
import torch
from PIL import Image

from builders import random_flow, tiny_autoencoder
from flowback import InputError, LatentFlow, TarFlow
from flowback.cli import main
from flowback.core.units import to_uint8
from flowback.data import as_images
from flowback.data.pictures import save_png
from flowback.latents import load_autoencoder
from flowback.measure.density import densities
from flowback.runs.checkpoint import newest
from flowback.studio import classify as tab
from flowback.studio.common import Studio, own_image, save_table, uploaded
from flowback.studio.shelf import Shelf
from flowback.tasks.classify import classify, classify_files, fit_statistics, likeliest, readable

NAMES = [str(k) for k in range(10)]


@pytest.fixture(scope="module")
def run(small_run, digits, tmp_path_factory):
    """A run whose flow has statistics of its classes, and calibrated rules."""
    run = tmp_path_factory.mktemp("classify") / "run"
    shutil.copytree(small_run, run)
    flow = TarFlow.from_pretrained(newest(run))
    x, y = digits[0][:64], digits[1][:64]
    statistics = fit_statistics(flow, x)
    for rule in ("z_score", "shortlist_3"):
        statistics.calibrate(rule, classify(flow, x, rule, statistics=statistics), y)
    statistics.save(newest(run))
    return run


@pytest.fixture(scope="module")
def flow(run):
    return TarFlow.from_pretrained(newest(run))


@pytest.fixture
def files(digits, tmp_path, monkeypatch):
    """Twenty digits as files: more than a batch."""
    monkeypatch.chdir(tmp_path)
    for i, x in enumerate(digits[0][:20]):
        save_png(to_uint8(x), tmp_path / f"{i:02d}.png")
    return [str(tmp_path / f"{i:02d}.png") for i in range(20)]


def page(flow, files, rules, top=3, draws=4):
    """The rows that the page shows, and what it says of files that cannot be read."""
    rows, unread, statistics = [], [], tab.ClassStatistics.load(flow.folder, flow.num_classes)
    for part in classify_files(flow, files, rules, draws, tab.BATCH, statistics, lambda file: uploaded(file, flow)):
        rows += tab.rows_of(flow, part, statistics, NAMES, top, draws)
        unread += part.unread
    return rows, unread


def test_the_rules_are_those_that_can_be_used(flow, small_run, run):
    assert tab.rules_for(flow) == ["shortlist_3", "single_gradient", "z_score", "exact"]
    plain = TarFlow.from_pretrained(newest(small_run))
    assert tab.rules_for(plain) == ["single_gradient", "exact"]
    assert "evaluate" in tab.costs(plain)
    assert "shortlist_3 6, single_gradient 3, z_score 3, exact 10" in tab.costs(flow)


@pytest.mark.parametrize("rule", ["single_gradient", "shortlist_3", "exact", tab.EVERY])
def test_page_python_and_command_tell_the_same(run, flow, files, rule, capsys):
    paths, rules, top, draws = tab.requested(flow, files, rule, 3, 2)
    rows, unread = page(flow, paths, rules, top, draws)
    python, commands = tab.texts(str(run), paths, rules, top, draws)
    assert not unread
    assert len(rows) == 20 * len(rules)

    told = {}
    for words in commands.splitlines():
        capsys.readouterr()
        assert main(shlex.split(words)[1:]) == 0
        *lines, kind = capsys.readouterr().out.strip().splitlines()
        told[re.search(r"by (\w+)", kind)[1]] = lines, kind
    for i, row in enumerate(rows):
        lines, kind = told[row[3]]
        form = "{:+.2f}" if row[6] == "scores" else "{:.3f}"
        best = ", ".join(f"{row[k]} {form.format(row[k + 1])}" for k in (1, 8, 10))
        file, found = lines[i // len(rules)].split(": ")
        assert file == row[0]
        assert re.sub(r"[^ ,]+(?=,|$)", "", found) == re.sub(r"[^ ,]+(?=,|$)", "", best)  # the same classes
        numbers = [[float(word.split()[1]) for word in text.split(", ")] for text in (found, best)]
        assert numbers[0] == pytest.approx(numbers[1], abs=2e-3 if row[6] != "scores" else 0.02)
        assert kind.startswith(row[6])

    printed = []
    exec(python, {"print": lambda *values: printed.append(values)})
    nats = [x for (found,) in printed[1::2] for x in found["nats_per_dim"].tolist()]
    by_rule = [
        row[4]
        for k in range(2)
        for rule in rules
        for row in rows[16 * len(rules) * k :][: 16 * len(rules)]
        if row[3] == rule
    ]
    assert [-n * flow.dims for n in nats] == pytest.approx(by_rule, abs=1e-2)


def test_likelihoods_are_of_the_class_of_the_row(flow, digits, files):
    rows, _ = page(flow, files[:4], ["exact"], 1, 1)
    x = as_images(files[:4], 8, 1)
    y = likeliest(classify(flow, x, "exact"))
    assert [row[1] for row in rows] == [NAMES[k] for k in y.tolist()]
    found = densities(flow, x, y)
    assert [row[5] for row in rows] == pytest.approx(found["bits_per_dim"].tolist(), abs=1e-4)
    titles = ["file", "class", "value", "rule", "log-likelihood (nats)", "bits/dim", "values are", "passes"]
    assert tab.header(flow, 2) == [*titles, "class 2", "value 2"]
    assert rows[0][7] == 10


def test_only_calibrated_rules_are_called_calibrated(flow, digits):
    statistics, scores = tab.ClassStatistics.load(flow.folder, 10), torch.randn(3, 10)
    kinds = {rule: readable(rule, scores, statistics)[1] for rule in tab.rules_for(flow)}
    assert kinds == {
        "z_score": "calibrated probabilities",
        "shortlist_3": "calibrated probabilities",
        "single_gradient": "scores",
        "exact": "probabilities, not calibrated",
    }


def test_files_that_cannot_be_read_are_named_and_the_others_classified(flow, files, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.new("1", (9_500, 9_500)).save(tmp_path / "huge.png")
    bad = [str(tmp_path / name) for name in ("text.png", "empty.png", "huge.png")]
    rows, unread = page(flow, [*bad, *files[:2]], ["single_gradient"])
    assert [row[0] for row in rows] == ["00.png", "01.png"]
    assert len(unread) == 3
    assert all(
        sentence.startswith(f"image {name} cannot be read")
        for sentence, name in zip(unread, ("text.png", "empty.png", "huge.png"), strict=True)
    )
    assert str(tmp_path) not in " ".join(unread)  # no place of the server
    assert page(flow, bad, ["exact"])[0] == []


def test_files_of_the_same_name_are_told_apart(flow, files, tmp_path):
    (tmp_path / "b").mkdir()
    shutil.copy(files[3], tmp_path / "b" / "00.png")
    rows, _ = page(flow, [files[0], str(tmp_path / "b" / "00.png")], ["exact", "single_gradient"])
    assert [row[0] for row in rows] == ["00.png"] * 4
    assert [row[3] for row in rows] == ["exact", "single_gradient"] * 2
    assert rows[0][5] != rows[2][5]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", " =1", "\t=1"])
def test_no_cell_is_a_formula(name, tmp_path):
    file = save_table(tmp_path / "table.csv", ["file", "value"], [[name, -1.5], ["a=b", 2]])
    with open(file, newline="") as stream:
        assert list(csv.reader(stream)) == [["file", "value"], [f"'{name}", "-1.5"], ["a=b", "2"]]


def test_what_is_told_is_no_markup(flow):
    told = tab.summary(flow, 1, ["image <img src=x>.png cannot be read\x1b"], 0.1)
    assert "<img" not in told
    assert "\x1b" not in told


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"files": None}, "1 to 500 files, got none"),
        ({"files": ["a.png"] * 501}, "1 to 500 files, got 501"),
        ({"rule": "shortlist_9"}, "the rule must be one of shortlist_3,"),
        ({"rule": None}, "the rule must be one of"),
        ({"top": 0}, "the number of classes must be"),
        ({"draws": 1.5}, "noise draws must be a whole number"),
        ({"draws": 10**9}, "noise draws must be a whole number"),
    ],
)
def test_bad_values_are_refused(flow, change, match):
    with pytest.raises(InputError, match=match):
        tab.requested(flow, **{"files": ["a.png"], "rule": "exact", "top": 3, "draws": 1} | change)


def test_an_unconditional_flow_has_likelihoods_only(tmp_path, files):
    flow = TarFlow(image_size=8, channels=1, patch_size=4, width=32, blocks=2, layers=1)
    flow.save_pretrained(tmp_path / "flow")
    flow = TarFlow.from_pretrained(tmp_path / "flow")
    assert "unconditional" in tab.costs(flow)
    paths, rules, top, draws = tab.requested(flow, files[:3], None, 3, 4)
    rows, _ = page(flow, paths, rules, top, draws)
    found = densities(flow, as_images(files[:3], 8, 1), torch.full((3,), -1))
    assert tab.header(flow, top) == ["file", "log-likelihood (nats)", "bits/dim"]
    assert [row[2] for row in rows] == pytest.approx(found["bits_per_dim"].tolist(), abs=1e-4)
    printed = []
    python, command = tab.texts(str(tmp_path / "flow"), paths, rules, top, draws)
    exec(python, {"print": printed.append})
    assert printed[0]["bits_per_dim"].tolist() == pytest.approx([row[2] for row in rows], abs=1e-4)
    assert command.startswith("# no command")


def test_likelihoods_in_latents_have_no_bits_of_pixels(tmp_path, files):
    flow = LatentFlow(
        random_flow(torch.float32, channels=3, image_size=4), load_autoencoder(str(tiny_autoencoder(tmp_path)))
    )
    _, rules, top, draws = tab.requested(flow, files[:2], "exact", 2, 1)
    (part,) = classify_files(flow, files[:2], rules, draws, tab.BATCH)
    rows = tab.rows_of(flow, part, None, NAMES, top, draws)
    assert tab.header(flow, 2)[4:6] == ["log-likelihood (nats)", "values are"]
    assert len(rows[0]) == len(tab.header(flow, 2))
    assert "latents" in tab.summary(flow, 2, [], 1)
    assert "bits" not in tab.summary(flow, 2, [], 1)


def test_an_image_of_the_flow_can_be_tried(flow, tmp_path):
    file = own_image(flow, 13, tmp_path)
    assert uploaded(file, flow).shape == (1, 1, 8, 8)
    with pytest.raises(InputError, match="there is no image yet"):
        uploaded(None, flow)


# ---- the page's own handlers -----------------------------------------------------------------------------------------


def handler(run, name, folder):
    """A handler of the tab on a flow, by its function's name: from inputs to what components show, by label, each step."""
    shelf = Shelf([str(run)], torch.device("cpu"))
    with gr.Blocks() as blocks:
        chosen = gr.Dropdown(shelf.refresh(), value=shelf.refresh()[0])
        tab.build(Studio(shelf, folder=folder), chosen)
    (found,) = (fn.fn for fn in blocks.fns.values() if fn.name == name)
    return lambda flow, *inputs: [{getattr(c, "label", None): v for c, v in step.items()} for step in found(flow, *inputs)]


def test_the_page_streams_its_table(run, files, tmp_path):
    steps = handler(run, "run", tmp_path)("run", files, tab.EVERY, 3, 1)
    assert len(steps) == 4  # begun, two batches, done
    assert len(steps[2]["A row for each file and rule"].constructor_args["value"]) == 80
    assert len(steps[2]["Images as the flow sees them"]) == 20
    (saved,) = tmp_path.glob("*/classified.csv")
    with saved.open(newline="") as stream:
        assert len(list(csv.reader(stream))) == 81


def test_the_page_says_what_is_wrong_in_a_sentence(run, tmp_path):
    with pytest.raises(gr.Error, match="1 to 500 files, got none"):
        handler(run, "run", tmp_path)("run", None, "exact", 3, 1)
    with pytest.raises(gr.Error, match="one of the list"):
        handler(run, "run", tmp_path)("/etc", None, "exact", 3, 1)
