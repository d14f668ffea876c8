"""Training: one readable loop on Lightning Fabric, and what a step reads."""

from flowback.training.loop import RunResult, train

__all__ = ["RunResult", "train"]
