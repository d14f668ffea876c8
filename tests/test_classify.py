import pytest
import torch

from builders import images, random_flow
from flowback import InputError
from flowback.classify import RULES, classify, exact, single_gradient


def test_single_gradient_is_the_slope_of_every_logit():
    flow = random_flow(num_classes=5)
    x, h = images(flow), 1e-5
    scores = single_gradient(flow, x)
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
    assert torch.allclose(exact(flow, x), expected, atol=1e-9)
    assert exact(flow, x).std(dim=1).min() > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_draws_are_averaged(rule):
    flow = random_flow(noise_std=0.3)
    x = images(flow)
    generator = torch.Generator().manual_seed(11)
    draws = [RULES[rule](flow, flow.perturb(x, generator)) for _ in range(3)]
    found = classify(flow, x, rule, draws=3, seed=11)
    assert torch.allclose(found, torch.stack(draws).mean(dim=0), atol=1e-9)
    assert (draws[0] - draws[1]).abs().max() > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_scores_do_not_depend_on_the_batch_size(rule):
    flow = random_flow()
    x = images(flow, 5)
    whole = classify(flow, x, rule)
    for batch_size in (1, 2, 8):
        assert torch.allclose(classify(flow, x, rule, batch_size=batch_size), whole, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_batch_size_bounds_the_rows_that_the_flow_sees(rule, monkeypatch):
    flow = random_flow()
    rows, encode = [], type(flow).encode
    monkeypatch.setattr(type(flow), "encode", lambda self, x, *a, **k: rows.append(len(x)) or encode(self, x, *a, **k))
    classify(flow, images(flow, 7), rule, batch_size=8)
    assert max(rows) <= 8


def test_seed_decides_the_noise():
    flow = random_flow(noise_std=0.3)
    x = images(flow)
    assert torch.equal(classify(flow, x, seed=1), classify(flow, x, seed=1))
    assert not torch.equal(classify(flow, x, seed=1), classify(flow, x, seed=2))


def test_uniform_noise_flow_is_classified_with_its_own_noise():
    flow = random_flow(noise="uniform", levels=4)
    x = images(flow)
    expected = exact(flow, flow.dequantise(x, torch.Generator().manual_seed(0)))
    assert torch.allclose(classify(flow, x, "exact"), expected, atol=1e-9)


def test_classifying_leaves_no_gradients():
    flow = random_flow()
    with torch.no_grad():
        scores = flow.classify(images(flow))
    assert not scores.requires_grad
    assert all(p.grad is None for p in flow.parameters())


def test_a_frozen_flow_classifies_the_same():
    flow = random_flow()
    x = images(flow)
    scores = flow.classify(x)
    assert torch.equal(flow.requires_grad_(False).classify(x), scores)


def test_method_of_the_flow_is_the_function():
    flow = random_flow()
    x = images(flow)
    assert torch.equal(flow.classify(x), classify(flow, x, "single_gradient"))
    assert torch.equal(flow.classify(x, "exact", draws=2), classify(flow, x, "exact", draws=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "best"}, "classification rule 'best' does not exist; allowed: single_gradient, exact"),
        ({"draws": 0}, "draws 0 is not usable; allowed is a whole number of at least 1"),
    ],
)
def test_impossible_requests_are_named(arguments, message):
    flow = random_flow()
    with pytest.raises(InputError, match=message):
        flow.classify(images(flow), **arguments)


def test_unconditional_flow_cannot_classify():
    flow = random_flow(num_classes=0)
    with pytest.raises(InputError, match="unconditional flow cannot classify"):
        flow.classify(images(flow))


# ---- real digits ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accuracies(trained, digits):
    x, y = digits[0][1500:], digits[1][1500:]
    scores = {rule: trained.classify(x, rule, draws=2) for rule in RULES}
    return {rule: (s.argmax(dim=1) == y).float().mean().item() for rule, s in scores.items()}


def test_a_briefly_trained_flow_knows_most_digits(accuracies):
    assert accuracies["exact"] > 0.8  # chance is 0.1; three seeds gave 0.89 to 0.92


def test_one_gradient_knows_nearly_as_many(accuracies):
    assert accuracies["single_gradient"] > 0.7  # three seeds gave 0.83 to 0.88


def test_training_made_held_out_digits_likelier(trained, digits):
    x, y = digits[0][1500:], digits[1][1500:]
    noisy = trained.perturb(x, torch.Generator().manual_seed(0))
    fresh = type(trained)(**trained.config.__dict__)
    with torch.no_grad():
        gain = (trained.log_prob(noisy, y) - fresh.log_prob(noisy, y)) / trained.dims
    assert gain.mean() > 0.2  # nats per dimension
