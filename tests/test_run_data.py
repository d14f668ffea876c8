"""A run and its data: what it was trained on is known again, whatever came, went or changed names since."""

import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowback.core.errors import InputError
from flowback.data import DataConfig, ImageSet, load_data
from flowback.data.sources import DiskSplit
from flowback.data.splits import MemorySplit
from flowback.flow.config import FlowConfig
from flowback.reports.evaluate import EvaluationConfig, evaluate
from flowback.runs.config import RunConfig, TrainConfig
from flowback.runs.folder import DATA, open_run, other_data, run_data, training_data
from flowback.training import train


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "cache"))


def picture(number: int) -> bytes:
    """A PNG in color whose pixels, and often size, are different for every number."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8 + number % 7, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def add(file: Path, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(picture(number))


def tree(root: Path, images: int = 8) -> Path:
    for k, name in enumerate(("ant", "bee")):
        for i in range(images):
            add(root / name / f"{i}.png", 100 * k + i)
    return root


def config(root: Path, **data) -> RunConfig:
    flow = FlowConfig(patch_size=4, width=16, head_dim=8, blocks=2, layers=1)
    schedule = TrainConfig(
        steps=2, batch_size=4, warmup=1, eval_every=1, sample_every=2, checkpoint_every=1, eval_images=99
    )
    return RunConfig(
        run=str(root.parent / "run"),
        data=DataConfig(**{"name": "folder", "path": str(root), "image_size": 8, **data}),
        flow=flow,
        train=replace(schedule, accelerator="cpu"),
    )


def begin(one: RunConfig, given: ImageSet | None = None) -> ImageSet:
    """Begin a run without training; returns its data."""
    data = training_data(one, given)
    with open_run(one, data):
        return data


def resumed(one: RunConfig, given: ImageSet | None = None) -> ImageSet:
    return training_data(replace(one, train=replace(one.train, resume=True)), given)


def names(split) -> set[bytes]:
    assert isinstance(split, DiskSplit)
    return set(split.source.names(split.indices.tolist()))


def swap(root: Path) -> None:
    (root / "ant").rename(root / "other")
    (root / "bee").rename(root / "ant")
    (root / "other").rename(root / "bee")


CHANGES = {
    "renamed class": (
        lambda root: (root / "ant").rename(root / "zebra"),
        "^class ant is now zebra; expected the 2 classes",
    ),
    "class gone": (lambda root: shutil.rmtree(root / "ant"), "^ant of the classes is gone; expected the 2 classes"),
    "class new": (
        lambda root: [add(root / "cow" / f"{i}.png", i) for i in range(3)],
        "3 images are new, the first: .*cow/0.png",
    ),
    "images gone": (
        lambda root: [(root / "ant" / f"{i}.png").unlink() for i in (1, 2)],
        "2 images are gone, the first: ant/1",
    ),
    "image new": (lambda root: add(root / "bee" / "x.png", 9), "1 image is new, the first: .*bee/x.png; expected the same"),
    "image renamed": (
        lambda root: (root / "bee" / "3.png").rename(root / "bee" / "y.png"),
        "1 image is gone, the first: bee/3.png, 1 image is new, the first: .*bee/y.png",
    ),
    "image changed": (lambda root: add(root / "bee" / "3.png", 9), "1 image is changed, the first: .*bee/3.png"),
    "classes swapped": (swap, "16 images are changed"),
}


@pytest.mark.parametrize("by_content", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_the_data_that_it_began_with_alone(tmp_path, monkeypatch, change, by_content):
    if not by_content:
        monkeypatch.setattr("flowback.data.inventory.CONTENT_BYTES", 0)
    one = config(tree(tmp_path / "images"))
    before = begin(one)
    again = resumed(one)
    assert names(again.held_out) == names(before.held_out)
    fingerprint = before.train.fingerprint()
    assert again.train.fingerprint() == fingerprint
    (tmp_path / "images").rename(tmp_path / "moved")  # its place is free
    moved = replace(one, data=replace(one.data, path=str(tmp_path / "moved")))
    assert resumed(moved).train.fingerprint() == fingerprint
    do, words = CHANGES[change]
    do(tmp_path / "moved")
    with pytest.raises(InputError, match=words) as no:
        resumed(moved)
    assert "\n" not in str(no.value)


def test_no_image_that_was_trained_on_is_ever_held_out(tmp_path, capsys):
    one = config(tree(tmp_path / "images"))
    before = begin(one)
    for k in range(40):
        add(tmp_path / "images" / ("ant" if k % 2 else "bee") / f"new{k}.png", 1000 + k)
    for k in range(4):
        add(tmp_path / "images" / "aardvark" / f"{k}.png", 2000 + k)  # before the others by name
    held_out, trained = sorted(names(before.held_out)), sorted(names(before.train))
    (tmp_path / "images" / held_out[0].decode()).write_bytes((tmp_path / "images" / trained[0].decode()).read_bytes())
    (tmp_path / "images" / trained[1].decode()).unlink()
    after = run_data(tmp_path / "run", one.data)
    assert after.classes == ["ant", "bee"]
    assert names(after.held_out) == set(held_out[1:])
    assert names(after.train) == {*trained} - {trained[1]}
    assert after.held_out.labels.tolist() == [name.startswith(b"bee") for name in sorted(held_out[1:])]
    said = " ".join(capsys.readouterr().out.split())
    assert "since this run began: 1 image is gone, the first: " in said
    assert "44 images are new" in said
    assert "1 image is changed" in said
    assert "only what was there then and has not changed is used" in said


def test_other_data_is_refused_in_evaluation(tmp_path):
    one = config(tree(tmp_path / "images"))
    begin(one)
    (tmp_path / "images" / "ant").rename(tmp_path / "images" / "zebra")
    with pytest.raises(InputError, match="class ant is now zebra"):
        run_data(tmp_path / "run", one.data)
    for k in range(4):
        for name in ("ant", "bee"):
            add(tmp_path / "others" / name / f"{k}.png", 3000 + k)
    with pytest.raises(InputError, match="expected some of its images"):
        run_data(tmp_path / "run", replace(one.data, path=str(tmp_path / "others")))


def test_new_files_hardly_move_the_split_of_a_new_run(tmp_path):
    root = tree(tmp_path / "images", images=50)
    before = load_data(config(root).data)
    for k in range(10):
        add(root / "ant" / f"a{k}.png", k)
    after = load_data(config(root).data)
    assert len(names(before.held_out) ^ names(after.held_out)) <= 4
    assert len(before.held_out) == 20
    assert len(after.held_out) == 22
    assert names(load_data(config(root, split_seed=1).data).held_out) != names(after.held_out)


def test_a_share_that_rounds_to_all_leaves_one_for_training(tmp_path):
    data = load_data(config(tree(tmp_path / "images", images=2), holdout=0.9).data)
    assert (len(data.train), len(data.held_out)) == (2, 2)


def test_images_that_a_limit_leaves_out_are_not_new(tmp_path):
    one = config(tree(tmp_path / "images"), limit=3)
    before = begin(one)
    assert len(before.train) == 3
    assert names(resumed(one).train) == names(before.train)
    assert names(run_data(tmp_path / "run", one.data).train) == names(before.train)


def test_a_run_that_kept_nothing_of_its_data_has_the_split_and_files_of_version_0_1_0(tmp_path, capsys):
    root = tree(tmp_path / "images")
    one = config(root, channels=3)
    before = load_data(one.data, earlier=True)
    begin(one)
    (tmp_path / "run" / DATA).unlink()
    Image.new("RGB", (8, 8)).save(root / "ant" / "moving.gif")  # which that version did not see
    capsys.readouterr()
    assert names(run_data(tmp_path / "run", one.data).held_out) == names(before.held_out)
    assert "run has no data.npz; its split is drawn as version 0.1.0 did" in " ".join(capsys.readouterr().out.split())
    assert names(resumed(one).held_out) == names(before.held_out)
    (root / "ant").rename(root / "zebra")
    with pytest.raises(InputError, match="class ant is now zebra"):
        resumed(one)


def test_data_in_memory_is_known_again(tmp_path):
    def images(seed: int = 0, classes: tuple[str, ...] = ("ant", "bee"), labels: int = 0) -> ImageSet:
        pixels = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        split = MemorySplit(pixels, (torch.arange(8) + labels) % 2)
        return ImageSet("mine", split, split, list(classes), 8, 3, 256)

    one = config(tmp_path / "images", name="own", path=None)
    begin(one, images())
    resumed(one, images())
    for other, words in (
        (images(seed=1), "the training images are others"),
        (images(labels=1), "the training images are others"),
        (images(classes=("ant", "yak")), "class bee is now yak"),
    ):
        with pytest.raises(InputError, match=words):
            resumed(one, other)
    digits = RunConfig(run=str(tmp_path / "digits"))
    begin(digits)
    resumed(digits)


def test_a_damaged_record_of_the_data_is_named(tmp_path):
    one = config(tree(tmp_path / "images"))
    begin(one)
    file = tmp_path / "run" / DATA
    whole = file.read_bytes()
    for content in (b"", b"text", whole[:-30], whole[:200] + b"x" * 40 + whole[240:]):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"run/data\.npz cannot be read \("):
            resumed(one)


def write_tar(file: Path, numbers: dict[str, int], extra: dict[str, bytes] | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for stem, label in numbers.items():
            for name, content in ((f"{stem}.png", picture(label)), (f"{stem}.cls", b"%d" % label)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_classes_of_shards_that_change_places_are_named(tmp_path):
    root = tmp_path / "shards"
    write_tar(root / "a.tar", {f"{i}": i % 2 for i in range(8)})
    (root / "classes.txt").write_text("ant\nbee\n")
    one = config(root, name="shards")
    before = begin(one)
    assert names(resumed(one).held_out) == names(before.held_out)
    (root / "classes.txt").write_text("bee\nant\n")
    for known in (lambda: resumed(one), lambda: run_data(tmp_path / "run", one.data)):
        with pytest.raises(InputError, match=r"class ant is now bee, by 0\.png of .*a\.tar"):
            known()
    (root / "classes.txt").write_text("ant\nbee\n")
    write_tar(root / "a.tar", {f"{i}": (i + (i == 3)) % 2 for i in range(8)})
    with pytest.raises(InputError, match=r"class bee is now ant, by 3\.png of .*a\.tar"):
        resumed(one)


def test_trained_and_evaluated_on_its_own_images(tmp_path, capsys):
    """The commands' part: training keeps what its data was, and evaluation measures on the images that were held out."""
    one = config(tree(tmp_path / "images"))
    train(one)
    assert RunConfig.read(tmp_path / "run" / "config.yaml").data.channels == 3
    before = evaluate(tmp_path / "run", EvaluationConfig(metrics=("bpd",)))
    for name in ("ant", "bee"):
        for k in range(5):
            add(tmp_path / "images" / name / f"new{k}.png", k)
    capsys.readouterr()
    after = evaluate(tmp_path / "run", EvaluationConfig(metrics=("bpd",)))
    assert after["nats_per_dim"] == before["nats_per_dim"]
    assert "10 images are new" in " ".join(capsys.readouterr().out.split())


# ---- held-out images that cannot be read -------------------------------------------------------------------------------


def test_an_unreadable_held_out_image_is_found_before_the_first_step(tmp_path, capsys):
    one = config(tree(tmp_path / "images"), holdout=0.5)
    file = sorted(names(load_data(one.data).held_out))[2].decode()
    (tmp_path / "images" / file).write_bytes(b"not an image")
    with pytest.raises(InputError, match=f"{file} cannot be read"):
        train(one)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=f"{file} cannot be read"):
        train(replace(one, data=replace(one.data, unreadable=0.1)))
    allowed = replace(one, data=replace(one.data, unreadable=0.2))
    assert train(allowed).state.step == 2
    assert capsys.readouterr().out.count("the next one is taken instead") >= 1
    evaluate(tmp_path / "run", EvaluationConfig(metrics=("bpd",)))


@pytest.mark.parametrize("part", ["held_out", "train"])
def test_an_image_that_is_damaged_later_is_got_past_when_it_is_allowed(tmp_path, part):
    one = config(tree(tmp_path / "images"), holdout=0.5)
    one = replace(one, train=replace(one.train, until=1))
    train(one)
    file = sorted(names(getattr(load_data(one.data), part)))[2].decode()
    (tmp_path / "images" / file).write_bytes(b"not an image")
    goes_on = replace(one, train=replace(one.train, until=None, resume=True))
    with pytest.raises(InputError, match=f"1 image is changed, the first: .*{file}"):
        train(goes_on)
    goes_on = replace(goes_on, data=replace(goes_on.data, unreadable=0.2))
    assert train(goes_on).state.step == 2
    assert RunConfig.read(tmp_path / "run" / "config.yaml").data.unreadable == 0.2
    evaluate(tmp_path / "run", EvaluationConfig(metrics=("bpd", "probe")))


def test_the_next_image_of_the_class_stands_for_an_unreadable_one(tmp_path):
    one = config(tree(tmp_path / "images"), holdout=0.5, unreadable=0.3)
    data = begin(one)
    held_out = sorted(name.decode() for name in names(data.held_out))
    for name in (held_out[0], held_out[3], held_out[7]):
        (tmp_path / "images" / name).write_bytes(b"")
    images, labels = run_data(tmp_path / "run", replace(one.data, unreadable=0.5)).held_out[range(8)]
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[3], images[1])  # the next ones, around the end of the class
    assert torch.equal(images[7], images[4])


# ---- other data, other forms of names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("by_content", [True, False])
def test_images_that_were_trained_on_are_not_held_out_of_other_data(tmp_path, monkeypatch, capsys, by_content):
    if not by_content:
        monkeypatch.setattr("flowback.data.inventory.CONTENT_BYTES", 0)
    one = config(tree(tmp_path / "images"))
    before = begin(one)
    again = other_data(tmp_path / "run", replace(one.data, holdout=0.7))
    assert names(again.held_out)
    assert not names(again.held_out) & names(before.train)
    assert "held-out images were trained on, and are left out" in capsys.readouterr().out
    if by_content:  # under other names, too
        for name in ("ant", "bee"):
            (tmp_path / "images" / name).rename(tmp_path / "images" / f"{name}s")
        renamed = other_data(tmp_path / "run", replace(one.data, holdout=0.7))
        assert {name.replace(b"s/", b"/") for name in names(renamed.held_out)} <= names(before.held_out)
    begins = replace(one, run=str(tmp_path / "fine"), data=replace(one.data, holdout=0.7))
    for start in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000002"):
        fine = training_data(replace(begins, train=replace(begins.train, init=str(start))))
        assert names(fine.held_out) <= names(before.held_out) or by_content
        assert not {name.replace(b"s/", b"/") for name in names(fine.held_out)} & names(before.train)
    assert len(other_data(None, replace(one.data, holdout=0.7)).held_out) == 12


def test_a_move_between_file_systems_that_write_accents_differently_changes_nothing(tmp_path):
    accents = "e\u0301a\u0308", "\u00e9\u00e4"  # as letters with marks, and as one character each
    one = config(tree(tmp_path / "images"))
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).rename(tmp_path / "images" / f"{name} {accents[0]}")
    add(tmp_path / "images" / f"ant {accents[0]}" / f"{accents[0]}.png", 77)
    before = begin(one)
    for name in ("ant", "bee"):
        (tmp_path / "images" / f"{name} {accents[0]}").rename(tmp_path / "images" / f"{name} {accents[1]}")
    (tmp_path / "images" / f"ant {accents[1]}" / f"{accents[0]}.png").rename(
        tmp_path / "images" / f"ant {accents[1]}" / f"{accents[1]}.png"
    )
    assert len(resumed(one).train) == len(before.train)
