"""Cost and quality of every alignment gradient, as ratios to a step without alignment, measured in one run.

    python benchmarks/alignment.py [--width 256] [--batch 2] [--repeats 5] [--device auto] [--json FILE]

At the paper's proportions: 8 blocks x 8 layers, 256 tokens, blocks 7 and 8, layer 6, and a projector as wide as the flow
onto features of 3/4 of its width (1024 and 768 there). For each gradient:

- step: median time of encode, loss and backward, over that of the likelihood alone;
- memory: peak memory over that of the likelihood alone, both above what the weights and inputs hold already;
- cosine: of the alignment's gradient (flow and projector) with the true one, autograd through the sequential decode.

The flow is briefly trained on random smooth images first, so that its blocks are no identities.
"""

import argparse
import ctypes
import gc
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from flowback.alignment import Alignment
from flowback.core.devices import machine, pick_device
from flowback.core.units import nll_per_dim
from flowback.flow.tarflow import TarFlow

MEMBERS = ["none", "forward", "detach", "cached", "one_step", 1, 2, 4, "exact", "sequential"]


class PatchFeatures(nn.Module):
    """Stands for an encoder whose features are cached: a fixed random nonlinear map of each patch."""

    def __init__(self, flow: TarFlow, dim: int) -> None:
        super().__init__()
        self.grid, self.dim = flow.grid, dim
        self.register_buffer("matrix", torch.randn(flow.token_shape[1], dim))
        self.tokenize = flow.tokenize

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, N, dim]`."""
        return torch.tanh(self.tokenize(x) @ self.matrix)


class PeakMemory:
    """Peak memory of a `with` block above its start, bytes: the allocator's on a GPU, the process' own on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)
            self.start, self.done = resident(), False
            self.thread = threading.Thread(target=self._watch)
            self.thread.start()
        else:
            torch.accelerator.reset_peak_memory_stats()
            self.start = torch.accelerator.memory_allocated()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cpu":
            self.done = True
            self.thread.join()
        else:
            self.peak = torch.accelerator.max_memory_allocated() - self.start

    def _watch(self) -> None:
        while not self.done:
            self.peak = max(self.peak, resident() - self.start)
            time.sleep(0.002)


def resident() -> int:
    """Resident memory of this process, bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def smooth_images(count: int, size: int, device: torch.device) -> Tensor:
    """Random images with some structure: upsampled noise plus a little of the flow's training noise."""
    coarse = torch.randn(count, 3, size // 8, size // 8, device=device)
    x = nn.functional.interpolate(coarse, size, mode="bicubic").tanh()
    return x + 0.05 * torch.randn_like(x)


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=256)
    options.add_argument("--blocks", type=int, default=8)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--grid", type=int, default=16, help="tokens a side")
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--train", type=int, default=30, help="likelihood steps before measuring")
    options.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    options.add_argument("--device", default="auto")
    options.add_argument("--json", default=None)
    o = options.parse_args()
    device = pick_device(o.device)

    torch.manual_seed(0)
    size, T = 4 * o.grid, o.blocks
    with device:  # some hundred million random numbers take long on a CPU
        flow = TarFlow(image_size=size, patch_size=4, width=o.width, blocks=T, layers=o.layers, num_classes=10)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-4 * min(1.0, 256 / o.width))  # 2e-4 diverges at width 1024
    for _ in range(o.train):
        nll_per_dim(*flow.encode(smooth_images(o.batch, size, device), torch.randint(10, (o.batch,)))).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    layer = round(0.75 * o.layers)
    encoder = PatchFeatures(flow, round(0.75 * o.width)).to(device)
    align = Alignment(flow, encoder, at=[(T - 1, layer), (T, layer)], projector_width=o.width).to(device)
    x, y = smooth_images(o.batch, size, device), torch.randint(10, (o.batch,), device=device)
    targets = align.targets(x)
    parameters = list(align.parameters())

    def set_member(member: str | int) -> None:
        align.strategy = member if member in ("forward", "detach") else "reverse"  # pyright: ignore[reportAttributeAccessIssue]
        align.gradient = member if align.strategy == "reverse" else "one_step"

    def loss(member: str | int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=o.precision == "bf16-mixed"):
            if member == "none":
                return nll_per_dim(*flow.encode(x, y))
            set_member(member)
            return align.loss(x, y, targets=targets)[0]

    def step(member: str | int) -> None:
        loss(member).backward()
        align.zero_grad(set_to_none=True)

    def alignment_gradient(member: str | int) -> Tensor:
        set_member(member)
        align.zero_grad(set_to_none=True)
        weight, align.weight = align.weight, 1.0
        total, _ = align.loss(x, y, targets=targets)
        align.weight = weight
        total.backward()
        own = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        align.zero_grad(set_to_none=True)
        nll_per_dim(*flow.encode(x, y)).backward()
        plain = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        align.zero_grad(set_to_none=True)
        return (own - plain).double()

    def synchronised(run: Callable[[], object]) -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    times: dict[str | int, list[float]] = {member: [] for member in MEMBERS}
    peaks: dict[str | int, int] = {}
    for member in MEMBERS:  # warm-up, and memory
        step(member)
        with PeakMemory(device) as memory:
            step(member)
        peaks[member] = memory.peak
    for repeat in range(o.repeats):
        for member in MEMBERS:
            if member != "sequential" or repeat < 2:
                times[member].append(synchronised(lambda member=member: step(member)))
    true = alignment_gradient("sequential")
    align.gradient, align.strategy = "exact", "reverse"
    terms = align.loss(x, y, targets=targets)[1]["terms"]

    where = machine(device)
    print(
        f"{T} blocks x {o.layers} layers x width {o.width}, {o.grid**2} tokens, batch {o.batch}, {o.precision}, on {where}"
    )
    print(f"aligned: blocks {T - 1} and {T}, layer {layer}; exact took {terms} terms (block: terms)")
    print(f"{'gradient':>10}  {'step':>8}  {'memory':>7}  {'cosine':>8}  {'seconds':>8}")
    rows = []
    base = median(times["none"])
    for member in MEMBERS:
        cosine = None
        if member != "none":
            cosine = float(nn.functional.cosine_similarity(alignment_gradient(member), true, dim=0))
        row = {
            "gradient": f"neumann {member}" if isinstance(member, int) else member,
            "step_ratio": round(median(times[member]) / base, 3),
            "memory_ratio": round(peaks[member] / peaks["none"], 3),
            "cosine": None if cosine is None else round(cosine, 5),
            "seconds": round(median(times[member]), 4),
        }
        rows.append(row)
        cosine_text = "" if cosine is None else f"{cosine:.5f}"
        values = f"{row['step_ratio']:>7.2f}x  {row['memory_ratio']:>6.2f}x  {cosine_text:>8}  {row['seconds']:>8.3f}"
        print(f"{row['gradient']:>10}  {values}", flush=True)
    if o.json:
        settings = {k: v for k, v in vars(o).items() if k != "json"}
        facts = {"machine": where, "settings": settings, "terms": {str(t): k for t, k in terms.items()}, "rows": rows}
        Path(o.json).write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
