"""`flowback score`, from the evaluation that makes p-values to the table and the maps."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowback.cli import main
from flowback.runs.checkpoint import load_flow
from flowback.tasks.score import score


@pytest.fixture(scope="module")
def evaluated(small_run, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("scored") / "run"
    shutil.copytree(small_run, run)
    assert main(["evaluate", str(run), "--metrics=bpd"]) == 0
    return run


@pytest.fixture
def folder(digits, tmp_path) -> Path:
    """Digits in folders, noise, and what is no image."""
    images = tmp_path / "images"
    (images / "deep" / "er").mkdir(parents=True)
    (images / ".hidden").mkdir()
    for place, x in zip(("b.png", "a.png", "deep/er/c.png", ".hidden/d.png"), digits[0], strict=False):
        Image.fromarray(((x[0] + 1) * 127.5).byte().numpy()).save(images / place)
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(noise).save(images / "z.png")
    (images / "notes.txt").write_text("no image")
    return images


def test_a_folder_is_scored_into_a_table_and_maps(evaluated, folder, tmp_path, capsys):
    table, maps = tmp_path / "t.csv", tmp_path / "maps"
    words = ["score", str(evaluated), str(folder), f"--csv={table}", f"--maps={maps}", "--batch-size=2"]
    assert main([*words, "--false-alarms=0.05"]) == 0
    said = capsys.readouterr().out
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    files = [str(folder / name) for name in ("a.png", "b.png", "deep/er/c.png", "z.png")]
    assert [row["file"] for row in rows] == files
    flow, _ = load_flow(evaluated)
    s = score(flow, files)
    for name, values in {"log_prob": s.log_prob, "typicality": s.typicality, "ratio": s.ratio}.items():
        assert torch.allclose(torch.tensor([float(row[name]) for row in rows]), values, rtol=1e-4)
    assert [row["outlier"] for row in rows] == [str(value) for value in s.outliers(0.05).tolist()]
    assert sum(row["outlier"] == "True" for row in rows) >= 1
    assert rows[-1]["outlier"] == "True"  # the noise
    assert f"{sum(row['outlier'] == 'True' for row in rows)} of 4 images are outliers" in said
    assert [row["map"] for row in rows] == [str(maps / f"{i:06d}.png") for i in range(4)]
    picture = np.asarray(Image.open(maps / "000003.png")).astype(int)
    assert np.ptp(picture, axis=-1).max() > 50  # color, where the noise is unusual
    assert not list(tmp_path.glob(".partial*"))


def test_images_are_scored_on_the_terminal_and_the_unreadable_are_named(evaluated, folder, capsys):
    (folder / "broken.png").write_bytes(b"\x89PNG and nothing more")
    with pytest.raises(SystemExit) as end:
        main(["score", str(evaluated), str(folder / "a.png"), str(folder / "broken.png"), str(folder / "z.png")])
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert "broken.png cannot be read" in err
    assert out.count("log_prob") == 2
    assert "outlier True" in out


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_without_held_out_images_there_are_densities_and_no_p_values(small_run, evaluated, folder, capsys, weights):
    """Also of raw weights: what is stored is of the averaged ones."""
    run = small_run if weights == "ema" else evaluated
    assert main(["score", str(run), str(folder / "a.png"), f"--weights={weights}"]) == 0
    out = capsys.readouterr().out
    assert "log_prob" in out
    assert "typicality" not in out
    assert "flowback evaluate" in out


def test_what_was_scored_before_an_interruption_is_kept(evaluated, folder, tmp_path, monkeypatch, capsys):
    calls = []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*arguments, **options)

    monkeypatch.setattr("flowback.cli.scoring.score", interrupted)
    table = tmp_path / "t.csv"
    assert main(["score", str(evaluated), str(folder), f"--csv={table}", "--batch-size=3"]) == 130
    assert len(table.read_text().splitlines()) == 4
    assert "what was done before it ended is in" in capsys.readouterr().out
