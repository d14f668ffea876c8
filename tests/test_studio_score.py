"""Scoring on the page: the same as in Python and by the command, and decisions that follow from the figures."""

import csv
import shlex
import shutil

import gradio as gr
import pytest
import torch
from PIL import Image

from flowback import InputError, TarFlow, score
from flowback.cli import main
from flowback.core.units import to_uint8
from flowback.data.pictures import save_png
from flowback.runs.checkpoint import newest
from flowback.studio import score as tab
from flowback.studio.common import Studio
from flowback.studio.shelf import Shelf
from flowback.tasks.classify import ClassStatistics, classify, fit_statistics, read_files
from flowback.tasks.score import HeldOut

NAMES = [str(k) for k in range(10)]
USUAL = {"alarms": 0.05, "least": 0.5, "a": tab.LIKELIEST, "b": tab.OTHER}


@pytest.fixture(scope="module")
def run(small_run, trained, digits, tmp_path_factory):
    """A run whose flow is trained, calibrated, and knows the densities of held-out images."""
    run = tmp_path_factory.mktemp("score") / "run"
    shutil.copytree(small_run, run)
    folder, (x, y) = newest(run), digits
    trained.save_pretrained(folder)
    HeldOut.fit(score(trained, x[1500:1600], draws=2), score(trained, x[:200], draws=2)).save(folder)
    statistics = fit_statistics(trained, x[:64])
    statistics.calibrate("exact", classify(trained, x[1500:1600], "exact"), y[1500:1600])
    statistics.save(folder)
    return run


@pytest.fixture(scope="module")
def flow(run):
    return TarFlow.from_pretrained(newest(run))


@pytest.fixture
def files(digits, tmp_path, monkeypatch):
    """Twenty digits as files, more than a batch, the last of which is noise."""
    monkeypatch.chdir(tmp_path)
    noise = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for i, x in enumerate([*digits[0][1600:1619], noise]):
        save_png(to_uint8(x), tmp_path / f"{i:02d}.png")
    return [str(tmp_path / f"{i:02d}.png") for i in range(20)]


def asked(flow, files, **change):
    return tab.requested(flow, NAMES, files, *(USUAL | change).values())


def page(flow, wanted):
    """The rows that the page shows."""
    statistics = ClassStatistics.load(flow.folder, flow.num_classes)
    names = NAMES[: flow.num_classes]
    return [
        row
        for paths, x, _ in read_files(flow, wanted.files, tab.BATCH)
        for row in tab.rows_of(flow, score(flow, x, batch_size=tab.BATCH), statistics, paths, names, wanted)
    ]


@pytest.mark.parametrize("change", [{}, {"a": "3"}, {"a": "3", "b": "8", "alarms": 0.2}], ids=str)
def test_page_python_and_command_tell_the_same(run, flow, files, change, tmp_path, capsys):
    wanted = asked(flow, files, **change)
    rows = page(flow, wanted)
    python, command = tab.texts(flow, str(run), wanted)
    assert main(shlex.split(command)[1:]) == 0
    assert f"{sum(row['outlier'] == 'True' for row in rows)} of 20 images are outliers" in capsys.readouterr().out
    with (tmp_path / "scores.csv").open(newline="") as stream:
        told = list(csv.DictReader(stream))
    assert len(rows) == len(told) == 20
    for row, line in zip(rows, told, strict=True):
        for title, value in line.items():
            assert row[title] == (pytest.approx(float(value), abs=2e-4) if isinstance(row[title], float) else value)

    printed = []
    exec(python, {"print": lambda *values: printed.append(values)})
    by_python = [row for _, found in printed[0::3] for row in found]
    assert [row["typicality"] for row in rows] == pytest.approx([row["typicality"] for row in by_python], abs=1e-4)
    sums = [nats for (found,) in printed[2::3] for nats in found.sum(dim=(1, 2)).tolist()]
    assert [row["evidence"] for row in rows] == pytest.approx(sums, abs=1e-3)
    anomaly = torch.cat([found for (found,) in printed[1::3]])
    assert anomaly.shape == (20, *flow.grid)


def test_evidence_is_the_log_odds_of_the_classes_of_the_row(flow, files):
    (_, x, _), *_ = read_files(flow, files, 16)
    found = score(flow, x, batch_size=16)
    for change in ({}, {"b": "0"}, {"a": "7"}):
        for i, row in enumerate(page(flow, asked(flow, files[:16], **change))):
            a, b = int(row["for"]), int(row["against"])
            assert a != b or change
            odds = found.class_log_prob[i, a] - found.class_log_prob[i, b]
            assert row["evidence"] == pytest.approx(float(odds), abs=1e-3)
            others = sorted(range(10), key=lambda k: -found.class_log_prob[i, k])
            assert row["for"] == change.get("a", NAMES[others[0]])
            assert row["against"] == change.get("b", NAMES[next(k for k in others if k != a)])


def test_it_does_not_know_what_is_unusual_or_unsure(flow, files):
    rows = page(flow, asked(flow, files, least=0.9))
    assert rows[-1]["decision"] == "does not know: unusual"  # noise
    statistics = ClassStatistics.load(flow.folder, 10)
    (_, x, _), *_ = read_files(flow, files, 16)
    sure = statistics.probabilities("exact", score(flow, x, batch_size=16).class_log_prob).amax(dim=1)
    for row, probability in zip(rows, sure.tolist(), strict=False):
        assert row["probability"] == pytest.approx(probability, abs=1e-4)
        unusual = row["typicality"] <= 0.05
        expected = "does not know: unsure" if probability < 0.9 else row["class"]
        assert row["decision"] == ("does not know: unusual" if unusual else expected)
    assert {row["decision"] for row in rows[:16]} >= {"does not know: unsure", "4"}
    assert page(flow, asked(flow, files, least=0))[0]["decision"] == rows[0]["class"]


def test_maps_are_red_where_an_image_was_changed(flow, files):
    (_, x, _), *_ = read_files(flow, files[:1], 16)
    changed = x.clone()
    changed[:, :, :4, :4] = -changed[:, :, :4, :4]  # the first token
    maps = tab.maps_of(score(flow, torch.cat([x, changed]), batch_size=16), torch.cat([x, changed]), asked(flow, files))
    assert maps.keys() == {"anomaly", "evidence"}
    red = (maps["anomaly"].float()[:, 0] - maps["anomaly"].float()[:, 2])[:, :4, :4].mean(dim=(1, 2))
    assert red[1] > red[0] + 30
    colored = maps["evidence"].float()
    assert (colored[:, 0] - colored[:, 2]).abs().amax(dim=(1, 2)).min() > 100  # somewhere at full color


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"alarms": 0.009}, r"from 0\.0099, for 100 held-out images"),
        ({"alarms": None}, "the share of false alarms must be a number"),
        ({"least": 2}, "the probability must be a number of 0 to 1"),
        ({"a": tab.OTHER}, "class a must be one of the list"),
        ({"b": "/etc"}, "class b must be one of the list"),
        ({"b": None}, "class b must be one of the list"),
    ],
)
def test_bad_values_are_refused(flow, change, match):
    with pytest.raises(InputError, match=match):
        asked(flow, ["a.png"], **change)


def test_a_flow_that_was_not_evaluated_says_what_to_do(small_run, files):
    flow = TarFlow.from_pretrained(newest(small_run))
    assert "no typicality" in tab.told(flow)
    assert "evaluate" in tab.told(flow)
    (row,) = page(flow, asked(flow, files[:1], least=1))
    assert not {"typicality", "outlier"} & row.keys()
    assert row["decision"] == "does not know: unsure"
    (_, x, _), *_ = read_files(flow, files[:1], 16)
    assert tab.maps_of(score(flow, x), x, asked(flow, files)).keys() == {"evidence"}


def test_an_unconditional_flow_has_no_classes_and_no_evidence(tmp_path, files, digits):
    flow = TarFlow(image_size=8, channels=1, patch_size=4, width=32, blocks=2, layers=1)
    flow.save_pretrained(tmp_path / "flow")
    HeldOut.fit(score(flow, digits[0][:50]), score(flow, digits[0][50:200])).save(tmp_path / "flow")
    flow = TarFlow.from_pretrained(tmp_path / "flow")
    assert "unconditional" in tab.told(flow)
    wanted = tab.requested(flow, [], files[:2], 0.05, 0.5, None, None)
    rows = page(flow, wanted)
    assert list(rows[0]) == ["file", "log_prob", "nats_per_dim", "bits_per_dim", "typicality", "outlier"]
    printed = []
    python, _ = tab.texts(flow, str(tmp_path / "flow"), wanted)
    exec(python, {"print": lambda *values: printed.append(values)})
    assert [row["log_prob"] for row in printed[0][1]] == pytest.approx([row["log_prob"] for row in rows], abs=1e-3)
    assert len(printed) == 2


# ---- the page's own handlers -----------------------------------------------------------------------------------------


def handler(run, name, folder):
    """A handler of the tab on a flow, by its function's name: from inputs to what components show, by label, each step."""
    shelf = Shelf([str(run)], torch.device("cpu"))
    with gr.Blocks() as blocks:
        chosen = gr.Dropdown(shelf.refresh(), value=shelf.refresh()[0])
        tab.build(Studio(shelf, folder=folder), chosen)
    (found,) = (fn.fn for fn in blocks.fns.values() if fn.name == name)
    return lambda flow, *inputs: [{getattr(c, "label", None): v for c, v in step.items()} for step in found(flow, *inputs)]


def test_the_page_streams_its_table_and_names_files_that_cannot_be_read(run, files, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (5, 9)).save(tmp_path / "=1.png")
    work = handler(run, "run", tmp_path)
    steps = work("run", [*files, str(tmp_path / "text.png"), str(tmp_path / "=1.png")], *USUAL.values())
    assert len(steps) == 4  # begun, two batches, done
    table = steps[2]["A row for each file"].constructor_args
    assert len(table["value"]) == 21
    assert dict(zip(table["headers"], table["datatype"], strict=True))["typicality"] == "number"
    assert len(steps[2]["Where images are unusual: red"]) == len(steps[2]["What speaks for a, red, and for b, blue"]) == 21
    assert "image text.png cannot be read" in steps[3][None]
    assert "21 files in" in steps[3][None]
    (saved,) = tmp_path.glob("*/scores.csv")
    with saved.open(newline="") as stream:
        lines = list(csv.reader(stream))
    assert len(lines) == 22
    assert lines[-1][0] == "'=1.png"
    only = work("run", [str(tmp_path / "text.png")], *USUAL.values())
    assert "0 files" in only[-1][None]


def test_the_page_says_what_is_wrong_in_a_sentence(run, tmp_path):
    with pytest.raises(gr.Error, match="1 to 500 files, got none"):
        handler(run, "run", tmp_path)("run", None, *USUAL.values())
