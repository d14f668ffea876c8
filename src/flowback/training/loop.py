"""The training loop, from top to bottom."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowback.core.console import Bar, console, say
from flowback.core.devices import autocast, deterministic, keep_freed_memory, pick_device
from flowback.core.distributed import ENDING, any_says, in_all, is_first, shard_like, unshard, unsharded
from flowback.core.errors import InputError
from flowback.core.units import LOG_2PI, nll_per_dim
from flowback.data import ImageSet
from flowback.data.pictures import save_grid
from flowback.data.splits import evaluated, spread
from flowback.encoders import Encoder
from flowback.flow.tarflow import TarFlow
from flowback.latents import Autoencoder, Flow, LatentFlow
from flowback.measure.density import densities, seen
from flowback.runs import checkpoint
from flowback.runs.checkpoint import State
from flowback.runs.config import RunConfig
from flowback.runs.folder import open_run, training_data
from flowback.runs.log import MetricsLog
from flowback.tasks.classify import Effort, effort, predict
from flowback.tasks.sampling import class_grid, shown_classes
from flowback.training.apply import checkpoint_layers, compile_blocks
from flowback.training.build import (
    as_image_set,
    build_flow,
    describe_start,
    first_flow,
    make_alignment,
    make_autoencoder,
    settle,
)
from flowback.training.inputs import Batch, Inputs
from flowback.training.optim import GuardedStep, learning_rate, update_ema
from flowback.training.parallel import check_batch, launch, peers

MAX_SKIPPED_IN_A_ROW = 10


@dataclass
class RunResult:
    """How a run ended."""

    run: Path
    flow: Flow  # with averaged weights
    data: ImageSet
    state: State
    interrupted: bool


class Tally:
    """What the steps since the last row of the log add up to, kept on the device until it is asked for.

    Args:
        state: with the steps skipped so far.
        device: where the training runs.
    """

    def __init__(self, state: State, device: torch.device) -> None:
        self.sums: dict[str, Tensor] = {}
        self.skipped = torch.full((), state.skipped, dtype=torch.float32, device=device)
        self.in_a_row = torch.full((), state.skipped_in_a_row, dtype=torch.float32, device=device)

    def add(self, values: dict[str, Tensor], skipped: Tensor) -> None:
        """Add a step's values, or, where `skipped` is 1 and not 0, count it as skipped."""
        values = values | {"count": torch.ones_like(skipped)}
        kept = {name: torch.where(skipped > 0, 0, value) for name, value in values.items()}
        self.sums = {name: self.sums.get(name, 0) + value for name, value in kept.items()}
        self.skipped, self.in_a_row = self.skipped + skipped, (self.in_a_row + 1) * skipped

    def read(self, state: State) -> None:
        """Write into the state how many steps were skipped."""
        state.skipped, state.skipped_in_a_row = (int(n) for n in torch.stack([self.skipped, self.in_a_row]).tolist())

    def means(self, fabric: Any) -> dict[str, float]:
        """The means over the steps added since the last call, and over all processes; empty if all were skipped."""
        sums, self.sums = self.sums, {}
        means = fabric.all_reduce(torch.stack(list(sums.values())), reduce_op="mean")
        found = dict(zip(sums, means.tolist(), strict=True))
        count = found.pop("count")
        return {name: value / count for name, value in found.items()} if count else {}


class Likelihood(nn.Module):
    """The objective without alignment, in the form of `Alignment`."""

    def __init__(self, flow: TarFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(
        self, x_noisy: Tensor, y: Tensor | None, x_clean: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """`L_NF`, and its value as the only part."""
        nll = nll_per_dim(*self.flow.encode(x_noisy, y))
        return nll, {"nll": nll.detach()}


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
    check_batch(c)
    pick_device(c.accelerator)
    data = training_data(config, None if data is None else as_image_set(data))
    torch.manual_seed(c.seed)
    autoencoder = flow.autoencoder if isinstance(flow, LatentFlow) else make_autoencoder(config.latents)
    trained_flow = build_flow(config, data, autoencoder and autoencoder.config, start=flow)
    alignment = None if config.alignment.strategy == "none" else make_alignment(config.alignment, trained_flow, encoder)
    # nothing is written before everything that was asked for exists
    with deterministic(c.deterministic), open_run(config, data, first=is_first()) as found:
        fabric = launch(c)
        keep_freed_memory(fabric.device)
        with peers(fabric):
            resume_from = fabric.broadcast(found)
            with fabric.rank_zero_first():  # which makes the caches that are missing
                share = (fabric.global_rank, fabric.world_size)
                inputs = Inputs(config, data, trained_flow, autoencoder, alignment, fabric.device, share)
            if fabric.is_global_zero:
                said = describe(config, trained_flow, data, autoencoder, fabric.world_size)
                if flow is not None and resume_from is None:
                    said += f"\n{describe_start(what, flow, data.classes if trained_flow.num_classes else [])}"
                say(said)
            core = deepcopy(trained_flow).to(fabric.device).requires_grad_(False).eval()
            average = core if autoencoder is None else LatentFlow(core, autoencoder)
            state = _take_steps(config, inputs, average, fabric, resume_from)
    return RunResult(config.folder, average, data, state, interrupted=state.step < c.steps)


def _take_steps(config: RunConfig, inputs: Inputs, average: Flow, fabric: Any, resume_from: Path | None) -> State:
    """Train from the first step, or from a checkpoint, to the last."""
    c, run, flow, alignment, writes = config.train, config.folder, inputs.flow, inputs.alignment, fabric.is_global_zero
    if c.checkpoint_activations:
        checkpoint_layers(flow)
    if c.compile:
        compile_blocks(flow)
    model = fabric.setup_module(alignment or Likelihood(flow))
    shard_like(average.core, flow)
    trained: dict[str, nn.Module] = {"flow": flow}
    if alignment is not None:
        trained["projector"] = alignment.projector
    parameters = [p for module in trained.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay, fused=True)
    optimizer = fabric.setup_optimizers(optimizer)
    state = State()
    if resume_from is not None:
        state = checkpoint.load(resume_from, average, trained, optimizer.optimizer)
        if writes:
            say(f"resumed from step {state.step}")
    step, tally = GuardedStep(optimizer.optimizer, c.grad_clip), Tally(state, fabric.device)
    stop = min(c.steps, c.until or c.steps)
    last_log, last_seconds, waited = state.step, state.seconds, 0.0
    affordable = held_out_effort(config, average, inputs.data)

    with (
        _interruptible() as interrupted,
        Bar(str(run), c.steps, state.step, shown=writes) as bar,
        MetricsLog(run, state.step) if writes else nullcontext() as log,
    ):
        ready = time.perf_counter()
        for raw in inputs.stream(state.step, stop):
            if alignment is not None and config.alignment.until is not None:
                alignment.active = state.step < config.alignment.until
            batch = inputs.prepare(raw, state.step)
            waited += time.perf_counter() - ready
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, c.lr, c.warmup, c.steps)
            values = _add_gradients(model, batch.split(c.grad_accum_steps), c.precision, fabric)
            norm, skipped = step()
            state.step += 1
            update_ema(average.core.parameters(), flow.parameters(), c.ema, state.step)
            optimizer.zero_grad(set_to_none=True)
            tally.add(values | {"grad_norm": norm}, skipped)
            ending = any_says(fabric, interrupted()) or state.step == stop
            evaluates, samples = (state.step % n == 0 or state.step == c.steps for n in (c.eval_every, c.sample_every))
            logs, saves = state.step % c.log_every == 0, state.step % c.checkpoint_every == 0 or ending
            if logs or evaluates or samples or saves:
                tally.read(state)  # the host waits for the device here, and between two of these not at all
            state.seconds += time.perf_counter() - ready

            if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise InputError(
                    f"the gradient was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {state.step}; "
                    "the last checkpoint is untouched; a smaller train.lr, a longer train.warmup or a "
                    "flow.log_scale_bound may help"
                )
            if logs and (row := tally.means(fabric)):
                row |= {"nats_per_dim": row["nll"] + LOG_2PI / 2, "lr": optimizer.param_groups[0]["lr"]}
                seconds = max(state.seconds - last_seconds, 1e-9)
                row["images_per_second"] = (state.step - last_log) * c.batch_size / seconds
                row["data_wait"] = waited / seconds
                if log is not None:
                    log.write(state.step, seconds=state.seconds, skipped=state.skipped, **row)
                bar.update(state.step, _status(row))
                last_log, last_seconds, waited = state.step, state.seconds, 0.0
            if evaluates or samples:
                with unsharded(average.core), autocast(fabric.device, c.precision):
                    if evaluates:
                        measured = _evaluate(average, inputs.data, affordable, fabric)
                        nats = measured["held_out_nats_per_dim"]
                        state.held_out_nats_per_dim = nats if math.isfinite(nats) else None
                        state.measured_at = state.step
                        if log is not None:
                            log.write(state.step, seconds=state.seconds, **measured)
                    if samples and log is not None:
                        grid = class_grid(average, per_class=8, seed=c.seed)
                        with log.or_without():
                            save_grid(grid, run / "samples" / f"step_{state.step:08d}.png", columns=8)
            if saves:
                checkpoint.save(run, state, average, trained, optimizer.optimizer, c.keep, fabric)
            if ending:
                break
            ready = time.perf_counter()
    unshard(average.core)
    fabric.barrier()
    return state


def _add_gradients(model: nn.Module, pieces: list[Batch], precision: str, fabric: Any) -> dict[str, Tensor]:
    """Add up the gradients of a batch, piece by piece; returns the loss and its parts, averaged over the pieces."""
    values: dict[str, Any] = {}
    for i, piece in enumerate(pieces, start=1):
        with fabric.no_backward_sync(model, enabled=i < len(pieces)):
            with autocast(fabric.device, precision):
                loss, parts = model(piece.x, piece.y, targets=piece.targets)
            fabric.backward(loss / len(pieces))
        found = {"loss": loss.detach(), **parts}
        for name in (name for name in ("loss", "nll", "align") if name in found):
            values[name] = values.get(name, 0) + found[name] / len(pieces)
    return values


def describe(
    config: RunConfig, flow: TarFlow, data: ImageSet, autoencoder: Autoencoder | None = None, processes: int = 1
) -> str:
    """What is about to be trained, in a few lines."""
    a, f, c = config.alignment, flow.config, config.train
    depth = f.layers if isinstance(f.layers, int) else "+".join(map(str, f.layers))
    sees = "" if autoencoder is None else f", latents {flow.data_shape} of {autoencoder.config.name}"
    millions = sum(p.numel() for p in flow.parameters()) / 1e6
    where = ", ".join(f"block {t} layer {layer}" for t, layer in a.at)
    aligned = f"{a.strategy} ({a.gradient}) at {where}, weight {a.weight}, with {a.encoder}"
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
        f"measures  {held_out_effort(config, flow, data)}, every {c.eval_every} steps{grids}"
        + (f"\nbatch     {c.batch_size} images, shared by {' of '.join(pieces)}" if pieces else "")
    )


def held_out_effort(config: RunConfig, flow: Flow, data: ImageSet) -> Effort:
    """What a run measures at each evaluation. A density costs 2 passes, a single gradient 3."""
    c, classes = config.train, flow.num_classes
    return effort(min(c.eval_images, len(data.held_out)), classes, c.eval_passes, 5 if classes else 2)


def _evaluate(flow: Flow, data: ImageSet, affordable: Effort, fabric: Any) -> dict[str, float]:
    """The held-out figures that a run logs; each process measures its share of the images."""
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


def _status(row: dict[str, float]) -> str:
    align = f"  align {row['align']:.3f}" if "align" in row else ""
    return f"loss {row['loss']:.4f}  nats/dim {row['nats_per_dim']:.4f}{align}  {row['images_per_second']:.0f} images/s"


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the signals of `ENDING` into a question that the loop asks after each step; a second Ctrl-C interrupts at once.

    Others that are ignored, such as SIGHUP under nohup, stay ignored.
    """
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if is_first() and not asked:
            console.print("\nending after this step, with a checkpoint …", highlight=False)
        asked = True

    before: dict[int, Any] = {}
    try:
        for number in ENDING:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, ask)
    except ValueError:  # not the main thread: signals are the caller's business
        pass
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
