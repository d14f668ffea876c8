"""Images to tokens and back: a permutation of the numbers, so it changes no volume."""

from torch import Tensor


def patchify(x: Tensor, patch: int) -> Tensor:
    """Images `[B, C, H, W]` to tokens `[B, (H/p)(W/p), C p^2]` in raster order."""
    B, C, H, W = x.shape
    x = x.view(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // patch) * (W // patch), C * patch * patch)


def unpatchify(tokens: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Tokens `[B, N, C p^2]` in raster order to images `[B, C, H, W]` of `size`, (H, W)."""
    B, _, D = tokens.shape
    rows, columns, C = size[0] // patch, size[1] // patch, D // (patch * patch)
    tokens = tokens.view(B, rows, columns, C, patch, patch)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(B, C, *size)
