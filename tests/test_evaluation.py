import math

import numpy as np
import pytest
import torch
from PIL import Image

from builders import random_flow
from flowback import TarFlow
from flowback.core.units import from_levels, to_uint8
from flowback.data import DataConfig, load_data
from flowback.data.pictures import grid_array, save_grid
from flowback.measure.density import confusion, density, held_out
from flowback.reports.report import measure
from flowback.tasks.classify import accuracies, predict
from flowback.tasks.sampling import class_grid


def test_density_of_the_identity_flow_is_that_of_a_gaussian():
    flow = TarFlow(image_size=8, channels=1, patch_size=4, width=32, blocks=2, layers=1, levels=17, noise_std=0.3)
    x = from_levels(torch.randint(17, (4000, 1, 8, 8)), 17)
    figures = density(flow, x, torch.full((4000,), -1))
    # E[-log N(x + noise)]: x is uniform over the centres of 17 bins of width 2/17
    power = float(from_levels(torch.arange(17), 17).double().square().mean())
    assert figures["nats_per_dim"] == pytest.approx(0.5 * math.log(2 * math.pi) + (power + 0.3**2) / 2, abs=2e-3)
    nats = 0.5 * math.log(2 * math.pi) + 1 / 6  # dequantized, x is uniform on [-1, 1]
    assert figures["bits_per_dim"] == pytest.approx(nats / math.log(2) + math.log2(17 / 2), abs=2e-3)


def test_bits_are_an_upper_bound_of_the_entropy(trained, digits):
    x, y = digits[0][1500:], digits[1][1500:]
    figures = density(trained, x, y)
    assert 0 < figures["bits_per_dim"] < math.log2(17)


def test_accuracies_count_what_predict_says(trained, digits):
    x, y = digits[0][1500:1600], digits[1][1500:1600]
    for rule, share in accuracies(trained, x, y, draws=2).items():
        assert share == pytest.approx(float((predict(trained, x, rule, draws=2) == y).float().mean()))


def test_confusion_counts_true_by_predicted():
    y, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0])
    assert confusion(predicted, y, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_measure_is_of_all_held_out_images(trained):
    data = load_data(DataConfig())
    figures = measure(trained, data)
    assert figures["held_out_images"] == 359
    assert set(figures) == {"held_out_images", "nats_per_dim", "bits_per_dim", "accuracy", "noise_draws"}
    assert "accuracy" not in measure(random_flow(torch.float32, **small_unconditional()), data)


def small_unconditional():
    return {"image_size": 8, "channels": 1, "num_classes": 0, "levels": 17}


def test_held_out_images_spread_over_the_whole_set():
    data = load_data(DataConfig())
    x, y = held_out(data, 50)
    assert x.shape == (50, 1, 8, 8)
    assert len(held_out(data)[1]) == len(data.held_out)
    assert torch.equal(held_out(data)[1][[0, -1]], y[[0, -1]])


def test_pictures_keep_pixels_and_clip():
    x = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.5]).view(5, 1, 1, 1)
    assert to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255]
    v = torch.arange(256).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_levels(v)).long(), v)


def test_grid_has_a_class_a_row_and_is_written_as_it_is(trained, tmp_path):
    x = class_grid(trained, per_class=2)
    assert x.shape == (20, 1, 8, 8)
    picture = grid_array(x, columns=2)
    assert picture.shape == (10 * 34 + 2, 2 * 34 + 2, 3)
    assert torch.equal(picture[2:34:4, 2:34:4, 0], to_uint8(x[0, 0]))
    save_grid(x, tmp_path / "new" / "grid.png", columns=2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "grid.png")), picture.numpy())
