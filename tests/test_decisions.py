"""Outliers, shifts and the reject option: figures against their definitions, and what a flow and frozen features show."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.covariance import LedoitWolf

from builders import PatchEncoder, images, random_flow
from flowback import InputError
from flowback.cli import main
from flowback.data import DataConfig, load_data
from flowback.measure.decisions import COVERAGES, estimate_shares, rejection, risk_coverage, with_shares
from flowback.measure.outliers import (
    Features,
    Mahalanobis,
    MaxProbability,
    NearestNeighbors,
    Padim,
    features_of,
    separation,
)
from flowback.measure.shifts import CORRUPTIONS, STRENGTHS, corrupted, outliers
from flowback.reports import decisions
from flowback.reports.decisions import Decisions
from flowback.reports.evaluate import EvaluationConfig
from flowback.tasks.classify import classify, likeliest

# ---- the reject option ----------------------------------------------------------------------------------------------


def test_risk_and_coverage_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    y = torch.tensor([0, 0, 1, 0])  # from the surest on: right, wrong, right, wrong
    assert risk_coverage(p, y).tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    found = rejection(p, y, coverages=(0.75, 0.5))
    assert found == pytest.approx(
        {
            "accuracy": 0.5,
            "aurc": (1 / 2 + 1 / 3 + 1 / 2) / 4,
            "risk_0.75": 1 / 3,
            "threshold_0.75": 0.7,
            "risk_0.5": 1 / 2,
            "threshold_0.5": 0.8,
        }
    )
    with pytest.raises(InputError, match="at least 1 image"):
        risk_coverage(p[:0], y[:0])


CASES = st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1, max_size=60, unique_by=lambda case: case[0])


@given(CASES)
def test_a_threshold_leaves_the_coverage_and_the_risk_that_are_stated(cases):
    logits, right = torch.tensor([c for c, _ in cases], dtype=torch.float64), torch.tensor([r for _, r in cases])
    p = torch.stack([logits, -logits], dim=1).softmax(dim=1)
    sure = p.amax(dim=1)
    if len(sure.unique()) < len(sure):
        return  # where several are equally sure, no threshold separates them
    y = torch.where(right, p.argmax(dim=1), 1 - p.argmax(dim=1))
    found = rejection(p, y)
    for coverage in COVERAGES:
        kept = sure >= found[f"threshold_{coverage:g}"]
        assert int(kept.sum()) == max(1, round(coverage * len(y)))
        assert found[f"risk_{coverage:g}"] == pytest.approx(float((~right[kept]).double().mean()))
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))
    best = torch.sort(right, descending=True, stable=True).values.double()  # errors are the least sure: no order has less
    ideal = ((1 - best).cumsum(0) / torch.arange(1, len(y) + 1)).mean()
    assert found["aurc"] >= float(ideal) - 1e-12


# ---- other shares ---------------------------------------------------------------------------------------------------


def mixture(shares, count, seed=0):
    """Draws of three Gaussians in these shares: their densities `[n, 3]` and which one each is of."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.multinomial(shares, count, replacement=True, generator=generator)
    means = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    x = means[y] + torch.randn(count, generator=generator, dtype=torch.float64)
    return (-0.5 * (x[:, None] - means) ** 2).exp(), y


WEIGHTS = st.lists(st.floats(0.05, 1), min_size=3, max_size=3).map(lambda w: torch.tensor(w, dtype=torch.float64))


@given(assumed=WEIGHTS, shares=WEIGHTS)
def test_other_shares_give_what_bayes_does(assumed, shares):
    density, _ = mixture(shares, 20)
    p, q = ((density * w) / (density * w).sum(dim=1, keepdim=True) for w in (assumed, shares))
    assert torch.allclose(with_shares(p, shares, assumed), q, atol=1e-12)
    assert torch.allclose(with_shares(p, assumed, assumed), p, atol=1e-12)
    equal = density / density.sum(dim=1, keepdim=True)
    assert torch.allclose(with_shares(equal, shares), q, atol=1e-12)


def test_shares_are_found_in_unlabelled_images():
    shares = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    density, y = mixture(shares, 5000)
    for assumed in (None, torch.tensor([2.0, 5.0, 3.0])):
        weighted = density if assumed is None else density * assumed
        p = weighted / weighted.sum(dim=1, keepdim=True)
        found = estimate_shares(p, assumed)
        assert torch.allclose(found, shares, atol=0.05)
        likelihoods = [
            float((density @ values).log().sum()) for values in (found, shares, torch.full((3,), 1 / 3).double())
        ]
        assert likelihoods == sorted(likelihoods, reverse=True)  # the estimate is the likeliest, before the truth
        accuracy = [float((q.argmax(1) == y).double().mean()) for q in (with_shares(p, found, assumed), p)]
        assert accuracy[0] > accuracy[1] + 0.02


def test_shares_that_are_none_are_refused_and_a_class_that_is_not_there_has_no_probability():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert with_shares(p, torch.tensor([0.0, 2.0])).tolist() == [[0, 1], [0, 1]]
    for shares in ([1.0], [-1.0, 2.0], [0.0, 0.0], [math.nan, 1.0]):
        with pytest.raises(InputError, match="shares must be 2 finite numbers of at least 0, not all 0"):
            with_shares(p, torch.tensor(shares))
    with pytest.raises(InputError, match="assumed shares must be above 0"):
        with_shares(p, torch.ones(2), torch.tensor([1.0, 0.0]))


# ---- detectors ------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(-9, 9), min_size=1, max_size=40),
    st.lists(st.integers(-9, 9), min_size=1, max_size=40),
)
def test_separation_is_the_share_of_pairs_in_order_and_of_outliers_that_pass(inliers, others):
    found = separation(np.array(inliers), np.array(others))
    pairs = [(a > b) + (a == b) / 2 for a in inliers for b in others]
    assert found["auroc"] == pytest.approx(sum(pairs) / len(pairs))
    threshold = max(t for t in inliers if sum(a >= t for a in inliers) >= 0.95 * len(inliers))
    assert found["fpr_at_95_tpr"] == pytest.approx(sum(b >= threshold for b in others) / len(others))


def test_a_score_that_is_not_finite_is_that_of_an_outlier():
    found = separation(np.array([1.0, 2.0]), np.array([math.nan, -math.inf, math.inf]))
    assert found == {"auroc": 1.0, "fpr_at_95_tpr": 0.0}


@pytest.fixture(scope="module")
def clusters():
    """Features of three classes, and their labels."""
    generator = np.random.default_rng(0)
    y = np.repeat([0, 1, 3], 60)
    pooled = generator.normal(size=(180, 6)) * [1, 2, 3, 1, 1, 0.1] + 4 * np.eye(6)[y]
    return Features(pooled, generator.normal(size=(180, 4, 5)) + np.arange(4)[:, None]), y


def test_distances_are_those_of_scikit_learn(clusters):
    features, y = clusters
    one = Mahalanobis().fit(features, np.zeros(180))
    assert one.score(features) == pytest.approx(-LedoitWolf().fit(features.pooled).mahalanobis(features.pooled))
    means = np.stack([features.pooled[y == k].mean(axis=0) for k in (0, 1, 3)])
    precision = LedoitWolf().fit(features.pooled - means[[0, 1, 2]].repeat(60, axis=0)).precision_
    far = features.pooled[:, None] - means
    expected = -np.einsum("nkf,fg,nkg->nk", far, precision, far).min(axis=1)
    assert Mahalanobis().fit(features, y).score(features) == pytest.approx(expected)
    unit = features.pooled / np.linalg.norm(features.pooled, axis=1, keepdims=True)
    distances = np.sort(np.linalg.norm(unit[:, None] - unit, axis=2), axis=1)
    assert NearestNeighbors(4).fit(features, y).score(features) == pytest.approx(-distances[:, 3], abs=1e-6)
    assert NearestNeighbors(999).fit(features, y).score(features) == pytest.approx(-distances[:, -1])


def test_a_patch_in_the_wrong_place_is_found_by_its_place(clusters):
    features, y = clusters
    swapped = Features(features.pooled, features.patches[:, [3, 1, 2, 0]])  # whose mean over patches is the same
    padim = Padim().fit(features, y)
    assert separation(padim.score(features), padim.score(swapped))["auroc"] > 0.9


def test_a_probe_knows_no_class_without_training_images(clusters):
    features, y = clusters
    probe = MaxProbability(5).fit(features, y)
    p = probe.logits(features).softmax(dim=1)
    assert p[:, [2, 4]].max() == 0
    assert p[:, [0, 1, 3]].numpy() == pytest.approx(probe.probe.predict_proba(features.pooled))
    assert float((p.argmax(1).numpy() == y).mean()) > 0.9
    assert probe.score(features) == pytest.approx(p.amax(dim=1).numpy())
    probe.temperature = 1e6
    assert probe.score(features) == pytest.approx(np.full(180, 1 / 3), abs=1e-3)
    with pytest.raises(InputError, match="at least 2 classes"):
        MaxProbability(5).fit(features, np.ones(180))


def test_features_are_those_of_the_encoder():
    flow = random_flow(torch.float32, channels=1)
    encoder, x = PatchEncoder(flow, dim=120), images(flow, 5)
    found, expected = features_of(encoder, x, batch_size=2), encoder(x).detach().numpy()
    assert found.pooled == pytest.approx(expected.mean(axis=1), abs=1e-6)
    assert found.patches.shape == (5, 9, 100)
    assert np.abs(found.patches[..., None] - expected[:, :, None]).min(axis=3).max() < 1e-6


# ---- shifts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_get_stronger_and_are_the_same_in_every_call(name, digits):
    x = torch.nn.functional.interpolate(digits[0][:20], 28)
    found = [corrupted(x, name, strength) for strength in STRENGTHS]
    distances = [float((x - own).square().mean()) for own in found]
    assert distances == sorted(distances)
    assert distances[0] > 0
    assert all(own.shape == x.shape and own.abs().max() <= 1 for own in found)
    assert torch.equal(corrupted(x, name, 3), found[2])
    assert torch.equal(corrupted(x, name, 3, seed=1), found[2]) == (name != "noise")
    for wrong in ((name, 0), (name, 6), ("fog", 1)):
        with pytest.raises(InputError, match=r"one of blur, noise, contrast, with a strength from 1 to 5, got"):
            corrupted(x, *wrong)


def test_corruptions_do_what_they_are_called():
    grey = torch.full((4, 3, 32, 32), 0.25)
    assert torch.allclose(corrupted(grey, "blur", 5), grey, atol=1e-6)
    assert float(corrupted(grey, "noise", 1).std()) == pytest.approx(2 * 0.08, rel=0.05)
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    low = corrupted(x, "contrast", 4)
    assert torch.allclose(low.mean(dim=(2, 3)), x.mean(dim=(2, 3)), atol=1e-6)
    assert torch.allclose(low.std(dim=(2, 3)), 0.1 * x.std(dim=(2, 3)), atol=1e-6)
    assert corrupted(x, "blur", 5).std() < 0.3 * x.std()


def test_sets_of_outliers_fit_the_images(tmp_path):
    like = torch.rand(7, 3, 12, 9) * 2 - 1
    for name, count in (("digits", 5), ("upside_down", 5), ("noise", 5)):
        found = outliers(name, like, count)
        assert found.shape == (count, 3, 12, 9)
        assert found.abs().max() <= 1
        assert torch.equal(found, outliers(name, like, count))
    assert torch.equal(outliers("upside_down", like, 99).flip(2), like)
    assert (outliers("digits", like, 5)[:, 0] == outliers("digits", like, 5)[:, 1]).all()
    (tmp_path / "some").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "some" / f"{i}.png")
    grey = outliers(str(tmp_path), like[:, :1], 2)
    assert grey.shape == (2, 1, 12, 9)
    assert torch.allclose(grey, torch.tensor(2 * 76 / 255 - 1), atol=0.01)
    with pytest.raises(InputError, match=r"digits, upside_down, noise, or a folder of images, got 'paintings'"):
        outliers("paintings", like, 2)


# ---- a flow ---------------------------------------------------------------------------------------------------------

CONFIG = EvaluationConfig(metrics=("ood", "shift", "coverage"), encoder="toy")


@pytest.fixture
def encoded(monkeypatch, tmp_path):
    """How many images go through a toy encoder, which is made by any name; its cache is new."""
    seen: list[int] = []

    class Toy(PatchEncoder):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(torch.cat([x, x.roll(1, 3) * x, x.roll(1, 2) * x], dim=1))

    flow = random_flow(torch.float32, image_size=8, channels=3, patch_size=2)
    monkeypatch.setattr(decisions, "load_encoder", lambda *_: Toy(flow, 40))
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "cache"))
    return seen


def test_a_flow_is_measured_beside_frozen_features(trained, encoded):
    data = load_data(DataConfig())
    found = Decisions(trained, data, range(359), CONFIG)
    assert not set(found.fit.tolist()) & set(found.others.tolist())
    assert (len(found.fit), len(found.others)) == (89, 270)
    figures = {}
    for measure in found.measures().values():
        figures |= measure()
    assert json.loads(json.dumps(figures)) == figures
    ood = {row["score"]: row["auroc"] for row in figures["ood"] if row["of"] == "flow"}
    assert ood.keys() == {"log_prob", "log_prob, both sides", "ratio", "largest probability", "distance"}
    assert ood["log_prob"].keys() == {"upside_down", "noise"}  # digits are the data
    assert min(ood[name]["noise"] for name in ("log_prob", "log_prob, both sides", "distance")) > 0.97
    assert ood["distance"]["upside_down"] > 0.55
    assert [row["score"] for row in figures["ood"] if row["of"] == "toy"] == [
        "largest probability",
        "mahalanobis",
        "padim",
        "nearest neighbors",
    ]
    rows = {(row["corruption"], row["strength"]): row for row in figures["shift"]}
    assert len(rows) == 16
    some = found.others[:89]
    right = likeliest(classify(trained, found.images[some], "exact")) == found.labels[some]
    assert rows["none", 0]["accuracy"]["flow"] == pytest.approx(float(right.float().mean()), abs=0.05)  # other noise
    assert rows["contrast", 5]["accuracy"]["flow"] < rows["none", 0]["accuracy"]["flow"] - 0.2
    flow, probe = figures["prior_shift"]
    assert flow["accuracy"]["given"] > flow["accuracy"]["before"] - 0.02
    assert flow["accuracy"]["estimated"] > flow["accuracy"]["before"] - 0.05
    assert flow["shares_off_by"] < 0.2  # equal shares are off by 0.38
    assert probe["accuracy"]["given"] > probe["accuracy"]["before"] - 0.05
    flow, probe = figures["coverage"]
    assert flow["risk_0.8"] < 1 - flow["accuracy"]
    assert probe["risk_0.8"] < 1 - probe["accuracy"]
    whole = len(data.train) + 359 + 2 * 179 + 16 * 89
    assert whole - 3 * 89 <= (first := sum(encoded)) <= whole  # a weak blur changes nothing at 8 pixels
    again = Decisions(trained, data, range(359), CONFIG)
    assert again.coverage() == {"coverage": figures["coverage"]}
    assert sum(encoded) == first  # they are in the cache


def test_an_unconditional_flow_has_outliers_only(encoded):
    flow = random_flow(torch.float32, image_size=8, channels=1, levels=17, num_classes=0)
    data = load_data(DataConfig())
    found = Decisions(flow, data, range(100), CONFIG)
    assert list(found.measures()) == ["ood"]
    rows = found.ood()["ood"]
    of_flow = {"log_prob", "log_prob, both sides", "distance"}
    assert {row["score"] for row in rows} == of_flow | {"mahalanobis", "padim", "nearest neighbors"}
    count = 200 + len(data.train)
    assert found.effort == f"ood: 100 held-out images, {count:,} forward passes, {count:,} images through toy"


@pytest.mark.parametrize(
    ("change", "count", "message"),
    [
        ({}, 79, r"need at least 80 held-out images, got 79$"),
        ({"passes": 4500}, 359, r"need at least 80 held-out images, got 71; --passes 4,500 are too few for more"),
        ({"outliers": ("digits",)}, 100, r"ood needs outliers other than the data digits, got digits"),
        ({"outliers": ("nowhere",)}, 100, r"got 'nowhere'"),
    ],
)
def test_what_cannot_be_measured_is_said_before(trained, encoded, change, count, message):
    with pytest.raises(InputError, match=message):
        Decisions(trained, load_data(DataConfig()), range(count), replace(CONFIG, **change))
    assert not encoded


def test_evaluate_has_them_and_the_page_shows_them(small_run, tmp_path, capsys):
    run = shutil.copytree(small_run, tmp_path / "run")
    options = ["--metrics=ood,shift,coverage", "--images=80", "--encoder=test_efficientnet", "--encoder-weights=random"]
    assert main(["evaluate", str(run), *options, "--outliers=noise"]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert {len(found[name]) for name in ("prior_shift", "coverage")} == {2}
    said = capsys.readouterr().out
    assert "80 held-out images" in said
    assert "score padim, images 60, auroc noise" in said
    page = (run / "report.html").read_text()
    for title in ("Outliers: AUROC", "Corrupted images", "Classes with other shares", "Coverage"):
        assert f"<h3>{title}" in page
