"""What several processes of one run share: decisions, failures, and the slices of tensors."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
# what ends a run with a checkpoint: Ctrl-C, an end that is asked for, a closed connection, the warnings of queues
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGUSR1", "SIGUSR2", "SIGXCPU")
ENDING = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]


ENDS_WITH_INPUT = "FLOWBACK_ENDS_WITH_INPUT"  # in the environment of processes that end when their standard input does


def end_with_input(end: Callable[[], Any]) -> None:
    """Where `ENDS_WITH_INPUT` asks for it, call `end` in a thread once standard input ends.

    So a process ends when the one that started it closes the pipe, or ends itself, however that happens.
    """

    def wait() -> None:
        while os.read(0, 1024):
            pass
        end()

    if ENDS_WITH_INPUT in os.environ:
        threading.Thread(target=wait, daemon=True).start()


class PeerLost(RuntimeError):
    """Another process of the run is gone, so this one cannot go on."""


def is_first() -> bool:
    """Whether this process is the first one of the run, known before any of them have met."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0" and os.environ.get("NODE_RANK", "0") == "0"


def any_says(fabric: Any, flag: bool) -> bool:
    """Whether the flag is true in any process."""
    if fabric.world_size == 1:
        return flag
    return bool(fabric.all_reduce(torch.tensor(float(flag), device=fabric.device), reduce_op="sum") > 0)


def in_all(fabric: Any, action: Callable[[], T]) -> list[T]:
    """Do something in every process; returns what each returned, in their order.

    Raises:
        OSError: if it failed in another process; what it raised in this one is raised as it is.
    """
    result, own = None, None
    try:
        result = action()
    except Exception as error:
        own = error
    told: list[Any] = [(result, own and str(own))] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(told, told[0])
    if own is not None:
        raise own
    for _, problem in told:
        if problem is not None:
            raise OSError(problem)
    return [result for result, _ in told]


def is_shard(tensor: Tensor) -> bool:
    """Whether other processes hold the other slices of this tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """A tensor with the slices of all processes, which all ask at once."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def own_slice(tensor: Any) -> tuple[Tensor, int]:
    """What this process holds of a tensor, and the row of the whole at which that begins."""
    if not is_shard(tensor):
        return tensor, 0
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    return tensor.to_local(), min(rows * tensor.device_mesh.get_local_rank(), tensor.shape[0])


def shard_like(module: nn.Module, sharded: nn.Module) -> None:
    """Cut a module's parameters, which have the values of those of `sharded`, as those are cut."""
    for name, parameter in sharded.named_parameters():
        if is_shard(parameter):
            _put(module, name, parameter.detach().clone())


def unshard(module: nn.Module) -> dict[str, nn.Parameter]:
    """Make the parameters whole, in all processes; returns the slices by name, none if it was whole."""
    slices = {name: p for name, p in module.named_parameters() if is_shard(p)}
    for name, parameter in slices.items():
        _put(module, name, whole(parameter))
    return slices


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Meanwhile the parameters are whole, in all processes."""
    slices = unshard(module)
    try:
        yield
    finally:
        for name, parameter in slices.items():
            _put(module, name, parameter)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
