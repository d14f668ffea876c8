"""Learned samplers: a bidirectional transformer that makes in a few passes what the exact decode makes token by token.

A student works in its flow's own space, on its tokens `[B, N, D]`. What it learned (`flowback.samplers`) is one of three:

    flow_matching   a velocity, along which z is moved to a clean image in any number of steps (NFM, arXiv 2603.09014)
    inverse         the clean image of a z, in one pass (BiFlow, arXiv 2512.10953)
    denoiser        what to take out of a noisy image: the flow's score, without a backward pass

The network is that of DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740): layer norms whose scales and shifts come from a
level and the class, gates that begin at zero. The level is a time from 0 (image) to 1 (z) in flow matching, the guidance w
as `w / (1 + w)` in an inverse, and 0 in a denoiser.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowback.core.errors import InputError
from flowback.core.files import save_tensors, write_whole
from flowback.flow.guidance import Guidance
from flowback.flow.transformer import GeluMLP, products, slow_attention_gradient

METHODS = ("flow_matching", "inverse", "denoiser")
NOISES = ("flow", "independent")
SOLVERS = ("euler", "heun")
SAMPLERS = ("exact", "student")
FORMAT = 1
WEIGHTS = "model.safetensors"
STEPS = 4  # of flow matching, where none are given
FREQUENCIES = 64  # of the embedding of a level
MOST_LAYERS = 512


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The network of a student.

    Args:
        width: of its layers.
        layers: their number; an inverse needs one more than its flow has blocks.
        head_dim: size of an attention head; divides `width`.
        mlp_ratio: hidden size of the MLPs as a multiple of `width`.

    Raises:
        InputError: if a value is impossible.
    """

    width: int = 128
    layers: int = 6
    head_dim: int = 32
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        for name in ("width", "layers", "head_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"student.{name} must be a whole number of at least 1, got {value!r}")
        if self.layers > MOST_LAYERS:
            raise InputError(f"student.layers must be at most {MOST_LAYERS}, got {self.layers}")
        if self.width % self.head_dim:
            raise InputError(f"student.head_dim must divide student.width {self.width}, got {self.head_dim}")
        ratio = self.mlp_ratio
        if not isinstance(ratio, int | float) or not math.isfinite(ratio) or ratio * self.width < 1:
            raise InputError(f"student.mlp_ratio must be a finite number of at least 1/width, got {ratio!r}")


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a student learned, and of what.

    Args:
        method: one of `METHODS`.
        noise: of flow matching: "flow", the flow's own z of an image, or "independent", normal numbers (the control).
        tokens: N of the flow.
        dim: D of the flow.
        classes: K of the flow.
        states: T, the flow's blocks, whose states an inverse was matched to; 0 for none.
        teacher: hash of the flow's weights (`flowback.flow.io.fingerprint`).

    Raises:
        InputError: if there is no such method or noise, or the two do not go together.
    """

    method: str
    tokens: int
    dim: int
    classes: int
    noise: str = "flow"
    states: int = 0
    teacher: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("noise", NOISES)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.noise != "flow" and self.method != "flow_matching":
            raise InputError(f"noise {self.noise} is of flow_matching alone; {self.method} needs the flow's own")


class Layer(nn.Module):
    """Attention of all tokens to all, then an MLP, each with a norm and a gate that the condition sets (adaLN-Zero)."""

    def __init__(self, width: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = width // head_dim
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = GeluMLP(width, mlp_ratio)
        self.condition = _zero(nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """`h [B, N, width]` and the condition `c [B, width]` to `[B, N, width]`."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.condition(c)[:, None].chunk(6, dim=-1)
        q, k, v = self.qkv(self.norm(h) * (1 + scale) + shift).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = (
            products(q, k, v, causal=False) if slow_attention_gradient(q) else F.scaled_dot_product_attention(q, k, v)
        )
        h = h + gate * self.proj(attended.transpose(1, 2).flatten(2))
        return h + gate_mlp * self.mlp(self.norm(h) * (1 + scale_mlp) + shift_mlp)


class Student(nn.Module):
    """The network, and how it draws. Untrained it returns zeros.

    Args:
        config: its sizes.
        lesson: what it learns, and of which flow.

    Raises:
        InputError: if an inverse has too few layers for the states of its flow.
    """

    z_std: Tensor
    state_std: Tensor | None
    weights_file = WEIGHTS

    def __init__(self, config: StudentConfig, lesson: Lesson) -> None:
        super().__init__()
        self.config, self.lesson, c = config, lesson, config
        self.stale = False  # True: the flow that it lies beside has other weights than its teacher had
        if lesson.states >= c.layers:
            raise InputError(
                f"student.layers must be above {lesson.states}, the flow's blocks, for an inverse, got {c.layers}"
            )
        self.proj_in = nn.Linear(lesson.dim, c.width)
        self.position = nn.Parameter(torch.randn(lesson.tokens, c.width) * 0.02)
        self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.class_embed = nn.Parameter(torch.randn(lesson.classes, c.width) * 0.02) if lesson.classes else None
        self.layers = nn.ModuleList(Layer(c.width, c.head_dim, c.mlp_ratio) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, elementwise_affine=False, eps=1e-6)
        self.condition, self.proj_out = _zero(nn.Linear(c.width, 2 * c.width)), _zero(nn.Linear(c.width, lesson.dim))
        self.heads = nn.ModuleList(nn.Linear(c.width, lesson.dim) for _ in range(lesson.states))
        self.register_buffer("z_std", torch.ones(()))  # of the flow's z, which enters divided by it
        stds = torch.ones(lesson.states) if lesson.states else None
        self.register_buffer("state_std", stds)  # of the states x^(T-1), …, x^0, which heads predict

    @property
    def core(self) -> "Student":
        """Itself (compare `LatentFlow.core`)."""
        return self

    @property
    def stored(self) -> nn.Module:
        """What has the weights that are written."""
        return self

    def forward(
        self, x: Tensor, level: Tensor, classes: Tensor | None = None, with_states: bool = False
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One pass.

        Args:
            x: tokens `[B, N, D]`.
            level: `[B]`, from 0 to 1.
            classes: weights of the class embeddings, `[B, K]`; None for an unconditional flow.
            with_states: also return what the heads predict.

        Returns:
            The result `[B, N, D]`; `T` predictions of normalized states, `[B, N, D]` each; and the hidden states
            `[B, N, width]` after every layer.
        """
        h = self.proj_in(x) + self.position
        c = self.level(_waves(level).to(self.position.dtype))
        if self.class_embed is not None and classes is not None:
            c = c + classes.to(c.dtype) @ self.class_embed
        c, hidden = F.silu(c), []
        for layer in self.layers:
            h = layer(h, c)
            hidden.append(h)
        shift, scale = self.condition(c)[:, None].chunk(2, dim=-1)
        result = self.proj_out(self.norm(h) * (1 + scale) + shift).to(x.dtype)
        count = len(self.heads) if with_states else 0
        read = [hidden[i * len(hidden) // (count + 1) - 1] for i in range(1, count + 1)]
        return result, [head(h).to(x.dtype) for head, h in zip(self.heads, read, strict=False)], hidden

    def steps(self, asked: int | None) -> int:
        """The steps that are taken where so many are asked for."""
        return asked or (1 if self.lesson.method == "inverse" else STEPS)

    def check(self, guidance: Guidance, steps: int | None, solver: str) -> None:
        """Whether the student can draw so.

        Raises:
            InputError: if it takes no such steps or guidance, or there is no such solver.
        """
        if solver not in SOLVERS:
            raise InputError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if self.lesson.method == "inverse" and (steps not in (None, 1) or solver != "euler"):
            raise InputError(
                f"an inverse draws in 1 step by euler, got {steps} by {solver}; flow_matching takes any number"
            )
        if steps is not None and steps < 1:
            raise InputError(f"steps must be at least 1, got {steps}")
        if guidance != Guidance(guidance.scale):
            raise InputError(
                "a student knows only the scale of guidance; leave out its other options, or use sampler exact"
            )

    def draw(
        self,
        z: Tensor,
        classes: Tensor | None = None,
        guidance: float = 0.0,
        steps: int | None = None,
        solver: str = "euler",
        compile: bool = False,
    ) -> Tensor:
        """The clean images of noise.

        Args:
            z: `[B, N, D]`, as the flow's.
            classes: `[B, K]`, as in `forward`.
            guidance: scale w; `v + w (v - v_unlabelled)` of a velocity, in one pass of twice the rows, and what an inverse
                was trained to do at this w.
            steps: None for 4 of flow matching, 1 of an inverse.
            solver: euler, or heun, which takes two passes a step, and one in the last.
            compile: compile the network.

        Returns:
            Tokens `[B, N, D]`, without noise.
        """
        network, z = self._compiled if compile else self, z / self.z_std
        if self.lesson.method == "inverse":
            return network(z, z.new_full((len(z),), guidance / (1 + guidance)), classes)[0]

        def velocity(x: Tensor, t: float) -> Tensor:
            level = x.new_full((len(x),), t)
            if not guidance or classes is None:
                return network(x, level, classes)[0]
            both = torch.cat([classes, torch.full_like(classes, 1 / classes.shape[1])])
            v, unlabelled = network(x.repeat(2, 1, 1), level.repeat(2), both)[0].chunk(2)
            return v + guidance * (v - unlabelled)

        return integrate(velocity, z, self.steps(steps), solver)

    def correction(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """What a denoiser adds to noisy tokens `[B, N, D]`, as a multiple of the noise's standard deviation."""
        return self(x, x.new_zeros(len(x)), classes)[0]

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self.forward, dynamic=False)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors into the folder `path`."""
        folder = Path(path)
        config = {"model": "Student", "format": FORMAT, "student": asdict(self.config), "lesson": asdict(self.lesson)}
        save_tensors(self.state_dict(), folder / WEIGHTS)
        write_whole(folder / "config.json", lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))


def integrate(velocity: Callable[[Tensor, float], Tensor], z: Tensor, steps: int, solver: str = "euler") -> Tensor:
    """Solve `dx/dt = v(x, t)` from `x(1) = z` to `x(0)`, in equal steps: by Euler's rule, or Heun's, of second order.

    Heun's last step is Euler's (Karras et al., arXiv 2206.00364, algorithm 1): at `t = 0` the velocity would have to be
    told from an image without noise.
    """
    x = z
    for n in range(steps, 0, -1):
        t, h = n / steps, 1 / steps
        v = velocity(x, t)
        if solver == "heun" and n > 1:
            v = (v + velocity(x - h * v, t - h)) / 2
        x = x - h * v
    return x


def _waves(level: Tensor) -> Tensor:
    """Levels `[B]` from 0 to 1 as cosines and sines, `[B, 2 FREQUENCIES]` (DiT's embedding of 1,000 times)."""
    rates = 1000 * 10_000 ** (-torch.arange(FREQUENCIES, device=level.device, dtype=level.dtype) / FREQUENCIES)
    angles = level[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _zero(layer: nn.Linear) -> nn.Linear:
    """A linear layer that begins at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
