"""Training a flow: what its run is made of, measures and says."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowback.core.console import say
from flowback.core.devices import deterministic, keep_freed_memory, pick_device
from flowback.core.distributed import in_all, is_first
from flowback.core.errors import InputError
from flowback.core.units import LOG_2PI, nll_per_dim
from flowback.data import ImageSet
from flowback.data.splits import evaluated, spread
from flowback.encoders import Encoder
from flowback.flow.prior import FittedPrior
from flowback.flow.tarflow import TarFlow
from flowback.latents import Autoencoder, Flow, LatentFlow
from flowback.latents.joint import check_signal
from flowback.latents.losses import ReconstructionLoss
from flowback.measure.density import densities, seen
from flowback.runs.checkpoint import State, flow_folder, load_flow
from flowback.runs.config import RunConfig
from flowback.runs.folder import open_run, training_data
from flowback.runs.log import COLUMNS
from flowback.tasks.classify import Effort, effort, predict
from flowback.tasks.sampling import class_grid, shown_classes
from flowback.training.apply import checkpoint_layers, compile_blocks
from flowback.training.autoencoders import closeness
from flowback.training.build import (
    as_image_set,
    build_flow,
    describe_start,
    first_flow,
    make_alignment,
    make_autoencoder,
    settle,
)
from flowback.training.inputs import Inputs
from flowback.training.job import Job
from flowback.training.joint import Joint, JointInputs, make_reconstruction
from flowback.training.loop import take_steps
from flowback.training.parallel import check_batch, launch, peers
from flowback.training.prior import fit_to, told

JOINT_COLUMNS = [*COLUMNS, "pixels", "features", "lpips", "adversarial", "discriminator"]
JOINT_COLUMNS += ["signal", "least_signal", "dead_channels", "held_out_psnr", "held_out_ssim"]


@dataclass
class RunResult:
    """How a run ended."""

    run: Path
    flow: Flow  # with averaged weights
    data: ImageSet
    state: State
    interrupted: bool


class Likelihood(nn.Module):
    """The objective without alignment, in the form of `Alignment`."""

    def __init__(self, flow: TarFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(
        self, x_noisy: Tensor, y: Tensor | None = None, x_clean: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """`L_NF`, and its value as the only part."""
        nll = nll_per_dim(*self.flow.encode(x_noisy, y))
        return nll, {"nll": nll.detach()}


class FlowJob(Job):
    """A flow, aligned or not.

    Args:
        config: of the run.
        data: its images.
        inputs: the batches, and the modules that they are for.
    """

    columns = COLUMNS
    config: RunConfig
    average: Flow

    def __init__(self, config: RunConfig, data: ImageSet, inputs: Inputs) -> None:
        flow, alignment, autoencoder = inputs.flow, inputs.alignment, inputs.autoencoder
        trained: dict[str, nn.Module] = {"flow": flow}
        if alignment is not None:
            trained["projector"] = alignment.projector
        core = deepcopy(flow).to(inputs.device).requires_grad_(False).eval()
        average = core if autoencoder is None else LatentFlow(core, autoencoder)
        super().__init__(config, data, inputs, alignment or Likelihood(flow), trained, {"flow": core}, average)
        self.flow, self.alignment = flow, alignment
        self.affordable = held_out_effort(config, average, data)

    def apply(self) -> None:
        """Checkpoint activations, compile the blocks."""
        if self.config.train.checkpoint_activations:
            checkpoint_layers(self.flow)
        if self.config.train.compile:
            compile_blocks(self.flow)

    def begin_step(self, step: int) -> None:
        """Align, or not, and how: as the configuration says of this step."""
        if self.alignment is None:
            return
        c = self.config.alignment
        self.alignment.active = step % c.every == 0 and (c.until is None or step < c.until)
        if c.reverse_from is not None and step >= c.reverse_from:
            self.alignment.strategy = "reverse"

    def row(self, means: dict[str, float]) -> dict[str, float]:
        """The likelihood with the prior's constant."""
        return {"nats_per_dim": means["nll"] + LOG_2PI / 2}

    def status(self, row: dict[str, float]) -> str:
        """Loss, likelihood and alignment."""
        align = f"  align {row['align']:.3f}" if "align" in row else ""
        return f"loss {row['loss']:.4f}  nats/dim {row['nats_per_dim']:.4f}{align}"

    def measure(self, fabric: Any) -> dict[str, float]:
        """Likelihood and accuracy of held-out images."""
        flow, data, affordable = self.average, self.data, self.affordable
        x, y = seen(flow, data.held_out, evaluated(len(data.held_out), affordable.images), data.levels)
        own = slice(fabric.global_rank, None, fabric.world_size)

        def measure() -> dict[str, list[float]]:
            densities_ = densities(flow.core, x, y, isinstance(flow, LatentFlow), own=own)
            found = {"held_out_nats_per_dim": densities_["nats_per_dim"].tolist()}
            rules = {"single_gradient": affordable.images, "exact": affordable.exact} if flow.num_classes else {}
            for rule, images in ((rule, images) for rule, images in rules.items() if images):
                some = spread(len(x), images)
                right = predict(flow.core, x[some], rule, own=own).cpu() == y[some][own]
                found[f"held_out_{rule}"] = right.float().tolist()
            return found

        shares = in_all(fabric, measure)
        return {name: float(torch.tensor([v for share in shares for v in share[name]]).mean()) for name in shares[0]}

    def picture(self) -> Tensor:
        """Samples, a row for each class."""
        return class_grid(self.average, per_class=8, seed=self.config.train.seed)


class JointJob(FlowJob):
    """A flow, aligned or not, and the autoencoder in whose latents it works.

    Args:
        config: of the run.
        data: its images.
        inputs: the batches, and the modules that they are for.
        reconstruction: the autoencoder's loss.
    """

    columns = JOINT_COLUMNS

    def __init__(self, config: RunConfig, data: ImageSet, inputs: JointInputs, reconstruction: ReconstructionLoss) -> None:
        super().__init__(config, data, inputs)
        autoencoder = inputs.joint
        self.objective = Joint(self.objective, autoencoder, reconstruction).to(inputs.device)
        self.reconstruction, self.device = reconstruction, inputs.device
        self.trained["autoencoder"] = autoencoder
        if reconstruction.discriminator is not None:
            self.trained["discriminator"] = reconstruction.discriminator
        self.averages["autoencoder"] = self.autoencoder = deepcopy(autoencoder).freeze()
        self.average = LatentFlow(self.average.core, self.autoencoder)

    def begin_step(self, step: int) -> None:
        """As of a flow; let the discriminator act from its share of the run on."""
        super().begin_step(step)
        self.reconstruction.active = step >= self.config.reconstruction.adversarial_from * self.config.train.steps

    def check(self, step: int, row: dict[str, float]) -> None:
        """Whether the latents collapsed; while the rate rises they may be as weak as the images are."""
        if step > self.config.train.warmup:
            check_signal(row, self.config.joint)

    def status(self, row: dict[str, float]) -> str:
        """As of a flow, with the reconstruction and the signal."""
        return f"{super().status(row)}  pixels {row['pixels']:.4f}  signal {row['signal']:.3f}"

    def measure(self, fabric: Any) -> dict[str, float]:
        """As of a flow, and how close reconstructions are."""
        close = closeness(self.autoencoder, self.data, self.config.train.eval_images, self.device, fabric)
        return super().measure(fabric) | close


def train(
    config: RunConfig, data: ImageSet | Any = None, encoder: Encoder | None = None, flow: Flow | None = None
) -> RunResult:
    """Train a flow as `config` says; the run's folder gets configuration, checkpoints, metrics and sample grids.

    Args:
        config: of the run.
        data: images to use in place of `config.data`, of which only `workers` and `unreadable` then apply: an `ImageSet`,
            or what `as_image_set` makes one of.
        encoder: to align with in place of the one that `config.alignment` names. Its features are cached if it is a module
            with tensors, by which the cache knows it.
        flow: a flow to copy and train further, in place of the one that `config.train.init` names. `config.flow` becomes
            its configuration. With a `LatentFlow` comes its autoencoder.

    Raises:
        InputError: if the configuration, the data or the run's folder is not usable, or the loss stays not finite.
        PeerLost: if another process of the run is gone.
    """
    if flow is not None and config.train.init is not None:
        raise InputError(f"train.init is {config.train.init}, and another flow was given; use one of the two")
    named, what = first_flow(config) if flow is None else (None, "the flow that was given")
    flow = flow or named
    config = settle(config, data, encoder, flow)
    c = config.train
    check_batch(c, 2 if config.latents.joint else 1)  # the signal of latents is what differs between images
    pick_device(c.accelerator)
    data = training_data(config, None if data is None else as_image_set(data))
    torch.manual_seed(c.seed)
    autoencoder = make_autoencoder(config, data, flow)
    trained_flow = build_flow(config, data, autoencoder and autoencoder.config, start=flow)
    alignment = None if config.alignment.strategy == "none" else make_alignment(config.alignment, trained_flow, encoder)
    reconstruction = make_reconstruction(config, data, trained_flow, alignment) if config.latents.joint else None
    # nothing is written before everything that was asked for exists
    with deterministic(c.deterministic), open_run(config, data, first=is_first()) as found:
        fabric = launch(c)
        keep_freed_memory(fabric.device)
        with peers(fabric):
            resume_from = fabric.broadcast(found)
            with fabric.rank_zero_first():  # which makes the caches that are missing
                share = (fabric.global_rank, fabric.world_size)
                kind = Inputs if reconstruction is None else JointInputs
                inputs = kind(config, data, trained_flow, cast(Any, autoencoder), alignment, fabric.device, share)
            if fabric.is_global_zero:
                said = describe(config, trained_flow, data, autoencoder, fabric.world_size)
                if flow is not None and resume_from is None:
                    said += f"\n{describe_start(what, flow, data.classes if trained_flow.num_classes else [])}"
                say(said)
            if reconstruction is None:
                job = FlowJob(config, data, inputs)
            else:
                job = JointJob(config, data, cast(JointInputs, inputs), reconstruction)
            state = take_steps(job, fabric, resume_from)
            if c.fit_prior and state.step == c.steps and fabric.is_global_zero:
                job.average.core.fitted_prior = _with_prior(config, data, fabric.device)
            fabric.barrier()
    return RunResult(config.folder, job.average, data, state, interrupted=state.step < c.steps)


def _with_prior(config: RunConfig, data: ImageSet, device: torch.device) -> FittedPrior | None:
    """Fit a prior to the last checkpoint, whole as it is on disk, and store it there."""
    folder = flow_folder(config.folder)
    flow, _ = load_flow(folder, device=device)
    fit = fit_to(flow, data, config.train.fit_prior, config.train.seed)
    say(told(fit))
    if fit.prior is not None:
        fit.prior.save(folder)
    return fit.prior


def describe(
    config: RunConfig, flow: TarFlow, data: ImageSet, autoencoder: Autoencoder | None = None, processes: int = 1
) -> str:
    """What is about to be trained, in a few lines."""
    a, f, c = config.alignment, flow.config, config.train
    depth = f.layers if isinstance(f.layers, int) else "+".join(map(str, f.layers))
    sees = "" if autoencoder is None else f", latents {flow.data_shape} of {autoencoder.config.title}"
    millions = sum(p.numel() for p in flow.parameters()) / 1e6
    where = ", ".join(f"block {t} layer {layer}" for t, layer in a.at)
    how = f"{a.strategy} ({a.gradient})" + f", reverse after step {a.reverse_from}," * (a.reverse_from is not None)
    aligned = f"{how} at {where}, weight {a.weight}, with {a.encoder}"
    aligned += f", every {a.every} steps" * (a.every > 1) + f", until step {a.until}" * (a.until is not None)
    noise = f"gaussian {f.noise_std}" if f.noise == "gaussian" else "uniform"
    pieces = [f"{processes} processes ({c.strategy})"] * (processes > 1) + [f"{c.grad_accum_steps} pieces"] * (
        c.grad_accum_steps > 1
    )
    few = len(shown_classes(flow)) < flow.num_classes
    grids = f"; pictures of {len(shown_classes(flow))} classes, evenly spread" if few else ""
    return (
        f"data      {data.name}: {len(data.train)} images for training, {len(data.held_out)} held out, "
        f"{'x'.join(map(str, (*data.size, data.channels)))}, {len(data.classes)} classes\n"
        f"flow      {f.blocks} blocks x {depth} layers x width {f.width}, {flow.token_shape[0]} tokens, "
        f"{millions:.2f}M parameters, noise {noise}{sees}\n"
        f"alignment {'none' if a.strategy == 'none' else aligned}\n"
        f"{'' if autoencoder is None or autoencoder.frozen else _describe_joint(config, autoencoder)}"
        f"measures  {held_out_effort(config, flow, data)}, every {c.eval_every} steps{grids}"
        + (f"\nbatch     {c.batch_size} images, shared by {' of '.join(pieces)}" if pieces else "")
    )


def _describe_joint(config: RunConfig, autoencoder: Autoencoder) -> str:
    millions, j = sum(p.numel() for p in autoencoder.parameters()) / 1e6, config.joint
    return f"joint     autoencoder of {millions:.2f}M parameters, noise {j.noise_std}, likelihood's weight {j.nll_weight}\n"


def held_out_effort(config: RunConfig, flow: Flow, data: ImageSet) -> Effort:
    """What a run measures at each evaluation. A density costs 2 passes, a single gradient 3."""
    c, classes = config.train, flow.num_classes
    return effort(min(c.eval_images, len(data.held_out)), classes, c.eval_passes, 5 if classes else 2)
