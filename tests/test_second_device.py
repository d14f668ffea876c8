"""The second device itself: that it is to PyTorch what a GPU is, and that what it counts is what a GPU would wait for."""

import copy
import io
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import second_device
from second_device import device


@pytest.fixture
def compiled():
    """For tests that plug the device in themselves."""
    if reason := second_device.missing():
        pytest.skip(reason)


def test_it_is_there_only_while_it_is_plugged_in(compiled):
    torch.ones(1, requires_grad=True).sum().backward()  # autograd has counted the devices now
    with second_device.plugged() as second:
        assert torch.accelerator.current_accelerator(check_available=True).type == "second"
        assert torch.second.is_available()
        assert torch.accelerator.device_count() == torch.second.device_count() == 1
        x = torch.ones(2, device=second, requires_grad=True)
        assert x.device == torch.empty(2, device="second:0").device == torch.device("second", 0)
        x.sum().backward()
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.empty(2, device="second:1")
    found = torch.accelerator.current_accelerator(check_available=True)
    assert found is None or found.type != "second"
    assert not torch.second.is_available()
    assert torch.second.device_count() == 0
    for use in (lambda: torch.empty(2, device="second"), lambda: torch.Generator("second"), lambda: x + 1):
        with pytest.raises(RuntimeError, match="not plugged in"):
            use()


@pytest.mark.filterwarnings("ignore:.*no accelerator is found")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_unplugged_the_cpu_is_as_before(compiled):
    with second_device.plugged():
        pass
    model = copy.deepcopy(nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.1))).to("cpu", torch.float64).float()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    data = torch.utils.data.TensorDataset(torch.randn(4, 2))
    for (x,) in torch.utils.data.DataLoader(data, batch_size=2, pin_memory=True, num_workers=1):
        assert not x.is_pinned()
        compiled = torch.compile(model, backend="eager")
        compiled(x).sum().backward()
        optimizer.step()
    for use in (lambda: torch.ones(2).pin_memory(), torch.accelerator.synchronize):
        with pytest.raises(RuntimeError):
            use()


X, Y = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
W, B, MASK = torch.randn(4, 3, 3, 3), torch.randn(4), torch.ones(6, 6, dtype=torch.bool).tril()
ROWS = torch.tensor([0, 2, 2])
SAME_AS_CPU = {
    "attention": (lambda x, y: F.scaled_dot_product_attention(x, y, y), X, Y),
    "causal attention": (lambda x, y: F.scaled_dot_product_attention(x, y, x, is_causal=True), X, Y),
    "masked attention": (lambda x, y, m: F.scaled_dot_product_attention(x, y, x, attn_mask=m), X, Y, MASK),
    "convolution": (lambda x, w, b: F.conv2d(x, w, b, padding=1), X, W, B),
    "convolution, channels last": (F.conv2d, X.to(memory_format=torch.channels_last), W),
    "transposed convolution": (lambda x, w: F.conv_transpose2d(x, w[:3, :2].repeat(1, 3, 1, 1), groups=3), X, W),
    "resizing": (lambda x: F.interpolate(x, size=(4, 9), mode="bicubic", antialias=True), X),
    "layer norm": (lambda x, w: F.layer_norm(x, (6,), w[0, 0].flatten()[:6]), X, W),
    "embedding": (lambda w, i: F.embedding(i, w), X[0, 0], ROWS),
    "cross-entropy": (lambda x, i: F.cross_entropy(x[0, 0, :3], i, label_smoothing=0.1), X, ROWS),
    "scans": (lambda x: x.cumprod(-1) + x.cumsum(-1) + x.logsumexp(-1, keepdim=True), X),
    "orders": (lambda x: x.sort(-1).values + x.topk(6, -1).values, X),
    "scatter": (lambda x, y, i: x.scatter(-1, i.expand(2, 3, 6, 3), y[..., :3]), X, Y, torch.tensor([0, 2, 5])),
    "indices": (lambda x, i: x[:, i] + x.index_select(1, i), X, ROWS),
    "views": (lambda x: x.transpose(1, 2).unfold(1, 3, 3).flatten(2).roll(1, 0).flip(1), X),
    "complex numbers": (lambda x: torch.view_as_real(torch.fft.rfft2(x)), X),
    "float64": (torch.matmul, X.double(), Y.double()),
    "bfloat16": (torch.matmul, X.bfloat16(), Y.bfloat16()),
    "float16": (torch.matmul, X.half(), Y.half()),
}


@pytest.mark.parametrize("case", SAME_AS_CPU)
def test_results_and_gradients_are_the_cpu_s(case, second):
    function, *inputs = SAME_AS_CPU[case]
    results = []
    for where in ("cpu", second):
        leaves = [x.clone().to(where).requires_grad_(x.is_floating_point()) for x in inputs]
        y = function(*leaves)
        y.backward(torch.ones_like(y))
        results.append([y, *(x.grad for x in leaves if x.requires_grad)])
    for expected, found in zip(*results, strict=True):
        assert found.device.type == "second"
        assert found.stride() == expected.stride()
        torch.testing.assert_close(found.cpu(), expected)


def test_training_is_the_cpu_s(second):
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)
    twins = [nn.Sequential(*layers)]
    twins.append(copy.deepcopy(twins[0]).to(second))
    for model in twins:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        average = [p.detach().clone() for p in model.parameters()]
        for skip in (0.0, 1.0, 0.0):
            optimizer.zero_grad()
            model(X.to(average[0].device)).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.grad_scale = average[0].new_ones(())
            optimizer.found_inf = average[0].new_full((), skip)
            optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 0.3)
        model.norms = torch._foreach_norm(average)
    expected, found = twins
    torch.testing.assert_close([x.cpu() for x in found.norms], list(expected.norms))
    torch.testing.assert_close({k: v.cpu() for k, v in found.state_dict().items()}, dict(expected.state_dict()))
    assert optimizer.state[found[0].weight]["step"].tolist() == 2


def test_copies_are_its_own(second, tmp_path):
    layer = nn.Linear(2, 3).to(second)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert twin.weight.device.type == "second"
    assert twin.weight.all()
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    assert load_file(tmp_path / "layer.safetensors")["weight"].eq(0).all()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    for where in (None, "cpu", "second"):
        file.seek(0)
        assert torch.load(file, map_location=where)["weight"].device.type == (where or "second")


def test_random_numbers_are_its_own(second):
    before = torch.get_rng_state()
    draws = [torch.randn(3, device=second), F.dropout(torch.ones(9, device=second)), torch.randperm(5, device=second)]
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(0)
    assert torch.randn(3, device=second).equal(draws[0])
    assert not torch.manual_seed(0).get_state().equal(torch.second.get_rng_state())
    assert not torch.randn(3).equal(draws[0].cpu())
    with torch.random.fork_rng():
        once = torch.rand(3, device=second)
    assert torch.rand(3, device=second).equal(once)
    generator = torch.Generator(second).manual_seed(5)
    assert generator.device.type == "second"
    assert generator.initial_seed() == 5
    state = generator.get_state()
    p = torch.rand(5, device=second)
    draw = p.multinomial(3, generator=generator)
    assert p.multinomial(3, generator=generator.set_state(state)).equal(draw)
    for used, where in (torch.Generator(), second), (generator, "cpu"):
        with pytest.raises(RuntimeError, match=r"[Ee]xpected"):
            torch.randn(2, generator=used, device=where)


MIXED = {
    "sum": lambda x, y: x + y,
    "sum in place": lambda x, y: y.add_(x),
    "number in place": lambda x, y: torch.zeros(()).add_(x.sum()),
    "product": lambda x, y: y @ x,
    "list": lambda x, y: torch.cat([x, y]),
    "condition": lambda x, y: torch.where(y > 0, x, x),
    "out": lambda x, y: torch.mm(x, x, out=y),
    "linear": lambda x, y: F.linear(x, x, y[0]),
    "convolution": lambda x, y: F.conv2d(x[None, None], y[None, None]),
    "label": lambda x, y: F.cross_entropy(x[0], torch.tensor(1)),
    "index": lambda x, y: x.index_select(0, torch.tensor([1])),
    "values": lambda x, y: x.__setitem__(slice(0, 2), 0) or x.index_put_([torch.zeros(3, dtype=int).to(x.device)], y),
    "attention": lambda x, y: F.scaled_dot_product_attention(x[None], y[None], y[None]),
    "storage": lambda x, y: torch.empty(0, device=x.device).set_(y),
    "data": lambda x, y: setattr(x, "data", y),
}


@pytest.mark.parametrize("case", MIXED)
def test_it_cannot_be_mixed_with_the_cpu(case, second):
    x, y = torch.randn(3, 3, device=second), torch.randn(3, 3)
    with pytest.raises(
        RuntimeError, match=r"same device|found at least two devices|different device|incompatible|device type"
    ):
        MIXED[case](x, y)


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, np.asarray, np.exp])
def test_it_is_no_array(convert, second):
    with pytest.raises(TypeError, match="can't convert second"):
        convert(torch.ones(3, device=second))


def pinned(x):
    return x.pin_memory()


WAITS = {  # of x and m, a 4x4 matrix and a mask of it on the device; of v, a row there; of y, a matrix on the CPU
    "item": (1, lambda x, m, v, y: v[0].item()),
    "bool": (1, lambda x, m, v, y: bool(m.any())),
    "tolist": (1, lambda x, m, v, y: x.tolist()),
    "to the CPU": (1, lambda x, m, v, y: x.cpu()),
    "to pinned memory": (1, lambda x, m, v, y: pinned(y).copy_(x)),
    "to pinned memory, non-blocking": (0, lambda x, m, v, y: pinned(y).copy_(x, non_blocking=True)),
    "to other memory, non-blocking": (1, lambda x, m, v, y: y.copy_(x, non_blocking=True)),
    "from the CPU": (1, lambda x, m, v, y: y.to(x.device)),
    "from the CPU, non-blocking": (1, lambda x, m, v, y: y.to(x.device, non_blocking=True)),
    "from pinned memory": (1, lambda x, m, v, y: pinned(y).to(x.device)),
    "from pinned memory, non-blocking": (0, lambda x, m, v, y: pinned(y)[1:].to(x.device, non_blocking=True)),
    "from pinned columns, non-blocking": (1, lambda x, m, v, y: pinned(y)[:, 1:].to(x.device, non_blocking=True)),
    "nothing from the CPU": (0, lambda x, m, v, y: y[:0].to(x.device)),
    "a number from the CPU": (1, lambda x, m, v, y: torch.tensor(3.0, device=x.device)),
    "a Python number": (0, lambda x, m, v, y: x + 1.0),
    "a number on the CPU": (0, lambda x, m, v, y: torch.where(m, x * torch.tensor(2.0), 0.0)),
    "nonzero": (1, lambda x, m, v, y: m.nonzero()),
    "masked_select": (1, lambda x, m, v, y: x.masked_select(m)),
    "x[mask]": (1, lambda x, m, v, y: x[m]),
    "x[:, mask]": (1, lambda x, m, v, y: x[:, v > 0]),
    "x[mask] = values": (1, lambda x, m, v, y: x.__setitem__(m, v[:1])),
    "x[mask] = 0.0": (0, lambda x, m, v, y: x.__setitem__(m, 0.0)),
    "x[index]": (0, lambda x, m, v, y: x[torch.arange(2, device=x.device)]),
    "x[index on the CPU]": (1, lambda x, m, v, y: x[torch.arange(2)]),
    "x[index on the CPU] = 0.0": (1, lambda x, m, v, y: x.__setitem__(torch.arange(2), 0.0)),
    "x[0] = 0.0": (0, lambda x, m, v, y: x.__setitem__(0, 0.0)),
    "masked_fill with a number": (0, lambda x, m, v, y: x.masked_fill(m, 0.0)),
    "masked_fill with a result": (1, lambda x, m, v, y: x.masked_fill(m, v[0])),
    "unique": (1, lambda x, m, v, y: x.unique()),
    "unique_consecutive": (1, lambda x, m, v, y: x.unique_consecutive()),
    "bincount": (1, lambda x, m, v, y: m.flatten().int().bincount()),
    "repeat_interleave": (1, lambda x, m, v, y: x.repeat_interleave(m[0].int(), 0)),
    "repeat_interleave of a known size": (0, lambda x, m, v, y: v.repeat_interleave((v > 9).int() + 1, output_size=4)),
    "equal": (1, lambda x, m, v, y: torch.equal(x, x)),
    "is_nonzero": (1, lambda x, m, v, y: torch.is_nonzero(v[0])),
    "synchronize": (1, lambda x, m, v, y: torch.accelerator.synchronize()),
    "a view, a clone, a cast": (0, lambda x, m, v, y: (x.t()[1:], x.clone(), x.double())),
    "random numbers": (0, lambda x, m, v, y: torch.randn(3, device=x.device)),
    "dropout and a product": (0, lambda x, m, v, y: F.dropout(x) @ x),
    "sorting": (0, lambda x, m, v, y: x.sort().values.topk(2)),
}


@pytest.mark.parametrize("case", WAITS)
def test_waits_are_counted(case, second):
    expected, do = WAITS[case]
    x = torch.randn(4, 4, device=second)
    values = x, x > 0, x[0].clone(), torch.randn(4, 4)
    with second.counted() as counts, second.logged() as log:
        do(*values)
    assert counts.waits == expected, log.waits


def test_operations_are_counted(second):
    x, w = torch.randn(4, 4, device=second), torch.randn(1, 1, 3, 3, device=second)
    with second.counted() as counts, second.logged() as log:
        torch.empty_like(x).copy_(x).t().reshape(2, 8)[1:].double().cpu()
    assert (counts.operations, counts.waits) == (0, 1)
    assert log.waits[0].startswith("copy from the device from test_second_device.py:")
    with second.counted() as counts, second.logged() as log:
        F.conv2d(x[None, None], w).relu_().sum()
    assert log.operations == ["aten::convolution", "aten::relu_", "aten::sum"]
    assert (counts.operations, counts.waits) == (3, 0)
    before = second.operations(), second.waits()
    torch.zeros(3, device=second, requires_grad=True).exp().sum().backward()
    assert second.operations() > before[0]
    assert second.waits() == before[1]


def test_pinned_memory(second):
    x = torch.randn(4, 3)
    y = x.pin_memory()
    assert (x.is_pinned(), y.is_pinned(), y[1:].is_pinned()) == (False, True, True)
    assert y.equal(x)
    assert torch.empty(2, pin_memory=True).is_pinned()
    assert not y.to(second, non_blocking=True).is_pinned()
    assert x.to(second).to("cpu", non_blocking=True).is_pinned()  # as from CUDA
    for (batch,) in torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2, pin_memory=True):
        assert batch.is_pinned()


def test_autocast_lowers_the_precision_of_products_only(second):
    x = torch.randn(2, 4, 4, device=second)
    linear, convolution = nn.Linear(4, 4).to(second), nn.Conv2d(2, 2, 3).to(second)
    products = {
        "linear": lambda: linear(x),
        "convolution": lambda: convolution(x),
        "matmul": lambda: x @ x,
        "bmm": lambda: torch.bmm(x, x),
        "addmm": lambda: torch.addmm(x[0], x[0], x[1]),
        "baddbmm": lambda: torch.baddbmm(x, x, x),
        "attention": lambda: F.scaled_dot_product_attention(x, x, x),
    }
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("second", dtype):
            assert {k: f().dtype for k, f in products.items()} == dict.fromkeys(products, dtype)
            y = linear(x)
            for f in (torch.exp, torch.sum, lambda y: F.layer_norm(y, (4,)), lambda y: y.softmax(-1), lambda y: y + x):
                assert f(y).dtype == torch.float32
            with torch.autocast("second", enabled=False):
                assert linear(x).dtype == torch.float32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32  # the CPU's
    y.sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.float32


def in_another_process():
    x = torch.ones(3, device="second", requires_grad=True)
    (x * 2).sum().backward()
    return torch.accelerator.current_accelerator(check_available=True).type, x.grad.tolist()


def test_started_processes_have_it(compiled):
    code = "import second_device, torch; print((torch.ones(3, device='second') * 2).sum().item())"
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    process = subprocess.Popen(command, env=second_device.environment(), stdout=pipe, text=True)
    with second_device.plugged():
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            assert pool.submit(in_another_process).result() == ("second", [2.0, 2.0, 2.0])
        with ProcessPoolExecutor(1, get_context("fork")) as pool, pytest.raises(RuntimeError, match="forked subprocess"):
            pool.submit(in_another_process).result()
    assert process.communicate()[0] == "6.0\n"


def test_why_it_cannot_be_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_library", lambda: tmp_path / "not_there.so")
    monkeypatch.setattr(device, "_path_with_scripts", lambda: "")
    monkeypatch.setenv("CXX", sys.executable)
    assert "needs ninja" in second_device.missing()
    monkeypatch.setenv("CXX", "no-compiler")
    assert "needs a C++ compiler" in second_device.missing()
