"""The flow itself: one autoregressive block, the stack TarFlow, its decoders, guidance and denoising."""

from flowback.flow.config import FlowConfig
from flowback.flow.guidance import Guidance
from flowback.flow.tarflow import TarFlow, Trace

__all__ = ["FlowConfig", "Guidance", "TarFlow", "Trace"]
