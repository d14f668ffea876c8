"""What a student learns from a frozen flow f, one loss a method (`flowback.flow.student`).

All take clean images x, their noised copies x + e as the flow was trained with, labels (-1 where dropped), and numbers that
the batch drew. A student makes clean images: the flow's own z of a *noised* image stands for the *clean* one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowback.core.devices import autocast
from flowback.encoders import Carrier, Encoder, match_grid
from flowback.flow.student import Student
from flowback.flow.tarflow import TarFlow

LOCATION, SCALE = -0.2, 1.0  # of the logit-normal times of flow matching (arXiv 2603.09014)
SOFTEST = 1e-2  # squared errors below this lose weight


class Objective(Carrier):
    """What the methods share. The flow is frozen, and no submodule.

    Args:
        flow: f, in its own space.
        student: what is trained.
    """

    parts: tuple[str, ...]  # names of what `forward` returns besides the loss

    def __init__(self, flow: TarFlow, student: Student) -> None:
        super().__init__()
        self.flow: TarFlow
        self.carry("flow", flow)
        self.student = student


class FlowMatching(Objective):
    """`|g(x_t, t, y) - (z - x)|^2` with `x_t = (1 - t) x + t z`, `z = f(x + e) / sigma` (NFM, arXiv 2603.09014).

    z is the flow's own of that image, so that x and z belong together and paths are straighter than with independent noise,
    which a student of `noise` "independent" has (the control: rectified flow, arXiv 2209.03003).
    """

    parts = ("velocity",)

    def forward(
        self,
        x: Tensor,
        levels: Tensor,
        noised: Tensor | None = None,
        noise: Tensor | None = None,
        y: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its value as a part.

        Args:
            x: clean images as the flow sees them, `[B, *data_shape]`.
            levels: uniform in [0, 1), `[B]`; the times are made of them.
            noised: the same images with the noise of the flow's training, whose z is taken.
            noise: or else standard normal numbers, `[B, N, D]`.
            y: labels `[B]`, -1 for none; or None.
        """
        z, tokens = noise, self.flow.tokenize(x)
        if noised is not None:
            with torch.no_grad():
                z = self.flow.encode(noised, y)[0] / self.student.z_std
        assert z is not None
        t = torch.sigmoid(LOCATION + SCALE * torch.special.ndtri(levels.clamp(1e-6, 1 - 1e-6)))
        at = t[:, None, None]
        v, _, _ = self.student((1 - at) * tokens + at * z, t, self.flow.class_weights(y, len(x)))
        loss = (v - (z - tokens)).square().mean()
        return loss, {"velocity": loss.detach()}


class Inverse(Objective):
    """z to the clean image in one pass, with states matched to the flow's own on its way (BiFlow, arXiv 2512.10953).

    Head i predicts the state before the flow's block T - i + 1, normalized; what comes after the last head removes the
    noise. An error e (the mean square over an image) counts as `e / (e + 0.01)` with a constant denominator, so that none
    outweighs the others.

    Guidance is inside the pass: half of the labelled images get a scale w, uniform up to `guidance`, and targets that are
    moved by `w (g(z, y, 0) - g(z, -, 0))`, the difference that a label makes to the student as it is.

    Args:
        flow: f.
        student: what is trained.
        guidance: the largest w; 0 for none.
        encoder: whose features of images are compared, where they have a weight.
        features: weight of their relative squared error between result and clean image (perceptual), of unguided rows.
        align: weight of minus the cosine between them and the projected hidden state in the middle.
        projector: from hidden states to features, where they are aligned.
        to_images: what the flow sees as images `[B, C, H, W]`.
        precision: of the encoder, 32-true or bf16-mixed.
    """

    parts = ("image", "states", "features", "align")

    def __init__(
        self,
        flow: TarFlow,
        student: Student,
        guidance: float = 0.0,
        encoder: Encoder | None = None,
        features: float = 0.0,
        align: float = 0.0,
        projector: nn.Module | None = None,
        to_images: Callable[[Tensor], Tensor] = lambda x: x,
        precision: str = "32-true",
    ) -> None:
        super().__init__(flow, student)
        self.encoder: Any
        self.carry("encoder", encoder)
        self.guidance, self.features, self.align = guidance, features, align
        self.projector, self.to_images, self.precision = projector, to_images, precision

    def forward(
        self, x: Tensor, levels: Tensor, noised: Tensor, y: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and mean squared errors as parts.

        Arguments are those of `FlowMatching`, and `targets [B, N, F]`: what `features_of` finds in the clean images, where
        there is an encoder. The guidance is made of `levels`.
        """
        flow, student, classes = self.flow, self.student, self.flow.class_weights(y, len(x))
        assert student.state_std is not None
        with torch.no_grad():
            z, _, trace = flow.encode(noised, y, trace=())
            states = [x / std for x, std in zip(reversed(trace.inputs.values()), student.state_std, strict=True)]
            z, goals = z / student.z_std, [flow.tokenize(x), *states]
            w = self.guidance * (2 * levels - 1).clamp(min=0)
            w = torch.zeros_like(w) if y is None else torch.where(y < 0, 0, w)
            if self.guidance and classes is not None:
                both = torch.cat([classes, torch.full_like(classes, 1 / classes.shape[1])])
                image, predicted, _ = student(z.repeat(2, 1, 1), w.new_zeros(2 * len(w)), both, with_states=True)
                pairs = [found.chunk(2) for found in (image, *predicted)]
                goals = [
                    goal + w[:, None, None] * (labelled - unlabelled)
                    for goal, (labelled, unlabelled) in zip(goals, pairs, strict=True)
                ]
        image, predicted, hidden = student(z, w / (1 + w), classes, with_states=True)
        errors = torch.stack([(f - goal).square().mean((1, 2)) for f, goal in zip((image, *predicted), goals, strict=True)])
        terms = [(errors / (errors.detach() + SOFTEST)).mean(1).sum()]
        parts = {"image": errors[0].mean(), "states": errors[1:].mean()}
        if self.encoder is not None:
            assert targets is not None
            targets = targets.to(x.dtype)
            if self.features:
                with autocast(image.device, self.precision):
                    drawn = self.to_images(flow.to_grid(image.to(x.dtype)))
                    found = features_of(self.encoder, flow, drawn).to(targets.dtype)
                error = (found - targets).square().sum((1, 2)) / targets.square().sum((1, 2))
                parts["features"] = torch.where(w > 0, 0, error).mean()
                terms.append(self.features * parts["features"])
            if self.projector is not None:
                middle = self.projector(hidden[len(hidden) // 2]).to(targets.dtype)
                parts["align"] = -F.cosine_similarity(middle, targets, dim=-1).mean()
                terms.append(self.align * parts["align"])
        return torch.stack(terms).sum(), {name: part.detach() for name, part in parts.items()}


class Denoising(Objective):
    """`|g(x + e, y) - (D(x + e) - (x + e)) / sigma|^2`: the flow's score step D (`TarFlow.denoise`) in a pass forward."""

    parts = ("score",)

    def forward(self, x: Tensor, noised: Tensor, y: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its value as a part; arguments as of `FlowMatching`."""
        flow = self.flow
        wanted = flow.tokenize(flow.denoise(noised, y, len(noised)) - noised) / flow.config.noise_std
        found = self.student.correction(flow.tokenize(noised), flow.class_weights(y, len(x)))
        loss = (found - wanted).square().mean()
        return loss, {"score": loss.detach()}


def features_of(encoder: Encoder, flow: TarFlow, images: Tensor) -> Tensor:
    """An encoder's features of images `[B, C, H, W]` on the flow's grid, `[B, N, F]`."""
    return match_grid(encoder(images), encoder.grid, flow.grid)


LESSONS: dict[str, type[Objective]] = {"flow_matching": FlowMatching, "inverse": Inverse, "denoiser": Denoising}


@torch.no_grad()
def measure(flow: TarFlow, student: Student, noised: Tensor, y: Tensor | None) -> None:
    """Take into a student the standard deviation of the flow's z, and of its states, of some noised images `[n, …]`."""
    z, _, trace = flow.encode(noised, y, trace=())
    if student.lesson.noise == "flow":
        student.z_std.copy_(z.std())
    if student.state_std is not None:
        student.state_std.copy_(torch.stack([x.std() for x in reversed(trace.inputs.values())]))
