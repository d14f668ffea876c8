"""Grids of features to images: sizes, places, and that real images can be learned."""

import pytest
import torch
from torch.nn.functional import pixel_unshuffle

from builders import gradients
from flowback.latents.decoders import DECODERS


@pytest.mark.parametrize("patch", [1, 2, 3, 4, 6, 14, 16])
@pytest.mark.parametrize("kind", DECODERS)
def test_any_patch_and_grid_gives_its_image_and_gradients_reach_all(kind, patch):
    decoder = DECODERS[kind](dim=5, channels=3, grid=(2, 3), patch=patch, width=32, layers=1)
    images = decoder(torch.randn(2, 6, 5))
    assert images.shape == (2, 3, 2 * patch, 3 * patch)
    (images - torch.randn_like(images)).square().mean().backward()
    idle = {name for name, gradient in gradients(decoder).items() if not gradient.abs().max() > 0}
    assert all("convs.0" in name or "norms" in name for name in idle)  # behind weights that begin with zero


def test_finer_grids_have_fewer_channels_and_no_less_than_the_least():
    decoder = DECODERS["conv"](dim=5, channels=1, grid=(1, 1), patch=8, width=96, layers=1)
    widths = [stage.convs[0].out_channels for stage in decoder.stages if hasattr(stage, "convs")]
    assert widths == [96, 48, 32, 32]


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("kind", DECODERS)
def test_every_feature_is_drawn_where_it_belongs(digits, kind, width):
    """A digit's own pixels, 2x2 a feature, are learned back within seconds."""
    x = digits[0][..., -width:]
    features = pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
    decoder = DECODERS[kind](dim=4, channels=1, grid=(4, width // 2), patch=2, width=32, layers=1)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(120):
        some = torch.randint(1500, (64,))
        loss = (decoder(features[some]) - x[some]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (decoder(features[1500:]) - x[1500:]).square().mean() < 0.05 * x.var()
