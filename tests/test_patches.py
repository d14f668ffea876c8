import torch
from hypothesis import given
from hypothesis import strategies as st

from flowback.flow.patches import patchify, unpatchify

SHAPES = {"side": st.integers(1, 4), "patch": st.integers(1, 3), "channels": st.integers(1, 3)}


@given(**SHAPES)
def test_round_trip_is_exact(side, patch, channels):
    x = torch.randn(2, channels, side * patch, side * patch)
    assert torch.equal(unpatchify(patchify(x, patch), patch, (side * patch, side * patch)), x)


@given(**SHAPES)
def test_token_is_its_patch_in_raster_order(side, patch, channels):
    x = torch.randn(2, channels, side * patch, side * patch)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, side * side, channels * patch * patch)
    for row in range(side):
        for column in range(side):
            part = x[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            assert torch.equal(tokens[:, row * side + column], part.flatten(1))
