"""Comparisons of runs: what differs, who passes whom, what must not be put side by side; and probes, and the IW bound."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch

from builders import SMALL_RUN, images, random_flow, refuse
from flowback import InputError, LatentFlow, TarFlow
from flowback.cli import main
from flowback.core.units import bits_per_dim
from flowback.data import DataConfig, load_data
from flowback.latents import AutoencoderConfig
from flowback.measure.density import density, importance_weighted_bits
from flowback.measure.probe import probe_layers
from flowback.reports.classification import CURVE, cost_accuracy
from flowback.reports.compare import Record, config_differences, crossings, names_of, not_comparable, table
from flowback.reports.figures import draw_curves
from flowback.tasks.classify import calibration_error

FIDELITY = {"fid": 12.0, "extractor": "inception", "samples": 9}
SMALL = [*SMALL_RUN, "--train.eval_every=2"]


def record(name, rows=(), config=None, evaluation=None):
    return Record(name, None, None, config or {}, list(rows), evaluation or {})


def rows(*values, column="held_out_exact", seconds=10):
    return [{"step": 100.0 * (i + 1), "seconds": seconds * (i + 1.0), column: v} for i, v in enumerate(values)]


def test_a_crossing_is_the_first_evaluation_that_is_as_good_as_the_others_last():
    plain, aligned = record("plain", rows(0.1, 0.3, 0.5)), record("aligned", rows(0.2, 0.5, 0.4, seconds=30))
    found = {(row["run"], row["passes"]): row for row in crossings([plain, aligned])}
    passed = found["aligned", "plain"]
    assert (passed["step"], passed["seconds"], passed["value"], passed["speed_up"]) == (200, 60, 0.5, 1.5)
    assert found["plain", "aligned"]["step"] == 300
    never = crossings([record("plain", rows(0.9)), record("aligned", rows(0.1, 0.2))])
    assert {row["run"]: row["step"] for row in never} == {"plain": 100, "aligned": None}


def test_smaller_is_better_for_nats():
    column = "held_out_nats_per_dim"
    pair = [record("a", rows(0.5, 0.2, column=column)), record("b", rows(0.3, 0.1, column=column))]
    assert {row["run"]: row["step"] for row in crossings(pair)} == {"a": None, "b": 200}


def test_differences_of_configurations_are_those_of_options():
    first = record("a", config={"run": "x", "train.lr": 1e-3, "flow.width": 32})
    second = record("b", config={"run": "y", "train.lr": 1e-3, "flow.width": 64, "alignment.weight": 0.5})
    assert config_differences([first, second]) == {"flow.width": [32, 64], "alignment.weight": [None, 0.5]}


def test_figures_that_do_not_compare_are_named():
    def measured(**fidelity):
        known = {"extractor": "inception", "samples": 4096, "reference": "x", "guidance": 0.0}
        return record("a", evaluation={"data": "digits", "fidelity": known | fidelity})

    assert not_comparable([measured(), measured()]) == []
    assert "extractor (inception, dinov2)" in not_comparable([measured(), measured(extractor="dinov2")])[0]
    assert "samples (4096, 100)" in not_comparable([measured(), measured(samples=100)])[0]
    assert "different data sets" in not_comparable([record("a", evaluation={"data": "x"}), record("b")])[0]
    noisier = record("b", config={"flow.noise_std": 0.2})
    assert "nats do not compare" in not_comparable([record("a", config={"flow.noise_std": 0.1}), noisier])[0]


def test_runs_have_names_of_their_own_in_the_report(tmp_path):
    assert names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    same = [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run"), str(tmp_path / "machine")]
    assert names_of([*same, tmp_path / "a"]) == [*same, "a"]
    with pytest.raises(InputError, match="twice"):
        names_of([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_the_table_names_the_best_of_figures_that_all_runs_have():
    known = {"steps": 4, "seconds": 1.0, "weights": "ema", "probe": []}
    pair = [record("a", evaluation=known | {"nats_per_dim": 0.5, "bits_per_dim": None})]
    pair += [record("b", evaluation=known | {"nats_per_dim": 0.25, "bits_per_dim": 3.0, "fidelity": FIDELITY})]
    for own in pair:
        own.flow = torch.nn.Linear(1, 1)
    rows = {title: (texts, best) for title, texts, best in table(pair)}
    assert rows["nats per dimension"] == (["0.5000", "0.2500"], 1)
    assert rows["bits per dimension (upper bound)"] == (["not finite", "3.000"], None)
    assert rows["FID (inception, 9 samples)"] == (["-", "12.000"], None)
    assert rows["training steps"] == (["4", "4"], None)


# ---- density --------------------------------------------------------------------------------------------------------


def mean_of(times, measure, flow, x, y, *draws):
    """What is measured of the same images many times, each time with other noise."""
    return measure(flow, x.repeat(times, 1, 1, 1), y.repeat(times), *draws, batch_size=2000)


def test_the_importance_weighted_bound_comes_down_to_the_models_own_bits():
    """One pixel of four levels: the probability of each by integration over its bin."""
    flow = random_flow(image_size=1, channels=1, patch_size=1, blocks=1, num_classes=0, levels=4, noise="uniform")
    x = (2 * torch.tensor([0.0, 1, 2, 3], dtype=torch.float64) + 1).view(4, 1, 1, 1) / 4 - 1
    y = torch.full((4,), -1)
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000 - 0.5
    inside = (x.view(4, 1) + 0.5 * grid).view(-1, 1, 1, 1)
    with torch.no_grad():
        probability = flow.log_prob(inside).exp().view(4, 2000).mean(1) * 0.5
    exact = float(-probability.log2().mean())
    bounds = {draws: mean_of(300, importance_weighted_bits, flow, x, y, draws) for draws in (1, 8)}
    assert bounds[1] > bounds[8] > exact - 2e-3
    assert mean_of(10, importance_weighted_bits, flow, x, y, 400) == pytest.approx(exact, abs=2e-3)


def test_one_draw_is_the_usual_bound():
    flow = random_flow(levels=16)
    x, y = images(flow, 5), torch.zeros(5, dtype=torch.long)
    usual = mean_of(200, density, flow, x, y)["bits_per_dim"]
    assert mean_of(200, importance_weighted_bits, flow, x, y, 1) == pytest.approx(usual, abs=0.02)


def test_the_density_of_noised_images_is_not_called_bits():
    with pytest.raises(InputError, match="density of images with gaussian noise is not bits per dimension"):
        bits_per_dim(torch.zeros(1), 4, 256, noise="gaussian")
    assert bits_per_dim(torch.zeros(1), 4, 256) == pytest.approx(math.log2(128))


# ---- classification and probes --------------------------------------------------------------------------------------


def test_the_cost_accuracy_table_has_calibration_errors_of_images_that_calibrated_nothing(trained, digits):
    x, y = digits[0][1500:1600], digits[1][1500:1600]
    table, statistics, scores = cost_accuracy(trained, x, y, digits[0][:500], seed=3)
    assert [row["rule"] for row in table] == list(CURVE)
    assert set(statistics.temperatures) == set(CURVE)
    accuracy = {row["rule"]: row["accuracy"] for row in table}
    assert accuracy["shortlist_5"] >= accuracy["z_score"] - 0.02
    assert accuracy["exact"] > 0.8
    for row in table:
        assert row["images"] == 100
        assert row["temperature"] > 0
        assert 0 <= row["ece_after"] <= 1
        assert row["accuracy"] == pytest.approx(float((scores[row["rule"]].argmax(1) == y).double().mean()))
    exact = next(row for row in table if row["rule"] == "exact")
    assert exact["ece_after"] < 0.15
    others = torch.randperm(100, generator=torch.Generator().manual_seed(3))[25:]
    found = calibration_error(statistics.probabilities("exact", scores["exact"][others]), y[others])
    assert exact["ece_after"] == pytest.approx(found)
    with pytest.raises(InputError, match="at least 4 held-out images, got 3"):
        cost_accuracy(trained, x[:3], y[:3], x)


def test_probes_see_classes_where_there_are_some():
    data = load_data(DataConfig())
    flow = TarFlow(image_size=8, channels=1, patch_size=2, width=32, blocks=2, layers=2, levels=17, num_classes=10)
    found = probe_layers(flow, data, training_images=400, images=150)
    assert [(row["block"], row["layer"]) for row in found] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(0.3 < row["accuracy"] <= 1 for row in found)  # random features of digits; chance is 0.1
    data.train.labels = data.train.labels[torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))]
    shuffled = probe_layers(flow, data, training_images=400, images=150)
    assert all(row["accuracy"] < 0.3 for row in shuffled)


# ---- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWBACK_CACHE", str(root / "cache"))
        more = ",fid,kid,prc,is", "--samples=12", "--sweep=0,1"
        for name, steps, (metrics, *options) in (("short", 4, more), ("long", 8, ("",))):
            assert main(["train", f"--run={root / name}", f"--train.steps={steps}", *SMALL]) == 0
            measured = f"--metrics=bpd,accuracy,probe{metrics}"
            assert main(["evaluate", str(root / name), measured, "--images=40", *options]) == 0
    return root


def test_evaluate_measures_what_was_asked_for(runs):
    found = json.loads((runs / "short" / "evaluation.json").read_text())
    assert set(found["accuracy"]) == set(CURVE)
    assert found["bits_per_dim_importance_weighted"] < found["bits_per_dim"] + 0.1
    assert (found["steps"], found["strategy"], found["gradient"], found["noise_draws"]) == (4, "none", None, 1)
    assert found["seconds"] > 0
    assert sum(map(sum, found["judged"]["confusion"])) == found["held_out_images"] == 40
    assert all(len(found["judged"][which]) == 8 for which in ("best", "worst", "doubtful"))
    assert found["typicality"]["images"] == 40
    assert len(found["probe"]) == 2
    f = found["fidelity"]
    assert (f["extractor"], f["samples"], f["guidance"]) == ("efficientnet_lite0", 12, 0.0)
    assert f["reference"].startswith("digits-train-12-8-")
    assert {"fid", "kid", "precision", "recall", "is"} <= set(f)
    assert [row["guidance"] for row in found["guidance_sweep"]] == [0, 1]
    assert set(found["seconds_of_measuring"]) == {
        "bpd",
        "accuracy",
        "typicality",
        "probe",
        "fidelity",
        "guidance_sweep",
    }
    assert len(list(runs.glob("short/checkpoints/*/classification.json"))) == 1
    assert (runs / "short" / "report.html").is_file()


def test_what_was_measured_before_stays_unless_it_was_of_other_images(runs, tmp_path):
    shutil.copytree(runs / "long", tmp_path / "long")
    file = tmp_path / "long" / "evaluation.json"
    before = json.loads(file.read_text())
    main(["evaluate", str(tmp_path / "long"), "--metrics=bpd", "--images=40"])
    after = json.loads(file.read_text())
    assert after["probe"] == before["probe"]
    assert after["seconds_of_measuring"].keys() == before["seconds_of_measuring"].keys()
    main(["evaluate", str(tmp_path / "long"), "--metrics=bpd", "--images=30"])
    assert "probe" not in json.loads(file.read_text())


def test_samples_on_disk_are_measured(runs, capsys):
    folder = runs / "pngs"
    main(["sample", str(runs / "short"), "--num=12", "-o", str(folder)])
    file = runs / "short" / "evaluation.json"
    before = file.read_text()
    assert main(["evaluate", str(runs / "short"), "--metrics=fid", f"--samples-from={folder}"]) == 0
    found, drawn = json.loads(file.read_text())["fidelity"], json.loads(before)["fidelity"]
    assert found["fid"] == pytest.approx(drawn["fid"], rel=1e-3)
    assert (found["guidance"], drawn["guidance"]) == (None, 0)
    file.write_text(before)


def test_compare_writes_one_page_that_needs_nothing_else(runs, capsys):
    assert main(["compare", str(runs / "short"), str(runs / "long"), "-o", str(runs / "both")]) == 0
    page = (runs / "both" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    for word in ("short", "long", "train.steps", "importance-weighted", "shortlist 3", "best linear probe", "never"):
        assert word in page
    report = json.loads((runs / "both" / "report.json").read_text())
    assert set(report) == {"data", "machine", "short", "long", "config_differences", "crossings", "not_comparable"}
    assert report["data"] == "digits"
    assert report["long"] == json.loads((runs / "long" / "evaluation.json").read_text())
    assert report["config_differences"] == {"train.steps": [4, 8]}
    assert report["not_comparable"] == []
    assert report["long"]["steps"] == 8
    assert (runs / "both" / "overview.png").is_file()


def test_classify_prints_calibrated_probabilities_after_an_evaluation(runs, capsys):
    main(["sample", str(runs / "long"), "--num=1", "-o", str(runs / "one")])
    capsys.readouterr()
    assert main(["classify", str(runs / "long"), str(runs / "one" / "000000.png"), "--top=2"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r".*000000\.png: \d 0\.\d{3}, \d 0\.\d{3}", lines[0])
    assert lines[1] == "calibrated probabilities, by shortlist_3"


def test_an_evaluation_of_an_earlier_version_is_measured_again(runs, tmp_path, capsys):
    shutil.copytree(runs / "short", tmp_path / "short")
    file = tmp_path / "short" / "evaluation.json"
    found = json.loads(file.read_text())
    old = {name: value for name, value in found.items() if name not in ("steps", "strategy", "gradient", "judged")}
    file.write_text(json.dumps(old | {"seconds": old.pop("seconds_of_measuring")}))
    assert "lacks steps, strategy" in (line := refuse(["compare", str(tmp_path / "short")], capsys))
    assert "evaluate the run again" in line
    assert main(["evaluate", str(tmp_path / "short"), "--metrics=bpd", "--images=40"]) == 0
    assert json.loads(file.read_text())["probe"] == found["probe"]


def test_a_run_that_was_not_evaluated_is_sent_to_evaluate(tmp_path, capsys):
    assert main(["train", f"--run={tmp_path}", "--train.steps=1", *SMALL]) == 0
    message = "has no evaluation.json; expected runs on which `flowback evaluate` was run"
    assert message in refuse(["compare", str(tmp_path)], capsys)


def test_likelihoods_of_different_latents_are_never_put_side_by_side(tmp_path):
    def latent(run, folder, **facts):
        flow = LatentFlow.__new__(LatentFlow)
        torch.nn.Module.__init__(flow)
        flow.autoencoder = torch.nn.Linear(1, 1)
        known = {"name": "vae", "channels": 3, "downsample": 2, "weights": "a"} | facts
        flow.autoencoder.config = AutoencoderConfig(**known)
        evaluation = {"nats_per_dim": 0.1, "latent_bits_per_dim": 0.2, "steps": 5, "seconds": 1.0}
        curve = [{"step": 1, "seconds": 1.0, "nats_per_dim": 0.2, "held_out_nats_per_dim": 0.1, "held_out_exact": 0.5}]
        return Record(run, flow, tmp_path / folder, {}, curve, evaluation)

    pixels = replace(latent("pixels", "p"), flow=torch.nn.Linear(1, 1))
    same = [latent("a", "a"), latent("b", "b", name="moved")]
    others = {
        "weights": [latent("a", "a"), latent("b", "b", weights="b")],
        "which latent": [latent("a", "a"), latent("b", "b", posterior="sample")],
        "trained with their flows": [latent("a", "a", name=None), latent("b", "b", name=None)],
        "pixels": [latent("a", "a"), pixels],
    }
    titles = {"nats per dimension", "bits per latent dimension, of noised latents"}
    assert titles <= {title for title, _, _ in table(same)}
    assert any("nats" in row["figure"] for row in crossings(same))
    for what, pair in others.items():
        assert not titles & {title for title, _, _ in table(pair)}, what
        assert "their likelihoods do not compare" in not_comparable(pair)[0]
        assert {row["figure"] for row in crossings(pair)} == {"exact accuracy, held out"}
        panel = draw_curves(pair).axes[0]
        assert not panel.lines
        assert "do not compare" in panel.texts[0].get_text()
    assert draw_curves(same).axes[0].lines
