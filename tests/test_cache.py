import hashlib
import json
import os
import pickle
import shutil
import signal
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowback.core.errors import InputError
from flowback.core.files import cache_folder
from flowback.core.units import from_levels
from flowback.data import cache as module
from flowback.data.cache import ArrayCache, cache_key, find, nearest_mismatch
from flowback.data.splits import MemorySplit

FACTS = {"kind": "features", "images": "abc", "encoder": "x", "grid": (2, 2), "scale": 0.25}
SHAPE = (4, 2)
ROW_BYTES = 2 * 4 * 2 * 2  # both variants of SHAPE in float16


def split_of(count: int) -> MemorySplit:
    generator = torch.Generator().manual_seed(count)
    return MemorySplit(torch.randint(0, 17, (count, 1, 8, 8), generator=generator, dtype=torch.uint8), torch.zeros(count))


def quadrants(x):
    """Features [B, 4, 2]: mean and spread of each quarter of the image, with a dependence on the batch it came in.

    Kernels of a real encoder differ in their last bits with the batch; here the first image of the batch is felt.
    """
    parts = x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(x), 4, 16)
    return torch.stack([parts.mean(-1), parts.std(-1)], dim=-1) + 0.01 * x[0, 0, 0, 0]


def oracle(count: int, rows: int, variants: int, batch_size: int) -> np.ndarray:
    """The whole array [n, variants, 4, 2], computed plainly: shard after shard, in batches from its start."""
    x = from_levels(split_of(count).images, 17)
    shards = [range(first, min(first + rows, count)) for first in range(0, count, rows)]
    batches = [shard[k : k + batch_size] for shard in shards for k in range(0, len(shard), batch_size)]
    both = [torch.cat([quadrants(v[list(batch)]) for batch in batches]).half() for v in (x, x.flip(-1))]
    return torch.stack(both[:variants], dim=1).numpy()


def plan(folder, count=23, rows=5, variants=2, facts=FACTS, **options) -> ArrayCache:
    return ArrayCache.plan(folder, facts, count, variants, SHAPE, shard_bytes=rows * variants * ROW_BYTES // 2, **options)


def filled(folder, count=23, rows=5, variants=2, facts=FACTS, **options) -> ArrayCache:
    plan(folder, count, rows, variants, facts).fill(split_of(count), quadrants, 17, **options)
    return ArrayCache.open(folder, facts)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def everything(cache: ArrayCache) -> np.ndarray:
    n = torch.arange(cache.count)
    return np.stack([cache(n, torch.full((cache.count,), bool(v))).numpy() for v in range(cache.variants)], axis=1)


class Counting:
    """A compute that notes how many images it was given, and raises instead of its call number `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.images, self.calls, self.stop = 0, 0, stop

    def __call__(self, x):
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        self.images += len(x)
        return quadrants(x)


@given(
    count=st.integers(1, 30),
    rows=st.integers(1, 12),
    variants=st.sampled_from([1, 2]),
    batch_size=st.integers(1, 7),
    parts=st.integers(1, 4),
    stops=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), max_size=6),
)
def test_interrupted_and_shared_work_gives_the_bytes_of_one_undisturbed_pass(
    count, rows, variants, batch_size, parts, stops
):
    """Some parts are begun and stopped at some call, in any order; then all are run."""
    with TemporaryDirectory() as root:
        whole, folder, split = Path(root, "whole"), Path(root, "folder"), split_of(count)
        cache = filled(whole, count, rows, variants, batch_size=batch_size)
        assert np.array_equal(everything(cache), oracle(count, cache.rows, variants, batch_size))
        computed, stopped = 0, 0
        runs = [((part - 1) % parts + 1, stop) for part, stop in stops] + [(part, None) for part in range(parts, 0, -1)]
        for part, stop in runs:
            compute = Counting(stop)
            try:
                plan(folder, count, rows, variants).fill(split, compute, 17, part=(part, parts), batch_size=batch_size)
            except KeyboardInterrupt:
                stopped += 1
            computed += compute.images
        assert computed <= variants * count + stopped * batch_size  # a stop loses at most the batch it falls into
        assert contents(folder) == contents(whole)
        ArrayCache.open(folder, FACTS).verify()


def test_a_batch_comes_from_many_shards_in_the_order_asked_for(tmp_path):
    cache = filled(tmp_path / "c")
    indices, flipped = torch.tensor([22, 0, 7, 0, 22, 13]), torch.tensor([True, False, True, True, False, False])
    wanted = oracle(23, 5, 2, 64)[indices.numpy(), flipped.long().numpy()]
    got = cache(indices, flipped)
    assert got.dtype == torch.float16
    assert np.array_equal(got.numpy(), wanted)
    got.zero_()  # a copy: the files stay as they are
    assert np.array_equal(cache(indices, flipped).numpy(), wanted)
    assert cache(indices[:0], flipped[:0]).shape == (0, *SHAPE)


def test_numpy_reads_a_shard_without_this_library(tmp_path):
    filled(tmp_path / "c")
    for shard in range(5):
        file = tmp_path / "c" / f"shard_{shard:05d}.npy"
        array = np.load(file, mmap_mode="r")
        assert isinstance(array, np.memmap)
        assert np.array_equal(array, oracle(23, 5, 2, 64)[5 * shard : 5 * shard + 5])
        manifest, content = json.loads(file.with_suffix(".json").read_text()), file.read_bytes()
        assert (manifest["shard"], manifest["bytes"]) == (shard, len(content))
        assert manifest["sha256"] == hashlib.sha256(content).hexdigest()
        assert file.stat().st_size == array.offset + array.nbytes
    header = json.loads((tmp_path / "c" / "header.json").read_text())
    assert header["facts"] == {**FACTS, "grid": [2, 2]}
    layout = {"format": 2, "count": 23, "variants": 2, "shape": [4, 2], "dtype": "float16", "rows": 5}
    assert {name: header[name] for name in layout} == layout


def test_plan_says_the_size_and_writes_nothing(tmp_path):
    cache = plan(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert (cache.shards, cache.missing(), cache.rows) == (5, [0, 1, 2, 3, 4], 5)
    assert cache.part_images((1, 2)) == 5 + 5 + 3
    assert cache.part_images((2, 2)) == 10
    filled(tmp_path / "c")
    assert cache.bytes == sum(file.stat().st_size for file in (tmp_path / "c").glob("shard_*.npy"))
    assert plan(tmp_path / "c", rows=9).rows == 5  # what was begun keeps its shards


def test_what_is_there_is_not_computed_again(tmp_path):
    split, folder = split_of(23), tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        plan(folder, rows=10).fill(split, Counting(stop=10), 17, batch_size=3)  # 4 batches of a shard, then 1 of the next
    assert plan(folder, rows=10).missing() == [1, 2]
    rest, seen = Counting(), []
    plan(folder, rows=10).fill(split, rest, 17, seen.append, batch_size=3)
    assert rest.images == 2 * (23 - 10 - 3)
    assert seen == [10, 16, 19, 20, 20, 23, 23]
    assert not list(folder.glob(".*"))
    again = Counting()
    plan(folder, rows=10).fill(split, again, 17)
    assert again.calls == 0


def test_an_error_in_report_or_in_an_image_keeps_the_progress(tmp_path):
    class Broken(MemorySplit):
        def __getitem__(self, indices):
            if 9 in indices:
                raise InputError("image 9 cannot be read")
            return super().__getitem__(indices)

    broken = Broken(split_of(12).images, torch.zeros(12))
    with pytest.raises(InputError, match="image 9 cannot be read"):
        plan(tmp_path / "c", 12, 12).fill(broken, quadrants, 17, batch_size=2)
    rest = Counting()
    plan(tmp_path / "c", 12, 12).fill(split_of(12), rest, 17, batch_size=2)
    assert rest.images == 2 * 4


def fill_until_killed(folder):
    def kill(done):
        if done == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    module.SAVE_SECONDS = 0.0
    plan(folder, 12, 12).fill(split_of(12), quadrants, 17, kill, batch_size=2)


def test_a_kill_loses_only_what_was_done_since_the_last_save(tmp_path):
    folder, split = tmp_path / "c", split_of(12)
    process = get_context("forkserver").Process(target=fill_until_killed, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    rest = Counting()
    plan(folder, 12, 12).fill(split, rest, 17, batch_size=2)
    assert rest.images == 2 * (12 - 6)
    assert contents(folder) == contents(filled(tmp_path / "whole", 12, 12, batch_size=2).folder)


def left_by(folder: Path, facts=FACTS) -> Path:
    """The progress of 6 of 12 images, which an interrupted process left."""
    with pytest.raises(KeyboardInterrupt):
        plan(folder, 12, 12, facts=facts).fill(split_of(12), Counting(stop=6), 17, batch_size=2)
    return next(folder.glob("*.progress"))


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_damaged_progress_is_not_believed(at, bit):
    with TemporaryDirectory() as root:
        progress = left_by(Path(root, "c"))
        damaged = bytearray(progress.read_bytes())
        damaged[at % len(damaged)] ^= 1 << bit
        progress.write_bytes(damaged)
        plan(progress.parent, 12, 12).fill(split_of(12), quadrants, 17, batch_size=2)
        assert contents(progress.parent) == contents(filled(Path(root, "whole"), 12, 12, batch_size=2).folder)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b[:50], lambda b: b"", lambda b: b"?" * len(b)])
def test_progress_that_is_cut_or_something_else_is_computed_anew(tmp_path, change):
    progress = left_by(tmp_path / "c")
    progress.write_bytes(change(progress.read_bytes()))
    rest = Counting()
    plan(tmp_path / "c", 12, 12).fill(split_of(12), rest, 17, batch_size=2)
    assert rest.images == 2 * 12


def test_progress_with_a_damaged_value_or_of_another_cache_is_computed_anew(tmp_path):
    progress = left_by(tmp_path / "c")
    content, value = progress.read_bytes(), oracle(12, 12, 2, 2)[:6].tobytes()
    assert content.count(value) == 1
    progress.write_bytes(content.replace(value, value[:-1] + bytes([value[-1] ^ 1])))
    other = left_by(tmp_path / "d", {**FACTS, "encoder": "y"}).parent
    (other / "header.json").unlink()
    for folder in (tmp_path / "c", other):
        rest = Counting()
        plan(folder, 12, 12).fill(split_of(12), rest, 17, batch_size=2)
        assert rest.images == 2 * 12


def test_a_stop_after_the_last_batch_of_a_shard_leaves_nothing_to_compute(tmp_path):
    def stop(done):
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan(tmp_path / "c", 12, 12).fill(split_of(12), quadrants, 17, stop, batch_size=5)
    rest = Counting()
    plan(tmp_path / "c", 12, 12).fill(split_of(12), rest, 17, batch_size=5)
    assert rest.calls == 0


def test_progress_in_other_batches_goes_on_at_the_start_of_a_batch(tmp_path):
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        plan(folder, 12, 12).fill(split_of(12), Counting(stop=6), 17, batch_size=2)
    rest = Counting()
    plan(folder, 12, 12).fill(split_of(12), rest, 17, batch_size=4)
    assert rest.images == 2 * (12 - 4)


@pytest.mark.parametrize("at", [1, 3, 6, 9])
def test_two_processes_on_the_same_part_do_no_harm(tmp_path, at):
    """The second one runs as a whole between two batches of the first."""
    folder, split, calls = tmp_path / "c", split_of(23), []

    def disturbed(x):
        calls.append(len(x))
        if len(calls) == at:
            plan(folder).fill(split, quadrants, 17, batch_size=3)
        return quadrants(x)

    plan(folder).fill(split, disturbed, 17, batch_size=3)
    assert contents(folder) == contents(filled(tmp_path / "whole", batch_size=3).folder)
    assert sum(calls) < 2 * 23  # the first goes on with the shard that it is at, and finds the others there


def test_a_process_that_tidies_up_does_not_stop_one_that_writes(tmp_path, monkeypatch):
    folder, sync, done = tmp_path / "c", os.fsync, []

    def fsync(descriptor):
        sync(descriptor)
        if not done and list(folder.glob(".partial-*shard_00002.npy")):
            done.append(True)
            plan(folder).fill(split_of(23), quadrants, 17)

    monkeypatch.setattr("os.fsync", fsync)
    plan(folder).fill(split_of(23), quadrants, 17)
    assert done
    assert np.array_equal(everything(ArrayCache.open(folder)), oracle(23, 5, 2, 64))


def test_what_a_killed_process_left_half_written_goes_once_all_shards_are_there(tmp_path):
    left = tmp_path / "c" / ".partial-0123-shard_00001.npy"
    plan(tmp_path / "c").fill(split_of(23), quadrants, 17, part=(1, 2))
    left.write_bytes(b"half")
    plan(tmp_path / "c").fill(split_of(23), quadrants, 17, part=(1, 2))
    assert left.exists()  # another process may be writing it
    plan(tmp_path / "c").fill(split_of(23), quadrants, 17, part=(2, 2))
    assert not left.exists()


def test_workers_read_the_same_images_and_their_error_is_one_sentence(tmp_path):
    with_workers = filled(tmp_path / "a", workers=1, batch_size=3)
    assert contents(with_workers.folder) == contents(filled(tmp_path / "b", batch_size=3).folder)

    with pytest.raises(InputError) as refused:
        plan(tmp_path / "c").fill(Unreadable(split_of(23).images, torch.zeros(23)), quadrants, 17, workers=1)
    sentence, process = str(refused.value).split(" in process ")
    assert sentence == "image 3 cannot be read"
    assert int(process) != os.getpid()


class Unreadable(MemorySplit):
    def __getitem__(self, indices):
        raise InputError(f"image 3 cannot be read in process {os.getpid()}")


def test_filling_leaves_the_global_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    filled(tmp_path / "c")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("undamaged"))


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found_and_its_shard_named(undamaged, at, bit):
    seen = []
    undamaged.verify(seen.append)
    assert seen == [5, 10, 15, 20, 23]
    file = sorted(undamaged.folder.glob("shard_*"))[at % 10]
    original = file.read_bytes()
    damaged = bytearray(original)
    damaged[at % len(damaged)] ^= 1 << bit
    file.write_bytes(damaged)
    with pytest.raises(InputError, match=rf"{file.stem}.npy does not match its checksum"):
        ArrayCache.open(undamaged.folder).verify()
    file.write_bytes(original)


@pytest.mark.parametrize("suffixes", [[".npy"], [".json"], [".npy", ".json"]])
def test_a_changed_header_or_a_shard_of_another_place_is_found(tmp_path, suffixes):
    cache, other = filled(tmp_path / "c"), filled(tmp_path / "d", facts={**FACTS, "encoder": "y"})
    other_values = np.load(other.folder / "shard_00002.npy") + 1
    np.save(other.folder / "shard_00002.npy", other_values)
    for suffix in suffixes:
        shutil.copy(other.folder / f"shard_00002{suffix}", cache.folder)
    with pytest.raises(InputError, match=r"shard_00002.npy does not match"):
        cache.verify()
    for suffix in suffixes:
        shutil.copy(cache.folder / f"shard_00001{suffix}", cache.folder / f"shard_00000{suffix}")
    with pytest.raises(InputError, match=r"shard_00000.npy does not match"):
        cache.verify()
    header = other.folder / "header.json"
    header.write_text(header.read_text().replace('"y"', '"x"'))
    with pytest.raises(InputError, match=r"shard_00000.npy does not match"):
        ArrayCache.open(other.folder, FACTS).verify()


def test_a_shard_without_its_manifest_is_not_complete(tmp_path):
    cache = filled(tmp_path / "c")
    before = contents(cache.folder)
    for suffix in (".json", ".npy"):
        (cache.folder / f"shard_00003{suffix}").unlink()
        with pytest.raises(InputError, match=r"1 of 5 shards are missing.* first shard_00003"):
            ArrayCache.open(cache.folder)
        rest = Counting()
        plan(cache.folder).fill(split_of(23), rest, 17)
        assert rest.images == 2 * 5
        assert contents(cache.folder) == before


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b[:50], lambda b: b"", lambda b: b + b"?"])
def test_a_shard_of_a_wrong_size_is_refused_at_opening_and_made_anew(tmp_path, change):
    cache = filled(tmp_path / "c")
    file = cache.folder / "shard_00003.npy"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(InputError, match=r"1 of 5 shards are missing or of a wrong size, first shard_00003.npy"):
        ArrayCache.open(cache.folder)
    rest = Counting()
    plan(cache.folder).fill(split_of(23), rest, 17)
    assert rest.images == 2 * 5
    ArrayCache.open(cache.folder).verify()


def test_incomplete_is_said_with_the_number_of_shards(tmp_path):
    plan(tmp_path / "features-1").fill(split_of(23), quadrants, 17, part=(2, 2))
    for attempt in (lambda: ArrayCache.open(tmp_path / "features-1"), lambda: find(tmp_path, FACTS)):
        with pytest.raises(InputError, match=r"features-1 is incomplete: 3 of 5 .* run flowback cache again"):
            attempt()
    with pytest.raises(InputError, match="incomplete"):
        plan(tmp_path / "features-1").verify()


def test_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(Path(path))
        return type("Usage", (), {"free": free})()

    monkeypatch.setattr("shutil.disk_usage", usage)
    cache = plan(tmp_path / "new" / "c")
    needed = cache.bytes + cache._size(0)
    free = needed - 1
    compute = Counting()
    with pytest.raises(InputError, match=rf"needs {needed:,} bytes and {free:,} are free"):
        cache.fill(split_of(23), compute, 17)
    assert asked == [tmp_path]  # the nearest folder that exists
    assert not list(tmp_path.iterdir())
    assert compute.calls == 0
    free = needed
    cache.fill(split_of(23), compute, 17)
    free = 0  # nothing is missing, so nothing is needed
    cache.fill(split_of(23), compute, 17)


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(descriptor):
        if list((tmp_path / "c").glob(".partial-*shard_00002.npy")):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(InputError, match=r"shard_00002.npy cannot be written \(No space left on device\)"):
            plan(tmp_path / "c").fill(split_of(23), quadrants, 17)
    shards = [f"shard_0000{shard}.{suffix}" for shard in (0, 1) for suffix in ("json", "npy")]
    assert sorted(contents(tmp_path / "c")) == ["header.json", *shards]
    filled(tmp_path / "c").verify()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"encoder": "y"}, "was made with encoder 'x', this run has 'y'"),
        ({"encoder": "y", "scale": 1}, "was made with encoder 'x', this run has 'y'"),
        ({"grid": [4, 4]}, "was made with grid [2, 2], this run has [4, 4]"),
        ({"posterior": "mean"}, "was made with no posterior, this run has 'mean'"),
        ({"scale": ...}, "was made with scale 0.25, this run has none"),
    ],
)
def test_other_facts_are_refused_with_the_first_that_differs(tmp_path, changed, sentence):
    folder = filled(tmp_path / "features-1").folder
    facts = {name: value for name, value in {**FACTS, **changed}.items() if value is not ...}
    before = contents(folder)
    for attempt in (lambda: ArrayCache.open(folder, facts), lambda: plan(folder, facts=facts)):
        with pytest.raises(InputError) as refused:
            attempt()
        assert f"features-1 {sentence}; use" in str(refused.value)
    assert find(tmp_path, facts) is None
    assert nearest_mismatch(tmp_path, facts) == f"{folder} {sentence}"
    assert contents(folder) == before


def test_facts_that_json_reads_back_otherwise_still_match(tmp_path):
    folder = filled(tmp_path / "features-1").folder
    reordered = dict(reversed({**FACTS, "grid": [2, 2]}.items()))
    assert ArrayCache.open(folder, reordered).facts == {**FACTS, "grid": [2, 2]}
    assert cache_key(reordered) == cache_key(FACTS)
    assert len({cache_key({**FACTS, name: "other"}) for name in FACTS if name != "kind"} | {cache_key(FACTS)}) == 5


def test_another_layout_of_the_same_facts_is_refused(tmp_path):
    filled(tmp_path / "c")
    with pytest.raises(InputError, match="was made with count 23, this run has 24"):
        plan(tmp_path / "c", count=24)
    with pytest.raises(InputError, match="was made with variants 2, this run has 1"):
        plan(tmp_path / "c", variants=1)
    with pytest.raises(InputError, match="was made with dtype 'float16', this run has 'float32'"):
        plan(tmp_path / "c", dtype="float32")


def test_a_folder_that_another_process_began_since_is_left_alone(tmp_path):
    late = plan(tmp_path / "c", rows=4)
    before = contents(filled(tmp_path / "c", rows=5).folder)
    with pytest.raises(InputError, match="begun with another layout since"):
        late.fill(split_of(23), quadrants, 17)
    assert contents(tmp_path / "c") == before


def test_find_takes_the_matching_cache_among_others(tmp_path):
    assert find(tmp_path / "nowhere", FACTS) is None
    assert nearest_mismatch(tmp_path / "nowhere", FACTS) is None
    kinds = [FACTS, {**FACTS, "encoder": "y"}, {**FACTS, "encoder": "y", "scale": 1}, {**FACTS, "kind": "latents"}]
    for facts in kinds:
        filled(tmp_path / f"{facts['kind']}-{cache_key(facts)}", facts=facts)
    (tmp_path / "features-empty").mkdir()
    (tmp_path / "features-file").write_text("")
    for facts in kinds:
        found = find(tmp_path, facts)
        assert found is not None
        assert found.folder.name == f"{facts['kind']}-{cache_key(facts)}"
    assert find(tmp_path, {**FACTS, "scale": 3}) is None
    nearest = nearest_mismatch(tmp_path, {**FACTS, "encoder": "y", "scale": 1, "images": "def"})
    assert nearest == f"{tmp_path / f'features-{cache_key(kinds[2])}'} was made with images 'abc', this run has 'def'"
    assert nearest_mismatch(tmp_path, {**FACTS, "kind": "latents"}) is None


def test_folders_that_are_no_cache_are_named(tmp_path):
    folder = tmp_path / "features-1"
    with pytest.raises(InputError, match=r"features-1 is not a cache: it has no header.json"):
        ArrayCache.open(folder)
    folder.mkdir()
    plan(folder)  # empty: a process may have been stopped there
    (folder / "holiday.png").write_text("")
    with pytest.raises(InputError, match=r"features-1 holds files and no header.json"):
        plan(folder)
    assert "features-1 is not a cache" in str(nearest_mismatch(tmp_path, FACTS))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file"):
        plan(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 2, "facts": 3}'])
def test_a_broken_header_is_named(tmp_path, text):
    folder = filled(tmp_path / "features-1").folder
    (folder / "header.json").write_text(text)
    for attempt in (lambda: ArrayCache.open(folder), lambda: plan(folder)):
        with pytest.raises(InputError, match=r"features-1/header.json cannot be read"):
            attempt()
    assert find(tmp_path, FACTS) is None


@pytest.mark.parametrize("version", [1, 3])
def test_a_cache_of_another_format_is_refused_and_says_what_to_do(tmp_path, version):
    folder = filled(tmp_path / "features-1").folder
    file = folder / "header.json"
    file.write_text(file.read_text().replace('"format": 2', f'"format": {version}'))
    for attempt in (lambda: ArrayCache.open(folder), lambda: plan(folder)):
        with pytest.raises(
            InputError, match=rf"format {version}, this one reads 2.*delete {folder} and run flowback cache"
        ):
            attempt()
    assert find(tmp_path, FACTS) is None
    assert f"delete {folder}" in str(nearest_mismatch(tmp_path, FACTS))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70000.0, -70000.0])
def test_a_value_that_float16_does_not_hold_is_refused_with_the_image_number(tmp_path, value):
    split = split_of(23)
    split.images[:, :, 0, 0], split.images[:, :, 0, 7] = 0, 0
    split.images[13, 0, 0, 7] = 16  # the first pixel of the mirrored image

    def wrong(x):
        values = quadrants(x)
        values[x[:, 0, 0, 0] > 0.9, 3, 1] = value
        return values

    with pytest.raises(InputError, match=rf"float16 must be .* up to 65504, got {value} for image 13, mirrored"):
        plan(tmp_path / "c").fill(split, wrong, 17, batch_size=3)
    plan(tmp_path / "c").fill(split, quadrants, 17, batch_size=3)  # the values before it stayed


def test_float32_holds_larger_values_exactly(tmp_path):
    cache = plan(tmp_path / "c", dtype="float32")
    cache.fill(split_of(23), lambda x: 1e5 * quadrants(x), 17)
    x = from_levels(split_of(23).images[cache.rows : 2 * cache.rows], 17)
    got = ArrayCache.open(tmp_path / "c")(torch.tensor([cache.rows]), torch.tensor([False]))
    assert torch.equal(got[0], 1e5 * quadrants(x)[0])


def test_arrays_of_another_shape_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"computed arrays must have shape \[4, 2\], got \[1, 2\]"):
        plan(tmp_path / "c").fill(split_of(23), lambda x: quadrants(x)[:, :1], 17)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": 3}, "variants must be 1, or 2 .*got 3"),
        ({"dtype": "int8"}, "dtype must be one of float16, float32, got 'int8'"),
        ({"count": 0}, "count of a cache must be at least 1, got 0"),
        ({"facts": {"encoder": "x"}}, "the kind of a cache must be .*got None"),
        ({"facts": {"kind": "../x"}}, "the kind of a cache must be .*got '../x'"),
    ],
)
def test_impossible_plans_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        plan(tmp_path / "c", **options)


def test_impossible_requests_are_refused(tmp_path):
    for part in ((0, 2), (3, 2)):
        with pytest.raises(InputError, match=rf"part must be 1 to 2, .*, got {part[0]} of 2"):
            plan(tmp_path / "c").fill(split_of(23), quadrants, 17, part=part)
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        plan(tmp_path / "c").fill(split_of(23), quadrants, 17, batch_size=0)
    with pytest.raises(InputError, match=r"needs 23 images, got 22"):
        plan(tmp_path / "c").fill(split_of(22), quadrants, 17)
    plain = filled(tmp_path / "c", variants=1)
    for index in (-1, 23):
        with pytest.raises(InputError, match=rf"must be from 0 to 22, got {index}"):
            plain(torch.tensor([3, index]), torch.tensor([False, False]))
    with pytest.raises(InputError, match="has no mirrored images"):
        plain(torch.tensor([3, 4]), torch.tensor([False, True]))


def test_few_files_stay_open_and_none_travel_to_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OPEN_MAPS", 3)
    cache, wanted = filled(tmp_path / "c", rows=1), oracle(23, 1, 2, 64)
    assert np.array_equal(everything(cache), wanted)
    assert len(cache._maps) == 3
    travelled = pickle.loads(pickle.dumps(cache))
    assert not travelled._maps
    assert np.array_equal(everything(travelled), wanted)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice about files")
@pytest.mark.parametrize("maps", [0, 192])
def test_a_batch_is_asked_of_the_disk_before_it_is_read(tmp_path, monkeypatch, maps):
    monkeypatch.setattr(module, "OPEN_MAPS", maps)
    monkeypatch.setattr(module, "ANNOUNCED", 0)
    cache, asked = filled(tmp_path / "c"), []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *range_: asked.append(os.pread(descriptor, *range_[1::-1])))
    indices, flipped = torch.tensor([22, 0, 7, 7]), torch.tensor([True, False, True, False])
    values = cache(indices, flipped).numpy()
    assert sorted(asked) == sorted(row.tobytes() for row in values)


def test_a_shard_that_is_cut_while_it_is_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OPEN_MAPS", 0)
    cache = filled(tmp_path / "c", rows=23)
    file = next((tmp_path / "c").glob("shard_*.npy"))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(InputError, match=r"shard_00000\.npy cannot be read \(it ends too early\); delete it"):
        everything(cache)


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("FLOWBACK_CACHE", raising=False)
    assert cache_folder() == Path("/xdg/flowback")
    monkeypatch.setenv("FLOWBACK_CACHE", "/mine")
    assert cache_folder() == Path("/mine")
