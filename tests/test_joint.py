"""Autoencoders that are trained together with the flow in their latents."""

import pytest
import torch

from flowback import InputError
from flowback.latents.joint import ConvDecoder, ConvEncoder, JointConfig, hide, signal, signal_figures


@pytest.mark.parametrize(("downsample", "size"), [(2, (6, 4)), (4, (8, 8)), (6, (12, 18)), (14, (28, 14))])
def test_images_become_a_grid_of_latents_and_images_again(downsample, size):
    config = JointConfig(channels=3, downsample=downsample, width=8)
    encoder, decoder = ConvEncoder(config, 2), ConvDecoder(config, 2)
    images = torch.rand(2, 2, *size) * 2 - 1
    latents = encoder(images)
    assert latents.shape == (2, 3, size[0] // downsample, size[1] // downsample)
    assert decoder(latents).shape == images.shape


def test_after_one_step_every_weight_has_a_gradient(digits):
    """At the start the residual blocks add nothing, and their inner weights have none."""
    config = JointConfig(channels=4, width=8)
    model = torch.nn.Sequential(ConvEncoder(config, 1), ConvDecoder(config, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(digits[0][:16]) - digits[0][:16]).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_share_of_the_patches_is_hidden_and_the_rest_is_left(digits):
    images, value = digits[0][:5], torch.tensor(7.0).view(1, 1, 1)
    noise = torch.rand(5, 4, 4)
    shown = hide(images, value, noise, 0.4)
    hidden = (shown == 7).unflatten(3, (4, 2)).unflatten(2, (4, 2))  # patches of 2x2 pixels
    assert (hidden.float().mean((1, 3, 5)).sum((1, 2)) == 6).all()  # 0.4 of 16, rounded down
    assert torch.equal(shown[shown != 7], images[shown != 7])
    assert torch.equal(hidden[:, 0, :, 0, :, 0], noise < noise.flatten(1).sort().values[:, 6, None, None])
    assert torch.equal(hide(images, value, noise, 0.0), images)


def test_patches_at_an_edge_may_be_cut(digits):
    shown = hide(digits[0][:2, :, :, :6], torch.zeros(1, 1, 1), torch.rand(2, 2, 2), 0.5)  # patches of 4x4 pixels
    assert shown.shape == (2, 1, 8, 6)
    assert ((shown == 0).all(1).unflatten(1, (2, 4)).all(2)[..., [0, 4]].sum((1, 2)) == 2).all()


def test_the_signal_of_a_channel_is_what_differs_between_images():
    torch.manual_seed(0)
    between = torch.tensor([2.0, 0.5, 0.0, 0.01])[:, None, None] * torch.randn(4096, 4, 2, 3)
    pattern = 5 * torch.randn(4, 2, 3)  # the same in all images
    found = signal(between + pattern, 0.5)
    assert torch.allclose(found, torch.tensor([4.0, 1.0, 0.0, 0.02]), rtol=0.02, atol=1e-5)
    config = JointConfig(channels=4, noise_std=0.5, dead_below=0.1, most_dead=0.4)
    figures = signal_figures(between + pattern, config)
    assert figures["dead_channels"] == 0.5
    assert figures["least_signal"] < 1e-5
    assert config.collapsed(float(figures["dead_channels"]))
    assert not config.collapsed(float(signal_figures(between[:, :2], config)["dead_channels"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channels": 0}, "joint.channels must be a whole number of at least 1, got 0"),
        ({"downsample": 1}, "joint.downsample must be a whole number of at least 2, got 1"),
        ({"noise_std": 0.0}, "joint.noise_std must be above 0, got 0.0"),
        ({"nll_weight": -1.0}, "joint.nll_weight must be at least 0, got -1.0"),
        ({"mask": 1.0}, "joint.mask must be a share from 0 to 1, 1 excluded, got 1.0"),
        ({"most_dead": 2.0}, "joint.most_dead must be a share from 0 to 1, got 2.0"),
    ],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(InputError) as caught:
        JointConfig(**options)
    assert str(caught.value) == said
