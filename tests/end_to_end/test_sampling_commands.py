"""The verbs that draw and edit images, as a user runs them."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from builders import SMALL_RUN, refuse
from flowback import TarFlow
from flowback.cli import main
from flowback.tasks.sampling import checked_store
from forked import Forked

SMALL = [*SMALL_RUN, "--train.lr=0.01", "--train.ema=0.9"]
CELL = 34  # an image in a grid: 8 pixels, enlarged fourfold, and a line of 2


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    os.environ["FLOWBACK_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", f"--run={folder}", "--train.steps=40", *SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> list[str]:
    """Files of three digits: 0, 1, 2."""
    folder = tmp_path_factory.mktemp("digits")
    for k, image in enumerate(load_digits().images[:3]):
        Image.fromarray((image * 15).astype(np.uint8)).save(folder / f"{k}.png")
    return [str(folder / f"{k}.png") for k in range(3)]


def read(file) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def read_folder(folder) -> np.ndarray:
    return np.stack([read(file) for file in sorted(folder.glob("*.png"))])


def read_npz(file) -> np.ndarray:
    with np.load(file) as archive:
        return archive["arr_0"].astype(int)


def cells(file, rows: int, columns: int) -> np.ndarray:
    """The images of a grid, `[rows, columns, 8, 8]`, after a look at its size."""
    grid = read(file)
    assert grid.shape == (rows * CELL + 2, columns * CELL + 2, 3)
    assert np.array_equal(grid[..., 0], grid[..., 2])
    images = [
        grid[CELL * r + 2 : CELL * r + 34 : 4, CELL * c + 2 : CELL * c + 34 : 4, 0] for r, c in np.ndindex(rows, columns)
    ]
    return np.stack(images).reshape(rows, columns, 8, 8)


def distance(a, b) -> int:
    assert a.shape == b.shape
    return abs(a - b).max()


# ---- drawing --------------------------------------------------------------------------------------------------------


def test_sample_writes_an_npz_in_the_adm_format(run, tmp_path, capsys):
    file = tmp_path / "a" / "samples.npz"
    assert main(["sample", str(run), "--num=5", "--labels=3,7", "-o", str(file)]) == 0
    assert f"5 images in {file}" in capsys.readouterr().out
    with np.load(file) as archive:
        assert archive["arr_0"].dtype == np.uint8
        assert archive["arr_0"].shape == (5, 8, 8, 1)
        assert archive["arr_1"].tolist() == [3, 7, 3, 7, 3]
    assert [entry.name for entry in file.parent.iterdir()] == ["samples.npz"]


WAYS = {
    "jacobi": (["--method=jacobi"], 0, 1),
    "gauss_seidel": (["--method=gauss_seidel", "--batch-size=2"], 0, 1),
    "cpu": (["--device=cpu"], 0, 0),
    "bf16-mixed": (["--precision=bf16-mixed"], 0, 40),
    "seed": (["--seed=1"], 20, 255),
    "best of 2": (["--best-of=2"], 20, 255),
    "temperature": (["--temperature=0.5"], 20, 255),
    "noise": (["--no-denoise"], 2, 255),
    "annealed": (["--guidance=2", "--schedule=annealed", "--guided=mu"], 2, 255),
    "raw weights": (["--weights=raw"], 2, 255),
    "best of 4 or fewer": (["--best-of=4", "--least=1", "--rule=exact", "--precision=bf16-mixed", "--guidance=1"], 20, 255),
}


@pytest.mark.parametrize(("options", "least", "most"), WAYS.values(), ids=WAYS)
def test_options_of_sample_change_the_images_as_much_as_they_should(run, tmp_path, options, least, most):
    for name, more in (("plain", []), ("changed", options), ("again", options)):
        assert main(["sample", str(run), "--num=6", "-o", str(tmp_path / f"{name}.npz"), *more]) == 0
    plain, changed, again = (read_npz(tmp_path / f"{name}.npz") for name in ("plain", "changed", "again"))
    assert least <= distance(plain, changed) <= most
    assert np.array_equal(changed, again)


def test_sample_says_how_parallel_decoding_went(run, tmp_path, capsys):
    arguments = ["sample", str(run), "--num=3", "--batch-size=2", "-o", str(tmp_path / "a.png")]
    assert main([*arguments, "--method=jacobi"]) == 0  # of 4 tokens it allows itself one sweep
    printed = capsys.readouterr().out
    assert "largest residual of parallel decoding 0.0e+00; 4 blocks went over to the sequential loop" in printed
    assert main([*arguments, "--method=sequential"]) == 0
    assert "decoding" not in capsys.readouterr().out


def test_sample_says_what_is_not_finite(tmp_path, capsys):
    flow = TarFlow(image_size=4, channels=1, patch_size=2, width=8, head_dim=8, blocks=1, layers=1)
    flow.blocks[0].proj_out.bias.data.fill_(float("nan"))
    flow.save_pretrained(tmp_path / "flow")
    assert main(["sample", str(tmp_path / "flow"), "--num=3", "-o", str(tmp_path / "a.npz")]) == 0
    assert "3 images had numbers that are not finite (grey there)" in capsys.readouterr().out
    assert (read_npz(tmp_path / "a.npz") == 128).any(axis=(1, 2, 3)).all()


def test_several_processes_and_a_second_start_give_the_same_folder(run, tmp_path, capfd):
    """What was lost is drawn again, by two processes; nothing else is."""
    arguments = ["sample", str(run), "--num=140", "--batch-size=32", "--no-denoise", "-o", str(tmp_path / "images")]
    assert main(arguments) == 0
    files = sorted((tmp_path / "images").glob("*.png"))
    assert len(files) == 140
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    for part in (1, 2):  # images 64 to 139
        (tmp_path / "images" / ".flowback" / f"part_{part:06d}.json").unlink()
    for file in files[64:]:
        file.unlink()
    capfd.readouterr()
    assert main([*arguments, "--processes=2"]) == 0
    assert capfd.readouterr().out.count(f"140 images in {tmp_path / 'images'}") == 1
    assert sorted((tmp_path / "images").glob("*.png")) == files
    for number, file in enumerate(files):
        assert file.read_bytes() == before[file][0]
        assert (file.stat().st_mtime_ns == before[file][1]) == (number < 64)


# ---- several processes, and what ends them ---------------------------------------------------------------------------

MANY = ["--num=768", "--batch-size=1", "--device=cpu"]  # 12 parts, a second or two each


def start(run: Path, output: Path) -> Forked:
    return Forked(main, ["sample", str(run), *MANY, "--processes=2", "-o", str(output)])


def wait_for_another_part(process: Forked, output: Path) -> None:
    before = len(list(output.rglob("part_*.json")))
    while process.poll() is None and len(list(output.rglob("part_*.json"))) == before:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


def processes_of(output: Path) -> dict[int, str]:
    """The processes that have it in their command line."""
    table = subprocess.run(["ps", "-ewwo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=1) for line in table.splitlines() if str(output) in line]
    return {int(pid): words for pid, words in lines}


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps, to find processes")
def test_killed_or_interrupted_nothing_goes_on_and_what_was_drawn_is_kept(run, tmp_path, capfd):
    output = tmp_path / "images"
    process = start(run, output)
    wait_for_another_part(process, output)
    others = processes_of(output)
    workers = [pid for pid, words in others.items() if "torch.distributed.run" not in words]
    assert len(workers) == 2, others
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert len(errors.strip().splitlines()) == 1
    assert all(word in errors for word in ("flowback: ", "ended early", "signal 9", "again to resume"))
    assert not processes_of(output)

    process = start(run, output)
    wait_for_another_part(process, output)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (130, "flowback: interrupted\n")
    assert not processes_of(output)

    parts = sorted(output.rglob("part_*.json"))
    assert 2 <= len(parts) < 12
    kept = {file: file.stat().st_mtime_ns for file in parts}
    assert main(["sample", str(run), *MANY, "--batch-size=64", "-o", str(output)]) == 0
    assert {file: file.stat().st_mtime_ns for file in parts} == kept
    assert main(["sample", str(run), *MANY, "--batch-size=64", "-o", str(tmp_path / "undisturbed")]) == 0
    assert distance(read_folder(output), read_folder(tmp_path / "undisturbed")) <= 1


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps, to find processes")
def test_processes_end_when_the_one_that_started_them_is_killed(run, tmp_path):
    output = tmp_path / "images"
    process = start(run, output)
    wait_for_another_part(process, output)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while processes_of(output) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_of(output)


def test_what_goes_wrong_in_a_process_is_said_in_one_line(run, tmp_path, monkeypatch, capsys):
    mine, output = tmp_path / "flow", tmp_path / "a.npz"
    shutil.copytree(next((run / "checkpoints").iterdir()), mine)

    def checked_and_gone(*args):  # the weights, before the processes can read them
        (mine / "model.safetensors").unlink()
        return checked_store(*args)

    monkeypatch.setattr("flowback.cli.sampling.checked_store", checked_and_gone)
    assert main(["sample", str(mine), "--num=3", "--processes=2", "-o", str(output)]) == 1
    errors = capsys.readouterr().err.strip()
    assert len(errors.splitlines()) == 1
    assert all(word in errors for word in ("flowback: ", "ended early", "model.safetensors", "again to resume"))
    assert not output.exists()


@pytest.mark.parametrize("bad", ["--seed=-1", "--labels=ten", "--method=newton", "--device=nowhere", "-o=a.gif"])
def test_bad_input_is_refused_before_processes_are_started(run, bad, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flowback.cli.sampling._start", lambda options: pytest.fail("started"))
    said = refuse(["sample", str(run), "--processes=2", *bad.split("=", maxsplit=int(bad.startswith("-o")))], capsys)
    assert bad.split("=")[1] in said
    assert not list(tmp_path.iterdir())


def test_another_request_into_the_same_folder_is_refused(run, tmp_path, capsys):
    arguments = ["sample", str(run), "--num=2", "-o", str(tmp_path / "images")]
    assert main(arguments) == 0
    assert "was begun by another request" in refuse([*arguments, "--seed=1"], capsys)
    assert main(arguments) == 0


def test_autotune_measures_and_sample_uses_it(run, tmp_path, capsys):
    mine = tmp_path / "run"
    shutil.copytree(run, mine)
    assert main(["sample", str(mine), "--num=4", "-o", str(tmp_path / "before.npz")]) == 0
    assert main(["autotune", str(mine), "--rows=1,4"]) == 0
    printed = capsys.readouterr().out
    stored = mine / "checkpoints" / "step_00000040" / "decoding.json"
    assert str(stored) in printed.replace("\n", "")
    assert printed.count("block 1") == printed.count("block 2") == 2
    measured = json.loads(stored.read_text())
    assert {rows: len(blocks) for rows, blocks in measured["rows"].items()} == {"1": 2, "4": 2}
    for method in ("jacobi", "sequential"):  # whatever was measured, what is stored is what is used
        for block in measured["rows"]["4"]:
            block["solver"] = {"method": method, "window": None, "draft": False}
        stored.write_text(json.dumps(measured))
        capsys.readouterr()
        assert main(["sample", str(mine), "--num=4", "-o", str(tmp_path / f"{method}.npz")]) == 0
        assert distance(read_npz(tmp_path / "before.npz"), read_npz(tmp_path / f"{method}.npz")) <= 1
        assert ("sequential loop" in capsys.readouterr().out) == (method == "jacobi")


# ---- editing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[], ["--labels=0,1,2"], ["--labels=4"]], ids=str)
def test_decode_gives_back_what_was_encoded(run, digits, tmp_path, capsys, labels):
    file, folder, grid = tmp_path / "a" / "z.safetensors", tmp_path / "b" / "images", tmp_path / "c" / "grid.png"
    assert main(["encode", str(run), *digits, *labels, "-o", str(file)]) == 0
    content = load_file(file)
    assert {name: list(tensor.shape) for name, tensor in content.items()} == {
        "z": [3, 4, 16],
        "log_det": [3],
        "log_prob": [3],
        "labels": [3],
    }
    prior = -0.5 * (content["z"].square() + np.log(2 * np.pi)).sum(dim=(1, 2))
    assert torch.allclose(prior + content["log_det"], content["log_prob"], atol=1e-3)
    if labels:
        assert content["labels"].tolist() == ([0, 1, 2] if "," in labels[0] else [4, 4, 4])
    assert main(["decode", str(run), str(file), "-o", str(folder)]) == 0
    assert main(["decode", str(run), str(file), "-o", str(grid)]) == 0
    images = np.stack([read(digit) for digit in digits])
    assert distance(read_folder(folder), images) <= 1
    assert distance(cells(grid, 2, 2).reshape(4, 8, 8)[:3], images) <= 1
    assert f"3 images in {folder}" in capsys.readouterr().out.replace("\n", "")


def test_decode_with_other_labels_is_swap(run, digits, tmp_path):
    file = tmp_path / "z.safetensors"
    assert main(["encode", str(run), *digits, "--labels=0,1,2", "-o", str(file)]) == 0
    assert main(["decode", str(run), str(file), "--labels=7", "-o", str(tmp_path / "sevens")]) == 0
    assert main(["swap", str(run), *digits, "--labels=0,1,2", "--to=7", "-o", str(tmp_path / "swapped.png")]) == 0
    swapped = cells(tmp_path / "swapped.png", 3, 2)
    assert distance(swapped[:, 1], read_folder(tmp_path / "sevens")) <= 1


def test_interpolate_walks_from_image_to_image(run, digits, tmp_path):
    file = tmp_path / "a" / "way.png"
    assert main(["interpolate", str(run), *digits, "--steps=5", "-o", str(file)]) == 0
    way = cells(file, 2, 5)
    images = np.stack([read(digit) for digit in digits])
    assert distance(way[:, 0], images[:-1]) <= 1
    assert distance(way[:, -1], images[1:]) <= 1
    assert distance(way[:, 2], images[:-1]) > 10
    assert distance(way[:, 2], images[1:]) > 10


def test_swap_draws_every_class(run, digits, tmp_path):
    file = tmp_path / "a" / "all.png"
    assert main(["swap", str(run), *digits[:2], "--labels=0,1", "-o", str(file)]) == 0
    columns = cells(file, 2, 11)
    for row, digit in enumerate(digits[:2]):
        assert distance(columns[row, 0], read(digit)) <= 1
        assert distance(columns[row, 1 + row], read(digit)) <= 1  # its own class
        assert all(distance(columns[row, 1 + k], read(digit)) > 1 for k in range(10) if k != row)


def test_inpaint_draws_within_a_box_or_a_mask(run, digits, tmp_path, capsys):
    inside = np.zeros((8, 8), dtype=bool)
    inside[3:5, 2:6] = True
    Image.fromarray(inside.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    arguments = ["inpaint", str(run), *digits[:2], "--num=3", "--steps=4", "--tries=2"]
    box, mask, other = tmp_path / "a" / "box.png", tmp_path / "masked.png", tmp_path / "other.png"
    assert main([*arguments, "--box=2,3,4,2", "-o", str(box)]) == 0
    assert "% of the steps were accepted" in capsys.readouterr().out
    assert main([*arguments, f"--mask={tmp_path / 'mask.png'}", "-o", str(mask)]) == 0
    assert main([*arguments, "--box=2,3,4,2", "--seed=1", "-o", str(other)]) == 0
    rows = cells(box, 2, 5)
    for row, digit in zip(rows, digits, strict=False):
        assert distance(row[0], read(digit)) == 0
        assert (row[1][inside] == 128).all()
        assert all(np.array_equal(image[~inside], read(digit)[~inside]) for image in row)
        assert all(distance(a[inside], b[inside]) > 1 for a, b in ((row[2], row[3]), (row[3], row[4]), (row[0], row[2])))
    assert np.array_equal(cells(mask, 2, 5), rows)
    assert distance(cells(other, 2, 5), rows) > 1


def test_inpaint_without_steps_says_nothing_of_them(run, digits, tmp_path, capsys):
    file = tmp_path / "a.png"
    assert main(["inpaint", str(run), digits[0], "--box=0,0,8,8", "--num=1", "--steps=0", "-o", str(file)]) == 0
    assert "accepted" not in capsys.readouterr().out
    assert cells(file, 1, 3).shape == (1, 3, 8, 8)


# ---- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["sample", "autotune", "encode", "decode", "interpolate", "swap", "inpaint"])
def test_help_explains_every_option(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    for option in capsys.readouterr().out.split("\n  -")[1:]:
        assert len(" ".join(option.split())) > 25, option
