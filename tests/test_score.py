import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import images, random_flow
from flowback import InputError, TarFlow, score
from flowback.tasks.score import HeldOut, Score


def known(log_prob, draws=1):
    return HeldOut(sorted(log_prob), [], [[0.0]], [[1.0]], draws)


def scored(log_prob, held_out=None):
    """A score of images of a single token, of the flow without classes."""
    return Score(torch.tensor(log_prob, dtype=torch.float64).view(-1, 1, 1, 1), None, 1, held_out)


@pytest.mark.parametrize("options", [{}, {"image_size": (4, 8), "noise": "uniform"}, {"prior": "scaled"}], ids=str)
def test_tokens_add_up_to_the_likelihood_and_their_differences_to_the_log_odds(options):
    flow = random_flow(num_classes=5, **options)
    if flow.prior_std is not None:
        flow.prior_std.uniform_(0.5, 2)
    x = images(flow)
    s = score(flow, x, draws=2, seed=3)
    generator = torch.Generator().manual_seed(3)
    noisy = [flow.perturb(x, generator) for _ in range(2)]
    for k in range(5):
        expected = torch.stack([flow.log_prob(part, k) for part in noisy]).mean(0)
        assert torch.allclose(s.class_log_prob[:, k], expected, atol=1e-9)
    assert torch.allclose(s.log_prob, s.class_log_prob.exp().mean(1).log(), atol=1e-9)
    assert s.background is not None
    assert torch.allclose(s.background, torch.stack([flow.log_prob(part) for part in noisy]).mean(0), atol=1e-9)
    assert torch.allclose(s.ratio, s.log_prob - s.background)
    assert s.maps.shape == (3, *flow.grid)
    assert torch.allclose(s.maps.sum((1, 2)), s.class_log_prob.amax(1))
    other = torch.tensor([0, 4, 1])
    for a, b in ((1, 3), (2, other), (other, s.likeliest)):
        odds = torch.stack(
            [s.class_log_prob[i, ai] - s.class_log_prob[i, bi] for i, ai, bi in zip(range(3), *pair(a, b), strict=True)]
        )
        assert torch.allclose(s.evidence(a, b).sum((1, 2)), odds, atol=1e-9)
        assert s.evidence(a, b).abs().max() > 1e-3


def pair(a, b):
    return [value.tolist() if isinstance(value, torch.Tensor) else [value] * 3 for value in (a, b)]


def test_a_token_answers_for_its_own_place():
    """Where the flow is a map of each token by itself, only the token that was changed has another share."""
    flow = random_flow(num_classes=0)
    for block in flow.blocks:
        block.proj_out.weight.data.zero_()
    x = images(flow)
    changed = x.clone()
    changed[:, :, :2, 2:4] += 0.5  # the second token of the first row
    difference = score(flow, changed).maps - score(flow, x).maps
    assert difference[:, 0, 1].abs().min() > 1e-6
    difference[:, 0, 1] = 0
    assert difference.abs().max() < 1e-12


@given(st.lists(st.floats(-50, 50), min_size=20, max_size=60), st.lists(st.floats(-60, 60), min_size=1, max_size=9))
def test_typicality_is_twice_the_rarer_side(held_out, values):
    s = scored(values, known(held_out))
    n = len(held_out)
    for value, p in zip(values, s.typicality.tolist(), strict=True):
        low, high = (sum(v <= value for v in held_out) + 1) / (n + 1), (sum(v >= value for v in held_out) + 1) / (n + 1)
        assert p == pytest.approx(min(1, 2 * min(low, high)))
    assert torch.equal(s.outliers(0.2), s.typicality <= 0.2)


def test_false_alarms_are_as_often_as_stated():
    """Of images that are like the held-out ones, at most the stated share is taken for an outlier, and nearly that."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        draws = torch.randn(600, generator=generator, dtype=torch.float64).exp()  # no assumption of a shape
        found.append(scored(draws[99:].tolist(), known(draws[:99].tolist())).outliers(0.1).double().mean())
    assert 0.085 < float(torch.stack(found).mean()) < 0.105


def test_what_is_not_finite_is_an_outlier():
    s = scored([math.nan, -math.inf, 3.0], known([3.0] * 99))
    assert s.typicality.tolist() == pytest.approx([0.02, 0.02, 1.0])


def test_held_out_densities_lie_with_the_flow_and_calibrate_it(digits, trained, tmp_path):
    flow = random_flow(torch.float32, num_classes=0, image_size=8, channels=1, levels=17)
    with pytest.raises(InputError, match="flowback evaluate"):
        _ = score(flow, digits[0][:2]).typicality
    trained.save_pretrained(tmp_path)
    held_out = HeldOut.of(score(trained, digits[0][1500:1700], draws=2))
    held_out.save(tmp_path)
    loaded = TarFlow.from_pretrained(tmp_path)
    assert HeldOut.load(loaded) == held_out
    s = score(loaded, digits[0][1700:])  # with the draws of the held-out images
    assert s.draws == 2
    assert 0.3 < float(s.typicality.median()) < 0.7  # of the same kind
    assert abs(float(s.anomaly.mean())) < 0.2
    assert 0.6 < float(s.anomaly.std()) < 1.6
    noise = score(loaded, torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert noise.outliers(0.02).all()
    assert float(s.p_value("ratio").median()) > 0.3
    with pytest.raises(InputError, match="draws"):
        _ = score(loaded, digits[0][:2], draws=3).typicality
    with pytest.raises(InputError, match=r"from 0\.01, for 200 held-out images"):
        s.outliers(0.001)


@pytest.mark.parametrize("change", [{"mean": [[0.0]]}, {"log_prob": [1.0]}, {"draws": 0}, {"std": None}, {"more": 1}])
def test_held_out_densities_of_something_else_are_refused(trained, digits, tmp_path, change):
    held_out = HeldOut.of(score(trained, digits[0][:30]))
    trained.save_pretrained(tmp_path)
    held_out.save(tmp_path)
    file = tmp_path / "held_out.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=r"held_out\.json cannot be used"):
        HeldOut.load(TarFlow.from_pretrained(tmp_path))


def test_the_ratio_of_a_background_flow_of_the_same_space(digits, trained):
    plain = random_flow(
        torch.float32,
        num_classes=0,
        **{k: getattr(trained.config, k) for k in ("image_size", "channels", "levels", "patch_size", "noise_std")},
    )
    x = digits[0][:5]
    with pytest.raises(InputError, match="background"):
        _ = score(plain, x).ratio
    s = score(trained, x, background=plain)
    assert torch.allclose(s.ratio, score(trained, x).log_prob - score(plain, x).log_prob)
    with pytest.raises(InputError, match=r"noise 0\.3, got .* noise 0\.05"):
        score(trained, x, background=random_flow(torch.float32, image_size=8, channels=1, patch_size=4, noise_std=0.05))


def test_a_class_that_does_not_exist_is_refused(trained, digits):
    with pytest.raises(InputError, match="from 0 to 9, got 10"):
        score(trained, digits[0][:2]).evidence(3, 10)
