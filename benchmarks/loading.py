"""Images per second of one core: from files, from tars, from caches; what finding a million files costs; what GPUs need.

    python benchmarks/loading.py [--images 1000] [--files 100000] [--gpus 8] [--rate 300] [--json FILE]

JPEGs are crops of scikit-learn's two photographs, 500x375 and 375x500. All is bound to one core and counted in that core's
seconds, of user and system, so that other work beside it hardly matters; files are in the page cache unless a row says
otherwise. Indices are made of empty images, in processes of their own, whose peak memory is theirs alone. `--rate` is the
images that one GPU is taken to consume in a second: nothing here measures a GPU.
"""

import argparse
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from flowback.core.devices import machine
from flowback.data import DataConfig, Split, batches, load_data
from flowback.data import cache as cache_module
from flowback.data.cache import ArrayCache
from flowback.data.sources import DiskSplit, Texts
from flowback.data.splits import MemorySplit
from flowback.runs.config import recipe

SIZE: tuple[int, int] = (500, 375)
CLASSES = 10
BATCH = 32  # of one of 8 processes that share 256
DINO_DIM = 768  # of the features of DINOv2-B
DOWNSAMPLE, CHANNELS = 8, 4  # of the latents of sd-vae-ft-ema
IMAGENET = 1_281_167
TREE_CLASSES, FILE_BYTES, MEMBER_BYTES = 1000, 108 * 2**10, 2**10
Row = dict[str, Any]


def make_images(root: Path, count: int, quality: int) -> float:
    """The same JPEGs as a tree, in `root/tree`, and in tars of 100, in `root/tars`; their mean size, bytes."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    generator = np.random.default_rng(0)
    contents = []
    for number in range(count):
        photo, size = photos[number // 2 % 2], SIZE if number % 4 else (SIZE[1], SIZE[0])
        scale = generator.uniform(0.8, 1) * min(photo.width / size[0], photo.height / size[1])
        width, height = (scale * side for side in size)
        left, top = generator.uniform(0, photo.width - width), generator.uniform(0, photo.height - height)
        stream = io.BytesIO()
        crop = photo.resize(size, Image.Resampling.LANCZOS, (left, top, left + width, top + height))
        crop.save(stream, "JPEG", quality=quality)
        contents.append(stream.getvalue())
        file = root / "tree" / f"class_{number % CLASSES}" / f"{number:06d}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents[-1])
    (root / "tars").mkdir()
    for first in range(0, count, 100):
        with tarfile.open(root / "tars" / f"train-{first // 100:04d}.tar", "w") as tar:
            for number in range(first, min(first + 100, count)):
                for suffix, data in ((".jpg", contents[number]), (".cls", str(number % CLASSES).encode())):
                    info = tarfile.TarInfo(f"{number:06d}{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return sum(map(len, contents)) / count


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of this core that a call takes, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = core_seconds()
        work()
        times.append(core_seconds() - start)
    return median(times[1:])


def core_seconds() -> float:
    """Seconds of this process and of those that it has waited for, user and system."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def simply(content: bytes, side: int) -> np.ndarray:
    """What `load_image` does, but decoded at full size."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    edge = min(image.size)
    left, top = (image.width - edge) / 2, (image.height - edge) / 2
    return np.array(image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + edge, top + edge)))


def measure_images(root: Path, o: argparse.Namespace) -> list[Row]:
    """Reading, decoding, resizing and cropping, from the tree and from the tars."""
    rows = []
    for side in (64, 256):
        for name, path in (("folder", root / "tree"), ("shards", root / "tars")):
            split = load_data(DataConfig(name=name, path=str(path), image_size=side)).train
            assert isinstance(split, DiskSplit)
            steps, numbers, source = len(split) // BATCH, split.indices.tolist(), split.source
            count = steps * BATCH

            def read(workers: int, split: Split = split, steps: int = steps) -> None:
                for _ in batches(split, BATCH, 0, 0, steps, workers):
                    pass

            if side == 64:
                rows.append(
                    row_of(f"{name}: the files' bytes", len(split), lambda s=source, n=numbers: [*map(s.read, n)], o)
                )
            if name == "folder":
                files = [source.read(i) for i in numbers[:count]]
                rows.append(row_of(f"bytes to {side}, simply", count, lambda f=files, s=side: [simply(c, s) for c in f], o))
            rows.append(row_of(f"{name} to {side}", count, lambda r=read: r(0), o))
            rows.append(row_of(f"{name} to {side}, by a worker", count, lambda r=read: r(1), o))
    return rows


def cached_shapes() -> dict[str, tuple[int, ...]]:
    """Arrays of one image, by recipe."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("imagenet64", "imagenet256", "imagenet256_patch1"):
        values = yaml.safe_load(recipe(name).read_text())
        flow, side = values["flow"], values["data"]["image_size"]
        if "latents" in values:
            side //= DOWNSAMPLE
            shapes.setdefault("latents of imagenet256", (CHANNELS, side, side))
        shapes[f"features of {name}"] = ((side // flow["patch_size"]) ** 2, DINO_DIM)
    return shapes


def measure_caches(root: Path, o: argparse.Namespace) -> list[Row]:
    """Reading random batches out of caches of both mirror images, mapped or not as ImageNet's would be."""
    rows, most = [], cache_module.OPEN_MAPS
    for name, shape in cached_shapes().items():
        count = 2**29 // (4 * int(np.prod(shape)))
        folder, facts = root / name.replace(" ", "_"), {"kind": name.split()[0]}
        split = MemorySplit(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.zeros(count, dtype=torch.long))
        ArrayCache.plan(folder, facts, count, 2, shape).fill(split, lambda x, s=shape: torch.randn(len(x), *s), 256)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(count, generator=generator).split(BATCH)
        flipped = (torch.rand(count, generator=generator) < 0.5).split(BATCH)

        def read(cache: ArrayCache, order: Sequence[Tensor] = order, flipped: Sequence[Tensor] = flipped) -> None:
            for numbers, mirrored in zip(order, flipped, strict=True):
                cache(numbers, mirrored)

        cache = ArrayCache.open(folder)
        per_image = cache.row_bytes // 2
        whole = ArrayCache.plan(root / "none", facts, IMAGENET, 2, shape)
        cache_module.OPEN_MAPS = most if whole.shards <= most else 0  # nearly none of its shards stay mapped
        sizes = {"bytes": per_image, "imagenet_terabytes": whole.bytes / 1e12, "imagenet_shards": whole.shards}
        rows.append(row_of(name, count, lambda c=cache: read(c), o) | sizes)
        if hasattr(os, "posix_fadvise"):
            rates = []
            for _ in range(o.repeats):
                cache = ArrayCache.open(folder)
                forget(folder)
                start = time.perf_counter()
                read(cache)
                rates.append(count / (time.perf_counter() - start))
            rows.append({"what": f"{name}, from this disk", "images_per_second": median(rates), **sizes})
        del cache
        shutil.rmtree(folder)
    return rows


def forget(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def row_of(what: str, count: int, work: Callable[[], object], o: argparse.Namespace) -> Row:
    """A row of the first table: what handles `count` images, and how many in a second of this core."""
    return {"what": what, "images_per_second": count / seconds_of(work, o.repeats)}


def make_tree(root: Path, count: int) -> None:
    """Files of holes, named as ImageNet's, in 1,000 class folders."""
    for k in range(TREE_CLASSES):
        folder = root / f"n{k:08d}"
        folder.mkdir(parents=True)
        for i in range(k, count, TREE_CLASSES):
            with (folder / f"n{k:08d}_{i}.JPEG").open("wb") as stream:
                stream.truncate(FILE_BYTES)


def make_tars(root: Path, count: int, each: int = 10_000) -> None:
    """Samples of a kilobyte of zeros and a class number; an index does not look into the images."""
    root.mkdir()
    for first in range(0, count, each):
        with (root / f"train-{first // each:04d}.tar").open("wb") as stream:
            for number in range(first, min(first + each, count)):
                image, label = (tarfile.TarInfo(f"{number:09d}{suffix}") for suffix in (".jpg", ".cls"))
                text = str(number % TREE_CLASSES).encode()
                image.size, label.size = MEMBER_BYTES, len(text)
                stream.write(image.tobuf(tarfile.USTAR_FORMAT) + bytes(MEMBER_BYTES))
                stream.write(label.tobuf(tarfile.USTAR_FORMAT) + text.ljust(512, b"\0"))
            stream.write(bytes(1024))


def measure_indices(root: Path, o: argparse.Namespace) -> list[Row]:
    """Finding and remembering many images: the first start, a later one, and the fingerprint that names caches."""
    os.environ["FLOWBACK_CACHE"] = str(root / "cache")
    make_tree(root / "many", o.files)
    make_tars(root / "many_tars", o.files)
    time.sleep(2.5)  # folders that changed just now are not remembered
    rows: list[Row] = []
    for name, path in (("folder", root / "many"), ("shards", root / "many_tars")):
        for start in ("first", "later"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(index, name, str(path), o.core).result()
            rows.append({"what": f"{name}, {start} start", **found})
            columns = list(found)
            if len(rows) == 1:
                print(f"\n{o.files:,} images:", *(column.replace("_", " ") for column in columns), sep="  ")
            print(f"{rows[-1]['what']:24}", *(f"{found[c]:>{len(c)}.1f}" for c in columns), sep="  ", flush=True)
        shutil.rmtree(path)
    return rows


def index(name: str, path: str, core: int | None) -> Row:
    """Load a data set in a process of its own: seconds and peak memory."""
    bind(core)
    before = peak_bytes()
    start, wall = core_seconds(), time.perf_counter()
    split: Split = load_data(DataConfig(name=name, path=path, image_size=64)).train
    found, wall = core_seconds() - start, time.perf_counter() - wall
    peak = peak_bytes() - before
    split.fingerprint()
    fingerprint = core_seconds() - start - found
    assert isinstance(split, DiskSplit)
    held = [value for owner in (split, split.source) for value in vars(owner).values()]
    arrays = [array for value in held for array in ((value.blob, value.offsets) if isinstance(value, Texts) else (value,))]
    return {
        "core_seconds": found,
        "wall_seconds": wall,
        "peak_megabytes": peak / 1e6,
        "kept_megabytes": sum(array.nbytes for array in arrays if isinstance(array, np.ndarray | Tensor)) / 1e6,
        "fingerprint_core_seconds": fingerprint,
        "with_fingerprint_peak_megabytes": (peak_bytes() - before) / 1e6,
    }


def peak_bytes() -> int:
    """The most memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # there the other way would count the process that this one was forked from
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bind(core: int | None) -> None:
    """To one core, and to one thread."""
    torch.set_num_threads(1)
    if core is not None:
        os.sched_setaffinity(0, {core})


def print_rates(rows: list[Row], o: argparse.Namespace) -> None:
    """The table of one core, and of what the GPUs need."""
    need = o.gpus * o.rate
    base = next(row["images_per_second"] for row in rows if row["what"] == "folder to 256")
    print(f"\n{o.gpus} GPUs of {o.rate:g} images/s need {need:g} images/s; a row counts cores unless it says disk")
    print(f"{'':46} {'images/s':>9} {'ratio':>8} {'GB/s':>6} {'needs':>7} {'GB/s':>6} {'TB of ImageNet':>14}")
    for row in rows:
        rate, size = row["images_per_second"], row.get("bytes")
        row |= {"ratio": rate / base, "needs": need / rate}
        line = f"{row['what']:46} {rate:>9,.0f} {rate / base:>7.2f}x "
        if size:
            row |= {"gigabytes_per_second": rate * size / 1e9, "needs_gigabytes_per_second": need * size / 1e9}
            line += f"{rate * size / 1e9:>6.2f} {need / rate:>7.2f} {need * size / 1e9:>6.2f} "
            line += f"{row['imagenet_terabytes']:>14.3f}"
        else:
            line += f"{'':6} {need / rate:>7.2f}"
        print(line, flush=True)


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=1000, help="JPEGs")
    options.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    options.add_argument("--files", type=int, default=100_000, help="sparse files of a tree, and samples of tars")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--gpus", type=int, default=8)
    options.add_argument("--rate", type=float, default=300, help="images that a GPU consumes in a second, assumed")
    options.add_argument("--folder", default=None, help="where the data is made and removed again")
    options.add_argument("--json", default=None)
    o = options.parse_args()
    o.core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else None
    bind(o.core)
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        root = Path(folder)
        os.environ["FLOWBACK_CACHE"] = str(root / "cache")
        mean = make_images(root, o.images, o.quality)
        print(f"{o.images} JPEGs of {mean / 1024:.0f} kB; one core of {machine()}", flush=True)
        rows = measure_images(root, o) + measure_caches(root, o)
        print_rates(rows, o)
        found = measure_indices(root, o)
    if o.json:
        given = {name: getattr(o, name) for name in ("images", "quality", "files", "gpus", "rate", "repeats")}
        facts = {"machine": machine(), "mean_bytes": mean, **given}
        Path(o.json).write_text(json.dumps(facts | {"rows": rows, "indices": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
