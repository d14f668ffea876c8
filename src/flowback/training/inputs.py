"""What a training step sees: images or latents with noise, labels, the encoder's targets. A function of (seed, step).

Latents and targets do not change while a flow learns, so they are computed once and kept on disk (`flowback.data.cache`);
where both are, images are not even read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowback.alignment import Alignment
from flowback.data import ImageSet, batches, step_generator
from flowback.data.batches import Raw
from flowback.devices import autocast
from flowback.flows import TarFlow
from flowback.latents import Autoencoder, load_autoencoder
from flowback.training.caches import cache_plans, open_cache
from flowback.training.config import RunConfig
from flowback.units import from_levels


@dataclass
class Batch:
    """One step's batch, where the flow is."""

    x: Tensor  # noised images or latents, [B, *data_shape]
    y: Tensor | None  # labels [B], -1 where dropped; None for an unconditional flow
    targets: Tensor | None  # features [B, N, F]; None without alignment


class Inputs:
    """The batches of a run.

    Args:
        config: of the run.
        data: its images.
        flow: says what it sees, which noise, and whether there are labels.
        alignment: None for a plain flow.
        device: where batches go, and where caches are computed.

    Raises:
        InputError: if the configuration names a folder of caches that has none that fits, or a cache cannot be made.
    """

    def __init__(
        self, config: RunConfig, data: ImageSet, flow: TarFlow, alignment: Alignment | None, device: torch.device
    ) -> None:
        self.config, self.data, self.flow, self.alignment, self.device = config, data, flow, alignment, device
        if alignment is not None:
            alignment.to(device)
        plans = cache_plans(config, data, flow, alignment, device)
        caches = {plan.kind: open_cache(plan, config, data) for plan in plans}
        self.latents, self.features = caches.get("latents"), caches.get("features")
        self.autoencoder: Autoencoder | None = None
        if flow.config.autoencoder is not None:
            self.autoencoder = load_autoencoder(flow.config)

    def stream(self, start: int, stop: int) -> Iterator[Raw]:
        """What the steps `start` … `stop - 1` read; `prepare` makes batches of it."""
        flow_needs = self.autoencoder is None or self.latents is None
        needs_images = flow_needs or (self.alignment is not None and self.features is None)
        c = self.config
        return batches(self.data.train, c.train.batch_size, c.train.seed, start, stop, c.data.workers, needs_images)

    def prepare(self, raw: Raw, step: int) -> Batch:
        """Everything random in step `step`, from 0: mirrored images, samples of latents, noise, dropped labels."""
        indices, images, labels = raw
        c, generator = self.config.train, step_generator(self.config.train.seed, step)
        flipped = torch.rand(len(labels), generator=generator) < (0.5 if c.flip else 0.0)
        dropped = torch.rand(len(labels), generator=generator) < c.label_drop
        x_clean = None
        if images is not None:
            x_clean = from_levels(images.to(self.device), self.data.levels)
            x_clean = torch.where(flipped.to(self.device)[:, None, None, None], x_clean.flip(-1), x_clean)
        if self.autoencoder is not None and self.latents is not None:
            moments = self.latents(indices, flipped).to(self.device, torch.get_default_dtype())
            x = self.autoencoder.from_moments(moments, generator)
        else:
            assert x_clean is not None
            x = self.flow.to_data(x_clean, generator)
        y = torch.where(dropped, -1, labels).to(self.device) if self.flow.num_classes else None
        return Batch(self.flow.perturb(x, generator), y, self._targets(indices, flipped, x_clean))

    def _targets(self, indices: Tensor, flipped: Tensor, x_clean: Tensor | None) -> Tensor | None:
        if self.alignment is None:
            return None
        if self.features is not None:
            return self.features(indices, flipped).to(self.device)
        assert x_clean is not None
        with autocast(self.device, self.config.alignment.encoder_precision):
            return self.alignment.targets(x_clean)
