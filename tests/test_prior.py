"""The fitted prior against dense normal distributions, its fit on data whose distribution is known and on digits."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributions import MultivariateNormal

from builders import images, random_flow
from flowback import Guidance, InputError, TarFlow, classify
from flowback.core.seeds import keyed_generator
from flowback.flow.defaults import Defaults
from flowback.flow.io import fingerprint
from flowback.flow.prior import FittedPrior
from flowback.tasks import prior as fitting
from flowback.tasks.prior import fit_prior
from flowback.tasks.sampling import Request, alike, candidates, draw_batches

N, D = 3, 2


def orthonormal(*shape):
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


def some_prior(tokens=(N, D), classes=3, r=4, q=2, weights=""):
    n, k = tokens[0] * tokens[1], classes + 1
    shared, own = 3 * torch.rand(r, dtype=torch.float64) - 0.8, 3 * torch.rand(k, q, dtype=torch.float64) - 0.8
    mean, scale = torch.randn(k, *tokens, dtype=torch.float64), 0.5 + torch.rand(tokens, dtype=torch.float64)
    return FittedPrior(mean, scale, orthonormal(n, r), shared, orthonormal(k, n, q), own, weights)


def with_prior(flow, **options):
    prior = some_prior(flow.token_shape, flow.num_classes, weights=fingerprint(flow.state_dict()), **options)
    flow.fitted_prior = prior.to(flow.device, flow.dtype)
    return flow


def one_hot(*labels, classes=3):
    return torch.stack([torch.full((classes,), 1 / classes) if k < 0 else torch.eye(classes)[k] for k in labels])


def stretch(basis, spectrum):
    return torch.eye(len(basis)) + basis @ torch.diag(spectrum.add(1).sqrt() - 1) @ basis.T


@pytest.mark.parametrize("label", [0, 2, -1])
def test_density_is_that_of_the_dense_normal_distribution(label):
    torch.set_default_dtype(torch.float64)
    try:
        prior, z = some_prior(), torch.randn(5, N, D)
        root = torch.diag(prior.scale.flatten()) @ stretch(prior.basis, prior.shared)
        root = root @ stretch(prior.own_basis[label], prior.own[label])
        expected = MultivariateNormal(prior.mean[label].flatten(), root @ root.T).log_prob(z.flatten(1))
        found = prior.log_prob(z, one_hot(*[label] * 5))
        assert torch.allclose(found, expected, atol=1e-10)
        noise = torch.randn(5, N, D)
        drawn = prior.to_z(noise, one_hot(*[label] * 5), 0.7)
        assert torch.allclose(drawn.flatten(1), prior.mean[label].flatten() + 0.7 * noise.flatten(1) @ root.T, atol=1e-10)
    finally:
        torch.set_default_dtype(torch.float32)


@given(
    st.integers(0, 5), st.integers(0, 3), st.sampled_from([0, 1, 4]), st.sampled_from([(), (1,), (2, 3)]), st.floats(0.1, 2)
)
def test_noise_comes_back(r, q, classes, draws, temperature):
    prior = some_prior(classes=classes, r=r, q=q)
    y = one_hot(-1, 0, classes=classes) if classes else None
    noise = torch.randn(2, *draws, N, D, dtype=torch.float64)
    z = prior.to_z(noise, y, temperature)
    assert torch.allclose(prior.to_noise(z, y, temperature), noise, atol=1e-9)
    for place in ((0, 0), (0, 1), (1, 1)) if draws == (2, 3) else ():  # each draw as if alone
        own = prior.to_z(noise[:, place[0], place[1]], y, temperature)
        assert torch.allclose(z[:, place[0], place[1]], own, atol=1e-12)


def test_weights_that_mix_classes_count_as_the_largest():
    prior, z = some_prior(), torch.randn(1, N, D, dtype=torch.float64)
    found = prior.log_prob(z, torch.tensor([[0.2, 0.5, 0.3]]))
    assert torch.equal(found, prior.log_prob(z, one_hot(1)))
    assert not torch.equal(found, prior.log_prob(z, one_hot(-1)))


@pytest.mark.parametrize("kind", ["standard", "scaled"])
def test_a_flow_draws_and_measures_under_either_prior(kind):
    flow = with_prior(random_flow(prior=kind))
    if kind == "scaled":
        flow.prior_std.uniform_(0.5, 2)
    y, noise = torch.tensor([1, 3, -1]), torch.randn(3, *flow.token_shape, dtype=torch.float64)
    for prior in ("standard", "fitted"):
        z = flow.draw_z(noise, y, 0.8, prior)
        assert torch.allclose(flow.to_noise(z, y, 0.8, prior), noise, atol=1e-10)
        x = flow.sample(y=y, temperature=0.8, prior=prior, denoise=False, seed=3)
        drawn = torch.randn(3, *flow.token_shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        assert torch.allclose(x, flow.decode(flow.draw_z(drawn, y, 0.8, prior), y), atol=1e-10)
    x = images(flow)
    z, log_det = flow.encode(x, y)
    expected = flow.fitted_prior.log_prob(z, flow.class_weights(y, 3)) + log_det
    assert torch.allclose(flow.log_prob(x, y, prior="fitted"), expected)
    scores = classify(flow, x, "exact_fitted")
    noisy = flow.perturb(x, torch.Generator().manual_seed(0))
    assert torch.allclose(scores[:, 2], flow.log_prob(noisy, 2, prior="fitted"))


def test_what_does_not_fit_is_named():
    flow = random_flow()
    for call in (
        lambda: flow.sample(2, prior="fitted"),
        lambda: flow.log_prob(images(flow), prior="fitted"),
        lambda: classify(flow, images(flow), "exact_fitted"),
    ):
        with pytest.raises(InputError, match="no fitted prior: run `flowback fit-prior`"):
            call()
    with pytest.raises(InputError, match="prior must be one of standard, fitted, got 'own'"):
        flow.draw_z(torch.zeros(1, *flow.token_shape), prior="own")
    few = [(torch.zeros(9, *flow.data_shape), torch.zeros(9, dtype=torch.long))]
    with pytest.raises(InputError, match=r"at least 20 training images .* got 12"):
        fit_prior(flow, few, few)


def known(n, seed, correlated=1.5):
    """Images of two classes whose z, of the identity, is normal: means apart, one direction long, one number small."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 1, 4, 4, generator=generator), torch.arange(n) % 2
    along = torch.randn(n, 1, 1, 1, generator=generator) / 4
    x = x + correlated * along + (2 * y - 1)[:, None, None, None] * 0.4
    x[..., 0, 0] *= 0.5
    return x, y


@pytest.mark.parametrize("dense", [True, False])
def test_the_fit_comes_near_the_true_distribution(dense, monkeypatch):
    if not dense:
        monkeypatch.setattr(fitting, "MOST_DENSE", 1)
    flow = TarFlow(image_size=4, channels=1, num_classes=2, width=8, head_dim=8, blocks=2, layers=1, noise_std=0.0)
    fit = fit_prior(flow, [known(3000, 0)], [known(2000, 1)])
    assert fit.prior is not None
    x, y = known(2000, 2)
    z = flow.encode(x, y)[0].detach().flatten(1).double()
    covariance = torch.eye(16, dtype=torch.float64) + 1.5**2 / 16
    small = torch.eye(16, dtype=torch.float64)
    small[0, 0] = 0.5
    mean = (2 * y - 1)[:, None] * 0.4 * small.diagonal()
    best = MultivariateNormal(torch.zeros(16, dtype=torch.float64), small @ covariance @ small).log_prob(z - mean)
    standard = -0.5 * (z.square() + torch.tensor(2 * torch.pi).log()).sum(dim=1)
    gain, most = ((log_prob - standard).mean().item() / 16 for log_prob in (flow_log_prob(fit, z, y), best))
    assert 0.9 * most < gain < most
    assert fit.gained == pytest.approx(gain, rel=0.15)


def test_an_image_chooses_or_measures_and_never_both(monkeypatch):
    flow = TarFlow(image_size=4, channels=1, num_classes=2, width=8, head_dim=8, blocks=2, layers=1, noise_std=0.0)
    found, finish = [], fitting._Stored.finish

    def copied(part):
        finish(part)
        found.append((part.rows[:, 1].tolist(), part.y))  # as they were: a fit changes them

    monkeypatch.setattr(fitting._Stored, "finish", copied)
    fit_prior(flow, [known(400, 0)], [known(400, 1)])
    _, chosen, measured = found
    assert not set(chosen[0]) & set(measured[0]), "no image is in both, with its label or without"
    for _, y in (chosen, measured):
        assert y.bincount().min() > 30, "classes that take turns are in both"


def flow_log_prob(fit, z, y):
    return fit.prior.log_prob(z.view(-1, *fit.prior.scale.shape), one_hot(*y.tolist(), classes=2))


def test_nothing_is_kept_where_nothing_is_gained():
    flow = TarFlow(image_size=4, channels=1, width=8, head_dim=8, blocks=2, layers=1, noise_std=0.0)
    parts = [torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    fit = fit_prior(flow, *([(x, torch.zeros(200, dtype=torch.long))] for x in parts))
    assert fit.prior is None
    assert abs(fit.gained) < 1e-3


def test_digits_that_nothing_was_fitted_to_get_likelier(trained, digits):
    x, y = digits
    fit = fit_prior(trained, [(x[:1500], y[:1500])], [(x[1500:1700], y[1500:1700])])
    assert fit.prior is not None
    flow, rest = TarFlow(trained.config), slice(1700, None)
    flow.load_state_dict(trained.state_dict())
    flow.fitted_prior = fit.prior
    noisy = flow.perturb(x[rest], keyed_generator(5))
    for labels in (y[rest], None):
        gain = flow.log_prob(noisy, labels, prior="fitted") - flow.log_prob(noisy, labels)
        assert gain.mean() > 0.1  # nats an image


def test_it_lies_with_its_own_weights_only(tmp_path):
    flow = with_prior(random_flow(torch.float32))
    flow.defaults = Defaults(0.8, "fitted", 1.5, "product", flow.fitted_prior.weights)
    flow.save_pretrained(tmp_path / "flow")
    loaded = TarFlow.from_pretrained(tmp_path / "flow")
    assert loaded.defaults == flow.defaults
    for name, value in loaded.fitted_prior.named_buffers():
        assert torch.equal(value, getattr(flow.fitted_prior, name))
    assert "fitted_prior.mean" not in loaded.state_dict()
    x = flow.sample(2, seed=1)
    assert torch.allclose(loaded.sample(2, seed=1), x, atol=1e-5)  # by the same defaults
    loaded.defaults = Defaults()
    assert not torch.allclose(loaded.sample(2, seed=1), x, atol=1e-2)
    guidance = Guidance(1.5, rule="product")
    assert torch.allclose(loaded.sample(2, seed=1, guidance=guidance, temperature=0.8, prior="fitted"), x, atol=1e-5)

    with torch.no_grad():
        loaded.blocks[0].proj_in.bias += 1
    loaded.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / "prior.safetensors").exists()
    for name in ("prior.safetensors", "sampling.json"):
        shutil.copy(tmp_path / "flow" / name, tmp_path / "other")
        with pytest.raises(InputError, match=rf"{name} cannot be used \(it (was fitted to|is of) other weights\)"):
            TarFlow.from_pretrained(tmp_path / "other")
        (tmp_path / "other" / name).unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean": torch.zeros(5, 9, 7)}, r"mean must be finite numbers \[5, 9, 8\], got \[5, 9, 7\]"),
        ({"scale": torch.zeros(9, 8)}, "variances that are not above 0"),
        ({"shared": torch.full((4,), -1.0)}, "variances that are not above 0"),
        ({"own": torch.full((5, 2), torch.nan)}, "own must be finite"),
        ({"more": torch.zeros(1)}, "more"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, change, said):
    flow = with_prior(random_flow(torch.float32))
    flow.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "prior.safetensors")
    save_file(tensors | change, tmp_path / "prior.safetensors", {"format": "1", "weights": flow.fitted_prior.weights})
    with pytest.raises(InputError, match=said):
        TarFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change", [{"prior": "own"}, {"temperature": 0.0}, {"guidance_rule": "x"}, {"guidance": -1.0}, {"temperature": "1"}]
)
def test_impossible_defaults_are_named(tmp_path, change):
    flow = random_flow(torch.float32)
    flow.defaults = Defaults(weights=fingerprint(flow.state_dict()))
    flow.save_pretrained(tmp_path)
    file = tmp_path / "sampling.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=r"sampling\.json cannot be used .*run `flowback sweep` again"):
        TarFlow.from_pretrained(tmp_path)


def test_a_request_takes_the_flows_defaults_for_what_is_not_given():
    flow = with_prior(random_flow(torch.float32))
    flow.defaults = Defaults(0.8, "fitted", 1.5, "product", "x")
    settled = Request(2, (1, 2), temperature=0.9).settled(flow)
    assert (settled.temperature, settled.prior, settled.guidance, settled.guidance_rule) == (0.9, "fitted", 1.5, "product")
    assert Request(2).settled(flow).guidance == 0  # without labels there is nothing to guide towards
    drawn = [
        torch.cat([d.x for d in draw_batches(flow, r, range(2))]) for r in (Request(2, (1, 2), temperature=0.9), settled)
    ]
    assert torch.equal(*drawn)
    z, y = candidates(flow, settled, [0, 1])
    noise = flow.to_noise(z, y, 0.9, "fitted")
    assert noise.flatten().std() == pytest.approx(1, abs=0.2)


def test_images_alike_begin_at_the_image():
    flow = with_prior(random_flow())
    request = Request(2, (1, 2), prior="fitted", temperature=0.7, denoise=False)
    (drawn,) = draw_batches(flow, request, [1])
    near, far = (alike(flow, request, 1, strength, seed=3, num=2) for strength in (0.0, 1.0))
    assert torch.allclose(near, drawn.x.expand_as(near), atol=1e-5)
    assert (far - near).abs().mean() > 0.1
