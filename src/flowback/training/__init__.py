"""Training: one readable loop on Lightning Fabric, its configuration, checkpoints and logs."""

from flowback.training.config import AlignmentConfig, RunConfig, TrainConfig
from flowback.training.loop import RunResult, train

__all__ = ["AlignmentConfig", "RunConfig", "RunResult", "TrainConfig", "train"]
