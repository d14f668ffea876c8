"""What a fitted prior, temperature and guidance do to samples: see README.md.

python studies/priors/prior_study.py RUN... [--device cpu] [--samples 1000] [--images 10000]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from flowback.core.files import file_hash, write_whole
from flowback.core.seeds import keyed_generator
from flowback.core.units import to_uint8
from flowback.data import ImageSet
from flowback.data.splits import spread
from flowback.flow.guidance import RULES, Guidance
from flowback.latents import Flow
from flowback.measure.copies import MOST_IMAGES, MOST_TRAINING, copies
from flowback.measure.density import seen
from flowback.measure.fidelity import SplitImages, TensorImages, fidelity, reference_of
from flowback.runs.checkpoint import load_flow
from flowback.tasks.classify import class_scores
from flowback.training.prior import IMAGES, data_of, fit_to

sys.path.append(str(Path(__file__).parents[1] / "alignment"))
from judge import right, trained

JUDGE = Path("runs/studies/alignment/judge.pth")
RESULTS = Path(__file__).parent / "results"
TEMPERATURES, SCALES = (1.0, 0.9, 0.8, 0.7, 0.6), (0.5, 1.0, 2.0, 4.0, 8.0)
PRIORS = ("standard", "fitted")
REFERENCE, CLASSIFIED = 5000, 2000


def judged(x: Tensor, y: Tensor, data: ImageSet) -> dict[str, float]:
    """The figures of images `[n, 1, 28, 28]` that were asked for as classes `y`."""
    images = to_uint8(torch.where(x.isfinite(), x, 0))
    reference, name = reference_of(data, REFERENCE, training=False)
    cached = f"{name}-{file_hash(JUDGE)[:8]}"
    found = fidelity(TensorImages(images), reference, ("fid", "prc"), "judge", weights=str(JUDGE), reference_name=cached)
    training = SplitImages(data.train, data.levels, MOST_TRAINING)
    held_out = SplitImages(data.held_out, data.levels, MOST_IMAGES)
    some: Any = Subset(TensorImages(images), spread(len(images), MOST_IMAGES))
    figures = {name: found[name] for name in ("fid", "precision", "recall")}
    figures |= {"right": right(trained(JUDGE), images, y), "not_finite": int((~x.isfinite()).flatten(1).any(dim=1).sum())}
    return figures | {"copies": copies(some, held_out, training)[0]}


@torch.no_grad()
def measure(flow: Flow, data: ImageSet, samples: int, rows: list[dict[str, Any]], keep: Any) -> None:
    """Add what is missing to `rows`; `keep` is called after each."""
    y = torch.arange(samples) % flow.num_classes

    def point(prior: str, temperature: float, guidance: float, rule: str) -> None:
        setting = {"prior": prior, "temperature": temperature, "guidance": guidance, "rule": rule}
        if any(setting.items() <= row.items() for row in rows) or (prior == "fitted" and flow.core.fitted_prior is None):
            return
        options: dict[str, Any] = {"prior": prior, "temperature": temperature, "batch_size": 250}
        x = flow.sample(y=y, guidance=Guidance(guidance, rule=rule), generator=keyed_generator(0), **options)
        rows.append(setting | judged(x.float().cpu(), y, data))
        print(rows[-1], flush=True)
        keep()

    for prior in PRIORS:
        for temperature in TEMPERATURES:
            point(prior, temperature, 0.0, "linear")
    for prior in {row["prior"] for row in rows}:
        plain = [row for row in rows if row["prior"] == prior and not row["guidance"]]
        best = min(plain, key=lambda row: row["fid"])["temperature"]
        for rule in RULES:
            for scale in SCALES:
                point(prior, best, scale, rule)


def main() -> None:
    """Measure the runs that are named."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="+", type=Path)
    options.add_argument("--device", default="cpu")
    options.add_argument("--samples", type=int, default=1000)
    options.add_argument("--images", type=int, default=IMAGES, help="to fit the prior to, at most")
    options.add_argument("--results", type=Path, default=RESULTS)
    o = options.parse_args()
    trained(JUDGE)
    for run in o.runs:
        file = o.results / f"{run.name}.json"
        flow, weights = load_flow(run, device=o.device)
        data = data_of(run)
        known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"rows": []}
        fit = fit_to(flow, data, o.images)
        known |= {"run": run.name, "weights": weights, "gained": fit.gained, "kept": fit.prior is not None}
        known |= {"shares": fit.shares, "images": fit.images, "samples": o.samples}

        def keep(file: Path = file, known: dict[str, Any] = known) -> None:
            write_whole(file, lambda part: part.write_text(json.dumps(known, indent=1) + "\n"))

        if "accuracy" not in known:
            x, y = seen(flow, data.held_out, spread(len(data.held_out), CLASSIFIED), data.levels)
            rules = ["exact", *(["exact_fitted"] if fit.prior is not None else [])]
            scores = {rule: class_scores(flow.core, x, rule).argmax(dim=1).cpu() for rule in rules}
            known["accuracy"] = {rule: float((found == y).float().mean()) for rule, found in scores.items()}
            print(known["accuracy"], flush=True)
        keep()
        measure(flow, data, o.samples, known["rows"], keep)


if __name__ == "__main__":
    main()
