"""Everything that is measured of a run, by one call: `evaluation.json` in the run's folder.

Top level: "run", "data", "weights", "machine", "seconds" (of each metric), and for the metrics that were asked for

    bpd         "nats_per_dim", "bits_per_dim" (an upper bound), "bits_per_dim_importance_weighted" (a tighter one); of a
                flow in latents "latent_bits_per_dim" instead of both; "density" says in words of what
    accuracy    "accuracy": rule -> share; "classification": a row a rule, see `classification.cost_accuracy`
    probe       "probe": a row a (block, layer), see `probe.probe_layers`
    fid …       "fidelity": the figures with extractor, samples, reference and guidance, see `fidelity.fidelity`
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flowback.core.devices import machine
from flowback.core.errors import InputError
from flowback.data import ImageSet, load_data
from flowback.flow.guidance import Guidance
from flowback.latents import Flow, LatentFlow
from flowback.measure import fidelity as fid
from flowback.measure.density import density, importance_weighted_bits, seen, spread
from flowback.measure.probe import probe_layers
from flowback.reports.classification import CURVE, cost_accuracy
from flowback.runs.checkpoint import flow_folder, load_flow
from flowback.runs.config import RunConfig
from flowback.tasks.sampling import Request, sample_to_disk

METRICS = ("bpd", "accuracy", "probe", *fid.METRICS)
DEFAULT = ("bpd", "accuracy")
IMPORTANCE_WEIGHTED = 1000  # images of the tighter bound, each of which costs 16 passes


@dataclass(frozen=True)
class EvaluationConfig:
    """What to measure.

    Args:
        metrics: of `METRICS`.
        weights: ema or raw.
        images: held-out images for bpd, accuracy and probe; None for all.
        draws: noise draws averaged in an accuracy; they multiply its cost.
        samples: images drawn for fidelity, and as many real ones; the papers use 4,096 and 50,000.
        samples_from: a folder of PNGs or an .npz to measure instead of drawing any; their guidance is then not known.
        guidance: of the samples drawn.
        extractor: of fidelity, a key of `flowback.measure.fidelity.EXTRACTORS`.
        extractor_weights: a local file of its weights.
        reference: train or held_out: which real images.
        seed: of the samples.
        compile: compile the decoding of the samples.

    Raises:
        InputError: if a value is impossible.
    """

    metrics: tuple[str, ...] = DEFAULT
    weights: str = "ema"
    images: int | None = None
    draws: int = 1
    samples: int = 4096
    samples_from: str | None = None
    guidance: float = 0.0
    extractor: str = "efficientnet_lite0"
    extractor_weights: str | None = None
    reference: str = "train"
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise InputError(f"metric {name!r} does not exist; allowed: {', '.join(METRICS)}")
        for name, value in (("images", self.images), ("draws", self.draws), ("samples", self.samples)):
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} is not usable; allowed is a whole number of at least 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed} is not usable; allowed is a whole number from 0 to 2^63 - 1")
        if self.reference not in ("train", "held_out"):
            raise InputError(f"--reference {self.reference!r} does not exist; allowed: train, held_out")
        if self.extractor not in fid.EXTRACTORS:
            raise InputError(f"extractor {self.extractor!r} does not exist; allowed: {', '.join(fid.EXTRACTORS)}")
        fid.check_sfid(self.metrics, self.extractor)
        Guidance(self.guidance)


def evaluate(
    run: str, config: EvaluationConfig, sweep: Sequence[float] = (), device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Measure a run on the data it names; statistics and temperatures are stored with the flow.

    What an earlier evaluation of the same weights on the same images measured stays in evaluation.json.

    Args:
        run: the run's folder.
        config: what to measure.
        sweep: guidance scales at which fidelity is measured too, under "guidance_sweep" (arXiv 2511.22345, figure 5).
        device: where to run; "auto" for the accelerator that is there. The figures are stamped with it.

    Raises:
        InputError: if the run names no data, or something that a metric needs cannot be had.
    """
    if sweep and config.samples_from is not None:
        raise InputError("samples from disk have one guidance; allowed is --sweep or --samples-from")
    scaled = [replace(config, guidance=scale) for scale in sweep]
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise InputError(f"{run} has no config.yaml that names its data; allowed is the folder of a run")
    flow, weights = load_flow(run, config.weights, device)
    data = load_data(RunConfig.read(file).data)
    results: dict[str, Any] = {"run": Path(run).name, "data": data.name, "weights": weights}
    results["machine"] = machine(flow.device)
    seconds: dict[str, float] = {}
    x, y = seen(flow, data.held_out, spread(len(data.held_out), config.images), data.levels)
    results["held_out_images"] = len(x)
    if "bpd" in config.metrics:
        started = time.perf_counter()
        core, latents = flow.core, isinstance(flow, LatentFlow)
        results |= density(core, x, y, latents)
        if not latents:
            some = spread(len(x), IMPORTANCE_WEIGHTED)
            results["bits_per_dim_importance_weighted"] = importance_weighted_bits(core, x[some], y[some])
            results["density"] = (
                f"nats of images with {flow.config.noise} noise on the [-1, 1] scale; bits of {flow.levels} levels, "
                "dequantized uniformly, bounded from above by 1 draw, and by 16 draws importance-weighted "
                f"of {len(some)} images"
            )
        else:
            results["density"] = (
                f"nats and bits of the latents of {flow.autoencoder.config.name} with noise {flow.config.noise_std}, "
                "not of pixels; they compare in the same latents with the same noise only"
            )
        seconds["bpd"] = time.perf_counter() - started
    if "accuracy" in config.metrics and flow.num_classes:
        started = time.perf_counter()
        rows, statistics = cost_accuracy(flow, data, config.images, config.draws, CURVE, config.seed)
        results["classification"] = rows
        results["accuracy"] = {row["rule"]: row["accuracy"] for row in rows}
        results["noise_draws"] = config.draws
        if config.weights == "ema":
            statistics.save(flow_folder(run))
        seconds["accuracy"] = time.perf_counter() - started
    if "probe" in config.metrics:
        started = time.perf_counter()
        results["probe"] = probe_layers(flow, data, images=config.images)
        seconds["probe"] = time.perf_counter() - started
    wanted = [name for name in config.metrics if name in fid.METRICS]
    if wanted:
        started = time.perf_counter()
        results["fidelity"] = _fidelity(run, flow, data, config, wanted)
        seconds["fidelity"] = time.perf_counter() - started
    if sweep:
        started = time.perf_counter()
        results["guidance_sweep"] = [_fidelity(run, flow, data, one, wanted or ["fid"]) for one in scaled]
        seconds["guidance_sweep"] = time.perf_counter() - started
    results["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    file = Path(run) / "evaluation.json"
    file.write_text(json.dumps(_with_earlier(file, results), indent=2) + "\n")
    return results


def _with_earlier(file: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What an earlier evaluation of the same weights on the same images measured, and the new results in its place."""
    try:
        earlier = json.loads(file.read_text())
    except (OSError, ValueError):
        return results
    same = ("run", "data", "weights", "machine", "held_out_images")
    if not isinstance(earlier, dict) or any(earlier.get(name) != results[name] for name in same):
        return results
    return earlier | results | {"seconds": earlier.get("seconds", {}) | results["seconds"]}


def _fidelity(run: str, flow: Flow, data: ImageSet, config: EvaluationConfig, wanted: list[str]) -> dict[str, Any]:
    guidance: float | None = config.guidance
    if config.samples_from is not None:
        samples, source, guidance = fid.open_images(Path(config.samples_from)), config.samples_from, None
    else:
        labels = tuple(range(flow.num_classes)) or (-1,)
        request = Request(config.samples, labels, config.guidance, seed=config.seed)
        file = Path(run) / "evaluation" / f"samples_{config.samples}_guidance_{config.guidance:g}_seed_{config.seed}.npz"
        sample_to_disk(flow, request, file, compile=config.compile)
        samples, source = fid.open_images(file), f"drawn with seed {config.seed}"
    reference, name = fid.reference_of(data, len(samples), config.reference == "train")  # pyright: ignore[reportArgumentType]
    options = {"extractor": config.extractor, "weights": config.extractor_weights, "reference_name": name}
    figures = fid.fidelity(samples, reference, wanted, device=flow.device, **options)
    return figures | {"reference": name, "guidance": guidance, "samples_from": source}
