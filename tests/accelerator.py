"""A real accelerator in the place of the tests' second device, for `make gpu`, with the same counters."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from second_device import Counts, Log

VARIABLE = "FLOWBACK_TEST_DEVICE"  # the device that the tests of devices run on


class Accelerator(str):
    """The device's name, as PyTorch takes it. Operations are counted by their allocations; waits are what CUDA reports."""

    @contextmanager
    def counted(self) -> Iterator[Counts]:
        """What happens meanwhile, counted at the end."""
        counts, before = Counts(), self._allocations()
        with self.logged() as log:
            yield counts
        counts.operations, counts.waits = self._allocations() - before, len(log.waits)

    @contextmanager
    def logged(self) -> Iterator[Log]:
        """The waits that happen meanwhile."""
        log, debug = Log(), self == "cuda"
        with warnings.catch_warnings(record=debug) as found:
            if debug:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield log
            finally:
                if debug:
                    torch.cuda.set_sync_debug_mode("default")
        log.waits += [str(warning.message) for warning in found or () if "synchroniz" in str(warning.message)]

    def _allocations(self) -> int:
        return int(torch.accelerator.memory_stats().get("allocation.all.allocated", 0))


def named() -> Accelerator | None:
    """The device that the environment names, if any."""
    name = os.environ.get(VARIABLE)
    return Accelerator(name) if name else None
