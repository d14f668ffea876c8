"""flowback: image normalizing flows aligned with vision foundation models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowback.core.errors import InputError

if TYPE_CHECKING:
    from flowback.alignment import Alignment
    from flowback.encoders import load_encoder
    from flowback.flow import FlowConfig, Guidance, TarFlow
    from flowback.latents import LatentFlow, from_pretrained
    from flowback.tasks.classify import classify
    from flowback.tasks.score import score
    from flowback.training import train

__version__ = "0.2.0.dev0"
__all__ = [
    "Alignment",
    "FlowConfig",
    "Guidance",
    "InputError",
    "LatentFlow",
    "TarFlow",
    "__version__",
    "classify",
    "from_pretrained",
    "load_encoder",
    "score",
    "train",
]
LATER = {  # imported when first asked for: the command line's help needs no PyTorch, and a flow no training
    "Alignment": "flowback.alignment",
    "FlowConfig": "flowback.flow",
    "Guidance": "flowback.flow",
    "LatentFlow": "flowback.latents",
    "TarFlow": "flowback.flow",
    "classify": "flowback.tasks.classify",
    "from_pretrained": "flowback.latents",
    "load_encoder": "flowback.encoders",
    "score": "flowback.tasks.score",
    "train": "flowback.training",
}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module 'flowback' has no attribute {name!r}")
    return getattr(import_module(LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
