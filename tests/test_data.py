import gzip
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from flowback.core.errors import InputError
from flowback.data import DataConfig, batches, load_data, load_image, step_generator
from flowback.data.batches import StepOrder
from flowback.data.datasets import DEBIAN_FASHION_MNIST, _digits_table
from flowback.data.splits import MemorySplit, split_indices


def write_tree(root: Path, classes: int = 3, images: int = 5, size: tuple[int, int] = (12, 9)) -> Path:
    rng = np.random.default_rng(0)
    for k in range(classes):
        (root / f"class{k}").mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{k}" / f"{i}.png")
    return root


def folder_config(root: Path, **changes) -> DataConfig:
    return replace(DataConfig(name="folder", path=str(root), image_size=8), **changes)


def write_fashion(root: Path, train: int = 30, test: int = 10) -> Path:
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        head = np.array([0x803, count, 28, 28], ">u4").tobytes()
        with gzip.open(root / f"{name}-images-idx3-ubyte.gz", "wb") as stream:
            stream.write(head + images.tobytes())
        (root / f"{name}-labels-idx1-ubyte").write_bytes(np.array([0x801, count], ">u4").tobytes() + labels.tobytes())
    return root


def test_digits_are_split_by_class_and_no_image_is_in_both():
    data = load_data(DataConfig())
    assert len(data.train) + len(data.held_out) == 1797
    assert (data.image_size, data.channels, data.levels, len(data.classes)) == (8, 1, 17, 10)
    counts = torch.bincount(data.held_out.labels, minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert int(data.train[range(len(data.train))][0].max()) == 16


def test_split_is_fixed_by_its_seed():
    a, b, c = (load_data(DataConfig(split_seed=s)).held_out.fingerprint() for s in (1, 1, 2))
    assert a == b
    assert a != c


@given(st.lists(st.integers(0, 3), min_size=8, max_size=60), st.floats(0.05, 0.9), st.integers(0, 5))
def test_split_partitions_and_holds_out_of_every_class(labels, holdout, seed):
    y = torch.tensor(labels)
    train, held = split_indices(y, holdout, seed)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(len(y)))
    assert set(y[held].tolist()) == set(labels)


def test_limit_takes_that_many_training_images():
    assert len(load_data(DataConfig(limit=100)).train) == 100
    assert len(load_data(DataConfig(limit=10**6)).train) == 1438


def test_fashion_mnist_reads_plain_and_gzipped_idx(tmp_path):
    data = load_data(DataConfig(name="fashion_mnist", path=str(write_fashion(tmp_path))))
    images, labels = data.train[[0, 3]]
    assert images.shape == (2, 1, 28, 28)
    assert labels.tolist() == [0, 3]
    assert len(data.held_out) == 10


@pytest.mark.parametrize(
    ("size", "above", "left"), [(28, 0, 0), (29, 0, 0), (32, 2, 2), ((32, 28), 2, 0), ((28, 33), 0, 2), ((40, 32), 6, 2)]
)
def test_fashion_mnist_is_padded_with_zeros_around_its_middle(tmp_path, size, above, left):
    write_fashion(tmp_path)
    own, padded = (load_data(DataConfig(name="fashion_mnist", path=str(tmp_path), image_size=s)) for s in (None, size))
    assert (own.image_size, padded.image_size) == (28, size)
    assert own.size == (28, 28)
    height, width = padded.size
    assert padded.size == (size if isinstance(size, tuple) else (size, size))
    for small, large in ((own.train, padded.train), (own.held_out, padded.held_out)):
        everything = range(len(small))
        expected = torch.zeros(len(small), 1, height, width, dtype=torch.uint8)
        expected[..., above : above + 28, left : left + 28] = small[everything][0]
        assert torch.equal(large[everything][0], expected)
        assert torch.equal(large.labels, small.labels)


@pytest.mark.parametrize("size", [1, 16, 27, (27, 32), (32, 27)])
def test_fashion_mnist_smaller_than_it_is_is_refused(tmp_path, size):
    write_fashion(tmp_path)
    message = f"data.image_size must be at least 28 for fashion_mnist, by padding, got {size}"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_data(DataConfig(name="fashion_mnist", path=str(tmp_path), image_size=size))


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_fashion_mnist_is_found_where_debian_puts_it():
    data = load_data(DataConfig(name="fashion_mnist"))
    assert (len(data.train), len(data.held_out)) == (60000, 10000)
    assert torch.bincount(data.train.labels).tolist() == [6000] * 10


def test_fashion_mnist_that_is_cut_off_is_refused(tmp_path):
    file = write_fashion(tmp_path) / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz is not a whole IDX file"):
        load_data(DataConfig(name="fashion_mnist", path=str(tmp_path)))


def test_folder_reads_classes_sizes_and_colours(tmp_path):
    data = load_data(folder_config(write_tree(tmp_path)))
    images, labels = data.train[[0, len(data.train) - 1]]
    assert data.classes == ["class0", "class1", "class2"]
    assert images.shape == (2, 3, 8, 8)
    assert labels.tolist() == [0, 2]
    assert load_data(folder_config(tmp_path, channels=1)).train[[0]][0].shape == (1, 1, 8, 8)


def test_image_is_turned_upright_by_its_exif_tag(tmp_path):
    image = Image.new("RGB", (10, 20))
    image.paste((255, 0, 0), (0, 0, 10, 10))  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.save(tmp_path / "a.png", exif=exif)
    pixels = load_image(tmp_path / "a.png", 10, 3)
    assert pixels[0, -1, 5] == 255
    assert pixels[0, 0, 5] == 0


def empty_class(root):
    write_tree(root)
    (root / "empty").mkdir()


BAD_FOLDERS = {
    "empty": (lambda root: None, "0 class folders and no images; expected at least 2 classes, or images"),
    "empty class": (empty_class, "class folder .*empty has 0 images"),
}


@pytest.mark.parametrize(("make", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folder_is_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        load_data(folder_config(tmp_path))


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        load_data(folder_config(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"data\.path is missing"):
        load_data(DataConfig(name="folder", image_size=8))
    with pytest.raises(InputError, match=r"data\.image_size is missing"):
        load_data(DataConfig(name="folder", path=str(tmp_path)))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "truncated"])
def test_unreadable_image_is_one_sentence(tmp_path, content, workers):
    write_tree(tmp_path, classes=2, images=2)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:150] if content is None else content)
    data = load_data(folder_config(tmp_path, holdout=0.5))
    with pytest.raises(InputError, match=r"^image .*\.png cannot be read \([^\n]*\)$"):
        list(batches(data.train, 2, seed=0, start=0, stop=1, workers=workers))


BAD_CONFIGS = [
    ({"name": "cats"}, "data.name must be one of digits, fashion_mnist, own, folder, imagenet, shards, got 'cats'"),
    ({"holdout": 0.0}, "data.holdout must be a share .*, got 0.0"),
    ({"holdout": 1.0}, "data.holdout must be a share .*, got 1.0"),
    ({"channels": 2}, r"data.channels must be 1 \(grey\) or 3 \(color\), or null, got 2"),
    ({"limit": 0}, "data.limit must be .* at least 1, got 0"),
    ({"workers": -1}, "data.workers must be .* at least 0, got -1"),
    ({"image_size": 0}, "data.image_size must be .*, got 0"),
    ({"image_size": [8, 0]}, "data.image_size must be .*pair.*got"),
    ({"image_size": (8, 8, 8)}, "data.image_size must be .*pair.*got"),
    ({"image_size": (8, 2.5)}, "data.image_size must be .*pair.*got"),
    ({"image_size": "8"}, "data.image_size must be .*pair.*got '8'"),
    ({"image_size": True}, "data.image_size must be .*got True"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CONFIGS)
def test_bad_data_config_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**options)


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 3), st.integers(0, 20))
def test_order_is_a_function_of_seed_and_step(count, batch, seed, start):
    whole = list(StepOrder(count, batch, seed, 0, start + 5))
    assert list(StepOrder(count, batch, seed, start, start + 5)) == whole[start:]
    assert all(len(indices) == batch for indices in whole)


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own():
    stream = [i for indices in StepOrder(30, 10, seed=0, start=0, stop=9) for i in indices]
    epochs = [stream[:30], stream[30:60], stream[60:]]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream != [i for indices in StepOrder(30, 10, seed=1, start=0, stop=9) for i in indices]


def test_workers_do_not_change_the_batches():
    split = MemorySplit(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1), torch.arange(20))
    runs = [list(batches(split, 6, seed=3, start=2, stop=6, workers=workers)) for workers in (0, 2)]
    for (i, x, y, _), (j, u, v, _) in zip(*runs, strict=True):
        assert torch.equal(i, j)
        assert torch.equal(x, u)
        assert torch.equal(y, v)
        assert torch.equal(x.flatten().long(), y)


def test_steps_have_noise_of_their_own():
    draws = [torch.rand(4, generator=step_generator(seed, step)) for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])


def test_a_pair_of_equal_sides_is_a_square_and_a_list_is_a_pair():
    assert DataConfig(image_size=[8, 8]) == DataConfig(image_size=8)
    assert DataConfig(image_size=[6, 8]).image_size == (6, 8)
    assert replace(DataConfig(image_size=(6, 8)), limit=3).image_size == (6, 8)


def test_digits_have_one_size():
    for size in (8, (8, 8), [8, 8]):
        assert load_data(DataConfig(image_size=size)).image_size == 8
    assert load_data(DataConfig()).size == (8, 8)
    with pytest.raises(InputError, match=r"data\.image_size must be 8, or null, for digits, got \(8, 16\)"):
        load_data(DataConfig(image_size=(8, 16)))
    with pytest.raises(InputError, match=r"data\.image_size must be 8, or null, for digits, got 16"):
        load_data(DataConfig(image_size=16))


def test_digits_are_those_of_scikit_learn():
    bunch, table = load_digits(), _digits_table()
    assert np.array_equal(table, np.column_stack([bunch.data, bunch.target]))
