import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import images, labels, random_flow
from flowback import InputError
from flowback.core.units import LOG_2PI, bin_width, bits_per_dim, from_levels, nats_per_dim, nll_per_dim, to_levels

LEVELS = st.one_of(st.sampled_from([2, 16, 17, 256, 65536]), st.integers(2, 4096))


@given(levels=LEVELS)
def test_levels_round_trip(levels):
    v = torch.arange(levels)
    x = from_levels(v, levels)
    assert x.is_floating_point()
    assert torch.equal(to_levels(x, levels), v)


@given(levels=st.integers(2, 1024), share=st.floats(-0.49, 0.49))
def test_whole_bin_belongs_to_its_level(levels, share):
    v = torch.arange(levels)
    x = from_levels(v, levels) + share * bin_width(levels)
    assert torch.equal(to_levels(x, levels), v)


@given(levels=LEVELS)
def test_bins_tile_the_interval(levels):
    x = from_levels(torch.arange(levels), levels).double()
    half = bin_width(levels) / 2
    assert x[0] - half == pytest.approx(-1, abs=1e-6)
    assert x[-1] + half == pytest.approx(1, abs=1e-6)
    assert torch.allclose(x.diff(), torch.full((levels - 1,), 2 * half, dtype=torch.float64), atol=2e-7)


def test_values_outside_go_to_the_nearest_bin():
    x = torch.tensor([-7.0, -1.001, 1.0, 1.2])
    assert to_levels(x, 17).tolist() == [0, 0, 16, 16]


def test_default_is_eight_bits():
    assert to_levels(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0, 128, 255]
    assert from_levels(torch.tensor([0, 255])).tolist() == pytest.approx([-255 / 256, 255 / 256])


@given(levels=LEVELS, dims=st.integers(1, 12288))
def test_uniform_density_costs_log2_levels_bits(levels, dims):
    log_prob = torch.tensor([-dims * math.log(2)], dtype=torch.float64)  # density 1/2 per dimension on [-1, 1]
    assert bits_per_dim(log_prob, dims, levels).item() == pytest.approx(math.log2(levels), rel=1e-12)


def test_scaling_constant_of_eight_bits_is_seven():
    log_prob = torch.tensor([0.0, -123.0], dtype=torch.float64)
    bits = bits_per_dim(log_prob, dims=100, levels=256)
    assert bits[0].item() == pytest.approx(math.log2(128), abs=1e-12)
    assert bits[1].item() == pytest.approx(7 + 1.23 / math.log(2), abs=1e-12)


@pytest.mark.parametrize(("levels", "std"), [(256, 0.2), (64, 0.1), (17, 0.15)])
def test_bits_bound_the_entropy_of_discretised_gaussian_pixels(levels, std):
    # a pixel whose bin has the Gaussian's mass needs so many bits, counted in pixel values and without any density
    edges = torch.linspace(-1, 1, levels + 1, dtype=torch.float64)
    mass = (0.5 * (1 + torch.erf(edges / (std * math.sqrt(2))))).diff()
    mass = mass / mass.sum()
    entropy = -(mass * mass.clamp(min=1e-300).log2()).sum().item()
    # the same Gaussian as a density on [-1, 1], under uniform dequantization
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000 - 0.5
    x = from_levels(torch.arange(levels), levels).double()[:, None] + u * bin_width(levels)
    log_prob = -0.5 * (x / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    bits = (mass * bits_per_dim(log_prob, 1, levels).mean(dim=1)).sum().item()
    assert entropy - 1e-6 <= bits <= entropy + 0.1
    if levels == 256:
        assert bits == pytest.approx(entropy, abs=1e-3)


def test_standard_normal_prior_bits():
    entropy = 0.5 * math.log(2 * math.pi * math.e)  # nats per dimension; in units of a pixel value the std is 128
    expected = 0.5 * math.log2(2 * math.pi * math.e * 128**2)
    assert bits_per_dim(torch.tensor(-48 * entropy), 48, 256).item() == pytest.approx(expected, rel=1e-6)


def test_training_loss_is_nats_per_dim_without_the_prior_constant():
    flow = random_flow()
    x, y = images(flow), labels(flow)
    z, log_det = flow.encode(x, y)
    nats = nats_per_dim(flow.log_prob(x, y), flow.dims).mean()
    assert nll_per_dim(z, log_det).item() == pytest.approx((nats - LOG_2PI / 2).item(), abs=1e-12)


def test_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)
