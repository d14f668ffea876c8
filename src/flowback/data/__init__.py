"""Data sets by name, batches whose order is a function of (seed, step), and the cache of encoder features."""

from flowback.data.batches import batches, step_generator
from flowback.data.datasets import DataConfig, ImageSet, Split, load_data, load_image

__all__ = ["DataConfig", "ImageSet", "Split", "batches", "load_data", "load_image", "step_generator"]
