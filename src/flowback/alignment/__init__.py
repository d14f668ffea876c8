"""Alignment of a flow's hidden states with a frozen vision encoder: strategies, gradients, loss."""

from flowback.alignment.alignment import Alignment
from flowback.encoders import Encoder, TimmEncoder, load_encoder

__all__ = ["Alignment", "Encoder", "TimmEncoder", "load_encoder"]
