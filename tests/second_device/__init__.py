"""A second PyTorch device for the tests, named `second`. It computes on the CPU, but behaves to PyTorch as a GPU does.

Its tensors are not the CPU's, and mixing them fails. It counts the times that the host would wait for a GPU, which is where
time goes there. PyTorch sees the device only while it is plugged in:

    with second_device.plugged() as second:
        x = torch.randn(3, device=second)
        with second.counted() as counts:
            x.sum().item()
        assert counts.waits == 1

It is compiled when it is first plugged in, in about half a minute, and kept in the virtual environment.
"""

import torch  # noqa: F401  first, as it may plug the device in, for which the module below has to be complete

from second_device.device import Counts, Log, Second, environment, missing, plug_in, plugged

__all__ = ["Counts", "Log", "Second", "environment", "missing", "plug_in", "plugged"]
