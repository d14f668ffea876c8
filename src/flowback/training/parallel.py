"""Several processes, one a device: Lightning Fabric is named here and nowhere else.

Every process builds the same flow, takes its share of every batch, and averages its gradients with the others'; the
first one writes files. `torchrun` may start them, or the first process does.

**ddp** has everything in every process. **fsdp** (torch's `fully_shard`) cuts every parameter along its first dimension,
one slice a process, and with it the gradient, the average and AdamW's moments. Parameters are whole from the forward pass
of their block to its backward pass, a block's gradient until it is averaged.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import nn

from flowback.core.devices import pick_device
from flowback.core.distributed import PeerLost
from flowback.core.errors import InputError
from flowback.runs.config import TrainConfig

LOST = "another process of this run is gone; the last checkpoint is whole, go on from it with --train.resume"
SYNCHRONIZE = 0x00100000  # Windows' right to wait for the end of a process
TIMEOUT = timedelta(hours=2)  # of a process that waits for another, which may be making caches


def world(config: TrainConfig) -> tuple[int, int]:
    """Processes on each node, and nodes: as torchrun says, or else as configured."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    return config.devices, config.nodes


def check_batch(config: TrainConfig, least: int = 1) -> None:
    """Whether a batch can be shared.

    Raises:
        InputError: if it cannot be cut into equal pieces of at least `least` images.
    """
    devices, nodes = world(config)
    pieces = devices * nodes * config.grad_accum_steps
    if config.batch_size % pieces or config.batch_size < least * pieces:
        raise InputError(
            f"train.batch_size must be a multiple of {pieces} for {devices * nodes} processes and train.grad_accum_steps "
            f"{config.grad_accum_steps}{f', and at least {least * pieces}' * (least > 1)}, got {config.batch_size}"
        )


def launch(config: TrainConfig) -> Any:
    """The Fabric of a run, with all processes started.

    Raises:
        InputError: if the accelerator or so many devices are not there.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.single_device import SingleDeviceStrategy

    devices, nodes = world(config)
    device = pick_device(config.accelerator)
    if "LOCAL_RANK" in os.environ:  # another process started this one
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        if devices * nodes == 1:
            strategy = SingleDeviceStrategy(device, accelerator=_accelerator(device))
            fabric = Fabric(strategy=strategy)
        else:
            strategy = _strategy(config.strategy, devices * nodes, device)
            fabric = Fabric(accelerator=_accelerator(device), devices=devices, num_nodes=nodes, strategy=strategy)
    except Exception as error:  # Fabric raises many kinds for what is not there
        reason = " ".join(str(error).split()) or type(error).__name__
        wanted = f"train.accelerator {config.accelerator} with train.devices {devices}"
        raise InputError(f"{wanted} cannot be had ({reason}); use what this machine has") from error
    fabric.launch()
    return fabric


def _accelerator(device: torch.device) -> Any:
    """Fabric's accelerator of a device. Fabric knows few by name, and would take the CPU for any other."""
    from lightning_fabric.accelerators.accelerator import Accelerator
    from lightning_fabric.accelerators.cpu import CPUAccelerator
    from lightning_fabric.accelerators.cuda import CUDAAccelerator
    from lightning_fabric.accelerators.mps import MPSAccelerator

    known = {"cpu": CPUAccelerator, "cuda": CUDAAccelerator, "mps": MPSAccelerator}
    if device.type in known:
        return known[device.type]()

    class Other(Accelerator):
        """An accelerator that PyTorch knows, by what PyTorch says of it."""

        def setup_device(self, device: torch.device) -> None:
            torch.accelerator.set_device_index(device.index or 0)

        def teardown(self) -> None:
            pass

        @staticmethod
        def parse_devices(devices: Any) -> list[int]:
            return list(range(int(devices)))

        @staticmethod
        def get_parallel_devices(devices: list[int]) -> list[torch.device]:
            return [torch.device(device.type, index) for index in devices]

        @staticmethod
        def auto_device_count() -> int:
            return torch.accelerator.device_count()

        @staticmethod
        def is_available() -> bool:
            return torch.accelerator.is_available()

        @staticmethod
        def name() -> str:
            return device.type

    return Other()


def _strategy(name: str, processes: int, device: torch.device) -> Any:
    backend = torch.distributed.get_default_backend_for_device(device)
    if name == "ddp":
        from lightning_fabric.strategies.ddp import DDPStrategy

        return DDPStrategy(timeout=TIMEOUT, process_group_backend=backend)
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    def shard(objective: Any, mesh: Any) -> nn.Module:
        cut = partial(fully_shard, mesh=mesh["data_parallel"], reshard_after_forward=False)
        if getattr(objective, "gradient", None) != "sequential":  # which calls parts of blocks
            for block in objective.flow.blocks:
                cut(block)
        cut(objective, ignored_params={p for p in objective.parameters() if not p.requires_grad})

        def backward_is_last(last: bool) -> None:
            objective.set_is_last_backward(last)
            objective.set_reshard_after_backward(last)

        # the alignment's products are backward passes too, after which the parameters are needed still
        objective.register_forward_pre_hook(lambda *_: backward_is_last(False))
        objective.register_forward_hook(lambda *_: backward_is_last(True))
        return objective

    sizes: dict[str, Any] = {"data_parallel_size": processes, "tensor_parallel_size": 1}
    return ModelParallelStrategy(shard, **sizes, timeout=TIMEOUT, process_group_backend=backend)


def _end_with(parent: int) -> None:
    """End this process, wherever it waits, when the one that started it has ended."""
    if sys.platform == "win32":  # where a process keeps the number of a parent that is gone
        import _winapi

        _winapi.WaitForSingleObject(_winapi.OpenProcess(SYNCHRONIZE, False, parent), _winapi.INFINITE)
    else:
        while os.getppid() == parent:
            time.sleep(1)
    print(f"flowback: {LOST}", file=sys.stderr, flush=True)
    os._exit(1)


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
        raise PeerLost(LOST) from error
