"""What a compiler makes of a flow: one graph without breaks, an exported program, decoding in passes of one shape."""

import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from builders import images, labels, random_flow
from flowback.cli import main
from flowback.flow import decoding as decoders
from flowback.flow.decoding import METHODS, CausalMap, Solver, solve
from flowback.flow.guidance import Guidance

SHALLOW = {"blocks": 2, "layers": 1}  # tracing takes long
VARIANTS = [SHALLOW, {**SHALLOW, "positions": "rotary", "mlp": "swiglu", "layers": [1, 2], "num_classes": 0}]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def quick(monkeypatch):
    """Passes are traced as for any compiler, and then run by PyTorch."""
    decoders.compiled.cache_clear()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, **options: compile_(run, **options, backend="eager"))
    yield
    decoders.compiled.cache_clear()


@pytest.mark.parametrize("options", VARIANTS)
def test_a_flow_is_one_graph(options):
    flow = random_flow(**options)
    compiled = torch.compile(flow, fullgraph=True, backend="eager")
    for y in (None, labels(flow)):
        wanted, found = flow(images(flow), y), compiled(images(flow), y)
        for value, same in zip(wanted, found, strict=True):
            assert torch.equal(value, same)
    assert counters["stats"]["unique_graphs"] == (2 if flow.num_classes else 1)  # without labels and with


@pytest.mark.parametrize(("options", "strict"), [*((options, False) for options in VARIANTS), (SHALLOW, True)])
def test_encoding_can_be_exported_for_any_batch(options, strict):
    flow = random_flow(**options)
    x, y = images(flow), labels(flow)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch}, None if y is None else {0: batch})
    program = torch.export.export(flow, (x, y), dynamic_shapes=shapes, strict=strict)
    for n in (3, 5):
        x, y = images(flow, n), labels(flow, n)
        for value, same in zip(flow(x, y), program.module()(x, y), strict=True):
            assert torch.allclose(value, same, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("options", "guidance"), zip(VARIANTS, (1.5, 0.0), strict=True))
def test_compiled_passes_decode_the_same_images(quick, method, options, guidance):
    flow = random_flow(std=0.1, **options)
    z = torch.randn(3, *flow.token_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for known in (None, (images(flow), torch.rand(3, 2, 6, 6) < 0.5)):
        wanted = flow.decode(z, labels(flow), guidance, "sequential", known=known)
        found, report = flow.decode_with_report(z, labels(flow), guidance, method, known=known, compile=True)
        assert torch.allclose(found, wanted, atol=1e-9)
        assert len(report) == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("window", [2, 3, None])
def test_compiled_windows_decode_the_same_images(quick, window):
    flow = random_flow(std=0.1, image_size=16, **SHALLOW)
    z = torch.randn(2, *flow.token_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    classes = flow.class_weights(labels(flow, 2), 2)
    wanted, _ = solve(CausalMap(flow.blocks[1], z, classes, Guidance()), Solver("sequential"), 1e-10)
    found, solved = solve(
        CausalMap(flow.blocks[1], z, classes, Guidance(), None, True), Solver("gauss_seidel", window), 1e-10
    )
    assert torch.allclose(found, wanted, atol=1e-8)
    assert not solved.fell_back


def test_a_compiled_sweep_that_takes_too_long_goes_on_token_by_token(quick, monkeypatch):
    monkeypatch.setattr(decoders, "WORK_LIMIT", 0)
    flow = random_flow(std=0.1, **SHALLOW)
    z = torch.randn(2, *flow.token_shape, dtype=torch.float64)
    found, report = flow.decode_with_report(z, method="gauss_seidel", compile=True)
    assert torch.allclose(found, flow.decode(z, method="sequential"), atol=1e-9)
    assert all(solved.fell_back for solved in report)


def test_one_program_serves_all_tokens_blocks_and_batches(quick):
    flow = random_flow(std=0.1, layers=1)
    for batch in (3, 3, 4, 5):
        flow.sample(batch, method="sequential", compile=True)
    assert counters["stats"]["unique_graphs"] <= 6  # the first batch is taken for the only size, until there is another


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_sampling_compiled_draws_the_same_images(tmp_path):
    random_flow(torch.float32, std=0.1, blocks=1, layers=1, channels=1).save_pretrained(tmp_path / "flow")
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        words = ["sample", str(tmp_path / "flow"), "--num=2", "--method=sequential", "-o", str(tmp_path / f"{name}.npz")]
        assert main([*words, "--device=cpu", *more]) == 0
    plain, compiled = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("plain", "compiled"))
    assert np.abs(plain - compiled).max() <= 1
