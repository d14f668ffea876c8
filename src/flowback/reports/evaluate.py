"""Everything that is measured of a run, by one call: `evaluation.json` in the run's folder.

Its fields: "run", "data", "machine", "weights" (which of which checkpoint), "steps" and "seconds" (of training, up to that
checkpoint), "strategy" and "gradient" (of the alignment; null where there is none), "held_out_images" (all figures are
of these where nothing else is said), "seconds_of_measuring" (by metric), and for the metrics that were asked for

    bpd         "nats_per_dim", "bits_per_dim" (an upper bound), "bits_per_dim_importance_weighted" (a tighter one); of a
                flow in latents "latent_bits_per_dim" instead of both; "density" says in words of what
    accuracy    "accuracy": rule -> share; "noise_draws" that it averages; "classification": a row for each rule, see
                `classification.cost_accuracy`; "judged": what exact likelihoods take images for, see `judged` there
    probe       "probe": a row for each (block, layer), see `probe.probe_layers`
    fid …       "fidelity": the figures with extractor, samples, reference and guidance, see `fidelity.fidelity`; with a
                sweep also "guidance_sweep", a row of this kind for each scale

A number that is not finite is written as null.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowback.core.devices import machine
from flowback.core.errors import InputError
from flowback.core.files import read_json, write_whole
from flowback.data import ImageSet
from flowback.flow.guidance import Guidance
from flowback.latents import Flow, LatentFlow
from flowback.measure import fidelity as fid
from flowback.measure.density import density, importance_weighted_bits, seen, spread
from flowback.measure.probe import probe_layers
from flowback.reports.classification import UNLABELLED, cost_accuracy, judged
from flowback.runs.checkpoint import State, flow_folder, load_flow
from flowback.runs.config import RunConfig
from flowback.runs.folder import run_data
from flowback.tasks.sampling import Request, sample_to_disk

FILE = "evaluation.json"
EXTRACTORS = ("efficientnet_lite0", "dinov2", "inception")
METRICS = ("bpd", "accuracy", "probe", *fid.METRICS)
IMPORTANCE_WEIGHTED = 1000  # images of the tighter bound, each of which costs 16 passes


@dataclass(frozen=True)
class EvaluationConfig:
    """What to measure.

    Args:
        metrics: any of bpd, accuracy, probe, fid, sfid, is, kid, prc.
        weights: ema (averaged) or raw (of the last step).
        images: held-out images for bpd, accuracy and probe; null for all.
        draws: noise draws averaged in an accuracy; they multiply its cost.
        samples: images drawn for fidelity, compared with as many real ones; the papers use 4,096 and 50,000.
        samples_from: a folder of PNGs or an .npz to measure instead of drawing any; their guidance is then not known.
        guidance: scale of the guidance of the samples drawn.
        sweep: guidance scales at which fidelity is measured too (arXiv 2511.22345, figure 5).
        extractor: of fidelity: efficientnet_lite0, dinov2 or inception.
        extractor_weights: a local file of the extractor's weights.
        reference: real images of fidelity: train or held_out.
        seed: of the samples.
        compile: compile the decoding of the samples; pays for many.

    Raises:
        InputError: if a value is impossible.
    """

    metrics: tuple[str, ...] = ("bpd", "accuracy")
    weights: str = "ema"
    images: int | None = None
    draws: int = 1
    samples: int = 4096
    samples_from: str | None = None
    guidance: float = 0.0
    sweep: tuple[float, ...] = ()
    extractor: str = "efficientnet_lite0"
    extractor_weights: str | None = None
    reference: str = "train"
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise InputError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
        for name, value in (("images", self.images), ("draws", self.draws), ("samples", self.samples)):
            if value is not None and value < 1:
                raise InputError(f"--{name} must be a whole number of at least 1, got {value}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must be a whole number from 0 to 2^63 - 1, got {self.seed}")
        if self.reference not in ("train", "held_out"):
            raise InputError(f"--reference must be one of train, held_out, got {self.reference!r}")
        if self.extractor not in EXTRACTORS:
            raise InputError(f"extractor must be one of {', '.join(EXTRACTORS)}, got {self.extractor!r}")
        if self.sweep and self.samples_from is not None:
            raise InputError("samples from disk have one guidance; use --sweep or --samples-from, not both")
        fid.check_sfid(self.metrics, self.extractor)
        for scale in (self.guidance, *self.sweep):
            Guidance(scale)


def evaluate(
    run: str | Path, config: EvaluationConfig = EvaluationConfig(), device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Measure a run on the data that it names, and write evaluation.json into its folder.

    Class statistics and temperatures are stored with the flow. What an earlier evaluation of the same weights on the same
    images measured stays in evaluation.json.

    Args:
        run: the run's folder.
        config: what to measure.
        device: where to run; "auto" for the accelerator that is there. The figures name it.

    Returns:
        What was measured now, by the names that it has in evaluation.json.

    Raises:
        InputError: if the run names no data, or something that a metric needs cannot be had.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{run} has no config.yaml that names its data; expected the folder of a run")
    flow, weights = load_flow(folder, config.weights, device)
    recipe, state = RunConfig.read(folder / "config.yaml"), State.read(flow_folder(folder))
    data, alignment = run_data(folder, recipe.data), recipe.alignment
    images = spread(len(data.held_out), config.images)
    x, y = seen(flow, data.held_out, images, data.levels)
    results: dict[str, Any] = {"run": folder.resolve().name, "data": data.name, "machine": machine(flow.device)}
    results |= {"weights": weights, "steps": state.step, "seconds": round(state.seconds, 3)}
    results |= {"strategy": alignment.strategy, "gradient": alignment.gradient if alignment.strategy == "reverse" else None}
    results["held_out_images"] = len(x)

    def accuracy() -> dict[str, Any]:
        unlabelled, _ = seen(flow, data.train, spread(len(data.train), UNLABELLED), data.levels)
        rows, statistics, scores = cost_accuracy(flow.core, x, y, unlabelled, config.draws, seed=config.seed)
        if config.weights == "ema":
            statistics.save(flow_folder(folder))
        shares = {row["rule"]: row["accuracy"] for row in rows}
        found = {"accuracy": shares, "noise_draws": config.draws, "classification": rows}
        return found | {"judged": judged(scores["exact"], y, images)}

    measures: dict[str, Callable[[], dict[str, Any]]] = {}
    if "bpd" in config.metrics:
        measures["bpd"] = lambda: _density(flow, x, y)
    if "accuracy" in config.metrics and flow.num_classes:
        measures["accuracy"] = accuracy
    if "probe" in config.metrics:
        measures["probe"] = lambda: {"probe": probe_layers(flow, data, images=config.images)}
    if set(config.metrics) & set(fid.METRICS):
        measures["fidelity"] = lambda: {"fidelity": _fidelity(folder, flow, data, config)}
    if config.sweep:
        scales = [replace(config, metrics=(*config.metrics, "fid"), guidance=scale) for scale in config.sweep]
        measures["guidance_sweep"] = lambda: {"guidance_sweep": [_fidelity(folder, flow, data, one) for one in scales]}
    seconds = {}
    for name, measure in measures.items():
        started = time.perf_counter()
        results |= measure()
        seconds[name] = round(time.perf_counter() - started, 1)
    results["seconds_of_measuring"] = seconds
    write_json(folder / FILE, _with_earlier(folder / FILE, results))
    return results


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file as a whole; a number that is not finite becomes null, since JSON has none."""
    text = json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"
    write_whole(file, lambda partial: partial.write_text(text))


def _plain(value: Any) -> Any:
    """Values of Python's own types, null in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_earlier(file: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What an earlier evaluation of the same weights on the same images measured, and the new results in its place."""
    try:
        earlier = read_json(file)
    except (OSError, ValueError):
        return results
    same = ("run", "data", "weights", "machine", "held_out_images")
    if not isinstance(earlier, dict) or any(earlier.get(name) != results[name] for name in same):
        return results
    name = "seconds_of_measuring"
    return earlier | results | {name: earlier.get(name, {}) | results[name]}


def _density(flow: Flow, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Nats and bits of clean `x` as the flow sees them, and a sentence on what they are of."""
    if isinstance(flow, LatentFlow):
        said = (
            f"nats and bits of the latents of {flow.autoencoder.config.name} with noise {flow.config.noise_std}, not of "
            "pixels; they compare in the same latents with the same noise only"
        )
        return density(flow.core, x, y, latents=True) | {"density": said}
    some = spread(len(x), IMPORTANCE_WEIGHTED)
    said = (
        f"nats of images with {flow.config.noise} noise on the [-1, 1] scale; bits of {flow.levels} levels, dequantized "
        f"uniformly, bounded from above by 1 draw, and by 16 draws importance-weighted of {len(some)} images"
    )
    tighter = importance_weighted_bits(flow, x[some], y[some])
    return density(flow, x, y) | {"bits_per_dim_importance_weighted": tighter, "density": said}


def _fidelity(run: Path, flow: Flow, data: ImageSet, config: EvaluationConfig) -> dict[str, Any]:
    """Fidelity of samples at one guidance scale, drawn into the run's folder, or of those on disk."""
    wanted = set(config.metrics) & set(fid.METRICS)
    guidance: float | None = config.guidance
    if config.samples_from is not None:
        samples, source, guidance = fid.open_images(Path(config.samples_from)), config.samples_from, None
    else:
        labels = tuple(range(flow.num_classes)) or (-1,)
        request = Request(config.samples, labels, config.guidance, seed=config.seed)
        file = run / "evaluation" / f"samples_{config.samples}_guidance_{config.guidance:g}_seed_{config.seed}.npz"
        sample_to_disk(flow, request, file, compile=config.compile)
        samples, source = fid.open_images(file), f"drawn with seed {config.seed}"
    reference, name = fid.reference_of(data, len(samples), config.reference == "train")
    options = {"extractor": config.extractor, "weights": config.extractor_weights, "reference_name": name}
    figures = fid.fidelity(samples, reference, wanted, device=flow.device, **options)
    return figures | {"reference": name, "guidance": guidance, "samples_from": source}
