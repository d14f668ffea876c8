"""Inverses of a block: free functions over its causal parameters, so that a new decoder touches no model.

Decoding solves `x = F(x)`, where token d of `F(x) = z exp(a(x)) + mu(x)` depends on the tokens before d only. All decoders
run the same map (`CausalMap`) and differ in how many of its tokens they run at once:

- **sequential**: the next one; N - 1 passes of one token, exact.
- **jacobi**: all of them, until nothing moves any more.
- **gauss_seidel**: a window of tokens after those that are final, whose keys and values are kept. A sweep makes the
  window's first token final, and with it every further one whose predecessors did not move; then the window moves on.
  One token wide it is the sequential loop. (In fixed segments: GS-Jacobi, arXiv 2505.12849.)

None returns an image that has not converged: jacobi and gauss_seidel go over to the sequential loop where they make too
little progress, and say so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowback.errors import InputError
from flowback.flows.block import FlowBlock, affine_decode
from flowback.flows.guidance import Guidance
from flowback.nn import Cache, KVCache

METHODS = ("sequential", "jacobi", "gauss_seidel")
JACOBI_SHARE = 0.25  # of N sweeps, after which Jacobi gives up
WORK_LIMIT = 16  # runs of every token, on average, after which Gauss-Seidel goes on with one token at a time
DRAFT_SWEEPS, DRAFT_TOLERANCE = 16, 0.03  # bfloat16 does not come closer than some hundredths
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
BFLOAT16_TOLERANCE = 1e-3  # under autocast


@dataclass(frozen=True)
class Solver:
    """How a block is to be decoded.

    Args:
        method: a key of `DECODERS`.
        window: gauss_seidel: tokens that are swept at once; None for all that are not final.
        draft: jacobi and gauss_seidel: whether the first sweeps, which need no accuracy, run in bfloat16.
    """

    method: str
    window: int | None = None
    draft: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"decoding method {self.method!r} does not exist; allowed: {', '.join(METHODS)}")
        if self.window is not None and not (isinstance(self.window, int) and self.window >= 1):
            raise InputError(f"window {self.window!r} is not usable; allowed is a whole number of at least 1, or None")


@dataclass(frozen=True)
class Solved:
    """How a block was decoded."""

    solver: Solver
    sweeps: int  # passes through the block's transformer, whatever their number of tokens
    tokens: int  # tokens in all these passes, per image; N - 1 is the least
    residual: float  # largest `|F(x) - x| / max(1, |x|)` of the x returned; 0 if every token is exact
    fell_back: bool = False  # it did not converge in time, and the sequential loop was run


class CausalMap:
    """The map `x -> F(x)` whose fixed point is the block's input, in the block's order.

    Args:
        block: the block to invert.
        z: its output `[B, N, D]`, raster order.
        classes: class weights `[B, K]`; with guidance `[2B, K]`, the conditional rows before the unconditional ones, which
            then run as one batch.
        guidance: how the two halves are combined.
        known: numbers of x that are not decoded but given (inpainting): their values and, as booleans, their places,
            both `[B, N, D]` in raster order.
    """

    def __init__(
        self,
        block: FlowBlock,
        z: Tensor,
        classes: Tensor | None,
        guidance: Guidance,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.block, self.classes, self.guidance = block, classes, guidance
        self.z = block.reorder(z)
        self.known = None if known is None else (block.reorder(known[0]), block.reorder(known[1]))
        self.tokens = z.shape[1]
        self.rows = 2 if guidance.scale else 1  # of the transformer, for each image

    def next(self, x: Tensor, first: int = 0, cache: Cache | None = None) -> Tensor:
        """F of the tokens after each of `x [B, n, D]`, which starts with token `first`: `[B, n, D]`."""
        mu, a, _ = self.block.predict_next(x.repeat(self.rows, 1, 1), self.classes, cache=cache)
        if self.guidance.scale:
            mu, a = self.guidance.apply(mu, a, first + 1, self.tokens)
        end = first + 1 + x.shape[1]
        return self._with_known(affine_decode(self.z[:, first + 1 : end], mu, a), first + 1)

    def start(self) -> Tensor:
        """A first guess of x `[B, N, D]`: z itself. Its first token is right."""
        return self._with_known(torch.cat([self.z[:, :1], _usable(self.z[:, 1:])], dim=1), 0)

    def new_cache(self) -> KVCache:
        """An empty cache for all tokens."""
        return self.block.transformer.new_cache(self.z.repeat(self.rows, 1, 1), self.tokens)

    def _with_known(self, x: Tensor, first: int) -> Tensor:
        if self.known is None:
            return x
        values, places = (part[:, first : first + x.shape[1]] for part in self.known)
        return torch.where(places, values, x)


def sequential(F: CausalMap, solver: Solver, tolerance: float) -> tuple[Tensor, Solved]:
    """Token by token, with the keys and values of those before in a cache that is allocated once."""
    x, cache = F.start(), F.new_cache()
    for d in range(F.tokens - 1):
        x[:, d + 1 : d + 2] = F.next(x[:, d : d + 1], d, cache)
    return x, Solved(solver, F.tokens - 1, F.tokens - 1, 0.0)


def jacobi(F: CausalMap, solver: Solver, tolerance: float) -> tuple[Tensor, Solved]:
    """All tokens at once until none moves by more than the tolerance, or else the sequential loop."""
    x, N = F.start(), F.tokens
    x, sweeps = draft(F, x) if solver.draft else (x, 0)
    most = sweeps + max(1, round(JACOBI_SHARE * N))
    while sweeps < most:
        new, update = sweep(F, x)
        sweeps += 1
        if update <= tolerance:
            return x, Solved(solver, sweeps, sweeps * (N - 1), update)
        x = new
    x, _ = sequential(F, solver, tolerance)
    return x, Solved(solver, sweeps + N - 1, (sweeps + 1) * (N - 1), 0.0, fell_back=True)


def gauss_seidel(F: CausalMap, solver: Solver, tolerance: float) -> tuple[Tensor, Solved]:
    """A window of tokens after the final ones; at least its first becomes final in every sweep."""
    x, cache, N = F.start(), F.new_cache(), F.tokens
    x, sweeps = draft(F, x) if solver.draft else (x, 0)
    done, run, residual, fell_back = 0, sweeps * (N - 1), 0.0, False  # tokens 0 … done are final
    while done < N - 1:
        fell_back = fell_back or run > WORK_LIMIT * N
        n = 1 if fell_back else min(solver.window or N, N - 1 - done)
        end = done + 1 + n
        new = F.next(x[:, done : done + n], done, cache)
        moves = _moved(new, x[:, done + 1 : end])
        still = int((moves[:-1] <= tolerance).cumprod(0).sum())  # tokens that stay as the cache has them
        residual = max([residual, *moves[:still].tolist()])
        sweeps, run, done = sweeps + 1, run + n, done + 1 + still
        x[:, done] = new[:, still]  # exact, given those before; what follows is the next guess
        x[:, done + 1 : end] = _usable(new[:, still + 1 :])
        cache.filled = done
    return x, Solved(solver, sweeps, run, residual, fell_back)


def draft(F: CausalMap, x: Tensor) -> tuple[Tensor, int]:
    """Bring a guess `x [B, N, D]` near the fixed point by sweeps in bfloat16; returned with their number."""
    sweeps, update = 0, float("inf")
    with torch.autocast(x.device.type, torch.bfloat16):
        while sweeps < DRAFT_SWEEPS and not update <= DRAFT_TOLERANCE:
            (x, update), sweeps = sweep(F, x), sweeps + 1
    return x, sweeps


def sweep(F: CausalMap, x: Tensor) -> tuple[Tensor, float]:
    """F of all tokens of a guess `x [B, N, D]`, as the next guess, and `|F(x) - x| / max(1, |x|)`."""
    if x.shape[1] == 1:
        return x, 0.0
    new = F.next(x[:, :-1])
    return torch.cat([x[:, :1], _usable(new)], dim=1), float(_moved(new, x[:, 1:]).max())


def _usable(guess: Tensor) -> Tensor:
    """A guess that overflowed is none: attention would spread it, times zero, to tokens that do not depend on it."""
    return torch.where(guess.isfinite(), guess, 0)


def _moved(new: Tensor, old: Tensor) -> Tensor:
    """How far the tokens of `[B, n, D]` moved at most, `[n]`: absolutely if they are small, or else relatively."""
    if not new.numel():
        return new.new_zeros(new.shape[1])
    return ((new - old).abs() / old.abs().clamp(min=1)).amax(dim=(0, 2))


def default_tolerance(like: Tensor) -> float:
    """The update at which a parallel decoder stops, in the precision at hand."""
    if torch.is_autocast_enabled(like.device.type):
        return BFLOAT16_TOLERANCE
    return TOLERANCES.get(like.dtype, BFLOAT16_TOLERANCE)


Decoder = Callable[[CausalMap, Solver, float], tuple[Tensor, Solved]]
DECODERS: dict[str, Decoder] = dict(zip(METHODS, (sequential, jacobi, gauss_seidel), strict=True))


@torch.no_grad()
def solve(F: CausalMap, solver: Solver, tolerance: float) -> tuple[Tensor, Solved]:
    """The block's input `[B, N, D]`, raster order, and how it was found."""
    x, solved = DECODERS[solver.method](F, solver, tolerance)
    return F.block.reorder(x), solved
