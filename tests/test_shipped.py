"""The flows that come with the package: whole, good for what their cards say, and found without a network."""

import json

import pytest
import torch

from flowback import classify, from_pretrained
from flowback.cli import main
from flowback.core.files import file_hash
from flowback.core.units import from_levels
from flowback.data import DataConfig, load_data
from flowback.data.datasets import DEBIAN_FASHION_MNIST
from flowback.data.splits import spread
from flowback.flow.io import CARD, SHIPPED, shipped
from flowback.studio.shelf import Shelf

LEAST = {"digits": 0.95, "fashion_mnist": 0.75, "fashion_mnist_semantic": 0.8}  # share that `exact` gets right
LEAST_DRAWN = {"digits": 0.9, "fashion_mnist": 0.9, "fashion_mnist_semantic": 0.75}  # of guided samples, by the flow itself
LEAST_OF_STUDENTS = 0.8  # share of guided samples that the flow takes for the class asked for
NAMES = [name.removeprefix("flowback/") for name in shipped()]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_flow_is_whole(name):
    sums = json.loads((SHIPPED / name / "checksums.json").read_text())
    assert sums == {str(f.relative_to(SHIPPED / name)): file_hash(f) for f in (SHIPPED / name).rglob("*.safetensors")}
    assert "model.safetensors" in sums
    assert "| exact |" in (SHIPPED / name / CARD).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_flow_classifies_real_images(name):
    if name != "digits" and not DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    flow = from_pretrained(f"flowback/{name}")
    data = load_data(DataConfig(name="digits" if name == "digits" else "fashion_mnist"))
    pixels, y = data.held_out[spread(len(data.held_out), 100)]
    right = classify(flow, from_levels(pixels, data.levels), "exact").argmax(dim=1) == y
    assert right.float().mean() >= LEAST[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_flow_draws_what_is_asked_for(name):
    flow = from_pretrained(f"flowback/{name}")
    y = torch.arange(50) % flow.num_classes
    x = flow.sample(y=y, guidance=1.0, seed=0)
    assert x.shape == (50, *flow.data_shape)
    assert flow.dtype == torch.float32
    assert (classify(flow, x, "shortlist_3").argmax(dim=1) == y).float().mean() >= LEAST_DRAWN[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_student_of_a_shipped_flow_draws_what_is_asked_for(name):
    flow = from_pretrained(f"flowback/{name}")
    y = torch.arange(50) % flow.num_classes
    x = flow.sample(y=y, sampler="student", steps=4, guidance=1.0, seed=0)
    assert (classify(flow, x, "exact").argmax(dim=1) == y).float().mean() >= LEAST_OF_STUDENTS


def test_commands_and_the_studio_know_them_where_there_are_no_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "flowback/digits", "-o", "x.png", "--num", "4", "--labels", "3"]) == 0
    shelf = Shelf(shipped(), torch.device("cpu"))
    assert shelf.first() in shelf.entries
    assert {shelf.place(name) for name in shelf.entries} == set(shipped())
    assert shelf.classes("flowback/digits") == [str(k) for k in range(10)]


def test_a_folder_of_ones_own_comes_first(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained.save_pretrained("flowback/digits")
    assert from_pretrained("flowback/digits").config == trained.config
