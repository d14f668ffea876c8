"""The flow: one autoregressive block, the stack TarFlow, its decoders, guidance and denoising."""

from flowback.flows.config import FlowConfig
from flowback.flows.guidance import Guidance
from flowback.flows.tarflow import TarFlow, Trace

__all__ = ["FlowConfig", "Guidance", "TarFlow", "Trace"]
