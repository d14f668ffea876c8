"""The training loop, from top to bottom."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowback.core.console import Bar, console, say
from flowback.core.devices import autocast
from flowback.core.distributed import ENDING, any_says, is_first, shard_like, unshard, unsharded
from flowback.core.errors import InputError
from flowback.data.pictures import save_grid
from flowback.runs import checkpoint
from flowback.runs.checkpoint import State
from flowback.runs.log import MetricsLog
from flowback.training.inputs import Batch
from flowback.training.job import Job
from flowback.training.optim import GuardedStep, learning_rate

MAX_SKIPPED_IN_A_ROW = 10


class Tally:
    """What the steps since the last row of the log add up to, kept on the device until it is asked for.

    Args:
        state: with the steps skipped so far.
        device: where the training runs.
    """

    def __init__(self, state: State, device: torch.device) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}  # the steps that had such a value
        self.skipped = torch.full((), state.skipped, dtype=torch.float32, device=device)
        self.in_a_row = torch.full((), state.skipped_in_a_row, dtype=torch.float32, device=device)

    def add(self, values: dict[str, Tensor], skipped: Tensor) -> None:
        """Add a step's values, or, where `skipped` is 1 and not 0, count it as skipped."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(skipped > 0, 0, value)
            self.counts[name] = self.counts.get(name, 0) + (1 - skipped)
        self.skipped, self.in_a_row = self.skipped + skipped, (self.in_a_row + 1) * skipped

    def read(self, state: State) -> None:
        """Write into the state how many steps were skipped."""
        state.skipped, state.skipped_in_a_row = (int(n) for n in torch.stack([self.skipped, self.in_a_row]).tolist())

    def means(self, fabric: Any) -> dict[str, float]:
        """The means over the steps added since the last call, and over all processes; empty if all were skipped.

        Of what only some steps have, such as the alignment's loss, the mean over these.
        """
        names, added = list(self.sums), [*self.sums.values(), *self.counts.values()]
        self.sums, self.counts = {}, {}
        means = fabric.all_reduce(torch.stack(added), reduce_op="mean").tolist()
        sums, counts = means[: len(names)], means[len(names) :]
        return {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}


def take_steps(job: Job, fabric: Any, resume_from: Path | None) -> State:
    """Train from the first step, or from a checkpoint, to the last.

    Raises:
        InputError: if the loss stays not finite, or a checkpoint cannot be read or written.
    """
    c, run, average, writes = job.config.train, job.config.folder, job.average, fabric.is_global_zero
    job.apply()
    model = fabric.setup_module(job.objective)
    for name, module in job.averages.items():
        shard_like(module, job.trained[name])
    parameters = [p for module in job.trained.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay, fused=True)
    optimizer = fabric.setup_optimizers(optimizer)
    state = State()
    if resume_from is not None:
        state = checkpoint.load(resume_from, average, job.trained, optimizer.optimizer)
        job.settle()
        if writes:
            say(f"resumed from step {state.step}")
    step, tally = GuardedStep(optimizer.optimizer, c.grad_clip), Tally(state, fabric.device)
    stop = min(c.steps, c.until or c.steps)
    last_log, last_seconds, waited = state.step, state.seconds, 0.0

    with (
        _interruptible() as interrupted,
        Bar(str(run), c.steps, state.step, shown=writes) as bar,
        MetricsLog(run, state.step, job.columns) if writes else nullcontext() as log,
    ):
        ready = time.perf_counter()
        for raw in job.inputs.stream(state.step, stop):
            job.begin_step(state.step)
            batch = job.inputs.prepare(raw, state.step)
            waited += time.perf_counter() - ready
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, c.lr, c.warmup, c.steps)
            values = _add_gradients(model, batch.split(c.grad_accum_steps), c.precision, fabric)
            norm, skipped = step()
            state.step += 1
            job.update_averages(state.step)
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
                row |= job.row(row) | {"lr": optimizer.param_groups[0]["lr"]}
                seconds = max(state.seconds - last_seconds, 1e-9)
                row["images_per_second"] = (state.step - last_log) * c.batch_size / seconds
                row["data_wait"] = waited / seconds
                if log is not None:
                    log.write(state.step, seconds=state.seconds, skipped=state.skipped, **row)
                job.check(state.step, row)
                bar.update(state.step, f"{job.status(row)}  {row['images_per_second']:.0f} images/s")
                last_log, last_seconds, waited = state.step, state.seconds, 0.0
            if evaluates or samples or saves:
                job.settle()
            if evaluates or samples:
                with unsharded(average), autocast(fabric.device, c.precision):
                    if evaluates:
                        measured = job.measure(fabric)
                        nats = measured.get("held_out_nats_per_dim", math.nan)
                        state.held_out_nats_per_dim = nats if math.isfinite(nats) else None
                        state.measured_at = state.step
                        if log is not None:
                            log.write(state.step, seconds=state.seconds, **measured)
                    if samples and log is not None:
                        grid = job.picture()
                        with log.or_without():
                            save_grid(grid, run / "samples" / f"step_{state.step:08d}.png", columns=8)
            if saves:
                checkpoint.save(run, state, average, job.trained, optimizer.optimizer, c.keep, fabric)
            if ending:
                break
            ready = time.perf_counter()
    unshard(average)
    fabric.barrier()
    return state


def _add_gradients(model: nn.Module, pieces: list[Batch], precision: str, fabric: Any) -> dict[str, Tensor]:
    """Add up the gradients of a batch, piece by piece; returns the loss and its parts, averaged over the pieces."""
    values: dict[str, Any] = {}
    for i, piece in enumerate(pieces, start=1):
        with fabric.no_backward_sync(model, enabled=i < len(pieces)):
            with autocast(fabric.device, precision):
                loss, parts = model(piece.x, **piece.all_but_x())
            fabric.backward(loss / len(pieces))
        for name, value in {"loss": loss.detach(), **parts}.items():
            if isinstance(value, Tensor):
                values[name] = values.get(name, 0) + value / len(pieces)
    return values


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
