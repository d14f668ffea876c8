"""Density and accuracy of a flow on clean, labelled images."""

import torch
from torch import Tensor

from flowback.classify import RULES, classify
from flowback.flows import TarFlow
from flowback.units import bits_per_dim, nats_per_dim


@torch.no_grad()
def density(flow: TarFlow, x: Tensor, y: Tensor, seed: int = 0, batch_size: int = 256) -> dict[str, float]:
    """How well the flow predicts images `x [B, C, H, W]` with labels `y [B]`; smaller is better.

    Returns:
        "nats_per_dim": of images with the noise of training, on the [-1, 1] scale, the density that was trained.
        "bits_per_dim": of the discrete pixels, an upper bound by uniform dequantisation, which holds whatever noise
        was trained with; one draw an image.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = y.to(x.device) if flow.num_classes else torch.full_like(y, -1, device=x.device)
    nats, bits = [], []
    for part, label in zip(x.split(batch_size), labels.split(batch_size), strict=True):
        nats.append(nats_per_dim(flow.log_prob(flow.perturb(part, generator), label), flow.dims))
        bits.append(bits_per_dim(flow.log_prob(flow.dequantise(part, generator), label), flow.dims, flow.levels))
    return {"nats_per_dim": float(torch.cat(nats).mean()), "bits_per_dim": float(torch.cat(bits).mean())}


def accuracies(flow: TarFlow, x: Tensor, y: Tensor, draws: int = 1) -> dict[str, float]:
    """Share of images whose label scores highest, for every classification rule, by its name."""
    return {rule: float((predict(flow, x, rule, draws) == y.to(x.device)).float().mean()) for rule in RULES}


def predict(flow: TarFlow, x: Tensor, rule: str, draws: int = 1) -> Tensor:
    """The likeliest class of each image, `[B]`."""
    return classify(flow, x, rule=rule, draws=draws).argmax(dim=1)


def confusion(predicted: Tensor, y: Tensor, classes: int) -> Tensor:
    """Counts `[K, K]`: row the true class, column the predicted one."""
    flat = y.cpu() * classes + predicted.cpu()
    return torch.bincount(flat, minlength=classes * classes).view(classes, classes)
