import numpy as np
import pytest
import torch

from flowback.data import DataConfig, load_data
from flowback.data.features import BATCH, FeatureCache
from flowback.errors import InputError
from flowback.units import from_levels


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path))
    return tmp_path / "features"


@pytest.fixture(scope="module")
def digits_split():
    return load_data(DataConfig(limit=3 * BATCH + 5)).train


def quadrants(x):
    """Features [B, 4, 2]: mean and spread of each quarter of the image."""
    parts = x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(x), 4, 16)
    return torch.stack([parts.mean(-1), parts.std(-1)], dim=-1)


def make(split, compute=quadrants, flips=True, key="quadrants", report=lambda done: None):
    return FeatureCache(split, 17, flips, compute, (4, 2), key, report)


def test_cached_features_are_the_computed_ones_for_both_flips(digits_split):
    cached = make(digits_split)
    indices = torch.tensor([0, 5, len(digits_split) - 1])
    flipped = torch.tensor([False, True, False])
    x = from_levels(digits_split[indices.tolist()][0], 17)
    x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
    assert torch.equal(cached(indices, flipped), quadrants(x).half())


def test_cache_is_used_again_and_not_for_another_key(digits_split, cache):
    make(digits_split)
    calls = []
    make(digits_split, compute=lambda x: calls.append(1) or quadrants(x))
    assert not calls
    make(digits_split, compute=lambda x: calls.append(1) or quadrants(x), key="another encoder")
    assert calls
    assert len(list(cache.glob("*.npy"))) == 2


def test_interrupted_cache_goes_on_where_it_stopped(digits_split, cache, monkeypatch):
    monkeypatch.setattr("flowback.data.features.BATCH", 4)  # progress is noted every 20 batches
    whole = make(digits_split, key="undisturbed").array

    def stop(done):
        if done >= 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(digits_split, report=stop)
    assert len(list(cache.glob("*.npy"))) == 1
    seen = []
    resumed = make(digits_split, report=seen.append).array
    assert seen[0] == 84
    assert np.array_equal(whole, resumed)
    assert not list(cache.glob("*.partial"))


def test_full_disk_is_said_before_the_work(digits_split, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(InputError, match=r"the feature cache needs .* GB"):
        make(digits_split)
