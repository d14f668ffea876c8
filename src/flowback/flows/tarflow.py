"""TarFlow: a stack of autoregressive blocks with alternating token order (TARFlow, arXiv 2412.06329).

`x = x^0 -> x^1 -> ... -> x^T = z`, block t maps `x^(t-1)` to `x^t`, and the log-determinants add up. The public API speaks
images `[B, C, H, W]` in [-1, 1], noise `z [B, N, D]` and nats summed per image; blocks and layers count from 1.

A flow with an autoencoder models its latents: there `sample` and `classify` still speak images, and everything else the
latents, `x [B, *data_shape]`, to which `to_data` leads, and from which `to_images`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from flowback.devices import pick_device, put
from flowback.errors import InputError
from flowback.flows.block import BlockOutput, FlowBlock
from flowback.flows.calibration import Calibration, choose
from flowback.flows.config import FlowConfig
from flowback.flows.decoders import DECODERS, CausalMap, Solved, Solver, default_tolerance, solve
from flowback.flows.guidance import Guidance
from flowback.flows.patches import patchify, unpatchify
from flowback.flows.pretrained import load_standards, load_tensors, pretrained_folder, read_config, save_folder
from flowback.seeds import Generators, draw
from flowback.units import LOG_2PI, bin_width


@dataclass
class Trace:
    """What `encode` saw on its way, on the graph: `inputs[t]` is `x^(t-1)`, `hidden[t, l]` the state after layer l."""

    inputs: dict[int, Tensor] = field(default_factory=dict)  # t -> [B, N, D]
    hidden: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (t, l) -> [B, N, width]


class TarFlow(nn.Module):
    """A transformer autoregressive flow over images.

    Args:
        **options: the fields of `FlowConfig`. `image_size` is required; channels default to 3, classes to none,
            levels to 256.

    Raises:
        InputError: if an option does not exist or has an impossible value.

    Example:
        >>> import torch
        >>> flow = TarFlow(image_size=8, channels=1, patch_size=2, width=32, blocks=2, layers=1, num_classes=10)
        >>> x = torch.rand(5, 1, 8, 8) * 2 - 1
        >>> z, log_det = flow.encode(x, torch.tensor([0, 3, -1, 9, 1]))
        >>> z.shape, log_det.shape
        (torch.Size([5, 16, 4]), torch.Size([5]))
        >>> flow.sample(y=torch.tensor([3, 3]), guidance=1.0).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = [f.name for f in fields(FlowConfig)]
        for name in options:
            if name not in known:
                raise InputError(f"TarFlow has no option {name!r}; allowed: {', '.join(known)}")
        if options.get("image_size") is None:
            raise InputError("TarFlow needs image_size, the side of its images in pixels")
        for name, default in (("channels", 3), ("num_classes", 0), ("levels", 256)):
            if options.get(name) is None:
                options[name] = default
        if options.get("autoencoder") is not None:
            from flowback.latents import facts

            options = facts(options) | {name: value for name, value in options.items() if value is not None}
        self.config = c = FlowConfig(**options)
        self.image_size: int = options["image_size"]
        self.channels: int = options["channels"]
        self.num_classes: int = options["num_classes"]
        self.levels: int = options["levels"]
        channels, size = self.channels, self.image_size
        if c.autoencoder is not None:
            channels, size = options["latent_channels"], size // options["latent_downsample"]
        self.data_shape = (channels, size, size)  # of what the flow sees: images, or latents
        side = size // c.patch_size
        self.grid = (side, side)
        self.token_shape = (side * side, channels * c.patch_size**2)  # N, D
        self.prior_std: Tensor | None
        self.register_buffer("prior_std", torch.ones(self.token_shape) if c.prior == "scaled" else None)
        self.calibration: Calibration | None = None  # which decoder suits which block on this machine
        self._autoencoder: Any = None  # `flowback.latents.Autoencoder`, from when it is first needed
        self.standards: Any = None  # of classification, `flowback.classify.Standards`
        self.blocks = nn.ModuleList(
            FlowBlock(
                *self.token_shape,
                width=c.width,
                layers=depth,
                head_dim=c.head_dim,
                num_classes=self.num_classes,
                flip=t % 2 == 1,
                mlp=c.mlp,
                mlp_ratio=c.mlp_ratio,
                positions=c.positions,
                log_scale_bound=c.log_scale_bound,
            )
            for t, depth in enumerate(c.depths)
        )

    @property
    def dims(self) -> int:
        """Numbers in an image, or in its latents, `N D`."""
        return self.token_shape[0] * self.token_shape[1]

    # ---- where it is ----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are. What enters is moved there, and what comes out is there."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    @property
    def data_dtype(self) -> torch.dtype:
        """Of images, z and likelihoods: as the parameters, but at least float32, since sums of them need it."""
        return torch.promote_types(self.dtype, torch.float32)

    def enter(self, x: Tensor) -> Tensor:
        """Images or z where the flow is, in the precision it computes them in."""
        return put(x, self.device).to(self.data_dtype)

    def _apply(self, *args: Any, **kwargs: Any) -> "TarFlow":
        super()._apply(*args, **kwargs)
        if self._autoencoder is not None:
            self._autoencoder.model.to(self.device)
        return self

    # ---- images and what the flow sees of them ------------------------------------------------------------------

    @property
    def autoencoder(self) -> Any:
        """The autoencoder of a flow in latents, `flowback.latents.Autoencoder`, where the flow is; None in pixels.

        Raises:
            InputError: if it cannot be had, or its weights are not those that the flow was trained with.
        """
        if self._autoencoder is None and self.config.autoencoder is not None:
            from flowback.latents import load_autoencoder

            self._autoencoder = load_autoencoder(self.config, self.device)
        return self._autoencoder

    def to_data(self, images: Tensor, generator: Generators = None) -> Tensor:
        """Images `[B, C, H, W]` in [-1, 1] as the flow sees them, `[B, *data_shape]`: unchanged, or their latents.

        `generator`, one for all images or one for each, is the source of noise where latents are samples.
        """
        images = self.enter(images)
        return images if self.autoencoder is None else self.autoencoder.encode(images, generator)

    def to_images(self, x: Tensor) -> Tensor:
        """What the flow sees, `[B, *data_shape]`, as images `[B, C, H, W]`, nearly in [-1, 1]; in chunks."""
        return x if self.autoencoder is None else self.autoencoder.decode(self.enter(x))

    def to_prior(self, noise: Tensor) -> Tensor:
        """Standard normal numbers `[..., N, D]` as z of the prior: unchanged, or scaled."""
        return noise if self.prior_std is None else noise * self.prior_std

    # ---- pieces -------------------------------------------------------------------------------------------------

    def tokenize(self, x: Tensor) -> Tensor:
        """Images (or latents) `[B, *data_shape]` to `x^0 [B, N, D]`.

        Raises:
            InputError: if they are of another shape than the flow's.
        """
        if x.dim() != 4 or x.shape[1:] != self.data_shape:
            what = "images" if self.config.autoencoder is None else "latents"
            allowed = ", ".join(map(str, self.data_shape))
            raise InputError(f"{what} of shape {list(x.shape)} do not fit; allowed is [B, {allowed}]")
        return patchify(self.enter(x), self.config.patch_size)

    def class_weights(self, y: Tensor | Sequence[int] | None, batch: int) -> Tensor | None:
        """Labels as weights of the class embeddings, `[B, K]`: one-hot, or the mean where there is no label.

        Labels on an accelerator are not checked, because the host would wait for them: one that is out of range gives
        weights, and so results, that are not numbers.

        Args:
            y: labels `[B]` with -1 for none; or weights `[B, K]`, which pass unchanged; or None, no label at all.
            batch: B.

        Raises:
            InputError: if a label is out of range, or `y` has another length than the batch.
        """
        K = self.num_classes
        if y is None:
            return torch.full((batch, K), 1 / K, dtype=self.data_dtype, device=self.device) if K else None
        y = torch.as_tensor(y)
        if y.is_floating_point():
            if y.shape != (batch, K):
                raise InputError(f"class weights of shape {list(y.shape)} do not fit; allowed is [{batch}, {K}]")
            return self.enter(y)
        y = y.expand(batch) if y.dim() == 0 else y
        if y.shape != (batch,):
            raise InputError(f"labels of shape {list(y.shape)} do not fit {batch} images; allowed is [{batch}]")
        if y.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_labels(y)
        if not K:
            return None
        y = put(y, self.device)[:, None]
        one_hot = (y == torch.arange(K, device=self.device)).to(self.data_dtype)
        weights = torch.where(y == -1, 1 / K, one_hot)
        return weights if y.device.type == "cpu" else torch.where((y < -1) | (y >= K), math.nan, weights)

    def _check_labels(self, y: Tensor) -> None:
        low, high = (int(y.min()), int(y.max())) if len(y) else (-1, -1)
        if low < -1 or high >= self.num_classes:
            allowed = f"0 to {self.num_classes - 1}, or -1 for no label"
            allowed = allowed if self.num_classes else "only -1 or None, since the flow is unconditional"
            raise InputError(f"label {low if low < -1 else high} is out of range; allowed: {allowed}")

    def check_pairs(self, pairs: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
        """(block, layer) pairs, both counted from 1, as a sorted list without repeats.

        Raises:
            InputError: if a block or layer does not exist.
        """
        depths = self.config.depths
        checked = set()
        for pair in pairs:
            if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(n, int) for n in pair):
                raise InputError(f"{pair!r} is not a pair of block and layer; allowed are whole numbers, like [4, 2]")
            t, layer = pair
            if not 1 <= t <= len(depths):
                raise InputError(f"block {t} does not exist; allowed: 1 to {len(depths)}")
            if not 1 <= layer <= depths[t - 1]:
                raise InputError(f"layer {layer} does not exist in block {t}; allowed: 1 to {depths[t - 1]}")
            checked.add((t, layer))
        return sorted(checked)

    def run_blocks(
        self, x: Tensor, y: Tensor | None, at: Iterable[tuple[int, int]] = (), isolate_from: int | None = None
    ) -> Iterator[tuple[int, Tensor, BlockOutput]]:
        """Encode block by block, yielding `(t, x^(t-1), output of block t)` for t = 1 … T.

        Args:
            x: images `[B, C, H, W]`.
            y: labels, as in `encode`.
            at: (block, layer) pairs whose hidden states the outputs carry.
            isolate_from: blocks from this one on take a detached input, which requires a gradient of its own.
        """
        classes = self.class_weights(y, x.shape[0])  # not len(x), which exporting would take for a constant
        tokens = self.tokenize(x)
        at = list(at)
        for t, block in enumerate(self.blocks, start=1):
            if isolate_from is not None and t >= isolate_from:
                tokens = tokens.detach().requires_grad_()
            out = block(tokens, classes, hidden=[layer for b, layer in at if b == t])
            yield t, tokens, out
            tokens = out.z

    # ---- density ------------------------------------------------------------------------------------------------

    @overload
    def encode(self, x: Tensor, y: Tensor | None = None, trace: None = None) -> tuple[Tensor, Tensor]: ...
    @overload
    def encode(
        self, x: Tensor, y: Tensor | None = None, *, trace: Iterable[Sequence[int]]
    ) -> tuple[Tensor, Tensor, Trace]: ...
    def encode(
        self, x: Tensor, y: Tensor | None = None, trace: Iterable[Sequence[int]] | None = None
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Trace]:
        """Map images to noise.

        Args:
            x: images `[B, C, H, W]` in [-1, 1].
            y: labels `[B]`, -1 for no label; or class weights `[B, K]`; or None.
            trace: (block, layer) pairs; if given, a `Trace` is returned as well.

        Returns:
            `z [B, N, D]`; `log_det [B]`, nats, summed over the image; and the trace, if asked for.

        Raises:
            InputError: if shapes, labels, blocks or layers do not fit the flow.
        """
        record, log_dets, z = Trace(), [], x
        for t, tokens, out in self.run_blocks(x, y, self.check_pairs(trace or ())):
            record.inputs[t] = tokens
            record.hidden.update({(t, layer): h for layer, h in out.hidden.items()})
            log_dets.append(out.log_det)
            z = out.z
        log_det = torch.stack(log_dets).sum(0)
        return (z, log_det) if trace is None else (z, log_det, record)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`encode` without a trace."""
        return self.encode(x, y)

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Log-density `[B]`, nats, of images `x` on the [-1, 1] scale, under the density that samples are drawn from.

        That is a density of *noised* images (`perturb`); `flowback.units.bits_per_dim` says what bits need.
        """
        z, log_det = self.encode(x, y)
        if self.prior_std is not None:
            z, log_det = z / self.prior_std, log_det - self.prior_std.log().sum()
        return -0.5 * (z.square() + LOG_2PI).sum(dim=(1, 2)) + log_det

    def perturb(self, x: Tensor, generator: Generators = None) -> Tensor:
        """Add the noise of training to clean images or latents: Gaussian of `noise_std`, or uniform over a pixel's bin."""
        if self.config.noise == "uniform":
            return self.dequantise(x, generator)
        x = self.enter(x)
        return x + self.config.noise_std * draw(torch.randn, x, generator)

    def dequantise(self, x: Tensor, generator: Generators = None) -> Tensor:
        """Spread clean images uniformly over the bins of their pixel values (`flowback.units`).

        Raises:
            InputError: if the flow sees latents, which have no bins.
        """
        if self.config.autoencoder is not None:
            raise InputError("latents have no bins to be spread over; allowed is a flow of pixels")
        x = self.enter(x)
        return x + bin_width(self.levels) * (draw(torch.rand, x, generator) - 0.5)

    # ---- generation ---------------------------------------------------------------------------------------------

    def decode(
        self,
        z: Tensor,
        y: Tensor | None = None,
        guidance: float | Guidance = 0.0,
        method: str | Sequence[str] = "auto",
        tolerance: float | None = None,
        known: tuple[Tensor, Tensor] | None = None,
        compile: bool = False,
    ) -> Tensor:
        """Map noise to images; without guidance the inverse of `encode`.

        Args:
            z: `[B, N, D]`; it is not written to.
            y: labels, as in `encode`.
            guidance: scale, or a `Guidance`. It needs labels, and conditional and unconditional run as one batch.
            method: "sequential", "jacobi", "gauss_seidel", or "auto", which takes for each block what `calibrate`
                measured as fastest; or one of them for each block, block 1 first (`flowback.flows.decoders`).
            tolerance: update at which the parallel methods stop; None for 1e-5 in float32, 1e-10 in float64.
            known: images `[B, C, H, W]` and, as booleans, which of their pixels block 1 is given instead of decoding
                them: every other pixel then follows from them as the model has it (`flowback.editing.inpaint`).
            compile: compile the passes with torch.compile, on CUDA as graphs: pays from the second batch of a shape on.
                Needs a C++ compiler on CPUs.

        Returns:
            Images `[B, C, H, W]`.

        Raises:
            InputError: if shapes or labels do not fit, the method does not exist, or an unconditional flow is guided.
        """
        return self.decode_with_report(z, y, guidance, method, tolerance, known, compile)[0]

    def decode_with_report(
        self,
        z: Tensor,
        y: Tensor | None = None,
        guidance: float | Guidance = 0.0,
        method: str | Sequence[str] = "auto",
        tolerance: float | None = None,
        known: tuple[Tensor, Tensor] | None = None,
        compile: bool = False,
    ) -> tuple[Tensor, list[Solved]]:
        """`decode`, and how each block was decoded, block 1 first, with its residual."""
        if z.dim() != 3 or z.shape[1:] != self.token_shape:
            N, D = self.token_shape
            raise InputError(f"z of shape {list(z.shape)} does not fit; allowed is [B, {N}, {D}]")
        z = self.enter(z)
        guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        if guidance.scale and not self.num_classes:
            raise InputError(f"guidance {guidance.scale} needs a class-conditional flow; allowed here: 0")
        if tolerance is not None and not 0 < tolerance < float("inf"):
            raise InputError(f"tolerance {tolerance} is not usable; allowed is a number above 0")
        tolerance = tolerance or default_tolerance(self.dtype, self.device)
        classes = self.class_weights(y, len(z))
        if guidance.scale and classes is not None:
            classes = torch.cat([classes, torch.full_like(classes, 1 / self.num_classes)])
        solvers = self.solvers(method, len(z) if not guidance.scale else 2 * len(z))
        given = None if known is None else self._known_tokens(*known, batch=len(z))
        tokens, report = z, []
        for t in range(self.config.blocks, 0, -1):
            block: Any = self.blocks[t - 1]
            F = CausalMap(block, tokens, classes, guidance, given if t == 1 else None, compile)
            tokens, solved = solve(F, solvers[t - 1], tolerance)
            report.insert(0, solved)
        return unpatchify(tokens, self.config.patch_size, self.data_shape[-1]), report

    def _known_tokens(self, x: Tensor, where: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        tokens = self.tokenize(x)
        if len(x) != batch or where.dtype != torch.bool:
            raise InputError(f"{len(x)} known images, their places as {where.dtype}; allowed: {batch}, and booleans")
        return tokens, patchify(put(where, self.device).expand_as(x), self.config.patch_size)

    def solvers(self, method: str | Sequence[str], rows: int) -> list[Solver]:
        """The solver of each block, block 1 first, for `method` as in `decode`; `rows` are images, twice if guided.

        Raises:
            InputError: if a method does not exist, or their number is not that of the blocks.
        """
        names = [method] * self.config.blocks if isinstance(method, str) else list(method)
        for name in names:
            if name != "auto" and name not in DECODERS:
                raise InputError(f"decoding method {name!r} does not exist; allowed: auto, {', '.join(DECODERS)}")
        if len(names) != self.config.blocks:
            raise InputError(
                f"{len(names)} decoding methods were given; allowed: one, or {self.config.blocks}, one a block"
            )
        automatic = choose(self, rows) if "auto" in names else []
        return [automatic[i] if name == "auto" else Solver(name) for i, name in enumerate(names)]

    def denoise(self, x: Tensor, y: Tensor | None = None, batch_size: int = 64) -> Tensor:
        """Remove the training noise by one score step, `x + sigma^2 grad_x log p(x)` (Tweedie; TARFlow, eq. 8).

        The score is of the density that was trained, whose prior is N(0, I); a scaled one came after.

        Args:
            x: noisy images `[B, C, H, W]`.
            y: labels, as in `encode`.
            batch_size: images that one backward pass takes; bounds the memory.
        """
        if self.config.noise != "gaussian" or not self.config.noise_std:
            return self.enter(x).detach().clone()
        x, classes = self.enter(x), self.class_weights(y, len(x))
        parts = []
        for start in range(0, len(x), batch_size):
            with torch.inference_mode(False), torch.enable_grad():
                weights = None if classes is None else classes[start : start + batch_size].clone()
                part = x[start : start + batch_size].detach().clone().requires_grad_()
                z, log_det = self.encode(part, weights)
                (score,) = torch.autograd.grad((log_det - 0.5 * z.square().sum(dim=(1, 2))).sum(), part)
            parts.append(part.detach() + self.config.noise_std**2 * score)
        return torch.cat(parts) if parts else x.detach().clone()

    @torch.no_grad()
    def sample(
        self,
        y: Tensor | Sequence[int] | int,
        guidance: float | Guidance = 0.0,
        temperature: float = 1.0,
        denoise: bool = True,
        generator: torch.Generator | None = None,
        method: str | Sequence[str] = "auto",
        batch_size: int = 64,
        return_log_prob: bool = False,
        compile: bool = False,
    ) -> Any:
        """Draw images.

        Args:
            y: labels `[B]` (-1 for none), or a count: then labels are drawn uniformly, if the flow has any.
            guidance: scale, or a `Guidance`; 0 for none.
            temperature: standard deviation of z, as a multiple of the prior's.
            denoise: whether the score step removes the training noise (Gaussian noise only).
            generator: source of z and of drawn labels; the images do not depend on `batch_size` but to rounding.
            method: as in `decode`.
            batch_size: images decoded at once; bounds the memory.
            return_log_prob: also return `log p(x | y) [B]`, nats, of the images before the score step.
            compile: as in `decode`.

        Returns:
            Images `[B, C, H, W]`, nearly in [-1, 1], whatever the flow sees; with `return_log_prob` a pair.

        Raises:
            InputError: if a label, the count, the temperature or the guidance is impossible.
        """
        if not 0 < temperature < float("inf"):
            raise InputError(f"temperature {temperature} is not usable; allowed is a number above 0")
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size} is not usable; allowed is a whole number of at least 1")
        if isinstance(y, Tensor) and y.dim() == 0:
            y = int(y)
        if isinstance(y, Integral):
            y = int(y)
            if y < 1:
                raise InputError(f"{y} samples cannot be drawn; allowed is a whole number of at least 1")
            source = generator.device if generator is not None else self.device
            y = torch.randint(self.num_classes, (y,), generator=generator, device=source) if self.num_classes else [-1] * y
        labels = torch.as_tensor(y)
        if not len(labels):
            raise InputError("no labels were given; allowed is at least one, or a count")
        empty = torch.empty(len(labels), *self.token_shape, dtype=self.data_dtype, device=self.device)
        z = temperature * self.to_prior(draw(torch.randn, empty, generator))
        images, log_probs = [], []
        for z_part, y_part in zip(z.split(batch_size), labels.split(batch_size), strict=True):
            x = self.decode(z_part, y_part, guidance, method, compile=compile)
            if return_log_prob:
                log_probs.append(self.log_prob(x, y_part))
            images.append(self.to_images(self.denoise(x, y_part, batch_size) if denoise else x))
        x = torch.cat(images)
        return (x, torch.cat(log_probs)) if return_log_prob else x

    # ---- classification -----------------------------------------------------------------------------------------

    def classify(self, x: Tensor, rule: str | None = None, draws: int = 1, batch_size: int = 256) -> Tensor:
        """Scores `[B, K]` of clean images, larger is likelier, without any training: see `flowback.classify`.

        `rule` is None for `shortlist_3`, or for `single_gradient` where the flow has no standards yet.
        """
        from flowback.classify import classify, default_rule

        return classify(self, self.to_data(x), rule=rule or default_rule(self), draws=draws, batch_size=batch_size)

    # ---- on disk ------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and, where calibrated, `decoding.json` into the folder `path`."""
        save_folder(self, Path(path))

    def push_to_hub(self, repo_id: str, private: bool = False, token: str | None = None) -> str:
        """Upload the flow to the Hugging Face hub as `owner/name`, with a model card of what the flow itself says.

        `flowback export` writes a fuller card, of what the flow's run knows.

        Args:
            repo_id: made if it is not there.
            private: make it private.
            token: None for the one of `hf auth login` or HF_TOKEN.

        Returns:
            The address of the repository.

        Raises:
            InputError: if the name is not usable, or the hub did not take it.
        """
        from flowback.evaluation.card import push_to_hub

        return push_to_hub(self, repo_id, private, token)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, device: torch.device | str = "cpu") -> "TarFlow":
        """Load a flow from a folder written by `save_pretrained`, or from the Hugging Face hub by `owner/name`.

        Args:
            path_or_hub_id: the folder, or the name.
            device: where to put it; "auto" for the accelerator that is there, or else the CPU.

        Returns:
            The flow in eval mode, in the precision that it was saved in, but at least float32.

        Raises:
            InputError: if there is no such folder, hub entry or device, or what is there is not a whole flow.
        """
        where = pick_device(device)
        folder = pretrained_folder(str(path_or_hub_id))
        config = read_config(folder)
        if (folder / "autoencoder").is_dir():  # that travels with the flow
            config["autoencoder"] = str(folder / "autoencoder")
        flow = cls(**config)
        load_tensors(flow, folder / "model.safetensors")
        flow.calibration = Calibration.load(folder)
        flow.standards = load_standards(folder, flow.num_classes)
        return flow.eval().to(where)
