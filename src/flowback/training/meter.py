"""What a piece of work takes, counted while it runs: operations of matrix products, and memory.

Under `FakeTensorMode` tensors have shapes and no content, so that the step of any model can be counted in seconds on any
machine, by the code that trains it.

The formulas are PyTorch's. Its counters, `FlopCounterMode` and `MemTracker`, are not used: both hook the gradients of all
modules, which raises an error as soon as a step calls `torch.autograd.grad`, as the alignment does.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class Meter(TorchDispatchMode):
    """Counts while it is entered, also in `backward()` and `autograd.grad` where autograd works in the same thread.

    Args:
        existing: tensors that are there already, and not counted as memory when operations return views of them.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention, by PyTorch's formulas: two for
            each multiplication and addition; attention as if nothing were masked.
        peak: the most memory, in bytes, that tensors made meanwhile had at one time.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.flops, self.peak, self._live = 0, 0, 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


_aten = torch.ops.aten
FORMULAS = {  # PyTorch has none for the attention of CPUs
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **flop_registry,
}
