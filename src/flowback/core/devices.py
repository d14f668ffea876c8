"""Where tensors live. No other module knows a device by name."""

import ctypes
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flowback.core.errors import InputError

CPU = torch.device("cpu")


def pick_device(name: str | torch.device, turn: int = 0) -> torch.device:
    """A device by name, as it names itself (cuda is cuda:0); auto takes an accelerator, or else the CPU.

    Args:
        name: auto, gpu (an accelerator, whatever its name), or PyTorch's name of a device.
        turn: which one auto takes where there are several, counted round.

    Raises:
        InputError: if there is no such device.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto" and found is None:
        return torch.device("cpu")
    if name in ("auto", "gpu") and found is not None:
        return torch.device(found.type, turn % torch.accelerator.device_count())
    try:
        device = torch.empty(0, device=torch.device(name)).device
    except Exception as error:  # each backend raises its own
        known = "cpu" if found is None else f"cpu, {found.type}"
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(name)!r} is not here ({reason}); expected auto, {known}") from error
    return device


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. From the CPU it is copied through pinned memory, for which the host does not wait."""
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type not in ("cpu", "meta"):
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def machine(device: torch.device = CPU) -> str:
    """What made a figure, in a few words: the device, the processor's kind, PyTorch's version."""
    return f"{device_name(device)}, {platform.machine()}, torch {torch.__version__.split('+')[0]}"


def device_name(device: torch.device) -> str:
    """A device's name as its maker gives it, or else its type; of a CPU the number of cores."""
    if device.type == "cpu":
        return f"{os.cpu_count()} CPU cores"
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if named is None else str(named(device))


@cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32 there; CPUs without units for it take far longer."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, dtype=dtype, device=device)
        seconds[dtype] = math.inf
        for _ in range(3):
            synchronize(device)
            start = time.perf_counter()
            torch.mm(a, a)
            synchronize(device)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.bfloat16] < seconds[torch.float32]


def for_few_rows(weight: Tensor) -> Tensor:
    """A matrix `[out, in]`, laid out for products with few rows, whose time is that of reading it.

    CPU libraries read it faster with its columns contiguous, which they then need not pack anew for every product; from
    some hundred rows on the layout makes no difference.
    """
    return weight.t().contiguous().t() if weight.device.type == "cpu" else weight


def repeatable(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A step that reads and writes the same memory whenever it runs; on CUDA it is replayed as one graph."""
    if device.type != "cuda":
        return step
    stream, graph, runs = torch.cuda.Stream(device), torch.cuda.CUDAGraph(), 0

    def run() -> None:
        nonlocal runs
        runs += 1
        if runs > 2:
            graph.replay()
            return
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            if runs == 1:  # compiles, and sets up the libraries
                step()
            else:  # which only records it
                graph.capture_begin()
                step()
                graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        if runs == 2:
            graph.replay()

    return run


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The autocast context of a precision, 32-true or bf16-mixed.

    Not Lightning Fabric's own bf16-mixed, which would round the noised images to bfloat16 before the flow sees them.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, have the C library keep what is freed for the next step, from here to the end of the process.

    It would return large tensors to the system and take them back page by page at every step, which costs a small
    flow's training about a tenth of its time, and a frozen encoder's passes more than half. Does nothing where the C
    library has no such setting.
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
