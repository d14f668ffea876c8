"""What ranking and refinement at test time do to samples, judged by a classifier that the flow never saw.

    python benchmarks/refinement.py RUN [--num 1000] [--guidance 1] [--json FILE]

The judge is a linear probe (scikit-learn) on the pooled features of EfficientNet-Lite0, fitted on real training images; its
accuracy on real held-out images is printed first. For every way of sampling: the share of samples that the judge takes
for the label asked for, FID, precision and recall on the same features against as many real training images, and
the time an image took, as a multiple of plain sampling in the same run.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from flowback.core.devices import machine
from flowback.data import load_data
from flowback.measure.extractors import pooled_features
from flowback.measure.fidelity import SplitImages, fidelity, open_images, reference_of
from flowback.runs.checkpoint import load_flow
from flowback.runs.config import RunConfig
from flowback.tasks.sampling import Request, sample_to_disk


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run")
    options.add_argument("--num", type=int, default=1000)
    options.add_argument("--guidance", type=float, default=1.0)
    options.add_argument("--probe-images", type=int, default=4000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", default=None)
    o = options.parse_args()
    data = load_data(RunConfig.from_yaml((Path(o.run) / "config.yaml").read_text()).data)
    flow, weights = load_flow(o.run)

    real = SplitImages(data.train, data.levels, o.probe_images)
    held_out = SplitImages(data.held_out, data.levels, 1000)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    probe.fit(pooled_features(real).numpy(), data.train.labels[real.indices].numpy())
    judge = probe.score(pooled_features(held_out).numpy(), data.held_out.labels[held_out.indices].numpy())
    print(f"the judge takes {100 * judge:.1f} % of {len(held_out)} held-out real images for what they are")

    reference, name = reference_of(data, o.num)
    plain = Request(run=o.run, num=o.num, labels=tuple(range(flow.num_classes)), seed=o.seed)
    guided = replace(plain, guidance=o.guidance)
    ways = {
        "plain": plain,
        "rank 4": replace(plain, rank=4),
        "refine 3": replace(plain, refine=3),
        "refine 3, contrast": replace(plain, refine=3, objective="contrast"),
        f"guidance {o.guidance:g}": guided,
        f"guidance {o.guidance:g}, rank 4": replace(guided, rank=4),
        f"guidance {o.guidance:g}, refine 3": replace(guided, refine=3),
        f"guidance {o.guidance:g}, refine 3, contrast": replace(guided, refine=3, objective="contrast"),
    }
    rows = []
    print(f"{'way':>30}  {'right label':>11}  {'FID':>7}  {'precision':>9}  {'recall':>6}  {'s/image':>8}  {'cost':>6}")
    for way, request in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "samples.npz"
            notes = sample_to_disk(request, file)
            images, labels = open_images(file), np.load(file)["arr_1"]
            right = float(np.mean(probe.predict(pooled_features(images).numpy()) == labels))
            figures = fidelity(images, reference, ("fid", "prc"), reference_name=name)
        seconds = sum(note.seconds for note in notes) / o.num
        row = {"way": way, "right_label": right, "seconds_per_image": seconds, **figures}
        row["cost"] = seconds / (rows[0]["seconds_per_image"] if rows else seconds)
        rows.append(row)
        print(
            f"{way:>30}  {100 * right:>9.1f} %  {row['fid']:>7.2f}  {row['precision']:>9.3f}  {row['recall']:>6.3f}  "
            f"{seconds:>8.4f}  {row['cost']:>5.1f}x",
            flush=True,
        )
    if o.json:
        facts = {"machine": machine(), "run": o.run, "weights": weights, "data": data.name, "seed": o.seed}
        facts |= {"judge_accuracy": judge, "torch": torch.__version__, "rows": rows}
        Path(o.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
