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
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flowback.core.errors import InputError
from flowback.data import DataConfig, batches, load_data, load_image
from flowback.data import folders as folders_module
from flowback.data.images import AVIF
from flowback.data.inventory import Inventory
from flowback.data.splits import split_by_name
from flowback.flow.config import FlowConfig
from flowback.runs.config import RunConfig
from flowback.training.build import build_flow


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
        assert load_data(changed, earlier=True).train.fingerprint() == expected


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
        ({"x.png": picture(1), "a/x.png": picture(1)}, "has no label; expected .cls, .json, or a folder in its name"),
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
    data = load_data(config("shards", tmp_path / "shards", channels=1))
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


# ---- folders as people have them ------------------------------------------------------------------------------------


def files(root: Path, *patterns: str, count: int = 3) -> Path:
    """Pictures, each of its own number, `count` for each pattern with a `*`."""
    number = 0
    for pattern in patterns:
        for i in range(count if "*" in pattern else 1):
            file = root / pattern.replace("*", str(i))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(number))
            number += 1
    return root


def found(split) -> set[str]:
    return {name.decode() for name in split.source.names(split.indices.tolist())}


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training"])
@pytest.mark.parametrize(
    "held_out", ["val", "Val", "valid", "VALID", "validation", "Dev", "test", "Test", "eval", "testing"]
)
def test_parts_of_a_tree_are_told_by_their_names(tmp_path, train, held_out):
    root = files(
        tmp_path / "images", f"{train}/ant/*.png", f"{train}/bee/*.png", f"{held_out}/ant/*.png", f"{held_out}/bee/0.png"
    )
    data = load_data(config("folder", root))
    assert data.classes == ["ant", "bee"]
    assert found(data.train) == {f"{train}/{name}/{i}.png" for name in ("ant", "bee") for i in range(3)}
    assert found(data.held_out) == {f"{held_out}/ant/{i}.png" for i in range(3)} | {f"{held_out}/bee/0.png"}


def test_a_test_beside_both_parts_is_left_aside_and_said(tmp_path):
    root = files(tmp_path / "images", *(f"{part}/{name}/*.png" for part in ("train", "test", "valid") for name in "ab"))
    files(root, "annotations/0.png", "0.png", "train/0.png")
    data = load_data(config("folder", root))
    assert {name.split("/")[0] for name in found(data.held_out)} == {"valid"}
    assert len(data.train) == 6
    (note,) = data.notes[:1]
    assert note == (
        f"left aside in {root}: 1 image in it, beside its folders; 1 image in train, beside its folders; "
        "folders annotations, test"
    )


@pytest.mark.parametrize("others", [[], ["test/*.png"], ["test/note.txt"], ["test/unknown/*.png"]])
def test_a_share_of_train_is_held_out_where_no_other_part_has_classes(tmp_path, others):
    root = files(tmp_path / "images", "train/ant/*.png", "train/bee/*.png", *others, count=4)
    data = load_data(config("folder", root))
    assert data.classes == ["ant", "bee"]
    assert (len(data.train), len(data.held_out)) == (4, 4)
    assert not others or "folder test" in data.notes[0]


@pytest.mark.parametrize("names", [("test", "eval"), ("bus", "train"), ("train", "val", "cat")])
def test_such_names_are_classes_where_no_train_has_class_folders(tmp_path, names):
    data = load_data(config("folder", files(tmp_path / "images", *(f"{name}/*.png" for name in names))))
    assert data.classes == sorted(names)


def test_two_folders_for_training_are_refused(tmp_path):
    root = files(tmp_path / "images", *(f"{part}/{name}/*.png" for part in ("train", "Train", "val") for name in "ab"))
    with pytest.raises(InputError, match=r"images has folders Train and train; expected one of them$"):
        load_data(config("folder", root))


def test_what_systems_leave_is_no_class(tmp_path):
    root = files(tmp_path / "images", "ant/*.png", "bee/*.png", "__MACOSX/ant/._0.png", ".ipynb_checkpoints/0.png")
    (root / "ant" / ".DS_Store").write_bytes(b"x")
    data = load_data(config("folder", root, channels=1))
    assert data.classes == ["ant", "bee"]
    assert data.notes == ()


def encoded(kind: str, number: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(stream, kind)
    return stream.getvalue()


KINDS = {".jfif": "JPEG", ".JPG": "JPEG", ".jpe": "JPEG", ".gif": "GIF", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF"}
KINDS |= {".apng": "PNG", ".pnm": "PPM", "": "PNG", ".0001": "JPEG", ".": "GIF", ". 1": "BMP", "no": "WEBP", "of": "TIFF"}
KINDS |= {".avif": "AVIF", "avif": "AVIF"} if AVIF else {}


def test_images_of_every_kind_are_found_by_their_suffix_or_their_first_bytes(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for suffix, kind in KINDS.items():
            (tmp_path / "images" / name / f"image{suffix}").write_bytes(encoded(kind, 77))
        for i, other in enumerate(["a.heic", "b.heic", "notes.TXT", "README", "v1.2", "LICENSE", "empty"]):
            (tmp_path / "images" / name / other).write_bytes(b"text"[: 4 * (i < 6)])
    data = load_data(config("folder", tmp_path / "images"))
    assert len(data.train) + len(data.held_out) == 2 * len(KINDS)
    assert abs(data.train[range(len(data.train))][0].int() - 77).max() < 4
    said = "14 files that are no images (8 without a suffix, 4 .heic, 2 .txt)"
    assert data.notes[0] == f"left aside in {tmp_path / 'images'}: {said}"


def test_what_is_left_aside_is_remembered_with_a_large_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(folders_module, "INDEXED", 5)
    root = files(tmp_path / "images", "ant/*.png", "bee/*.png", "bee/note.txt")
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1e9, 1e9))
    first = load_data(config("folder", root))
    monkeypatch.setattr(folders_module, "_scanned", None)
    assert load_data(config("folder", root)).notes == first.notes
    assert "1 .txt" in first.notes[0]


FLAT = {
    "a folder": ["*.png"],
    "a folder with others": ["*.png", "annotations/note.txt"],
    "a folder with images and a folder": ["*.png", "more/*.png"],
    "parts": ["train/*.png", "val/*.png"],
    "a part": ["train/*.png"],
    "one class": ["faces/*.png"],
    "one class deeper": ["faces/2024/*.png", "faces/2025/*.png"],
}


@pytest.mark.parametrize("layout", FLAT)
def test_images_without_classes_are_for_an_unconditional_flow(tmp_path, layout):
    root = files(tmp_path / "images", *FLAT[layout])
    data = load_data(config("folder", root))
    expected = {str(file.relative_to(root)) for file in root.rglob("*.png")}
    if layout.endswith("others"):
        (root / "annotations" / "note.txt").write_text("text")
        expected -= {"annotations/note.txt"}
    assert found(data.train) | found(data.held_out) == expected
    assert not found(data.train) & found(data.held_out)
    assert data.train.labels.tolist() == [0] * len(data.train)
    assert data.classes == (["faces"] if layout.startswith("one class") else [])
    if layout == "parts":
        assert found(data.held_out) == {f"val/{i}.png" for i in range(3)}
    with pytest.raises(InputError, match=r"expected at least 2; --flow\.num_classes 0 makes an unconditional flow of it"):
        build_flow(RunConfig(data=config("folder", root), flow=FlowConfig(patch_size=4, width=16, head_dim=8)), data)
    unconditional = FlowConfig(patch_size=4, width=16, head_dim=8, num_classes=0)
    assert build_flow(RunConfig(data=config("folder", root), flow=unconditional), data).num_classes == 0


def test_tars_without_classes_are_for_an_unconditional_flow(tmp_path):
    write_tar(tmp_path / "shards" / "all.tar", {f"{n}.png": picture(n) for n in range(6)})
    data = load_data(config("shards", tmp_path / "shards"))
    assert data.classes == []
    assert contents(data.train) | contents(data.held_out) == dict.fromkeys(range(6), 0)


# ---- grey images ----------------------------------------------------------------------------------------------------


def grey_tree(root: Path, mode: str, colored: int = 0) -> Path:
    for k, name in enumerate(("ant", "bee")):
        for i in range(4):
            (root / name).mkdir(parents=True, exist_ok=True)
            ramp = np.linspace(0, 255, 64).reshape(8, 8) * (i + 1) / 4
            if mode == "I;16":
                image = Image.fromarray((ramp * 257).astype(np.uint16))
            elif mode == "CMYK":
                image = Image.merge("CMYK", [*[Image.new("L", (8, 8))] * 3, Image.fromarray(ramp.astype(np.uint8))])
            else:
                image = Image.fromarray(ramp.astype(np.uint8)).convert(mode)
            if 4 * k + i >= 8 - colored:
                image = image.convert("RGB")
                image.putpixel((1, 1), (200, 40, 40))
            image.save(root / name / f"{i}.{'tif' if mode == 'CMYK' else 'png'}")
    return root


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1", "I;16", "CMYK"])
def test_grey_images_are_noticed(tmp_path, mode):
    data = load_data(config("folder", grey_tree(tmp_path / "images", mode)))
    assert data.channels == 1
    assert data.train[[0]][0].shape == (1, 1, 8, 8)
    assert "grey" in data.notes[0]
    obeyed = load_data(config("folder", tmp_path / "images", channels=3))
    assert obeyed.channels == 3
    assert "data.channels 1 fits better" in obeyed.notes[0]


@pytest.mark.parametrize("colored", [1, 8])
def test_one_image_in_color_makes_a_set_one_of_color(tmp_path, colored):
    data = load_data(config("folder", grey_tree(tmp_path / "images", "L", colored)))
    assert (data.channels, data.notes) == (3, ())
    asked = load_data(config("folder", tmp_path / "images", channels=1))
    assert (asked.channels, asked.notes) == (1, ())


def test_images_that_cannot_be_read_are_not_taken_for_grey(tmp_path):
    root = files(tmp_path / "images", "ant/*.png", "bee/*.png")
    for file in root.rglob("*.png"):
        file.write_bytes(b"not an image")
    assert load_data(config("folder", root)).channels == 3


def test_grey_tars_are_noticed(tmp_path):
    write_tar(tmp_path / "shards" / "all.tar", numbered(range(6)))
    assert load_data(config("shards", tmp_path / "shards")).channels == 1


# ---- names in tars --------------------------------------------------------------------------------------------------


def test_dotted_names_in_a_tar_are_whole_names_where_the_first_dot_ends_none(tmp_path):
    members = {}
    for n in range(6):
        members |= {f"2024.05.{n}_a.b.PNG": picture(n), f"2024.05.{n}_a.b.cls": str(n % 2).encode()}
    write_tar(tmp_path / "shards" / "all.tar", members)
    data = load_data(config("shards", tmp_path / "shards"))
    assert contents(data.train) | contents(data.held_out) == {n: n % 2 for n in range(6)}


def test_the_first_dot_ends_a_name_where_it_can(tmp_path):
    members = numbered(range(6))
    members |= {f"{n:05d}.seg.png": picture(100 + n) for n in range(6)} | {"README": b"text", "00001.txt": b"a caption"}
    write_tar(tmp_path / "shards" / "all.tar", members)
    data = load_data(config("shards", tmp_path / "shards", channels=1))
    assert contents(data.train) | contents(data.held_out) == {n: n % 3 for n in range(6)}
    assert data.notes == (
        f"left aside in {tmp_path / 'shards'}: 8 files that are no images (6 .seg.png, 1 .txt, 1 without a suffix)",
    )


@pytest.mark.parametrize(("held_out", "aside"), [("val", "test"), ("validation", "eval"), ("test", None), ("eval", None)])
def test_parts_of_shards_are_told_by_their_names(tmp_path, held_out, aside):
    for part, numbers in (("train", range(6)), (held_out, range(100, 103)), (aside, range(50, 53))):
        if part:
            write_tar(tmp_path / "shards" / f"{part}-0.tar", numbered(numbers))
    data = load_data(config("shards", tmp_path / "shards", channels=1))
    assert contents(data.held_out) == {n: n % 3 for n in range(100, 103)}
    assert data.notes == ((f"left aside in {tmp_path / 'shards'}: shard {aside}-0.tar",) if aside else ())


# ---- names that file systems take -----------------------------------------------------------------------------------

# everything but the separator and the byte that ends a name; text that is no Unicode comes as bytes
CHARACTERS = st.characters(codec="utf-8", exclude_characters="/\0") | st.sampled_from(
    "\udce9\udcff\n\r\t '\"[]{}*?,;:\\|<>$~#%."
)
NAMES = st.text(CHARACTERS, min_size=1, max_size=20).filter(
    lambda name: not name.startswith(".") and os.fsencode(name) not in folders_module.LEFTOVERS
)
PARTS = {*folders_module.TRAIN, *folders_module.HELD_OUT}


@settings(max_examples=8)
@given(
    classes=st.lists(
        NAMES.filter(lambda name: os.fsencode(name).lower() not in PARTS), min_size=2, max_size=3, unique=True
    ),
    stems=st.lists(NAMES, min_size=2, max_size=4, unique=True),
    suffix=st.sampled_from([".png", ".JPG", ".jfif"]),
    seed=st.integers(0, 3),
)
def test_names_of_every_kind_are_read_kept_and_known_again(tmp_path_factory, classes, stems, suffix, seed):
    root = tmp_path_factory.mktemp("names")
    for k, name in enumerate(classes):
        (root / name).mkdir()
        for i, stem in enumerate(stems):
            (root / name / (stem + suffix)).write_bytes(picture(10 * k + i))
    data = load_data(config("folder", root, split_seed=seed))
    assert len(data.train) + len(data.held_out) == len(classes) * len(stems)
    order = sorted(classes, key=lambda name: sorted(classes).index(name))
    expected = {10 * classes.index(name) + i: order.index(name) for name in classes for i in range(len(stems))}
    assert contents(data.train) | contents(data.held_out) == expected
    json.loads(json.dumps(data.classes))
    kept = Inventory.of(data)
    kept.write(root / "kept.npz")
    read = Inventory.read(root / "kept.npz")
    assert read is not None
    again = read.split(load_data(config("folder", root, split_seed=seed + 1)), exact=True)
    assert found_bytes(again.held_out) == found_bytes(data.held_out)
    assert again.classes == data.classes


def found_bytes(split) -> list[bytes]:
    return split.source.names(split.indices.tolist())


@given(
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=60).map(lambda some: some + some),
    holdout=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63 - 1),
    more=st.integers(0, 5),
)
def test_a_split_by_name_is_exact_and_survives_more_images(labels, holdout, seed, more):
    names = [b"%d" % i for i in range(len(labels))]
    train, held_out = split_by_name(names, torch.tensor(labels), holdout, seed)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(len(labels)))
    for k in set(labels):
        count, held = labels.count(k), [i for i in held_out.tolist() if labels[i] == k]
        assert len(held) == min(max(1, round(holdout * count)), count - 1)
    added = [*labels, *[labels[0]] * more]
    names += [b"new%d" % i for i in range(more)]
    _, after = split_by_name(names, torch.tensor(added), holdout, seed)
    moved = {*held_out.tolist()} ^ {i for i in after.tolist() if i < len(labels)}
    assert len(moved) <= more
    reverse = range(len(names))[::-1]
    _, again = split_by_name([names[i] for i in reverse], torch.tensor([added[i] for i in reverse]), holdout, seed)
    assert {reverse[i] for i in again.tolist()} == {*after.tolist()}


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    target=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    channels=st.sampled_from([1, 3]),
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", *["AVIF"] * AVIF]),
)
def test_images_of_every_size_are_read_in_every_size(sizes, target, channels, kind):
    stream = io.BytesIO()
    Image.new("RGB", sizes, (90, 90, 90)).save(stream, kind)
    pixels = load_image(stream.getvalue(), target, channels)
    assert pixels.shape == (channels, *target)
    assert (pixels.int() - 90).abs().max() < 4


def test_where_nothing_is_left_what_was_left_aside_is_said(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "a.heic").write_bytes(b"x")
    said = r"ant has 0 images; expected at least 2; left aside: 2 files that are no images \(2 \.heic\)$"
    with pytest.raises(InputError, match=said):
        load_data(config("folder", tmp_path / "images"))
    with pytest.raises(
        InputError, match=r"0 class folders and no images; .*; left aside: 1 file that is no image \(1 \.heic\)$"
    ):
        load_data(config("folder", tmp_path / "images" / "ant"))


def test_a_folder_around_all_others_is_named(tmp_path):
    root = files(tmp_path / "images", "data/ant/*.png", "data/bee/*.png")
    said = f"all images lie in folders of {root / 'data'}; if these are classes or parts, give data.path {root / 'data'}"
    assert said in load_data(config("folder", root)).notes
