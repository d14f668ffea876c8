"""Where the gradient of the alignment flows: forward, detach and the reverse family (arXiv 2511.22345, section 3).

A strategy encodes once and returns two scalars, `L_NF` and `L_align`, whose graphs put every gradient where it belongs;
the loss is `L_NF + weight * L_align`. The numbers of `h` are the same in all of them, only the way back differs.

**forward** leaves everything on the encode graph. The others cut that graph at the input of every block from the first
aligned one on ("isolated" blocks): there, what belongs to the likelihood and what belongs to the alignment is carried
past the cut by hand, as cotangents. `_carry` attaches them to the blocks' outputs, so that one backward pass makes
the weight gradients of both losses, and nothing is run forward twice.

*Likelihood*, from z down. With `c^T = dL_NF/dz`, each isolated block hands down `c^(t-1)`, the product of `(c^t,
dL_NF/dlog_det)` with its Jacobian restricted to the input, which needs no weight gradients.

*Alignment*, from the data up. A cotangent g of a block's input, as the decoder's solution, turns into one of its parameters
and one of its output (`flowback.flow.adjoint`), which block t + 1 takes for its own g; there the aligned layers add
theirs. **reverse** with `gradient` = cached keeps none of this (the published Algorithm 2, which equals **detach**),
one_step keeps the first term of the adjoint's series, k the first k + 1, exact all that are not negligible.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flowback.core.units import nll_per_dim
from flowback.flow.adjoint import restricted_grad, solve_adjoint
from flowback.flow.block import BlockOutput
from flowback.flow.decoding import CausalMap, Solver
from flowback.flow.guidance import Guidance
from flowback.flow.implicit import solve_with_gradient
from flowback.flow.tarflow import TarFlow

Pairs = list[tuple[int, int]]
AlignLoss = Callable[[dict[tuple[int, int], Tensor]], Tensor]

STRATEGIES = ("forward", "detach", "reverse")
GRADIENTS = ("cached", "one_step", "exact", "sequential")


def forward(
    flow: TarFlow, x: Tensor, y: Tensor | None, at: Pairs, align: AlignLoss, to_input: bool = True
) -> tuple[Tensor, Tensor]:
    """F-REPA: both losses on the encode graph; the alignment reaches blocks 1 … t, and x if `to_input`."""
    if to_input or not x.requires_grad:
        z, log_det, trace = flow.encode(x, y, trace=at)
        return nll_per_dim(z, log_det), align(trace.hidden)
    leaf = x.detach().requires_grad_()
    z, log_det, trace = flow.encode(leaf, y, trace=at)
    nll = nll_per_dim(z, log_det)
    (c,) = restricted_grad((nll,), (leaf,))
    return nll + _carry(nll.new_zeros(()), [(x, c)]), align(trace.hidden)


def isolated(
    flow: TarFlow, x: Tensor, y: Tensor | None, at: Pairs, align: AlignLoss, terms: int | None, tolerance: float
) -> tuple[Tensor, Tensor, dict[int, int]]:
    """Detach and the reverse family, as the module docstring derives them.

    Args:
        flow: the flow.
        x: images `[B, C, H, W]`.
        y: labels, as in `flow.encode`.
        at: aligned (block, layer) pairs.
        align: hidden states to `L_align`.
        terms: None for detach; else the number of terms after the first that the adjoint is solved to, N - 1 for all.
        tolerance: the series ends early where a term is smaller than this share of the sum.

    Returns:
        `L_NF`, `L_align`, and for each block from the first aligned one on the number of terms that were taken.
    """
    first = at[0][0]
    below: list[BlockOutput] = []  # one connected graph
    above: dict[int, tuple[Tensor, BlockOutput]] = {}  # t -> (x^(t-1), a leaf; output of block t), each its own graph
    for t, x_in, out in _cut_blocks(flow, x, y, at, first):
        if t < first:
            below.append(out)
        else:
            above[t] = (x_in, out)
    outputs = [*below, *(out for _, out in above.values())]

    z = outputs[-1].z.detach().requires_grad_()
    log_det = torch.stack([out.log_det for out in outputs]).sum(0).detach().requires_grad_()
    nll = nll_per_dim(z, log_det)
    c, c_det = restricted_grad((nll,), (z, log_det))
    carried = [(out.log_det, c_det) for out in outputs]
    for t, (x_in, out) in reversed(above.items()):
        carried.append((out.z, c))
        if t > 1 or x.requires_grad:
            (c,) = restricted_grad((out.z, out.log_det), (x_in,), (c, c_det))
    if below:
        carried.append((below[-1].z, c))
    elif x.requires_grad:
        carried.append((flow.tokenize(x), c))
    l_nf = _carry(nll.detach(), carried)

    l_align = align({(t, layer): h for t, (_, out) in above.items() for layer, h in out.hidden.items()})
    taken: dict[int, int] = {}
    if terms is not None:
        aligned = sorted({t for t, _ in at})
        own = dict(zip(aligned, restricted_grad((l_align,), [above[t][0] for t in aligned]), strict=True))
        g = torch.zeros_like(z)
        reverse = []
        for t, (x_in, out) in above.items():
            g = g + own.get(t, 0)
            u, taken[t] = solve_adjoint(g, x_in, out.mu, out.a, terms, tolerance)
            reverse += [(out.mu, u), (out.a, u * (x_in - out.mu).detach())]
            g = u * torch.exp(out.a.detach())
        l_align = l_align + _carry(l_align.new_zeros(()), reverse)
    return l_nf, l_align, taken


def sequential(flow: TarFlow, x: Tensor, y: Tensor | None, at: Pairs, align: AlignLoss) -> tuple[Tensor, Tensor]:
    """The definition of reverse: z is detached and decoded again, and the gradient follows the decode. Slow."""
    z, log_det = flow.encode(x, y)
    classes, x_rev = flow.class_weights(y, len(x)), z.detach()
    hidden = {}
    for t in range(flow.config.blocks, at[0][0] - 1, -1):
        block: Any = flow.blocks[t - 1]
        F = CausalMap(block, x_rev, classes, Guidance())
        x_rev, _ = solve_with_gradient(F, Solver("sequential"), 0.0)
        layers = [layer for b, layer in at if b == t]
        if layers:
            hidden.update({(t, layer): h for layer, h in block(x_rev, classes, hidden=layers).hidden.items()})
    return nll_per_dim(z, log_det), align(hidden)


def _cut_blocks(
    flow: TarFlow, x: Tensor, y: Tensor | None, at: Pairs, first: int
) -> Iterator[tuple[int, Tensor, BlockOutput]]:
    """Encode block by block; those from `first` on take a detached input, which requires a gradient of its own."""
    classes, tokens = flow.class_weights(y, len(x)), flow.tokenize(x)
    for t, block in enumerate(flow.blocks, start=1):
        if t >= first:
            tokens = tokens.detach().requires_grad_()
        out = block(tokens, classes, hidden=[layer for b, layer in at if b == t])
        yield t, tokens, out
        tokens = out.z


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, cotangents: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.cotangents = cotangents
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad_outputs[0] * c for c in ctx.cotangents)


def _carry(value: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A scalar equal to `value` whose backward pass hands the second of each pair to the first as its gradient."""
    tensors, cotangents = zip(*pairs, strict=True)
    result = _Carry.apply(value, list(cotangents), *tensors)
    assert isinstance(result, Tensor)
    return result
