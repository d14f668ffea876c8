"""What a recipe takes before it is trained: parameters, operations, memory, days, disk (`flowback train --dry-run`).

One step of the training code itself runs on tensors without content (`flowback.training.meter`), so that the figures are
of what will run, whatever its options; nothing is read but the list of images, and nothing is written.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flowback.alignment import Alignment
from flowback.core.devices import autocast
from flowback.core.errors import InputError
from flowback.data import DataConfig, ImageSet, load_data
from flowback.data.splits import MemorySplit
from flowback.encoders import Encoder, load_encoder
from flowback.flow.tarflow import TarFlow
from flowback.latents import AutoencoderConfig
from flowback.latents.joint import JointAutoencoder
from flowback.latents.loading import read_config
from flowback.latents.losses import ReconstructionLoss
from flowback.latents.semantic import SemanticAutoencoder
from flowback.runs.config import AutoencoderRunConfig, RunConfig, recipe
from flowback.tasks.classify import Effort
from flowback.training.apply import checkpoint_layers
from flowback.training.build import build_flow
from flowback.training.caches import cache_shapes
from flowback.training.flows import Likelihood, held_out_effort
from flowback.training.joint import Joint
from flowback.training.meter import Meter

DEVICES = (1, 8, 64)
ITERATIONS = (400_000, 1_000_000)  # the papers' ablations and final models
SECONDS_PER_DAY = 86_400
IMAGENET = {"images": 1_281_167, "classes": 1000, "channels": 3}  # ILSVRC 2012, for training
SD_VAE = {"channels": 4, "downsample": 8, "scale": 0.18215, "shift": 0.0, "weights": "not read"}
AUTOENCODERS = dict.fromkeys(("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse"), SD_VAE)
EXACT_TERMS = 6  # of the adjoint; how many "exact" takes depends on the data: docs/method.md has 4 to 6


@dataclass(frozen=True)
class Device:
    """What a recipe is planned for.

    Args:
        tflops: its peak, 10^12 operations per second, in the recipe's precision. The default is an NVIDIA H100 SXM in
            bfloat16 without sparsity, by its data sheet.
        gigabytes: its memory, 10^9 bytes.
        utilization: the share of the peak that training reaches.

    Raises:
        InputError: if a value is impossible.
    """

    tflops: float = 989.0
    gigabytes: float = 80.0
    utilization: float = 0.4

    def __post_init__(self) -> None:
        for name in ("tflops", "gigabytes"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number above 0, got {getattr(self, name)}")
        if not 0 < self.utilization <= 1:
            raise InputError(f"utilization must be above 0 and at most 1, got {self.utilization}")


@dataclass(frozen=True)
class Step:
    """One step of one device."""

    devices: int
    images: int  # of the device's share
    pieces: int  # in which it takes them, `train.grad_accum_steps`
    flops: int
    bytes: int  # weights, gradients, averages, optimizer, encoder and the peak of all that a step makes; of fsdp at most


@dataclass(frozen=True)
class Budget:
    """What a recipe takes."""

    parameters: int  # of the flow
    projector: int
    encoder: int  # frozen
    tokens: tuple[int, int]
    depths: list[int]
    batch: int
    iterations: list[int]
    steps: list[Step]
    caches: dict[str, int]  # kind -> bytes on disk
    encoder_flops: int  # of computing all features that are cached
    evaluations: int  # of a run
    evaluation: Effort  # of each, shared by the devices
    pass_flops: int  # of a forward pass of one image
    device: Device

    def seconds(self, step: Step) -> float:
        """How long a step takes at the stated utilization."""
        return step.flops / (1e12 * self.device.tflops * self.device.utilization)

    def __str__(self) -> str:
        d = self.device
        frozen = f", projector {_millions(self.projector)}, frozen encoder {_millions(self.encoder)}" * bool(self.encoder)
        lines = [
            f"parameters  flow {_millions(self.parameters)}{frozen}",
            f"flow        {len(self.depths)} blocks, {sum(self.depths)} layers, "
            f"{self.tokens[0]} tokens of {self.tokens[1]} numbers",
            f"gradients   {4 * (self.parameters + self.projector) / 1e9:.3g} GB, averaged over all devices in each step",
            f"caches      {', '.join(f'{kind} {size / 1e9:,.1f} GB' for kind, size in self.caches.items()) or 'none'}",
        ]
        if self.encoder_flops:
            hours = self.encoder_flops / (1e12 * d.tflops * d.utilization) / 3600
            lines.append(
                f"            the features take {self.encoder_flops / 1e15:.3g} PFLOP, {hours:.2g} device hours, once"
            )
        flops = self.evaluations * self.evaluation.passes * self.pass_flops
        lines += [
            f"evaluation  {self.evaluation}; {self.evaluations} times",
            f"            {flops / 1e15:.3g} PFLOP, {flops / (1e12 * d.tflops * d.utilization) / 3600:.2g} device hours in "
            "all, not counted below; the pictures of samples are not counted",
        ]
        columns = [f"days to {n:,}" for n in self.iterations]
        lines += [
            f"a step      {self.batch} images; devices of {d.tflops:g} TFLOP/s at {100 * d.utilization:g} %, "
            f"{d.gigabytes:g} GB",
            "",
            "  ".join(["devices  images each  pieces  TFLOP each  GB each  steps/s", *columns]),
        ]
        for step in self.steps:
            days = (self.seconds(step) * n / SECONDS_PER_DAY for n in self.iterations)
            times = "".join(f"  {value:{len(name)}.3g}" for value, name in zip(days, columns, strict=True))
            fits = "" if step.bytes <= 1e9 * d.gigabytes else "  does not fit"
            lines.append(
                f"{step.devices:7}  {step.images:11}  {step.pieces:6}  {step.flops / 1e12:10.4g}  {step.bytes / 1e9:7.1f}  "
                f"{1 / self.seconds(step):7.3g}{times}{fits}"
            )
        return "\n".join(lines)


def plan(config: RunConfig, device: Device | None = None) -> Budget:
    """What a recipe takes, on 1, 8 and 64 devices.

    A device takes its share of the batch in as many pieces (`train.grad_accum_steps`, doubled) as its memory asks for.
    Where `data.path` of imagenet is not given, or an autoencoder of `AUTOENCODERS` not read, what is published of them is
    taken; of one that a recipe of this package would make, what that recipe says. Where `alignment.every` or `until` leave
    steps unaligned, steps are counted as if all were aligned. Of a loss of reconstructions, frozen
    networks are not counted.

    Raises:
        InputError: if the configuration or the data is not usable.
    """
    device, c, a = device or Device(), config.train, config.alignment
    if (a.strategy, a.gradient) == ("reverse", "sequential"):
        raise InputError("alignment.gradient is 'sequential'; a dry run measures all others")
    data = _data(config.data)
    with FakeTensorMode() as fake:
        autoencoder = known_autoencoder(config, data)
        joint = JointAutoencoder.new(config.joint, data.size, data.channels) if config.latents.joint else None
        flow = build_flow(config, data, autoencoder)
    alignment = encoder = None
    if a.strategy != "none":
        with torch.device("meta"):  # only its sizes are needed
            encoder = load_encoder(a.encoder, "random", grid=flow.grid)
        gradient = EXACT_TERMS if a.gradient == "exact" else a.gradient
        with fake:
            variant = a.projector_width, a.projector, a.spatial_norm
            alignment = Alignment(
                flow, encoder, a.at, a.strategy, gradient, a.weight, *variant, separate_projectors=a.separate_projectors
            )
    if c.checkpoint_activations:
        checkpoint_layers(flow)
    objective: nn.Module = alignment or Likelihood(flow)
    if joint is not None:
        with fake:
            loss = ReconstructionLoss(replace(config.reconstruction, features=0.0, lpips=0.0), data.channels, data.size)
            objective = Joint(objective, joint, loss)

    model, projector, frozen = (_count(part) for part in (flow, alignment and alignment.projector, encoder))
    trained = _count(objective)
    kept = 4 * (3 * trained + model + _count(joint))  # weights and AdamW's moments, the averages
    encoded = 0 if encoder is None else _encoder_flops(encoder, data)
    steps = []
    for devices in (n for n in DEVICES if c.batch_size % (n * c.grad_accum_steps) == 0):
        images, pieces = c.batch_size // devices, c.grad_accum_steps
        always = 4 * frozen + (kept // devices + 4 * trained if c.strategy == "fsdp" and devices > 1 else kept)
        flops, peak = _measure(objective, fake, c.precision, images, pieces, encoder)
        while always + peak > 1e9 * device.gigabytes and images % (2 * pieces) == 0:
            pieces *= 2
            flops, peak = _measure(objective, fake, c.precision, images, pieces, encoder)
        flops += 0 if a.cache else images * encoded
        steps.append(Step(devices, images, pieces, flops, always + peak))

    with fake, torch.no_grad(), Meter() as forward, autocast(torch.device("cpu"), c.precision):
        flow.log_prob(torch.empty(1, *flow.data_shape))
    rows = len(data.train) * (2 if c.hflip else 1)  # mirrored images too
    shapes = cache_shapes(config, flow, autoencoder, encoder)
    return Budget(
        parameters=model,
        projector=projector,
        encoder=frozen,
        tokens=flow.token_shape,
        depths=flow.config.depths,
        batch=c.batch_size,
        iterations=sorted({*ITERATIONS, c.steps}),
        steps=steps,
        caches={kind: 2 * rows * math.prod(shape) for kind, shape in shapes.items()},  # float16
        encoder_flops=encoded * rows if "features" in shapes else 0,
        evaluations=-(-c.steps // c.eval_every),
        evaluation=held_out_effort(config, flow, data),
        pass_flops=forward.flops,
        device=device,
    )


def _data(config: DataConfig) -> ImageSet:
    """The data set; of ImageNet without a path only what is published of it, and images without content."""
    if config.name != "imagenet" or config.path is not None:
        return load_data(config)
    images = min(IMAGENET["images"], config.limit or IMAGENET["images"])
    split = MemorySplit(torch.empty(0), torch.empty(images, dtype=torch.uint8, device="meta"))
    classes = [str(k) for k in range(IMAGENET["classes"])]
    return ImageSet(config.name, split, split, classes, config.image_size or 256, config.channels or 3, 256)


def known_autoencoder(config: RunConfig, data: ImageSet) -> AutoencoderConfig | None:
    """What is known of a configuration's autoencoder: what is published of it, or else what its folder or recipe says.

    Raises:
        InputError: if its folder is not there, and no recipe makes it.
    """
    name, size, channels = config.latents.autoencoder, data.size, data.channels
    if config.latents.joint:
        return JointAutoencoder.planned(config.joint, size, channels)
    if name is None:
        return None
    if name in AUTOENCODERS:
        return AutoencoderConfig(name=name, posterior=config.latents.posterior, **AUTOENCODERS[name])
    for file in recipe("autoencoder/fashion_mnist").parent.glob("*.yaml") if not Path(name).exists() else ():
        made = AutoencoderRunConfig.read(file)
        if made.run == name and made.kind == "semantic":
            return SemanticAutoencoder.planned(made.semantic, size, channels)
    return read_config(name, config.latents.posterior)


def _measure(
    objective: nn.Module, fake: FakeTensorMode, precision: str, images: int, pieces: int, encoder: Encoder | None
) -> tuple[int, int]:
    """Operations of a step, and the most memory of all that it makes, gradients included, in bytes.

    Two pieces at most are run: the second one finds the gradients of the first in memory, as all later ones do.
    """
    flow: TarFlow = objective.flow  # pyright: ignore[reportAssignmentType]
    run = min(pieces, 2)
    with fake, Meter([*objective.parameters(), *objective.buffers()]) as meter:
        latents = torch.empty(images, *flow.data_shape)
        given = {"y": torch.empty(images, flow.num_classes)}
        if encoder is not None:
            given["targets"] = torch.empty(images, flow.token_shape[0], encoder.dim)
        x = latents
        if isinstance(objective, Joint):
            known, given["noise"] = objective.autoencoder, latents
            x = torch.empty(images, known.config.image_channels, *(known.config.image_size or ()))
            if known.options.mask:
                given["places"] = torch.empty(images, *known.places)
        for part in range(run):
            cut = slice(part * images // pieces, (part + 1) * images // pieces)
            with autocast(x.device, precision):
                loss, _ = objective(x[cut], **{name: tensor[cut] for name, tensor in given.items()})
            loss.backward()
            del loss
    objective.zero_grad(set_to_none=True)
    return meter.flops * pieces // run, meter.peak


def _encoder_flops(encoder: nn.Module, data: ImageSet) -> int:
    """Operations of the features of one image."""
    with torch.device("meta"), Meter() as meter:
        encoder(torch.empty(1, data.channels, *data.size))
    return meter.flops


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}M"
