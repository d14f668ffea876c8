"""Students against the exact decode: seconds, sequential passes, and with --fid how good the images are.

    python benchmarks/samplers.py [RUN ...] [--random] [--batches 1,8,32] [--passes 1,2,4,8,16] [--guidance 0,2]
        [--repeats 3] [--uncalibrated] [--compile] [--device auto] [--json FILE]
        [--fid] [--data NAME] [--samples 1000] [--seed 0] [--prior standard] [--temperature 1] [--judge FILE]

A RUN's students are those that were distilled into its folder `students`, or else the one beside its flow. `--random` adds
flows and students of random weights, of 49 and of 256 tokens: a pass takes what any other's takes. Parallel decoders need
fewer sweeps for such flows than for trained ones, so that of their exact decodes only the sequential one means anything.

For each flow and batch, the least seconds of the repeats, in which all ways alternate: the exact decode and score step,
by `auto` as `flowback autotune` found, or as measured first (with `--uncalibrated` not at all), without and with guidance,
and token by token; where the flow has a denoiser, the exact decode with that, and with nothing, in place of the score step;
each student by Euler and, with one pass more where their number is even, by Heun, at the same scales w. `passes` are those
that follow each other, of any number of tokens; `ratio` is the time of the unguided exact decode by `auto` over a row's.

With `--fid` as many images by class as `--samples` says are drawn in every way and compared with as many held-out ones, on
the features of the frozen encoder and on those of a judge, which also says how often it sees the class that was asked for
(`studies/alignment/judge.py`; of Fashion-MNIST there always is one, of other data where `--judge` names it; one that is
not there is trained on the run's images). Training seconds are those of the runs' own clocks.

`--table FILE …` measures nothing: of an earlier `--json` of several runs it prints each way's means, with half the width of
the 95 % interval, and with `--less WAY` those of the differences from one of the ways, flow by flow.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowback import TarFlow
from flowback.core.devices import machine, pick_device, synchronize
from flowback.core.units import to_uint8
from flowback.data import DataConfig, ImageSet, load_data
from flowback.flow.autotune import machine_name
from flowback.flow.io import load_student
from flowback.flow.student import Lesson, Student, StudentConfig
from flowback.latents import Flow
from flowback.measure.fidelity import TensorImages, fidelity, reference_of
from flowback.runs.checkpoint import State, flow_folder, load_flow, newest
from flowback.runs.config import RunConfig
from flowback.runs.folder import run_data
from flowback.tasks.autotune import autotune

TOKENS = {49: {"image_size": 28, "channels": 1}, 256: {"image_size": 64, "channels": 3}}  # of random flows, patches of 4
JUDGE = "runs/studies/alignment/judge.pth"
SHARED = {"patch_size": 4, "width": 96, "blocks": 4, "layers": 3, "num_classes": 10, "noise_std": 0.1}


@dataclass
class Way:
    """One way of drawing: `draw(noise [B, N, D], y [B])` gives images without noise."""

    name: str
    passes: int | None  # that follow each other; None for what the decoders find
    draw: Callable[[Tensor, Tensor], Tensor]
    guidance: float = 0.0
    seconds: float | None = None  # of training


@dataclass
class Subject:
    """A flow and its students, by name, with the seconds that they were trained for."""

    name: str
    flow: Flow
    students: dict[str, tuple[Student, float | None]]
    seconds: float | None = None
    images: DataConfig | None = None
    data: ImageSet | None = None


def subjects(options: argparse.Namespace, device: torch.device) -> Iterator[Subject]:
    """The flows that are named, and those of random weights."""
    for run in options.runs:
        flow, _ = load_flow(run, device=device)
        found = {place.name: newest(place) for place in sorted(Path(run, "students").glob("*"))}
        students = {k: (load_student(place), State.read(place).seconds) for k, place in found.items() if place}
        students = {k: pair for k, pair in students.items() if pair[0].lesson.method != "denoiser"}
        if not students and flow.core.student is not None:
            students = {"student": (flow.core.taught(), None)}
        folder = flow_folder(run)
        seconds = State.read(folder).seconds if (folder / "state.json").is_file() else None
        images, data = DataConfig(name=options.data), None
        if options.fid:
            config = Path(run) / "config.yaml"
            if config.is_file():
                images = RunConfig.read(config).data
                data = run_data(Path(run), images)
            else:
                data = load_data(images)
        yield Subject(Path(run).name, flow, students, seconds, images, data)
    for tokens, sizes in TOKENS.items() if options.random else ():
        torch.manual_seed(0)
        flow = TarFlow(**sizes, **SHARED).to(device).eval()
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.02 * torch.randn_like(p))
        known = {"tokens": tokens, "dim": flow.token_shape[1], "classes": flow.num_classes}
        lessons = {"nfm": Lesson(method="flow_matching", **known), "inverse": Lesson(method="inverse", states=4, **known)}
        yield Subject(f"random-{tokens}", flow, {k: (Student(StudentConfig(), v).eval(), None) for k, v in lessons.items()})


def exact(
    subject: Subject, options: argparse.Namespace, w: float, method: str = "auto", denoise: str = "score"
) -> Callable[..., Tensor]:
    """The exact decode, and what removes the noise after it: the score step, the learned denoiser, or nothing."""
    flow, core = subject.flow, subject.flow.core

    def draw(noise: Tensor, y: Tensor) -> Tensor:
        z = core.draw_z(noise, y, options.temperature, options.prior)
        x = core.decode(z, y, w, method, compile=options.compile)
        return core.denoise(x, y, len(x), denoise == "learned") if flow.denoises and denoise != "nothing" else x

    return draw


def ways(subject: Subject, options: argparse.Namespace) -> list[Way]:
    """The exact decode, and every student in every number of passes."""
    core = subject.flow.core

    def by_student(student: Student, w: float, steps: int = 1, solver: str = "euler") -> Callable[[Tensor, Tensor], Tensor]:
        def draw(noise: Tensor, y: Tensor) -> Tensor:
            core.learned["student"] = student
            z = core.draw_z(noise, y, options.temperature, options.prior, "student")
            return core.draft(z, y, w, steps, solver, options.compile)

        return draw

    found = [Way(f"exact, guidance {w:g}", None, exact(subject, options, w), w, subject.seconds) for w in options.guidance]
    for denoise in ("learned", "nothing") if "denoiser" in core.learned else ():
        for w in options.guidance:
            draw = exact(subject, options, w, denoise=denoise)
            found.append(Way(f"exact, guidance {w:g}, denoised by {denoise}", None, draw, w, subject.seconds))
    for name, (student, seconds) in subject.students.items():
        for w in options.guidance:
            guided = f", w {w:g}" * bool(w)
            if student.lesson.method == "inverse":
                found.append(Way(f"{name}, inverse{guided}", 1, by_student(student, w), w, seconds))
                continue
            for passes in options.passes:
                draw = by_student(student, w, passes, "euler")
                found.append(Way(f"{name}, euler{guided}", passes, draw, w, seconds))
                if passes % 2 == 0:
                    draw = by_student(student, w, passes // 2 + 1, "heun")
                    found.append(Way(f"{name}, heun{guided}", passes + 1, draw, w, seconds))
    return found


def timed(subject: Subject, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each way and batch."""
    flow, core = subject.flow, subject.flow.core
    for B in options.batches:
        noise = torch.randn(B, *core.token_shape, generator=torch.Generator().manual_seed(0)).to(core.device)
        y = (torch.arange(B) % max(1, core.num_classes)).to(core.device) if core.num_classes else torch.full((B,), -1)
        one_by_one = core.config.blocks * (core.token_shape[0] - 1)
        all_ways = [*ways(subject, options), Way("exact, sequential", one_by_one, exact(subject, options, 0, "sequential"))]
        least = dict.fromkeys(range(len(all_ways)), math.inf)
        for repeat in range(options.repeats + 1):  # the first is not counted: compilers, caches
            for i, way in enumerate(all_ways):
                synchronize(core.device)
                began = time.perf_counter()
                flow.to_images(way.draw(noise, y))
                synchronize(core.device)
                least[i] = min(least[i], time.perf_counter() - began) if repeat else math.inf
        for i, way in enumerate(all_ways):
            passes = way.passes
            if passes is None:
                _, report = core.decode_with_report(core.draw_z(noise, y), y, way.guidance)
                passes = sum(solved.sweeps for solved in report)
            row = {"flow": subject.name, "tokens": core.token_shape[0], "batch": B, "way": way.name, "passes": passes}
            yield row | {"seconds": round(least[i], 5), "ratio": round(least[0] / least[i], 2)}


def judged(subject: Subject, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each way: FID, precision and recall of its images against held-out ones, and their classes."""
    flow, core, images, data = subject.flow, subject.flow.core, subject.images, subject.data
    assert images is not None
    assert data is not None
    y = torch.arange(options.samples) % max(1, core.num_classes) if core.num_classes else torch.full((options.samples,), -1)
    generator = torch.Generator().manual_seed(options.seed)
    noise = torch.randn(options.samples, *core.token_shape, generator=generator).to(core.device)
    reference, name = reference_of(data, options.samples, training=False)
    extractors: dict[str, Any] = {"efficientnet_lite0": None}
    if file := options.judge or (JUDGE if data.name == "fashion_mnist" else None):
        sys.path.insert(0, str(Path(__file__).parents[1] / "studies" / "alignment"))
        from judge import right, trained

        judge, extractors["judge"] = trained(Path(file), replace(images, limit=None)), file
    for way in ways(subject, options):
        parts = [flow.to_images(way.draw(z, c.to(core.device))) for z, c in zip(noise.split(64), y.split(64), strict=True)]
        x = torch.cat(parts).float().cpu()
        pixels = to_uint8(torch.where(x.isfinite(), x, 0))
        row: dict[str, Any] = {"flow": subject.name, "way": way.name, "passes": way.passes, "trained": way.seconds}
        for extractor, weights in extractors.items():
            known = {"weights": weights, "reference_name": name, "device": core.device}
            found = fidelity(TensorImages(pixels), reference, ("fid", "prc"), extractor, **known)
            row[extractor] = {figure: round(found[figure], 3) for figure in ("fid", "precision", "recall")}
        if "judge" in extractors:
            row["judge"]["right"] = round(right(judge, pixels, y), 3)
        yield row


def table(files: list[list[dict[str, Any]]], less: str | None) -> str:
    """Of each way the mean over flows, with half the width of its 95 % interval; of differences from the way `less`."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
    from common import interval, markdown

    figures = {"FID": ("judge", "fid", 1), "recall": ("judge", "recall", 2), "right": ("judge", "right", 2)}
    figures["FID, EfficientNet"] = ("efficientnet_lite0", "fid", 1)
    figures = {title: figure for title, figure in figures.items() if figure[0] in files[0][0]}
    by_way: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for rows in files:
        known = set(by_way)  # which an earlier file has
        for row in rows:
            if (way := (row["way"], row["passes"])) not in known:
                by_way.setdefault(way, []).append(row)
    base = next((own for (way, passes), own in by_way.items() if less in (way, f"{way} {passes}")), None)
    if less and base is None:
        sys.exit(f"no way is called {less!r}; allowed: {', '.join(f'{w} {n}' if n else w for w, n in by_way)}")
    cells = []
    for (way, passes), own in by_way.items():
        means = [
            interval(
                [row[of][name] - (its[of][name] if base else 0) for row, its in zip(own, base or own, strict=True)], digits
            )
            for of, name, digits in figures.values()
        ]
        cells.append([way, str(passes or ""), *means])
    return markdown(["way", "passes", *figures], cells)


@torch.no_grad()
def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--passes", default="1,2,4,8,16")
    parser.add_argument("--guidance", default="0,2")
    parser.add_argument("--repeats", type=int, default=3, help="0 to leave out the seconds")
    parser.add_argument("--uncalibrated", action="store_true", help="auto as it is without an autotune")
    parser.add_argument("--fid", action="store_true")
    parser.add_argument("--data", default="fashion_mnist", help="of flows that are no runs, with --fid")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the noise with --fid")
    parser.add_argument("--prior", default="standard")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--judge", help=f"a judge's file, which is made if it is not there; of Fashion-MNIST {JUDGE}")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", default=None)
    parser.add_argument("--table", type=Path, nargs="+", default=None, help="files that --json wrote")
    parser.add_argument("--less", help="with --table: a way, such as 'exact, guidance 1' or 'nfm, euler, w 1 2'")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(file.read_text())["images"] for file in options.table], options.less))
        return
    for name, kind in (("batches", int), ("passes", int), ("guidance", float)):
        setattr(options, name, [kind(word) for word in getattr(options, name).split(",")])
    device = pick_device(options.device)
    facts: dict[str, Any] = {"machine": machine(device), **vars(options), "seconds": [], "images": []}
    print(facts["machine"])
    for subject in subjects(options, device):
        core = subject.flow.core
        if options.uncalibrated:
            core.autotune = None
        elif options.repeats and (core.autotune is None or core.autotune.machine != machine_name(device)):
            twice = 2 if any(options.guidance) else 1
            autotune(core, sorted({B * n for B in options.batches for n in (1, twice)}), report=print)
        for row in timed(subject, options) if options.repeats else ():
            facts["seconds"].append(row)
            print(
                "{flow}  batch {batch:2}  {way:20} {passes:5} passes  {seconds:8.4f} s  {ratio:6.2f}x".format(**row),
                flush=True,
            )
        for row in judged(subject, options) if options.fid and subject.data is not None else ():
            facts["images"].append(row)
            print(json.dumps(row), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
