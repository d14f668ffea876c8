"""Drawing any number of images to disk: an image is a function of flow, request and its number, whoever draws it.

So work can be cut into parts, shared by the processes of torchrun, interrupted and resumed; nothing is drawn twice.

    grid.png            one picture
    folder/             000000.png, 000001.png, …
    samples.npz         the ADM evaluation format: arr_0 uint8 [n, H, W, C], and the labels as arr_1
"""

import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from flowback.core.console import Bar
from flowback.core.devices import autocast
from flowback.core.distributed import PeerLost
from flowback.core.errors import InputError
from flowback.core.files import names_folder, write_whole
from flowback.core.seeds import keyed_normal
from flowback.core.units import to_uint8
from flowback.data.pictures import save_grid, save_png
from flowback.data.splits import spread
from flowback.flow.autotune import solvers
from flowback.flow.decoding import Solved
from flowback.flow.guidance import Guidance, checked
from flowback.flow.io import fingerprint
from flowback.flow.labels import Labels
from flowback.flow.patches import unpatchify
from flowback.flow.student import SAMPLERS, SOLVERS
from flowback.flow.tarflow import TarFlow
from flowback.latents import Flow
from flowback.tasks.classify import rule_named
from flowback.tasks.editing import slerp
from flowback.tasks.refinement import Best, best_of

DENOISERS = ("score", "learned")
MOST_ROWS = 20  # of a picture, a class each
PART = 64  # images in a part; part of what is on disk, so it is no option
TIMEOUT = timedelta(days=7)  # of a process that waits for the others
LEAST_AND_MOST = {"num": (1, math.inf), "seed": (0, 2**63 - 1), "best_of": (1, 10_000), "least": (1, math.inf)}
CHOICES = {"precision": ("32-true", "bf16-mixed"), "sampler": SAMPLERS, "solver": SOLVERS, "denoiser": DENOISERS}


@dataclass(frozen=True)
class Request:
    """What is to be drawn. The images are a function of it.

    Args:
        num: number of images.
        labels: their classes, which are cycled; -1 for none.
        guidance: guidance scale; 0 for none; null for the flow's own default, where there are labels (`flowback sweep`).
        schedule: scale along the tokens: constant, or annealed (rising from 0 at the first token).
        guided: which parameters are guided: both, a or mu.
        guidance_rule: how: linear (extrapolated), or product (of normal distributions; stable at large scales); null for
            the flow's own default.
        guidance_blocks: numbers of the blocks that are guided, which alone take the time of it; 0 for all.
        guidance_tokens: range of each block's tokens that are guided, in shares from 0 to 1.
        temperature: standard deviation of z, as a multiple of the prior's; null for the flow's own default.
        prior: of z: standard, N(0, I), or fitted (see `flowback fit-prior`); null for the flow's own default.
        sampler: exact (decode), or student, which draws in a few passes (see `flowback distill`).
        steps: of a student of flow matching; null for 4. An inverse takes 1.
        solver: of a student: euler, or heun, which takes two passes a step, and one in the last.
        denoise: remove the noise of training by one score step; null for yes, but of latents whose decoder has seen it. A
            student's images have none.
        denoiser: what removes it: score, or learned, a network that needs no backward pass (see `flowback distill`).
        seed: seed of the images; each is a function of it and of its own number.
        precision: 32-true or bf16-mixed.
        best_of: candidates for each image, of which the one is kept that the flow assigns to its label most surely.
        least: candidates that are drawn in any case; further ones only until the best is assigned to its label.
        rule: of classification, by which candidates are ranked: single_gradient, z_score, shortlist_3 or exact.

    Raises:
        InputError: if one of them is not as above.
    """

    num: int = 64
    labels: tuple[int, ...] = (-1,)
    guidance: float | None = None
    schedule: str = "constant"
    guided: str = "both"
    guidance_rule: str | None = None
    guidance_blocks: tuple[int, ...] = (0,)
    guidance_tokens: tuple[float, ...] = (0.0, 1.0)
    temperature: float | None = None
    prior: str | None = None
    sampler: str = "exact"
    steps: int | None = None
    solver: str = "euler"
    denoise: bool | None = None
    denoiser: str = "score"
    seed: int = 0
    precision: str = "32-true"
    best_of: int = 1
    least: int = 2
    rule: str = "single_gradient"

    def __post_init__(self) -> None:
        for name, (least, most) in LEAST_AND_MOST.items():
            value = getattr(self, name)
            if not least <= value <= most:
                bound = f"at least {least}" if value < least else f"at most {most}"
                raise InputError(f"{name} must be {bound}, got {value}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise InputError(f"temperature must be above 0 and finite, got {self.temperature}")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        if self.sampler == "exact" and (self.steps is not None or self.solver != "euler"):
            raise InputError("steps and solver are of a student; use sampler student with them")
        if not self.labels:
            raise InputError("labels must name at least one class, or -1 for none; got none")
        if (self.guidance or self.best_of > 1) and min(self.labels) < 0:
            raise InputError("guidance and best_of need a label for every image, got label -1")
        if len(self.guidance_tokens) != 2:
            raise InputError(f"guidance_tokens must be two shares like 0,0.5, got {list(self.guidance_tokens)}")
        rule_named(self.rule, 1)
        self.as_guidance()

    def as_guidance(self) -> Guidance:
        """The guidance, as `TarFlow.decode` takes it."""
        blocks = () if self.guidance_blocks == (0,) else self.guidance_blocks
        first, last = self.guidance_tokens
        rule = self.guidance_rule or "linear"
        return Guidance(self.guidance or 0.0, self.schedule, self.guided, rule, blocks, (first, last))

    def settled(self, flow: Flow) -> Self:
        """The same, with the flow's own defaults for what is null."""
        names = ("guidance", "guidance_rule", "temperature", "prior")
        given = {name: getattr(self, name) for name in names}
        return replace(self, **flow.core.defaults.of(self.sampler).complete(min(self.labels) >= 0, **given))

    def of_z(self) -> tuple[float, str | None, str]:
        """Temperature, prior and sampler."""
        return 1.0 if self.temperature is None else self.temperature, self.prior, self.sampler

    def learned(self, flow: Flow) -> list[str]:
        """Which of a flow's students draw it."""
        if self.sampler == "student":
            return ["student"]
        return ["denoiser"] if self.denoiser == "learned" and _denoises(flow, self.denoise) else []

    def numbers(self, part: int) -> range:
        """The numbers of the images of a part."""
        return range(part * PART, min((part + 1) * PART, self.num))


@dataclass(frozen=True)
class Note:
    """What became of one part."""

    part: int
    seconds: float
    residual: float  # largest update that a parallel decoder accepted
    fell_back: int  # blocks that went over to the sequential loop
    not_finite: int  # images with numbers that are not finite, drawn grey where they are


@dataclass(frozen=True)
class Drawn:
    """Some images of a request, with what they were decoded from."""

    x: Tensor  # [B, C, H, W], nearly in [-1, 1]; may hold numbers that are not finite
    z: Tensor  # [B, N, D]
    y: Tensor  # [B], -1 for none
    draws: Tensor  # [B], candidates that were decoded
    report: list[Solved]  # of every decode, block 1 first


def draw_batches(
    flow: Flow, request: Request, numbers: Sequence[int], method: str = "auto", batch_size: int = 64, compile: bool = False
) -> Iterator[Drawn]:
    """Draw the images of these numbers, a batch after the other; on the CPU."""
    core, request = flow.core, request.settled(flow)
    for start in range(0, len(numbers), batch_size):
        with autocast(core.device, request.precision):
            z, y = candidates(core, request, numbers[start : start + batch_size])
            if request.best_of > 1:
                best = _best(core, request, z, y, method, batch_size, compile)
                z, draws, report = best.z, best.draws, best.report
                x = finished(flow, best.denoised if _denoises(flow, request.denoise) else best.x, y, False)
            else:
                z, draws = z[:, 0], torch.ones_like(y)
                x, report = images_of(flow, request, z, y, method, batch_size, compile)
        yield Drawn(x, z.cpu(), y, draws.cpu(), report)


def images_of(
    flow: Flow, request: Request, z: Tensor, y: Labels, method: str = "auto", batch_size: int = 64, compile: bool = False
) -> tuple[Tensor, list[Solved]]:
    """The images `[B, C, H, W]` of z `[B, N, D]`, on the CPU, as a request wants them, and how blocks were decoded."""
    core, guidance = flow.core, request.as_guidance()
    if request.sampler == "student":
        return finished(flow, core.draft(z, y, guidance, request.steps, request.solver, compile), y, False), []
    x, report = core.decode_with_report(z, y, guidance, method, compile=compile)
    return finished(flow, x, y, request.denoise, batch_size, request.denoiser == "learned"), report


def finished(
    flow: Flow, x: Tensor, y: Labels, denoise: bool | None = None, batch_size: int = 64, learned: bool = False
) -> Tensor:
    """What `flow.core.decode` drew, `[B, *core.data_shape]`, as images `[B, C, H, W]`, on the CPU.

    The noise of training is removed first if `denoise` says so, by what the flow's denoiser `learned` if that does; None
    for where `flow.denoises`.
    """
    x = flow.core.denoise(x, y, batch_size, learned) if _denoises(flow, denoise) else x
    return flow.to_images(x.float()).float().cpu()


def _denoises(flow: Flow, denoise: bool | None) -> bool:
    return flow.denoises if denoise is None else denoise


def candidates(flow: TarFlow, request: Request, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The candidates for the images of these numbers, z `[B, best_of, N, D]` on the flow's device, and labels `[B]`."""
    request = request.settled(flow)
    y = torch.tensor([request.labels[i % len(request.labels)] for i in numbers])
    z = flow.enter(torch.stack([noise(flow, request.seed, i, request.best_of) for i in numbers]))
    return flow.draw_z(z, y, *request.of_z()), y


def start(flow: TarFlow, request: Request, index: int, method: str = "auto") -> tuple[Tensor, Tensor]:
    """What image `index` is decoded from: z `[1, N, D]`, on the flow's device, and its label `[1]`."""
    request = request.settled(flow)
    z, y = candidates(flow, request, [index])
    return (_best(flow, request, z, y, method).z if request.best_of > 1 else z[:, 0]), y


def _best(
    flow: TarFlow, request: Request, z: Tensor, y: Tensor, method: str, batch_size: int = 64, compile: bool = False
) -> Best:
    """Of several candidates the best, drawn as the request says."""

    def draw(z: Tensor, y: Tensor, compile: bool) -> tuple[Tensor, Tensor, list[Solved]]:
        guidance = request.as_guidance()
        if request.sampler == "student":
            x = flow.draft(z, y, guidance, request.steps, request.solver, compile)
            return x, x, []
        x, report = flow.decode_with_report(z, y, guidance, method, compile=compile)
        return x, flow.denoise(x, y, batch_size, request.denoiser == "learned"), report

    options = {"rule": request.rule, "least": request.least, "batch_size": batch_size, "compile": compile}
    return best_of(flow, z, y, draw=draw, **options)


def trajectory(flow: Flow, request: Request, index: int, method: str = "auto") -> Tensor:
    """Image `index` of a request as it comes to be: z, then what each block makes of it; `[blocks + 1, C, H, W]`.

    All but the last are scaled where their numbers are larger than an image's. The noise of training is not removed.

    Raises:
        InputError: if a student draws the request, which has no blocks.
    """
    if request.sampler != "exact":
        raise InputError(f"sampler must be exact to show images block by block, got {request.sampler}")
    core, patch, request = flow.core, flow.core.config.patch_size, request.settled(flow)
    with autocast(core.device, request.precision):
        z, y = start(core, request, index, method)
        steps = [z, *(tokens for tokens, _ in core.decode_by_block(z, y, request.as_guidance(), method))]
    x = torch.cat([unpatchify(tokens, patch, core.image_size) for tokens in steps])
    largest = x[:-1].abs().flatten(1).quantile(0.98, dim=1).clamp(min=1)
    x[:-1] /= largest[:, None, None, None]
    return flow.to_images(x).cpu()


def alike(flow: Flow, request: Request, index: int, strength: float, seed: int, num: int, method: str = "auto") -> Tensor:
    """Images `[num, C, H, W]` whose noise lies at share `strength` of the way from that of image `index` to fresh noise.

    They keep its class, guidance, temperature and prior. The way is a great circle, so all noise on it is typical.
    """
    core, request = flow.core, request.settled(flow)
    with autocast(core.device, request.precision):
        z, y = start(core, request, index, method)
        own = core.to_noise(z, y, *request.of_z())
        fresh = core.enter(torch.stack([keyed_normal(core.token_shape, seed, i, 0) for i in range(num)]))
        y = y.expand(num)
        z = core.draw_z(slerp(own.expand_as(fresh), fresh, strength), y, *request.of_z())
        return images_of(flow, request, z, y, method)[0]


def draw(
    flow: Flow, request: Request, part: int, method: str, batch_size: int, compile: bool = False
) -> tuple[Tensor, Note]:
    """Draw one part: images, uint8 `[n, C, H, W]`, and a note on them."""
    started, images, solved = time.perf_counter(), [], []
    for drawn in draw_batches(flow, request, request.numbers(part), method, batch_size, compile):
        images.append(drawn.x)
        solved += drawn.report
    x = torch.cat(images)
    residual, fell_back = max((s.residual for s in solved), default=0.0), sum(s.fell_back for s in solved)
    not_finite = int((~x.isfinite()).flatten(1).any(dim=1).sum())
    return as_pixels(x), Note(part, time.perf_counter() - started, residual, fell_back, not_finite)


def as_pixels(x: Tensor) -> Tensor:
    """Images `[n, C, H, W]` as uint8; grey where their numbers are not finite."""
    return to_uint8(torch.where(x.isfinite(), x, 0))


def noise(flow: TarFlow, seed: int, number: int, candidates: int = 1) -> Tensor:
    """Standard normal noise of image `number`, `[candidates, N, D]`, on the CPU, so that every device gets the same."""
    return torch.stack([keyed_normal(flow.token_shape, seed, number, candidate) for candidate in range(candidates)])


class Store:
    """Where parts wait on disk until all are there.

    A grid and an .npz are put together from a folder `<output>.parts`, which goes when the output is whole; a folder of
    PNGs is its own store, with `.flowback` in it. Either holds the request, so that only the same one goes on with it.
    """

    def __init__(self, output: Path, request: Request, flow: Flow) -> None:
        self.output, self.request, self.flow = output, request.settled(flow), flow
        self.is_folder = names_folder(output)
        self.folder = output / ".flowback" if self.is_folder else output.with_name(output.name + ".parts")
        self.parts = range(-(-request.num // PART))

    def open(self) -> None:
        """Make the store, or find one that was begun by the same request.

        Raises:
            InputError: if there is an output that does not belong to this request.
        """
        known = {**asdict(self.request), "model": fingerprint(self.flow.state_dict())}
        if self.request.prior == "fitted" and self.flow.core.fitted_prior is not None:
            known["fitted_prior"] = fingerprint(dict(self.flow.core.fitted_prior.named_buffers()))
        for name in self.request.learned(self.flow):
            known[name] = fingerprint(self.flow.core.taught(name).state_dict())
        text = json.dumps(known, indent=1) + "\n"
        file = self.folder / "request.json"
        begun = file.read_text() if file.exists() else None
        if begun == text:
            return
        if begun is not None or any(self.folder.glob("part_*")):  # without either it ended before it began
            said = "was begun by another request or with other weights; choose another output, or delete it"
            raise InputError(f"{self.folder} {said}")
        if not self.is_folder and self.output.is_dir():
            raise InputError(f"output must be a file, but {self.output} is a folder")
        if self.is_folder and self.output.is_dir() and set(self.output.iterdir()) - {self.folder}:
            raise InputError(f"output must be a new or empty folder, but {self.output} holds other files")
        there = next(place for place in self.folder.absolute().parents if place.exists())
        free, needed = shutil.disk_usage(there).free, self.request.num * math.prod(self.flow.data_shape)
        if needed > free:
            raise InputError(f"{self.request.num} images may take {needed} bytes, but {there} has room for {free}")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda path: path.write_text(text))

    def missing(self) -> list[int]:
        """Parts that are not on disk."""
        return [part for part in self.parts if not self._note(part).exists()]

    def drawn(self) -> int:
        """The number of images on disk."""
        return self.request.num - sum(len(self.request.numbers(part)) for part in self.missing())

    def write(self, images: Tensor, note: Note) -> None:
        """Put a part on disk; its note is written last and says that it is whole."""
        if self.is_folder:
            for number, image in zip(self.request.numbers(note.part), images, strict=True):
                save_png(image, self.output / f"{number:06d}.png")
        else:
            pixels = images.permute(0, 2, 3, 1).numpy()
            write_whole(self.folder / f"part_{note.part:06d}.npy", lambda path: np.save(path, pixels))
        write_whole(self._note(note.part), lambda path: path.write_text(json.dumps(asdict(note)) + "\n"))

    def notes(self) -> list[Note]:
        """The notes of all parts, once no part is missing."""
        return [Note(**json.loads(self._note(part).read_text())) for part in self.parts]

    def finish(self) -> None:
        """Put the output together once no part is missing."""
        if self.is_folder:
            return
        if self.output.suffix.lower() == ".npz":
            write_whole(self.output, self._write_npz)
        else:
            images = torch.from_numpy(np.concatenate([self._load(part) for part in self.parts]))
            columns = max(1, round(self.request.num**0.5))
            write_whole(self.output, lambda path: save_grid(images.permute(0, 3, 1, 2), path, columns))
        old = self.folder.with_name(f".{self.folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        self.folder.rename(old)  # at once: half a store would mislead
        shutil.rmtree(old)

    def _note(self, part: int) -> Path:
        return self.folder / f"part_{part:06d}.json"

    def _load(self, part: int) -> np.ndarray:
        return np.load(self.folder / f"part_{part:06d}.npy")

    def _write_npz(self, path: Path) -> None:
        """Part by part: 50,000 images need not fit into memory."""
        shape = (self.request.num, *self._load(0).shape[1:])
        labels = np.resize(np.array(self.request.labels, dtype=np.int64), self.request.num)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for part in self.parts:
                    stream.write(self._load(part).tobytes())
            with archive.open("arr_1.npy", "w") as stream:
                np.lib.format.write_array(stream, labels)


def sampler_of(flow: Flow, request: Request) -> str:
    """What draws a request, in a few words.

    Raises:
        InputError: if the flow has no student that can.
    """
    if request.sampler == "exact":
        return "exact"
    student = flow.core.taught()
    student.check(request.as_guidance(), request.steps, request.solver)
    if student.lesson.method == "inverse":
        return "student, inverse in 1 pass"
    return f"student, {student.steps(request.steps)} steps by {request.solver}"


def checked_store(flow: Flow, request: Request, output: Path, method: str = "auto", batch_size: int = 64) -> Store:
    """The store of `sample_to_disk`, not opened yet, after a check of its arguments.

    Raises:
        InputError: if the request or the method does not fit the flow, or an argument is not usable.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    store = Store(output, request, flow)
    if not store.is_folder and output.suffix.lower() not in (".png", ".npz"):
        raise InputError(f"output must be a .png file (a grid), an .npz file or a folder, got {output}")
    known = tuple(dict.fromkeys(request.labels))
    flow.class_weights(known, len(known))
    core = flow.core
    solvers(method, None, core.config.blocks, 1, core.device)
    for name in store.request.learned(flow):
        core.taught(name)
    sampler_of(flow, store.request)
    core.draw_z(core.enter(torch.zeros(1, *core.token_shape)), None, *store.request.of_z())
    checked(store.request.as_guidance(), known, core.num_classes, core.config.blocks)
    return store


def sample_to_disk(
    flow: Flow, request: Request, output: Path, method: str = "auto", batch_size: int = 64, compile: bool = False
) -> list[Note]:
    """Draw what is missing and put the output together.

    Several processes share the parts if torchrun starts them, `torchrun --nproc-per-node 2 script.py`: each calls this with
    the same arguments, and a flow on its own device. The first one puts the output together.

    Args:
        flow: what to draw from.
        request: what to draw.
        output: a .png file for a grid, an .npz file, or a folder.
        method: how to decode; it changes the images by less than 1e-4.
        batch_size: images decoded at once; bounds the memory.
        compile: compile the passes of decoding; pays for many images.

    Returns:
        A note on each part; from processes other than the first, on those that they drew.

    Raises:
        InputError: if the output is not usable, or the request does not fit the flow.
        PeerLost: if another process is gone.
    """
    store, own = checked_store(flow, request, output, method, batch_size), []
    with _processes() as (rank, world):
        if rank == 0:
            store.open()
        _meet(world)
        with Bar(str(output), request.num, done := store.drawn(), shown=rank == 0) as bar:
            for part in store.missing():
                if part % world == rank:
                    images, note = draw(flow, store.request, part, method, batch_size, compile)
                    store.write(images, note)
                    own.append(note)
                    bar.update(done := store.drawn())
            _meet(world)
            if done < request.num:
                bar.update(request.num)
        if rank:
            return own
        notes = store.notes()
        store.finish()
        return notes


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """This process's rank and the number of processes, by torchrun's environment, who can meet meanwhile."""
    if "RANK" not in os.environ:
        yield 0, 1
        return
    begins = not torch.distributed.is_initialized()
    if begins:
        torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield torch.distributed.get_rank(), torch.distributed.get_world_size()
    finally:
        if begins:
            torch.distributed.destroy_process_group()


def _meet(world: int) -> None:
    """Wait for all processes."""
    if world > 1:
        try:
            torch.distributed.barrier()
        except RuntimeError as error:
            raise PeerLost("another process that draws is gone; what it drew is kept, start again to resume") from error


def shown_classes(flow: Flow) -> list[int]:
    """The classes that a picture has room for: all, or an even spread of `MOST_ROWS`; none of an unconditional flow."""
    return spread(flow.num_classes, MOST_ROWS) if flow.num_classes else []


def in_turn(classes: int, num: int) -> tuple[int, ...]:
    """Labels that `num` images take in turn: all classes, or an even spread of as many as there are images; -1 for none."""
    return tuple(spread(classes, max(1, num))) if classes else (-1,)


def class_grid(flow: Flow, per_class: int, guidance: float | Guidance = 0.0, seed: int = 0, **options: Any) -> Tensor:
    """Samples `[rows * per_class, C, H, W]`, on the CPU: a row for each of `shown_classes`, or `per_class` without any.

    `options` are others of `TarFlow.sample`.
    """
    y = torch.tensor(shown_classes(flow) or [-1] * per_class).repeat_interleave(per_class)
    options |= {"generator": torch.Generator().manual_seed(seed), "batch_size": 128}
    return flow.sample(y=y, guidance=guidance, **options).cpu()
