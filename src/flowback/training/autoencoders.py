"""Training an autoencoder on its own: what its run is made of, measures and says."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowback.core.console import Bar, say
from flowback.core.devices import deterministic, keep_freed_memory, pick_device, put
from flowback.core.distributed import in_all, is_first
from flowback.core.units import from_levels
from flowback.data import ImageSet, Split
from flowback.data.batches import Reader
from flowback.data.cache import ArrayCache
from flowback.data.splits import evaluated, spread
from flowback.latents import Autoencoder
from flowback.latents.kl import KLAutoencoder
from flowback.latents.loading import read_config
from flowback.latents.losses import ReconstructionLoss
from flowback.latents.semantic import SemanticAutoencoder
from flowback.measure.reconstruction import psnr, ssim
from flowback.runs.checkpoint import State
from flowback.runs.config import AutoencoderRunConfig
from flowback.runs.folder import open_run, training_data
from flowback.training.build import as_image_set
from flowback.training.caches import feature_plan, open_cache
from flowback.training.inputs import ImageInputs
from flowback.training.job import Job, offer
from flowback.training.loop import take_steps
from flowback.training.parallel import check_batch, launch, peers

SETTLING = 1000  # training images from which the scale of latents is taken
SHOWN = 32  # held-out images in a picture, each beside its reconstruction
BATCH = 64  # images at once, where none is trained
COLUMNS = ["step", "seconds", "lr", "loss", "pixels", "features", "lpips", "adversarial", "discriminator", "kl", "latents"]
COLUMNS += ["grad_norm", "images_per_second", "data_wait", "skipped", "held_out_psnr", "held_out_ssim"]


@dataclass
class AutoencoderResult:
    """How a run ended."""

    run: Path
    autoencoder: Autoencoder  # with averaged weights
    data: ImageSet
    state: State
    interrupted: bool


class Reconstruction(nn.Module):
    """The objective: what is lost between an image and its reconstruction, and the terms of the autoencoder's own."""

    def __init__(self, autoencoder: Autoencoder, loss: ReconstructionLoss) -> None:
        super().__init__()
        self.autoencoder, self.loss = autoencoder, loss

    def forward(
        self, x: Tensor, noise: Tensor, levels: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts; of images `[B, C, H, W]` and the rest as `Autoencoder.reconstruct` has it."""
        reconstructed, own = self.autoencoder.reconstruct(x, noise, levels, targets)
        loss, parts = self.loss(x, reconstructed)
        return torch.stack([loss, *own.values()]).sum(), parts | {name: part.detach() for name, part in own.items()}


class AutoencoderJob(Job):
    """An autoencoder on its own.

    Args:
        config: of the run.
        data: its images.
        autoencoder: of random weights, but for what has a closed form; on its device.
        loss: of its reconstructions.
        device: where to train.
        share: (i, k): this process is the i-th, from 0, of k that share every batch.
        features: of the autoencoder's encoder, where they are on disk.
    """

    columns = COLUMNS
    config: AutoencoderRunConfig
    average: Autoencoder

    def __init__(
        self,
        config: AutoencoderRunConfig,
        data: ImageSet,
        autoencoder: Autoencoder,
        loss: ReconstructionLoss,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
        features: ArrayCache | None = None,
    ) -> None:
        objective = Reconstruction(autoencoder, loss).to(device)
        trained: dict[str, nn.Module] = {"autoencoder": autoencoder}
        if loss.discriminator is not None:
            trained["discriminator"] = loss.discriminator
        average = deepcopy(autoencoder).freeze()
        known = autoencoder.config
        latents = (known.channels, *known.latent_size(data.size))
        inputs = ImageInputs(config, data, latents, device, share, features)
        super().__init__(config, data, inputs, objective, trained, {"autoencoder": average}, average)
        self.device, self.loss = device, loss

    def begin_step(self, step: int) -> None:
        """Let the discriminator act from its share of the run on."""
        self.loss.active = step >= self.config.reconstruction.adversarial_from * self.config.train.steps

    def settle(self) -> None:
        """Take the scale of latents from some training images."""
        indices = spread(len(self.data.train), SETTLING)
        self.average.settle(torch.cat(list(images(self.data.train, indices, self.data.levels, self.device))))

    def status(self, row: dict[str, float]) -> str:
        """The loss and its parts."""
        return "  ".join(f"{name} {row[name]:.4f}" for name in ("loss", *COLUMNS[4:11]) if name in row)

    def measure(self, fabric: Any) -> dict[str, float]:
        """How close reconstructions of held-out images are."""
        return closeness(self.average, self.data, self.config.train.eval_images, self.device, fabric)

    def picture(self) -> Tensor:
        """Held-out images, each beside its reconstruction."""
        indices = spread(len(self.data.held_out), SHOWN)
        x = torch.cat(list(images(self.data.held_out, indices, self.data.levels, self.device)))
        return torch.stack([x, self.average.decode(self.average.encode(x))], dim=1).flatten(0, 1)


def closeness(autoencoder: Autoencoder, data: ImageSet, count: int, device: torch.device, fabric: Any) -> dict[str, float]:
    """How close reconstructions of `count` held-out images are, of clean latents; each process measures its share."""
    indices = evaluated(len(data.held_out), count)[fabric.global_rank :: fabric.world_size]

    def measure() -> list[tuple[float, float]]:
        pairs = (
            (x, autoencoder.decode(autoencoder.encode(x))) for x in images(data.held_out, indices, data.levels, device)
        )
        return [row for x, x_hat in pairs for row in zip(psnr(x, x_hat).tolist(), ssim(x, x_hat).tolist(), strict=True)]

    found = torch.tensor([row for rows in in_all(fabric, measure) for row in rows])
    return dict(zip(("held_out_psnr", "held_out_ssim"), found.mean(dim=0).tolist(), strict=True))


@torch.no_grad()
def images(split: Split, indices: Any, levels: int, device: torch.device) -> Iterator[Tensor]:
    """Images of a split `[B, C, H, W]` in [-1, 1], batch by batch; the next one for each that cannot be read."""
    reader = Reader(split)
    for start in range(0, len(indices), BATCH):
        found = reader.read(indices[start : start + BATCH]).images
        assert found is not None
        yield from_levels(put(found, device), levels)


def train_autoencoder(config: AutoencoderRunConfig, data: ImageSet | Any = None) -> AutoencoderResult:
    """Train an autoencoder as `config` says; the run's folder gets what the folder of every run gets.

    Args:
        config: of the run.
        data: images to use in place of `config.data`: an `ImageSet`, or what `as_image_set` makes one of.

    Raises:
        InputError: if the configuration, the data or the run's folder is not usable, or the loss stays not finite.
        PeerLost: if another process of the run is gone.
    """
    c = config.train
    check_batch(c)
    pick_device(c.accelerator)
    data = training_data(config, None if data is None else as_image_set(data))
    torch.manual_seed(c.seed)
    autoencoder = build_autoencoder(config, data)
    loss = ReconstructionLoss(config.reconstruction, data.channels, data.size, autoencoder.encoder)
    with deterministic(c.deterministic), open_run(config, data, first=is_first()) as found:
        fabric = launch(c)
        keep_freed_memory(fabric.device)
        with peers(fabric):
            resume_from = fabric.broadcast(found)
            share = (fabric.global_rank, fabric.world_size)
            autoencoder.to(fabric.device)
            features = None
            if isinstance(autoencoder, SemanticAutoencoder):
                if config.cache:
                    with fabric.rank_zero_first():  # which makes what is missing
                        features = open_cache(feature_plan(config, data, autoencoder), config, data)
                if resume_from is None:
                    _fit(autoencoder, data, features)
            job = AutoencoderJob(config, data, autoencoder, loss, fabric.device, share, features)
            if fabric.is_global_zero:
                say(describe(config, autoencoder, data))
            state = take_steps(job, fabric, resume_from)
            if fabric.is_global_zero and state.step == c.steps:
                _offer(job.average, config.folder)
    return AutoencoderResult(config.folder, job.average, data, state, interrupted=state.step < c.steps)


def _fit(autoencoder: SemanticAutoencoder, data: ImageSet, features: ArrayCache | None) -> None:
    """Fit what has a closed form to training images, or to their features where they are on disk; none is mirrored."""
    count = len(data.train)
    parts = [torch.arange(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    with Bar("fitting", count, shown=is_first()) as bar:

        def watched(batches: Iterator[Tensor]) -> Iterator[Tensor]:
            for part, batch in zip(parts, batches, strict=True):
                yield put(batch, autoencoder.device)
                bar.update(int(part[-1]) + 1)

        if features is None:
            autoencoder.fit(watched(images(data.train, range(count), data.levels, autoencoder.device)))
        else:
            autoencoder.compressor.fit(watched(features(part, torch.zeros_like(part)) for part in parts))


def _offer(autoencoder: Autoencoder, run: Path) -> None:
    """Put a trained autoencoder where flows look for it in a run's folder, whatever becomes of the checkpoints."""
    place = run / "autoencoder"
    offer(autoencoder, place)
    autoencoder.set_config(read_config(str(place)))  # a flow that is made with it finds it again


def build_autoencoder(config: AutoencoderRunConfig, data: ImageSet) -> Autoencoder:
    """The autoencoder that a configuration describes, for a data set; of random weights."""
    if config.kind == "semantic":
        return SemanticAutoencoder.new(config.semantic, data.size, data.channels)
    return KLAutoencoder.new(config.kl, data.size, data.channels)


def describe(config: AutoencoderRunConfig, autoencoder: Autoencoder, data: ImageSet) -> str:
    """What is about to be trained, in a few lines."""
    known = autoencoder.config
    millions = sum(p.numel() for p in autoencoder.parameters() if p.requires_grad) / 1e6
    shape = "x".join(map(str, (*known.latent_size(data.size), known.channels)))
    return (
        f"data        {data.name}: {len(data.train)} images for training, {len(data.held_out)} held out, "
        f"{'x'.join(map(str, (*data.size, data.channels)))}\n"
        f"autoencoder {known.kind}: latents {shape}, {millions:.2f}M parameters"
    )
