import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from flowback import TarFlow
from flowback.core.units import from_levels, to_uint8
from flowback.data.pictures import grid_array, save_grid
from flowback.data.splits import spread
from flowback.measure.density import confusion, density
from flowback.reports.classification import judged
from flowback.reports.evaluate import write_json
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


def test_a_spread_is_even_and_holds_both_ends():
    assert spread(359) == list(range(359))
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    found = spread(1000, 50)
    assert (len(found), found[0], found[-1]) == (50, 0, 999)
    assert set(np.diff(found)) <= {20, 21}


def test_numbers_that_are_not_finite_are_null_and_the_file_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"a": [math.nan, 1.5, (np.float64("inf"),)], "b": np.int64(3), "c": True})
    assert (tmp_path / "new" / "a.json").read_text() == json.dumps(
        {"a": [None, 1.5, [None]], "b": 3, "c": True}, indent=2
    ) + "\n"
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "a.json", {"a": object()})
    assert json.loads((tmp_path / "new" / "a.json").read_text())["b"] == 3
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_judged_images_are_the_surest_and_the_least_sure_of_their_own_class():
    scores = torch.tensor([[0.0, 5.0, -1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 9.0], [1.0, 0.0, 0.0]])
    y = torch.tensor([0, 0, 2, 0])
    found = judged(scores, y, images=[10, 20, 30, 40], most=2)
    assert found["best"] == [[30, 2, 2, 0], [20, 0, 0, 1]]
    assert found["worst"] == [[10, 0, 1, 0], [40, 0, 0, 1]]
    assert found["doubtful"] == [[40, 0, 0, 1], [20, 0, 0, 1]]
    assert found["confusion"] == [[2, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert "confusion" not in judged(torch.zeros(4, 21), y, [0, 1, 2, 3])


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
