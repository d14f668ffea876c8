"""A prior fitted to a run, the sweep that chooses how its flow draws, and copies looked for, as a user runs them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from builders import SMALL_RUN
from flowback import from_pretrained
from flowback.cli import main
from flowback.data import DataConfig, load_data
from flowback.measure.copies import copies
from flowback.measure.fidelity import SplitImages
from flowback.runs.checkpoint import load_flow, newest
from flowback.tasks.sampling import noise

SWEEP = ["--samples=20", "--temperatures=0.7,1", "--guidances=1", "--rules=product", "--recall=0", "--device=cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of all digits whose training ended with a fitted prior."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    words = [word for word in SMALL_RUN if "limit" not in word]
    more = ["--train.steps=30", "--train.lr=0.01", "--train.ema=0.9", "--train.fit_prior=1000"]
    assert main(["train", f"--run={folder}", *words, *more]) == 0
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_training_ends_with_a_prior_and_the_verb_fits_the_same(copy, capsys):
    file = newest(copy) / "prior.safetensors"
    of_training = load_file(file)
    assert main(["fit-prior", str(copy), "--images=1000", "--device=cpu"]) == 0
    said = capsys.readouterr().out
    assert "nats/dim of held-out images" in said
    assert f"stored in {file}" in said
    again = load_file(file)
    assert all(torch.equal(again[name], value) for name, value in of_training.items())
    flow, raw = (load_flow(copy, weights)[0].core for weights in ("ema", "raw"))
    assert flow.fitted_prior is not None
    assert raw.fitted_prior is None


def test_samples_are_drawn_from_the_fitted_prior(copy, tmp_path, capsys):
    options = ["--num=4", "--labels=3,8", "--denoise=false", "--temperature=0.8", "--device=cpu"]
    for prior in ("standard", "fitted"):
        assert main(["sample", str(copy), *options, f"--prior={prior}", "-o", str(tmp_path / f"{prior}.npz")]) == 0
    flow = load_flow(copy)[0].core
    y = torch.tensor([3, 8, 3, 8])
    z = flow.draw_z(torch.stack([noise(flow, 0, i)[0] for i in range(4)]), y, 0.8, "fitted")
    with torch.no_grad():
        expected = flow.decode(z, y).clamp(-1, 1)
    images = {prior: np.load(tmp_path / f"{prior}.npz")["arr_0"] for prior in ("standard", "fitted")}
    found = torch.from_numpy(images["fitted"]).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.allclose(found, expected, atol=0.01)
    assert not np.array_equal(images["standard"], images["fitted"])


def test_a_sweep_chooses_what_samples_are_drawn_with(copy, tmp_path, capsys):
    assert main(["sweep", str(copy), *SWEEP]) == 0
    first = capsys.readouterr().out
    content = json.loads((newest(copy) / "sweep.json").read_text())
    chosen = json.loads((newest(copy) / "sampling.json").read_text())
    best = min(content["rows"], key=lambda row: row["fid"])
    assert {name: chosen[name] for name in ("temperature", "prior", "guidance", "guidance_rule")}.items() <= best.items()
    assert {(row["temperature"], row["prior"]) for row in content["rows"]} >= {(1.0, "standard"), (1.0, "fitted")}

    assert main(["sweep", str(copy), *SWEEP]) == 0  # nothing is measured again
    assert "sweep " not in capsys.readouterr().out
    assert first.count("sweep ") == len(content["rows"])

    assert main(["sample", str(copy), "--num=2", "--labels=3", "--device=cpu", "-o", str(tmp_path / "a.npz")]) == 0
    assert f"temperature {chosen['temperature']:g}, prior {chosen['prior']}" in capsys.readouterr().out
    given = [f"--{name.replace('_', '-')}={chosen[name]}" for name in ("temperature", "prior", "guidance", "guidance_rule")]
    assert main(["export", str(copy), str(tmp_path / "flow")]) == 0  # goes along
    exported = ["sample", str(tmp_path / "flow"), "--num=2", "--labels=3", "--device=cpu"]
    assert main([*exported, *given, "-o", str(tmp_path / "b.npz")]) == 0
    assert from_pretrained(tmp_path / "flow").core.defaults.temperature == chosen["temperature"]
    assert np.array_equal(*(np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab"))


def test_an_evaluation_looks_for_copies(copy, capsys):
    options = ["--metrics=copies", "--samples=40", "--temperature=0.7", "--prior=fitted", "--device=cpu"]
    assert main(["evaluate", str(copy), *options]) == 0
    found = json.loads((copy / "evaluation.json").read_text())["fidelity"]
    assert (found["temperature"], found["prior"]) == (0.7, "fitted")
    assert found["copies"]["training_images"] == 1438
    assert 0 < found["copies"]["nearest"] < 1
    picture = Image.open(copy / "evaluation" / "copies.png")
    assert picture.size[0] > 8 * 8


def test_copies_are_found():
    data = load_data(DataConfig())
    training, held_out = (SplitImages(split, data.levels, 300) for split in (data.train, data.held_out))
    figures, pairs = copies(training, held_out, training)
    assert (figures["nearest"], figures["close"]) == (0, 1)
    assert all(i == j for i, j in pairs)
    figures, pairs = copies(held_out, held_out, training)
    assert figures["close"] == pytest.approx(0.01, abs=0.01)
    i, j = pairs[0]
    distance = ((held_out[i].float() - training[j].float()) / 127.5).square().mean().sqrt()
    others = [((held_out[i].float() - training[k].float()) / 127.5).square().mean().sqrt() for k in range(300)]
    assert float(distance) == pytest.approx(float(min(others)), rel=1e-5)
    assert min(others) > 0
