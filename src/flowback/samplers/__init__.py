"""How students learn from a trained flow: the losses, each a module that a training loop calls."""

from flowback.samplers.lessons import LESSONS, Denoising, FlowMatching, Inverse, Objective, features_of, measure

__all__ = ["LESSONS", "Denoising", "FlowMatching", "Inverse", "Objective", "features_of", "measure"]
