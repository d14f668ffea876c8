"""Evaluations of any flow on any data: what they cost, what they find out first, what is kept; and what is not a number."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from builders import images, random_flow
from flowback import InputError, TarFlow, train
from flowback.data import ImageSet
from flowback.data.splits import MemorySplit, in_shares
from flowback.flow.config import FlowConfig
from flowback.measure.density import densities
from flowback.measure.probe import probe_layers
from flowback.reports import evaluate as module
from flowback.reports.classification import cost_accuracy, judged
from flowback.reports.compare import Record, crossings, figures, table, write_comparison
from flowback.reports.evaluate import EvaluationConfig, evaluate
from flowback.runs.checkpoint import load_flow, newest
from flowback.runs.config import RunConfig, TrainConfig
from flowback.runs.log import read_metrics
from flowback.tasks.classify import LEAST, ClassStatistics, class_scores, effort, fit_statistics, likeliest
from flowback.tasks.sampling import class_grid, in_turn, shown_classes

SMALL = FlowConfig(patch_size=4, width=16, head_dim=8, blocks=2, layers=1, noise_std=0.2)


def made(classes, each=2, seed=0, levels=256):
    """Random images, so many of each class in either split."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    splits = (torch.randint(levels, (len(labels), 1, 8, 8), generator=generator, dtype=torch.uint8) for _ in range(2))
    names = [f"c{k}" for k in range(classes)]
    return ImageSet("made", *(MemorySplit(images, labels) for images in splits), names, 8, 1, levels)


@pytest.fixture
def rows(monkeypatch):
    """How many rows each pass of a flow has."""
    seen, encode = [], TarFlow.encode
    monkeypatch.setattr(TarFlow, "encode", lambda self, x, *a, **k: seen.append(len(x)) or encode(self, x, *a, **k))
    return seen


# ---- cost -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**6), st.integers(0, 10**5), st.integers(1, 10**7), st.integers(1, 20), st.integers(1, 4))
def test_the_cost_of_a_measurement_is_bounded_whatever_there_is(count, classes, passes, each, draws):
    found = effort(count, classes, passes, each, draws)
    assert 1 <= found.images <= count
    assert found.passes <= max(passes, each)
    assert found.exact == 0 or min(found.images, LEAST) <= found.exact <= found.images
    if count * (each + classes * draws) <= passes:
        assert (found.images, found.exact) == (count, count if classes else 0)
    assert str(found.images) in str(found).replace(",", "")


def test_training_with_many_classes_measures_and_draws_what_its_budget_allows(tmp_path, rows, capsys):
    options = {"eval_passes": 28_000, "eval_every": 9, "sample_every": 9, "log_every": 9}
    config = RunConfig(run=str(tmp_path), flow=SMALL, train=TrainConfig(steps=1, batch_size=4, **options))
    train(config, data=made(400, 1))
    row = read_metrics(tmp_path / "metrics.csv")[-1]
    assert {"held_out_nats_per_dim", "held_out_single_gradient", "held_out_exact"} <= set(row)
    assert 25_600 < sum(rows) <= 28_000
    assert max(rows) <= 256
    assert Image.open(tmp_path / "samples" / "step_00000001.png").size[1] < 800
    said = capsys.readouterr().out
    assert "400 held-out images, exact likelihoods of 400 classes for 65 of them, 28,000 forward passes" in said
    assert "pictures of 20 classes, evenly spread" in said


def test_pictures_have_an_even_spread_of_many_classes_and_all_of_few():
    flow = random_flow(torch.float32, num_classes=57, blocks=1, layers=1)
    assert (len(shown_classes(flow)), shown_classes(flow)[0], shown_classes(flow)[-1]) == (20, 0, 56)
    assert len(class_grid(flow, 1)) == 20
    assert shown_classes(random_flow()) == [0, 1, 2, 3]
    assert (in_turn(400, 200)[:3], in_turn(400, 200)[-1]) == ((0, 2, 4), 399)
    assert (in_turn(3, 64), in_turn(0, 64), in_turn(5, -1)) == ((0, 1, 2), (-1,), (0,))


@pytest.mark.parametrize("world", [2, 5])
def test_processes_that_share_an_evaluation_measure_the_same_together(world):
    flow = random_flow(noise_std=0.2)
    x, y = images(flow, 4), torch.tensor([0, 1, 2, 3])
    shares = [slice(rank, None, world) for rank in range(world)]
    whole = densities(flow, x, y, batch_size=3)
    parts = [densities(flow, x, y, batch_size=3, own=own) for own in shares]
    for name, values in whole.items():
        found = torch.cat([part[name] for part in parts])
        assert torch.allclose(found.sort().values, values.sort().values, atol=1e-9)
    for rule in ("single_gradient", "exact"):
        scores = class_scores(flow, x, rule)
        for own in shares:
            assert torch.allclose(class_scores(flow, x, rule, own=own), scores[own], atol=1e-9)


def test_evaluate_takes_exact_likelihoods_of_fewer_images_where_there_are_many_classes(tmp_path, rows):
    data = made(300, 1)
    TarFlow(replace(SMALL, image_size=8, channels=1, num_classes=300, levels=256)).save_pretrained(tmp_path / "flow")
    config = EvaluationConfig(metrics=("accuracy",), passes=26_000)
    found = evaluate(tmp_path / "flow", config, data=data)
    of = {row["rule"]: row["images"] for row in found["classification"]}
    assert (of["exact"], of["shortlist_5"], found["held_out_images"]) == (75, 300, 300)
    assert sum(map(sum, found["judged"].get("confusion", []))) == 0
    assert max(rows) <= 256
    assert sum(rows) < 26_000 + 20_000  # statistics, and the seconds of each rule
    record = Record("a", None, None, {}, [], found)
    assert any("exact (300 passes, of 75 images)" in title for title, *_ in take(figures(record), 6))
    found = evaluate(tmp_path / "flow", replace(config, passes=6_000), data=data)
    assert "exact" not in found["accuracy"]
    assert "judged" not in found


def take(items, count):
    return [item for item, _ in zip(items, range(count), strict=False)]


# ---- labels ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 8), min_size=1, max_size=80), st.integers(1, 200), st.integers(0, 3))
def test_labels_come_in_the_shares_of_the_data(labels, count, seed):
    labels = torch.tensor(labels)
    found = in_shares(labels, count, seed)
    assert found == in_shares(labels, count, seed)
    assert len(found) == count
    for k in range(9):
        assert abs(found.count(k) - count * int((labels == k).sum()) / len(labels)) < 1


def test_fewer_samples_than_classes_are_spread_over_all():
    found = sorted(in_shares(torch.arange(400), 200))
    assert len(set(found)) == 200
    assert max(np.diff(found)) <= 3
    assert found[-1] > 390


def test_samples_have_the_shares_of_the_reference_unless_told_otherwise(tmp_path, monkeypatch):
    data = made(2, 20)
    data.train.labels = torch.tensor([0] * 38 + [1] * 2)
    TarFlow(replace(SMALL, image_size=8, channels=1, num_classes=2, levels=256)).save_pretrained(tmp_path / "flow")
    asked = []
    monkeypatch.setattr(module, "sample_to_disk", lambda flow, request, *_, **__: asked.append(request))
    monkeypatch.setattr(module.fid, "open_images", lambda path: None)
    monkeypatch.setattr(module.fid, "fidelity", lambda *_, **__: {"fid": 1.0})
    monkeypatch.setattr(module.fid, "check_extractor", lambda *_: None)
    config = EvaluationConfig(metrics=("fid",), samples=20)
    for change in ({}, {"reference": "held_out"}, {"labels": "equal", "seed": 3}):
        found = evaluate(tmp_path / "flow", replace(config, **change), data=data)["fidelity"]
        assert found["labels"] == change.get("labels", "shares")
        shutil.rmtree(tmp_path / "flow" / "evaluation")
    assert [request.labels.count(1) for request in asked] == [1, 10, 10]


# ---- what is found out first, and what is kept ----------------------------------------------------------------------


@pytest.fixture
def run(small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "run")
    return tmp_path / "run"


BPD = EvaluationConfig(metrics=("bpd",), images=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ("bpd", "is"), "samples": 9}, "is needs at least 10 samples, got 9"),
        ({"metrics": ("bpd", "fid"), "extractor_weights": "nowhere"}, "extractor weights nowhere are not a file"),
        ({"metrics": ("bpd", "fid"), "samples_from": "nowhere.npz"}, "nowhere.npz holds no samples"),
        ({"metrics": ("bpd", "fid"), "samples_from": "other_size.npz"}, "samples are of 9x9 pixels; expected 8x8"),
        ({"metrics": ("bpd",), "sweep": (0.0,), "samples": 1}, "fid needs at least 2 samples, got 1"),
        ({"metrics": ("bpd", "accuracy"), "images": 3}, "an accuracy needs at least 4 held-out images, got 3"),
    ],
)
def test_what_a_metric_lacks_is_found_out_before_any_is_measured(run, monkeypatch, change, message):
    monkeypatch.setattr(module, "_density", lambda *_: pytest.fail("measured"))
    monkeypatch.chdir(run)
    np.savez("other_size.npz", np.full((4, 9, 9, 3), 9, np.uint8))
    with pytest.raises(InputError, match=message):
        evaluate(run, EvaluationConfig(**change))


def test_an_output_that_cannot_be_written_is_found_out_before_anything_is_measured(run, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_density", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output .*file/evaluation\.json cannot be written"):
        evaluate(run, BPD, output=tmp_path / "file")
    monkeypatch.setattr("flowback.reports.compare.load_record", lambda *_: None)
    monkeypatch.setattr("flowback.reports.compare.crossings", lambda *_: pytest.fail("worked"))
    with pytest.raises(InputError, match=r"output .*file/report\.html cannot be written"):
        write_comparison([run], tmp_path / "file")


def test_what_was_measured_is_told_and_kept_when_a_later_metric_fails(run, monkeypatch):
    def fails(*_, **__):
        raise InputError("a metric failed")

    monkeypatch.setattr(module, "probe_layers", fails)
    told = []
    with pytest.raises(InputError, match="a metric failed"):
        evaluate(run, replace(BPD, metrics=("bpd", "probe")), report=told.append)
    kept = json.loads((run / "evaluation.json").read_text())
    assert kept["nats_per_dim"] == pytest.approx(told[-1]["nats_per_dim"])
    assert "8 held-out images, 16 forward passes" in told[0]["effort"]
    assert kept["seconds_of_measuring"].keys() == {"bpd"}


def test_a_flow_folder_that_is_only_read_keeps_no_evaluation_from_being_one(run, monkeypatch, tmp_path):
    def refused(*_):
        raise PermissionError(13, "Permission denied", "classification.json")

    monkeypatch.setattr(ClassStatistics, "save", refused)
    found = evaluate(run, EvaluationConfig(metrics=("accuracy",), images=8), output=tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["accuracy"] == found["accuracy"]
    assert not (run / "evaluation.json").exists()


# ---- any flow, any data ---------------------------------------------------------------------------------------------


def test_a_checkpoint_and_a_folder_of_a_flow_are_evaluated_where_they_lie(run, tmp_path):
    expected = evaluate(run, BPD)
    checkpoint = newest(run)
    assert evaluate(checkpoint, BPD)["nats_per_dim"] == expected["nats_per_dim"]
    assert (checkpoint / "evaluation.json").is_file()
    load_flow(run)[0].save_pretrained(tmp_path / "flow")
    with pytest.raises(
        InputError, match=r"no config.yaml that names its data; expected the folder of a run, or --data.name"
    ):
        evaluate(tmp_path / "flow", BPD)
    found = evaluate(tmp_path / "flow", BPD, data={"name": "digits"})
    assert found["nats_per_dim"] == expected["nats_per_dim"]
    assert (found["steps"], found["strategy"]) == (None, None)
    assert (tmp_path / "flow" / "evaluation.json").is_file()
    (tmp_path / "flow" / "classes.json").write_text("[")
    with pytest.raises(InputError, match=r"classes\.json cannot be read .*; expected a list of names"):
        evaluate(tmp_path / "flow", BPD, data={"name": "digits"})
    with pytest.raises(InputError, match="nobody/flow is no local folder; give -o"):
        evaluate("nobody/flow", BPD, data={"name": "digits"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (made(10), "the levels of the data made must be 17 for this flow, got 256"),
        (made(9, levels=17), "the number of classes of the data made must be 10 for this flow, got 9"),
        (made(10, levels=17), "classes of the data made are not those of .*classes.json: 'c0' in place of '0'"),
        (replace(made(10, levels=17), image_size=16), r"the size of the data made must be \(8, 8\) for this flow"),
    ],
)
def test_data_that_does_not_fit_the_flow_is_refused(run, data, message, tmp_path):
    with pytest.raises(InputError, match=message):
        evaluate(run, BPD, data=data, output=tmp_path)


def test_a_runs_own_images_elsewhere_keep_their_split_and_others_go_elsewhere(tmp_path):
    def tree(root, seed):
        for k, (name, image) in enumerate(zip("abab" * 4, made(2, 8, seed).train.images, strict=True)):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(root / name / f"{k}.png")

    tree(tmp_path / "here", 0)
    data = {"name": "folder", "path": str(tmp_path / "here"), "image_size": 8, "channels": 1, "split_seed": 5}
    config = RunConfig.from_yaml(json.dumps({"run": str(tmp_path / "run"), "data": data}))
    train(replace(config, flow=SMALL, train=TrainConfig(steps=1, batch_size=2, eval_images=4)))
    expected = evaluate(tmp_path / "run", BPD)
    shutil.move(tmp_path / "here", tmp_path / "there")
    found = evaluate(tmp_path / "run", BPD, data={"path": str(tmp_path / "there")})
    for name in ("held_out", "nats_per_dim", "held_out_images"):
        assert found[name] == expected[name]
    tree(tmp_path / "others", 1)
    with pytest.raises(InputError, match=r"evaluation.json is of the run's own data; give -o"):
        evaluate(tmp_path / "run", BPD, data={"path": str(tmp_path / "others")})
    before = (tmp_path / "run" / "evaluation.json").read_text()
    found = evaluate(tmp_path / "run", BPD, data={"path": str(tmp_path / "others")}, output=tmp_path / "out")
    assert found["held_out"] != expected["held_out"]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["nats_per_dim"] == found["nats_per_dim"]
    assert (tmp_path / "run" / "evaluation.json").read_text() == before


# ---- what is not a number -------------------------------------------------------------------------------------------


def test_a_score_that_is_not_a_number_never_wins():
    scores = torch.tensor([[math.nan, 1.0, 2.0], [math.inf, 3.0, 1.0], [-math.inf, -math.inf, 0.0], [math.nan] * 3])
    assert likeliest(scores).tolist() == [2, 1, 2, -1]
    found = judged(scores, torch.tensor([2, 0, 2, 0]), [10, 11, 12, 13])
    assert [row[0] for row in found["best"]] == [12, 10, 11]
    assert found["confusion"] == [[0, 1, 0], [0, 0, 0], [0, 0, 2]]


def test_figures_of_a_flow_with_numbers_that_are_none_are_of_the_others(tmp_path, monkeypatch):
    flow = random_flow(torch.float32)
    log_prob = type(flow).log_prob

    def broken(self, x, y=None):
        values = log_prob(self, x, y)
        if y is not None and not y.is_floating_point():
            values = torch.where(y == 3, math.nan, values)  # of one class
        return values

    monkeypatch.setattr(type(flow), "log_prob", broken)
    x, y = images(flow, 12), torch.arange(12) % 4
    rows, statistics, scores = cost_accuracy(flow, x, y, images(flow, 8, seed=2))
    exact = next(row for row in rows if row["rule"] == "exact")
    assert exact["not_finite"] == 12
    assert scores["exact"].isnan().any()
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    statistics.save(tmp_path)
    known = ClassStatistics.load(tmp_path, 4)
    assert known is not None
    assert known.temperatures == statistics.temperatures
    monkeypatch.setattr(type(flow), "log_prob", lambda *_: torch.full((4,), math.nan, requires_grad=True) * _[2].sum())
    with pytest.raises(InputError, match="at least 2 images with finite gradients, better some hundred, got 0"):
        fit_statistics(flow, images(flow, 4))


def test_states_that_are_not_finite_have_no_probe():
    data = made(2, 4)
    flow = TarFlow(replace(SMALL, image_size=8, channels=1, num_classes=2, levels=256))
    with torch.no_grad():
        next(flow.parameters()).fill_(math.nan)
    found = probe_layers(flow, data)
    assert found[-1]["accuracy"] is None
    record = Record("a", flow, None, {}, [], {"probe": found, "steps": 1, "seconds": 1.0, "weights": "ema"})
    assert not any(title == "best linear probe" for title, *_ in figures(record)) or found[0]["accuracy"] is not None


def test_numbers_that_are_not_finite_pass_nothing_and_are_not_the_best():
    column = "held_out_nats_per_dim"

    def record(name, *values, **evaluation):
        rows = [{"step": float(i), "seconds": float(i), column: value} for i, value in enumerate(values, start=1)]
        known = {"steps": 1, "seconds": 1.0, "weights": "ema"}
        return Record(name, torch.nn.Linear(1, 1), None, {}, rows, known | evaluation)

    pair = [record("a", 3.0, -math.inf, nats_per_dim=math.nan), record("b", 4.0, 2.0, nats_per_dim=1.0)]
    found = {(row["run"], row["passes"]): (row["value"], row["step"]) for row in crossings(pair)}
    assert found == {("a", "b"): (2.0, None), ("b", "a"): (3.0, 2.0)}
    rows = {title: (texts, best) for title, texts, best in table(pair)}
    assert rows["nats per dimension"] == (["not finite", "1.0000"], None)
