"""Images on disk: trees of folders and WebDataset's tars, against what was written into them."""

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flowback.core.errors import InputError
from flowback.data import DataConfig, batches, load_data, load_image
from flowback.data import folders as folders_module


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "cache"))


def picture(number: int, side: int = 8) -> bytes:
    """A PNG whose pixels tell its number."""
    stream = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), number % 256, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def photo(number: int, orientation: int) -> bytes:
    """A JPEG large enough to be decoded at a fraction, different for every number, turned by its EXIF tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp = np.linspace(0, 100, 160)[None, :] * np.linspace(0.2, 1, 100)[:, None] + number
    stream = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def tree(root: Path, parts: tuple[str, ...] = ("",), classes: int = 3, images: int = 4) -> Path:
    for p, part in enumerate(parts):
        for k in range(classes):
            folder = root / part / f"class{k}"
            folder.mkdir(parents=True)
            for i in range(images):
                (folder / f"{i}.png").write_bytes(picture(100 * p + 10 * k + i))
    return root


def config(name: str, path: Path | str, **changes) -> DataConfig:
    return replace(DataConfig(name=name, path=str(path), image_size=8, holdout=0.5), **changes)


def contents(split) -> dict[int, int]:
    """First pixel -> label, of every image."""
    images, labels = split[range(len(split))]
    return dict(zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))


# ---- trees ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_train_and_val_are_taken_as_they_lie(tmp_path, name):
    data = load_data(config(name, tree(tmp_path / "images", ("train", "val"))))
    assert data.classes == ["class0", "class1", "class2"]
    assert contents(data.train) == {10 * k + i: k for k in range(3) for i in range(4)}
    assert contents(data.held_out) == {100 + 10 * k + i: k for k in range(3) for i in range(4)}


def test_fingerprint_goes_with_the_images_and_not_with_their_place(tmp_path):
    first = load_data(config("folder", tree(tmp_path / "a"))).train.fingerprint()
    (tmp_path / "a").rename(tmp_path / "b")
    assert load_data(config("folder", tmp_path / "b")).train.fingerprint() == first
    for file in (tmp_path / "b" / "class0").iterdir():
        file.write_bytes(picture(77))
    assert load_data(config("folder", tmp_path / "b")).train.fingerprint() != first


def test_fingerprints_of_earlier_versions_still_hold(tmp_path):
    """What runs and caches have kept."""
    tree(tmp_path / "a")
    for channels, size, expected in (
        (3, 8, "b060d3c955c23e8e"),
        (1, 8, "225b9fcc56193c3d"),
        (3, [16, 16], "0bfadc424aac6eb6"),
    ):
        changed = config("folder", tmp_path / "a", channels=channels, image_size=size)
        assert load_data(changed).train.fingerprint() == expected


@pytest.mark.parametrize("name", ["folder", "imagenet", "shards"])
@pytest.mark.parametrize("size", [(6, 12), (12, 6)])
def test_images_that_are_not_square(tmp_path, name, size):
    files = {f"class{k}/{i}.jpg": photo(30 * k + 10 * i, orientation=1 + i) for k in range(2) for i in range(4)}
    for file, content in files.items():
        (tmp_path / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / file).write_bytes(content)
    write_tar(tmp_path / "shards" / "all.tar", files)
    square = config(name, tmp_path / ("shards" if name == "shards" else "images"), channels=1)
    data = load_data(replace(square, image_size=size))
    assert (data.image_size, data.size) == (size, size)
    expected = {load_image(content, size, 1).numpy().tobytes() for content in files.values()}
    found = [image for split in (data.train, data.held_out) for image in split[range(len(split))][0]]
    assert {tuple(image.shape) for image in found} == {(1, *size)}
    assert {image.numpy().tobytes() for image in found} == expected
    assert len({load_data(replace(square, image_size=s)).train.fingerprint() for s in (6, 12, (6, 12), (12, 6))}) == 4
    (raw,) = batches(data.train, 4, seed=0, start=0, stop=1, workers=1)
    assert raw.images.shape == (4, 1, *size)


def test_a_large_tree_is_remembered_and_a_change_is_seen(tmp_path, monkeypatch):
    root = tree(tmp_path / "images")
    monkeypatch.setattr(folders_module, "INDEXED", 5)
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1e9, 1e9))  # long settled
    scans, real = [], folders_module._scan
    monkeypatch.setattr(folders_module, "_scan", lambda base, unit: scans.append(unit) or real(base, unit))
    first = load_data(config("folder", root))
    assert len(scans) == 3
    again = load_data(config("folder", root))
    assert len(scans) == 3
    assert contents(again.train) == contents(first.train)
    assert again.train.fingerprint() == first.train.fingerprint()
    (root / "class1" / "new.png").write_bytes(picture(99))
    changed = load_data(config("folder", root))
    assert len(scans) == 6
    assert 99 in contents(changed.train) | contents(changed.held_out)


def test_a_class_of_val_that_train_lacks_is_named(tmp_path):
    root = tree(tmp_path / "images", ("train", "val"))
    (root / "val" / "class1").rename(root / "val" / "other")
    with pytest.raises(InputError, match=r"val/other is not in .*train; expected its classes"):
        load_data(config("folder", root))


def test_jpegs_decoded_at_a_fraction_differ_by_less_than_a_level(tmp_path):
    from sklearn.datasets import load_sample_image

    file = tmp_path / "china.jpg"
    photo = Image.fromarray(load_sample_image("china.jpg"))
    photo.save(file, quality=92)
    plain = Image.open(file).convert("RGB")
    side = min(plain.size)
    left, top = (plain.width - side) / 2, (plain.height - side) / 2
    expected = plain.resize((32, 32), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    found = load_image(file, 32, 3)
    difference = (found.permute(1, 2, 0).float() - torch.from_numpy(np.array(expected)).float()).abs()
    assert difference.mean() < 1
    assert Image.open(file).size == (640, 427)  # large enough to be decoded at half of its size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(24, 16), (400, 300)], ids=["whole", "drafted"])
def test_images_are_upright_by_their_tag(tmp_path, orientation, size):
    from PIL import ImageOps

    ramp = np.linspace(0, 255, size[0])[None, :] * np.linspace(0.2, 1, size[1])[:, None]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "ramp.jpg"
    Image.fromarray(ramp.astype(np.uint8)).save(file, exif=exif, quality=95)
    expected = ImageOps.fit(ImageOps.exif_transpose(Image.open(file)), (8, 8), Image.Resampling.LANCZOS)
    found = load_image(file, 8, 1)[0].float()
    assert (found - torch.from_numpy(np.array(expected)).float()).abs().max() < 6


# ---- tars -----------------------------------------------------------------------------------------------------------


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def numbered(numbers, label="cls") -> dict[str, bytes]:
    members = {}
    for n in numbers:
        members[f"{n:05d}.png"] = picture(n)
        members[f"{n:05d}.{label}"] = str(n % 3).encode() if label == "cls" else json.dumps({"label": n % 3}).encode()
    return members


@given(counts=st.lists(st.integers(1, 6), min_size=2, max_size=4), label=st.sampled_from(["cls", "json"]))
def test_every_sample_of_every_tar_is_read_with_its_label(tmp_path_factory, counts, label):
    root, first = tmp_path_factory.mktemp("shards"), 0
    for i, count in enumerate(counts):
        write_tar(root / f"train-{i:03d}.tar", numbered(range(first, first + count), label))
        first += count
    write_tar(root / "val-000.tar", numbered(range(100, 103), label))
    write_tar(root / "train-999.tar", numbered(range(50, 53), label))  # all classes, whatever was drawn above
    data = load_data(config("shards", root))
    assert contents(data.train) == {n: n % 3 for n in (*range(first), *range(50, 53))}
    assert contents(data.held_out) == {n: n % 3 for n in range(100, 103)}


def test_folders_in_a_tar_are_classes_where_there_are_no_numbers(tmp_path):
    members = {f"{name}/{i}.png": picture(10 * k + i) for k, name in enumerate(("cat", "dog")) for i in range(3)}
    write_tar(tmp_path / "shards" / "all.tar", members)
    data = load_data(config("shards", tmp_path / "shards"))
    assert data.classes == ["cat", "dog"]
    assert contents(data.train) | contents(data.held_out) == {10 * k + i: k for k in range(2) for i in range(3)}


def test_names_of_classes_and_patterns_of_paths(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"part-{i}.tar", numbered(range(6 * i, 6 * i + 6)))
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    data = load_data(config("shards", tmp_path / "part-{0..1}.tar"))
    assert data.classes == ["a", "b", "c"]
    assert sorted(contents(data.train) | contents(data.held_out)) == list(range(12))


def test_workers_read_tars_alike(tmp_path):
    write_tar(tmp_path / "shards" / "train.tar", numbered(range(12)))
    write_tar(tmp_path / "shards" / "val.tar", numbered(range(100, 103)))
    split = load_data(config("shards", tmp_path / "shards")).train
    runs = [list(batches(split, 4, seed=1, start=0, stop=5, workers=workers)) for workers in (0, 2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


BROKEN = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:700]), "train.tar"),
    "no tar": (lambda f: f.write_bytes(b"text" * 500), "train.tar"),
    "empty": (lambda f: f.write_bytes(b""), "train.tar"),
    "gone": (lambda f: f.unlink(), "shards"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_damaged_tars_are_named(tmp_path, damage):
    file = write_tar(tmp_path / "shards" / "train.tar", numbered(range(6)))
    spoil, words = BROKEN[damage]
    spoil(file)
    with pytest.raises(InputError, match=words) as refused:
        load_data(config("shards", tmp_path / "shards"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({**numbered(range(6)), "x.png": picture(1)}, "has no class number"),
        ({f"{n}.png": picture(n) for n in range(4)}, "has no label; expected .cls, .json, or a folder in its name"),
        ({"1.cls": b"0", "2.cls": b"1"}, "sample 1 of .*all.tar has no image; expected one"),
        ({**numbered(range(4)), "x.png": picture(1), "x.cls": b"cat"}, "x"),
    ],
    ids=["one without", "none with", "no images", "no number"],
)
def test_samples_without_image_or_label_are_named(tmp_path, members, words):
    write_tar(tmp_path / "shards" / "all.tar", members)
    with pytest.raises(InputError, match=words):
        load_data(config("shards", tmp_path / "shards"))


def test_a_tar_that_changes_under_a_run_is_noticed(tmp_path):
    file = write_tar(tmp_path / "shards" / "all.tar", numbered(range(6)))
    data = load_data(config("shards", tmp_path / "shards"))
    file.unlink()
    write_tar(file, numbered(range(60, 68)))
    with pytest.raises(InputError, match="has changed since this run began"):
        contents(data.train)


# ---- unreadable images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_counted_and_the_next_one_stands_for_them(tmp_path, workers):
    root = tree(tmp_path / "images", ("train", "val"))
    (root / "train" / "class0" / "1.png").write_bytes(b"not an image")
    split = load_data(config("folder", root)).train
    (raw,) = batches(split, 12, seed=0, start=0, stop=1, workers=workers)
    assert len(raw.unreadable) == 1
    assert "class0/1.png cannot be read" in raw.unreadable[0]
    assert raw.indices.tolist().count(2) == 2  # the next one, and itself
    assert 1 not in raw.indices.tolist()
    assert torch.equal(raw.labels, split.labels[raw.indices])


def test_more_than_the_allowed_share_is_refused():
    from flowback.data.batches import Tolerance

    tolerance = Tolerance(0.02, 100)
    assert tolerance.note(["a", "b", "a"]) == ["a", "b"]
    assert tolerance.note(["b"]) == []
    with pytest.raises(InputError, match=r"3 of 100 images cannot be read, the last: c; expected at most a share of 0\.02"):
        tolerance.note(["c"])
    with pytest.raises(InputError, match=r"^a$"):
        Tolerance(0.0, 100).note(["a"])
