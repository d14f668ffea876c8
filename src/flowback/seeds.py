"""Random streams that are functions of their key, so that what is drawn depends on no order of work."""

import numpy as np
import torch


def keyed_generator(*key: int) -> torch.Generator:
    """A generator seeded by a tuple of numbers; different tuples give independent streams."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
