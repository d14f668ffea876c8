"""The studies: what they would run is possible, their arithmetic is right, and pages say what the results say."""

import copy
import io
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import cells_study
import latent_study
import latent_tables
import numpy as np
import outlier_study
import pytest
import study
import tables
import torch
from PIL import Image

import cells
import common
import emoji
import seeds
from alignment_2 import gradients as gradients_2
from alignment_2 import study as study_2
from alignment_2 import tables as tables_2
from builders import random_flow
from convergence import errors_by_sweep, sweeps_until
from flowback.data import DataConfig, load_data
from flowback.encoders import load_encoder
from flowback.runs.config import AutoencoderRunConfig, RunConfig
from flowback.training.build import fingerprint


@pytest.fixture(scope="module")
def results():
    return tables.Results(tables.HERE / "results")


def made(values: dict[str, list[float]]) -> tables.Results:
    """Results whose only figure is the exact accuracy, a value a seed."""
    results = copy.copy(tables.Results(Path("nowhere")))
    results.arms = {
        arm: {seed: {"final": {"accuracy": {"exact": value / 100}}} for seed, value in enumerate(found)}
        for arm, found in values.items()
    }
    return results


def test_every_arm_is_a_configuration_that_can_be_trained(monkeypatch):
    monkeypatch.setattr(study, "chosen_rate", lambda: 2e-3)
    for arm in [*study.TUNING, *study.ARMS]:
        config = arm.config(arm.seeds[0])
        assert config.train.steps == arm.points[-1] == arm.steps
        assert config.train.lr
        assert sorted(set(arm.points)) == arm.points


def test_arms_differ_from_the_plain_arm_beside_them_in_the_alignment_alone(monkeypatch):
    monkeypatch.setattr(study, "chosen_rate", lambda: 2e-3)
    arms = {arm.name: arm.config(1) for arm in study.ARMS}
    for name, own in arms.items():
        plain = arms["plain_0.004" if name.endswith("_0.004") else tables.base_of(name)]
        assert plain.alignment.strategy == "none"
        expected = replace(own, run=plain.run, alignment=plain.alignment)
        if name == "same_seconds":
            expected = replace(expected, train=replace(expected.train, steps=plain.train.steps))
        assert expected == plain


def test_whole_rounds_of_seeds_come_first():
    runs = [(arm.name, seed) for arm, seed in study.order(study.ARMS)]
    assert len(set(runs)) == len(runs) == sum(len(arm.seeds) for arm in study.ARMS)
    first = runs[:9]
    assert {seed for _, seed in first} == {0}
    assert {name for name, _ in first} == {*study.MAIN, *study.CONTROLS, "same_seconds"}
    assert runs[-1] == ("exact", 2)


def test_tuning_runs_are_plain_and_share_no_seed_with_the_arms():
    for arm in (*study.TUNING, study.WARMUP):
        assert arm.alignment == {}
        assert not set(arm.seeds) & {seed for other in study.ARMS for seed in other.seeds}


def test_learning_rate_is_that_of_the_best_plain_likelihood(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    for arm, nats in zip(study.TUNING, (-0.2, -0.4, -0.3, -0.35), strict=True):
        study.result_file(arm, study.TUNING_SEED).write_text(f'{{"final": {{"nats_per_dim": {nats}}}}}')
    assert study.chosen_rate() == study.RATES[1]


def test_a_difference_is_a_yes_a_no_or_open():
    plain = [70.0, 71.0, 72.0]
    shifts = {"yes": [3.0, 3.2, 2.8], "no": [-3.0, -3.2, -2.8], "equal": [0.1, 0.0, -0.1], "open": [5.0, 0.0, 1.0]}
    shifted = {arm: [p + d for p, d in zip(plain, shift, strict=True)] for arm, shift in shifts.items()}
    results = made({"plain": plain} | shifted)
    found = {arm: tables.verdict(results, arm, "plain", tables.EXACT) for arm in shifts}
    assert found == {"yes": "yes", "no": "no", "equal": "no", "open": "open"}
    assert tables.difference(results, "yes", "plain", tables.EXACT) == "+3.0 ± 0.5 yes"


def test_a_single_seed_is_judged_by_the_spread_of_the_aligned_arm():
    base = {"plain": [70.0, 71.0, 72.0], "one_step": [72.0, 73.1, 73.9]}  # differences 2.0, 2.1, 1.9
    results = made(base | {"far": [71.0], "near": [70.3], "below": [69.0]})
    verdicts = [tables.verdict(results, arm, "plain", tables.EXACT) for arm in ("far", "near", "below")]
    assert verdicts == ["yes", "open", "no"]


@pytest.mark.parametrize(("target", "expected"), [(50.0, 100.0), (60.0, 150.0), (70.0, 200.0), (75.0, 300.0), (81.0, None)])
def test_crossing_is_linear_between_points(target, expected):
    points = [{"step": s, "curve_accuracy": {"exact": a / 100}} for s, a in ((100, 50), (200, 70), (300, 75), (400, 80))]
    found = tables.crossing({"points": points}, target, tables.EXACT, "step")
    assert found == (None if expected is None else pytest.approx(expected))


def test_crossing_of_a_figure_that_should_fall():
    points = [{"step": s, "judge": {"fid": f}} for s, f in ((100, 90.0), (200, 50.0))]
    assert tables.crossing({"points": points}, 60.0, tables.FID, "step") == pytest.approx(175)


def test_seconds_of_a_disturbed_run_are_left_out_and_its_steps_are_not():
    def run(seconds: tuple[float, ...], **facts: bool) -> dict:
        points = zip((100, 200), seconds, (0.5, 0.7), strict=True)
        rows = [{"step": s, "seconds": t, "curve_accuracy": {"exact": a}} for s, t, a in points]
        return {"points": rows, "final": rows[-1], "steps": 200} | facts

    results = tables.Results(Path("nowhere"))
    results.arms = {
        "plain": {0: run((10, 20)), 1: run((10, 20))},
        "one_step": {0: run((20, 40)), 1: run((50, 99), disturbed=True)},
    }
    assert tables.speed_ups(results, "one_step", tables.EXACT, "step") == pytest.approx([1, 1])
    assert tables.speed_ups(results, "one_step", tables.EXACT, "seconds") == pytest.approx([0.5])
    assert tables.costs(results, ("one_step",)).splitlines()[-1] == "| `one_step` | 200 | 40 | 2.00 |"


def test_page_says_what_the_results_say(results):
    page = tables.PAGE.read_text()
    named = re.findall(r"<!-- ([a-z -]+) -->\n", page)
    assert set(named) - {"end"} == set(tables.TABLES)
    assert tables.anew(page, results) == page


def test_figures_of_the_page_can_be_drawn(results):
    names = re.findall(r"\(([a-z_]+)\.png\)", tables.PAGE.read_text())
    assert set(names) == set(tables.FIGURES)
    for name in names:
        assert tables.FIGURES[name](results).axes
        assert (tables.PAGE.parent / f"{name}.png").is_file()


def test_sweeps_end_where_the_error_stays_small():
    assert sweeps_until([3.0, 1e-5, 0.1, 1e-6, 1e-7], 1e-4) == 3
    errors = errors_by_sweep(random_flow(torch.float32, std=0.1), 3)
    for found in errors.values():
        assert found[0] > found[-1]
        assert found[-1] < 1e-4


def test_the_emoji_become_a_folder_by_class_on_white(tmp_path, monkeypatch, capsys):
    package, output = tmp_path / "package", tmp_path / "emoji"
    images = package / "img" / "google" / "64"
    images.mkdir(parents=True)
    for name, alpha in (("a", 0), ("a-1", 255), ("b", 255), ("c", 255)):
        Image.new("RGBA", (64, 64), (255, 0, 0, alpha)).save(images / f"{name}.png")
    tones = {"1F3FB": {"image": "a-1.png"}, "1F3FC": {"image": "not drawn.png"}}
    entries = [{"category": "People & Body", "image": "a.png", "skin_variations": tones}]
    entries += [{"category": "Flags", "image": "b.png"}, {"category": "Component", "image": "c.png"}]
    (package / "emoji.json").write_text(json.dumps(entries))
    monkeypatch.setattr("sys.argv", ["emoji.py", str(package), "--output", str(output), "--size", "8"])
    emoji.main()
    found = {str(file.relative_to(output)): np.array(Image.open(file)) for file in output.rglob("*.png")}
    assert found.keys() == {"people_body/a.png", "people_body/a-1.png", "flags/b.png"}
    assert (found["people_body/a.png"] == 255).all()
    assert (found["flags/b.png"] == (255, 0, 0)).all()
    assert found["flags/b.png"].shape == (8, 8, 3)
    assert "3 images of 8x8 pixels" in capsys.readouterr().out


def test_emoji_are_held_out_by_motif_and_without_skin_tones(tmp_path, monkeypatch, capsys):
    package, output = tmp_path / "package", tmp_path / "emoji"
    images = package / "img" / "google" / "64"
    images.mkdir(parents=True)
    entries = []
    for i in range(40):
        for gender in ("1F468", "1F469"):
            code = f"{gender}-200D-{i:04X}"
            tones = {"1F3FB": {"image": f"{code}-tone.png"}}
            entries.append({"category": "People & Body", "unified": code, "image": f"{code}.png", "skin_variations": tones})
            for name in (f"{code}.png", f"{code}-tone.png"):
                Image.new("RGBA", (64, 64), "red").save(images / name)
    (package / "emoji.json").write_text(json.dumps(entries))
    monkeypatch.setattr("sys.argv", ["emoji.py", str(package), "--output", str(output), "--size", "8", "--holdout", "0.3"])
    emoji.main()
    found = {part: {file.name for file in (output / part / "people_body").iterdir()} for part in ("train", "val")}
    motifs = {part: {name.split("-")[2].removesuffix(".png") for name in names} for part, names in found.items()}
    assert motifs["train"] | motifs["val"] == {f"{i:04X}" for i in range(40)}
    assert not motifs["train"] & motifs["val"]
    assert 4 < len(motifs["val"]) < 20
    assert len(found["val"]) == 2 * len(motifs["val"]), "both genders, no skin tones"
    assert len(found["train"]) == 4 * len(motifs["train"])


# ---- the second study of alignment ----------------------------------------------------------------------------------


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """Results of a search, and lengths of gradients: late blocks at layer 3 with weight 2 are the best of all families."""
    monkeypatch.setattr(gradients_2, "measured", lambda run: {"checkpoints": [{"norms": {"one_step": 1.0, "exact": 4.0}}]})
    monkeypatch.setattr(study_2, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study_2, "RUNS", tmp_path / "runs")
    for stage in study_2.searches():
        for arm, seed in stage:
            options = arm.alignment | (arm.settled() if arm.settled else {})
            fid = 90 - 5 * ("late_3" in arm.name) - 10 * ("weight_2" in arm.name)
            facts = {"nats_per_dim": -(arm.lr or 0), "lr": arm.lr, "plain": {"fid": fid}, "alignment": options}
            study_2.write_result(study_2.result_file(arm, seed), {"arm": arm.name, "seed": seed} | facts)


def test_every_arm_of_the_second_study_can_be_trained_with_what_was_found(searched):
    names = [arm.name for arm in study_2.ARMS]
    assert len(set(names)) == len(names)
    configs = {arm.name: arm.config(0) for arm in study_2.ARMS}
    for config in configs.values():
        assert config.flow.check_pairs(config.alignment.at) == [tuple(pair) for pair in config.alignment.at]
        assert RunConfig.from_yaml(config.to_yaml()) == config
    assert configs["emoji_plain"].train.lr == study_2.RATES[-1]
    for name in ("emoji_forward", "emoji_irepa_reverse", "emoji_sharper"):
        assert (configs[name].alignment.at, configs[name].alignment.weight) == ([[3, 3], [4, 3]], 2.0)
    assert configs["exact_equal_norm"].alignment.weight == 0.5 / 4
    assert configs["width_192_plain"].train.lr == study_2.GREY_RATE / 2
    assert configs["images_60000_irepa"].data.limit is None
    kept = {name for name, config in configs.items() if config.train.keep > 1}
    assert kept == set(study_2.WATCHED)


def test_arms_of_the_second_study_that_are_compared_differ_in_the_alignment_alone(searched):
    arms = {arm.name: arm for arm in study_2.ARMS}
    for pairs in tables_2.PAIRS.values():
        for pair in pairs:
            own, other = (arms[name.removeprefix("cpu/")].config(1) for name in pair)
            assert replace(own, run=other.run, alignment=other.alignment) == other, pair


def test_the_sharper_stage_has_192_channels_on_the_grid_of_the_last():
    encoder = study_2.encoder_of(next(arm for arm in study_2.ARMS if arm.name == "emoji_sharper"))
    last = load_encoder("efficientnet_lite0", grid=(8, 8))
    assert (encoder.grid, encoder.dim) == (last.grid, 192)
    x = torch.rand(2, 3, 32, 32)
    found = encoder(x)
    again = last.model.blocks[-1](found.transpose(1, 2).unflatten(2, (8, 8)))
    assert torch.allclose(again.flatten(2).transpose(1, 2), last(x), atol=1e-4), "the last stage makes the last map of it"
    assert fingerprint(encoder) != fingerprint(last)


def test_whatever_time_there_is_answers_most_and_groups_are_known():
    runs = [(arm.name, seed) for arm, seed in study_2.order()]
    assert len(set(runs)) == len(runs) == 3 * len(study_2.ARMS)
    first = len(study_2.GROUPS["color"]) + len(study_2.GROUPS["grey"])
    assert {seed for _, seed in runs[:first]} == {0}
    assert runs[-1] == ("cells_irepa", 2)
    parser = common.options("", jobs=1)
    found = common.chosen(parser.parse_args(["--only", "gradients,plain", "--seeds", "1"]), study_2.order(), study_2.GROUPS)
    assert [(arm.name, seed) for arm, seed in found] == [("plain", 1), ("exact_equal_norm", 1)]
    with pytest.raises(SystemExit, match="arms plane do not exist; allowed: emoji_plain"):
        common.chosen(parser.parse_args(["--only", "plane"]), study_2.order(), study_2.GROUPS)


def test_runs_of_the_second_study_end_in_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study_2, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study_2, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(study_2, "TRAIN", replace(study_2.TRAIN, batch_size=16, warmup=1, checkpoint_every=2, log_every=1))
    monkeypatch.setattr(study_2, "WIDTH", 32)
    for name, value in (("TRIED", 40), ("SAMPLES", 40), ("FITTED", 64), ("UNLABELLED", 32)):
        monkeypatch.setattr(study_2, name, value)
    monkeypatch.setattr(study_2, "SETTINGS", [study_2.PLAIN, study_2.PLAIN | {"temperature": 0.5}])
    flow = replace(study_2.FLOW, width=32, blocks=4, layers=2)
    monkeypatch.setattr(gradients_2, "FIT_STEPS", 8)
    digits = study_2.Domain("grey", study_2.DataConfig(limit=200), flow, measured=40, epochs=1)
    for arm in study_2.ARMS:
        if arm.name in ("plain", "one_step"):
            tiny = replace(arm, domain=digits, width=32, steps=4, lr=1e-3)
            for seed in (0, 1):
                study_2.prepare([(tiny, seed)])
                study_2.run(tiny, seed)
    before = {file: file.read_bytes() for file in (tmp_path / "results").glob("*.json")}
    found = {file.stem: json.loads(text) for file, text in before.items()}
    assert set(found) == {"plain-0", "plain-1", "one_step-0", "one_step-1"}
    for result in found.values():
        assert result["cpu_seconds"] > 0
        assert len(result["settings"]) == 2
        least = min(result["settings"], key=lambda row: row["fid"])
        assert result["best"]["temperature"] == least["temperature"]
        assert result["plain"]["temperature"] == 1
    for run in ("plain-0", "one_step-0"):
        rows = gradients_2.measured(tmp_path / "runs" / run, images=16)["checkpoints"]
        assert [row["step"] for row in rows] == [2, 4]
        assert {row["projector"] for row in rows} == {"fitted" if run == "plain-0" else "its own"}
        blocks = rows[0]["blocks"]
        assert blocks["1"]["norms"]["one_step"] < 1e-5 * blocks["3"]["norms"]["one_step"], "reverse stays above"
        assert blocks["1"]["norms"]["forward"] > 1e-3 * blocks["3"]["norms"]["forward"]
        assert set(rows[0]["tokens"]) == {"3", "4"}
        assert rows[0]["tokens"]["4"]["added"][-1] == 0, "the last token is read by no other"
    results = tables_2.Results(tmp_path / "results")
    row = next(line for line in tables_2.page(results).splitlines() if line.startswith("| `one_step` - `plain` | 2 |"))
    gain = [100 * (found[f"one_step-{s}"]["accuracy"]["exact"] - found[f"plain-{s}"]["accuracy"]["exact"]) for s in (0, 1)]
    assert f"{sum(gain) / 2:+.1f} ± {12.706 * abs(gain[0] - gain[1]) / 2:.1f}" in row.replace("-0.0 ±", "+0.0 ±")
    assert all(figure.axes for figure in tables_2.figures(results).values())
    capsys.readouterr()


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([3.0, 3.2, 2.8], "better"),
        ([-3.0, -3.2, -2.8], "worse"),
        ([0.1, 0.0, -0.1], "equal"),
        ([5.0, 0.0, 1.0], "no difference seen"),
        ([0.8, 0.9, 1.0], "no difference seen"),
        ([9.0], "one seed"),
    ],
)
def test_verdicts_of_the_second_study(found, expected):
    assert tables_2.verdict(found, tables_2.EXACT, 70.0) == expected
    opposite = {"better": "worse", "worse": "better"}.get(expected, expected)
    assert tables_2.verdict([-0.002 * d for d in found], replace(tables_2.NATS, larger=True), -0.5) == opposite


def test_equal_seconds_are_read_off_the_plain_runs_of_three_lengths(tmp_path):
    def result(arm: str, steps: int, value: float) -> None:
        facts = {"arm": arm, "seed": 0, "steps": steps, "accuracy": {"exact": value}}
        (tmp_path / f"{arm}-0.json").write_text(json.dumps(facts))

    for steps, value in ((800, 0.70), (1040, 0.74), (1360, 0.75)):
        result("plain" if steps == 800 else f"plain_{steps}", steps, value)
    result("irepa", 800, 0.76)
    result("exact", 800, 0.76)
    result("one_step", 800, 0.76)
    (tmp_path / "seconds").mkdir()
    costs = {"plain": 0.1, "irepa": 0.15, "exact": 0.5}  # irepa's seconds are those of 1,200 plain steps
    (tmp_path / "seconds" / "cpu.json").write_text(json.dumps({"machine": "2 CPU cores", "seconds_per_step": costs}))
    results = tables_2.Results(tmp_path)
    assert tables_2.at_seconds(results, "irepa", "plain", tables_2.EXACT)[0] == pytest.approx(1.5)
    assert tables_2.at_seconds(results, "exact", "plain", tables_2.EXACT)[0] == pytest.approx(1.0)
    assert not tables_2.at_seconds(results, "one_step", "plain", tables_2.EXACT), "its cost was not measured"


def test_page_of_the_second_study_says_what_its_results_say():
    page, results = tables_2.PAGE.read_text(), tables_2.Results(study_2.RESULTS)
    assert tables_2.page(results) == page
    story = tables_2.STORY.read_text()
    assert set(re.findall(r"<!-- ([a-z -]+) -->\n", story)) - {"end"} == set(tables_2.tables_of_story(results))
    assert tables_2.told(story, results) == story
    for name in re.findall(r"!\[\]\((\w+\.png)\)", page):
        assert (tables_2.PAGE.parent / name).is_file()


# ---- latents --------------------------------------------------------------------------------------------------------


def test_every_arm_in_latents_can_be_trained_and_differs_in_what_it_says():
    names = [arm.name for arm in latent_study.ARMS]
    assert len(set(names)) == len(names)
    assert {arm.name for arm, seed in latent_study.order()[: len(names)]} == set(names)  # seed 0 of all comes first
    for arm in latent_study.ARMS:
        config, made = arm.config(0), arm.autoencoder(0)
        again = type(config).from_yaml(config.to_yaml())
        assert again == config
        width = 192 if arm.name == "pca_32_wide_0.3" else 96
        assert (config.flow.width, config.flow.blocks, config.flow.layers) == (width, 4, 3)
        assert config.flow.check_pairs(config.alignment.at) == [tuple(pair) for pair in config.alignment.at]
        if made is not None:
            assert config.latents.autoencoder == made.run
            assert made.data == config.data
        if arm.kind == "semantic":
            assert config.flow.noise_std <= made.semantic.noise_std
    plain = {arm.name: arm for arm in latent_study.MAIN}
    for arm in latent_study.ALIGNMENT:
        base = plain[arm.name.rsplit("_", 1)[0]]
        assert arm.autoencoder(1) == base.autoencoder(1)
        assert replace(arm.config(1), run=base.config(1).run, alignment=base.config(1).alignment) == base.config(1)


def test_the_table_of_latents_has_means_and_intervals(tmp_path):
    for seed, accuracy in enumerate((0.80, 0.82, 0.84)):
        row = {"rule": "exact", "accuracy": accuracy, "ece_after": 0.02}
        samples = [{"fid": 50.0 - seed, "precision": 0.5, "recall": 0.25, "right": 0.75}, {"fid": 90.0}]
        facts = {"arm": "a", "seed": seed, "classification": [row], "samples": samples, "space": {"linear_flat": 0.9}}
        (tmp_path / f"a-{seed}.json").write_text(json.dumps(facts | {"cpu_seconds": 10.0, "machine": "an accelerator"}))
    arms = latent_tables.load(tmp_path)
    text = latent_tables.table(arms, latent_tables.COLUMNS)
    head, _, row = (line.split(" | ") for line in text.splitlines())
    cells = dict(zip(head, row, strict=True))
    assert cells["seeds"] == "3"
    assert cells["exact %"] == f"82.0 ± {4.303 * 2 / 3**0.5:.1f}"
    assert cells["FID best"] == f"49 ± {4.303 / 3**0.5:.0f}"
    assert cells["linear probe %"] == "90.0 ± 0.0"
    assert not {"rFID", "of features %"} & set(cells), "columns without figures are left out"
    gaps = latent_tables.table(arms, latent_tables.GAPS)
    assert f"-8.0 ± {4.303 * 2 / 3**0.5:.1f}" in gaps, "exact less the linear probe, in points"


def test_tables_of_latents_are_of_the_results():
    page = latent_tables.PAGE.read_text()
    assert latent_tables.told(page) == page
    names = ("arms", "gaps", "reconstructions", "readers", "differences", "seconds")
    assert re.findall(r"<!-- ([a-z]+) -->", page) == [word for name in names for word in (name, "end")]


def test_flows_are_compared_with_probes_of_all_images_seed_by_seed():
    def read(seed: int, gain: float) -> dict:
        accuracies = {"averaged": {"exact": 0.89 + gain}, "averaged_more": {"exact": 0.9 + seed / 100 + gain}}
        return {"seed": seed, "classification": [{"rule": "exact", "accuracy": 0.86 + seed / 100 + gain}]} | accuracies

    def probes(seed: int) -> dict:
        return {"linear_flat": 0.9 + seed / 100, "linear_features": 0.88, "nearest_mean": 0.79}

    probed, wide = latent_tables.READ
    arms = {
        probed: [read(seed, 0.0) | {"space_of_all": probes(seed)} for seed in range(3)],
        wide: [read(seed, 0.02) for seed in (2, 1, 0)],  # in the same latents: the probes of the same seed are its own
    }
    half = f"{4.303 / 3**0.5:.1f}"
    text = latent_tables.readers(arms)
    assert f"| `{probed}`, one draw of noise | 87.0 ± {half} | -4.0 ± 0.0 | -1.0 ± {half} |" in text
    assert f"| `{wide}`, one draw of noise | 89.0 ± {half} | -2.0 ± 0.0 | 1.0 ± {half} |" in text
    assert f"| `{wide}`, 16 draws | 93.0 ± {half} | 2.0 ± 0.0 | 5.0 ± {half} |" in text
    assert "| nearest mean of what the flow sees | 79.0 ± 0.0 |  |  |" in text


def test_unseen_images_are_not_in_the_reference(monkeypatch):
    monkeypatch.setattr(common, "REFERENCE", 60)
    data = load_data(DataConfig(name="digits"))
    reference, _ = common.reference_of(data, 60, training=False)
    found = common.unseen(data, 100)
    assert len(set(found)) == 100
    assert not set(found) & set(reference.indices)
    assert max(found) < len(data.held_out)


def test_arms_of_latents_are_compared_seed_by_seed():
    figures = {"pixels": (0.70, 0.72, 0.74), "pca_32": (0.81, 0.82, 0.83, 0.5)}
    arms = {
        arm: [
            {
                "seed": seed,
                "classification": [{"rule": rule, "accuracy": value} for rule in ("exact", "single_gradient")],
                "samples": [{"fid": 100 * value, "recall": value, "right": value}],
            }
            for seed, value in enumerate(values)
        ]
        for arm, values in figures.items()
    }
    row = latent_tables.differences(arms).splitlines()[-1]
    half = 4.303 * 1 / 3**0.5  # of 11, 10, 9 points; the fourth seed has no partner
    assert row.startswith(f"| pca_32 - pixels | 3 | 10.0 ± {half:.1f} | 10.0 ± {half:.1f} | 10 ±")


# ---- outliers -------------------------------------------------------------------------------------------------------


def test_tables_of_outliers_have_means_and_ranges_and_baselines_once(tmp_path, monkeypatch, capsys):
    for arm, seed, value in (("a_b", 0, 0.5), ("a_b", 1, 0.75), ("c", 0, 0.25)):
        both = {"flow": value, "probe": 0.125 * seed}
        ood = [
            {"of": of, "score": "s", "auroc": {"some/set": number}, "fpr_at_95_tpr": {"some/set": 1 - number}}
            for of, number in (("flow", value), ("encoder", 0.125 * seed))
        ]
        same = {"corruption": "blur", "ece": both, "aurc": both}
        shift = [same | {"strength": n, "accuracy": {of: v / n for of, v in both.items()}} for n in (1, 2)]
        risk = {"accuracy": value, "ece": 0.1, "aurc": 0.1, "risk_0.9": 0.1, "risk_0.8": 0.0}
        facts = {"ood": ood, "shift": shift, "coverage": [{"of": "flow", **risk}]}
        facts["prior_shift"] = [{"of": "flow", "accuracy": {"before": value, "given": 1.0}}]
        (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps(facts))
    monkeypatch.setattr("sys.argv", ["outlier_study.py", "--results", str(tmp_path)])
    outlier_study.main()
    said = capsys.readouterr().out.splitlines()
    assert "| a_b: s | 0.625 (0.500 to 0.750) |" in said
    assert "| a_b: s | 0.375 (0.250 to 0.500) |" in said
    assert "| c: s | 0.250 |" in said
    assert said.count("| encoder: s | 0.062 (0.000 to 0.125) |") == 1
    assert "| a_b | 0.469 (0.375 to 0.562) | 0.625 (0.500 to 0.750) | 0.625 (0.500 to 0.750) |" in said
    assert any(line.startswith("| c | 0.250 | 0.100 | 0.100 | 0.100 | 0.000 | 0.250 | 1.000 |") for line in said)


# ---- cells ----------------------------------------------------------------------------------------------------------


def test_the_cells_become_folders_by_their_probability_of_a_defect(tmp_path, monkeypatch, capsys):
    package, output = tmp_path / "elpv.whl", tmp_path / "cells"
    rows = [(1, "1.0", "mono"), (2, "0.0", "poly"), (3, "0.3333333333333333", "mono"), (4, "0.6666666666666666", "poly")]
    with zipfile.ZipFile(package, "w") as archive:
        text = [f"images/cell{i:04d}.png  {share}   {kind}" for i, share, kind in rows]
        archive.writestr(f"{cells.DATA}/labels.csv", "\n".join(text) + "\n")
        for i, *_ in rows:
            image = io.BytesIO()
            Image.fromarray(np.full((12, 12), 60 * i, np.uint8)).save(image, "png")
            archive.writestr(f"{cells.DATA}/images/cell{i:04d}.png", image.getvalue())
    monkeypatch.setattr("sys.argv", ["cells.py", str(package), "--output", str(output), "--size", "6"])
    cells.main()
    found = {str(file.relative_to(output)): np.array(Image.open(file)) for file in output.rglob("*.png")}
    names = {1: "defect_100/mono", 2: "sound/poly", 3: "defect_033/mono", 4: "defect_067/poly"}
    assert found.keys() == {f"{name}_cell{i:04d}.png" for i, name in names.items()}
    assert all((found[f"{name}_cell{i:04d}.png"] == np.full((6, 6), 60 * i)).all() for i, name in names.items())
    assert "1 sound, 1 defect_033, 1 defect_067, 1 defect_100" in capsys.readouterr().out
    package.write_bytes(b"no zip")
    with pytest.raises(SystemExit, match="expected the wheel of elpv-dataset"):
        cells.main()


def test_the_recipes_of_cells_share_their_data_and_their_size():
    recipes = {arm: RunConfig.read(cells_study.HERE / f"{arm}.yaml") for arm in cells_study.ARMS}
    autoencoder = AutoencoderRunConfig.read(cells_study.HERE / "autoencoder.yaml")
    pixels, semantic = recipes["pixels"], recipes["semantic"]
    assert pixels.data == semantic.data == autoencoder.data
    assert pixels.train == semantic.train
    assert semantic.latents.autoencoder == autoencoder.run
    assert semantic.flow.noise_std <= autoencoder.semantic.noise_std
    latents = autoencoder.data.image_size // autoencoder.semantic.downsample
    assert latents**2 == (64 // pixels.flow.patch_size) ** 2 == 64


def test_areas_are_the_share_of_pairs_in_order_and_their_intervals_hold_them():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    sound = torch.randn(80, generator=generator) + 1
    defect = torch.randn(50, generator=generator).round(decimals=1)
    sound[:30] = sound[:30].round(decimals=1)  # some are equal
    areas = cells_study.auroc(sound, defect)
    y = [1] * len(sound) + [0] * len(defect)
    assert float(areas[0]) == pytest.approx(roc_auc_score(y, torch.cat([sound, defect])))
    value, low, high = cells_study.interval(areas)
    assert low < value < high
    width = (areas[0] * (1 - areas[0]) / 50).sqrt() * 4  # rather wide for 80 and 50 images
    assert 0.03 < high - low < float(width) * 1.5
    assert cells_study.interval(areas - cells_study.auroc(sound, defect)) == [0, 0, 0]
    assert float(cells_study.auroc(-sound, -defect)[0]) == pytest.approx(1 - float(areas[0]))


def test_a_flow_that_finds_defects_is_better_than_one_that_does_not():
    test = {
        name: cells_study.Cells(torch.zeros(40, 1, 2, 2), ["mono", "poly"] * 20) for name in ("sound", *cells_study.DEFECTS)
    }
    good = {name: torch.arange(40.0) + 100 * (name == "sound") for name in test}
    blind = {name: torch.arange(40.0) for name in test}
    found = cells_study.measured(
        {"pixels map_95": good, "padim": blind, **dict.fromkeys(("mahalanobis", "nearest_neighbors", "brightness"), blind)},
        test,
    )
    assert found["auroc"]["pixels map_95"]["defect_100/mono"] == [1, 1, 1]
    value, low, high = found["differences"]["pixels map_95 - padim"]
    assert value == pytest.approx(0.5)
    assert 0.3 < low < value < high < 0.7
    assert "| padim | 0.500 (" in cells_study.table(found)


def test_gains_over_seeds_are_taken_seed_by_seed():
    def run(exact: float) -> dict:
        early = {"held_out_exact": exact - 0.2, "held_out_single_gradient": 0.3}
        return {"accuracy": {"exact": exact, "single_gradient": 0.5}, "early": early, "nats_per_dim": 0.1, "seconds": 9.0}

    pairs = [{"plain": run(plain), "aligned": run(plain + gained)} for plain, gained in ((0.5, 0.01), (0.9, 0.03))]
    assert "| exact, % | 70.0 | 72.0 | +2.0 ± 12.7 |" in seeds.rows(pairs)  # t = 12.706, deviation 1.414, two seeds
    assert "| exact at step 200, % | 50.0 | 52.0 | +2.0 ± 12.7 |" in seeds.rows(pairs)
    assert "| nats/dim | 0.1000 | 0.1000 | +0.0000 ± 0.0000 |" in seeds.rows(pairs)
