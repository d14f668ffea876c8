"""Labels and numbers of images, in every form that people write them in."""

import numpy as np
import pytest
import torch

from builders import images, random_flow
from flowback import InputError


@pytest.fixture(scope="module")
def flow():
    return random_flow(std=0.1)


FORMS = {
    "tensor": torch.tensor([2, 0, 3]),
    "int32": torch.tensor([2, 0, 3], dtype=torch.int32),
    "uint8": torch.tensor([2, 0, 3], dtype=torch.uint8),
    "list": [2, 0, 3],
    "tuple": (2, 0, 3),
    "array": np.array([2, 0, 3]),
    "one-hot": torch.eye(4)[[2, 0, 3]],
}
ONE = {"int": 2, "tensor": torch.tensor(2), "numpy": np.int64(2)}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_labels_is_the_same(flow, form):
    y, expected = FORMS[form], torch.tensor([2, 0, 3])
    x = images(flow)
    z, _ = flow.encode(x, expected)
    assert torch.equal(flow.encode(x, y)[0], z)
    assert torch.equal(flow.log_prob(x, y), flow.log_prob(x, expected))
    assert torch.equal(flow.decode(z, y, 1.0), flow.decode(z, expected, 1.0))
    assert torch.equal(flow.denoise(x, y), flow.denoise(x, expected))
    assert torch.equal(flow.sample(y=y, guidance=1.0, seed=3), flow.sample(3, y=expected, guidance=1.0, seed=3))
    assert torch.equal(flow.class_weights(y, 3), torch.eye(4, dtype=torch.float64)[[2, 0, 3]])


@pytest.mark.parametrize("form", ONE)
def test_one_label_is_that_of_all(flow, form):
    x, y, expected = images(flow), ONE[form], [2, 2, 2]
    z, _ = flow.encode(x, expected)
    assert torch.equal(flow.encode(x, y)[0], z)
    assert torch.equal(flow.decode(z, y, 1.0), flow.decode(z, expected, 1.0))
    assert torch.equal(flow.sample(3, y=y, seed=3), flow.sample(y=expected, seed=3))
    assert flow.sample(y=y).shape == (1, 2, 6, 6)


def test_no_label_is_none_and_minus_one(flow):
    x = images(flow)
    for y in (-1, [-1, -1, -1], torch.full((3, 4), 0.25)):
        assert torch.allclose(flow.encode(x)[0], flow.encode(x, y)[0], atol=1e-12)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (4, "label 4 is out of range; expected 0 to 3"),
        (-2, "label -2 is out of range"),
        ([0, 1, 4], "label 4"),
        ([0, 1], r"labels must have the shape \[3\], one for each image, got \[2\]"),
        ([[0], [1], [2]], r"got \[3, 1\]"),
        ([], r"labels must have the shape \[3\], .* got \[0\]"),
        ("cat", "labels must be whole numbers, got 'cat'"),
        (["cat", "dog", "cow"], "labels must be whole numbers"),
        (1.5, "labels must be whole numbers, got torch.float32"),
        ([1.0, 2.0, 3.0], "labels must be whole numbers, got torch.float32"),
        (torch.tensor([True, False, True]), "labels must be whole numbers, got torch.bool"),
        (torch.full((3, 5), 0.2), r"class weights must have the shape \[3, 4\], got \[3, 5\]"),
    ],
    ids=str,
)
def test_labels_that_are_none_are_refused_everywhere(flow, y, message):
    z = torch.zeros(3, *flow.token_shape, dtype=torch.float64)
    calls = [lambda: flow.encode(images(flow), y), lambda: flow.decode(z, y), lambda: flow.decode(z, y, 1.0)]
    for call in (*calls, lambda: flow.log_prob(images(flow), y), lambda: flow.sample(3, y=y)):
        with pytest.raises(InputError, match=message):
            call()


def test_samples_have_the_shape_asked_for(flow):
    for num, y, shape in (
        (8, None, (8,)),
        ((2, 4), None, (2, 4)),
        (torch.Size([2, 1, 2]), None, (2, 1, 2)),
        ((5,), None, (5,)),
        (8, 3, (8,)),
        (None, [3, 1], (2,)),
        (2, [3, 1], (2,)),
        ((2, 3), [0, 1, 2, 3, 0, -1], (2, 3)),
    ):
        x, log_prob = flow.sample(num, y, return_log_prob=True)
        assert x.shape == (*shape, 2, 6, 6)
        assert log_prob.shape == shape


def test_a_shape_draws_the_images_of_its_number(flow):
    assert torch.equal(flow.sample((2, 3), seed=1).flatten(0, 1), flow.sample(6, seed=1))
    y = [0, 1, 2, 3, 0, 1]
    x, log_prob = flow.sample((2, 3), y, seed=1, denoise=False, return_log_prob=True)
    assert torch.allclose(flow.log_prob(x.flatten(0, 1), y), log_prob.flatten(), atol=1e-9)


def test_seed_is_that_of_a_generator(flow):
    expected = flow.sample(3, generator=torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    assert torch.equal(flow.sample(3, seed=5), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(flow.sample(3, seed=6), expected)
    assert not torch.equal(flow.sample(3), flow.sample(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give num, the number of images, or y, their labels"),
        ({"num": 0}, "num must be a whole number of at least 1 or a tuple of them, got 0"),
        ({"num": -3}, "num must .* got -3"),
        ({"num": 2.0}, r"num must .* got 2\.0"),
        ({"num": True}, "num must .* got True"),
        ({"num": ()}, r"num must .* got \(\)"),
        ({"num": (2, 0)}, r"num must .* got \(2, 0\)"),
        ({"num": [3, 7]}, r"num must .* got \[3, 7\]; labels are y="),
        ({"num": torch.tensor([1, 2])}, r"num must .* labels are y="),
        ({"y": []}, "num must .* got 0"),
        ({"num": 8, "y": [3, 1]}, r"labels must have the shape \[8\], one for each image, got \[2\]"),
        ({"num": (2, 2), "y": [3, 1]}, r"labels must have the shape \[4\]"),
        ({"num": 2, "seed": 1, "generator": torch.Generator()}, "either seed or generator"),
        ({"num": 2, "temperature": 0}, "temperature must be above 0 and finite, got 0"),
        ({"num": 2, "temperature": float("nan")}, "temperature must be above 0 and finite, got nan"),
        ({"num": 2, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num": 2, "guidance": -1.0}, r"guidance scale must be .*, got -1\.0"),
        ({"num": 2, "y": -1, "guidance": 1.0}, r"guidance 1\.0 needs labels"),
        ({"num": 2, "method": "newton"}, "decoding method must be .*, got 'newton'"),
    ],
)
def test_impossible_samples_are_refused(flow, arguments, message):
    with pytest.raises(InputError, match=message):
        flow.sample(**arguments)


def test_labels_of_an_unconditional_flow():
    flow = random_flow(num_classes=0)
    assert flow.sample(2).shape == flow.sample(2, y=-1).shape == (2, 2, 6, 6)
    for call in (lambda: flow.sample(2, y=1), lambda: flow.sample(y=[0, 1])):
        with pytest.raises(InputError, match="the flow is unconditional"):
            call()
    with pytest.raises(InputError, match="guidance must be 0 for an unconditional flow"):
        flow.sample(2, guidance=1.0)
