"""Decoding against a textbook decoder, and against the arithmetic bound, on a trained flow, measured in one run.

    python benchmarks/decoding.py RUN [--batches 1,8,32] [--guidance 0,2] [--repeats 3] [--uncalibrated] [--compile]
        [--candidates] [--device auto] [--json FILE]

The textbook decoder is the published TARFlow code's way, written out here: token by token, keys and values in lists
that are concatenated at every token, and with guidance two separate passes. Beside it our sequential loop, and `auto` as
`flowback autotune` found, or as measured first. For each, seconds a batch (the least of the repeats, which alternate),
and for the result:

- error: largest difference from the textbook's images, which are in about [-1, 1];
- bound: the time over that of one forward pass' matrix products at the machine's measured GEMM speed;
- compiled (with --compile): `auto` with compiled passes;
- candidates (with --candidates): all blocks by each of the solvers that the calibration compares, and the time of `auto`
  over that of the fastest;
- bfloat16: largest and root-mean-square error of decoding under autocast, and its time over that of float32; left out
  where products in bfloat16 are slower than in float32.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowback.core.devices import fast_bfloat16, machine, pick_device, synchronize
from flowback.flow.autotune import Autotune, Measurement, machine_name
from flowback.flow.block import affine_decode
from flowback.flow.decoding import Solver
from flowback.flow.patches import unpatchify
from flowback.flow.tarflow import TarFlow
from flowback.flow.transformer import Cache
from flowback.runs.checkpoint import load_flow
from flowback.tasks.autotune import autotune, candidates


class ListCache(Cache):
    """Keys and values as the published code keeps them: lists, concatenated whenever they are read."""

    def __init__(self) -> None:
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k, v [B, heads, 1, head_dim]`; return those of all tokens so far."""
        self.keys.setdefault(layer, []).append(k)
        self.values.setdefault(layer, []).append(v)
        return torch.cat(self.keys[layer], dim=2), torch.cat(self.values[layer], dim=2)


def textbook(flow: TarFlow, z: Tensor, y: Tensor, guidance: float) -> Tensor:
    """Images `[B, C, H, W]` from noise `[B, N, D]`, token by token."""
    conditional = flow.class_weights(y, len(z))
    unconditional = torch.full_like(conditional, 1 / flow.num_classes)
    for block in reversed(flow.blocks):
        z = block.reorder(z)
        x = z.clone()
        cache, cache_unconditional = ListCache(), ListCache()
        for d in range(1, z.shape[1]):
            mu, a, _ = block.predict_next(x[:, d - 1 : d], conditional, cache=cache)
            if guidance:
                mu_u, a_u, _ = block.predict_next(x[:, d - 1 : d], unconditional, cache=cache_unconditional)
                mu, a = mu + guidance * (mu - mu_u), a + guidance * (a - a_u)
            x[:, d : d + 1] = affine_decode(z[:, d : d + 1], mu, a)
        z = block.reorder(x)
    return unpatchify(z, flow.config.patch_size, flow.image_size)


def everywhere(solver: Solver, flow: TarFlow, device: torch.device) -> Autotune:
    """A calibration that has all blocks decoded by one solver, for any number of rows."""
    return Autotune(machine_name(device), {1: [Measurement(solver, math.nan, math.nan, 0, 0.0)] * flow.config.blocks})


def gemm_speed(device: torch.device, size: int = 2048) -> float:
    """Floating-point operations a second of a large square product in float32."""
    a, b = torch.randn(2, size, size, device=device)
    return 2 * size**3 / min(clock(lambda: a @ b, device)[0] for _ in range(10))


def clock(run, device: torch.device) -> tuple[float, Tensor]:
    """Seconds of a call, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run")
    options.add_argument("--batches", default="1,8,32")
    options.add_argument("--guidance", default="0,2")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--uncalibrated", action="store_true", help="auto as it is without a calibration")
    options.add_argument("--compile", action="store_true", help="also with compiled passes, which are compiled before")
    options.add_argument("--candidates", action="store_true", help="also all blocks by each candidate of the calibration")
    options.add_argument("--device", default="auto")
    options.add_argument("--json", default=None)
    o = options.parse_args()
    device = pick_device(o.device)
    flow, weights = load_flow(o.run)
    flow.to(device)
    batches = [int(word) for word in o.batches.split(",")]
    scales = [float(word) for word in o.guidance.split(",")]
    millions = sum(p.numel() for p in flow.parameters()) / 1e6
    where = machine(device)
    print(f"{millions:.1f}M parameters, {flow.token_shape[0]} tokens, {weights} of {o.run}, on {where}")
    if o.uncalibrated:
        flow.autotune = None
    elif flow.autotune is None or flow.autotune.machine != machine_name(device):
        autotune(flow, sorted({B * (2 if w else 1) for B in batches for w in scales}), report=print)
    speed = gemm_speed(device)
    print(f"GEMM speed {speed / 1e9:.0f} GFLOP/s")

    rows = []
    for B in batches:
        for w in scales:
            z = torch.randn(B, *flow.token_shape, generator=torch.Generator().manual_seed(0)).to(device)
            y = (torch.arange(B) % flow.num_classes).to(device)
            with FlopCounterMode(display=False) as counter:
                flow.encode(torch.zeros(B, *flow.data_shape, device=device), y)
            bound = counter.get_total_flops() * (2 if w else 1) / speed
            ways = {
                "textbook": lambda z=z, y=y, w=w: textbook(flow, z, y, w),
                "sequential": lambda z=z, y=y, w=w: flow.decode(z, y, w, method="sequential"),
                "auto": lambda z=z, y=y, w=w: flow.decode(z, y, w),
            }

            def low(z: Tensor = z, y: Tensor = y, w: float = w) -> Tensor:
                with torch.autocast(device.type, torch.bfloat16):
                    return flow.decode(z, y, w)

            def by(solver: Solver, z: Tensor = z, y: Tensor = y, w: float = w) -> Tensor:
                measured, flow.autotune = flow.autotune, everywhere(solver, flow, device)
                try:
                    return flow.decode(z, y, w)
                finally:
                    flow.autotune = measured

            rivals = candidates(flow.token_shape[0], fast_bfloat16(device))[1:] if o.candidates else []
            ways |= {str(solver): lambda solver=solver, by=by: by(solver) for solver in rivals}
            if fast_bfloat16(device):
                ways["bfloat16"] = low
            if o.compile:
                ways["compiled"] = lambda z=z, y=y, w=w: flow.decode(z, y, w, compile=True)
                ways["compiled"]()
            times = dict.fromkeys(ways, math.inf)
            images = {}
            for _ in range(o.repeats):
                for name, way in ways.items():
                    seconds, images[name] = clock(way, device)
                    times[name] = min(times[name], seconds)
            row = {
                "batch": B,
                "guidance": w,
                "seconds": {name: round(value, 4) for name, value in times.items()},
                "speedup": round(times["textbook"] / min(times["auto"], times.get("compiled", math.inf)), 2),
                "speedup_auto": round(times["textbook"] / times["auto"], 2),
                "speedup_sequential": round(times["textbook"] / times["sequential"], 2),
                "auto_over_sequential": round(times["auto"] / times["sequential"], 3),
                "error": max(
                    float((images[n] - images["textbook"]).abs().max()) for n in ("auto", *(["compiled"] * o.compile))
                ),
                "over_bound": round(times["auto"] / bound, 2),
            }
            low_text = ""
            if rivals:
                best = min(times["sequential"], *(times[str(solver)] for solver in rivals))
                row["auto_over_best_candidate"] = round(times["auto"] / best, 3)
                low_text += f"   {row['auto_over_best_candidate']:.2f}x the best candidate"
            if "bfloat16" in ways:
                difference = images["bfloat16"] - images["sequential"]
                row["bfloat16_largest_error"] = float(difference.abs().max())
                row["bfloat16_rms_error"] = float(difference.square().mean().sqrt())
                row["bfloat16_time"] = round(times["bfloat16"] / times["auto"], 2)
                low_text += f"   bfloat16: {row['bfloat16_time']:.2f}x, rms error {row['bfloat16_rms_error']:.0e}"
            rows.append(row)
            s = row["seconds"]
            compiled_text = f"   compiled {s['compiled']:7.3f} s" if o.compile else ""
            print(
                f"batch {B:2}  guidance {w:g}   textbook {s['textbook']:7.3f} s   sequential {s['sequential']:7.3f} s   "
                f"auto {s['auto']:7.3f} s{compiled_text} ({times['auto'] / B:.3f} s/image)   {row['speedup']:5.2f}x   "
                f"error {row['error']:.0e}   {row['over_bound']:5.1f}x the bound{low_text}",
                flush=True,
            )
    if o.json:
        facts = {"machine": where, "run": o.run, "weights": weights, "parameters_millions": round(millions, 2)}
        facts |= {"tokens": flow.token_shape[0], "gemm_gflops": round(speed / 1e9), "repeats": o.repeats, "rows": rows}
        Path(o.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
