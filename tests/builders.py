"""What several test files build: small flows that are nowhere the identity, a toy encoder, views of a module's state."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowback import TarFlow
from flowback.cli import main
from flowback.encoders import load_encoder
from flowback.flow.io import fingerprint
from flowback.flow.student import Lesson, Student, StudentConfig

SMALL: dict[str, Any] = {
    "image_size": 6,
    "channels": 2,
    "patch_size": 2,
    "width": 16,
    "head_dim": 8,
    "blocks": 3,
    "layers": 2,
    "num_classes": 4,
}


def normal_(module: nn.Module, std: float, seed: int = 0) -> nn.Module:
    """Make every parameter normal: nothing starts at zero. Norms stay around one, matrices are scaled by their input."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        is_norm = p.dim() == 1 and "norm" in name and name.endswith("weight")
        p.data = 1 + 0.1 * noise if is_norm else std * noise
    return module


def random_flow(dtype: torch.dtype = torch.float64, std: float = 0.12, seed: int = 0, **options: Any) -> TarFlow:
    """A small flow with random parameters; `options` replace those of `SMALL`."""
    flow = TarFlow(**{**SMALL, **options}).to(torch.float64)
    normal_(flow, std, seed)
    return flow.to(dtype).eval()


def student_of(flow: TarFlow, method: str = "flow_matching", std: float = 0.2, **lesson: Any) -> Student:
    """A small student of a flow with random parameters; of zeros, as it begins, with `std` 0."""
    (N, D), T = flow.token_shape, flow.config.blocks
    lesson |= {"tokens": N, "dim": D, "classes": flow.num_classes, "states": T if method == "inverse" else 0}
    known = Lesson(method=method, teacher=fingerprint(flow.state_dict()), **lesson)
    student = Student(StudentConfig(width=16, layers=T + 1, head_dim=8), known).to(torch.float64)
    return (normal_(student, std) if std else student).to(flow.dtype).requires_grad_(False).eval()


def images(flow: TarFlow, n: int = 3, seed: int = 1) -> Tensor:
    """`n` random images in [-1, 1] that fit the flow, in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *flow.data_shape, generator=generator, dtype=torch.float64)
    return (2 * x - 1).to(next(flow.parameters()).dtype)


def labels(flow: TarFlow, n: int = 3) -> Tensor | None:
    """Labels that include a dropped one (-1); None for an unconditional flow."""
    return (torch.arange(n) % (flow.num_classes + 1)) - 1 if flow.num_classes else None


class PatchEncoder(nn.Module):
    """A toy encoder: every patch through one nonlinear layer. It has parameters, so that a leak of gradient shows."""

    def __init__(self, flow: TarFlow, dim: int = 5, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.grid = grid or flow.grid
        self.dim = dim
        self.conv = nn.Conv2d(flow.channels, dim, 1)
        self.to(next(flow.parameters()).dtype)
        normal_(self, 0.7)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(torch.tanh(self.conv(x)), self.grid)
        return x.flatten(2).transpose(1, 2)


@contextmanager
def encoders_made_once() -> Iterator[None]:
    """Runs, measures and dry runs share encoders, which are frozen: timm takes half a second for one.

    One that was taken along to another device is copied anew from the one that was made.
    """

    def place(encoder: nn.Module) -> tuple[torch.device, torch.dtype]:
        p = next(encoder.parameters())
        return p.device, p.dtype

    def shared(made: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        given: dict[nn.Module, nn.Module] = {}

        def load(*arguments: Any, **options: Any) -> nn.Module:
            encoder = made(*arguments, **options)
            if encoder not in given or place(given[encoder]) != place(encoder):
                given[encoder] = copy.deepcopy(encoder)
            return given[encoder]

        return load

    with pytest.MonkeyPatch.context() as patch:
        users = ("training.build", "training.budget", "measure.extractors", "reports.decisions")
        for user in users:  # dry runs have theirs without content
            patch.setattr(f"flowback.{user}.load_encoder", shared(cache(load_encoder)))
        yield


def tiny_autoencoder(folder: Path, channels: int = 1, seed: int = 0, **options: Any) -> Path:
    """A diffusers AutoencoderKL of random weights that halves the sides, saved into `folder`."""
    from diffusers import AutoencoderKL

    settings = {"scaling_factor": 0.5, "shift_factor": 0.1, "latent_channels": 3, "block_out_channels": (8, 16)}
    settings |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKL(channels, channels, layers_per_block=1, norm_num_groups=4, **(settings | options))
    model.save_pretrained(folder)
    return folder


def attributes(module: nn.Module) -> dict[str, Any]:
    """Everything that lies on a module and its children, to see that a call leaves nothing behind."""
    state: dict[str, Any] = {}
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if isinstance(value, dict):  # parameters, buffers, children, hooks
                state |= {f"{path}.{name}.{key}": id(item) for key, item in value.items()}
            else:
                state[f"{path}.{name}"] = id(value)
    return state


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient by name; zeros where there is none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative error by name, absolute where the wanted tensor is zero."""
    assert found.keys() == wanted.keys()
    return {name: ((found[name] - w).norm() / (w.norm() if w.norm() > 0 else 1)).item() for name, w in wanted.items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All tensors as one vector."""
    return torch.cat([t.flatten() for t in tensors.values()])


# options of `flowback train` that make a run of seconds
SMALL_RUN = ["--flow.width=32", "--flow.blocks=2", "--flow.layers=1", "--flow.patch_size=4", "--flow.noise_std=0.2"]
SMALL_RUN += ["--data.limit=64", "--train.batch_size=16", "--train.warmup=2", "--train.eval_images=20"]


def refuse(arguments: list[str], capsys: Any) -> str:
    """The one line that a bad call of the command line prints."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2, arguments
    assert len(lines) == 1, arguments
    assert lines[0].startswith("flowback: error: "), arguments
    return lines[0]
