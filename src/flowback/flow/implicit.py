"""Decoding that gradients flow through, at the cost of one encode of the block and a few vector-Jacobian products.

A block decodes by solving `x = mu(x) + exp(a(x)) z`. The derivative of the solution follows from the equation itself
(implicit function theorem), whatever solver found it and however long that took: with the cotangent g of x and the
adjoint `u = (I - J^T)^-1 g` (`flowback.flow.adjoint`), `mu` gets the cotangent u, `a` gets `u (x - mu)`, and z gets
`u exp(a)`. From mu and a it goes on to the block's parameters, to the class weights and to known images.
"""

from typing import Any

import torch
from torch import Tensor

from flowback.flow.adjoint import solve_adjoint
from flowback.flow.decoding import CausalMap, Solved, Solver, solve

TOLERANCES = {torch.float64: 1e-12}  # of the adjoint's series
TOLERANCE = 1e-5  # in lower precisions


def solve_with_gradient(F: CausalMap, solver: Solver, tolerance: float) -> tuple[Tensor, Solved]:
    """`solve`, differentiable once in z, the class weights, the known numbers and the block's parameters.

    A graph is made only where one of them asks for a gradient.
    """
    known = None if F.known is None else F.known[0]
    inputs = [t for t in (F.classes, known, *F.block.parameters()) if t is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (F.z, *inputs)):
        return solve(F, solver, tolerance)
    report: list[Solved] = []
    x: Any = _Decode.apply(F, solver, tolerance, report, F.z, *inputs)
    return F.block.reorder(x), report[0]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, F: CausalMap, solver: Solver, tolerance: float, report: list[Solved], z: Tensor, *inputs: Tensor
    ) -> Tensor:
        x, solved = solve(F, solver, tolerance)
        report.append(solved)
        x = F.block.reorder(x)  # to the block's own order
        ctx.F = F
        ctx.low = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        ctx.save_for_backward(x, *inputs)  # of which autograd sees to it that nobody writes to them
        return x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("decode can be differentiated once; its gradient has no graph for create_graph=True")
        x, *inputs = ctx.saved_tensors
        device, needs_z, needed = x.device.type, ctx.needs_input_grad[4], ctx.needs_input_grad[5:]
        wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            leaf = x.detach().requires_grad_()
            with torch.autocast(device, ctx.low, ctx.low is not None):
                mu, a = ctx.F.parameters(leaf)
            u, _ = solve_adjoint(grad_outputs[0], leaf, mu, a, x.shape[1] - 1, TOLERANCES.get(x.dtype, TOLERANCE))
            cotangents = (u, u * (x - mu.detach()))
            found = iter(torch.autograd.grad((mu, a), wanted, cotangents, allow_unused=True) if wanted else ())
        gradients = [next(found) if need else None for need in needed]
        return None, None, None, None, u * torch.exp(a.detach()) if needs_z else None, *gradients
