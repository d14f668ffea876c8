import numpy as np
import pytest
import torch

from builders import attributes, images, labels, random_flow
from flowback import Guidance, InputError, TarFlow
from flowback.flow.patches import unpatchify


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_images_do_not_depend_on_the_batch_size(guidance):
    flow = random_flow(torch.float32, std=0.1)
    y = torch.tensor([0, 3, -1, 2, 1, 1, 0])
    whole = flow.sample(y=y, guidance=guidance, generator=seeded())
    for batch_size in (1, 3, 7):
        parts = flow.sample(y=y, guidance=guidance, generator=seeded(), batch_size=batch_size)
        assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-4)


def test_seed_decides_the_images():
    flow = random_flow()
    first, second, other = (flow.sample(y=[0, 1], generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert (first - other).abs().max() > 0.1
    assert torch.equal(flow.sample(y=[0, 1], seed=1), first)


def test_global_seed_serves_where_no_generator_is_given():
    flow = random_flow()
    torch.manual_seed(3)
    first = flow.sample(2)
    torch.manual_seed(3)
    assert torch.equal(flow.sample(2), first)


def test_generator_spares_the_global_random_state():
    flow = random_flow()
    before = torch.get_rng_state()
    flow.sample(4, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_may_be_a_list_a_tensor_or_one_for_all():
    flow = random_flow()
    from_list = flow.sample(y=[2, -1], generator=seeded())
    assert from_list.shape == (2, 2, 6, 6)
    assert torch.equal(flow.sample(y=torch.tensor([2, -1]), generator=seeded()), from_list)
    assert torch.equal(flow.sample(2, y=[2, -1], generator=seeded()), from_list)
    threes = flow.sample(y=[3, 3, 3], generator=seeded())
    assert torch.equal(flow.sample(3, y=3, generator=seeded()), threes)
    assert torch.equal(flow.sample(y=3, generator=seeded()), flow.sample(1, y=3, generator=seeded()))


def test_a_shape_is_that_of_the_images():
    flow = random_flow()
    images, log_prob = flow.sample((2, 3), y=1, generator=seeded(), return_log_prob=True)
    assert (images.shape, log_prob.shape) == ((2, 3, 2, 6, 6), (2, 3))
    assert torch.equal(images.flatten(0, 1), flow.sample(6, y=1, generator=seeded()))
    assert flow.sample((4,), y=[0, 1, 2, 3]).shape == (4, 2, 6, 6)


def test_each_label_shapes_its_own_image():
    flow = random_flow()
    a, b = flow.sample(y=[0, 1, 2], generator=seeded()), flow.sample(y=[0, 3, 2], generator=seeded())
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert (a[1] - b[1]).abs().max() > 1e-3


def test_a_count_draws_labels_uniformly(monkeypatch):
    flow = random_flow(image_size=2)  # a single token: quick
    seen = []
    decode = TarFlow.decode

    def spy(self, z, y, *args, **kwargs):
        seen.append(self.class_weights(y, len(z)).argmax(dim=1))
        return decode(self, z, y, *args, **kwargs)

    monkeypatch.setattr(TarFlow, "decode", spy)
    assert flow.sample(1000, denoise=False, generator=seeded()).shape == (1000, 2, 2, 2)
    counts = torch.cat(seen).bincount(minlength=4)
    assert len(counts) == 4
    assert counts.min() > 200


def test_a_count_of_an_unconditional_flow_draws_images_without_labels():
    flow = random_flow(num_classes=0)
    assert torch.equal(flow.sample(2, generator=seeded()), flow.sample(y=[-1, -1], generator=seeded()))


def test_a_fresh_flow_samples_the_prior():
    flow = TarFlow(image_size=8, channels=3, patch_size=2, width=16, head_dim=8, blocks=2, layers=1)
    x = flow.sample(300, denoise=False, generator=seeded(), batch_size=300)
    assert x.mean().item() == pytest.approx(0, abs=0.02)
    assert x.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_temperature_scales_z(temperature):
    flow = random_flow()
    y = torch.tensor([0, 1, -1])
    z = torch.randn(3, *flow.token_shape, generator=seeded(), dtype=torch.float64)
    expected = flow.decode(temperature * z, y)
    found = flow.sample(y=y, temperature=temperature, denoise=False, generator=seeded())
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("noise_std", [0.05, 0.3])
def test_denoising_is_a_step_along_the_numerical_score(noise_std):
    flow = random_flow(image_size=4, channels=1, noise_std=noise_std)
    x, y, h = images(flow), labels(flow), 1e-5
    score = torch.zeros_like(x)
    for row in range(4):
        for column in range(4):
            step = torch.zeros_like(x)
            step[..., row, column] = h
            score[:, 0, row, column] = (flow.log_prob(x + step, y) - flow.log_prob(x - step, y)).detach() / (2 * h)
    before = x.clone()
    denoised = flow.denoise(x, y)
    assert torch.equal(x, before)
    assert not denoised.requires_grad
    assert torch.allclose(denoised, x + noise_std**2 * score, atol=1e-8)


@pytest.mark.parametrize("y", [None, torch.tensor([3, -1, 0]), torch.rand(3, 4, dtype=torch.float64).softmax(dim=1)])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_denoising_in_chunks_equals_denoising_at_once(y, batch_size):
    flow = random_flow(noise_std=0.3)
    x = images(flow)
    denoised = flow.denoise(x, y)
    assert (denoised - x).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert torch.allclose(flow.denoise(x, y, batch_size=batch_size), denoised, atol=1e-12)


def test_denoising_gaussian_data_gives_their_posterior_mean():
    # a flow that is the identity is the exact model of N(0, 1) seen with noise; E[clean | x] = (1 - sigma^2) x
    flow = TarFlow(image_size=4, channels=1, patch_size=2, width=16, head_dim=8, noise_std=0.3)
    x = torch.randn(2, 1, 4, 4)
    assert torch.allclose(flow.denoise(x), (1 - 0.09) * x, atol=1e-6)


def test_samples_are_denoised_with_their_labels_unless_told_otherwise():
    flow = random_flow(noise_std=0.3)
    y = torch.tensor([3, 0, -1])
    raw = flow.sample(y=y, denoise=False, generator=seeded())
    denoised = flow.sample(y=y, generator=seeded())
    assert torch.equal(denoised, flow.denoise(raw, y))
    assert (denoised - raw).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"noise": "uniform"}, {"noise_std": 0.0}])
def test_there_is_nothing_to_denoise_without_gaussian_noise(options):
    flow = random_flow(**options)
    raw, denoised = (flow.sample(y=[0, 1], denoise=d, generator=seeded()) for d in (False, True))
    assert torch.equal(raw, denoised)
    assert torch.equal(flow.denoise(raw, torch.tensor([0, 1])), raw)


def test_log_prob_is_returned_of_the_images_before_the_score_step():
    flow = random_flow(noise_std=0.3)
    y = torch.tensor([0, 1, -1, 3, 3])
    raw = flow.sample(y=y, denoise=False, generator=seeded())
    x, log_prob = flow.sample(y=y, generator=seeded(), return_log_prob=True, batch_size=2)
    assert torch.allclose(x, flow.denoise(raw, y), atol=1e-10)
    assert log_prob.shape == (5,)
    assert torch.allclose(log_prob, flow.log_prob(raw, y), atol=1e-8)


def test_samples_carry_no_graph():
    flow = random_flow()
    x, log_prob = flow.sample(2, return_log_prob=True)
    assert not x.requires_grad
    assert not log_prob.requires_grad
    assert all(p.grad is None for p in flow.parameters())


def test_samples_have_the_flows_dtype():
    assert random_flow(torch.float32).sample(2).dtype == torch.float32
    assert random_flow(torch.float64).sample(2).dtype == torch.float64


@pytest.mark.parametrize("method", ["auto", "sequential", "jacobi", "gauss_seidel"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_neither_method_nor_batch_size_changes_the_samples(method, guidance):
    flow = random_flow(torch.float32, std=0.1)
    y = torch.tensor([0, 3, -1, 2, 1])
    expected = flow.sample(y=y, guidance=guidance, generator=seeded(), method="sequential")
    for batch_size in (2, 5):
        x = flow.sample(y=y, guidance=guidance, generator=seeded(), method=method, batch_size=batch_size)
        assert torch.allclose(x, expected, rtol=1e-4, atol=1e-4)


def test_decoding_undoes_the_patches_last():
    flow = TarFlow(image_size=4, channels=2, patch_size=2, width=16, head_dim=8)
    z = torch.randn(1, 4, 8)
    assert torch.equal(flow.decode(z), unpatchify(z, 2, (4, 4)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num.* or y"),
        ({"num": 0}, "num must be .*at least 1.* got 0"),
        ({"num": -3}, "num must be .* got -3"),
        ({"num": (2, 0)}, r"num must be .* got \(2, 0\)"),
        ({"num": ()}, r"num must be .* got \(\)"),
        ({"num": 2.5}, r"num must be .* got 2\.5"),
        ({"num": [0, 1]}, r"num must be .* got \[0, 1\].* y="),  # labels, as they were given once
        ({"num": 3, "y": [0, 1]}, r"labels.*3.*2"),
        ({"y": []}, "num must be .*at least 1.* got 0"),
        ({"y": [0, 4]}, r"label 4 is out of range.* 0 to 3, or -1 for no label"),
        ({"y": [-2]}, "label -2"),
        ({"num": 2, "temperature": 0}, "temperature must be above 0 and finite, got 0"),
        ({"num": 2, "temperature": float("nan")}, "temperature .* nan"),
        ({"num": 2, "temperature": float("inf")}, "temperature .* inf"),
        ({"num": 2, "guidance": -1.0}, r"guidance.* -1\.0"),
        ({"y": [-1, -1], "guidance": 1.0}, r"guidance 1\.0 needs labels"),
        ({"num": 2, "batch_size": 0}, "batch_size must be .* got 0"),
        ({"num": 2, "method": "newton"}, "method must be .*, got 'newton'"),
        ({"num": 2, "seed": 1, "generator": torch.Generator()}, "seed or generator"),
    ],
)
def test_impossible_requests_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        random_flow().sample(**arguments)


def test_sampling_that_raises_leaves_nothing_behind(monkeypatch):
    flow = random_flow()
    expected, before = flow.sample(y=[0, 1], guidance=1.0, generator=seeded()), attributes(flow)

    def failing(*args):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Guidance, "apply", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            flow.sample(y=[0, 1], guidance=1.0)
    assert attributes(flow) == before
    assert torch.equal(flow.sample(y=[0, 1], guidance=1.0, generator=seeded()), expected)


def test_sampling_works_in_inference_mode():
    flow = random_flow(torch.float32)
    with torch.inference_mode():
        assert flow.sample(2).shape == flow.sample(y=np.array([0, 1])).shape == (2, 2, 6, 6)
