"""The alignment under everything that is applied to it from outside; the numbers must stay the same."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from builders import PatchEncoder, images, labels, random_flow
from flowback.alignment import Alignment
from flowback.flow.transformer import Layer
from flowback.training.apply import compile_blocks

MEMBERS = ["forward", "detach", "cached", "one_step", 2, "exact"]


def build(member) -> Alignment:
    flow = random_flow()
    strategy = member if member in ("forward", "detach") else "reverse"
    gradient = member if strategy == "reverse" else "one_step"
    torch.manual_seed(0)
    at = [(2, 1), (3, 2)]
    return Alignment(flow, PatchEncoder(flow), at=at, strategy=strategy, gradient=gradient, projector_width=8).double()


def gradients(align: nn.Module, rows: slice = slice(None), batch: int = 4) -> dict[str, torch.Tensor]:
    flow = random_flow()
    x, y = images(flow, batch), labels(flow, batch)
    align.zero_grad(set_to_none=True)
    loss, _ = align(x[rows], y[rows], x[rows])
    loss.backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in align.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    found = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in found.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("member", MEMBERS)
def test_activation_checkpointing(member):
    align = build(member)
    expected = gradients(align)
    apply_activation_checkpointing(align, check_fn=lambda module: isinstance(module, Layer))
    assert_equal(gradients(align), expected)


@pytest.mark.parametrize("member", MEMBERS)
def test_compiled_blocks(member):
    align = build(member)
    expected = gradients(align)
    compiled = copy.deepcopy(align)
    compile_blocks(compiled.flow, backend="aot_eager")  # the compiler's graphs, without needing a C++ compiler
    assert_equal(gradients(compiled), expected)


def worker(rank: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for member in MEMBERS:
        parallel = nn.parallel.DistributedDataParallel(build(member)).train()
        assert not parallel.module.encoder.training
        assert {name.split(".")[1] for name in parallel.state_dict()} == {"flow", "projector"}
        found = gradients(parallel, slice(2 * rank, 2 * rank + 2))
        if rank == 0:
            torch.save(found, f"{out}/{member}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path):
    files = str(tmp_path / "rendezvous"), str(tmp_path)
    torch.multiprocessing.start_processes(worker, files, nprocs=2, start_method="forkserver")
    for member in MEMBERS:
        assert_equal(torch.load(tmp_path / f"{member}.pt"), gradients(build(member)))


@pytest.mark.parametrize("method", ["sequential", "gauss_seidel"])
def test_compiled_blocks_decode_with_a_few_graphs_for_all_tokens(method):
    flow = random_flow(image_size=16, blocks=2)  # 64 tokens
    y = torch.tensor([0, 3])
    z = torch.randn(2, *flow.token_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = flow.decode(z, y, 1.0, method=method)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(flow, backend="eager")
    assert torch.allclose(flow.decode(z, y, 1.0, method=method), expected, atol=1e-9)
    assert (method == "gauss_seidel") <= counters["stats"]["unique_graphs"] <= 8 * len(flow.blocks)
    assert not counters["graph_break"]
