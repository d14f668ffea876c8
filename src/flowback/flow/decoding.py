"""Inverses of a block: free functions over its causal parameters, so that a new decoder touches no model.

Decoding solves `x = F(x)`, where token d of `F(x) = z exp(a(x)) + mu(x)` depends on the tokens before d only. All decoders
run the same map (`CausalMap`) and differ in how many of its tokens they run at once:

- **sequential**: the next one; N - 1 passes of one token, exact.
- **jacobi**: all of them, until nothing moves any more.
- **gauss_seidel**: a window of tokens after those that are final, whose keys and values are kept. A sweep makes the
  window's first token final, and with it every further one whose predecessors did not move; then the window moves on.
  One token wide it is the sequential loop. (In fixed segments: GS-Jacobi, arXiv 2505.12849.)

None returns an image that has not converged: jacobi and gauss_seidel go over to the sequential loop where they make too
little progress, and say so. The host waits for the device once a sweep, to know how far it came, and never in the
sequential loop.

Compiled, every pass has the same shapes: the places of its tokens are a tensor on the device, and attention sees all
keys under a mask (`flowback.flow.transformer.StaticCache`). So one program serves all passes, and on CUDA one graph.
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from flowback.core.devices import for_few_rows, repeatable
from flowback.core.errors import InputError
from flowback.flow.block import FlowBlock, affine_decode
from flowback.flow.guidance import Guidance
from flowback.flow.transformer import Cache, KVCache, Places, StaticCache

METHODS = ("sequential", "jacobi", "gauss_seidel")
JACOBI_SHARE = 0.25  # of N sweeps, after which Jacobi gives up
WORK_LIMIT = 16  # runs of every token, on average, after which Gauss-Seidel goes on with one token at a time
DRAFT_SWEEPS, DRAFT_TOLERANCE = 16, 0.03  # bfloat16 does not come closer than some hundredths
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
BFLOAT16_TOLERANCE = 1e-3  # under autocast, or where the weights are of half precision
VARIANTS = 64  # of a pass that are compiled at most: guided or not, rotary or not, of each depth and shape


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
            raise InputError(f"decoding method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.window is not None and not (isinstance(self.window, int) and self.window >= 1):
            raise InputError(f"window must be a whole number of at least 1 or None, got {self.window!r}")


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
        classes: class weights `[B, K]`; None for an unconditional block.
        guidance: of some scale makes passes of `2B` rows: the conditional ones, then the unconditional ones.
        known: numbers of x that are not decoded but given (inpainting): their values and, as booleans, their places,
            both `[B, N, D]` in raster order.
        compiled: whether passes are compiled.
    """

    def __init__(
        self,
        block: FlowBlock,
        z: Tensor,
        classes: Tensor | None,
        guidance: Guidance,
        known: tuple[Tensor, Tensor] | None = None,
        compiled: bool = False,
    ) -> None:
        self.block, self.classes, self.guidance, self.compiled = block, classes, guidance, compiled
        self.z = block.reorder(z)
        self.known = None if known is None else (block.reorder(known[0]), block.reorder(known[1]))
        self.tokens = z.shape[1]
        self.w = guidance.weights(self.z) if guidance.scale else None
        if classes is not None and self.w is not None:
            self.classes = torch.cat([classes, torch.full_like(classes, 1 / classes.shape[1])])

    def next(self, x: Tensor, places: Places, cache: Cache | None = None) -> Tensor:
        """F of the tokens after each of `x [B, n, D]`, which stand at `places`: `[B, n, D]`."""
        rows = x if self.w is None else x.repeat(2, 1, 1)
        mu, a, _ = self.block.predict_next(rows, self.classes, cache=cache)
        after = slice(places.start + 1, places.stop + 1) if isinstance(places, slice) else places + 1
        if self.w is not None:
            mu, a = self.guidance.apply(mu, a, self.w[after])
        new = affine_decode(self.z[:, after], mu, a)
        return new if self.known is None else torch.where(self.known[1][:, after], self.known[0][:, after], new)

    def parameters(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`mu` and `a` of every token of `x [B, N, D]` as F combines them: `F(x) = z exp(a) + mu`."""
        rows = x if self.w is None else x.repeat(2, 1, 1)
        mu, a, _ = self.block.predict(rows, self.classes)
        if self.w is not None:
            mu, a = self.guidance.apply(mu, a, self.w)
        if self.known is not None:
            mu, a = torch.where(self.known[1], self.known[0], mu), torch.where(self.known[1], -torch.inf, a)
        return mu, a

    def start(self) -> Tensor:
        """A first guess of x `[B, N, D]`: z itself. Its first token is right."""
        x = torch.cat([self.z[:, :1], _usable(self.z[:, 1:])], dim=1)
        return x if self.known is None else torch.where(self.known[1], self.known[0], x)

    def new_cache(self) -> KVCache:
        """An empty cache for all tokens."""
        return self.block.transformer.new_cache(self._rows(), self.tokens)

    def new_static_cache(self, count: int = 1) -> StaticCache:
        """The same for passes of `count` tokens that are compiled."""
        return self.block.transformer.new_static_cache(self._rows(), self.tokens, count)

    def _rows(self) -> Tensor:
        return self.z if self.w is None else self.z.repeat(2, 1, 1)

    def for_tokens(self) -> "CausalMap":
        """The same map, with a copy of the block that is laid out for passes of few tokens."""
        new = copy(self)
        new.block = few_row_block(self.block, self.z.device)
        return new


def few_row_block(block: FlowBlock, device: torch.device) -> FlowBlock:
    """A copy of a block with matrices as products with few rows want them: in autocast's precision, and laid out so.

    All else is shared. It is made once for the hundreds of passes of a sequential loop, whose time on a CPU is that of
    reading the matrices.
    """
    low = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    copies: dict[int, Any] = {id(parameter): parameter for parameter in block.parameters()}
    for layer in block.transformer.modules():
        if isinstance(layer, nn.Linear):
            weight = for_few_rows(layer.weight.detach().to(low or layer.weight.dtype))
            copies[id(layer.weight)] = nn.Parameter(weight, requires_grad=False)
            if low is not None:
                copies[id(layer.bias)] = nn.Parameter(layer.bias.detach().to(low), requires_grad=False)
    return deepcopy(block, copies)


def sequential(F: CausalMap, solver: Solver, tolerance: float) -> tuple[Tensor, Solved]:
    """Token by token, with the keys and values of those before in a cache that is allocated once."""
    F, x = F.for_tokens(), F.start()
    if F.compiled:
        static = F.new_static_cache()
        one_pass = repeatable(lambda: compiled(_token_pass)(F, x, static), x.device)
        for _ in range(F.tokens - 1):
            one_pass()
    else:
        cache = F.new_cache()
        for d in range(F.tokens - 1):
            x[:, d + 1 : d + 2] = F.next(x[:, d : d + 1], slice(d, d + 1), cache)
    return x, Solved(solver, F.tokens - 1, F.tokens - 1, 0.0)


def _token_pass(F: CausalMap, x: Tensor, cache: StaticCache) -> None:
    """Write the token after that at `cache.at` into `x [B, N, D]`, and move on to it."""
    x.index_copy_(1, cache.at + 1, F.next(x[:, cache.at], cache.at, cache))
    cache.at.add_(1)


def jacobi(F: CausalMap, solver: Solver, tolerance: float) -> tuple[Tensor, Solved]:
    """All tokens at once until none moves by more than the tolerance, or else the sequential loop."""
    x, N = F.start(), F.tokens
    x, sweeps = draft(F, x) if solver.draft else (x, 0)
    most = sweeps + max(1, round(JACOBI_SHARE * N))
    one_sweep = sweeper(F, x)
    while sweeps < most:
        new, moved = one_sweep()
        update = float(moved)
        sweeps += 1
        if update <= tolerance:
            return x, Solved(solver, sweeps, sweeps * (N - 1), update)
        x.copy_(new)
    x, _ = sequential(F, solver, tolerance)
    return x, Solved(solver, sweeps + N - 1, (sweeps + 1) * (N - 1), 0.0, fell_back=True)


def gauss_seidel(F: CausalMap, solver: Solver, tolerance: float) -> tuple[Tensor, Solved]:
    """A window of tokens after the final ones; at least its first becomes final in every sweep."""
    if solver.window == 1 and not solver.draft:
        return sequential(F, solver, tolerance)
    x, N = F.start(), F.tokens
    x, sweeps = draft(F, x) if solver.draft else (x, 0)
    width = min(solver.window or N, N - 1)
    one_pass = _static_window(F, x, width) if F.compiled else _growing_window(F, x)
    done, run, residual, fell_back = 0, sweeps * (N - 1), 0.0, False  # tokens 0 … done are final
    while done < N - 1:
        fell_back = fell_back or run > WORK_LIMIT * N
        if fell_back and F.compiled:
            x, _ = sequential(F, solver, tolerance)
            return x, Solved(solver, sweeps + N - 1, run + N - 1, 0.0, fell_back)
        first = min(done, N - 1 - width) if F.compiled else done  # compiled windows never shrink
        n = 1 if fell_back else min(width, N - 1 - first)
        new, moves = one_pass(first, n)
        moved = moves[done - first :].tolist()  # the one wait of a sweep
        still = 0  # tokens that stay as the cache has them
        while still < len(moved) - 1 and moved[still] <= tolerance:
            still += 1
        residual = max([residual, *moved[:still]])
        kept = done - first + still
        sweeps, run, done = sweeps + 1, run + n, done + 1 + still
        x[:, done] = new[:, kept]  # exact, given those before; what follows is the next guess
        x[:, done + 1 : first + 1 + n] = _usable(new[:, kept + 1 :])
    return x, Solved(solver, sweeps, run, residual, fell_back)


Window = Callable[[int, int], tuple[Tensor, Tensor]]  # first token, number -> F of the tokens after them, how far they move


def _growing_window(F: CausalMap, x: Tensor) -> Window:
    cache = F.new_cache()

    def one_pass(first: int, n: int) -> tuple[Tensor, Tensor]:
        cache.filled = first
        new = F.next(x[:, first : first + n], slice(first, first + n), cache)
        return new, _moved(new, x[:, first + 1 : first + 1 + n])

    return one_pass


def _static_window(F: CausalMap, x: Tensor, width: int) -> Window:
    cache, new, moves = F.new_static_cache(width), torch.empty_like(x[:, :width]), x.new_empty(width)
    one_pass = repeatable(lambda: compiled(_window_pass)(F, x, cache, new, moves), x.device)

    def run(first: int, n: int) -> tuple[Tensor, Tensor]:
        cache.at.copy_(cache.all[first : first + width])
        one_pass()
        return new, moves

    return run


def _window_pass(F: CausalMap, x: Tensor, cache: StaticCache, new: Tensor, moves: Tensor) -> None:
    """Write F of the tokens after those at `cache.at` into `new [B, n, D]`, and how far they move into `moves [n]`."""
    new.copy_(F.next(x[:, cache.at], cache.at, cache))
    moves.copy_(_moved(new, x[:, cache.at + 1]))


def draft(F: CausalMap, x: Tensor) -> tuple[Tensor, int]:
    """Bring a guess `x [B, N, D]` near the fixed point by sweeps in bfloat16; returned with their number."""
    sweeps, update = 0, float("inf")
    with torch.autocast(x.device.type, torch.bfloat16):
        one_sweep = sweeper(F, x)
        while sweeps < DRAFT_SWEEPS and not update <= DRAFT_TOLERANCE:
            new, moved = one_sweep()
            x.copy_(new)
            update, sweeps = float(moved), sweeps + 1
    return x, sweeps


def sweeper(F: CausalMap, x: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that returns F of all tokens of `x [B, N, D]` as it then is, and how far the farthest one moves."""
    if not F.compiled:
        return lambda: sweep(F, x)
    new, moved = torch.empty_like(x), x.new_empty(())
    one_pass = repeatable(lambda: compiled(_sweep_pass)(F, x, new, moved), x.device)

    def run() -> tuple[Tensor, Tensor]:
        one_pass()
        return new, moved

    return run


def sweep(F: CausalMap, x: Tensor) -> tuple[Tensor, Tensor]:
    """F of all tokens of a guess `x [B, N, D]`, as the next guess, and the largest `|F(x) - x| / max(1, |x|)`."""
    if x.shape[1] == 1:
        return x, x.new_zeros(())
    new = F.next(x[:, :-1], slice(0, x.shape[1] - 1))
    return torch.cat([x[:, :1], _usable(new)], dim=1), _moved(new, x[:, 1:]).max()


def _sweep_pass(F: CausalMap, x: Tensor, new: Tensor, moved: Tensor) -> None:
    for place, value in zip((new, moved), sweep(F, x), strict=True):
        place.copy_(value)


def _usable(guess: Tensor) -> Tensor:
    """A guess that overflowed is none: attention would spread it, times zero, to tokens that do not depend on it."""
    return torch.where(guess.isfinite(), guess, 0)


def _moved(new: Tensor, old: Tensor) -> Tensor:
    """How far the tokens of `[B, n, D]` moved at most, `[n]`: absolutely if they are small, or else relatively."""
    if not new.numel():
        return new.new_zeros(new.shape[1])
    return ((new - old).abs() / old.abs().clamp(min=1)).amax(dim=(0, 2))


@cache
def compiled(one_pass: Callable[..., Any]) -> Callable[..., Any]:
    """A pass that is compiled whole, once for all blocks that are alike."""
    return torch.compile(one_pass, fullgraph=True)


def default_tolerance(flow_dtype: torch.dtype, device: torch.device) -> float:
    """The update at which a parallel decoder stops, in the precision of the transformer."""
    if torch.is_autocast_enabled(device.type):
        return BFLOAT16_TOLERANCE
    return TOLERANCES.get(flow_dtype, BFLOAT16_TOLERANCE)


Decoder = Callable[[CausalMap, Solver, float], tuple[Tensor, Solved]]
DECODERS: dict[str, Decoder] = dict(zip(METHODS, (sequential, jacobi, gauss_seidel), strict=True))


@torch.no_grad()
def solve(F: CausalMap, solver: Solver, tolerance: float) -> tuple[Tensor, Solved]:
    """The block's input `[B, N, D]`, raster order, and how it was found."""
    many = torch._dynamo.config.patch(recompile_limit=VARIANTS) if F.compiled else nullcontext()
    with many:
        x, solved = DECODERS[solver.method](F, solver, tolerance)
    return F.block.reorder(x), solved
