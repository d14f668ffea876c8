"""Runs the study of README.md: trains what is missing, scores the test's cells, writes results/ and a picture of maps.

    python studies/cells/cells_study.py [--only pixels]

Interrupted, the same command resumes. Runs are in runs/studies/cells, and so is maps.png: its images may not be used
commercially, so it stays on the machine.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowback.core.devices import machine, pick_device
from flowback.core.files import write_whole
from flowback.core.units import from_levels
from flowback.data import as_images
from flowback.data.folders import image_files
from flowback.data.pictures import save_grid, with_map
from flowback.data.splits import spread
from flowback.encoders import load_encoder
from flowback.latents import as_data
from flowback.measure.outliers import Detector, Mahalanobis, NearestNeighbors, Padim, features_of
from flowback.runs import checkpoint
from flowback.runs.checkpoint import State, load_flow
from flowback.runs.config import AutoencoderRunConfig, RunConfig
from flowback.runs.folder import run_data
from flowback.tasks.score import HeldOut, log_prob_parts, score
from flowback.training import train
from flowback.training.autoencoders import train_autoencoder

HERE = Path(__file__).parent
ARMS = ("pixels", "semantic")
DEFECTS = ("defect_100", "defect_067", "defect_033")
KINDS = ("all", "mono", "poly")
MAIN = "map_95"
BASELINES: dict[str, Callable[[], Detector]] = {
    "mahalanobis": Mahalanobis,
    "nearest_neighbors": NearestNeighbors,
    "padim": Padim,
}
DRAWS, BOOTSTRAPS, SIZE = 2, 2000, 64
SHOWN = 12  # cells in the picture


@dataclass(frozen=True)
class Cells:
    """Images of cells in [-1, 1], `[n, 1, 64, 64]`, and the kind of module that each is from."""

    x: Tensor
    kinds: list[str]

    def where(self, kind: str) -> Tensor:
        """Indices of one kind, or of all."""
        return torch.tensor([i for i, each in enumerate(self.kinds) if kind in ("all", each)])


def ready(recipe: Path, kind: Any = RunConfig, work: Any = train) -> Any:
    """The configuration of a recipe whose run is finished, which is trained if it is not."""
    config = kind.read(recipe)
    newest = checkpoint.newest(config.folder)
    if newest is None or State.read(newest).step < config.train.steps:
        state = work(replace(config, train=replace(config.train, resume=newest is not None))).state
        if state.step < config.train.steps:
            sys.exit(f"interrupted at step {state.step}; the same command resumes")
    return config


def divided(config: RunConfig) -> tuple[Tensor, Tensor, dict[str, Cells]]:
    """Images for training, images for reference, and the test's cells by class."""
    data = run_data(config.folder, config.data)
    held_out: Any = data.held_out
    names = [name.decode() for name in held_out.source.names(held_out.indices.tolist())]
    x = from_levels(held_out[range(len(held_out))][0])
    found = {"sound": Cells(x[1::2], [_kind(name) for name in names[1::2]])}
    for name in DEFECTS:
        files = list(image_files(Path(config.data.path or "").parent / name))
        found[name] = Cells(as_images(files, SIZE, 1), [_kind(Path(file).name) for file in files])
    return from_levels(data.train[range(len(data.train))][0]), x[::2], found


def _kind(name: str) -> str:
    return name.split("_")[0]


def of_flow(
    run: Path, images: Tensor, reference: Tensor, test: dict[str, Cells]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Scores of the flow, the more normal the larger: of each score and class `[n]`; and the anomaly maps of each class."""
    flow, _ = load_flow(run)
    parts = log_prob_parts(flow.core, as_data(flow, images), DRAWS)
    held_out = HeldOut.fit(score(flow, reference, draws=DRAWS), parts)
    scores: dict[str, dict[str, Tensor]] = {}
    maps = {}
    for name, cells in test.items():
        found = score(flow, cells.x, held_out=held_out)
        maps[name], tokens = found.anomaly, found.anomaly.flatten(1)
        values = {"log_prob": found.log_prob, "distance": -found.distance, "typicality": found.typicality}
        values |= {"map_max": -tokens.amax(dim=1), "map_95": -tokens.quantile(0.95, dim=1)}
        for key, value in values.items():
            scores.setdefault(key, {})[name] = value
    return scores, maps


def of_baselines(images: Tensor, test: dict[str, Cells]) -> dict[str, dict[str, Tensor]]:
    """Scores of each baseline and class `[n]`, the more normal the larger, on the features behind the semantic latents."""
    encoder = load_encoder("efficientnet_lite0", grid=(8, 8))
    seen, labels = features_of(encoder, images), np.zeros(len(images), int)
    features = {name: features_of(encoder, cells.x) for name, cells in test.items()}
    found = {"brightness": {name: cells.x.mean(dim=(1, 2, 3)) for name, cells in test.items()}}
    for name, detector in BASELINES.items():
        fitted = detector().fit(seen, labels)
        found[name] = {k: torch.from_numpy(fitted.score(each)) for k, each in features.items()}
    return found


def auroc(sound: Tensor, defect: Tensor) -> Tensor:
    """Areas under the ROC curve: of all images, then of bootstrap samples, the same for all scores."""
    above = (defect < sound[:, None]).double() + (defect == sound[:, None]).double() / 2
    generator = torch.Generator().manual_seed(0)
    weights = []
    for count in above.shape:
        drawn = torch.randint(count, (BOOTSTRAPS, count), generator=generator)
        weights.append(
            torch.zeros(BOOTSTRAPS, count).double().scatter_add(1, drawn, torch.ones_like(drawn).double()) / count
        )
    return torch.cat([above.mean().view(1), ((weights[0] @ above) * weights[1]).sum(dim=1)])


def interval(values: Tensor) -> list[float]:
    """A figure and its 95 % interval: of all images, and of bootstrap samples."""
    return [round(float(value), 4) for value in (values[0], *values[1:].quantile(torch.tensor([0.025, 0.975]).double()))]


def measured(scores: dict[str, dict[str, Tensor]], test: dict[str, Cells]) -> dict[str, Any]:
    """AUROC of every score by class of defects and kind of module, and the differences that the criteria are about."""
    areas = {}
    for defect in DEFECTS:
        for kind in KINDS:
            chosen = [test[name].where(kind) for name in ("sound", defect)]
            for name, values in scores.items():
                areas[name, f"{defect}/{kind}"] = auroc(values["sound"][chosen[0]], values[defect][chosen[1]])
    figures: dict[str, Any] = {"auroc": {}, "differences": {}}
    for (name, group), values in areas.items():
        figures["auroc"].setdefault(name, {})[group] = interval(values)
    main = f"{DEFECTS[0]}/all"
    for arm in (name for name in scores if name.endswith(MAIN)):
        for other in (*BASELINES, "brightness"):
            figures["differences"][f"{arm} - {other}"] = interval(areas[arm, main] - areas[other, main])
    return figures


def table(figures: dict[str, Any]) -> str:
    """AUROC as a table in Markdown."""
    groups = [f"{DEFECTS[0]}/{kind}" for kind in KINDS] + [f"{name}/all" for name in DEFECTS[1:]]
    rows = [["score", *groups], ["---"] * (len(groups) + 1)]
    for name, areas in figures["auroc"].items():
        rows.append([name, *("{:.3f} ({:.3f}-{:.3f})".format(*areas[group]) for group in groups)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(file: Path, test: dict[str, Cells], maps: dict[str, dict[str, Tensor]]) -> None:
    """Cells at even places of the test, sound ones and defective ones; below each its maps, one row an arm."""
    rows = []
    for name in ("sound", DEFECTS[0]):
        places = spread(len(test[name].kinds), SHOWN)
        x = test[name].x[places]
        rows += [with_map(x, torch.zeros(len(x), 1, 1), 1), *(with_map(x, maps[arm][name][places]) for arm in maps)]
    save_grid(torch.cat(rows), file, columns=SHOWN)


def main() -> None:
    """Train, measure, say."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", choices=ARMS, default=None, help="train this flow and measure nothing")
    o = options.parse_args()
    ready(HERE / "autoencoder.yaml", AutoencoderRunConfig, train_autoencoder)
    configs = {arm: ready(HERE / f"{arm}.yaml") for arm in ARMS if o.only in (None, arm)}
    if o.only:
        return
    images, reference, test = divided(configs["pixels"])
    scores, maps = {}, {}
    for arm, config in configs.items():
        found, maps[arm] = of_flow(config.folder, images, reference, test)
        scores |= {f"{arm} {name}": value for name, value in found.items()}
    figures = measured(scores | of_baselines(images, test), test)
    for arm, config in configs.items():
        newest = checkpoint.newest(config.folder)
        assert newest is not None
        figures.setdefault("seconds", {})[arm] = round(State.read(newest).seconds)
    figures |= {"seed": configs["pixels"].train.seed, "machine": machine(pick_device("auto"))}
    write_whole(HERE / "results" / "seed-0.json", lambda file: file.write_text(json.dumps(figures, indent=1) + "\n"))
    draw(configs["pixels"].folder.parent / "maps.png", test, maps)
    print(table(figures))
    for name, (value, low, high) in figures["differences"].items():
        verdict = "better" if low > 0 else "worse" if high < 0 else "no difference seen"
        print(f"{name}: {value:+.3f} ({low:+.3f} to {high:+.3f}) {verdict}")


if __name__ == "__main__":
    main()
