"""Measures what README.md asks of finished runs, and prints the tables, as Markdown.

    python studies/priors/prior_study.py [RUN …] [--results FOLDER]

Runs are folders named ARM-SEED. What is in results/ is not measured again.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from flowback.core.devices import machine
from flowback.core.seeds import keyed_generator
from flowback.core.units import from_levels, to_uint8
from flowback.data import ImageSet
from flowback.data.splits import spread
from flowback.flow.guidance import Guidance
from flowback.latents import Flow
from flowback.measure.copies import copies
from flowback.measure.fidelity import TensorImages, reference_of
from flowback.runs.checkpoint import load_flow
from flowback.runs.config import RunConfig
from flowback.runs.folder import run_data
from flowback.tasks.classify import classify
from flowback.training.prior import fit_to

HERE = Path(__file__).parent
sys.path += [str(HERE.parent), str(HERE.parent / "alignment")]

from judge import right, trained

from common import interval, judged, write_result

JUDGE = Path("runs/studies/latents/judge.pth")
FITTED, SAMPLES, CLASSIFIED = 10_000, 1000, 500
TEMPERATURES, SCALES = (1.0, 0.95, 0.9, 0.8, 0.7), (0.5, 1.0, 2.0, 4.0, 8.0)
Row = dict[str, Any]


@torch.no_grad()
def measure(run: Path) -> dict[str, Any]:
    """Fit the prior of a run and draw in all settings; nothing is written into the run."""
    flow, _ = load_flow(run, device="auto")
    data = run_data(run, RunConfig.read(run / "config.yaml").data)
    fit = fit_to(flow, data, FITTED)
    facts: dict[str, Any] = {"machine": machine(flow.device), "gained": fit.gained, "shares": fit.shares}
    facts |= {"fit_seconds": round(fit.seconds, 1)}
    priors = ["standard"] + ["fitted"] * (fit.prior is not None)
    settings = [{"prior": prior, "temperature": t} for prior in priors for t in TEMPERATURES]
    settings += [{"prior": "standard", "guidance": w, "rule": rule} for rule in ("linear", "product") for w in SCALES]
    settings += [{"prior": prior, "guidance": w, "rule": "product"} for prior in priors[1:] for w in SCALES[:2]]
    facts["samples"] = [drawn(flow, data, **setting) for setting in settings]
    pixels, y = data.held_out[spread(len(data.held_out), CLASSIFIED)]
    x = from_levels(pixels, data.levels)
    facts["exact"] = {prior: exact(flow, x, y, prior) for prior in priors}
    return facts


def exact(flow: Flow, x: Tensor, y: Tensor, prior: str) -> float:
    """Share of images that exact classification under a prior gets right."""
    rule = "exact" if prior == "standard" else "exact_fitted"
    return float((classify(flow, x, rule).argmax(dim=1).cpu() == y).float().mean())


def drawn(
    flow: Flow, data: ImageSet, prior: str, temperature: float = 1.0, guidance: float = 0.0, rule: str = "linear"
) -> Row:
    """A row of figures of samples in one setting."""
    y = torch.arange(SAMPLES) % flow.num_classes
    scale = Guidance(guidance, rule=rule)
    x = flow.sample(y=y, temperature=temperature, prior=prior, guidance=scale, generator=keyed_generator(0), batch_size=250)
    x = x.float().cpu()
    finite = x.isfinite().flatten(1).all(dim=1).float().mean()
    images = to_uint8(torch.where(x.isfinite(), x, 0))
    row: Row = {"prior": prior, "temperature": temperature, "guidance": guidance, "rule": rule, "finite": float(finite)}
    row |= judged(images, data, JUDGE) | {"right": right(trained(JUDGE), images, y)}
    if temperature == 1 and not guidance:
        others, _ = reference_of(data, SAMPLES, training=False)
        training, _ = reference_of(data, len(data.train), training=True)
        row["copies"] = copies(TensorImages(images), others, training, flow.device)[0]["close"]
    return row


def load(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The results, by arm and seed."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*-*.json")):
        arm, seed = file.stem.rsplit("-", 1)
        arms.setdefault(arm, {})[int(seed)] = json.loads(file.read_text())
    return arms


def best(result: dict[str, Any], wanted: Callable[[Row], bool]) -> Row:
    """The row of lowest FID among those that are wanted."""
    return min((row for row in result["samples"] if wanted(row)), key=lambda row: row["fid"])


def table(arms: dict[str, dict[int, dict[str, Any]]]) -> str:
    """A row for each arm and prior, at its best temperature; and for the best guidance of either rule."""
    ways: dict[str, Callable[[Row], bool]] = {
        "N(0, I), T 1": lambda r: r["prior"] == "standard" and r["temperature"] == 1 and not r["guidance"],
        "fitted, T 1": lambda r: r["prior"] == "fitted" and r["temperature"] == 1 and not r["guidance"],
        "N(0, I), best T": lambda r: r["prior"] == "standard" and not r["guidance"],
        "fitted, best T": lambda r: r["prior"] == "fitted" and not r["guidance"],
        "N(0, I), best linear guidance": lambda r: bool(r["guidance"]) and r["rule"] == "linear",
        "N(0, I), best product guidance": lambda r: (
            r["prior"] == "standard" and bool(r["guidance"]) and r["rule"] == "product"
        ),
        "fitted, best product guidance": lambda r: r["prior"] == "fitted" and bool(r["guidance"]),
    }
    lines = [
        "| arm | drawn with | seeds | FID | precision | recall | judge right % | close to training % |",
        "|---" * 8 + "|",
    ]
    for arm, results in arms.items():
        for way, wanted in ways.items():
            rows = [best(r, wanted) for r in results.values() if any(map(wanted, r["samples"]))]
            if not rows:
                continue
            cells = [interval([row[k] for row in rows], d) for k, d in (("fid", 1), ("precision", 2), ("recall", 2))]
            cells.append(interval([100 * row["right"] for row in rows], 0))
            cells.append(interval([100 * row["copies"] for row in rows], 1) if all("copies" in row for row in rows) else "")
            lines.append(f"| {arm} | {way} | {len(rows)} | {' | '.join(cells)} |")
        gaps = [
            best(r, ways["fitted, best T"])["fid"] - best(r, ways["N(0, I), best T"])["fid"]
            for r in results.values()
            if any(map(ways["fitted, best T"], r["samples"]))
        ]
        if gaps:
            lines.append(f"| {arm} | fitted less N(0, I), each at its best T | {len(gaps)} | {interval(gaps, 1)} | | | | |")
    return "\n".join(lines)


def guidance_table(arms: dict[str, dict[int, dict[str, Any]]]) -> str:
    """FID against the scale, by both rules, and the share of finite images at the largest."""
    head = " | ".join(f"w {w:g}" for w in (0.0, *SCALES))
    lines = [f"| arm | rule | {head} | finite at {SCALES[-1]:g}, % |", "|---" * (len(SCALES) + 4) + "|"]
    for arm, results in arms.items():
        for rule in ("linear", "product"):
            cells, finite = [], []
            for w in (0.0, *SCALES):
                rows = [
                    row
                    for r in results.values()
                    for row in r["samples"]
                    if (row["prior"], row["temperature"], row["guidance"]) == ("standard", 1, w)
                    and (not w or row["rule"] == rule)
                ]
                cells.append(interval([row["fid"] for row in rows], 0))
                finite = [100 * row["finite"] for row in rows]
            lines.append(f"| {arm} | {rule} | {' | '.join(cells)} | {mean(finite):.1f} |")
    return "\n".join(lines)


def fit_table(arms: dict[str, dict[int, dict[str, Any]]]) -> str:
    """What the fit gained, and exact accuracy under both priors."""
    lines = ["| arm | seeds | held-out nats/dim gained | exact %, N(0, I) | exact %, fitted | fit, s |", "|---" * 6 + "|"]
    for arm, results in arms.items():
        found = list(results.values())
        both = [r for r in found if "fitted" in r["exact"]]
        cells = [interval([r["gained"] for r in found], 4), interval([100 * r["exact"]["standard"] for r in found], 1)]
        cells.append(interval([100 * r["exact"]["fitted"] for r in both], 1) if both else "")
        cells.append(f"{mean(r['fit_seconds'] for r in found):.0f}")
        lines.append(f"| {arm} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs, ARM-SEED")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="a folder")
    options = parser.parse_args()
    for run in options.runs:
        file = options.results / f"{run.name}.json"
        if not file.is_file():
            write_result(file, measure(run))
    arms = load(options.results)
    print(table(arms), guidance_table(arms), fit_table(arms), sep="\n\n")


if __name__ == "__main__":
    main()
