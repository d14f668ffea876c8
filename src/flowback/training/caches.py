"""The caches that a run can use: its latents and its encoder's features (`flowback.data.cache`), by what they depend on."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowback.alignment import Alignment
from flowback.core.console import Bar, console
from flowback.core.devices import autocast, pick_device
from flowback.core.errors import InputError
from flowback.core.files import cache_folder, file_hash
from flowback.data import ImageSet, load_data
from flowback.data.batches import Tolerance
from flowback.data.cache import ArrayCache, cache_key, find, nearest_mismatch
from flowback.encoders import Encoder
from flowback.flow.tarflow import TarFlow
from flowback.latents import Autoencoder, AutoencoderConfig
from flowback.latents.semantic import SemanticAutoencoder, SemanticConfig
from flowback.runs.config import AlignmentConfig, Recipe, RunConfig, TrainConfig
from flowback.training.build import build_flow, first_flow, make_alignment, make_autoencoder, settle


@dataclass(frozen=True)
class CachePlan:
    """A cache that a run can use: what it holds, and how that is computed."""

    facts: dict[str, Any]
    shape: tuple[int, ...]
    compute: Callable[[Tensor], Tensor]  # images [B, C, H, W] in [-1, 1] to arrays [B, *shape]
    source: "CachePlan | None" = None  # a cache that these can also be computed from, if it is there
    convert: Callable[[Tensor], Tensor] | None = None  # its arrays [B, *source.shape] to arrays [B, *shape]

    @property
    def kind(self) -> str:
        """Latents or features."""
        return self.facts["kind"]

    def planned(self, root: Path, count: int, flips: bool) -> ArrayCache:
        """The cache in `root`, begun or not."""
        folder = root / f"{self.facts['kind']}-{cache_key(self.facts)}"
        return ArrayCache.plan(folder, self.facts, count, 2 if flips else 1, self.shape)

    def fill(
        self,
        cache: ArrayCache,
        config: Recipe,
        data: ImageSet,
        report: Callable[[int], None],
        part: tuple[int, int] = (1, 1),
    ) -> None:
        """Compute what is missing in `cache`, from the source's arrays if these lie beside it."""
        source, compute = None, self.compute
        if self.source is not None and self.convert is not None:
            with suppress(InputError):  # an incomplete one is none
                source = find(cache.folder.parent, self.source.facts)
            compute = compute if source is None else self.convert
        options = {"workers": config.data.workers, "tolerance": Tolerance(config.data.unreadable, cache.count)}
        cache.fill(data.train, compute, data.levels, report, part, source=source, **options)


def cache_shapes(
    config: RunConfig, flow: TarFlow, autoencoder: AutoencoderConfig | None, encoder: Encoder | None
) -> dict[str, tuple[int, ...]]:
    """The arrays of one image that a run can keep on disk, latents first; `encoder` is the alignment's."""
    shapes = {}
    if autoencoder is not None and config.latents.cache and not config.latents.joint:
        shapes["latents"] = (autoencoder.moments * flow.data_shape[0], *flow.data_shape[1:])
    if encoder is not None and config.alignment.cache:
        shapes["features"] = (flow.token_shape[0], encoder.dim)
    return shapes


def cache_plans(
    config: RunConfig,
    data: ImageSet,
    flow: TarFlow,
    autoencoder: Autoencoder | None,
    alignment: Alignment | None,
    device: torch.device,
) -> list[CachePlan]:
    """The caches that a run can use, latents first; the alignment's encoder and the autoencoder compute on `device`."""
    plans, images = [], _images(data, config.train)
    shapes = cache_shapes(config, flow, autoencoder and autoencoder.config, alignment and alignment.encoder)
    if autoencoder is not None and "latents" in shapes:
        known = autoencoder.config
        facts = {"kind": "latents", **images, "autoencoder": known.weights, "moments": known.moments}
        features = feature_plan(config, data, autoencoder) if isinstance(autoencoder, SemanticAutoencoder) else None
        convert = autoencoder.compressed if isinstance(autoencoder, SemanticAutoencoder) else None
        plans.append(CachePlan(facts, shapes["latents"], autoencoder.moments, features, convert))
    if alignment is not None and "features" in shapes:
        plans.append(target_plan(config, data, flow, alignment.targets, shapes["features"], device))
    return plans


def target_plan(
    config: RunConfig,
    data: ImageSet,
    flow: TarFlow,
    targets: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    device: torch.device,
) -> CachePlan:
    """The cache of the features of the alignment's encoder, which `targets` makes of images on `device`."""

    def compute(x: Tensor) -> Tensor:
        with torch.no_grad(), autocast(device, config.alignment.encoder_precision):
            return targets(x)

    return CachePlan(_images(data, config.train) | feature_facts(config.alignment, flow.grid), shape, compute)


def feature_plan(config: Recipe, data: ImageSet, autoencoder: SemanticAutoencoder) -> CachePlan:
    """The cache of the features in which an autoencoder works; an alignment with the same ones shares it."""
    facts = _images(data, config.train) | feature_facts(autoencoder.options, autoencoder.grid)
    shape = (math.prod(autoencoder.grid), autoencoder.encoder.dim)
    return CachePlan(facts, shape, torch.no_grad()(autoencoder.features))


def _images(data: ImageSet, train: TrainConfig) -> dict[str, Any]:
    """On which images the values of a cache depend."""
    return {
        "images": data.train.fingerprint(),
        "count": len(data.train),
        "image_size": data.image_size,
        "channels": data.channels,
        "levels": data.levels,
        "flips": train.hflip,
    }


def feature_facts(config: AlignmentConfig | SemanticConfig, grid: tuple[int, int]) -> dict[str, Any]:
    """On what features depend besides the images: the encoder, which of its weights, its precision, the grid."""
    file = Path(config.encoder_weights or "")
    weights = file_hash(file)[:16] if file.is_file() else config.encoder_weights or "published"
    facts = {"kind": "features", "encoder": config.encoder, "weights": weights, "precision": config.encoder_precision}
    return facts | {"grid": list(grid)}


def open_cache(plan: CachePlan, config: Recipe, data: ImageSet) -> ArrayCache:
    """The cache of a plan: the one in the folder that the run names, or else made where it is missing.

    Raises:
        InputError: if that folder has none that fits, or it cannot be made.
    """
    if config.train.caches is not None:
        root = Path(config.train.caches)
        cache = find(root, plan.facts)
        if cache is None:
            why = nearest_mismatch(root, plan.facts) or f"{root} holds no cache of {plan.kind}"
            raise InputError(f"{why}; use what `flowback cache` makes of this configuration")
        return cache
    cache = plan.planned(cache_folder(), len(data.train), config.train.hflip)
    if cache.missing():
        with Bar(plan.kind, cache.count) as bar:
            plan.fill(cache, config, data, bar.update)
    return cache


def make_caches(
    config: RunConfig, root: Path | None, part: tuple[int, int] = (1, 1), task: str = "fill"
) -> list[ArrayCache]:
    """Make all caches that a run can use, before it.

    Args:
        config: of the run.
        root: where; None for the user's cache folder.
        part: (i, k) does the i-th of k shares of the work.
        task: "fill"; "plan" only says how large they will be; "verify" compares what is there with its checksums.

    Raises:
        InputError: if the run can use none, one cannot be made, or one is not what was written.
    """
    config = settle(config, flow=first_flow(config)[0])
    data = load_data(config.data)
    device = pick_device(config.train.accelerator)
    autoencoder = make_autoencoder(config, data)
    flow = build_flow(config, data, autoencoder and autoencoder.config).to(device)
    autoencoder = autoencoder and autoencoder.to(device)
    alignment = None if config.alignment.strategy == "none" else make_alignment(config.alignment, flow).to(device)
    plans = cache_plans(config, data, flow, autoencoder, alignment, device)
    if not plans:
        raise InputError(
            "this configuration has nothing to cache; expected one with a trained autoencoder, or an alignment"
        )
    caches = [plan.planned(root or cache_folder(), len(data.train), config.train.hflip) for plan in plans]
    for cache in caches:
        console.print(
            f"{cache.facts['kind']:9} {cache.bytes / 1e9:.3f} GB in {cache.shards} shards, "
            f"{len(cache.missing())} of them to be made: {cache.folder}",
            highlight=False,
            soft_wrap=True,
        )
    for plan, cache in zip(plans, caches, strict=True):
        if task == "plan":
            continue
        count = cache.count if task == "verify" else cache.part_images(part)
        with Bar(plan.kind, count) as bar:
            if task == "verify":
                cache.verify(bar.update)
            else:
                plan.fill(cache, config, data, bar.update, part)
    return caches
