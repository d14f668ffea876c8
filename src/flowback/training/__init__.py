"""Training: one readable loop on Lightning Fabric, what it trains, and what a step reads."""

from flowback.training.flows import RunResult, train

__all__ = ["RunResult", "train"]
