"""Where tensors live. No other module knows a device by name."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from flowback.errors import InputError


def pick_device(name: str, turn: int = 0) -> torch.device:
    """A device by name; auto is the accelerator that is there, of several the one whose turn it is, or else the CPU.

    Raises:
        InputError: if there is no such device.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        if found is None:
            return torch.device("cpu")
        return torch.device(found.type, turn % torch.accelerator.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device).tolist()
    except Exception as error:  # each backend raises its own
        known = "cpu" if found is None else f"cpu, {found.type}"
        raise InputError(f"device {name!r} is not here ({str(error).splitlines()[0]}); allowed: auto, {known}") from None
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The autocast context of a precision, 32-true or bf16-mixed.

    Not Lightning Fabric's own bf16-mixed, which would round the noised images to bfloat16 before the flow sees them.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, have the C library keep what is freed for the next step, from here to the end of the process.

    It would return large tensors to the system and take them back page by page at every step, which costs a small
    flow's training about a tenth of its time. Does nothing where the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if device.type == "cpu" and os.name == "posix" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
        mallopt(m_trim_threshold, -1)
        mallopt(m_mmap_max, 0)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Meanwhile, if wanted, only algorithms that repeat bit for bit; an operation that has none raises RuntimeError."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first matrix product
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
