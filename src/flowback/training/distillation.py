"""Training a student of a flow: what its run is made of, measures and says."""

from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowback.alignment.projectors import Projector
from flowback.core.console import say
from flowback.core.devices import deterministic, keep_freed_memory, pick_device, put
from flowback.core.distributed import in_all, is_first
from flowback.core.errors import InputError
from flowback.core.files import check_place
from flowback.core.seeds import Generators, draw, keyed_generator
from flowback.data import DataConfig, ImageSet, load_data
from flowback.data.batches import Raw
from flowback.data.splits import evaluated, spread
from flowback.encoders import Encoder, load_encoder
from flowback.flow.io import fingerprint, load_student
from flowback.flow.student import Lesson, Student
from flowback.flow.tarflow import TarFlow
from flowback.latents import Flow, LatentFlow
from flowback.measure.density import seen
from flowback.runs.checkpoint import State, flow_folder, load_flow
from flowback.runs.config import AlignmentConfig, DistillRunConfig, LatentConfig, RunConfig
from flowback.runs.folder import check_fit, open_run, run_data, run_of, training_data
from flowback.samplers import LESSONS, Inverse, Objective, features_of, measure
from flowback.tasks.sampling import class_grid
from flowback.training.caches import open_cache, target_plan
from flowback.training.inputs import Batch, Inputs
from flowback.training.job import Job, offer
from flowback.training.loop import take_steps
from flowback.training.parallel import check_batch, launch, peers

SETTLING = 128  # training images from which the deviations of z and of states are taken
BATCH = 64  # images at once, where none is trained
COLUMNS = ["step", "seconds", "lr", "loss", "grad_norm", "images_per_second", "data_wait", "skipped"]


@dataclass
class DistillResult:
    """How a run ended."""

    run: Path
    flow: Flow  # with the student, of averaged weights
    data: ImageSet
    state: State
    interrupted: bool


class DistillInputs(Inputs):
    """The batches of a run that trains a student: clean images, as noised or as many normal numbers as its method takes.

    Args:
        config: as of a run that trains the flow on the same data.
        data: its images.
        flow: the teacher.
        lesson: what the student learns.
        encoder: whose features of the images the student learns from, if any; what the alignment of `config` says of it.
        device: where batches go, and where caches are computed.
        share: (i, k): this process is the i-th, from 0, of k that share every batch.
    """

    def __init__(
        self,
        config: RunConfig,
        data: ImageSet,
        flow: Flow,
        lesson: Lesson,
        encoder: Encoder | None,
        device: torch.device,
        share: tuple[int, int],
    ) -> None:
        autoencoder = flow.autoencoder if isinstance(flow, LatentFlow) else None
        super().__init__(config, data, flow.core, autoencoder, None, device, share)
        self.lesson = lesson
        if encoder is not None:
            self.targets = partial(features_of, encoder, flow.core)
            if config.alignment.cache:
                shape = (flow.core.token_shape[0], encoder.dim)
                self.features = open_cache(target_plan(config, data, flow.core, self.targets, shape, device), config, data)

    def prepare(self, raw: Raw, step: int) -> Batch:
        """Everything random in step `step`, from 0: mirrored images, noise, levels, dropped labels."""
        drawn = self.draw(raw, step)
        batch = self.batch(*self.clean(raw, drawn), drawn.generators)
        return replace(batch, targets=self._targets(raw.indices, drawn.flipped, drawn.x))

    def batch(self, x: Tensor, y: Tensor | None, generators: Generators) -> Batch:
        """The batch of clean images as the flow sees them, `[B, *data_shape]`, and labels `[B]`."""
        flow, lesson = self.flow, self.lesson
        x = flow.enter(x)
        independent = lesson.noise == "independent"
        noised = None if independent else flow.perturb(x, generators)
        noise = draw(torch.randn, x.new_empty(len(x), *flow.token_shape), generators) if independent else None
        levels = None if lesson.method == "denoiser" else draw(torch.rand, x.new_empty(len(x), 1), generators)[:, 0]
        return Batch(x, y, noise=noise, levels=levels, noised=noised)


class DistillJob(Job):
    """A student.

    Args:
        config: of the run.
        data: its images.
        inputs: the batches.
        objective: with the student that is trained.
        flow: the teacher, which gets the averaged student.
    """

    config: DistillRunConfig
    average: Student
    inputs: DistillInputs

    def __init__(
        self, config: DistillRunConfig, data: ImageSet, inputs: DistillInputs, objective: Objective, flow: Flow
    ) -> None:
        self.columns = [*COLUMNS, *objective.parts, *(f"held_out_{name}" for name in objective.parts)]
        trained: dict[str, nn.Module] = {"student": objective.student}
        if isinstance(objective, Inverse) and objective.projector is not None:
            trained["projector"] = objective.projector
        average = deepcopy(objective.student).requires_grad_(False).eval()
        super().__init__(config, data, inputs, objective, trained, {"student": average}, average)
        self.flow, self.name = flow, folder_name(config)
        self.held_out = LESSONS[config.method](flow.core, average)
        flow.core.learned[self.name] = average

    def status(self, row: dict[str, float]) -> str:
        """The loss and its parts."""
        names = ("loss", *(name for name in self.columns if name in row and name not in COLUMNS))
        return "  ".join(f"{name} {row[name]:.4f}" for name in names)

    def measure(self, fabric: Any) -> dict[str, float]:
        """The parts of the loss on held-out images, each process of its share."""
        flow, data = self.flow, self.data
        indices = evaluated(len(data.held_out), self.config.train.eval_images)[fabric.global_rank :: fabric.world_size]

        @torch.no_grad()
        def measured() -> list[tuple[int, dict[str, float]]]:
            found = []
            for start in range(0, len(indices), BATCH):
                part = indices[start : start + BATCH]
                x, y = seen(flow, data.held_out, part, data.levels)
                y = put(y, flow.device) if flow.num_classes else None
                batch = self.inputs.batch(x, y, [keyed_generator(1, int(index)) for index in part])
                _, parts = self.held_out(batch.x, **batch.all_but_x())
                found.append((len(part), {name: float(value) for name, value in parts.items()}))
            return found

        rows = [row for share in in_all(fabric, measured) for row in share]
        count = sum(n for n, _ in rows)
        return {f"held_out_{name}": sum(n * parts[name] for n, parts in rows) / count for name in rows[0][1]}

    def picture(self) -> Tensor:
        """Samples, a row for each class."""
        options: dict[str, Any] = {"denoise": "learned"} if self.name == "denoiser" else {"sampler": "student"}
        return class_grid(self.flow, per_class=8, seed=self.config.train.seed, **options)


def folder_name(config: DistillRunConfig) -> str:
    """Of what is distilled, beside its flow."""
    return "denoiser" if config.method == "denoiser" else "student"


def settle(config: DistillRunConfig, flow: Flow, given: ImageSet | None) -> tuple[DistillRunConfig, ImageSet]:
    """The configuration with what it leaves to the teacher's run, and the data.

    Raises:
        InputError: if the data does not fit the teacher.
    """
    assert config.teacher is not None
    run, changed = run_of(config.teacher), {}
    for field in fields(DataConfig):
        if (value := getattr(config.data, field.name)) != field.default:
            changed[field.name] = value
    if given is None and run is not None:
        known = RunConfig.read(run / "config.yaml")
        config = replace(config, data=replace(known.data, **changed))
        config = replace(config, train=replace(config.train, hflip=config.train.hflip or known.train.hflip))
        given = replace(run_data(run, config.data), notes=()) if config.data.name == known.data.name else None
    elif given is None:
        sizes: dict[str, Any] = {"image_size": flow.image_size, "channels": flow.channels}
        config = replace(config, data=replace(config.data, **(sizes | changed)))
    data = load_data(config.data) if given is None else given
    check_fit(flow, data)
    return config, training_data(config, data)


def make_objective(config: DistillRunConfig, flow: Flow, student: Student, encoder: Encoder | None) -> Objective:
    """The loss that a configuration describes."""
    if config.method != "inverse":
        return LESSONS[config.method](flow.core, student)
    projector = Projector(config.student.width, encoder.dim) if encoder is not None and config.align else None
    weights = config.guidance, encoder, config.features, config.align
    return Inverse(flow.core, student, *weights, projector, flow.to_images, config.encoder_precision)


def distill(config: DistillRunConfig, data: ImageSet | None = None) -> DistillResult:
    """Train a student as `config` says, and put it beside its flow.

    Args:
        config: of the run.
        data: images to use in place of those of the teacher's run.

    Raises:
        InputError: if the configuration, the teacher, the data or the run's folder is not usable, or the loss stays not
            finite.
        PeerLost: if another process of the run is gone.
    """
    c = config.train
    check_batch(c)
    pick_device(c.accelerator)
    if config.teacher is None:
        raise InputError("a student needs a flow; name a run's folder, a checkpoint or a flow's folder")
    place = flow_folder(config.teacher) / folder_name(config)
    check_place(place)
    flow, weights = load_flow(config.teacher)
    if config.method == "denoiser" and not flow.core.denoises:
        raise InputError("a denoiser needs a flow of gaussian noise; this one leaves none in samples")
    config, data = settle(config, flow, data)
    c, core = config.train, flow.core
    torch.manual_seed(c.seed)
    student = Student(config.student, _lesson(config, core)).to(core.data_dtype)
    encoder = None
    if config.features or config.align:
        encoder = load_encoder(config.encoder, config.encoder_weights, grid=flow.grid)
    objective = make_objective(config, flow, student, encoder)
    with deterministic(c.deterministic), open_run(config, data, first=is_first()) as found:
        fabric = launch(c)
        keep_freed_memory(fabric.device)
        with peers(fabric):
            resume_from = fabric.broadcast(found)
            if resume_from is not None and load_student(resume_from).lesson != student.lesson:
                raise InputError(f"{config.folder} was begun with another teacher; use another --run")
            flow.to(fabric.device)
            objective.to(fabric.device)
            with fabric.rank_zero_first():  # which makes the caches that are missing
                inputs = _inputs(config, data, flow, student.lesson, encoder, fabric)
            if resume_from is None:
                x, y = seen(flow, data.train, spread(len(data.train), SETTLING), data.levels)
                y = put(y, fabric.device) if flow.num_classes else None
                measure(core, student, core.perturb(x, keyed_generator(0)), y)
            job = DistillJob(config, data, inputs, objective, flow)
            if fabric.is_global_zero:
                say(describe(config, student, data, f"{weights} of {config.teacher}"))
            state = take_steps(job, fabric, resume_from)
            if fabric.is_global_zero and state.step == c.steps:
                offer(job.average, place)
    return DistillResult(config.folder, flow, data, state, interrupted=state.step < c.steps)


def _lesson(config: DistillRunConfig, flow: TarFlow) -> Lesson:
    return Lesson(
        method=config.method,
        noise=config.noise,
        tokens=flow.token_shape[0],
        dim=flow.token_shape[1],
        classes=flow.num_classes,
        states=flow.config.blocks if config.method == "inverse" else 0,
        teacher=fingerprint(flow.state_dict()),
    )


def _inputs(
    config: DistillRunConfig, data: ImageSet, flow: Flow, lesson: Lesson, encoder: Encoder | None, fabric: Any
) -> DistillInputs:
    named = flow.autoencoder.config if isinstance(flow, LatentFlow) and flow.autoencoder.config.name else None
    shared: dict[str, Any] = {name: getattr(config, name) for name in ("encoder", "encoder_weights", "encoder_precision")}
    as_flow = RunConfig(
        run=str(config.folder),
        data=config.data,
        flow=flow.config,
        latents=LatentConfig(cache=config.cache and named is not None),
        alignment=AlignmentConfig(cache=config.cache, **shared),
        train=config.train,
    )
    share = (fabric.global_rank, fabric.world_size)
    return DistillInputs(as_flow, data, flow, lesson, encoder, fabric.device, share)


def describe(config: DistillRunConfig, student: Student, data: ImageSet, teacher: str) -> str:
    """What is about to be trained, in a few lines."""
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    method = f"{config.method} from independent noise" if config.noise == "independent" else config.method
    return (
        f"data      {data.name}: {len(data.train)} images for training, {len(data.held_out)} held out\n"
        f"teacher   {teacher}\n"
        f"student   {method}, {config.student.layers} layers x width {config.student.width}, {millions:.2f}M parameters"
    )
