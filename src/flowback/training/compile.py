"""torch.compile, applied to a flow from outside."""

from typing import Any

from flowback.flows import TarFlow


def compile_blocks(flow: TarFlow, **options: Any) -> None:
    """Compile the transformer of every block in place; parameters and their names stay.

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
