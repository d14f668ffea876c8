"""A prior fitted to z: what a flow maps noised images to is not quite N(0, I), and samples are better from what it is.

For each class, and for no label, z is normal around a mean, with a covariance that is diagonal up to a few directions that
all classes share:

    z = mean + scale * (I + U (sqrt(1 + spectrum) - 1) U^T) noise        U^T U = I, noise ~ N(0, I)

So an image is a function of its noise as under the standard prior, which is `mean = 0, scale = 1, spectrum = 0`. How it is
fitted is in `flowback.tasks.prior`.
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

    Args:
        mean: of each class, the last one for no label, `[K + 1, N, D]`; K is 0 for an unconditional flow.
        scale: standard deviation of each number but for the directions, `[N, D]`.
        basis: the directions U, orthonormal columns `[N * D, r]`.
        spectrum: what the variance along each direction is more than 1, in units of the scale, `[K + 1, r]`; above -1.
        weights: fingerprint of the flow's weights that it was fitted to (`flowback.flow.io.fingerprint`).
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor
    spectrum: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, basis: Tensor, spectrum: Tensor, weights: str = "") -> None:
        super().__init__()
        self.weights = weights
        for name, value in (("mean", mean), ("scale", scale), ("basis", basis), ("spectrum", spectrum)):
            self.register_buffer(name, value, persistent=False)

    def to_z(self, noise: Tensor, classes: Tensor | None, temperature: float = 1.0) -> Tensor:
        """Standard normal `noise [B, ..., N, D]` as z; `temperature` multiplies its deviation from the mean.

        Args:
            noise: for each image any number of draws.
            classes: class weights `[B, K]`. Weights that mix classes mix their means and spectra; equal ones are no label.
            temperature: of the deviation.
        """
        mean, spectrum = self._of(classes, noise)
        turned = self._stretched(noise.flatten(-2), spectrum.add(1).sqrt() - 1).view_as(noise)
        return mean + temperature * self.scale.to(noise) * turned

    def to_noise(self, z: Tensor, classes: Tensor | None, temperature: float = 1.0) -> Tensor:
        """The inverse of `to_z`."""
        mean, spectrum = self._of(classes, z)
        noise = (z - mean) / (temperature * self.scale.to(z))
        return self._stretched(noise.flatten(-2), spectrum.add(1).rsqrt() - 1).view_as(z)

    def log_prob(self, z: Tensor, classes: Tensor | None) -> Tensor:
        """Log-density of `z [B, N, D]`, nats, `[B]`; `classes` as in `to_z`."""
        _, spectrum = self._of(classes, z)
        squares = self.to_noise(z, classes).square().sum(dim=(1, 2))
        log_det = self.scale.to(z).log().sum() + 0.5 * spectrum.log1p().sum(dim=-1)
        return -0.5 * (squares + self.scale.numel() * LOG_2PI) - log_det

    def _of(self, classes: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """The means `[B, ..., N, D]` and the spectra `[B, ..., r]` of images, to go with `like [B, ..., N, D]`."""
        own = torch.ones(len(like), 1).to(like)
        if classes is not None:
            unlabeled = (classes.amax(1, True) - classes.amin(1, True) < 1e-6) & (classes.shape[1] > 1)
            own = torch.cat([torch.where(unlabeled, 0, classes), unlabeled.to(classes.dtype)], dim=1).to(like)
        draws = [1] * (like.dim() - 3)
        mean = (own @ self.mean.to(like).flatten(1)).view(len(like), *draws, *self.scale.shape)
        return mean, (own @ self.spectrum.to(like)).view(len(like), *draws, -1)

    def _stretched(self, x: Tensor, factors: Tensor) -> Tensor:
        """`x [B, ..., N D]`, longer by a factor `[B, ..., r]` along each direction."""
        basis = self.basis.to(x)
        return x + ((x @ basis) * factors) @ basis.T

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
            (N, D), K, r = token_shape, num_classes + 1, prior.basis.shape[-1]
            shapes = {"mean": (K, N, D), "scale": (N, D), "basis": (N * D, r), "spectrum": (K, r)}
            for name, value in prior.named_buffers():
                if value.shape != shapes[name] or not value.isfinite().all():
                    raise ValueError(f"{name} must be finite numbers {list(shapes[name])}, got {list(value.shape)}")
            if min(prior.scale.min(), 1 + prior.spectrum.amin() if r else 1) <= 0:
                raise ValueError("it has variances that are not above 0")
            return prior
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(
                f"{folder / FILE} cannot be used ({error}); delete it, or run `flowback fit-prior` again"
            ) from error
