"""The training loop, from top to bottom."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from flowback.alignment import Alignment, load_encoder
from flowback.data import ImageSet, batches, load_data, step_generator
from flowback.data.features import FeatureCache
from flowback.errors import InputError
from flowback.evaluation.metrics import accuracies, density
from flowback.evaluation.pictures import class_grid, save_grid
from flowback.flows import FlowConfig, TarFlow
from flowback.training import checkpoint
from flowback.training.checkpoint import State
from flowback.training.compile import compile_blocks
from flowback.training.config import AlignmentConfig, RunConfig, TrainConfig, flat
from flowback.training.log import Bar, MetricsLog, console
from flowback.training.optim import learning_rate, update_ema
from flowback.units import LOG_2PI, from_levels, nll_per_dim

MAX_SKIPPED_IN_A_ROW = 10


@dataclass
class RunResult:
    """How a run ended."""

    run: Path
    flow: TarFlow  # with averaged weights
    data: ImageSet
    state: State
    interrupted: bool


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


def build_flow(config: FlowConfig, data: ImageSet) -> TarFlow:
    """The flow for a data set: what the recipe leaves open comes from the data; what it sets must agree.

    Raises:
        InputError: if the recipe's image size, channels or levels are not the data's.
    """
    facts = {"image_size": data.image_size, "channels": data.channels, "levels": data.levels}
    for name, value in facts.items():
        if getattr(config, name) not in (None, value):
            raise InputError(f"flow.{name} is {getattr(config, name)}; allowed for the data set {data.name}: {value}")
    classes = len(data.classes) if config.num_classes is None else config.num_classes
    if classes not in (0, len(data.classes)):
        raise InputError(f"flow.num_classes is {classes}; allowed here: {len(data.classes)}, or 0 for no classes")
    return TarFlow(**vars(replace(config, num_classes=classes, **facts)))


def train(config: RunConfig) -> RunResult:
    """Train a flow as `config` says; the run's folder gets configuration, checkpoints, metrics and sample grids.

    Raises:
        InputError: if the configuration, the data or the run's folder is not usable, or the loss stays not finite.
    """
    from lightning_fabric import Fabric

    c, run = config.train, config.folder
    data = load_data(config.data)
    torch.manual_seed(c.seed)
    flow = build_flow(config.flow, data)

    fabric = Fabric(accelerator=c.accelerator, devices=1)
    fabric.launch()
    features: FeatureCache | None = None
    if config.alignment.strategy == "none":
        objective: nn.Module = Likelihood(flow)
        trained: dict[str, nn.Module] = {"flow": flow}
    else:
        a = config.alignment
        encoder = load_encoder(a.encoder, a.encoder_weights, grid=flow.grid)
        objective = Alignment(flow, encoder, a.at, a.strategy, a.gradient, a.weight, a.projector_width)
        trained = {"flow": flow, "projector": objective.projector}
    resume_from = _open_run(config)  # nothing is written before everything that was asked for exists
    (run / "classes.json").write_text(json.dumps(data.classes) + "\n")
    if isinstance(objective, Alignment) and config.alignment.cache:
        objective.to(fabric.device)
        features = _cache_features(config.alignment, data, objective, c.flip)
    console.print(describe(config, flow, data), highlight=False, soft_wrap=True)

    parameters = [p for module in trained.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay, fused=True)
    average = deepcopy(flow).to(fabric.device).requires_grad_(False).eval()
    if c.compile:
        compile_blocks(flow)
    state = State()
    model, optimizer = fabric.setup(objective, optimizer)
    if resume_from is not None:
        state = checkpoint.load(resume_from, average, trained, optimizer.optimizer)
        console.print(f"resumed from step {state.step}", highlight=False)
    log = MetricsLog(run, state.step)
    stop = min(c.steps, c.until or c.steps)
    stream = batches(data.train, c.batch_size, c.seed, state.step, stop, config.data.workers)
    sums: dict[str, Tensor] = {}
    last_log, last_seconds = state.step, state.seconds

    with _interruptible() as interrupted, Bar(str(run), c.steps, state.step) as bar:
        for indices, images, labels in stream:
            started = time.perf_counter()
            flipped, x_clean, x_noisy, y = draw(flow, images, labels, c, state.step)
            targets = None
            if features is not None:
                targets = features(indices, flipped).to(fabric.device)
            elif isinstance(objective, Alignment):
                with autocast(fabric.device, config.alignment.encoder_precision):
                    targets = objective.targets(x_clean.to(fabric.device))

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, c.lr, c.warmup, c.steps)
            with autocast(fabric.device, c.precision):
                loss, parts = model(x_noisy.to(fabric.device), y, targets=targets)
            fabric.backward(loss)
            norm = nn.utils.clip_grad_norm_(parameters, c.clip or float("inf"))
            state.step += 1
            if torch.isfinite(norm):
                optimizer.step()
                update_ema(average.parameters(), flow.parameters(), c.ema, state.step)
                state.skipped_in_a_row = 0
                values = {"loss": loss.detach(), "grad_norm": norm, "nll": parts["nll"], "count": torch.ones(())}
                values |= {"align": parts["align"]} if "align" in parts else {}
                sums = {name: sums.get(name, 0) + value for name, value in values.items()}
            else:
                state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
            optimizer.zero_grad(set_to_none=True)
            state.seconds += time.perf_counter() - started

            if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise InputError(
                    f"the gradient was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {state.step}; "
                    "the last checkpoint is untouched; a smaller train.lr or a flow.log_scale_bound may help"
                )
            if state.step % c.log_every == 0 and "count" in sums:
                row = {name: float(value / sums["count"]) for name, value in sums.items() if name != "count"}
                row["nats_per_dim"] = row["nll"] + LOG_2PI / 2
                seconds = state.seconds - last_seconds
                row["images_per_second"] = (state.step - last_log) * c.batch_size / max(seconds, 1e-9)
                lr = optimizer.param_groups[0]["lr"]
                log.write(state.step, seconds=state.seconds, lr=lr, skipped=state.skipped, **row)
                bar.update(state.step, _status(row))
                sums, last_log, last_seconds = {}, state.step, state.seconds
            if state.step % c.eval_every == 0 or state.step == c.steps:
                log.write(state.step, seconds=state.seconds, **_evaluate(average, data, c.eval_images))
            if state.step % c.sample_every == 0 or state.step == c.steps:
                grid = class_grid(average, per_class=8, seed=c.seed)
                save_grid(grid, run / "samples" / f"step_{state.step:08d}.png", columns=8)
            ending = interrupted() or state.step == stop
            if state.step % c.checkpoint_every == 0 or ending:
                checkpoint.save(run, state, average, trained, optimizer.optimizer, c.keep)
            if ending:
                break
    log.close()
    return RunResult(run, average, data, state, interrupted=state.step < c.steps)


def draw(
    flow: TarFlow, images: Tensor, labels: Tensor, config: TrainConfig, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Everything random in one step, a function of (seed, step): mirrored images, noise, dropped labels.

    Args:
        flow: says which noise, and whether there are labels.
        images: uint8 `[B, C, H, W]`.
        labels: int64 `[B]`.
        config: says how often images are mirrored and labels dropped, each image by a coin of its own.
        step: the step, from 0.

    Returns:
        Which images are mirrored `[B]`; clean and noised images in [-1, 1]; labels with -1 where dropped, or None.
    """
    generator = step_generator(config.seed, step)
    flipped = torch.rand(len(images), generator=generator) < (0.5 if config.flip else 0.0)
    dropped = torch.rand(len(images), generator=generator) < config.label_drop
    x_clean = from_levels(images, flow.levels)
    x_clean = torch.where(flipped[:, None, None, None], x_clean.flip(-1), x_clean)
    y = torch.where(dropped, -1, labels) if flow.num_classes else None
    return flipped, x_clean, flow.perturb(x_clean, generator), y


def describe(config: RunConfig, flow: TarFlow, data: ImageSet) -> str:
    """What is about to be trained, in a few lines."""
    a, f = config.alignment, flow.config
    millions = sum(p.numel() for p in flow.parameters()) / 1e6
    where = ", ".join(f"block {t} layer {layer}" for t, layer in a.at)
    aligned = f"{a.strategy} ({a.gradient}) at {where}, weight {a.weight}, with {a.encoder}"
    noise = f"gaussian {f.noise_std}" if f.noise == "gaussian" else "uniform"
    return (
        f"data      {data.name}: {len(data.train)} images for training, {len(data.held_out)} held out, "
        f"{data.image_size}x{data.image_size}x{data.channels}, {len(data.classes)} classes\n"
        f"flow      {f.blocks} blocks x {f.layers} layers x width {f.width}, {flow.token_shape[0]} tokens, "
        f"{millions:.2f}M parameters, noise {noise}\n"
        f"alignment {'none' if a.strategy == 'none' else aligned}"
    )


def _open_run(config: RunConfig) -> Path | None:
    """Make the run's folder and write its configuration, or find the checkpoint to resume from."""
    run, file = config.folder, config.folder / "config.yaml"
    found = checkpoint.newest(run)
    if not config.train.resume:
        if found is not None:
            raise InputError(f"{run} holds a run already; allowed: --train.resume to go on, or another --run")
        run.mkdir(parents=True, exist_ok=True)
        file.write_text(config.to_yaml())
        return None
    if found is None:
        raise InputError(f"{run} has no checkpoint to resume from; start it without --train.resume")
    before, now = (flat(yaml.safe_load(text)) for text in (file.read_text(), config.to_yaml()))
    free = {"run", "data.workers", "data.path", "train.resume", "train.until", "train.keep", "train.accelerator"}
    free |= {"train.compile"}
    free |= {f"train.{what}_every" for what in ("log", "eval", "sample", "checkpoint")} | {"train.eval_images"}
    for name in now:
        if name not in free and before.get(name) != now[name]:
            raise InputError(f"{name} was {before.get(name)} when {run} began and is {now[name]}; allowed: the same")
    return found


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision.

    Not Fabric's own bf16-mixed, which would round the noised images to bfloat16 before the flow sees them.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def _cache_features(config: AlignmentConfig, data: ImageSet, objective: Alignment, flips: bool) -> FeatureCache:
    key = f"{config.encoder} {config.encoder_weights} {config.encoder_precision} {objective.flow.grid}"
    shape = (objective.flow.token_shape[0], objective.encoder.dim)
    with Bar("features", len(data.train)) as bar:

        def compute(x: Tensor) -> Tensor:
            with autocast(objective.device, config.encoder_precision):
                return objective.targets(x.to(objective.device))

        return FeatureCache(data.train, data.levels, flips, compute, shape, key, bar.update)


def _evaluate(flow: TarFlow, data: ImageSet, images: int) -> dict[str, float]:
    """The held-out figures that a run logs."""
    indices = torch.randperm(len(data.held_out), generator=torch.Generator().manual_seed(0))[:images].sort().values
    pixels, labels = data.held_out[indices.tolist()]
    x = from_levels(pixels, data.levels).to(next(flow.parameters()).device)
    row = {"held_out_nats_per_dim": density(flow, x, labels)["nats_per_dim"]}
    if flow.num_classes:
        row |= {f"held_out_{rule}": value for rule, value in accuracies(flow, x, labels).items()}
    return row


def _status(row: dict[str, float]) -> str:
    align = f"  align {row['align']:.3f}" if "align" in row else ""
    return f"loss {row['loss']:.4f}  nats/dim {row['nats_per_dim']:.4f}{align}  {row['images_per_second']:.0f} images/s"


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a question that the loop asks after each step; a second one interrupts at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        console.print("\nending after this step, with a checkpoint …", highlight=False)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are the caller's business
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
