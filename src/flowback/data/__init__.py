"""Data sets by name, batches whose order is a function of (seed, step), and the cache of encoder features."""

from flowback.data.batches import batches, step_generator
from flowback.data.datasets import DataConfig, ImageSet, load_data
from flowback.data.images import as_images, load_image
from flowback.data.splits import Split

__all__ = ["DataConfig", "ImageSet", "Split", "as_images", "batches", "load_data", "load_image", "step_generator"]
