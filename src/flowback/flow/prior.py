"""A prior fitted to z: what a flow maps noised images to is not quite N(0, I), and samples are better from what it is.

For each class, and for no label, z is normal around a mean. Its covariance is diagonal up to directions U that all classes
share, and a few directions V of each class alone:

    z = mean + scale * S(U, shared) S(V, own) noise        S(U, s) = I + U (sqrt(1 + s) - 1) U^T,  noise ~ N(0, I)

with orthonormal columns in U and in V. So an image is a function of its noise as under the standard prior, in which
`mean = 0, scale = 1, shared = own = 0`. `flowback.tasks.prior` fits it.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowback.core.errors import InputError
from flowback.core.files import save_tensors
from flowback.core.units import LOG_2PI

FILE, FORMAT = "prior.safetensors", "1"
PRIORS = ("standard", "fitted")


class FittedPrior(nn.Module):
    """A normal distribution of z for each class. Its buffers move with the flow and are no part of its `state_dict`.

    Labels are class weights `[B, K]`, as the flow has them: weights that mix classes count as the largest of them, equal
    ones as no label.

    Args:
        mean: of each class, and at last for no label, `[K + 1, N, D]`; K is 0 for an unconditional flow.
        scale: standard deviation of each number but for the directions, `[N, D]`.
        basis: the directions of all, orthonormal columns `[N * D, r]`.
        shared: what the variance along each is more than 1, in units of the scale, `[r]`; above -1.
        own_basis: the directions of each class, `[K + 1, N * D, q]`.
        own: the same of these, `[K + 1, q]`.
        weights: fingerprint of the flow's weights that it was fitted to (`flowback.flow.io.fingerprint`).
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor
    shared: Tensor
    own_basis: Tensor
    own: Tensor

    def __init__(
        self,
        mean: Tensor,
        scale: Tensor,
        basis: Tensor,
        shared: Tensor,
        own_basis: Tensor,
        own: Tensor,
        weights: str = "",
    ) -> None:
        super().__init__()
        self.weights = weights
        tensors = {"mean": mean, "scale": scale, "basis": basis, "shared": shared, "own_basis": own_basis, "own": own}
        for name, value in tensors.items():
            self.register_buffer(name, value, persistent=False)

    def to_z(self, noise: Tensor, classes: Tensor | None, temperature: float = 1.0) -> Tensor:
        """Standard normal `noise [B, ..., N, D]`, any number of draws for each image, as z.

        `temperature` multiplies the deviation from the mean.
        """
        k, x = self._component(classes, noise), noise.reshape(len(noise), -1, self.scale.numel())
        x = _stretched(x, self.own_basis.to(x)[k], self.own.to(x)[k, None].add(1).sqrt())
        x = _stretched(x, self.basis.to(x), self.shared.to(x).add(1).sqrt())
        x = self.mean.to(x)[k].flatten(1)[:, None] + temperature * self.scale.to(x).flatten() * x
        return x.view_as(noise)

    def to_noise(self, z: Tensor, classes: Tensor | None, temperature: float = 1.0) -> Tensor:
        """The inverse of `to_z`."""
        k, x = self._component(classes, z), z.reshape(len(z), -1, self.scale.numel())
        x = (x - self.mean.to(x)[k].flatten(1)[:, None]) / (temperature * self.scale.to(x).flatten())
        x = _stretched(x, self.basis.to(x), self.shared.to(x).add(1).rsqrt())
        x = _stretched(x, self.own_basis.to(x)[k], self.own.to(x)[k, None].add(1).rsqrt())
        return x.view_as(z)

    def log_prob(self, z: Tensor, classes: Tensor | None) -> Tensor:
        """Log-density of `z [B, N, D]`, nats, `[B]`."""
        squares = self.to_noise(z, classes).square().sum(dim=(1, 2))
        own = 0.5 * self.own.to(z).log1p().sum(dim=1)[self._component(classes, z)]
        log_det = self.scale.to(z).log().sum() + 0.5 * self.shared.to(z).log1p().sum() + own
        return -0.5 * (squares + self.scale.numel() * LOG_2PI) - log_det

    def _component(self, classes: Tensor | None, like: Tensor) -> Tensor:
        """The number of each image's distribution, `[B]`."""
        if classes is None:
            return torch.zeros(len(like), dtype=torch.long, device=like.device)
        unlabeled = (classes.amax(dim=1) - classes.amin(dim=1) < 1e-6) & (classes.shape[1] > 1)
        return torch.where(unlabeled, classes.shape[1], classes.argmax(dim=1))

    def save(self, folder: Path) -> None:
        """Write `prior.safetensors`."""
        tensors = {name: value.float().cpu() for name, value in self.named_buffers()}
        save_tensors(tensors, folder / FILE, {"format": FORMAT, "weights": self.weights})

    @classmethod
    def load(cls, folder: Path, token_shape: tuple[int, int], num_classes: int, weights: str) -> "FittedPrior":
        """Read `prior.safetensors`, of a flow with these shapes and this fingerprint of its weights.

        Raises:
            InputError: if it is something else, or of other weights.
        """
        try:
            with safe_open(folder / FILE, "pt") as file:
                facts = file.metadata() or {}
                if facts.get("format") != FORMAT:
                    raise ValueError(f"it is not of format {FORMAT}")
                if facts.get("weights") != weights:
                    raise ValueError("it was fitted to other weights")
                prior = cls(**{name: file.get_tensor(name) for name in file.keys()}, weights=weights)  # noqa: SIM118
            (N, D), K = token_shape, num_classes + 1
            r, q = prior.shared.shape[-1], prior.own.shape[-1]
            shapes = {"mean": (K, N, D), "scale": (N, D), "basis": (N * D, r), "shared": (r,)}
            shapes |= {"own_basis": (K, N * D, q), "own": (K, q)}
            for name, value in prior.named_buffers():
                if value.shape != shapes[name] or not value.isfinite().all():
                    raise ValueError(f"{name} must be finite numbers {list(shapes[name])}, got {list(value.shape)}")
            if not all((variance > 0).all() for variance in (prior.scale, 1 + prior.shared, 1 + prior.own)):
                raise ValueError("it has variances that are not above 0")
            return prior
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(
                f"{folder / FILE} cannot be used ({error}); delete it, or run `flowback fit-prior` again"
            ) from error


def _stretched(x: Tensor, basis: Tensor, factors: Tensor) -> Tensor:
    """`x [B, R, n]`, along each column of `basis [(B,) n, r]` times a factor `[(B, 1,) r]`."""
    return x + ((x @ basis) * (factors - 1)) @ basis.mT
