"""Features to latents and back: principal components against scikit-learn's, networks against what they promise."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as ReferencePCA

from builders import gradients
from flowback import InputError
from flowback.latents.compressors import PCA, make_compressor, moments

LEARNED = ["attention", "transformer"]


@pytest.fixture
def rows(digits):
    """Digits as features `[B, 8, 8]`: a token is a row of pixels."""
    return digits[0][:, 0].double()


def learned(kind, dim=8, channels=3, tokens=8):
    return make_compressor(kind, dim, channels, tokens, width=32, layers=2).double()


def test_moments_do_not_suffer_from_a_large_mean(rows):
    mean, covariance = moments((rows + 1e5).float().split(100))
    flat = (rows + 1e5).float().double().flatten(0, 1).numpy()
    assert np.allclose(mean, flat.mean(axis=0), rtol=1e-12)
    assert np.allclose(covariance, np.cov(flat, rowvar=False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 5, 8])
def test_pca_is_scikit_learns_on_features_that_come_in_batches(rows, channels):
    rows = rows + 0.5
    pca = PCA(8, channels).double()
    pca.fit(part for part in rows.split(7))
    flat = rows.flatten(0, 1).numpy()
    reference = ReferencePCA(channels, svd_solver="full").fit(flat)
    latents = pca.compress(rows)
    scores = reference.transform(flat)
    assert np.allclose(latents.flatten(0, 1) * np.sqrt(reference.explained_variance_.mean()), scores, atol=1e-9)
    assert latents.flatten(0, 1).var(dim=0).mean().item() == pytest.approx(1)
    assert np.allclose(pca.expand(latents).flatten(0, 1), reference.inverse_transform(scores), atol=1e-9)
    assert pca.standardize(rows).flatten(0, 1).var(dim=0).mean().item() == pytest.approx(1)


def test_all_components_lose_nothing_and_a_saved_compressor_is_the_same(rows):
    pca, loaded = PCA(8, 8).double(), PCA(8, 8).double()
    pca.fit([rows])
    loaded.load_state_dict(pca.state_dict())
    assert torch.allclose(loaded.expand(pca.compress(rows)), rows, atol=1e-12)


@pytest.mark.parametrize("kind", LEARNED)
def test_learned_latents_have_mean_0_and_variance_1_and_stay_so(rows, kind):
    compressor = learned(kind)
    compressor.fit([rows])
    for _ in range(60):  # of running statistics
        latents = compressor.compress(rows[:200])
    assert torch.allclose(latents.mean(dim=(0, 1)), torch.zeros(3).double(), atol=1e-9)
    assert torch.allclose(latents.var(dim=(0, 1)), torch.ones(3).double(), atol=0.01)
    assert torch.allclose(compressor.eval().compress(rows[:200]), latents, atol=0.05)


@pytest.mark.parametrize("kind", LEARNED)
def test_every_token_sees_every_other_and_gradients_reach_all(rows, kind):
    compressor = learned(kind).eval()
    features = rows[:4].requires_grad_()
    latents = compressor.compress(features)
    for token in (0, 7):
        (influence,) = torch.autograd.grad(latents[:, token].sum(), features, retain_graph=True)
        assert (influence.abs().sum(dim=2) > 0).all()
    compressor.expand(latents).square().sum().backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients(compressor).values())


@pytest.mark.parametrize("kind", LEARNED)
def test_networks_learn_to_bring_features_back(rows, kind):
    compressor = learned(kind)
    compressor.fit([rows])
    optimizer = torch.optim.AdamW(compressor.parameters(), lr=3e-3)

    def error(part):
        return (compressor.expand(compressor.compress(part)) - part).square().mean() / rows.var()

    for step in range(100):
        loss = error(rows[:1500][step * 50 % 1500 :][:50])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pca = PCA(8, 3).double()
    pca.fit([rows[:1500]])
    by_pca = (pca.expand(pca.compress(rows[1500:])) - rows[1500:]).square().mean() / rows.var()
    with torch.no_grad():
        assert error(rows[1500:]) < 0.8 * by_pca  # which sees no other token


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: PCA(4, 5), "channels must be from 1 to 4, those of the encoder's features, got 5"),
        (lambda: make_compressor("linear", 4, 2, 1, 32, 1), "must be one of pca, attention, transformer, got 'linear'"),
        (lambda: PCA(4, 2).fit([torch.zeros(1, 1, 4)]), "fitted on at least 2 features, got 1"),
        (lambda: PCA(4, 2).fit([]), "fitted on at least 2 features, got 0"),
        (lambda: PCA(2, 1).fit([torch.tensor([[1.0, 2.0], [torch.nan, 0.0]])]), "must be finite"),
    ],
)
def test_what_is_impossible_is_refused(act, message):
    with pytest.raises(InputError, match=message):
        act()
