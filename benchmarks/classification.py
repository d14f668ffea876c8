"""What classifying one image costs at 10, 100 and 1,000 classes, as ratios to one forward pass, measured in one run.

    python benchmarks/classification.py [--width 128] [--images 32] [--repeats 3] [--json FILE]

The flow has the shape of the latent recipes, 256 tokens of a 32x32x4 grid in patches of 2, and random weights; so are
the images, since a cost does not depend on them. `exact` is measured on as many images as it needs to stay below a
minute.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from flowback.core.devices import machine
from flowback.flow.tarflow import TarFlow
from flowback.tasks.classify import class_scores, fit_statistics, rule_named

CLASSES = (10, 100, 1000)
RULES = ("single_gradient", "z_score", "shortlist_3", "exact")


def seconds(work: Callable[[], object], images: int, repeats: int) -> float:
    """Median time of some work, divided by the images in it."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) / images)
    return median(times)


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--images", type=int, default=32)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--json", default=None)
    o = options.parse_args()
    rows = []
    for K in CLASSES:
        torch.manual_seed(0)
        shape = {"image_size": 32, "channels": 4, "patch_size": 2, "head_dim": 32, "positions": "rotary", "mlp": "swiglu"}
        flow = TarFlow(**shape, width=o.width, blocks=4, layers=3, num_classes=K).eval()
        x = torch.randn(o.images, 4, 32, 32)
        statistics = fit_statistics(flow, x)

        with torch.no_grad():
            forward = seconds(lambda f=flow, x=x: f.log_prob(x), len(x), o.repeats)
        for rule in RULES:
            _, passes, _ = rule_named(rule, K)
            part = x[: max(1, min(len(x), 2000 // K))] if rule == "exact" else x
            known = {"rule": rule, "statistics": statistics}
            cost = seconds(lambda f=flow, x=part, known=known: class_scores(f, x, **known), len(part), o.repeats) / forward
            rows.append({"classes": K, "rule": rule, "passes": passes, "forward_passes_measured": cost})
            print(f"{K:5} classes  {rule:16} {passes:5} passes counted  {cost:8.2f} measured", flush=True)
    if o.json:
        facts = {"machine": machine(), "width": o.width, "images": o.images, "rows": rows}
        Path(o.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
