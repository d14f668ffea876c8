"""Pixel decoders: a grid of features to an image.

- **transformer**: the layers of a ViT, a linear map to patches of pixels (as RAE's, arXiv 2510.11690), and a small
  convolution over the seams between patches.
- **conv**: residual convolutions, the grid refined by 2 at a time (as the decoders of latent diffusion, arXiv 2112.10752).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from flowback.latents.compressors import Transformer

GROUPS = 8  # of group norms
LEAST_WIDTH = 32  # of convolutions on fine grids


class TransformerDecoder(nn.Module):
    """Features `[B, P, dim]` of a `grid` to images `[B, channels, rows * patch, columns * patch]`.

    Args:
        dim: size of a feature.
        channels: of the images.
        grid: rows and columns of features.
        patch: image pixels per feature, along a side.
        width: of the transformer.
        layers: of the transformer.
    """

    def __init__(self, dim: int, channels: int, grid: tuple[int, int], patch: int, width: int, layers: int) -> None:
        super().__init__()
        self.grid = grid
        self.transformer = Transformer(dim, channels * patch**2, grid[0] * grid[1], width, layers)
        self.to_pixels = nn.PixelShuffle(patch)
        self.seams = nn.Sequential(
            nn.Conv2d(channels, LEAST_WIDTH, 3, padding=1), nn.SiLU(), nn.Conv2d(LEAST_WIDTH, channels, 3, padding=1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """`[B, P, dim] -> [B, channels, H, W]`."""
        image = self.to_pixels(self.transformer(features).transpose(1, 2).unflatten(2, self.grid))
        return image + self.seams(image)


class Residual(nn.Module):
    """Two 3x3 convolutions, each after a group norm and SiLU, added to their input: `[B, width, h, w]`, the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, width) for _ in range(2))
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        nn.init.zeros_(convs[1].weight)  # the identity, to begin with
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, width, h, w] -> [B, width, h, w]`."""
        h = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(F.silu(norm(h)))
        return x + h


class ConvDecoder(nn.Module):
    """Features `[B, P, dim]` of a `grid` to images; arguments as of `TransformerDecoder`.

    `width` is that on the grid; each finer one has half of it, and at least 32. On each there are `layers` residual blocks.
    """

    def __init__(self, dim: int, channels: int, grid: tuple[int, int], patch: int, width: int, layers: int) -> None:
        super().__init__()
        self.grid = grid
        stages: list[nn.Module] = [nn.Conv2d(dim, width, 3, padding=1), *(Residual(width) for _ in range(layers))]
        for factor in factors(patch):
            finer = max(width // 2, LEAST_WIDTH)
            if factor == 2:
                stages += [nn.Upsample(scale_factor=2), nn.Conv2d(width, finer, 3, padding=1)]
            else:
                stages += [nn.Conv2d(width, finer * factor**2, 1), nn.PixelShuffle(factor)]
            stages += [Residual(finer) for _ in range(layers)]
            width = finer
        self.stages = nn.Sequential(*stages)
        self.leave = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        """`[B, P, dim] -> [B, channels, H, W]`."""
        return self.leave(self.stages(features.transpose(1, 2).unflatten(2, self.grid)))


def factors(patch: int) -> list[int]:
    """By what a grid is refined to get from features to pixels: twos, then what is left.

    >>> factors(16), factors(14), factors(1)
    ([2, 2, 2, 2], [2, 7], [])
    """
    twos = (patch & -patch).bit_length() - 1
    return [2] * twos + [patch >> twos] * (patch >> twos > 1)


DECODERS = {"transformer": TransformerDecoder, "conv": ConvDecoder}
