"""Whom to trust: outliers, shifts and the reject option of a flow, beside those of frozen features on the same images."""

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.files import cache_folder, write_whole
from flowback.core.units import from_levels
from flowback.data import ImageSet
from flowback.data.splits import spread
from flowback.encoders import load_encoder
from flowback.latents import Flow, as_data
from flowback.measure.decisions import estimate_shares, rejection, with_shares
from flowback.measure.density import seen
from flowback.measure.outliers import (
    Detector,
    Features,
    Mahalanobis,
    MaxProbability,
    NearestNeighbors,
    Padim,
    features_of,
    separation,
)
from flowback.measure.shifts import CORRUPTIONS, STRENGTHS, corrupted, outliers
from flowback.tasks.classify import NEVER, calibrated, calibration_error, fit_calibration
from flowback.tasks.score import LEAST, HeldOut, Score, background_of, log_prob_parts, score_data

METRICS = ("ood", "shift", "coverage")
TRAINING, HELD_OUT = 2000, 1000  # images that distances and baselines are fitted to, and that are measured, at most
FITTED, OUTLIERS, CORRUPTED = 4, 2, 4  # of the held-out images one in so many fits what is fitted; so many are in each set
CHUNK = 250  # images whose features are one file of the cache
RATIO = 50  # of the commonest class' share to the rarest one's, in the figures of prior shift
FIGURES: dict[str, Callable[[Tensor, Tensor], float]] = {  # of probabilities [B, K] and labels [B]
    "accuracy": lambda p, y: rejection(p, y)["accuracy"],
    "ece": calibration_error,
    "aurc": lambda p, y: rejection(p, y)["aurc"],
}


@dataclass(frozen=True)
class Seen:
    """What is known of some images."""

    score: Score  # by the flow, on the CPU
    features: Features  # of the frozen encoder


def applicable(metrics: Sequence[str], flow: Flow) -> list[str]:
    """Those of `METRICS` that are among the metrics, and that the flow has."""
    return [name for name in METRICS if name in metrics and (flow.num_classes or name == "ood")]


class Decisions:
    """The metrics ood, shift and coverage of a flow; all that can fail early fails here.

    A quarter of the held-out images fits what is fitted, like temperatures; figures are of the others.

    Args:
        flow: a flow; of an unconditional one there is ood only.
        data: its images.
        images: numbers of the held-out images that may be measured.
        config: an `EvaluationConfig`: metrics, outliers, encoder, encoder_weights, draws, passes, seed.

    Raises:
        InputError: if there are too few images, or the encoder or a set of outliers cannot be had.
    """

    def __init__(self, flow: Flow, data: ImageSet, images: Sequence[int], config: Any) -> None:
        self.flow, self.data, self.draws, self.seed = flow, data, config.draws, config.seed
        self.metrics = applicable(config.metrics, flow)
        names = [name for name in config.outliers if name != data.name] if "ood" in self.metrics else []
        if "ood" in self.metrics and not names:
            raise InputError(
                f"ood needs outliers other than the data {data.name}, got {', '.join(config.outliers) or None}"
            )
        parts = 1 + len(names) / OUTLIERS + len(CORRUPTIONS) * len(STRENGTHS) / CORRUPTED * ("shift" in self.metrics)
        each = parts * (flow.num_classes + 1) * config.draws
        count = min(len(images), HELD_OUT, int(config.passes / each))
        if count < FITTED * LEAST:
            enough = "" if count == len(images) else f"; --passes {config.passes:,} are too few for more"
            raise InputError(
                f"{', '.join(self.metrics)} need at least {FITTED * LEAST} held-out images, got {count}{enough}"
            )
        pixels, self.labels = data.held_out[[images[i] for i in spread(len(images), count)]]
        self.images = from_levels(pixels, data.levels)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))
        self.fit, self.others = order.split([count // FITTED, count - count // FITTED])
        self.outliers = {name: outliers(name, self.images, count // OUTLIERS, config.seed) for name in names}
        self.encoder_name = config.encoder
        self.encoder = load_encoder(config.encoder, config.encoder_weights).to(flow.device)
        self.training_indices = spread(len(data.train), TRAINING)
        training = len(self.training_indices)
        passes = round(count * each) + training * config.draws * ("ood" in self.metrics)
        self.effort = (
            f"{', '.join(self.metrics)}: {count:,} held-out images, {passes:,} forward passes, "
            f"{round(count * parts) + training:,} images through {config.encoder}"
        )

    def measures(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """What is to be called, by name."""
        return {name: getattr(self, name) for name in self.metrics}

    def ood(self) -> dict[str, Any]:
        """A row for each score of normality: how well it tells each set of outliers from held-out images."""
        sets, rows = {name: self._seen(x) for name, x in self.outliers.items()}, []
        for (of, name), score in self._scores().items():
            normal = score(self.held)[self.others.numpy()]
            told = {key: separation(normal, score(seen)) for key, seen in sets.items()}
            figures = {figure: {key: found[figure] for key, found in told.items()} for figure in ("auroc", "fpr_at_95_tpr")}
            rows.append({"of": of, "score": name, "images": len(normal)} | figures)
        return {"ood": rows}

    def shift(self) -> dict[str, Any]:
        """A row for each corruption and strength, and for each classifier where classes have other shares."""
        some = self.others[: len(self.images) // CORRUPTED]
        x, y, rows = self.images[some], self.labels[some], []
        for name, strength in [("none", 0), *product(CORRUPTIONS, STRENGTHS)]:
            changed = corrupted(x, name, strength, self.seed) if strength else x
            found = self._posteriors(self._seen(changed))
            figures = {figure: {of: measure(p, y) for of, p in found.items()} for figure, measure in FIGURES.items()}
            rows.append({"corruption": name, "strength": strength, "images": len(y)} | figures)
        return {"shift": rows, "prior_shift": self._prior_shift()}

    def coverage(self) -> dict[str, Any]:
        """A row for each classifier: what a reject option gains."""
        y, rows = self.labels[self.others], []
        for name, p in self._posteriors(self.held).items():
            p = p[self.others]
            rows.append({"of": name, "images": len(y), "ece": calibration_error(p, y)} | rejection(p, y))
        return {"coverage": rows}

    def _prior_shift(self) -> list[dict[str, Any]]:
        """Held-out images, drawn so that classes have other shares."""
        labels, K = self.labels[self.others], self.flow.num_classes
        generator = torch.Generator().manual_seed(self.seed)
        counts = labels.bincount(minlength=K).double()
        shares = RATIO ** -(torch.randperm(K, generator=generator).double() / max(1, K - 1)) * (counts > 0)
        shares = shares / shares.sum()
        drawn = torch.multinomial((shares / counts)[labels], len(labels), replacement=True, generator=generator)
        y, rows = labels[drawn], []
        assumed = {"flow": torch.ones(K), "probe": self.training[1].bincount(minlength=K).clamp(min=1)}
        for name, p in self._posteriors(self.held).items():
            p = p[self.others][drawn]
            estimated = estimate_shares(p, assumed[name])
            known = {"estimated": estimated, "given": shares}
            found = {"before": p} | {key: with_shares(p, value, assumed[name]) for key, value in known.items()}
            figures = {figure: {key: FIGURES[figure](q, y) for key, q in found.items()} for figure in ("accuracy", "ece")}
            off = float((estimated - shares).abs().sum() / 2)
            rows.append({"of": name, "images": len(y)} | figures | {"shares_off_by": off})
        return rows

    def _scores(self) -> dict[tuple[str, str], Callable[[Seen], np.ndarray]]:
        """What may tell outliers, of whom and by name: `[B]`, larger is more normal."""
        own, K = self.held.score, self.flow.num_classes
        fitted = replace(own, class_maps=own.class_maps[self.fit], parts=own.parts[self.fit], background=None)
        x, _ = seen(self.flow, self.data.train, self.training_indices, self.data.levels)
        known = HeldOut.fit(fitted, log_prob_parts(self.flow.core, x, self.draws))
        middle = fitted.log_prob.median()
        of_flow: dict[str, Callable[[Score], Tensor]] = {"log_prob": lambda s: s.log_prob}
        of_flow["log_prob, both sides"] = lambda s: -(s.log_prob - middle).abs()
        if K:
            of_flow |= {"ratio": lambda s: s.ratio, "largest probability": lambda s: self._flow_posterior(s).amax(dim=1)}
        of_flow["distance"] = lambda s: -replace(s, held_out=known).distance
        found: dict[tuple[str, str], Callable[[Seen], np.ndarray]] = {
            ("flow", name): lambda seen, of=of: of(seen.score).double().numpy() for name, of in of_flow.items()
        }
        features, labels = self.training
        y = labels.numpy() if K else np.zeros(len(labels), np.int64)
        detectors: dict[str, Detector] = {"largest probability": self.probe} if K else {}
        kinds = {"mahalanobis": Mahalanobis(), "padim": Padim(), "nearest neighbors": NearestNeighbors()}
        detectors |= {name: detector.fit(features, y) for name, detector in kinds.items()}
        return found | {
            (self.encoder_name, name): lambda seen, by=by: by.score(seen.features) for name, by in detectors.items()
        }

    # ---- what is computed once ----

    @cached_property
    def held(self) -> Seen:
        """Of all held-out images."""
        return self._seen(self.images)

    @torch.no_grad()
    def _seen(self, images: Tensor) -> Seen:
        x = as_data(self.flow, images)
        score = score_data(self.flow.core, x, background_of(self.flow, None), draws=self.draws)
        tensors = {name: value.cpu() for name, value in vars(score).items() if isinstance(value, Tensor)}
        return Seen(replace(score, **tensors), self._features(images))

    @cached_property
    def training(self) -> tuple[Features, Tensor]:
        """Features of training images, and their labels."""
        split, indices = self.data.train, self.training_indices
        chunks = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
        found = [self._features(from_levels(split[chunk][0], self.data.levels)) for chunk in chunks]
        return Features(*(np.concatenate(parts) for parts in zip(*found, strict=True))), split.labels[indices]

    @cached_property
    def probe(self) -> MaxProbability:
        """A linear probe, its temperature fitted as the flow's."""
        features, y = self.training
        probe = MaxProbability(self.flow.num_classes).fit(features, y.numpy())
        logits = probe.logits(self.held.features)[self.fit]
        probe.temperature = fit_calibration(logits, self.labels[self.fit])[0]
        return probe

    @cached_property
    def _temperature(self) -> float:
        return fit_calibration(self.held.score.class_log_prob[self.fit], self.labels[self.fit])[0]

    def _flow_posterior(self, score: Score) -> Tensor:
        return calibrated(score.class_log_prob.double(), self._temperature, NEVER)

    def _posteriors(self, seen: Seen) -> dict[str, Tensor]:
        """Calibrated probabilities `[B, K]` of the flow and of the probe."""
        probe = calibrated(self.probe.logits(seen.features), self.probe.temperature, NEVER)
        return {"flow": self._flow_posterior(seen.score), "probe": probe}

    @cached_property
    def _encoder_hash(self) -> bytes:
        found = hashlib.sha256(repr((self.encoder_name, self.encoder.grid)).encode())
        for tensor in self.encoder.state_dict().values():
            found.update(tensor.cpu().numpy().tobytes())
        return found.digest()

    def _features(self, x: Tensor) -> Features:
        """Features of images `[n, C, H, W]` on the CPU, which are cached by the pixels and the encoder's weights."""
        key = hashlib.sha256(self._encoder_hash + repr(x.shape).encode() + x.numpy().tobytes()).hexdigest()[:32]
        file = cache_folder() / "features" / f"{key}.npz"
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(file, allow_pickle=False) as arrays:
            return Features(arrays["pooled"], arrays["patches"])
        found = features_of(self.encoder, x, self.flow.device)
        with suppress(OSError):  # without a cache it takes longer
            write_whole(file, lambda partial: np.savez(partial, **found._asdict()))
        return found


def tables(evaluation: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """What the page shows of these metrics: titles, heads of columns, and cells by row."""
    if rows := evaluation.get("ood"):
        sets = list(rows[0]["auroc"])
        title = "Outliers: AUROC, and the share of them that passes where 95 % of held-out images do"
        cells = [
            [row["of"], row["score"], *(f"{row['auroc'][key]:.3f}, {row['fpr_at_95_tpr'][key]:.0%}" for key in sets)]
            for row in rows
        ]
        yield title, ["", "score", *sets], cells
    for name, title in (
        ("shift", "Corrupted images"),
        ("prior_shift", "Classes with other shares"),
        ("coverage", "Coverage"),
    ):
        if rows := evaluation.get(name):
            flat = [_flat(row) for row in rows]
            yield (
                title,
                [key.replace("_", " ") for key in flat[0]],
                [[_text(value) for value in row.values()] for row in flat],
            )


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose figures by classifier, or by what it knows, are columns."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        found |= {f"{name}, {key}": own for key, own in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
