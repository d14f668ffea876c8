"""What a training step sees: images or latents with noise, labels, the encoder's targets.

All of it is a function of (seed, step, number of the sample in the step's batch), whichever process has that sample.

Latents and targets do not change while a flow learns, so they are computed once and kept on disk
(`flowback.data.cache`); where both are, images are not even read.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowback.alignment import Alignment
from flowback.core.console import say
from flowback.core.devices import autocast, put
from flowback.core.seeds import draw
from flowback.core.units import from_levels
from flowback.data import ImageSet, batches, step_generator
from flowback.data.batches import Raw, Tolerance, sample_generators
from flowback.data.cache import ArrayCache
from flowback.flow.tarflow import TarFlow
from flowback.latents import Autoencoder
from flowback.runs.config import Recipe, RunConfig
from flowback.training.caches import cache_plans, open_cache


@dataclass
class Batch:
    """One step's batch, where the flow is."""

    x: Tensor  # noised images or latents, [B, *data_shape]; clean where an autoencoder or a student is trained
    y: Tensor | None = None  # labels [B], -1 where dropped; None for an unconditional flow
    targets: Tensor | None = None  # features [B, N, F] of the clean images; None where none are needed
    noise: Tensor | None = None  # standard normal, of the shape of latents, or of z where a student is trained
    levels: Tensor | None = None  # of the noise, uniform in [0, 1), [B]
    places: Tensor | None = None  # uniform in [0, 1), [B, rows, columns]: which patches of the images are hidden
    noised: Tensor | None = None  # `x` with the noise of the flow's training, where a student learns from both

    def split(self, pieces: int) -> "list[Batch]":
        """The batch in equal pieces, which follow each other."""
        size = len(self.x) // pieces
        cuts = [slice(i * size, (i + 1) * size) for i in range(pieces)]
        return [Batch(self.x[cut], **{k: t[cut] for k, t in self.all_but_x().items()}) for cut in cuts]

    def all_but_x(self) -> dict[str, Tensor]:
        """What there is besides images, by name."""
        return {name: t for name, t in vars(self).items() if t is not None and name != "x"}


@dataclass
class Drawn:
    """What every step draws, whatever is trained."""

    x: Tensor | None  # clean images [B, C, H, W], mirrored or not, where they were read
    y: Tensor  # labels [B], -1 where dropped, on the CPU
    flipped: Tensor  # whether an image is mirrored [B], on the CPU
    generators: list[torch.Generator]  # of what else is random, one for each image


class Source(ABC):
    """What the inputs of all runs share.

    Args:
        config: of the run.
        data: its images.
        device: where batches go.
        share: (i, k): this process is the i-th, from 0, of k that share every batch.
    """

    def __init__(self, config: Recipe, data: ImageSet, device: torch.device, share: tuple[int, int] = (0, 1)) -> None:
        self.config, self.data, self.device, self.share = config, data, device, share
        self.tolerance = Tolerance(config.data.unreadable, len(data.train))

    def stream(self, start: int, stop: int, images: bool = True) -> Iterator[Raw]:
        """What the steps `start` … `stop - 1` read, `images` or only labels; `prepare` makes batches of it."""
        c = self.config
        return batches(self.data.train, c.train.batch_size, c.train.seed, start, stop, c.data.workers, images, self.share)

    @abstractmethod
    def prepare(self, raw: Raw, step: int) -> Batch:
        """The batch of step `step`, from 0, with everything random in it."""

    def draw(self, raw: Raw, step: int) -> Drawn:
        """Clean images and labels of step `step`, from 0, and the generators of their noise."""
        for sentence in self.tolerance.note(raw.unreadable):
            say(f"the next one is taken instead: {sentence}")
        c, count = self.config.train, len(raw.labels)
        first = self.share[0] * count
        coins = torch.rand(2, c.batch_size, generator=step_generator(c.seed, step))[:, first : first + count]
        flipped, dropped = coins[0] < (0.5 if c.hflip else 0.0), coins[1] < c.class_dropout
        x = None
        if raw.images is not None:
            x = from_levels(put(raw.images, self.device), self.data.levels)
            x = torch.where(put(flipped, self.device)[:, None, None, None], x.flip(-1), x)
        y = torch.where(dropped, -1, raw.labels)
        return Drawn(x, y, flipped, sample_generators(c.seed, step, first, count))


class ImageInputs(Source):
    """The batches of a run that trains an autoencoder: clean images, and the noise for their latents.

    Args:
        config: of the run.
        data: its images.
        latents: channels, height and width of an image's latents.
        device: where batches go.
        share: (i, k): this process is the i-th, from 0, of k that share every batch.
        features: of a frozen encoder, where they are on disk.
    """

    def __init__(
        self,
        config: Recipe,
        data: ImageSet,
        latents: tuple[int, ...],
        device: torch.device,
        share: tuple[int, int] = (0, 1),
        features: ArrayCache | None = None,
    ) -> None:
        super().__init__(config, data, device, share)
        self.latents, self.features = latents, features

    def prepare(self, raw: Raw, step: int) -> Batch:
        """Everything random in step `step`, from 0: mirrored images, noise."""
        drawn = self.draw(raw, step)
        assert drawn.x is not None
        noise = draw(torch.randn, drawn.x.new_empty(len(drawn.x), *self.latents), drawn.generators)
        levels = draw(torch.rand, drawn.x.new_empty(len(drawn.x), 1), drawn.generators)[:, 0]
        features = self.features and put(self.features(raw.indices, drawn.flipped), self.device).to(drawn.x.dtype)
        return Batch(drawn.x, None, features, noise, levels)


class Inputs(Source):
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
        super().__init__(config, data, device, share)
        self.config: RunConfig = config
        self.flow, self.alignment, self.autoencoder = flow, alignment, autoencoder
        for module in (alignment or flow, autoencoder):
            if module is not None:
                module.to(device)
        plans = cache_plans(config, data, flow, autoencoder, alignment, device)
        caches = {plan.kind: open_cache(plan, config, data) for plan in plans}
        self.latents, self.features = caches.get("latents"), caches.get("features")
        self.targets: Callable[[Tensor], Tensor] | None = alignment and alignment.targets  # of clean images [B, C, H, W]
        self.others: Tensor | None = None  # the image whose features an image gets instead of its own
        if config.alignment.shuffled:
            generator = torch.Generator().manual_seed(config.train.seed)
            self.others = torch.randperm(len(data.train), generator=generator)

    def stream(self, start: int, stop: int, images: bool = True) -> Iterator[Raw]:
        """What the steps `start` … `stop - 1` read: images only where not all that is made of them is cached."""
        flow_needs = self.autoencoder is None or self.latents is None
        return super().stream(start, stop, images and (flow_needs or (self.targets is not None and self.features is None)))

    def prepare(self, raw: Raw, step: int) -> Batch:
        """Everything random in step `step`, from 0: mirrored images, samples of latents, noise, dropped labels."""
        drawn = self.draw(raw, step)
        x, y = self.clean(raw, drawn)
        return Batch(self.flow.perturb(x, drawn.generators), y, self._targets(raw.indices, drawn.flipped, drawn.x))

    def clean(self, raw: Raw, drawn: Drawn) -> tuple[Tensor, Tensor | None]:
        """Images or latents `[B, *data_shape]` without noise, and labels `[B]`, where the flow is."""
        y = put(drawn.y, self.device) if self.flow.num_classes else None
        if self.autoencoder is not None and self.latents is not None:
            moments = put(self.latents(raw.indices, drawn.flipped), self.device).to(torch.get_default_dtype())
            return self.autoencoder.from_moments(moments, drawn.generators), y
        assert drawn.x is not None
        return drawn.x if self.autoencoder is None else self.autoencoder.encode(drawn.x, drawn.generators), y

    def _targets(self, indices: Tensor, flipped: Tensor, x_clean: Tensor | None) -> Tensor | None:
        if self.targets is None or (self.alignment is not None and not self.alignment.active):
            return None
        if self.features is not None:
            indices = indices if self.others is None else self.others[indices]
            return put(self.features(indices, flipped), self.device)
        assert x_clean is not None
        with autocast(self.device, self.config.alignment.encoder_precision):
            return self.targets(x_clean)
