"""Training-free classification: the flow's own likelihood names the class (arXiv 2511.22345, section 3.4).

Every rule maps noised images `[B, C, H, W]` to scores `[B, K]`, larger is likelier. An accuracy is only comparable under
the name of its rule.
"""

import torch
from torch import Tensor

from flowback.errors import InputError
from flowback.flows.tarflow import TarFlow


def single_gradient(flow: TarFlow, x: Tensor) -> Tensor:
    """One gradient for all classes: `d log p(x | softmax(lam)) / d lam` at `lam = 0`, where all weights are 1/K.

    One forward and one backward pass per image, whatever K is.
    """
    with torch.enable_grad():
        lam = x.new_zeros(len(x), flow.num_classes, requires_grad=True)
        log_prob = flow.log_prob(x, lam.softmax(dim=1))
        (scores,) = torch.autograd.grad(log_prob.sum(), lam)
    return scores


@torch.no_grad()
def exact(flow: TarFlow, x: Tensor) -> Tensor:
    """The K conditional log-likelihoods `log p(x | k)`, nats; K forward passes per image, run as one batch."""
    K = flow.num_classes
    y = torch.arange(K, device=x.device).repeat(len(x))
    return flow.log_prob(x.repeat_interleave(K, dim=0), y).view(len(x), K)


RULES = {"single_gradient": single_gradient, "exact": exact}


def classify(
    flow: TarFlow, x: Tensor, rule: str = "single_gradient", draws: int = 1, batch_size: int = 256, seed: int = 0
) -> Tensor:
    """Score clean images under every class.

    Args:
        flow: a class-conditional flow.
        x: clean images `[B, C, H, W]` in [-1, 1]; the noise of training is added here, from `seed`.
        rule: a key of `RULES`.
        draws: noise draws whose scores are averaged.
        batch_size: rows that the flow sees at once; bounds the memory.
        seed: of the noise.

    Returns:
        Scores `[B, K]`, larger is likelier.

    Raises:
        InputError: if the flow is unconditional, the rule does not exist, or there are no draws.
    """
    if not flow.num_classes:
        raise InputError("an unconditional flow cannot classify; allowed is a flow with num_classes of at least 1")
    if rule not in RULES:
        raise InputError(f"classification rule {rule!r} does not exist; allowed: {', '.join(RULES)}")
    for name, value in (("draws", draws), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} {value} is not usable; allowed is a whole number of at least 1")
    images = batch_size if rule != "exact" else max(1, batch_size // flow.num_classes)
    generator = torch.Generator().manual_seed(seed)
    scores = x.new_zeros(len(x), flow.num_classes)
    for _ in range(draws):
        noisy = flow.perturb(x, generator)
        scores += torch.cat([RULES[rule](flow, part) for part in noisy.split(images)])
    return scores / draws
