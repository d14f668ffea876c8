"""Drawing any number of images to disk: an image is a function of flow, request and its number, whoever draws it.

So work can be cut into parts, done by several processes, interrupted and taken up again; nothing is drawn twice.

    grid.png            one picture
    folder/             000000.png, 000001.png, …
    samples.npz         the ADM evaluation format: arr_0 uint8 [n, H, W, C], and the labels as arr_1
"""

import hashlib
import json
import os
import queue
import shutil
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowback.devices import autocast, pick_device
from flowback.errors import InputError
from flowback.evaluation.pictures import save_grid, save_png, to_uint8
from flowback.files import write_whole
from flowback.flows import Guidance, TarFlow
from flowback.refinement import OBJECTIVES, rank, refine
from flowback.seeds import keyed_normal
from flowback.training.checkpoint import load_flow
from flowback.training.log import Bar

MOST_CANDIDATES = 10_000
PART = 64  # images in a part; part of what is on disk, so it is no option


@dataclass(frozen=True)
class Request:
    """What is to be drawn. The images are a function of it.

    Args:
        run: folder of a run, checkpoint or flow, or a hub id.
        weights: ema or raw.
        num: number of images.
        labels: classes, which take turns; -1 for none.
        guidance: scale.
        schedule: of the guidance.
        guide: which parameters are guided.
        temperature: standard deviation of z.
        denoise: whether the score step removes the training noise.
        seed: of the images.
        precision: 32-true, or bf16-mixed.
        rank: candidates for each image, of which the flow's own favourite is kept; 1 for none.
        refine: gradient steps on z.
        objective: what they raise, a key of `flowback.refinement.OBJECTIVES`.
    """

    run: str
    weights: str = "ema"
    num: int = 64
    labels: tuple[int, ...] = (-1,)
    guidance: float = 0.0
    schedule: str = "linear"
    guide: str = "both"
    temperature: float = 1.0
    denoise: bool = True
    seed: int = 0
    precision: str = "32-true"
    rank: int = 1
    refine: int = 0
    objective: str = "posterior"

    def __post_init__(self) -> None:
        for name, least in (("num", 1), ("seed", 0), ("rank", 1), ("refine", 0)):
            if getattr(self, name) < least:
                raise InputError(
                    f"{name} {getattr(self, name)} is not usable; allowed is a whole number of at least {least}"
                )
        if self.rank > MOST_CANDIDATES:
            raise InputError(f"rank {self.rank} is not usable; allowed is at most {MOST_CANDIDATES}")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature {self.temperature} is not usable; allowed is a number above 0")
        if self.precision not in ("32-true", "bf16-mixed"):
            raise InputError(f"precision is {self.precision!r}; allowed: 32-true, bf16-mixed")
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective {self.objective!r} does not exist; allowed: {', '.join(OBJECTIVES)}")
        if (self.rank > 1 or self.refine) and min(self.labels) < 0:
            raise InputError("rank and refine need labels to agree with; allowed are flows with classes")
        if self.seed >= 2**63:
            raise InputError(f"seed {self.seed} is not usable; allowed is a number below 2^63")
        Guidance(self.guidance, self.schedule, self.guide)


@dataclass(frozen=True)
class Note:
    """What became of one part."""

    part: int
    seconds: float
    residual: float  # largest update that a parallel decoder accepted
    fell_back: int  # blocks that went over to the sequential loop
    not_finite: int  # images with numbers that are not finite, drawn grey where they are


def draw(
    flow: TarFlow, request: Request, part: int, method: str, batch_size: int, compile: bool = False
) -> tuple[Tensor, Note]:
    """Draw one part: images, uint8 `[n, C, H, W]`, and a note on them."""
    started = time.perf_counter()
    numbers = range(part * PART, min((part + 1) * PART, request.num))
    guidance = Guidance(request.guidance, request.schedule, request.guide)
    images, residual, fell_back = [], 0.0, 0
    for start in range(0, len(numbers), batch_size):
        batch = numbers[start : start + batch_size]
        y = torch.tensor([request.labels[i % len(request.labels)] for i in batch])
        z = flow.enter(torch.stack([noise(flow, request.seed, i, request.rank) for i in batch]))
        z = request.temperature * flow.to_prior(z)
        chosen = z[:, 0]
        with autocast(flow.device, request.precision):
            if request.rank > 1:
                chosen = rank(flow, z, y, guidance, method=method, batch_size=batch_size, compile=compile)
            if request.refine:
                options = {"objective": request.objective, "guidance": guidance, "batch_size": batch_size}
                chosen = refine(flow, chosen, y, request.refine, **options, compile=compile)
            x, report = flow.decode_with_report(chosen, y, guidance, method, compile=compile)
            x = flow.denoise(x, y, batch_size) if request.denoise else x
        residual = max([residual, *(solved.residual for solved in report)])
        fell_back += sum(solved.fell_back for solved in report)
        images.append(flow.to_images(x.float()).float().cpu())
    x = torch.cat(images)
    bad = ~x.isfinite()
    note = Note(part, time.perf_counter() - started, residual, fell_back, int(bad.flatten(1).any(dim=1).sum()))
    return to_uint8(torch.where(bad, 0, x)), note


def noise(flow: TarFlow, seed: int, number: int, candidates: int = 1) -> Tensor:
    """Standard normal noise of image `number`, `[candidates, N, D]`, on the CPU, so that every device gets the same."""
    return torch.stack([keyed_normal(flow.token_shape, seed, number, candidate) for candidate in range(candidates)])


def fingerprint(flow: TarFlow) -> str:
    """A hash of the flow's weights."""
    digest = hashlib.sha256()
    for name, tensor in flow.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Store:
    """Where parts wait on disk until all are there.

    A grid and an .npz are put together from a folder `<output>.parts`, which goes when the output is whole; a folder of
    PNGs is its own store, with `.flowback` in it. Either holds the request, so that only the same one goes on with it.
    """

    def __init__(self, output: Path, request: Request, flow: TarFlow) -> None:
        self.output, self.request, self.flow = output, request, flow
        self.is_folder = not output.suffix
        self.folder = output / ".flowback" if self.is_folder else output.with_name(output.name + ".parts")
        self.parts = range(-(-request.num // PART))

    def open(self) -> None:
        """Make the store, or find one that was begun by the same request.

        Raises:
            InputError: if there is an output that does not belong to this request.
        """
        text = json.dumps({**asdict(self.request), "model": fingerprint(self.flow)}, indent=1) + "\n"
        file = self.folder / "request.json"
        if file.exists():
            if file.read_text() != text:
                raise InputError(
                    f"{self.folder} was begun by another request or with other weights; allowed: the same, another output, "
                    "or to delete it"
                )
            return
        if self.folder.is_dir():
            raise InputError(f"{self.folder} does not say what it was begun for; allowed: another output, or to delete it")
        if self.is_folder and self.output.is_dir() and any(self.output.iterdir()):
            raise InputError(f"{self.output} holds other files; allowed is a new or empty folder")
        if not self.is_folder and self.output.is_dir():
            raise InputError(f"{self.output} is a folder; allowed is a file's name")
        there = next(place for place in self.folder.absolute().parents if place.exists())
        free, needed = shutil.disk_usage(there).free, self.request.num * self.flow.channels * self.flow.image_size**2
        if needed > free:
            raise InputError(f"{self.request.num} images may take {needed} bytes; allowed in {there} are {free}, its room")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda path: path.write_text(text))

    def missing(self) -> list[int]:
        """Parts that are not on disk."""
        return [part for part in self.parts if not self._note(part).exists()]

    def write(self, images: Tensor, note: Note) -> None:
        """Put a part on disk; its note is written last and says that it is whole."""
        if self.is_folder:
            for number, image in enumerate(images, start=note.part * PART):
                save_png(image, self.output / f"{number:06d}.png")
        else:
            np.save(self.folder / f"part_{note.part:06d}.npy", images.permute(0, 2, 3, 1).numpy())
        write_whole(self._note(note.part), lambda path: path.write_text(json.dumps(asdict(note)) + "\n"))

    def notes(self) -> list[Note]:
        """The notes of all parts on disk."""
        return [Note(**json.loads(self._note(part).read_text())) for part in self.parts if self._note(part).exists()]

    def finish(self) -> None:
        """Put the output together once no part is missing."""
        if self.is_folder:
            return
        suffix = self.output.suffix.lower()
        if suffix == ".npz":
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


def sample_to_disk(
    request: Request,
    output: Path,
    method: str = "auto",
    batch_size: int = 64,
    processes: int = 1,
    device: torch.device | str = "auto",
    compile: bool = False,
) -> list[Note]:
    """Draw what is missing and put the output together.

    Args:
        request: what to draw.
        output: a .png file for a grid, an .npz file, or a folder.
        method: how to decode; it changes the images by less than 1e-4.
        batch_size: images decoded at once by a process.
        processes: they share the cores, or the accelerators, of the machine.
        device: where to run; auto takes the accelerators that are there, one for each process in turn.
        compile: compile the passes of decoding; pays for many images.

    Returns:
        A note on each part.

    Raises:
        InputError: if the flow cannot be had, or the output is not usable.
    """
    for name, value in (("batch_size", batch_size), ("processes", processes)):
        if value < 1:
            raise InputError(f"{name} is {value}; allowed is a whole number of at least 1")
    if output.suffix and output.suffix.lower() not in (".png", ".npz"):
        raise InputError(f"output {output} is not known; allowed: a .png file for a grid, an .npz file, or a folder")
    flow = _prepare(request, method, device, 0)
    store = Store(output, request, flow)
    store.open()
    missing = store.missing()
    with Bar(str(output), request.num, request.num - _images(missing, request.num)) as bar:
        if processes == 1:
            for part in list(missing):
                store.write(*draw(flow, request, part, method, batch_size, compile))
                missing.remove(part)
                bar.update(request.num - _images(missing, request.num))
        elif missing:
            _share(store, missing, (method, batch_size, compile), processes, str(device), bar)
    notes = store.notes()
    store.finish()
    return notes


Way = tuple[str, int, bool]  # method, batch_size and compile of `draw`


def _share(store: Store, missing: list[int], way: Way, processes: int, device: str, bar: Bar) -> None:
    context = torch.multiprocessing.get_context("spawn")
    done: Any = context.Queue()
    threads = max(1, torch.get_num_threads() // processes)
    workers = [
        context.Process(
            target=_work,
            args=(store.output, store.request, missing[k::processes], way, device, k, threads, done),
            daemon=True,
        )
        for k in range(min(processes, len(missing)))
    ]
    for worker in workers:
        worker.start()
    left, ended = list(missing), 0
    while ended < len(workers):
        try:
            message = done.get(timeout=1)
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                raise RuntimeError("a process that draws images was killed; what is on disk stays, run it again") from None
            continue
        if isinstance(message, str):
            raise RuntimeError(message)
        if message is None:
            ended += 1
            continue
        left.remove(message)
        bar.update(store.request.num - _images(left, store.request.num))


def _work(
    output: Path,
    request: Request,
    parts: list[int],
    way: Way,
    device: str,
    turn: int,
    threads: int,
    done: Any,
) -> None:
    """What one process does: its parts, and a word on each."""
    try:
        torch.set_num_threads(threads)
        flow = _prepare(request, way[0], device, turn)
        store = Store(output, request, flow)
        for part in parts:
            store.write(*draw(flow, request, part, *way))
            done.put(part)
        done.put(None)
    except Exception as error:
        done.put(f"a process that draws images ended with {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        os._exit(130)


def _prepare(request: Request, method: str, device: torch.device | str, turn: int) -> TarFlow:
    flow, _ = load_flow(request.run, request.weights, pick_device(device, turn))
    flow.class_weights(list(request.labels), len(request.labels))
    flow.solvers(method, 1)
    return flow


def _images(parts: list[int], num: int) -> int:
    return sum(min(num, (part + 1) * PART) - part * PART for part in parts)
