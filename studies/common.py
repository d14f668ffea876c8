"""What the studies share: runs in processes of their own, files of results, the judge's figures, intervals."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from torch import Tensor

from flowback.core.devices import pick_device
from flowback.core.files import file_hash, write_whole
from flowback.data import ImageSet
from flowback.data.splits import spread
from flowback.measure.fidelity import TensorImages, fidelity, reference_of

sys.path.append(str(Path(__file__).parent / "alignment"))

import judge as judge  # which makes it an extractor

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, by the number of seeds
REFERENCE = 5000  # held-out images that samples are compared with, at most
Arm = TypeVar("Arm")
Run = tuple[Arm, int]  # an arm, which has a name, and a seed


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of 2 to 5 values."""
    return T95[len(values)] * stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float], digits: int) -> str:
    """The mean of values, and half the width of its 95 % interval where there are several."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {half_width(values):.{digits}f}" if len(values) in T95 else text


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def filled(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """A page with every table written anew that stands there between `<!-- NAME -->` and `<!-- end -->`."""

    def write(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{tables[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- ([a-z -]+) -->\n.*?<!-- end -->", write, page, flags=re.DOTALL)


def judged(images: Tensor, data: ImageSet, file: Path | None) -> dict[str, float]:
    """FID, precision and recall of images uint8 `[n, C, H, W]` against held-out ones.

    They are on the features of the judge in `file`; without one, on EfficientNet-Lite0's.
    """
    reference, name = reference_of(data, REFERENCE, training=False)
    options: dict[str, Any] = {"reference_name": name, "device": pick_device("auto")}
    if file is not None:
        options |= {"extractor": "judge", "weights": str(file), "reference_name": f"{name}-{file_hash(file)[:8]}"}
    found = fidelity(TensorImages(images), reference, ("fid", "prc"), **options)
    return {k: found[k] for k in ("fid", "precision", "recall")}


def unseen(data: ImageSet, count: int) -> list[int]:
    """`count` held-out images that are not among those that `judged` compares with."""
    held_out = len(data.held_out)
    reference = set(spread(held_out, REFERENCE))
    rest = [i for i in range(held_out) if i not in reference]
    return [rest[i] for i in spread(len(rest), count)]


def write_result(file: Path, facts: dict[str, Any]) -> None:
    """Write what was measured of a run."""
    write_whole(file, lambda whole: whole.write_text(json.dumps(facts, indent=1) + "\n"))


def options(description: str | None, jobs: int) -> argparse.ArgumentParser:
    """The options of a study that consists of runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=jobs, help="runs side by side, one thread each")
    parser.add_argument("--only", default=None, help="names of arms, with commas")
    parser.add_argument("--seeds", default=None, help="seeds, with commas")
    parser.add_argument("--hours", type=float, default=12.0, help="start no run after so many")
    parser.add_argument("--list", action="store_true", help="only say what is finished and what is not")
    parser.add_argument("--run", default=None, help=argparse.SUPPRESS)
    return parser


def chosen(o: argparse.Namespace, runs: Iterable[Run[Any]], groups: dict[str, list[str]] | None = None) -> list[Run[Any]]:
    """Those of the runs that `--only`, which may name groups of arms, and `--seeds` ask for."""
    runs, groups = list(runs), groups or {}
    allowed = {arm.name: [arm.name] for arm, _ in runs} | groups
    asked = list(allowed) if o.only is None else o.only.split(",")
    if unknown := sorted(set(asked) - set(allowed)):
        sys.exit(f"arms {', '.join(unknown)} do not exist; allowed: {', '.join(allowed)}")
    names = {name for each in asked for name in allowed[each]}
    seeds = {seed for _, seed in runs} if o.seeds is None else set(map(int, o.seeds.split(",")))
    return [(arm, seed) for arm, seed in runs if arm.name in names and seed in seeds]


def missing(runs: Iterable[Run[Any]], result_file: Callable[[Any, int], Path], say: bool) -> list[Run[Any]]:
    """The runs without a result; with `say` prints which are finished."""
    runs = list(runs)
    if say:
        for arm, seed in runs:
            print(f"{arm.name}-{seed}", "finished" if result_file(arm, seed).is_file() else "missing")
    return [run for run in runs if not result_file(*run).is_file()]


def carry_out(script: str, chains: Iterable[Sequence[Run[Any]]], logs: Path, jobs: int, end: float) -> bool:
    """Run chains side by side, each run after the one before it in a process of its own; whether all were finished.

    No run is started after `end`, on the clock of `time.monotonic`.
    """

    def follow(chain: Sequence[Run[Any]]) -> bool:
        return all(_run_apart(script, f"{arm.name}-{seed}", logs) for arm, seed in chain if time.monotonic() < end)

    with ThreadPoolExecutor(jobs) as pool:
        return all(list(pool.map(follow, chains)))


def _run_apart(script: str, name: str, logs: Path) -> bool:
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{name}.txt").open("a") as log:
        words = [sys.executable, script, "--run", name]
        code = subprocess.call(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    print(f"{time.strftime('%H:%M:%S')}  {name}  {'finished' if code == 0 else f'FAILED, see {log.name}'}", flush=True)
    return code == 0


def run_named(name: str, runs: Iterable[Run[Any]]) -> Run[Any]:
    """The run of a name ARM-SEED."""
    return next((arm, seed) for arm, seed in runs if f"{arm.name}-{seed}" == name)
