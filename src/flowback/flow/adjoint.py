"""The adjoint of a block's decoder: gradients along the generative pass, without decoding anything.

Decoding is `x^(t-1) = mu_t(x^(t-1)) + exp(a_t(x^(t-1))) x^t`, a fixed point in `x^(t-1)` whose Jacobian J is strictly lower
triangular. The cotangent g of its solution therefore turns into

    u = (I - J^T)^-1 g = g + J^T g + (J^T)^2 g + ...          (docs/method.md, eq. 4; at most N terms)

which gives `mu_t` the cotangent u, `a_t` the cotangent `u (x^(t-1) - mu_t)`, and `x^t` the cotangent `u exp(a_t)`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def restricted_grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Vector-Jacobian products restricted to `inputs`: no weight gradients are computed, and the graph is kept.

    Autocast is off, as it is in `loss.backward()`: a product has the precision of the forward operation it belongs to.
    """
    with torch.autocast(outputs[0].device.type, enabled=False):
        return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, materialize_grads=True)


def solve_adjoint(g: Tensor, x_in: Tensor, mu: Tensor, a: Tensor, terms: int, tolerance: float) -> tuple[Tensor, int]:
    """`u = g + J^T g + … + (J^T)^terms g`, and the number of terms after the first that were taken.

    Args:
        g: cotangent of the block's input as the decoder's solution, `[B, N, D]`.
        x_in: the block's input, a leaf of the graph of `mu` and `a`.
        mu: what the block predicts for it, `[B, N, D]`.
        a: likewise.
        terms: how many to take at most; N - 1 for all.
        tolerance: the series of an image ends early where a term is smaller than this share of the sum.
    """
    scale = (x_in - mu).detach()  # d(exp(a) x^t + mu)/da = x^t exp(a) = x^(t-1) - mu
    u, term = g, g
    for k in range(terms):
        if tolerance:  # for each image by itself; one that is not finite ends
            open_ended = term.norm(dim=(1, 2)) > tolerance * u.norm(dim=(1, 2))
            if not open_ended.any():
                return u, k
            term = torch.where(open_ended[:, None, None], term, 0)
        (term,) = restricted_grad((mu, a), (x_in,), (term, term * scale))
        u = u + term
    return u, terms
