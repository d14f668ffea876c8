import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from builders import images, random_flow
from flowback import InputError, TarFlow
from flowback.core.units import from_levels
from flowback.tasks.classify import (
    RULES,
    ClassStatistics,
    calibrated,
    calibration_error,
    class_scores_by_all,
    classify,
    exact,
    fit_calibration,
    fit_statistics,
    rule_named,
    shortlist,
    single_gradient,
    z_score,
)


def statistics(flow, seed=0):
    generator = torch.Generator().manual_seed(seed)
    K = flow.num_classes
    return ClassStatistics(
        torch.randn(K, generator=generator).tolist(), (torch.rand(K, generator=generator) + 0.5).tolist(), 9
    )


def test_single_gradient_is_the_slope_of_every_logit():
    flow = random_flow(num_classes=5)
    x, h = images(flow), 1e-5
    scores = single_gradient(flow, [x])
    assert scores.shape == (3, 5)
    for k in range(5):
        lam = torch.zeros(3, 5, dtype=torch.float64)
        lam[:, k] = h
        slope = (flow.log_prob(x, lam.softmax(dim=1)) - flow.log_prob(x, (-lam).softmax(dim=1))) / (2 * h)
        assert torch.allclose(scores[:, k], slope.detach(), rtol=1e-6, atol=1e-7)
    assert scores.sum(dim=1).abs().max() < 1e-9  # a constant added to all logits changes nothing


def test_exact_is_one_likelihood_a_class():
    flow = random_flow(num_classes=5)
    x = images(flow)
    expected = torch.stack([flow.log_prob(x, torch.full((3,), k)) for k in range(5)], dim=1)
    assert torch.allclose(exact(flow, [x]), expected, atol=1e-9)
    assert exact(flow, [x]).std(dim=1).min() > 1e-3


def test_z_score_shifts_and_scales_each_class():
    flow = random_flow(num_classes=5)
    known = statistics(flow)
    expected = (single_gradient(flow, [images(flow)]) - torch.tensor(known.mean)) / torch.tensor(known.std)
    assert torch.allclose(z_score(flow, [images(flow)], known), expected, atol=1e-6)


@pytest.mark.parametrize("m", [1, 2, 4])
def test_shortlist_has_the_likelihoods_of_the_best_and_no_others(m):
    flow = random_flow()
    x, known = images(flow), statistics(flow)
    scores = shortlist(m)(flow, [x], known)
    best = z_score(flow, [x], known).topk(m, dim=1).indices
    assert (scores.isfinite().sum(dim=1) == m).all()
    assert torch.allclose(scores.gather(1, best), exact(flow, [x]).gather(1, best), atol=1e-9)


def test_a_shortlist_of_all_classes_is_exact():
    flow = random_flow()
    x = images(flow)
    assert torch.allclose(
        classify(flow, x, "shortlist_99", statistics=statistics(flow)), classify(flow, x, "exact"), atol=1e-9
    )


def test_classes_left_out_share_the_chance_that_the_right_one_is_among_them():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (4000,), generator=generator)
    scores = torch.randn(4000, 10, generator=generator) + 1.5 * torch.nn.functional.one_hot(y, 10)
    listed = torch.full_like(scores, -torch.inf).scatter(1, scores.topk(3).indices, scores.topk(3).values)
    known = ClassStatistics([0.0] * 10, [1.0] * 10, 9)
    known.calibrate("shortlist_3", listed[:2000], y[:2000])
    found = known.probabilities("shortlist_3", listed[2000:])
    assert torch.allclose(found.sum(dim=1), torch.ones(2000), atol=1e-6)
    assert found.min() > 0
    inside = listed[2000:].gather(1, y[2000:, None]).isfinite().float().mean()
    assert torch.allclose(torch.where(listed[2000:].isfinite(), found, 0).sum(dim=1).mean(), inside, atol=0.03)
    bare = (listed[2000:] / known.temperatures["shortlist_3"]).softmax(dim=1)
    assert calibration_error(found, y[2000:]) < 0.05
    assert calibration_error(bare, y[2000:]) > 0.1


def test_several_rules_at_once_have_the_scores_of_each():
    flow = random_flow()
    x, known = images(flow, 7), statistics(flow)
    for rules in (["shortlist_2", "exact", "z_score", "single_gradient", "shortlist_9"], ["shortlist_2"]):
        found = class_scores_by_all(flow, x, rules, known, draws=2, seed=3)
        assert list(found) == rules
        for rule, scores in found.items():
            assert torch.allclose(scores, classify(flow, x, rule, draws=2, seed=3, statistics=known), atol=1e-9), rule


@pytest.mark.parametrize("rule", RULES)
def test_draws_are_averaged(rule):
    flow = random_flow(noise_std=0.3)
    x, known = images(flow), statistics(flow)
    generator = torch.Generator().manual_seed(11)
    draws = [flow.perturb(x, generator) for _ in range(3)]
    score = rule_named(rule, 4)[0]
    found = classify(flow, x, rule, draws=3, seed=11, statistics=known)
    assert torch.allclose(found, score(flow, draws, known), atol=1e-9)
    if rule in ("single_gradient", "exact", "z_score"):
        assert torch.allclose(found, torch.stack([score(flow, [d], known) for d in draws]).mean(dim=0), atol=1e-9)
    assert not torch.allclose(found, classify(flow, x, rule, draws=1, seed=11, statistics=known))


@pytest.mark.parametrize("rule", RULES)
def test_scores_do_not_depend_on_the_batch_size(rule):
    flow = random_flow()
    x, known = images(flow, 5), statistics(flow)
    whole = classify(flow, x, rule, statistics=known)
    for batch_size in (1, 2, 8):
        assert torch.allclose(classify(flow, x, rule, batch_size=batch_size, statistics=known), whole, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_batch_size_bounds_the_rows_that_the_flow_sees(rule, monkeypatch):
    flow = random_flow()
    rows, encode = [], type(flow).encode
    monkeypatch.setattr(type(flow), "encode", lambda self, x, *a, **k: rows.append(len(x)) or encode(self, x, *a, **k))
    classify(flow, images(flow, 7), rule, batch_size=8, statistics=statistics(flow))
    assert max(rows) <= 8


@pytest.mark.parametrize(("rule", "passes"), [("single_gradient", 3), ("z_score", 3), ("shortlist_3", 6), ("exact", 4)])
def test_rules_cost_what_they_say(rule, passes, monkeypatch):
    """Counted: rows encoded per image, and two more for each that is differentiated."""
    flow = random_flow()
    cost, encode = [], type(flow).encode

    def counting(self, x, *args, **options):
        cost.append(len(x) * (3 if torch.is_grad_enabled() else 1))
        return encode(self, x, *args, **options)

    monkeypatch.setattr(type(flow), "encode", counting)
    with torch.no_grad():
        classify(flow, images(flow, 5), rule, statistics=statistics(flow))
    assert sum(cost) / 5 == rule_named(rule, 4)[1] == passes


def test_a_thousand_classes_cost_one_gradient_no_more_passes(monkeypatch):
    flow = random_flow(num_classes=1000)
    rows, encode = [], type(flow).encode
    monkeypatch.setattr(type(flow), "encode", lambda self, x, *a, **k: rows.append(len(x)) or encode(self, x, *a, **k))
    assert classify(flow, images(flow, 2), "shortlist_3", statistics=statistics(flow)).shape == (2, 1000)
    assert sum(rows) == 2 + 2 * 3


def test_statistics_are_mean_and_deviation_of_the_gradient():
    flow = random_flow(noise_std=0.2)
    x = images(flow, 20)
    known = fit_statistics(flow, x, seed=3)
    scores = classify(flow, x, "single_gradient", seed=3)
    assert known.images == 20
    assert torch.allclose(torch.tensor(known.mean).double(), scores.mean(0), atol=1e-6)
    assert torch.allclose(torch.tensor(known.std).double(), scores.std(0), atol=1e-6)
    standardized = classify(flow, x, "z_score", seed=3, statistics=known)
    assert torch.allclose(standardized.std(0), torch.ones(4, dtype=torch.float64), atol=1e-5)
    with pytest.raises(InputError, match=r"at least 2 images.* got 1"):
        fit_statistics(flow, x[:1])


def test_statistics_are_found_in_the_folder_of_the_flow(tmp_path):
    flow, known = random_flow(), statistics(random_flow())
    known.temperatures["exact"], known.left_out["shortlist_3"] = 2.5, (-1.0, 2.0)
    flow.save_pretrained(tmp_path)
    loaded, x = TarFlow.from_pretrained(tmp_path), images(flow)
    assert ClassStatistics.load(loaded.folder, 4) is None
    known.save(tmp_path)
    found = ClassStatistics.load(loaded.folder, 4)
    assert found is not None
    assert (found.mean, found.std, found.images, found.temperatures) == (known.mean, known.std, 9, {"exact": 2.5})
    assert torch.equal(found.probabilities("exact", x[:, 0, 0]), known.probabilities("exact", x[:, 0, 0]))
    assert torch.equal(classify(loaded, x), classify(flow, x, "shortlist_3", statistics=known))
    assert torch.equal(classify(loaded, x, "z_score"), classify(flow, x, "z_score", statistics=known))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("mean"),
        lambda content: content.update(format=9),
        lambda content: content.update(mean=[1.0]),
        lambda content: content.update(std=["a", "b", "c", "d"]),
        lambda content: content.update(more=1),
    ],
)
def test_damaged_statistics_are_refused_by_name(damage, tmp_path):
    flow = random_flow()
    flow.save_pretrained(tmp_path)
    statistics(flow).save(tmp_path)
    file = tmp_path / "classification.json"
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    loaded = TarFlow.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"classification\.json cannot be used") as caught:
        classify(loaded, images(flow))
    assert caught.value.__cause__ is not None
    assert classify(loaded, images(flow), "exact").shape == (3, 4)  # which needs none


def test_rules_that_need_statistics_say_so_and_no_other_rule_is_used():
    flow = random_flow()
    for options in ({}, {"rule": "z_score"}, {"rule": "shortlist_2"}):
        with pytest.raises(InputError, match=r"need class statistics.*fit_statistics.*single_gradient and exact"):
            classify(flow, images(flow), **options)


@given(st.floats(0.05, 20), st.integers(0, 100))
def test_the_temperature_of_scaled_scores_is_the_scale(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert fit_calibration(scale * logits, y)[0] == pytest.approx(scale, rel=0.15)


def test_labels_without_a_score_are_calibrated_too():
    scores = torch.tensor([[1.0, 0.0, -torch.inf], [0.0, 1.5, -torch.inf], [0.3, -torch.inf, 0.1], [0.0, 2.0, -torch.inf]])
    y = torch.tensor([0, 1, 1, 0])
    temperature, left_out = fit_calibration(scores, y)
    assert all(math.isfinite(number) for number in (temperature, *left_out))
    found = calibrated(scores, temperature, left_out)
    assert torch.allclose(found.sum(dim=1), torch.ones(4))
    assert found.min() > 0
    nowhere = torch.full((2, 3), -torch.inf)
    assert fit_calibration(nowhere, y[:2])[0] == 1.0


def test_calibration_error_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.45, 0.55]])
    y = torch.tensor([0, 1, 1, 1])
    # bins of confidence: 0.9 twice, half right; 0.8 once, right; 0.55 once, right
    assert calibration_error(probabilities, y) == pytest.approx((2 * 0.4 + 0.2 + 0.45) / 4, abs=1e-6)
    certain = torch.eye(2)[y]
    assert calibration_error(certain, y) == 0
    assert calibration_error(certain, 1 - y) == 1


def test_seed_decides_the_noise():
    flow = random_flow(noise_std=0.3)
    x = images(flow)
    assert torch.equal(classify(flow, x, "exact", seed=1), classify(flow, x, "exact", seed=1))
    assert not torch.equal(classify(flow, x, "exact", seed=1), classify(flow, x, "exact", seed=2))


def test_uniform_noise_flow_is_classified_with_its_own_noise():
    flow = random_flow(noise="uniform", levels=4)
    x = images(flow)
    expected = exact(flow, [flow.dequantize(x, torch.Generator().manual_seed(0))])
    assert torch.allclose(classify(flow, x, "exact"), expected, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_classifying_works_in_every_mode_and_leaves_no_gradients(rule, mode):
    flow = random_flow(noise_std=0.3)
    x, known = images(flow), statistics(flow)
    expected = classify(flow, x, rule, statistics=known)
    with mode():
        found = classify(flow, x.clone(), rule, statistics=known)  # inside: an inference tensor
        assert torch.equal(found, expected)
    assert not found.requires_grad
    assert all(p.grad is None for p in flow.parameters())


def test_a_frozen_flow_classifies_the_same():
    flow = random_flow()
    x = images(flow)
    scores = classify(flow, x, "single_gradient")
    assert torch.equal(classify(flow.requires_grad_(False), x, "single_gradient"), scores)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_in_every_form(channels, tmp_path):
    flow = random_flow(torch.float32, channels=channels, image_size=(6, 4))
    shape = (6, 4) if channels == 1 else (6, 4, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
    pictures = [Image.fromarray(image) for image in pixels]
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    tensor = torch.from_numpy(pixels).view(2, 6, 4, channels).permute(0, 3, 1, 2)
    expected = classify(flow, from_levels(tensor), "exact")
    assert expected.shape == (2, 4)
    whole = pixels.reshape(2, 6, 4, channels)
    for several in (
        tensor,
        whole,
        list(whole),
        list(pixels),
        pictures,
        tuple(pictures),
        files,
        [str(file) for file in files],
    ):
        assert torch.equal(classify(flow, several, "exact"), expected), type(several)
    one = classify(flow, from_levels(tensor)[:1], "exact")
    for single in (tensor[0], from_levels(tensor)[0], pixels[0], pictures[0], files[0], str(files[0])):
        assert torch.allclose(classify(flow, single, "exact"), one, atol=1e-4), type(single)
    assert fit_statistics(flow, files).mean == fit_statistics(flow, from_levels(tensor)).mean


@pytest.mark.parametrize("bad", ["nowhere.png", [], 3, None, np.zeros((6, 6)), [[1, 2]], torch.zeros(3, 2, 5, 5)])
def test_what_are_no_images_is_refused(bad):
    with pytest.raises(InputError, match="image"):
        classify(random_flow(), bad, "exact")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "best"}, "rule must be .*single_gradient, z_score, exact, exact_fitted, or shortlist_ .*, got 'best'"),
        ({"rule": "shortlist_0"}, "got 'shortlist_0'"),
        ({"rule": "logit_steps"}, "got 'logit_steps'"),
        ({"draws": 0}, "draws must be .* at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be .* at least 1, got 0"),
    ],
)
def test_impossible_requests_are_named(arguments, message):
    flow = random_flow()
    with pytest.raises(InputError, match=message):
        classify(flow, images(flow), **arguments)


def test_unconditional_flow_cannot_classify():
    flow = random_flow(num_classes=0)
    with pytest.raises(InputError, match="unconditional flow cannot classify"):
        classify(flow, images(flow), "exact")


# ---- real digits ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accuracies(trained, digits):
    x, y = digits[0][1500:], digits[1][1500:]
    known = fit_statistics(trained, digits[0][:500])
    scores = {rule: classify(trained, x, rule, draws=2, statistics=known) for rule in RULES}
    return {rule: (s.argmax(dim=1) == y).float().mean().item() for rule, s in scores.items()}


def test_a_briefly_trained_flow_knows_most_digits(accuracies):
    assert accuracies["exact"] > 0.8  # chance is 0.1; three seeds gave 0.89 to 0.92


def test_one_gradient_knows_nearly_as_many(accuracies):
    assert accuracies["single_gradient"] > 0.7  # three seeds gave 0.83 to 0.88


def test_a_shortlist_of_three_is_nearly_as_good_as_all(accuracies):
    assert accuracies["shortlist_3"] > 0.97 * accuracies["exact"]


def test_training_made_held_out_digits_likelier(trained, digits):
    x, y = digits[0][1500:], digits[1][1500:]
    noisy = trained.perturb(x, torch.Generator().manual_seed(0))
    fresh = type(trained)(**trained.config.__dict__)
    with torch.no_grad():
        gain = (trained.log_prob(noisy, y) - fresh.log_prob(noisy, y)) / trained.dims
    assert gain.mean() > 0.2  # nats per dimension
