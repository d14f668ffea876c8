"""Features of a vision model to few channels and back, token by token or over the grid.

- **pca**: principal components, closed form; the way back is the transpose.
- **attention**: one self-attention layer and a linear map (FAE, arXiv 2512.07829), with a transformer back.
- **transformer**: a transformer each way (SRC-Flow, arXiv 2605.18267).

Latents have mean 0. Those of pca are divided by one number, so that the mean of their variances is 1 and distances keep
their proportions; the others end in a batch norm without weights. So noise on latents has a meaning while they are learned.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flowback.core.errors import InputError

HEAD_DIM = 64


def moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean `[F]` and covariance `[F, F]` (divided by n - 1) of features `[..., F]`, streamed, in float64.

    Raises:
        InputError: if there are fewer than two of them, or numbers that are not finite.
    """
    count, total, products, origin = 0, 0.0, 0.0, None
    for batch in batches:
        rows = batch.detach().flatten(0, -2).double()
        if origin is None:
            origin = rows.mean(dim=0)  # near the mean, so that what is subtracted below is small
        rows = rows - origin
        count, total, products = count + len(rows), total + rows.sum(dim=0), products + rows.T @ rows
    if origin is None or count < 2:
        raise InputError(f"a compressor must be fitted on at least 2 features, got {count}")
    shift: Any = total / count
    covariance: Any = (products - count * torch.outer(shift, shift)) / (count - 1)
    if not covariance.isfinite().all():
        raise InputError("the features that a compressor is fitted on must be finite, got others")
    return origin + shift, covariance


class Transformer(nn.Module):
    """A bidirectional pre-norm transformer over tokens `[B, P, inputs] -> [B, P, outputs]`, with learned positions.

    Args:
        inputs: size of a token that it reads.
        outputs: size of one that it writes.
        tokens: their number P.
        width: of the residual stream, a multiple of 32.
        layers: how many; timm's blocks of a ViT.
    """

    def __init__(self, inputs: int, outputs: int, tokens: int, width: int, layers: int) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        heads = width // (HEAD_DIM if width % HEAD_DIM == 0 else HEAD_DIM // 2)
        self.enter = nn.Linear(inputs, width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(layers)))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, P, inputs] -> [B, P, outputs]`."""
        return self.leave(self.layers(self.enter(x) + self.positions))


class SelfAttention(nn.Module):
    """One pre-norm self-attention layer, added to its input, and a linear map: `[B, P, inputs] -> [B, P, outputs]`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        from timm.layers.attention import Attention

        heads = -(-inputs // HEAD_DIM)
        self.norm = nn.LayerNorm(inputs)
        self.attention = Attention(inputs, heads, attn_head_dim=HEAD_DIM, qkv_bias=True)
        self.leave = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, P, inputs] -> [B, P, outputs]`."""
        return self.leave(x + self.attention(self.norm(x)))


class Compressor(nn.Module, ABC):
    """Features `[B, P, F]` to latents `[B, P, channels]`, and back.

    Args:
        dim: F.
        channels: of the latents.

    Raises:
        InputError: if there are more channels than features have.
    """

    mean: Tensor  # [F], of the features it was fitted on
    spread: Tensor  # their standard deviation, one number for all channels

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        if not 1 <= channels <= dim:
            raise InputError(f"channels must be from 1 to {dim}, those of the encoder's features, got {channels}")
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(()))

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Learn what has a closed form from features `[..., F]`, streamed.

        Raises:
            InputError: if there are too few of them, or numbers that are not finite.
        """
        mean, covariance = moments(batches)
        self.mean.copy_(mean)
        self.spread.copy_(covariance.diagonal().mean().sqrt())
        self._fit(covariance)

    def standardize(self, features: Tensor) -> Tensor:
        """Features with mean 0, divided by one number: what networks get to see."""
        return (features - self.mean) / self.spread

    def compress(self, features: Tensor) -> Tensor:
        """`[B, P, F] -> [B, P, channels]`."""
        return self._compress(self.standardize(features))

    def expand(self, latents: Tensor) -> Tensor:
        """`[B, P, channels] -> [B, P, F]`, the features that the latents stand for."""
        return self._expand(latents) * self.spread + self.mean

    def _fit(self, covariance: Tensor) -> None:
        """Learn more from the features' covariance `[F, F]`."""

    @abstractmethod
    def _compress(self, features: Tensor) -> Tensor: ...

    @abstractmethod
    def _expand(self, latents: Tensor) -> Tensor: ...


class PCA(Compressor):
    """The principal components of the features, divided by one number, so that the mean of their variances is 1."""

    components: Tensor  # [F, channels], orthonormal columns
    scale: Tensor  # a number

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__(dim, channels)
        self.register_buffer("components", torch.eye(dim, channels))
        self.register_buffer("scale", torch.ones(()))

    def _fit(self, covariance: Tensor) -> None:
        variances, vectors = torch.linalg.eigh(covariance)  # ascending
        variances, vectors = (part.flip(-1)[..., : self.components.shape[1]] for part in (variances, vectors))
        largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        self.components.copy_(vectors * largest.sign())  # as scikit-learn does, so that signs are no accident
        self.scale.copy_(variances.mean().sqrt() / self.spread)

    def _compress(self, features: Tensor) -> Tensor:
        return features @ self.components / self.scale

    def _expand(self, latents: Tensor) -> Tensor:
        return latents * self.scale @ self.components.T


class Learned(Compressor):
    """A network each way; the latents leave a batch norm without weights.

    Args:
        dim: F.
        channels: of the latents.
        there: maps `[B, P, F] -> [B, P, channels]`.
        back: maps `[B, P, channels] -> [B, P, F]`.
    """

    def __init__(self, dim: int, channels: int, there: nn.Module, back: nn.Module) -> None:
        super().__init__(dim, channels)
        self.there, self.back = there, back
        self.norm = nn.BatchNorm1d(channels, affine=False)

    def settle(self, batches: Iterable[Tensor]) -> None:
        """Give the latents of these features `[B, P, F]` mean 0 and variance 1 in eval mode."""
        latents, norm = torch.cat([self.there(self.standardize(part)).flatten(0, 1) for part in batches]), self.norm
        norm.running_mean, norm.running_var = latents.mean(dim=0), latents.var(dim=0)

    def _compress(self, features: Tensor) -> Tensor:
        latents = self.there(features)
        return self.norm(latents.flatten(0, 1)).view_as(latents)

    def _expand(self, latents: Tensor) -> Tensor:
        return self.back(latents)


COMPRESSORS = ("pca", "attention", "transformer")


def make_compressor(kind: str, dim: int, channels: int, tokens: int, width: int, layers: int) -> Compressor:
    """A compressor of `COMPRESSORS` for `tokens` features of size `dim`; `width` and `layers` are of its transformers.

    Raises:
        InputError: if there is no such kind, or the sizes are impossible.
    """
    if kind not in COMPRESSORS:
        raise InputError(f"compressor must be one of {', '.join(COMPRESSORS)}, got {kind!r}")
    if kind == "pca":
        return PCA(dim, channels)
    attends = kind == "attention"
    there = SelfAttention(dim, channels) if attends else Transformer(dim, channels, tokens, width, layers)
    return Learned(dim, channels, there, Transformer(channels, dim, tokens, width, layers))
