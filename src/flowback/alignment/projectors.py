"""The map from a flow's hidden states to the encoder's feature space."""

import torch
from torch import Tensor, nn


class Projector(nn.Sequential):
    """Three linear layers with SiLU between them: `[..., in_dim] -> [..., out_dim]`, token by token.

    That of REPA (arXiv 2410.06940, section 3).
    """

    def __init__(self, in_dim: int, out_dim: int, hidden: int = 1024) -> None:
        super().__init__(
            nn.Linear(in_dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out_dim)
        )


class ConvProjector(nn.Conv2d):
    """One 3x3 convolution over the grid of tokens, zeros around it: `[..., N, in_dim] -> [..., N, out_dim]`.

    That of iREPA (arXiv 2512.10794, section 4), which keeps where things are better than an MLP on single tokens does.
    """

    def __init__(self, in_dim: int, out_dim: int, grid: tuple[int, int]) -> None:
        super().__init__(in_dim, out_dim, kernel_size=3, padding=1)
        self.grid = grid

    def forward(self, input: Tensor) -> Tensor:
        """Tokens in raster order, `[..., N, in_dim] -> [..., N, out_dim]`."""
        maps = super().forward(input.flatten(0, -3).transpose(1, 2).unflatten(2, self.grid))
        return maps.flatten(2).transpose(1, 2).unflatten(0, input.shape[:-2])


class Separate(nn.ModuleList):
    """A projector for each of the aligned pairs: `[pairs, B, N, in_dim] -> [pairs, B, N, out_dim]`."""

    def forward(self, input: Tensor) -> Tensor:
        """The hidden states of each pair by its own projector."""
        return torch.stack([projector(h) for projector, h in zip(self, input, strict=True)])
