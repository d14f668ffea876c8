"""What a training step sees: images or latents with noise, labels, the encoder's targets.

All of it is a function of (seed, step, number of the sample in the step's batch), whichever process has that sample.

Latents and targets do not change while a flow learns, so they are computed once and kept on disk
(`flowback.data.cache`); where both are, images are not even read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowback.alignment import Alignment
from flowback.core.console import say
from flowback.core.devices import autocast, put
from flowback.core.units import from_levels
from flowback.data import ImageSet, batches, step_generator
from flowback.data.batches import Raw, Tolerance, sample_generators
from flowback.flow.tarflow import TarFlow
from flowback.latents import Autoencoder
from flowback.runs.config import RunConfig
from flowback.training.caches import cache_plans, open_cache


@dataclass
class Batch:
    """One step's batch, where the flow is."""

    x: Tensor  # noised images or latents, [B, *data_shape]
    y: Tensor | None  # labels [B], -1 where dropped; None for an unconditional flow
    targets: Tensor | None  # features [B, N, F]; None without alignment

    def split(self, pieces: int) -> "list[Batch]":
        """The batch in equal pieces, which follow each other."""
        size = len(self.x) // pieces
        cuts = [slice(i * size, (i + 1) * size) for i in range(pieces)]
        return [Batch(self.x[cut], *(None if t is None else t[cut] for t in (self.y, self.targets))) for cut in cuts]


class Inputs:
    """The batches of a run.

    Args:
        config: of the run.
        data: its images.
        flow: says what it sees, which noise, and whether there are labels.
        autoencoder: of a flow in latents.
        alignment: None for a plain flow.
        device: where batches go, and where caches are computed.
        share: (i, k): this process is the i-th, from 0, of k that share every batch.

    Raises:
        InputError: if the configuration names a folder of caches that has none that fits, or a cache cannot be made.
    """

    def __init__(
        self,
        config: RunConfig,
        data: ImageSet,
        flow: TarFlow,
        autoencoder: Autoencoder | None,
        alignment: Alignment | None,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.config, self.data, self.flow, self.alignment, self.device = config, data, flow, alignment, device
        self.share, self.autoencoder = share, autoencoder
        self.tolerance = Tolerance(config.data.unreadable, len(data.train))
        for module in (alignment or flow, autoencoder):
            if module is not None:
                module.to(device)
        plans = cache_plans(config, data, flow, autoencoder, alignment, device)
        caches = {plan.kind: open_cache(plan, config, data) for plan in plans}
        self.latents, self.features = caches.get("latents"), caches.get("features")
        self.others: Tensor | None = None  # the image whose features an image gets instead of its own
        if config.alignment.shuffled:
            generator = torch.Generator().manual_seed(config.train.seed)
            self.others = torch.randperm(len(data.train), generator=generator)

    def stream(self, start: int, stop: int) -> Iterator[Raw]:
        """What the steps `start` … `stop - 1` read; `prepare` makes batches of it."""
        flow_needs = self.autoencoder is None or self.latents is None
        needs_images = flow_needs or (self.alignment is not None and self.features is None)
        c = self.config
        size, seed = c.train.batch_size, c.train.seed
        return batches(self.data.train, size, seed, start, stop, c.data.workers, needs_images, self.share)

    def prepare(self, raw: Raw, step: int) -> Batch:
        """Everything random in step `step`, from 0: mirrored images, samples of latents, noise, dropped labels."""
        indices, images, labels, unreadable = raw
        for sentence in self.tolerance.note(unreadable):
            say(f"the next one is taken instead: {sentence}")
        c, first, count = self.config.train, self.share[0] * len(labels), len(labels)
        coins = torch.rand(2, c.batch_size, generator=step_generator(c.seed, step))[:, first : first + count]
        flipped, dropped = coins[0] < (0.5 if c.hflip else 0.0), coins[1] < c.class_dropout
        generators = sample_generators(c.seed, step, first, count)
        x_clean = None
        if images is not None:
            x_clean = from_levels(put(images, self.device), self.data.levels)
            x_clean = torch.where(put(flipped, self.device)[:, None, None, None], x_clean.flip(-1), x_clean)
        if self.autoencoder is not None and self.latents is not None:
            moments = put(self.latents(indices, flipped), self.device).to(torch.get_default_dtype())
            x = self.autoencoder.from_moments(moments, generators)
        else:
            assert x_clean is not None
            x = x_clean if self.autoencoder is None else self.autoencoder.encode(x_clean, generators)
        y = put(torch.where(dropped, -1, labels), self.device) if self.flow.num_classes else None
        return Batch(self.flow.perturb(x, generators), y, self._targets(indices, flipped, x_clean))

    def _targets(self, indices: Tensor, flipped: Tensor, x_clean: Tensor | None) -> Tensor | None:
        if self.alignment is None or not self.alignment.active:
            return None
        if self.features is not None:
            indices = indices if self.others is None else self.others[indices]
            return put(self.features(indices, flipped), self.device)
        assert x_clean is not None
        with autocast(self.device, self.config.alignment.encoder_precision):
            return self.alignment.targets(x_clean)
