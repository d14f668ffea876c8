"""Two flows compared in the studio: the page, Python and the command say and draw the same."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowback import InputError
from flowback.cli import main
from flowback.runs.log import read_metrics
from flowback.studio import compare, draw
from flowback.studio.app import page
from flowback.studio.common import Studio
from flowback.studio.shelf import Shelf
from flowback.tasks.sampling import as_pixels

CPU = torch.device("cpu")
# method, classes, number, guidance, temperature, rule, prior, denoise, seed
VALUES = ("auto", ["3", "7"], 6, 1.5, 0.9, "linear", "standard", True, 5)


@pytest.fixture(scope="module")
def runs(small_run, tmp_path_factory):
    """A folder of two runs that were evaluated, one that was not, and a flow of other images."""
    folder = tmp_path_factory.mktemp("compared")
    found = {"steps": 2, "seconds": 1.0, "strategy": "none", "weights": "ema", "data": "digits", "held_out_images": 20}
    for name, nats in (("aligned", 0.5), ("plain", 0.6)):
        shutil.copytree(small_run, folder / "both" / name)
        (folder / "both" / name / "evaluation.json").write_text(json.dumps({**found, "nats_per_dim": nats}))
    config = folder / "both" / "aligned" / "config.yaml"
    config.write_text(config.read_text().replace("\n  seed: 0", "\n  seed: 1"))
    shutil.copytree(small_run, folder / "raw")
    shutil.copytree(small_run, folder / "<b>named")
    (folder / "<b>named" / "classes.json").write_text(json.dumps(list("abcdefghi<")))
    return folder


@pytest.fixture
def shelf(runs):
    return Shelf([str(runs)], CPU)


@pytest.fixture
def both(runs):
    return [f"{runs.name}/both/{name}" for name in ("plain", "aligned")]


def handler(blocks, name):
    """The function of the page of that name, in this tab."""
    return next(f.fn for f in blocks.fns.values() if f.name == name and "studio.compare" in f.fn.__module__)


def by_label(blocks, result):
    """What a handler returned, by the labels of the components."""
    return {component.label: value for component, value in result.items() if hasattr(component, "label")}


def test_the_sibling_is_offered_first(shelf, runs, both):
    entries = list(shelf.entries.values())
    assert compare.sibling(entries, both[0]) == both[1]
    assert compare.sibling(entries, f"{runs.name}/raw") == f"{runs.name}/<b>named"
    assert compare.sibling(entries[:1], entries[0].name) is None


def test_page_python_and_command_draw_the_same(shelf, both, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = compare.records(shelf, both)
    request = draw.requested(shelf.classes(both[0]), *VALUES[1:])
    parts = list(compare.pairs([record.flow for record in found], request))
    assert all(torch.equal(a.z, b.z) for a, b in parts)
    python, commands = compare.texts(found, request, "auto")
    exec(python.replace(".png", ".npz"), {})
    assert (tmp_path / "comparison" / "report.html").is_file()
    *draws, reported = [shlex.split(line)[1:] for line in commands.splitlines()]
    for i, words in enumerate(draws):
        assert main([*words, "-o", f"command_{i}.npz"]) == 0
        by_python, by_command = (np.load(file)["arr_0"] for file in (f"samples_{i}.npz", f"command_{i}.npz"))
        page_ = as_pixels(torch.cat([part[i].x for part in parts])).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(by_python, by_command)
        assert np.abs(page_.astype(int) - by_command.astype(int)).max() <= 1  # batches of another size: rounding
    assert reported[0] == "compare"
    assert reported[1:3] == [shelf.place(name) for name in both]


def test_the_page_compares(runs, shelf, both):
    with Studio(shelf) as studio:
        blocks = page(studio)
        steps = list(handler(blocks, "compare")(*both, "held_out_exact", "step", *VALUES))
        first, last = by_label(blocks, steps[0]), by_label(blocks, steps[-1])
        galleries = by_label(blocks, steps[-2])
        captions = [[text for _, text in galleries[name]] for name in ("The chosen flow", "The other flow")]
        assert captions[0] == captions[1] == [f"#{i}, {'37'[i % 2]}" for i in range(6)]
        html = " ".join(value for value in steps[0].values() if isinstance(value, str))
        assert "<th scope='row'>nats per dimension</th><td>0.6000</td><td><b>0.5000</b></td>" in html
        assert "train.seed" in html
        assert "flowback compare" in first["command"]
        pairs, curves = (file for file in last["Download"].value)
        width = Image.open(pairs["path"]).width
        assert width == 2 + 2 * draw.columns(6) * (32 + 2)
        rows = list(csv.DictReader(Path(curves["path"]).read_text("utf-8").splitlines()))
        assert {row["run"] for row in rows} == {"plain", "aligned"}
        assert len(rows) == 2 * len(read_metrics(runs / "both" / "plain" / "metrics.csv"))


def test_figures_are_those_of_the_report(shelf, both, tmp_path):
    assert main(["compare", *map(shelf.place, both), f"--output={tmp_path / 'report'}"]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    found = compare.records(shelf, both)
    assert report["config_differences"] == {"train.seed": [0, 1]} == compare.config_differences(found)
    assert [record.evaluation for record in found] == [report["plain"], report["aligned"]]
    html = (tmp_path / "report" / "report.html").read_text()
    for title, texts, _ in compare.table(found):
        assert title in html
        assert all(text in html for text in texts)


def test_runs_that_were_not_evaluated_are_compared_as_far_as_known(shelf, runs, both):
    found = compare.records(shelf, [both[0], f"{runs.name}/raw"])
    assert any("raw was not evaluated" in text for text in compare.remarks(found))
    table = {title: texts for title, texts, _ in compare.table(found)}
    assert table["nats per dimension"] == ["0.6000", "-"]
    assert table["training steps"] == ["2", "2"]
    request = draw.requested(shelf.classes(both[0]), *VALUES[1:])
    for text in compare.texts(found, request, "auto"):
        assert "comparison" not in text


def test_what_cannot_be_compared_is_refused(shelf, runs, both):
    named = f"{runs.name}/<b>named"
    with pytest.raises(InputError, match=re.escape("must have the same classes, got 0, 1, 2")):
        compare.check_pair(shelf, [both[0], named], ["plain", "named"])
    with pytest.raises(InputError, match="given twice"):
        compare.records(shelf, [both[0], both[0]])
    with pytest.raises(InputError, match="no other flow"):
        compare.records(shelf, [both[0], None])
    with pytest.raises(InputError, match="one of the list"):
        compare.records(shelf, [both[0], "/etc"])
    for column, against in (("step; drop", "step"), ("loss", "lr"), (None, "step")):
        with pytest.raises(InputError, match="one of the list"):
            compare.points({}, column, against)


def test_names_are_no_markup(shelf, runs, both):
    found = compare.records(shelf, [both[0], f"{runs.name}/<b>named"])
    assert "<b>n" not in compare.as_table([record.name for record in found], compare.table(found), "figures")
    assert "<b>n" not in compare.differences(found)


def test_long_curves_are_thinned_and_keep_their_end():
    rows = [{"step": float(i), "loss": 1 / (i + 1)} for i in range(12_345)] + [{"step": 12_345.0, "loss": float("nan")}]
    found = compare.points({"a": rows, "b": []}, "loss")
    assert len(found) <= compare.POINTS
    assert found["x"].iloc[-1] == 12_344
    assert found["x"].is_monotonic_increasing
