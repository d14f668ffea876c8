import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from builders import images, random_flow
from flowback import InputError, TarFlow, score
from flowback.core.seeds import keyed_generator
from flowback.tasks.score import HeldOut, Score, evidence, log_prob_parts


def known(distance, draws=1):
    """What is known of typical images of a single token, whose distance is the square of the prior's part."""
    one = torch.ones(1, 1, dtype=torch.float64)
    ascending = torch.tensor(sorted(distance), dtype=torch.float64)
    return HeldOut(ascending, ascending, torch.zeros(1), one, one, one, draws)


def scored(distance, held_out=None):
    parts = torch.tensor(distance, dtype=torch.float64).sqrt().view(-1, 1, 1)
    return Score(parts[..., None], parts, None, 1, held_out)


@pytest.mark.parametrize("options", [{}, {"image_size": (4, 8), "noise": "uniform"}, {"prior": "scaled"}], ids=str)
def test_tokens_add_up_to_the_likelihood_and_their_differences_to_the_log_odds(options):
    flow = random_flow(num_classes=5, **options)
    if flow.prior_std is not None:
        flow.prior_std.uniform_(0.5, 2)
    x = images(flow)
    s = score(flow, x, draws=2, seed=3)
    noisy = [flow.perturb(x, [keyed_generator(3, draw) for _ in x]) for draw in range(2)]
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
    assert torch.allclose(evidence(flow, x, s.likeliest, other, draws=2, seed=3), s.evidence(s.likeliest, other), atol=1e-9)
    assert torch.allclose(s.parts, log_prob_parts(flow, x, draws=2, seed=3))


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


@given(st.lists(st.floats(0, 50), min_size=20, max_size=60), st.lists(st.floats(0, 60), min_size=1, max_size=9))
def test_typicality_is_the_share_that_is_as_distant(held_out, values):
    s = scored(values, known(held_out))
    for distance, p in zip(s.distance.tolist(), s.typicality.tolist(), strict=True):
        assert p == pytest.approx((sum(v >= distance for v in held_out) + 1) / (len(held_out) + 1))
    assert torch.equal(s.outliers(0.2), s.typicality <= 0.2)


def test_false_alarms_are_as_often_as_stated():
    """Of images that are like the held-out ones, the stated share is taken for an outlier."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        draws = torch.randn(600, generator=generator, dtype=torch.float64).exp()  # no assumption of a shape
        found.append(scored(draws[99:].tolist(), known(draws[:99].tolist())).outliers(0.1).double().mean())
    assert 0.093 < float(torch.stack(found).mean()) < 0.107


def test_what_is_not_finite_is_an_outlier():
    s = scored([math.nan, math.inf, 0.1], known([3.0] * 99))
    assert s.typicality.tolist() == pytest.approx([0.01, 0.01, 1.0])


def test_held_out_densities_lie_with_the_flow_and_calibrate_it(digits, trained, tmp_path):
    flow = random_flow(torch.float32, num_classes=0, image_size=8, channels=1, levels=17)
    with pytest.raises(InputError, match="flowback evaluate"):
        _ = score(flow, digits[0][:2]).typicality
    trained.save_pretrained(tmp_path)
    held_out = HeldOut.fit(score(trained, digits[0][1500:1700], draws=2), log_prob_parts(trained, digits[0][:600], draws=2))
    held_out.save(tmp_path)
    loaded = TarFlow.from_pretrained(tmp_path)
    for name, value in vars(HeldOut.load(loaded)).items():
        assert torch.allclose(torch.as_tensor(value).double(), torch.as_tensor(getattr(held_out, name)).double(), rtol=1e-6)
    s = score(loaded, digits[0][1700:])  # with the draws of the held-out images
    assert s.draws == 2
    assert 0.3 < float(s.typicality.median()) < 0.7  # of the same kind
    assert 0.3 < float(s.p_value("log_prob").median()) < 0.7
    assert abs(float(s.anomaly.mean())) < 0.2
    assert 0.6 < float(s.anomaly.std()) < 1.6
    noise = score(loaded, torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    blank = score(loaded, torch.full((5, 1, 8, 8), -1.0))
    assert noise.outliers().all()
    assert blank.outliers().all()
    assert s.outliers(0.1).float().mean() < 0.25
    with pytest.raises(InputError, match="log_prob or distance"):
        s.p_value("ratio")
    with pytest.raises(InputError, match="draws"):
        _ = score(loaded, digits[0][:2], draws=3).typicality
    with pytest.raises(InputError, match=r"from 0\.005, for 200 held-out images"):
        s.outliers(0.001)


@pytest.mark.parametrize("name", ["mean", "log_prob", "precision", "draws", "std", "more"])
def test_what_is_known_of_another_flow_is_refused(trained, digits, tmp_path, name):
    x = digits[0]
    HeldOut.fit(score(trained, x[:30]), score(trained, x[30:60])).save(tmp_path)
    trained.save_pretrained(tmp_path / "flow")
    tensors = load_file(tmp_path / "held_out.safetensors")
    changed = {"mean": torch.zeros(1, 1), "log_prob": torch.zeros(3), "precision": torch.eye(3), "more": torch.zeros(1)}
    tensors["std"] = tensors["std"] * (math.nan if name == "std" else 1)
    draws = "none" if name == "draws" else "1"
    tensors |= {name: changed[name]} if name in changed else {}
    save_file(tensors, tmp_path / "flow" / "held_out.safetensors", {"format": "1", "draws": draws})
    with pytest.raises(InputError, match=r"held_out\.safetensors cannot be used"):
        HeldOut.load(TarFlow.from_pretrained(tmp_path / "flow"))


def test_larger_grids_are_averaged_for_the_distance():
    flow = random_flow(torch.float32, num_classes=0, image_size=20, channels=1, patch_size=2)
    x = images(flow, 60)
    held_out = HeldOut.fit(score(flow, x[:30]), score(flow, x[30:]))
    assert held_out.center.shape == (4 * 8 * 8,)
    assert score(flow, x[:5], held_out=held_out).typicality.shape == (5,)


def test_fewer_than_twenty_images_are_refused(trained, digits):
    s = score(trained, digits[0][:19])
    with pytest.raises(InputError, match="at least 20 held-out images with finite densities, got 19"):
        HeldOut.fit(s, s)


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
