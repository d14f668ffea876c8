"""The loss of an aligned flow, `L_NF + weight * L_align` (arXiv 2511.22345, equations 5 to 8)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowback.alignment import gradients
from flowback.alignment.projectors import ConvProjector, Projector, Separate
from flowback.core.devices import put
from flowback.core.errors import InputError
from flowback.core.units import nll_per_dim
from flowback.encoders import Carrier, Encoder, match_grid
from flowback.flow.tarflow import TarFlow

PROJECTORS = ("mlp", "conv")


def spatially_normalized(features: Tensor) -> Tensor:
    """Features `[B, P, F]`, every channel of every image with mean 0 and variance 1 over the patches (arXiv 2512.10794).

    What all patches of an image share is gone: only how they differ is left to align with.
    """
    centred = features - features.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()


class Alignment(Carrier):
    """Aligns hidden states of a flow with the features of a frozen encoder.

    Its `parameters()` are what to optimize, those of flow and projector. The encoder moves with `.to()`, but is not among
    the submodules: it stays in eval mode, gets no gradient, and is not in `state_dict()`.

    Args:
        flow: the flow to train; of a LatentFlow its `core`.
        encoder: maps images `[B, C, H, W]` in [-1, 1] to features `[B, P, F]` of a `grid` of P = rows x columns patches,
            and has F as `dim`. A module is put into eval mode, and its parameters are frozen.
        at: aligned (block, layer) pairs, counted from 1.
        strategy: "forward", "detach" or "reverse": where the alignment's gradient flows.
        gradient: of "reverse": "cached", "one_step", an int k (terms of the adjoint), "exact" or "sequential".
        weight: of `L_align`.
        projector_width: hidden size of the MLP.
        projector: a key of `PROJECTORS`: "mlp", token by token (REPA), or "conv", over the grid (iREPA).
        spatial_norm: normalize every channel of the targets over an image's patches (iREPA).
        tolerance: of "exact": the adjoint's series ends where a term is smaller than this share of the sum. None for
            1e-12 in float64, and 1e-3 in lower precisions: bfloat16 products are no more accurate.
        separate_projectors: a projector for each pair, instead of one that all share.

    Raises:
        InputError: if a pair, the strategy, the gradient or the weight does not exist or is impossible.
    """

    encoder: Encoder

    def __init__(
        self,
        flow: TarFlow,
        encoder: Encoder,
        at: Iterable[Sequence[int]],
        strategy: str = "reverse",
        gradient: str | int = "one_step",
        weight: float = 0.1,
        projector_width: int = 1024,
        projector: str = "mlp",
        spatial_norm: bool = False,
        tolerance: float | None = None,
        separate_projectors: bool = False,
    ) -> None:
        super().__init__()
        flow = flow.core
        self.at = flow.config.check_pairs(at)
        if not self.at:
            raise InputError("at must hold at least one pair of block and layer, like [[4, 2]], got none")
        if strategy not in gradients.STRATEGIES:
            raise InputError(f"strategy must be one of {', '.join(gradients.STRATEGIES)}, got {strategy!r}")
        is_count = isinstance(gradient, int) and not isinstance(gradient, bool) and gradient >= 0
        if not is_count and gradient not in gradients.GRADIENTS:
            allowed = f"{', '.join(gradients.GRADIENTS)}, or a whole number of at least 0"
            raise InputError(f"gradient must be one of {allowed}, got {gradient!r}")
        if not 0 <= weight < float("inf"):
            raise InputError(f"weight must be at least 0, got {weight}")
        if projector not in PROJECTORS:
            raise InputError(f"projector must be one of {', '.join(PROJECTORS)}, got {projector!r}")
        if tolerance is not None and not 0 <= tolerance < 1:
            raise InputError(f"tolerance must be at least 0 and below 1, got {tolerance}")
        if not callable(encoder) or not hasattr(encoder, "grid") or not hasattr(encoder, "dim"):
            raise InputError(f"encoder must be a module that has grid and dim, got {type(encoder).__name__}")
        self.flow, self.tolerance = flow, tolerance
        self.carry("encoder", encoder)
        self.strategy, self.gradient, self.weight = strategy, gradient, weight
        self.spatial_norm = spatial_norm
        self.active = True  # False: `loss` is the likelihood's alone, and needs no targets
        self.to_input = True  # False: the alignment's gradient of "forward" ends at `x_noisy`, as the others' always does
        sizes = flow.config.width, encoder.dim

        def make() -> nn.Module:
            return ConvProjector(*sizes, flow.grid) if projector == "conv" else Projector(*sizes, projector_width)

        self.projector = Separate(make() for _ in self.at) if separate_projectors else make()

    @property
    def device(self) -> torch.device:
        """Where the modules are."""
        return next(self.projector.parameters()).device

    def targets(self, x_clean: Tensor) -> Tensor:
        """The encoder's features of clean images on the flow's grid, `[B, N, F]`, without gradient.

        Raises:
            InputError: if the encoder's features do not have the shape that its `grid` and `dim` say.
        """
        rows, columns = self.encoder.grid
        with torch.no_grad():
            features = self.encoder(put(x_clean, self.device))
        expected = [len(x_clean), rows * columns, self.encoder.dim]
        if list(features.shape) != expected:
            raise InputError(f"the encoder's features must have the shape {expected}, got {list(features.shape)}")
        return match_grid(features, (rows, columns), self.flow.grid)

    def loss(
        self, x_noisy: Tensor, y: Tensor | None = None, x_clean: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Encode once and return the loss, whose `backward()` puts every gradient where the strategy says.

        Args:
            x_noisy: what the flow sees, `[B, C, H, W]`.
            y: labels `[B]`, -1 for none; or None.
            x_clean: what the encoder sees; not needed where `targets` are given.
            targets: features `[B, N, F]` computed before, as by `targets`.

        Returns:
            The loss, and its parts without graph: "nll" (nats per dimension), "align" (minus the mean cosine) and, for
            the reverse family, "terms" (block -> terms of the adjoint after the first).

        Raises:
            InputError: if neither clean images nor targets are given, or shapes do not fit.
        """
        x_noisy = self.flow.enter(x_noisy)
        if not self.active:
            nll = nll_per_dim(*self.flow.encode(x_noisy, y))
            idle = torch.stack([p.sum() for p in self.projector.parameters()]).sum()  # wrappers expect its gradients
            return nll + 0 * idle, {"nll": nll.detach()}
        if targets is None:
            if x_clean is None:
                raise InputError("alignment needs x_clean, or targets made from it, got neither")
            targets = self.targets(x_clean)
        expected = (len(x_noisy), self.flow.token_shape[0], self.encoder.dim)
        if targets.shape != expected:
            raise InputError(f"targets must have the shape {list(expected)}, got {list(targets.shape)}")
        targets = put(targets, x_noisy.device)
        targets = targets.float() if targets.dtype != x_noisy.dtype else targets
        unit = F.normalize(spatially_normalized(targets) if self.spatial_norm else targets, dim=-1)

        def align(hidden: dict[tuple[int, int], Tensor]) -> Tensor:
            # every pair has as many patches, so the mean over pairs of means is the mean over all
            h = torch.stack([hidden[pair] for pair in self.at])
            return -(F.normalize(self.projector(h).to(unit.dtype), dim=-1) * unit).sum(-1).mean()

        flow, taken = self.flow, {}
        if self.strategy == "forward" or not torch.is_grad_enabled():  # the numbers are the same in all strategies
            nll, l_align = gradients.forward(flow, x_noisy, y, self.at, align, self.to_input)
        elif self.strategy == "reverse" and self.gradient == "sequential":
            nll, l_align = gradients.sequential(flow, x_noisy, y, self.at, align)
        else:
            terms, tolerance = self._adjoint(x_noisy.dtype)
            nll, l_align, taken = gradients.isolated(flow, x_noisy, y, self.at, align, terms, tolerance)
        parts: dict[str, Any] = {"nll": nll.detach(), "align": l_align.detach()}
        if taken:
            parts["terms"] = taken
        return nll + self.weight * l_align, parts

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """`loss`, under the name that wrappers such as DDP call."""
        return self.loss(*args, **kwargs)

    def _adjoint(self, dtype: torch.dtype) -> tuple[int | None, float]:
        """How far the adjoint is solved: the number of terms after the first (None: detach), and the tolerance."""
        if self.strategy == "detach" or self.gradient == "cached":
            return None, 0.0
        if self.gradient == "exact":
            default = 1e-12 if dtype == torch.float64 else 1e-3
            return self.flow.token_shape[0] - 1, default if self.tolerance is None else self.tolerance
        terms = 0 if self.gradient == "one_step" else int(self.gradient)
        return min(terms, self.flow.token_shape[0] - 1), 0.0  # all further terms are zero
