"""The map from a flow's hidden states to the encoder's feature space (REPA, arXiv 2410.06940, section 3)."""

from torch import nn


class Projector(nn.Sequential):
    """Three linear layers with SiLU between them: `[..., in_dim] -> [..., out_dim]`, token by token."""

    def __init__(self, in_dim: int, out_dim: int, hidden: int = 1024) -> None:
        super().__init__(
            nn.Linear(in_dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out_dim)
        )
