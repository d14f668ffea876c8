"""Every command, as a user runs it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from builders import SMALL_RUN
from flowback.cli import VERBS, build_parser, main
from flowback.runs.checkpoint import load_flow
from flowback.runs.config import RunConfig, recipe
from flowback.tasks.classify import classify
from forked import Forked, program


@pytest.fixture
def run(small_run, tmp_path) -> Path:
    return Path(shutil.copytree(small_run, tmp_path / "run"))


def test_quickstart_trains_both_flows_and_writes_the_report(tmp_path, capsys, monkeypatch):
    full = RunConfig.read(recipe("digits"))
    small = replace(
        full,
        data=replace(full.data, limit=64, holdout=0.05),
        flow=replace(full.flow, width=32, blocks=2, layers=1, patch_size=4),
        alignment=replace(full.alignment, at=[[2, 1]]),
        train=replace(full.train, batch_size=16, eval_images=20, warmup=2),
    )
    (tmp_path / "small.yaml").write_text(small.to_yaml())
    monkeypatch.setattr("flowback.cli.training.recipe", lambda name: tmp_path / "small.yaml")
    run = tmp_path / "run"
    assert main(["quickstart", f"--run={run}", "--steps=30", "--seed=5"]) == 0
    report = json.loads((run / "report.json").read_text())
    for name in ("plain", "aligned"):
        figures = report[name]
        assert {"single_gradient", "shortlist_3", "exact"} <= set(figures["accuracy"])
        assert (figures["held_out_images"], figures["noise_draws"]) == (90, 4)
        assert figures["steps"] == 30
        assert figures["seconds"] > 0
        assert np.isfinite([figures["nats_per_dim"], figures["bits_per_dim"]]).all()
        config = RunConfig.read(run / name / "config.yaml")
        assert config.train == replace(small.train, steps=30, seed=5)
        assert (config.data, config.flow) == (small.data, small.flow)
    assert report["plain"]["strategy"] == "none"
    assert report["aligned"]["strategy"] == "reverse"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    # of four jobs; real; and of each flow samples, guided, judged, and under evidence
    assert page.count("data:image/png;base64,") == 13
    assert all(f"<h3>{job}</h3>" in page for job in ("It draws", "It classifies", "It scores", "It edits"))
    gained = 100 * (report["aligned"]["accuracy"]["exact"] - report["plain"]["accuracy"]["exact"])
    assert f"exact {gained:+.1f}" in page
    assert page.count("data:image/svg+xml;base64,") == 4  # two of curves, and each flow's rules
    assert (run / "overview.png").is_file()
    flow, _ = load_flow(run / "aligned")
    assert classify(flow, flow.sample(2)).shape == (2, 10)  # by shortlist_3, whose statistics the evaluation left
    printed = capsys.readouterr().out
    assert str(run / "report.html") in printed
    assert "exact" in printed
    weights = run / "aligned" / "checkpoints" / "step_00000030" / "model.safetensors"
    trained = weights.stat().st_mtime_ns
    assert main(["quickstart", f"--run={run}", "--steps=30", "--seed=5"]) == 0
    assert weights.stat().st_mtime_ns == trained


def test_config_file_and_command_line_meet_and_the_command_line_wins(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {steps: 9, lr: 0.01}\nflow: {patch_size: 4}\n")
    assert main(["train", f"--config={file}", f"--run={tmp_path / 'run'}", "--train.steps=2", *SMALL_RUN]) == 0
    written = (tmp_path / "run" / "config.yaml").read_text()
    assert "steps: 2" in written
    assert "lr: 0.01" in written


def test_stopped_and_resumed_by_the_config_of_the_run(tmp_path, capsys):
    assert main(["train", f"--run={tmp_path}", "--train.steps=6", "--train.until=4", *SMALL_RUN]) == 0
    assert "stopped at step 4 of 6" in capsys.readouterr().out
    arguments = ["train", "--config", str(tmp_path / "config.yaml"), "--train.until=6", "--train.resume"]
    assert main(arguments) == 0
    assert "finished" in capsys.readouterr().out


def test_ctrl_c_saves_ends_cleanly_and_says_how_to_go_on(tmp_path):
    process = Forked(program, ["train", f"--run={tmp_path}", "--train.steps=100000", "--train.log_every=1", *SMALL_RUN])
    deadline = time.monotonic() + 120
    metrics = tmp_path / "metrics.csv"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "--train.resume" in out
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) >= 1


def test_a_folder_of_images_is_trained_sampled_and_classified_by_name(tmp_path, capsys):
    digits, names = load_digits(), ["zero", "eins", "二"]
    for k, name in enumerate(names):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, image in enumerate(digits.images[digits.target == k][:12]):
            Image.fromarray((image * 15).astype(np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    options = ["--data.name=folder", f"--data.path={tmp_path / 'data'}", "--data.image_size=8", "--data.workers=1"]
    run = tmp_path / "run"
    aligned = ["--alignment.strategy=reverse", "--alignment.at=[[2,1]]", "--alignment.projector_width=16"]
    changes = [*options, *aligned, *SMALL_RUN[:5], "--train.batch_size=8"]
    assert main(["train", f"--run={run}", "--train.steps=3", *changes]) == 0
    assert main(["sample", str(run), "--labels=二", "--num=1", "-o", str(tmp_path / "二.png")]) == 0
    assert Image.open(tmp_path / "二.png").mode == "RGB"
    capsys.readouterr()
    assert main(["classify", str(run), str(tmp_path / "data" / "eins" / "0.png"), "--top=3", "--rule=exact"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} 0." in printed for name in names)


def test_sample_writes_a_grid_or_a_folder(run, tmp_path):
    grid, folder = tmp_path / "a" / "grid.png", tmp_path / "images"
    assert main(["sample", str(run), "--labels=3,7", "--num=4", "--guidance=1", "-o", str(grid)]) == 0
    assert Image.open(grid).size == (2 * 34 + 2, 2 * 34 + 2)
    assert main(["sample", str(run), "--num=3", "--schedule=annealed", "--guidance=1", "-o", str(folder)]) == 0
    files = sorted(folder.glob("*.png"))
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    assert Image.open(files[0]).size == (8, 8)
    again = tmp_path / "again"
    main(["sample", str(run), "--num=3", "--schedule=annealed", "--guidance=1", "--batch-size=1", "-o", str(again)])
    for file in files:
        difference = np.asarray(Image.open(file)).astype(int) - np.asarray(Image.open(again / file.name)).astype(int)
        assert abs(difference).max() <= 1


def test_classify_prints_the_likeliest_classes(run, tmp_path, capsys):
    file = tmp_path / "digit.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(file)
    assert main(["classify", str(run), str(file), "--top=2"]) == 0
    line = capsys.readouterr().out.strip()
    assert re.fullmatch(r".*digit\.png: \d [+-]\d+\.\d\d, \d [+-]\d+\.\d\d", line.splitlines()[0])
    assert "scores, by single_gradient; `flowback evaluate` makes a better rule and calibrates it" in line
    assert main(["classify", str(run), str(file), "--rule=exact"]) == 0
    assert re.match(r".*digit\.png: \d 0\.\d{3}, ", capsys.readouterr().out)


def test_evaluate_prints_and_writes_the_figures(run, capsys):
    assert main(["evaluate", str(run), "--metrics=bpd,accuracy", "--images=30"]) == 0
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["held_out_images"] == 30
    assert figures["weights"] == "ema weights of step_00000002"
    assert {"single_gradient", "z_score", "shortlist_3", "exact"} < set(figures["accuracy"])
    assert "bits_per_dim" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--metrics=bpd", "--weights=raw", "--images=30"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["weights"] == "raw weights of step_00000002"


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_explains_every_option(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text) > 200
    if verb == "train":
        for name in ("--alignment.strategy", "--flow.patch_size", "--train.resume", "--data.path"):
            described = text[text.rindex(f"  {name} ") :].split("\n  --")[0]
            assert len(" ".join(described.split())) > len(name) + 25


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_that_is_on_or_off_is_a_switch(verb):
    top, commands = build_parser(verb)
    actions = [action for action in commands[verb][0]._actions if "print" not in action.dest and action.dest != "help"]
    assert all(action.nargs != 0 for action in actions)  # none with a way of its own
    positional = ["x"] * sum(not action.option_strings for action in actions)
    switches = {action.dest: action.option_strings[-1] for action in actions if isinstance(action.default, bool)}
    forms = {"{}": True, "{} true": True, "{}=true": True, "{} false": False, "{}=false": False, "--no-{}": False}
    for form, meant in forms.items():
        words = [word for name in switches.values() for word in form.format(name).replace("--no---", "--no-").split()]
        for line in ([*verb.split(), *words, *positional], [*verb.split(), *positional, *words]):
            options = top.parse_args(line)[verb.replace(" ", ".")]
            assert {options[dest] for dest in switches} <= {meant}


def options_of(*words: str):
    return build_parser(words[0])[0].parse_args(words)[words[0]]


def test_a_config_of_version_0_1_0_is_a_recipe(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "run: null\ndata: {name: digits}\nflow: {patch_size: 2, autoencoder: 'Bäume', latent_scale: null}\n"
        "train: {clip: 2.0, accumulate: 4, label_drop: 0.25, flip: true, cache_latents: false, lr: 1e-2}\n",
        "utf-8",
    )
    options = options_of("train", f"--config={file}", "--train.lr=3e-3")
    train = options.train
    assert (train.grad_clip, train.grad_accum_steps, train.class_dropout, train.hflip) == (2.0, 4, 0.25, True)
    assert (options.latents.autoencoder, options.latents.cache) == ("Bäume", False)
    assert train.lr == 3e-3


def test_a_recipe_is_utf_8_in_every_locale(tmp_path):
    (tmp_path / "a.yaml").write_text("run: 二/Bäume\n", "utf-8")
    program = "from flowback.cli import build_parser; parser, _ = build_parser('train'); "
    program += "print(ascii(parser.parse_args(['train', '--config=a.yaml']).train.run))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ascii("二/Bäume")


def test_recipes_ship_with_the_package():
    assert recipe("digits").read_text().startswith("# 8x8 digits")
    for file in recipe("digits").parent.glob("*.yaml"):
        assert RunConfig.read(file).flow.patch_size


@pytest.mark.parametrize("name", ["digits", "configs/digits.yaml"])
def test_a_recipe_of_the_package_is_found_from_anywhere_and_a_file_of_ones_own_comes_first(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()  # images, say
    assert main(["train", f"--config={name}", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["steps"] == 1000
    Path("digits").rmdir()
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("train: {steps: 7}")
    assert main(["train", "--config", name, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["steps"] == 7


@pytest.mark.parametrize("verb", ["train", "cache", "distill", "autoencoder train"])
def test_a_printed_configuration_is_one_and_nothing_is_done(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*verb.split(), "--train.seed=5", "--print_config"]) == 0
    printed = capsys.readouterr().out
    Path("printed.yaml").write_text(printed)
    assert main([*verb.split(), "--config=printed.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    assert yaml.safe_load(printed)["train"]["seed"] == 5
    assert [file.name for file in tmp_path.iterdir()] == ["printed.yaml"]


def test_a_command_keeps_freed_memory_for_what_follows(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("flowback.core.devices.keep_freed_memory", lambda device: seen.append(device.type))
    assert main(["sample", str(run), "--num=1", "--device=cpu", "-o", str(tmp_path / "x.png")]) == 0
    assert seen == ["cpu"]
