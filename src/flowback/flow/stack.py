"""A stack of autoregressive blocks with alternating token order, and its density (TARFlow, arXiv 2412.06329).

`x = x^0 -> x^1 -> ... -> x^T = z`, block t maps `x^(t-1)` to `x^t`, and the log-determinants add up. A flow works in one
space, that of its images `x [B, C, H, W]`; these may be the latents of an autoencoder (`flowback.latents.LatentFlow`).
Noise is `z [B, N, D]`, likelihoods are nats summed per image, and blocks and layers count from 1.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from flowback.core.devices import put
from flowback.core.errors import InputError
from flowback.core.seeds import Generators, draw
from flowback.core.units import LOG_2PI, bin_width
from flowback.flow.autotune import Autotune, solvers
from flowback.flow.block import BlockOutput, FlowBlock
from flowback.flow.config import FlowConfig
from flowback.flow.decoding import CausalMap, Solved, default_tolerance
from flowback.flow.guidance import Guidance, checked
from flowback.flow.implicit import solve_with_gradient
from flowback.flow.labels import Labels, class_weights
from flowback.flow.patches import patchify, unpatchify
from flowback.flow.prior import PRIORS, FittedPrior

BLOCK_OPTIONS = ("width", "head_dim", "num_classes", "mlp", "mlp_ratio", "positions", "log_scale_bound")


@dataclass
class Trace:
    """What `encode` saw on its way, on the graph: `inputs[t]` is `x^(t-1)`, `hidden[t, l]` the state after layer l."""

    inputs: dict[int, Tensor] = field(default_factory=dict)  # t -> [B, N, D]
    a: dict[int, Tensor] = field(default_factory=dict)  # t -> [B, N, D], the logarithms of the scales
    hidden: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (t, l) -> [B, N, width]


class Stack(nn.Module):
    """The map between images and noise, both ways, and the density that it gives; `TarFlow` draws with it.

    Args:
        config: the options; or give them as keywords. `image_size` is required. `channels` defaults to 3, `num_classes`
            to 0 (unconditional), `levels` to 256.
        **options: fields of `FlowConfig`.

    Raises:
        InputError: if an option does not exist or has an impossible value.
    """

    prior_std: Tensor | None

    def __init__(self, config: FlowConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = c = FlowConfig.complete(config, options)
        self.channels, self.num_classes, self.levels = cast("tuple[int, int, int]", (c.channels, c.num_classes, c.levels))
        height, width = self.image_size = c.size
        self.data_shape = (self.channels, height, width)
        self.grid = (height // c.patch_size, width // c.patch_size)
        self.token_shape = (self.grid[0] * self.grid[1], self.channels * c.patch_size**2)  # N, D
        self.dims = self.token_shape[0] * self.token_shape[1]  # numbers in an image
        self.register_buffer("prior_std", torch.ones(self.token_shape) if c.prior == "scaled" else None)
        self.fitted_prior: FittedPrior | None = None  # what z is really like; `flowback.tasks.prior` fits it
        self.autotune: Autotune | None = None  # which decoder is fastest for which block on this machine
        shared = {name: getattr(c, name) for name in BLOCK_OPTIONS}
        self.blocks = nn.ModuleList(
            FlowBlock(*self.token_shape, layers=depth, flip=t % 2 == 1, **shared) for t, depth in enumerate(c.depths)
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters are. Inputs are moved there, and results are there."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    @property
    def data_dtype(self) -> torch.dtype:
        """Of images, z and likelihoods: that of the parameters, but at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def enter(self, x: Tensor) -> Tensor:
        """Images or z on the flow's device, in `data_dtype`."""
        return put(x, self.device).to(self.data_dtype)

    def to_prior(self, noise: Tensor) -> Tensor:
        """Standard normal numbers `[..., N, D]` as z of the prior: unchanged, or scaled."""
        return noise if self.prior_std is None else noise * self.prior_std

    def _fitted(self, prior: str | None) -> FittedPrior | None:
        """The fitted prior, if that is asked for."""
        if prior not in (None, *PRIORS):
            raise InputError(f"prior must be one of {', '.join(PRIORS)}, got {prior!r}")
        if prior == "fitted" and self.fitted_prior is None:
            raise InputError("this flow has no fitted prior: run `flowback fit-prior`, or use prior standard")
        return self.fitted_prior if prior == "fitted" else None

    def class_weights(self, y: Labels, batch: int) -> Tensor | None:
        """Labels as weights of the class embeddings, `[B, K]`; None for an unconditional flow (`flowback.flow.labels`)."""
        return class_weights(y, batch, self.num_classes, self.data_dtype, self.device)

    def tokenize(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to `x^0 [B, N, D]`.

        Raises:
            InputError: if they are no tensor, or of another shape than the flow's.
        """
        if not isinstance(x, Tensor):
            raise InputError(f"images must be a tensor, got {type(x).__name__}; flowback.data.as_images converts others")
        if x.dim() != 4 or x.shape[1:] != self.data_shape:
            raise InputError(f"images must have the shape [B, {', '.join(map(str, self.data_shape))}], got {list(x.shape)}")
        return patchify(self.enter(x), self.config.patch_size)

    def to_grid(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, N, D]` as images `[B, C, H, W]`, the inverse of `tokenize`."""
        return unpatchify(tokens, self.config.patch_size, self.image_size)

    @overload
    def encode(self, x: Tensor, y: Labels = None, trace: None = None) -> tuple[Tensor, Tensor]: ...
    @overload
    def encode(self, x: Tensor, y: Labels = None, *, trace: Iterable[Sequence[int]]) -> tuple[Tensor, Tensor, Trace]: ...
    def encode(
        self, x: Tensor, y: Labels = None, trace: Iterable[Sequence[int]] | None = None
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Trace]:
        """Map images to noise.

        Args:
            x: images `[B, C, H, W]` in [-1, 1].
            y: labels `[B]` with -1 for no label; one label for all; class weights `[B, K]`; or None.
            trace: (block, layer) pairs; if given, a `Trace` is returned as well.

        Returns:
            `z [B, N, D]`; `log_det [B]`, nats, summed over the image; and the trace, if asked for.

        Raises:
            InputError: if shapes, labels, blocks or layers do not fit the flow.
        """
        at, record, log_dets = self.config.check_pairs(trace or ()), Trace(), []
        z = self.tokenize(x)
        classes = self.class_weights(y, x.shape[0])  # not len(x), which exporting would take for a constant
        for t, block in enumerate(self.blocks, start=1):
            record.inputs[t] = z
            out: BlockOutput = block(z, classes, hidden=[layer for b, layer in at if b == t])
            record.a[t] = out.a
            record.hidden.update({(t, layer): h for layer, h in out.hidden.items()})
            log_dets.append(out.log_det)
            z = out.z
        log_det = torch.stack(log_dets).sum(0)
        return (z, log_det) if trace is None else (z, log_det, record)

    def forward(self, x: Tensor, y: Labels = None) -> tuple[Tensor, Tensor]:
        """`encode` without a trace."""
        return self.encode(x, y)

    def log_prob(self, x: Tensor, y: Labels = None, prior: str = "standard") -> Tensor:
        """Log-density `[B]`, nats, of images `x` on the [-1, 1] scale, under the density that was trained.

        The flow models *noised* images: add the noise first, `flow.log_prob(flow.perturb(x))`. For bits per dimension see
        `flowback.core.units.bits_per_dim`. With `prior="fitted"` it is the density with the fitted prior in place of
        the standard one.

        Raises:
            InputError: if the flow has no such prior.
        """
        fitted = self._fitted(prior)
        if fitted is not None:
            z, log_det = self.encode(x, y)
            return fitted.log_prob(z, self.class_weights(y, len(z))) + log_det
        return self.log_prob_parts(x, y).sum(dim=(1, 2))

    def log_prob_parts(self, x: Tensor, y: Labels = None) -> Tensor:
        """What `log_prob` is the sum of, `[B, T + 1, N]`, nats.

        First what the prior gives each token of z; then, block by block, the log-determinant of each token's map, given the
        tokens that the block reads before it.
        """
        z, _, trace = self.encode(x, y, trace=())
        log_dets = [-a.sum(dim=2) for a in trace.a.values()]
        if self.prior_std is not None:
            z, log_dets[-1] = z / self.prior_std, log_dets[-1] - self.prior_std.log().sum(dim=1)
        return torch.stack([-0.5 * (z.square() + LOG_2PI).sum(dim=2), *log_dets], dim=1)

    def perturb(self, x: Tensor, generator: Generators = None) -> Tensor:
        """Add the noise of training to clean images: Gaussian of `noise_std`, or uniform over a pixel's bin."""
        if self.config.noise == "uniform":
            return self.dequantize(x, generator)
        x = self.enter(x)
        return x + self.config.noise_std * draw(torch.randn, x, generator)

    def dequantize(self, x: Tensor, generator: Generators = None) -> Tensor:
        """Spread clean images uniformly over the bins of their pixel values (`flowback.core.units`)."""
        x = self.enter(x)
        return x + bin_width(self.levels) * (draw(torch.rand, x, generator) - 0.5)

    def decode(
        self,
        z: Tensor,
        y: Labels = None,
        guidance: float | Guidance = 0.0,
        method: str | Sequence[str] = "auto",
        tolerance: float | None = None,
        known: tuple[Tensor, Tensor] | None = None,
        compile: bool = False,
    ) -> Tensor:
        """Map noise to images; without guidance the inverse of `encode`.

        Differentiable once in z, in class weights, in known images and in the parameters, whatever the method
        (`flowback.flow.implicit`).

        Args:
            z: `[B, N, D]`; it is not written to.
            y: labels, as in `encode`.
            guidance: scale, or a `Guidance`. It needs labels, and doubles the rows of a batch.
            method: "sequential", "jacobi", "gauss_seidel", or "auto", which takes for each block what `autotune`
                measured as fastest; or one of them for each block, block 1 first (`flowback.flow.decoding`).
            tolerance: update at which the parallel methods stop; None for 1e-5 in float32, 1e-10 in float64.
            known: images `[B, C, H, W]` and a boolean mask of the pixels that block 1 takes from them instead of decoding
                them; all others follow from them (`flowback.tasks.editing.inpaint`).
            compile: compile the passes with torch.compile, on CUDA as graphs: pays from the second batch of a shape on.
                Needs a C++ compiler on CPUs.

        Returns:
            Images `[B, C, H, W]`.

        Raises:
            InputError: if shapes or labels do not fit, the method does not exist, or guidance has no labels.
        """
        return self.decode_with_report(z, y, guidance, method, tolerance, known, compile)[0]

    def decode_with_report(
        self,
        z: Tensor,
        y: Labels = None,
        guidance: float | Guidance = 0.0,
        method: str | Sequence[str] = "auto",
        tolerance: float | None = None,
        known: tuple[Tensor, Tensor] | None = None,
        compile: bool = False,
    ) -> tuple[Tensor, list[Solved]]:
        """`decode`, and how each block was decoded, block 1 first, with its residual."""
        steps = list(self.decode_by_block(z, y, guidance, method, tolerance, known, compile))
        x = self.to_grid(steps[-1][0])
        return x, [solved for _, solved in reversed(steps)]

    def decode_by_block(
        self,
        z: Tensor,
        y: Labels = None,
        guidance: float | Guidance = 0.0,
        method: str | Sequence[str] = "auto",
        tolerance: float | None = None,
        known: tuple[Tensor, Tensor] | None = None,
        compile: bool = False,
    ) -> Iterator[tuple[Tensor, Solved]]:
        """`decode`, block by block, the last one first: the tokens `[B, N, D]` that it made, and how it was decoded."""
        if not isinstance(z, Tensor) or z.dim() != 3 or z.shape[1:] != self.token_shape:
            N, D = self.token_shape
            raise InputError(f"z must have the shape [B, {N}, {D}], got {list(getattr(z, 'shape', ()))}")
        if tolerance is not None and not 0 < tolerance < float("inf"):
            raise InputError(f"tolerance must be above 0, got {tolerance}")
        tolerance = tolerance or default_tolerance(self.dtype, self.device)
        classes, guidance = self.class_weights(y, len(z)), checked(guidance, y, self.num_classes, self.config.blocks)
        chosen = solvers(method, self.autotune, self.config.blocks, len(z) * (2 if guidance.scale else 1), self.device)
        given = None if known is None else self._known_tokens(*known, batch=len(z))
        tokens = self.enter(z)
        for t in range(self.config.blocks, 0, -1):
            block: Any = self.blocks[t - 1]
            F = CausalMap(block, tokens, classes, guidance.of_block(t), given if t == 1 else None, compile)
            tokens, solved = solve_with_gradient(F, chosen[t - 1], tolerance)
            yield tokens, solved

    def _known_tokens(self, x: Tensor, where: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        tokens = self.tokenize(x)
        if len(x) != batch or where.dtype != torch.bool:
            raise InputError(f"known must be {batch} images and a boolean mask, got {len(x)} and {where.dtype}")
        return tokens, patchify(put(where, self.device).expand_as(x), self.config.patch_size)
