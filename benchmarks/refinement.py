"""What choosing the best of several candidates does to samples, judged by a classifier that the flow never saw.

    python benchmarks/refinement.py RUN [--num 1000] [--guidance 0,1,1.5,2] [--judge FILE] [--json FILE]

First a sweep over guidance scales, then the ways to choose, on top of the scale with the lowest FID. For each: the share of
samples that the judge assigns to the requested label, FID, precision and recall on the judge's features, candidates per
image, and CPU seconds per image as a multiple of those without choosing. All start from the same noise.

The judge is a linear probe (scikit-learn) on the pooled features of EfficientNet-Lite0, fitted on real training images;
the reference is as many training images. A flow that was trained with this encoder has seen it. For Fashion-MNIST,
`--judge FILE` takes the classifier of studies/alignment/judge.py (trained if missing), and 5,000 held-out images.
Rules that need class statistics are left out where the run has none (`flowback evaluate` makes them).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowback.core.devices import machine
from flowback.core.files import file_hash
from flowback.core.units import to_uint8
from flowback.data import ImageSet, load_data
from flowback.measure.fidelity import SplitImages, TensorImages, fidelity, reference_of
from flowback.runs.checkpoint import load_flow
from flowback.runs.config import RunConfig
from flowback.tasks.classify import ClassStatistics
from flowback.tasks.sampling import Request, draw_batches

Judged = Callable[[Tensor, Tensor], dict[str, Any]]  # of images, uint8 [n, C, H, W], and the labels asked for


def probe_judge(data: ImageSet, num: int, images: int) -> Judged:
    """The linear probe; its accuracy on real images is printed."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from flowback.measure.extractors import pooled_features

    real, held_out = SplitImages(data.train, data.levels, images), SplitImages(data.held_out, data.levels, 1000)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    probe.fit(pooled_features(real).numpy(), data.train.labels[real.indices].numpy())
    accuracy = probe.score(pooled_features(held_out).numpy(), data.held_out.labels[held_out.indices].numpy())
    print(f"the judge is right about {100 * accuracy:.1f} % of {len(held_out)} held-out images")
    reference, name = reference_of(data, num)

    def judged(images: Tensor, y: Tensor) -> dict[str, Any]:
        right = (probe.predict(pooled_features(TensorImages(images)).numpy()) == y.numpy()).mean()
        return {"right": float(right), **fidelity(TensorImages(images), reference, ("fid", "prc"), reference_name=name)}

    return judged


def trained_judge(data: ImageSet, file: Path) -> Judged:
    """The classifier of studies/alignment."""
    sys.path.append(str(Path(__file__).parents[1] / "studies" / "alignment"))
    from judge import right, trained

    judge, (reference, name) = trained(file), reference_of(data, 5000, training=False)
    options: dict[str, Any] = {"weights": str(file), "reference_name": f"{name}-{file_hash(file)[:8]}"}

    def judged(images: Tensor, y: Tensor) -> dict[str, Any]:
        found = fidelity(TensorImages(images), reference, ("fid", "prc"), "judge", **options)
        return {"right": right(judge, images, y), **found}

    return judged


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run")
    options.add_argument("--num", type=int, default=1000)
    options.add_argument("--guidance", default="0,1,1.5,2", help="scales, with commas")
    options.add_argument("--judge", type=Path, default=None)
    options.add_argument("--probe-images", type=int, default=4000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", default=None)
    o = options.parse_args()
    data = load_data(RunConfig.from_yaml((Path(o.run) / "config.yaml").read_text()).data)
    flow, weights = load_flow(o.run)
    judged = trained_judge(data, o.judge) if o.judge else probe_judge(data, o.num, o.probe_images)
    rows: list[dict[str, Any]] = []
    head = ("right", "FID", "precision", "recall", "drawn", "CPU ms", "cost")
    print(f"{'way':>38}  {'  '.join(f'{name:>9}' for name in head)}")

    def measured(way: str, request: Request, base: dict[str, Any] | None = None) -> dict[str, Any]:
        started, parts = time.process_time(), list(draw_batches(flow, request, range(o.num)))
        seconds = (time.process_time() - started) / o.num
        y = torch.cat([part.y for part in parts])
        row = {"way": way, **judged(to_uint8(torch.cat([part.x for part in parts])), y), "cpu_seconds": seconds}
        row["drawn"] = sum(float(part.draws.sum()) for part in parts) / o.num
        row["cost"] = seconds / (base or row)["cpu_seconds"]
        rows.append(row)
        texts = (f"{100 * row['right']:.1f} %", f"{row['fid']:.1f}", f"{row['precision']:.3f}", f"{row['recall']:.3f}")
        texts += (f"{row['drawn']:.2f}", f"{1000 * seconds:.1f}", f"{row['cost']:.2f}x")
        print(f"{way:>38}  {'  '.join(f'{text:>9}' for text in texts)}", flush=True)
        return row

    plain = Request(num=o.num, labels=tuple(range(flow.num_classes)), seed=o.seed)
    sweep = [(measured(f"guidance {w}", replace(plain, guidance=float(w))), float(w)) for w in o.guidance.split(",")]
    base, scale = min(sweep, key=lambda found: found[0]["fid"])
    known = ClassStatistics.load(flow.core.folder, flow.num_classes) is not None
    for rule in ("single_gradient", "z_score") if known else ("single_gradient",):
        for most, least in ((2, 2), (3, 2), (4, 1)):
            request = replace(plain, guidance=scale, best_of=most, least=least, rule=rule)
            measured(f"guidance {scale:g}, {least} to {most}, {rule}", request, base)
    if o.json:
        facts = {"machine": machine(), "run": Path(o.run).name, "weights": weights, "data": data.name, "seed": o.seed}
        facts |= {"num": o.num, "judge": "trained" if o.judge else "probe", "torch": torch.__version__, "rows": rows}
        Path(o.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
