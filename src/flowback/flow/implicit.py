"""Decoding that gradients flow through, at the cost of one encode of the block and a few vector-Jacobian products.

A block decodes by solving `x = mu(x) + exp(a(x)) z`. The derivative of the solution follows from the equation itself
(implicit function theorem), whatever solver found it and however long that took: with the cotangent g of x and the
adjoint `u = (I - J^T)^-1 g` (`flowback.flow.adjoint`), `mu` gets the cotangent u, `a` gets `u (x - mu)`, and z gets
`u exp(a)`. From mu and a it goes on to the block's parameters and to the class weights.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowback.flow.adjoint import solve_adjoint
from flowback.flow.decoding import CausalMap, Solved, Solver, solve

TOLERANCES = {torch.float64: 1e-12}  # of the adjoint's series
TOLERANCE = 1e-5  # in lower precisions


def solve_with_gradient(F: CausalMap, solver: Solver, tolerance: float) -> tuple[Tensor, Solved]:
    """`solve`, differentiable once in z, in the class weights and in the block's parameters where any of them asks for it."""
    inputs = [t for t in (F.z, F.classes, *F.block.parameters()) if t is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs):
        return solve(F, solver, tolerance)
    report: list[Solved] = []
    x = _Decode.apply(F, solver, tolerance, report, *inputs)
    assert isinstance(x, Tensor)
    return F.block.reorder(x), report[0]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, F: CausalMap, solver: Solver, tolerance: float, report: list[Solved], *inputs: Tensor) -> Tensor:
        x, solved = solve(F, solver, tolerance)
        report.append(solved)
        x = F.block.reorder(x)  # to the block's own order
        ctx.F = F
        kind = x.device.type
        ctx.autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        ctx.save_for_backward(x, *inputs)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        F: CausalMap = ctx.F
        x, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            with torch.autocast(x.device.type, **ctx.autocast):
                mu, a = F.parameters(leaf)
            tolerance = TOLERANCES.get(x.dtype, TOLERANCE)
            u, _ = solve_adjoint(grad_outputs[0], leaf, mu, a, x.shape[1] - 1, tolerance)
            gradients: list[Tensor | None] = [None] * len(inputs)
            if needed[0]:
                gradients[0] = u * torch.exp(a.detach())
            wanted = [i for i in range(1, len(inputs)) if needed[i]]
            if wanted:
                found = torch.autograd.grad(
                    (mu, a), [inputs[i] for i in wanted], (u, u * (x - mu.detach())), allow_unused=True
                )
                for i, gradient in zip(wanted, found, strict=True):
                    gradients[i] = gradient
        return None, None, None, None, *gradients
