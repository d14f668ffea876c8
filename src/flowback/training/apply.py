"""What is applied to a flow from outside, in place; parameters and their names stay."""

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from flowback.flow.tarflow import TarFlow


def compile_blocks(flow: TarFlow, **options: Any) -> None:
    """Compile the transformer of every block.

    Args:
        flow: the flow.
        **options: of `torch.compile`.

    The alignment takes several vector-Jacobian products through one graph, so the compiler must not hand buffers of the
    forward pass on to the first of them: `donated_buffer` is switched off, for the process.
    """
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    for block in flow.blocks:
        block.transformer.compile(**options)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def checkpoint_layers(flow: TarFlow) -> None:
    """Keep only the input of every transformer layer in memory; each backward pass runs the layer again.

    An alignment of n vector-Jacobian products through a block runs its layers n times again.
    """
    for block in flow.blocks:
        for layer in block.transformer.layers:  # pyright: ignore[reportAttributeAccessIssue, reportGeneralTypeIssues]
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
