"""TarFlow: a stack of autoregressive blocks (`flowback.flow.stack`) that draws (TARFlow, arXiv 2412.06329)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.seeds import Generators, draw
from flowback.flow import io
from flowback.flow.config import FlowConfig
from flowback.flow.defaults import Defaults
from flowback.flow.guidance import Guidance, checked
from flowback.flow.labels import Labels, as_tensor, to_draw
from flowback.flow.stack import Stack
from flowback.flow.student import SAMPLERS, Student


class TarFlow(io.Pretrained, Stack):
    """A transformer autoregressive flow over images.

    Args:
        config: the options; or give them as keywords. `image_size` is required. `channels` defaults to 3, `num_classes`
            to 0 (unconditional), `levels` to 256.
        **options: fields of `FlowConfig`.

    Raises:
        InputError: if an option does not exist or has an impossible value.

    Example:
        >>> import torch
        >>> flow = TarFlow(image_size=8, channels=1, patch_size=2, width=32, blocks=2, layers=1, num_classes=10)
        >>> x = torch.rand(5, 1, 8, 8) * 2 - 1
        >>> z, log_det = flow.encode(x, [0, 3, -1, 9, 1])
        >>> z.shape, log_det.shape
        (torch.Size([5, 16, 4]), torch.Size([5]))
        >>> flow.sample(y=[3, 7], guidance=1.0).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: FlowConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.defaults = Defaults()  # of drawing; `flowback sweep` chooses them
        self.learned: dict[str, Student] = {}  # "student" and "denoiser", if they were distilled; no submodules
        self.folder: Path | None = None  # where the flow was loaded from

    @property
    def core(self) -> "TarFlow":
        """The flow in its own space: itself (compare `LatentFlow.core`)."""
        return self

    def to_data(self, images: Tensor, generator: Generators = None) -> Tensor:
        """Images as the flow sees them; here unchanged (compare `LatentFlow.to_data`)."""
        return self.enter(images)

    def to_images(self, x: Tensor) -> Tensor:
        """What the flow sees as images; here unchanged (compare `LatentFlow.to_images`)."""
        return x

    def draw_z(
        self,
        noise: Tensor,
        y: Labels = None,
        temperature: float = 1.0,
        prior: str | None = None,
        sampler: str = "exact",
    ) -> Tensor:
        """Standard normal `noise [B, ..., N, D]`, for each image any number of draws, as z that images are decoded from.

        Args:
            noise: on the flow's device.
            y: labels, as in `encode`.
            temperature: standard deviation of z, as a multiple of the prior's.
            prior: "standard", that of the training, or "fitted" (`fitted_prior`); None for the standard one.
            sampler: what makes images of z. A student gets z with the deviation that it learned from, where the prior is
                the standard one; a student of independent noise gets that, whatever the prior.

        Raises:
            InputError: if the temperature is impossible, or there is no such prior or sampler.
        """
        if sampler not in SAMPLERS:
            raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
        student = self.taught() if sampler == "student" else None
        if student is not None and student.lesson.noise == "independent":
            return temperature * noise
        fitted = self._fitted(prior)
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature must be above 0 and finite, got {temperature}")
        if fitted is None:
            z = temperature * self.to_prior(noise)
            return z if student is None else student.z_std * z
        return fitted.to_z(noise, self.class_weights(y, len(noise)), temperature)

    def to_noise(
        self,
        z: Tensor,
        y: Labels = None,
        temperature: float = 1.0,
        prior: str | None = None,
        sampler: str = "exact",
    ) -> Tensor:
        """The inverse of `draw_z`."""
        fitted = self._fitted(prior)
        if fitted is None or (sampler == "student" and self.taught().lesson.noise == "independent"):
            return z / self.draw_z(torch.ones_like(z), y, temperature, "standard", sampler)
        return fitted.to_noise(z, self.class_weights(y, len(z)), temperature)

    @torch.no_grad()
    def sample(
        self,
        num: int | tuple[int, ...] | None = None,
        y: Labels = None,
        *,
        guidance: float | Guidance | None = None,
        temperature: float | None = None,
        prior: str | None = None,
        denoise: bool | str | None = None,
        sampler: str = "exact",
        steps: int | None = None,
        solver: str = "euler",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        method: str | Sequence[str] = "auto",
        batch_size: int = 64,
        return_log_prob: bool = False,
        compile: bool = False,
    ) -> Any:
        """Draw images: `sample(8)`, `sample((2, 4))`, `sample(8, y=3)`, `sample(y=[3, 7])`.

        Args:
            num: how many, or a shape; None for as many as there are labels.
            y: labels, as in `encode`. None draws them uniformly, if the flow has any.
            guidance: scale, or a `Guidance`; 0 for none; None for that of `defaults`, where there are labels.
            temperature: standard deviation of z, as a multiple of the prior's; None for that of `defaults`.
            prior: standard or fitted, as in `draw_z`; None for that of `defaults`.
            denoise: whether the score step removes the training noise; None for yes, where it is Gaussian; "learned" for
                the flow's denoiser in its place. A student's images have none.
            sampler: "exact", which decodes, or "student", which draws in a few passes what `flowback distill` taught it.
            steps: of the student, as in `draft`.
            solver: of the student, as in `draft`.
            seed: of z and of drawn labels; or give a `generator`.
            generator: source of z and of drawn labels.
            method: as in `decode`.
            batch_size: images decoded at once; bounds the memory. The images depend on it by rounding only.
            return_log_prob: also return `log p(x | y)`, nats, of the images before the score step, as `log_prob` has it; of
                the exact sampler only.
            compile: as in `decode`.

        Returns:
            Images `[num, C, H, W]` (for a shape `[*num, C, H, W]`), nearly in [-1, 1]; with `return_log_prob` a pair.

        Raises:
            InputError: if a number, a label, the temperature, the prior or the guidance is impossible, or no student is
                there.
        """
        if denoise not in (None, True, False, "learned"):
            raise InputError(f"denoise must be true, false, learned or None, got {denoise!r}")
        if sampler == "student" and return_log_prob:
            raise InputError(
                "return_log_prob is of images with noise, as the exact sampler draws them; a student's have none"
            )
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if seed is not None and generator is not None:
            raise InputError("give either seed or generator, not both")
        generator = generator if seed is None else torch.Generator().manual_seed(seed)
        shape, y = to_draw(num, y, self.num_classes, generator)
        d, labeled = (
            self.defaults.of(sampler),
            self.num_classes > 0 and bool((as_tensor(y if y is not None else -1) >= 0).any()),
        )
        if guidance is None:
            guidance = Guidance(d.guidance if labeled else 0.0, rule=d.guidance_rule)
        temperature, prior = d.temperature if temperature is None else temperature, prior or d.prior
        empty = torch.empty(*shape, *self.token_shape, dtype=self.data_dtype, device=self.device).flatten(0, -3)
        classes, guidance = self.class_weights(y, len(empty)), checked(guidance, y, self.num_classes, self.config.blocks)
        z = self.draw_z(draw(torch.randn, empty, generator), classes, temperature, prior, sampler)
        images, log_probs = [], []
        for start in range(0, len(z), batch_size):
            rows = slice(start, start + batch_size)
            weights = None if classes is None else classes[rows]
            if sampler == "student":
                images.append(self.draft(z[rows], weights, guidance, steps, solver, compile))
                continue
            x = self.decode(z[rows], weights, guidance, method, compile=compile)
            if return_log_prob:
                log_probs.append(self.log_prob(x, weights))
            images.append(x if denoise is False else self.denoise(x, weights, batch_size, denoise == "learned"))
        x = torch.cat(images).unflatten(0, shape)
        return (x, torch.cat(log_probs).unflatten(0, shape)) if return_log_prob else x

    def draft(
        self,
        z: Tensor,
        y: Labels = None,
        guidance: float | Guidance = 0.0,
        steps: int | None = None,
        solver: str = "euler",
        compile: bool = False,
    ) -> Tensor:
        """Map noise to clean images by the flow's student, in a few passes: what `flowback distill` taught it.

        Args:
            z: `[B, N, D]`.
            y: labels, as in `encode`.
            guidance: scale, or a `Guidance` that is nothing but a scale.
            steps: of flow matching, None for 4; an inverse takes 1.
            solver: euler, or heun, which takes two passes a step, and one in the last.
            compile: compile the network.

        Returns:
            Images `[B, C, H, W]`, nearly in [-1, 1], without the noise of training.

        Raises:
            InputError: if there is no student of these weights, or it cannot draw so.
        """
        student, classes = self.taught(), self.class_weights(y, len(z))
        guidance = checked(guidance, y, self.num_classes, self.config.blocks)
        student.check(guidance, steps, solver)
        return self.to_grid(student.draw(self.enter(z), classes, guidance.scale, steps, solver, compile))

    @property
    def denoises(self) -> bool:
        """Whether samples have noise that is to be removed (compare `LatentFlow.denoises`)."""
        return self.config.noise == "gaussian" and self.config.noise_std > 0

    def denoise(self, x: Tensor, y: Labels = None, batch_size: int = 64, learned: bool = False) -> Tensor:
        """Remove the training noise by one score step, `x + sigma^2 grad_x log p(x)` (Tweedie; TARFlow, eq. 8).

        The score is of the density that was trained, whose prior is N(0, I), also where `prior` is "scaled".

        Args:
            x: noisy images `[B, C, H, W]`.
            y: labels, as in `encode`.
            batch_size: images that a backward pass takes, which bounds the memory.
            learned: take the score that the flow's denoiser learned, in one pass forward.

        Raises:
            InputError: if there is no denoiser of these weights.
        """
        x, parts = self.enter(x).detach(), []
        if not self.denoises:
            return x.clone()
        classes = self.class_weights(y, len(x))
        if learned:
            noise = self.taught("denoiser").correction(self.tokenize(x), classes)
            return x + self.config.noise_std * self.to_grid(noise)
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            with torch.inference_mode(False), torch.enable_grad():
                part = x[rows].clone().requires_grad_()
                z, log_det = self.encode(part, None if classes is None else classes[rows].clone())
                (score,) = torch.autograd.grad((log_det - 0.5 * z.square().sum(dim=(1, 2))).sum(), part)
            parts.append(part.detach() + self.config.noise_std**2 * score)
        return torch.cat(parts) if parts else x.clone()

    @property
    def student(self) -> Student | None:
        """The flow's learned sampler, if one was distilled of it."""
        return self.learned.get("student")

    def taught(self, name: str = "student") -> Student:
        """What was distilled of the flow, a "student" that draws or a "denoiser", on the flow's device.

        Raises:
            InputError: if there is none, or it was distilled of other weights.
        """
        found, again = self.learned.get(name), "flowback distill RUN" + " --method denoiser" * (name == "denoiser")
        if found is None:
            raise InputError(f"this flow has no {name}; {again} makes one")
        if found.stale:
            raise InputError(f"the {name} was distilled of other weights than this flow has; {again} makes another")
        return found.to(self.device, self.data_dtype)

    def resized(self, image_size: int | tuple[int, int]) -> "TarFlow":
        """A copy for images of another size, with the same weights. Rotary positions only.

        Raises:
            InputError: if positions are learned, which belong to a size, or the prior is scaled number by number.
        """
        if self.config.positions != "rotary" or self.config.prior != "standard":
            raise InputError("a flow for another image size needs rotary positions and the standard prior")
        flow = TarFlow(replace(self.config, image_size=image_size)).to(self.device, self.dtype)
        flow.load_state_dict(self.state_dict())
        return flow.train(self.training)
