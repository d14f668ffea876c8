import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import random_flow
from flowback import Guidance, InputError
from flowback.flow.block import FlowBlock
from flowback.flow.guidance import RULES
from flowback.flow.patches import unpatchify


def slow_decode(flow, z, y, scale, schedule, what, rule="linear", blocks=(1, 2, 3), tokens=(0.0, 1.0)):
    """Guidance by its definition: two separate full passes for every token, no cache, nothing batched."""
    K, N = flow.num_classes, z.shape[1]
    conditional = torch.zeros(len(y), K, dtype=torch.float64)
    for i, label in enumerate(y.tolist()):
        conditional[i] = torch.full((K,), 1 / K) if label < 0 else torch.eye(K)[label]
    unconditional = torch.full((len(y), K), 1 / K, dtype=torch.float64)
    for t in range(len(flow.blocks), 0, -1):
        block = flow.blocks[t - 1]
        order = list(range(N)) if t % 2 else list(range(N - 1, -1, -1))
        x = torch.zeros_like(z)
        for n, d in enumerate(order):
            mu, a, _ = block.predict(x[:, order], conditional)
            mu_u, a_u, _ = block.predict(x[:, order], unconditional)
            w = scale * n / (N - 1) if schedule == "annealed" else scale
            w = w if t in blocks and tokens[0] <= n / N < tokens[1] else 0
            mu, mu_u, a, a_u = mu[:, n], mu_u[:, n], a[:, n], a_u[:, n]
            guided = (1 + w) * mu - w * mu_u, (1 + w) * a - w * a_u
            if rule == "product":
                s, r = a.exp(), (a - a_u).exp().clamp(max=1) ** 2
                guided = ((1 + w) * mu - w * r * mu_u) / (1 + w - w * r), (s**2 / (1 + w - w * r)).sqrt().log()
            mu = guided[0] if what in ("both", "mu") else mu
            a = guided[1] if what in ("both", "a") else a
            x[:, d] = z[:, d] * torch.exp(a) + mu
        z = x
    return unpatchify(z, flow.config.patch_size, flow.image_size)


@pytest.fixture(scope="module")
def flow():
    return random_flow(std=0.1)


@pytest.fixture
def z(flow):
    return torch.randn(3, *flow.token_shape, dtype=torch.float64)


Y = torch.tensor([2, 0, -1])


@pytest.mark.parametrize("what", ["both", "a", "mu"])
@pytest.mark.parametrize("schedule", ["constant", "annealed"])
@torch.no_grad()
def test_guided_decoding_equals_the_slow_definition(flow, z, schedule, what):
    expected = slow_decode(flow, z, Y, 1.7, schedule, what)
    found = flow.decode(z, Y, Guidance(1.7, schedule, what))
    assert torch.allclose(found, expected, atol=1e-10)
    assert (found - flow.decode(z, Y))[:2].abs().amax(dim=(1, 2, 3)).min() > 1e-3  # guidance did something


@pytest.mark.parametrize("method", ["sequential", "jacobi", "gauss_seidel"])
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "product"},
        {"rule": "product", "what": "mu"},
        {"rule": "product", "schedule": "annealed", "tokens": (0.0, 0.5)},
        {"blocks": (3,)},
        {"blocks": (1, 3), "tokens": (0.3, 0.8)},
    ],
)
@torch.no_grad()
def test_rules_blocks_and_ranges_equal_the_slow_definition(flow, z, options, method):
    o = {"schedule": "constant", "what": "both"} | options
    expected = slow_decode(flow, z, Y, 1.7, **o)
    found = flow.decode(z, Y, Guidance(1.7, guided=o.pop("what"), **o), method)
    assert torch.allclose(found, expected, atol=1e-9)
    assert (found - flow.decode(z, Y))[:2].abs().amax(dim=(1, 2, 3)).min() > 1e-3


@torch.no_grad()
def test_blocks_that_are_not_guided_take_a_single_pass(flow, z, monkeypatch):
    rows = []
    predict = FlowBlock.predict_next
    monkeypatch.setattr(
        FlowBlock, "predict_next", lambda self, x, *a, **k: rows.append(len(x)) or predict(self, x, *a, **k)
    )
    flow.decode(z, Y, Guidance(1.7, blocks=(3,)), "sequential")
    steps = z.shape[1] - 1
    assert rows == [6] * steps + [3] * 2 * steps


@given(st.floats(0, 1e3), st.integers(0, 1000), st.floats(0.1, 5))
def test_a_product_is_no_wider_and_always_finite(w, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    mu, a = spread * torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64)
    for scale in (w, 8.0, 1e3):
        guided = Guidance(scale, rule="product")
        new_mu, new_a = guided.apply(mu, a, guided.weights(mu))
        assert new_mu.isfinite().all()
        assert (new_a <= a[:2] + 1e-12).all()
        assert ((new_mu - mu[:2]).abs() <= scale * (mu[:2] - mu[2:]).abs() + 1e-9).all()
    same = a[:2].repeat(2, 1, 1)
    found, unchanged = Guidance(w, rule="product").apply(mu, same, Guidance(w).weights(mu))
    assert torch.allclose(found, Guidance(w, guided="mu").apply(mu, same, Guidance(w).weights(mu))[0])
    assert torch.equal(unchanged, same[:2])


@torch.no_grad()
def test_strong_guidance_stays_finite_as_a_product_alone(trained):
    y = torch.arange(10)
    z = torch.randn(10, *trained.token_shape)
    largest = {(w, rule): trained.decode(z, y, Guidance(w, rule=rule)).abs().amax() for w in (8.0, 1e3) for rule in RULES}
    assert largest[8.0, "product"] < 10 < largest[8.0, "linear"]
    assert largest[1e3, "product"].isfinite()
    assert not largest[1e3, "linear"].isfinite()


def test_every_schedule_and_target_is_another_guidance(flow, z):
    kinds = [Guidance(1.7, schedule, what) for schedule in ("constant", "annealed") for what in ("both", "a", "mu")]
    results = [flow.decode(z, Y, kind)[:2] for kind in kinds]
    for i, first in enumerate(results):
        for second in results[:i]:
            assert (first - second).abs().max() > 1e-3


def test_a_number_means_constant_guidance_of_both(flow, z):
    assert torch.equal(flow.decode(z, Y, 1.7), flow.decode(z, Y, Guidance(1.7, "constant", "both")))


@pytest.mark.parametrize("guidance", [0, 0.0, Guidance(0.0, "annealed", "mu")])
def test_no_guidance_is_plain_decoding(flow, z, guidance):
    assert torch.equal(flow.decode(z, Y, guidance), flow.decode(z, Y))


@pytest.mark.parametrize("y", [None, torch.full((3,), -1), [-1, -1, -1], -1])
@pytest.mark.parametrize("schedule", ["constant", "annealed"])
def test_without_labels_there_is_nothing_to_guide(flow, z, y, schedule):
    for guidance in (3.0, Guidance(3.0, schedule)):
        with pytest.raises(InputError, match=r"guidance 3\.0 needs labels"):
            flow.decode(z, y, guidance)
        if y is not None:  # without a word, labels are drawn
            with pytest.raises(InputError, match=r"guidance 3\.0 needs labels"):
                flow.sample(3, y=y, guidance=guidance)
    assert flow.sample(3, guidance=3.0).isfinite().all()


@pytest.mark.parametrize("schedule", ["constant", "annealed"])
def test_guidance_away_from_no_label_changes_nothing(flow, z, schedule):
    mean = torch.full((3, 4), 0.25, dtype=torch.float64)
    assert torch.allclose(flow.decode(z, mean, Guidance(3.0, schedule)), flow.decode(z), atol=1e-10)
    guided = flow.decode(z, [-1, 2, -1], Guidance(3.0, schedule))
    assert torch.allclose(guided[::2], flow.decode(z)[::2], atol=1e-10)


def test_a_chunk_without_labels_is_no_call_without_labels(flow):
    y = [-1, -1, 2, 3]
    apart, together = (flow.sample(y=y, guidance=2.0, seed=0, batch_size=size) for size in (2, 4))
    assert torch.allclose(apart, together, atol=1e-10)


def test_guided_rows_keep_to_their_own_label_and_noise(flow, z):
    together = flow.decode(z, Y, 2.0)
    for i in range(3):
        alone = flow.decode(z[i : i + 1], Y[i : i + 1], 2.0 if Y[i] >= 0 else 0.0)
        assert torch.allclose(alone[0], together[i], atol=1e-10)


def test_annealed_guidance_starts_at_nothing_and_ends_at_its_scale():
    mu, a = torch.randn(2, 6, 1, 4)
    guidance = Guidance(2.0, "annealed")
    w = guidance.weights(torch.zeros(1, 9, 4))
    for found, plain in zip(guidance.apply(mu, a, w[:1]), (mu[:3], a[:3]), strict=True):
        assert torch.equal(found, plain)
    for found, p in zip(guidance.apply(mu, a, w[8:]), (mu, a), strict=True):
        assert torch.allclose(found, p[:3] + 2 * (p[:3] - p[3:]))


def test_unconditional_flow_cannot_be_guided():
    flow = random_flow(num_classes=0)
    z = torch.zeros(1, *flow.token_shape, dtype=torch.float64)
    with pytest.raises(InputError, match=r"guidance must be 0 for an unconditional flow, got 1\.5"):
        flow.decode(z, guidance=1.5)
    with pytest.raises(InputError, match="unconditional"):
        flow.sample(2, guidance=1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.5,), r"guidance scale must be at least 0, got -0\.5"),
        ((float("nan"),), "guidance scale must be .*, got nan"),
        ((float("inf"),), "guidance scale must be .*, got inf"),
        ((1.0, "cosine"), "guidance schedule must be one of constant, annealed, got 'cosine'"),
        ((1.0, "constant", "z"), "guidance cannot act on 'z'; expected both, a, mu"),
        ((1.0, "constant", "a", "sum"), "guidance rule must be one of linear, product, got 'sum'"),
        ((1.0, "constant", "a", "linear", (0,)), r"guided blocks must be whole numbers from 1, got \[0\]"),
        (
            (1.0, "constant", "a", "linear", (), (0.5, 0.5)),
            r"guided tokens must be two ascending shares .*, got \[0\.5, 0\.5\]",
        ),
    ],
)
def test_impossible_guidance_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        Guidance(*arguments)


def test_blocks_that_do_not_exist_are_named(flow, z):
    with pytest.raises(InputError, match=r"guided blocks must be 1 to 3, got \[4\]"):
        flow.decode(z, Y, Guidance(1.0, blocks=(4,)))
