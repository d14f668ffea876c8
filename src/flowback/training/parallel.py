"""Several processes, one a device: Lightning Fabric is named here and nowhere else.

Every process builds the same flow, takes its share of every batch, and averages its gradients with the others'; the
first one writes files. `torchrun` may start them, or the first process does.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from flowback.errors import InputError
from flowback.training.config import TrainConfig

LOST = "another process of this run is gone; the last checkpoint is whole, go on from it with --train.resume"
TIMEOUT = timedelta(hours=2)  # of a process that waits for another, which may be making caches


class PeerLost(RuntimeError):
    """Another process of the run is gone, so this one cannot go on."""


def is_first() -> bool:
    """Whether this process is the first one of the run, known before any of them have met."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0" and os.environ.get("NODE_RANK", "0") == "0"


def world(config: TrainConfig) -> tuple[int, int]:
    """Processes on each node, and nodes: as torchrun says, or else as configured."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    return config.devices, config.nodes


def check_batch(config: TrainConfig) -> None:
    """Whether a batch can be shared.

    Raises:
        InputError: if it cannot be cut into equal pieces.
    """
    devices, nodes = world(config)
    pieces = devices * nodes * config.accumulate
    if config.batch_size % pieces:
        raise InputError(
            f"train.batch_size is {config.batch_size}; allowed for {devices * nodes} processes and train.accumulate "
            f"{config.accumulate} are multiples of {pieces}"
        )


def launch(config: TrainConfig) -> Any:
    """The Fabric of a run, with all processes started.

    Raises:
        InputError: if the accelerator or so many devices are not there.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    devices, nodes = world(config)
    if "LOCAL_RANK" in os.environ:  # another process started this one
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        strategy = DDPStrategy(timeout=TIMEOUT) if devices * nodes > 1 else "auto"
        fabric = Fabric(accelerator=config.accelerator, devices=devices, num_nodes=nodes, strategy=strategy)
    except Exception as error:  # Fabric raises many kinds for what is not there
        reason = " ".join(str(error).split()) or type(error).__name__
        wanted = f"train.accelerator {config.accelerator} with train.devices {devices}"
        raise InputError(f"{wanted} cannot be had ({reason}); allowed is what this machine has") from None
    fabric.launch()
    return fabric


def _end_with(parent: int) -> None:
    """End this process, wherever it waits, when the one that started it has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    print(f"flowback: {LOST}", file=sys.stderr, flush=True)
    os._exit(1)


def any_says(fabric: Any, flag: bool) -> bool:
    """Whether the flag is true in any process."""
    if fabric.world_size == 1:
        return flag
    return bool(fabric.all_reduce(torch.tensor(float(flag), device=fabric.device), reduce_op="sum") > 0)


@contextmanager
def peers(fabric: Any) -> Iterator[None]:
    """Turns what the communication raises when a process is gone into one sentence.

    Raises:
        PeerLost: then.
    """
    try:
        yield
    except RuntimeError as error:
        words = ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "Socket", "Gloo", "gloo")
        if fabric.world_size == 1 or not any(word in str(error) for word in words):
            raise
        raise PeerLost(LOST) from None
