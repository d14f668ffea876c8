"""Random streams that are functions of their key, so that what is drawn depends on no order of work."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flowback.core.devices import put

Generators = torch.Generator | Sequence[torch.Generator] | None  # one for a whole batch, or one for each of its rows


def draw(distribution: Callable[..., Tensor], like: Tensor, generator: Generators) -> Tensor:
    """Random numbers (torch.rand, torch.randn) of the shape, type and device of `like`, drawn where the generator lives."""
    if isinstance(generator, Sequence):
        rows = [_drawn(distribution, like[0], own) for own in generator]
        return put(torch.stack(rows), like.device) if rows else torch.empty_like(like)
    return put(_drawn(distribution, like, generator), like.device)


def _drawn(distribution: Callable[..., Tensor], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else like.device
    return distribution(like.shape, generator=generator, device=device, dtype=like.dtype)


def keyed_generator(*key: int) -> torch.Generator:
    """A torch generator seeded by a tuple of numbers. Torch uses 32 bits of a seed: enough for steps, not for images."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def keyed_normal(shape: Sequence[int], *key: int) -> Tensor:
    """Standard normal numbers in float32, from a stream of their own for every tuple of numbers."""
    stream = np.random.Generator(np.random.Philox(np.random.SeedSequence([len(key), *key])))
    return torch.from_numpy(stream.standard_normal(tuple(shape), dtype=np.float32))
