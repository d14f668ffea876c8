"""Density and accuracy of a flow on clean, labelled images."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowback.core.devices import put
from flowback.core.seeds import keyed_generator
from flowback.core.units import bits_per_dim, from_levels, nats_per_dim, nats_to_bits
from flowback.data.splits import Split
from flowback.flow.tarflow import TarFlow
from flowback.latents import Flow


def seen(flow: Flow, split: Split, indices: Sequence[int], levels: int, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Images of a split as the flow sees them, clean, `[B, *data_shape]`, and their labels; no more pixels than a batch.

    The images are where the flow is, the labels on the CPU.
    """
    generator = keyed_generator(0)  # independent of the noise that is added later
    parts = []
    for start in range(0, len(indices), batch_size):
        pixels, _ = split[indices[start : start + batch_size]]
        parts.append(flow.to_data(from_levels(put(pixels, flow.device), levels), generator))
    return torch.cat(parts), split.labels[torch.as_tensor(indices)]


@torch.no_grad()
def density(
    flow: TarFlow, x: Tensor, y: Tensor, latents: bool = False, seed: int = 0, batch_size: int = 256
) -> dict[str, float]:
    """How well the flow predicts clean data `x [B, *data_shape]` with labels `y [B]`; smaller is better.

    `latents` says whether x are latents, which have no bits of pixels.

    Returns:
        The means of `densities`; a flow in latents has also "latent_bits_per_dim", its nats in bits, which say nothing of
        pixels and compare only in the same latents with the same noise.
    """
    means = {name: float(values.mean()) for name, values in densities(flow, x, y, latents, seed, batch_size).items()}
    return means | ({"latent_bits_per_dim": nats_to_bits(means["nats_per_dim"])} if latents else {})


@torch.no_grad()
def densities(
    flow: TarFlow,
    x: Tensor,
    y: Tensor,
    latents: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    own: slice = slice(None),
) -> dict[str, Tensor]:
    """The densities of single images, `[B]`; arguments as in `density`.

    Processes that share the work each measure their `own` images of every batch; the noise does not depend on that.

    Returns:
        "nats_per_dim": of data with the noise of training, pixels on the [-1, 1] scale or scaled latents: the density
        that was trained.
        "bits_per_dim": of the discrete pixels, an upper bound by uniform dequantization, which holds whatever noise
        was trained with; one draw an image. Not of latents.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = y if flow.num_classes else torch.full_like(y, -1)
    found: dict[str, list[Tensor]] = {"nats_per_dim": []} if latents else {"nats_per_dim": [], "bits_per_dim": []}
    for part, label in zip(x.split(batch_size), labels.split(batch_size), strict=True):
        noisy = flow.perturb(part, generator)[own]
        found["nats_per_dim"].append(nats_per_dim(flow.log_prob(noisy, label[own]), flow.dims))
        if not latents:
            whole = flow.dequantize(part, generator)[own]
            found["bits_per_dim"].append(bits_per_dim(flow.log_prob(whole, label[own]), flow.dims, flow.levels))
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def importance_weighted_bits(
    flow: TarFlow, x: Tensor, y: Tensor, draws: int = 16, seed: int = 0, batch_size: int = 256
) -> float:
    """A tighter upper bound of the bits per dimension of discrete pixels (arXiv 1509.00519, for uniform dequantization).

    `-log2 mean_s p(x + u_s)` over `draws` uniform draws, instead of the mean of the logarithms; one draw gives the usual
    bound, and more come down to the model's own bits.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = y if flow.num_classes else torch.full_like(y, -1)
    bits = []
    for part, label in zip(x.split(batch_size), labels.split(batch_size), strict=True):
        log_probs = torch.stack([flow.log_prob(flow.dequantize(part, generator), label) for _ in range(draws)])
        bits.append(bits_per_dim(log_probs.logsumexp(dim=0) - math.log(draws), flow.dims, flow.levels))
    return float(torch.cat(bits).mean())


def confusion(predicted: Tensor, y: Tensor, classes: int) -> Tensor:
    """Counts `[K, K]`: row the true class, column the predicted one."""
    flat = y.cpu() * classes + predicted.cpu()
    return torch.bincount(flat, minlength=classes * classes).view(classes, classes)
