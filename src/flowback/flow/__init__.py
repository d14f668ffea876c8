"""The flow itself: one autoregressive block, the stack, what draws with it (TarFlow), decoders, guidance."""

from flowback.flow.config import FlowConfig
from flowback.flow.guidance import Guidance
from flowback.flow.stack import Trace
from flowback.flow.tarflow import TarFlow

__all__ = ["FlowConfig", "Guidance", "TarFlow", "Trace"]
