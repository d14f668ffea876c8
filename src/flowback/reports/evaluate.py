"""Everything that is measured of a flow, by one call: `evaluation.json`, each metric as soon as it is there.

Its fields: "run", "data", "held_out" (a fingerprint of those images), "machine", "weights" (which of which checkpoint),
"steps" and "seconds" (of training, up to that checkpoint), "strategy" and "gradient" (of the alignment), all null where
they are not known; "held_out_images" (all figures are of these where nothing else is said), "seconds_of_measuring" (by
metric), and for the metrics that were asked for

    bpd         "nats_per_dim", "bits_per_dim" (an upper bound), "bits_per_dim_importance_weighted" (a tighter one); of a
                flow in latents "latent_bits_per_dim" instead of both; "density" says in words of what
    accuracy    "accuracy": rule -> share; "noise_draws" that it averages; "classification": a row for each rule, see
                `classification.cost_accuracy`; "judged": what exact likelihoods take images for, see `judged` there
    (both)      "typicality": quantiles of the log-densities of the held-out images that p-values are counted against
    probe       "probe": a row for each (block, layer), see `probe.probe_layers`
    ood         "ood": a row for each score of images, by the flow or from frozen features; see `decisions.Decisions.ood`
    shift       "shift": a row for each corruption and strength; "prior_shift": for the flow and a linear probe
    coverage    "coverage": for the flow and a linear probe, see `measure.decisions.rejection`
    fid …       "fidelity": the figures, and of what and by which sampler they are, see `fidelity.fidelity`;
                with a sweep also "guidance_sweep", a row of this kind for each scale
    copies      "fidelity" has "copies": how near samples are to training images, see `measure.copies.copies`; the closest
                are in evaluation/copies.png, each beside its nearest training image

A number that is not finite is written as null.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from flowback.core.devices import machine
from flowback.core.errors import InputError
from flowback.core.files import check_place, read_json, write_whole
from flowback.data import DataConfig, ImageSet
from flowback.data.pictures import save_grid
from flowback.data.splits import in_shares, spread
from flowback.flow.defaults import Defaults
from flowback.latents import Flow, LatentFlow
from flowback.measure import fidelity as fid
from flowback.measure.copies import MOST_IMAGES, MOST_TRAINING, copies
from flowback.measure.density import density, importance_weighted_bits, seen
from flowback.measure.probe import probe_layers
from flowback.reports.classification import PASSES, UNLABELLED, cost_accuracy, judged
from flowback.reports.decisions import METRICS as DECISIONS
from flowback.reports.decisions import TRAINING, Decisions, applicable
from flowback.runs.checkpoint import State, flow_folder, load_flow
from flowback.runs.config import RunConfig
from flowback.runs.folder import check_fit, other_data, run_data, run_of
from flowback.tasks.classify import Effort, effort
from flowback.tasks.sampling import Request, checked_store, sample_to_disk, sampler_of
from flowback.tasks.score import LEAST, HeldOut, background_of, log_prob_parts, score_data

FILE = "evaluation.json"
EXTRACTORS = ("efficientnet_lite0", "dinov2", "inception")
PARTS = ("train", "held_out")  # of the data
DRAWING = ("guidance", "guidance_rule", "temperature", "prior")  # options of samples
METRICS = ("bpd", "accuracy", "probe", *fid.METRICS, "copies", *DECISIONS)
COPIES, CLOSEST = "evaluation/copies.png", 32  # samples in the picture
TYPICAL = 1000  # held-out images that p-values are counted against, at most; they take a tenth of the passes, at most
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
IMPORTANCE_WEIGHTED = 1000  # images of the tighter bound, each of which costs 16 passes


@dataclass(frozen=True)
class EvaluationConfig:
    """What to measure.

    Args:
        metrics: any of bpd, accuracy, probe, fid, sfid, is, kid, prc, copies, ood, shift, coverage.
        weights: ema (averaged) or raw (of the last step).
        images: held-out images for all but fidelity; null for all. ood, shift and coverage take at most 1,000 of them.
        passes: forward passes of one image that bpd and accuracy may take. Exact likelihoods cost one a class; where that
            is too much they are of fewer images, or left out, and at last all figures are of fewer images. As many may be
            taken by ood, shift and coverage.
        draws: noise draws averaged in an accuracy; they multiply its cost.
        samples: images drawn for fidelity, compared with as many real ones; the papers use 4,096 and 50,000.
        samples_from: a folder of images or an .npz to measure instead of drawing any; their guidance is then not known.
        labels: of the samples drawn: shares (as often as in the held-out or training data, whichever the reference is; for
            other references as in the training data), or equal.
        sampler: of the samples drawn: exact, or student, which draws in a few passes (see `flowback distill`).
        steps: of a student, as in `flowback sample`.
        solver: of a student, as in `flowback sample`.
        guidance: scale of the guidance of the samples drawn; null for the flow's own default, as for the next three.
        guidance_rule: linear or product, as of `flowback sample`.
        temperature: of the samples drawn.
        prior: of the samples drawn: standard or fitted.
        sweep: guidance scales at which fidelity is measured too (arXiv 2511.22345, figure 5).
        extractor: of fidelity: efficientnet_lite0, dinov2 or inception.
        extractor_weights: a local file of the extractor's weights.
        reference: real images of fidelity: train, held_out, a folder of images, an .npz of them, or one of ADM's
            statistics.
        outliers: of ood: any of digits (scikit-learn's), upside_down (held-out images), noise, and folders of images; a set
            that is the data itself is left out.
        encoder: whose features ood, shift and coverage compare the flow with: any name of timm's, as in an alignment.
        encoder_weights: a local file of its weights, or random.
        seed: of the samples, and of what ood, shift and coverage draw.
        compile: compile the decoding of the samples; pays for many.

    Raises:
        InputError: if a value is impossible.
    """

    metrics: tuple[str, ...] = ("bpd", "accuracy")
    weights: str = "ema"
    images: int | None = None
    passes: int = 2_000_000
    draws: int = 1
    samples: int = 4096
    samples_from: str | None = None
    labels: str = "shares"
    sampler: str = "exact"
    steps: int | None = None
    solver: str = "euler"
    guidance: float | None = None
    guidance_rule: str | None = None
    temperature: float | None = None
    prior: str | None = None
    sweep: tuple[float, ...] = ()
    extractor: str = "efficientnet_lite0"
    extractor_weights: str | None = None
    reference: str = "train"
    outliers: tuple[str, ...] = ("digits", "upside_down", "noise")
    encoder: str = "efficientnet_lite0"
    encoder_weights: str | None = None
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise InputError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
        for name in ("images", "passes", "draws", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be a whole number of at least 1, got {value}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must be a whole number from 0 to 2^63 - 1, got {self.seed}")
        if self.reference not in PARTS and not Path(self.reference).exists():
            raise InputError(f"reference {self.reference!r} is not there; expected train, held_out, a folder or an .npz")
        if self.labels not in ("shares", "equal"):
            raise InputError(f"--labels must be one of shares, equal, got {self.labels!r}")
        if self.extractor not in EXTRACTORS:
            raise InputError(f"extractor must be one of {', '.join(EXTRACTORS)}, got {self.extractor!r}")
        if self.sweep and self.samples_from is not None:
            raise InputError("samples from disk have one guidance; use --sweep or --samples-from, not both")
        fid.check_sfid(self.metrics, self.extractor)
        drawing: dict[str, Any] = {name: getattr(self, name) for name in DRAWING}
        for scale in (self.guidance, *self.sweep):
            drawing["guidance"] = scale
            Request(**drawing, labels=(0,))


def evaluate(
    run: str | Path,
    config: EvaluationConfig = EvaluationConfig(),
    device: torch.device | str = "cpu",
    data: ImageSet | dict[str, Any] | None = None,
    output: str | Path | None = None,
    report: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Measure a flow on images, and write evaluation.json, each metric as soon as it is there.

    What can be known to fail is found out before anything is measured. Class statistics and temperatures are stored with
    the flow. What an earlier evaluation of the same weights on the same images measured stays in evaluation.json.

    Args:
        run: a run's folder, a checkpoint, a folder or hub id of a flow.
        config: what to measure.
        device: where to run; "auto" for the accelerator that is there. The figures name it.
        data: on which images: options of `DataConfig`, where the image size and channels are the flow's unless given, or an
            `ImageSet`; None for the data of the run.
        output: a .json file, or a folder, for evaluation.json and the samples; None for the flow's own folder.
        report: called with what is known before, and with what each metric found.

    Returns:
        What was measured now, by the names that it has in evaluation.json.

    Raises:
        InputError: if the data is not named or does not fit the flow, or something that a metric needs cannot be had.
    """
    file, began = evaluation_file(run, output), run_of(run)
    check_place(file)
    flow, weights = load_flow(run, config.weights, device)
    folder = flow_folder(run) if Path(run).exists() else None
    images, others = _data(run, began, flow, data)
    if others and output is None and began:
        raise InputError(f"{file} is of the run's own data; give -o, a folder or a .json file for what others show")
    state = State.read(folder) if folder and (folder / "state.json").is_file() else None
    alignment = RunConfig.read(began / "config.yaml").alignment if began else None
    every = config.images or len(images.held_out)
    affordable = _effort(config, min(every, len(images.held_out)), flow)
    indices = spread(len(images.held_out), affordable.images)
    results: dict[str, Any] = {"run": (began or Path(run)).resolve().name, "data": images.name}
    results |= {"held_out": images.held_out.fingerprint(), "machine": machine(flow.device), "weights": weights}
    results |= {"steps": state and state.step, "seconds": state and round(state.seconds, 3)}
    results |= {"strategy": alignment and alignment.strategy}
    results["gradient"] = alignment.gradient if alignment and alignment.strategy == "reverse" else None
    results |= {"held_out_images": len(indices)}
    stores = None if began and others else folder  # a run's statistics are of its own images
    measures = _measures(config, flow, images, indices, affordable.exact, file.parent, stores)
    efforts = [f"{affordable} (--passes {config.passes:,})"] if {"bpd", "accuracy"} & set(config.metrics) else []
    if applicable(config.metrics, flow):
        decisions = Decisions(flow, images, indices, config)
        measures |= decisions.measures()
        efforts.append(decisions.effort)
    report(results | ({"effort": "; ".join(efforts)} if efforts else {}))
    seconds = results["seconds_of_measuring"] = {}
    for name, measure in measures.items():
        started = time.perf_counter()
        found = measure()
        seconds[name] = round(time.perf_counter() - started, 1)
        results |= found
        report(found)
        _write(file, results)
    return results


def evaluation_file(run: str | Path, output: str | Path | None = None) -> Path:
    """Where an evaluation goes.

    Raises:
        InputError: if no place is given, and the flow is on the hub.
    """
    if output is not None:
        return Path(output) if Path(output).suffix.lower() == ".json" else Path(output) / FILE
    if not Path(run).is_dir():
        raise InputError(f"{run} is no local folder; give -o, a folder or a .json file for what is measured")
    return Path(run) / FILE


def _data(
    source: str | Path, run: Path | None, flow: Flow, given: ImageSet | dict[str, Any] | None
) -> tuple[ImageSet, bool]:
    """The images to measure on, once it is sure that they fit the flow, and whether they are others than those of its run.

    Raises:
        InputError: if there are none, or they are of another size or other classes.
    """
    recipe, others = RunConfig.read(run / "config.yaml").data if run else None, True
    if isinstance(given, ImageSet):
        data = given
    elif run is not None and recipe is not None and not given:
        data, others = run_data(run, recipe), False
    elif run is not None and recipe is not None and given and given.get("name", recipe.name) == recipe.name:
        recipe = replace(recipe, **given)
        try:
            data, others = run_data(run, recipe), False  # what the run knows, elsewhere, keeps its split
        except InputError:
            data = other_data(run, recipe)
    elif given:
        data = other_data(run, DataConfig(**({"image_size": flow.image_size, "channels": flow.channels} | given)))
    else:
        raise InputError(f"{source} has no config.yaml that names its data; expected the folder of a run, or --data.name")
    check_fit(flow, data)
    known = next(
        (place / "classes.json" for place in (run, flow.core.folder) if place and (place / "classes.json").is_file()), None
    )
    try:
        names = read_json(known) if known and flow.num_classes else data.classes
    except (OSError, ValueError) as error:
        raise InputError(f"{known} cannot be read ({error}); expected a list of names, or no such file") from error
    if names != data.classes and isinstance(names, list) and len(names) == len(data.classes):
        name, own = next(pair for pair in zip(data.classes, names, strict=True) if pair[0] != pair[1])
        raise InputError(f"the classes of the data {data.name} are not those of {known}: {name!r} in place of {own!r}")
    return data, others


def _effort(config: EvaluationConfig, images: int, flow: Flow) -> Effort:
    """What bpd and accuracy measure within `config.passes`."""
    classes = flow.num_classes if "accuracy" in config.metrics else 0
    density_ = 2 * ("bpd" in config.metrics)
    gradients, all_but_exact = (max(1, density_ + passes * config.draws * bool(classes)) for passes in PASSES)
    found = effort(images, classes, config.passes, gradients, config.draws)
    return found if found.exact == images else effort(images, classes, config.passes, all_but_exact, config.draws)


def _measures(
    config: EvaluationConfig,
    flow: Flow,
    data: ImageSet,
    images: Sequence[int],
    exact_images: int,
    folder: Path,
    flow_folder: Path | None,
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is to be called, by name, once all is there that it needs."""

    def accuracy() -> dict[str, Any]:
        unlabelled, _ = seen(flow, data.train, spread(len(data.train), UNLABELLED), data.levels)
        x, y = clean()
        options: dict[str, Any] = {"seed": config.seed, "exact_images": exact_images}
        rows, statistics, scores = cost_accuracy(flow.core, x, y, unlabelled, config.draws, **options)
        if config.weights == "ema" and flow_folder is not None:
            with contextlib.suppress(OSError):  # a folder that is only read is left as it is
                statistics.save(flow_folder)
        found = {"accuracy": {row["rule"]: row["accuracy"] for row in rows}, "noise_draws": config.draws}
        found |= {"classification": rows}
        some = spread(len(x), exact_images)
        return found | ({"judged": judged(scores["exact"], y[some], [images[i] for i in some])} if exact_images else {})

    @lru_cache
    def clean() -> tuple[Tensor, Tensor]:
        return seen(flow, data.held_out, images, data.levels)

    def typicality() -> dict[str, Any]:
        x, _ = clean()
        held_out = score_data(flow.core, x[spread(len(x), typical)], background_of(flow, None), draws=config.draws)
        training, _ = seen(flow, data.train, spread(len(data.train), TRAINING), data.levels)
        found = HeldOut.fit(held_out, log_prob_parts(flow.core, training, config.draws))
        if config.weights == "ema" and flow_folder is not None:
            with contextlib.suppress(OSError):
                found.save(flow_folder)
        values = torch.quantile(found.log_prob, found.log_prob.new_tensor(QUANTILES)).tolist()
        said = {f"log_prob_{100 * q:g}": value for q, value in zip(QUANTILES, values, strict=True)}
        return {"typicality": {"images": len(found.log_prob), **said}}

    measures: dict[str, Callable[[], dict[str, Any]]] = {}
    if "bpd" in config.metrics:
        measures["bpd"] = lambda: _density(flow, *clean())
    if "accuracy" in config.metrics and flow.num_classes:
        if len(images) < 4:
            raise InputError(f"an accuracy needs at least 4 held-out images, got {len(images)}")
        measures["accuracy"] = accuracy
    typical = min(TYPICAL, exact_images or TYPICAL, config.passes // 10 // (config.draws * (flow.num_classes + 1)))
    if {"bpd", "accuracy"} & set(config.metrics) and min(typical, len(images)) >= LEAST:
        measures["typicality"] = typicality
    if "probe" in config.metrics:
        if len(data.classes) < 2:
            raise InputError(f"a probe needs at least 2 classes, got {len(data.classes)}")
        measures["probe"] = lambda: {"probe": probe_layers(flow, data, images=len(images))}
    if set(config.metrics) & {*fid.METRICS, "copies"}:
        whole = Fidelity(flow, data, config, folder)
        measures["fidelity"] = lambda: {"fidelity": whole.measure()}
    if config.sweep:
        wanted = (*config.metrics, "fid")
        scales = [replace(config, metrics=wanted, guidance=scale, sweep=()) for scale in config.sweep]
        sweep = [Fidelity(flow, data, one, folder) for one in scales]
        measures["guidance_sweep"] = lambda: {"guidance_sweep": [one.measure() for one in sweep]}
    return measures


def _write(file: Path, results: dict[str, Any]) -> None:
    """Write an evaluation, with what an earlier one of the same measured.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        write_json(file, _with_earlier(file, results))
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{file} cannot be written ({reason}); give -o, a folder or a .json file elsewhere") from error


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
    if earlier.get("held_out", results["held_out"]) != results["held_out"]:  # which 0.1.0 did not write
        return results
    name = "seconds_of_measuring"
    return earlier | results | {name: earlier.get(name, {}) | results.get(name, {})}


def _density(flow: Flow, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Nats and bits of clean `x` as the flow sees them, and a sentence on what they are of."""
    if isinstance(flow, LatentFlow):
        said = (
            f"nats and bits of the latents of {flow.autoencoder.config.title} with noise {flow.config.noise_std}, not of "
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


class Fidelity:
    """Fidelity at one guidance scale, of samples that are drawn, or of those on disk; all that can fail early fails here.

    Args:
        flow: which the samples are drawn from.
        data: which they are compared with, unless `config.reference` is something else.
        config: what is measured.
        folder: where samples are drawn to, in `evaluation/`.

    Raises:
        InputError: if there are no samples or no reference, they are too few for a metric, or the extractor cannot be had.
    """

    def __init__(self, flow: Flow, data: ImageSet, config: EvaluationConfig, folder: Path) -> None:
        self.flow, self.data, self.config, self.folder = flow, data, config, folder
        self.metrics = set(config.metrics) & set(fid.METRICS)
        self.samples = None if config.samples_from is None else fid.open_images(Path(config.samples_from))
        count = config.samples if self.samples is None else len(self.samples)
        if config.reference in PARTS:
            self.reference, self.name = fid.reference_of(data, count, config.reference == "train")
        else:
            self.reference, self.name = fid.open_reference(Path(config.reference), data.size), config.reference
        size = flow.image_size if self.samples is None else fid.size_of(self.samples)
        fid.check(self.metrics, config.extractor, count, size, self.reference)
        fid.check_extractor(self.metrics, config.extractor, config.extractor_weights)
        if self.samples is None:
            labels = (data.held_out if config.reference == "held_out" else data.train).labels
            labels = labels if config.labels == "shares" else torch.arange(flow.num_classes)
            drawn = in_shares(labels, count, config.seed) if flow.num_classes else (-1,)
            drawing: dict[str, Any] = {name: getattr(config, name) for name in (*DRAWING, "sampler", "steps", "solver")}
            self.request = Request(count, drawn, **drawing, seed=config.seed).settled(flow)
            self.sampler = sampler_of(flow, self.request)
            name = f"samples_{count}_{config.labels}_guidance_{self.request.guidance:g}_seed_{config.seed}"
            others = {name: getattr(self.request, name) for name in DRAWING[1:]}
            name += "".join(f"_{value}" for key, value in others.items() if value != getattr(Defaults(), key))
            name += "" if config.sampler == "exact" else f"_{self.sampler.replace(', ', '_').replace(' ', '_')}"
            self.file = folder / "evaluation" / f"{name}.npz"
            checked_store(flow, self.request, self.file).open()

    def measure(self) -> dict[str, Any]:
        """The figures, with what they are of."""
        c, samples = self.config, self.samples
        said: dict[str, Any] = {"guidance": None, "sampler": None, "labels": None, "samples_from": c.samples_from}
        if samples is None:
            sample_to_disk(self.flow, self.request, self.file, compile=c.compile)
            samples = fid.open_images(self.file)
            said = {name: getattr(self.request, name) for name in DRAWING}
            said |= {"labels": c.labels if self.flow.num_classes else None}
            said |= {"samples_from": f"drawn with seed {c.seed}", "sampler": self.sampler}
        options: dict[str, Any] = {"extractor": c.extractor, "weights": c.extractor_weights, "device": self.flow.device}
        options["reference_name"] = self.name if c.reference in PARTS else None
        found = fid.fidelity(samples, self.reference, self.metrics, **options) | {"reference": self.name} | said
        return found | ({"copies": self._copies(samples)} if "copies" in c.metrics else {})

    def _copies(self, samples: fid.Images) -> dict[str, Any]:
        """The figures of `copies`, and the picture of those that are closest to a training image, each beside it."""
        some = Subset(samples, spread(len(samples), MOST_IMAGES))
        training = fid.SplitImages(self.data.train, self.data.levels, MOST_TRAINING)
        held_out = fid.SplitImages(self.data.held_out, self.data.levels, MOST_IMAGES)
        figures, pairs = copies(some, held_out, training, self.flow.device)
        images = [image for i, j in pairs[:CLOSEST] for image in (some[i], training[j])]
        write_whole(self.folder / COPIES, lambda file: save_grid(torch.stack(images), file, columns=8))
        return figures
