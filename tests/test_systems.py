"""What other systems lack: POSIX modules, fork, locks of files. Simulated on this one, in processes of their own."""

import errno
import fcntl
import io
import os
import platform
import socket
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from builders import SMALL_RUN
from flowback.core.errors import InputError
from flowback.core.files import read_at
from flowback.data import DataConfig, batches, load_data
from flowback.data.cache import ArrayCache
from flowback.data.splits import MemorySplit
from flowback.runs.checkpoint import _sync
from flowback.runs.folder import _lock
from flowback.training.parallel import _end_with
from forked import Forked

# As on Windows: modules and calls of POSIX are missing, a folder cannot be opened, only what is open for writing can be
# synced, a rename replaces nothing, processes are spawned. Spawned ones run the part above `if` too.
WITHOUT_POSIX = """
    import errno, fcntl, multiprocessing, os, shutil, sys
    flags, real = fcntl.fcntl, {name: getattr(os, name) for name in ("open", "fsync", "rename")}

    def open_no_folder(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real["open"](path, *args, **kwargs)

    def sync_what_may_be_written(descriptor):
        if flags(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real["fsync"](descriptor)

    def rename_to_a_new_name(source, target, **kwargs):
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, "File exists", source, None, target)
        real["rename"](source, target, **kwargs)

    os.open, os.fsync, os.rename = open_no_folder, sync_what_may_be_written, rename_to_a_new_name
    shutil._use_fd_functions = False
    shutil._rmtree_impl = getattr(shutil, "_rmtree_unsafe", None)  # which Python 3.14 has chosen when shutil was imported
    for name in ("fork", "pread", "posix_fadvise", "getuid", "geteuid", "sync", "fdatasync", "sched_getaffinity"):
        delattr(os, name)
    for name in ("fcntl", "pwd", "grp", "resource", "termios"):
        sys.modules[name] = None

    if __name__ == "__main__":
        multiprocessing.set_start_method("spawn")
        import importlib, pkgutil, torch
        torch.set_num_threads(1)
        import flowback
        for module in pkgutil.walk_packages(flowback.__path__, "flowback."):
            if not module.name.startswith(("flowback.studio", "flowback.__main__")):  # Gradio looks at the system's name
                importlib.import_module(module.name)
        from flowback.cli import main
        run, out, image, *small = sys.argv[1:]
        train = ["train", f"--run={run}", "--train.steps=4", "--train.eval_every=4", "--train.keep=1", *small]
        assert main([*train, "--data.workers=1", "--train.until=2"]) == 0
        assert main([*train, "--train.resume"]) == 0
        assert main(["sample", run, "--num", "2", "-o", f"{out}/a.png"]) == 0
        assert main(["sample", run, "--num", "66", "-o", f"{out}/a.npz"]) == 0
        assert main(["classify", run, image, "--rule", "exact"]) == 0
        assert main(["encode", run, image, "-o", f"{out}/z.safetensors"]) == 0
        assert main(["decode", run, f"{out}/z.safetensors", "-o", f"{out}/b.png"]) == 0
        assert main(["evaluate", run, "--metrics", "bpd,accuracy", "--images", "8"]) == 0
"""


def test_the_verbs_need_neither_posix_modules_nor_fork(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(WITHOUT_POSIX))
    image = tmp_path / "image.png"
    Image.fromarray(np.full((8, 8), 100, np.uint8)).save(image)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()  # of an earlier run
    words = [sys.executable, str(script), str(tmp_path / "run"), str(tmp_path), str(image), *SMALL_RUN]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(words, env=environment, capture_output=True, encoding="cp1252", timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.glob("?.*")) == ["a.npz", "a.png", "b.png", "z.safetensors"]
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (66, 8, 8, 1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]


def hold(run, missing, host, exchange):
    """Hold a run's lock until the process is killed.

    `missing` is the error of a file system without locks, `host` the machine's name; without `exchange` no file takes the
    place of another at once, as on NFS.
    """
    if missing:
        fcntl.flock = no_locks(missing)
    if host:
        socket.gethostname = lambda: host
    if not exchange:
        platform.machine = lambda: "one without renameat2"
    with _lock(run):
        print("held", flush=True)
        time.sleep(100)


def start(run, missing=0, host="", exchange=True):
    """A process that holds the lock, or that may not have it and has ended."""
    process = Forked(hold, run, missing, host, exchange)
    return process, os.read(process.pipes[0].fileno(), 5)


def kill(process):
    process.kill()
    return process.communicate()[1]


def no_locks(code):
    def flock(*args):
        raise OSError(code, "no locks here")

    return flock


def without_locks(monkeypatch, code):
    monkeypatch.setattr("fcntl.flock", no_locks(code))


@pytest.mark.parametrize("missing", [0, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_run_is_locked_with_and_without_locks_of_the_file_system(missing, tmp_path, monkeypatch):
    if missing:
        without_locks(monkeypatch, missing)
    (tmp_path / ".lock").touch()  # of an earlier run
    other, said = start(tmp_path, missing)
    assert said == b"held\n"
    with pytest.raises(InputError, match=f"process {other.pid} on" if missing else "another process trains in"):
        _lock(tmp_path)
    kill(other)
    for _ in range(2):  # the lock of a process that is gone is none, and one that was given back
        with _lock(tmp_path) as lock:
            assert lock.is_locked
        assert not lock.is_locked
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("options", [{"host": "elsewhere"}, {"exchange": False}], ids=["host", "exchange"])
def test_a_mark_that_cannot_be_taken_over_is_named_and_may_be_deleted(options, tmp_path):
    first, said = start(tmp_path, errno.ENOSYS, **options)
    assert said == b"held\n"
    kill(first)
    here = {"exchange": "exchange" not in options}
    second, said = start(tmp_path, errno.ENOSYS, **here)
    assert said == b""
    complaint = kill(second)
    assert f"{tmp_path / '.lock.process'} says that process {first.pid} on {options.get('host', '')}" in complaint
    assert "delete that file if the process is gone" in complaint
    (tmp_path / ".lock.process").unlink()
    third, said = start(tmp_path, errno.ENOSYS, **here)
    assert said == b"held\n"
    kill(third)


def test_a_lock_that_cannot_be_had_is_not_taken_for_another_process_and_nothing_stands_for_it(tmp_path, monkeypatch):
    without_locks(monkeypatch, errno.EIO)
    with pytest.raises(InputError, match=r"cannot be locked \(no locks here\); expected a folder to write in"):
        _lock(tmp_path)
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()
    with pytest.raises(InputError, match=r"cannot be locked \(Is a directory\)"):
        _lock(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_folder_that_no_system_syncs_is_left_and_a_fault_is_told(code, tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(code, os.strerror(code))

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", fsync)
    for place in (tmp_path / "file", tmp_path):
        if code == errno.EINVAL and place == tmp_path:
            _sync(place)
        else:
            with pytest.raises(OSError, match=os.strerror(code)):
                _sync(place)


def test_files_are_read_at_any_place_without_pread(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "pread")
    file = tmp_path / "file"
    file.write_bytes(bytes(range(200)))
    with file.open("rb") as stream:
        for size, offset in ((5, 190), (3, 0), (50, 180)):
            assert read_at(stream.fileno(), size, offset) == bytes(range(200))[offset : offset + size]


def test_a_cache_that_another_process_made_and_uses_is_neither_replaced_nor_deleted(tmp_path, monkeypatch):
    def in_use(path, *args, **kwargs):
        if path.exists() and not path.name.startswith(".partial-"):  # of one's own
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def replace(path, target):
        in_use(Path(target))
        return os.replace(path, target)

    def compute(x):
        if not list(tmp_path.glob("*/*.npy")):
            fill(means)  # another process is faster
            (tmp_path / "cache" / ".shard_00000.progress").touch()
            monkeypatch.setattr(Path, "unlink", in_use)
            monkeypatch.setattr(Path, "replace", replace)
        return means(x)

    def means(x):
        return x.mean((1, 2, 3))[:, None]

    def fill(compute):
        ArrayCache.plan(tmp_path / "cache", facts, 8, 1, (1,)).fill(split, compute, 17)

    facts = {"kind": "features"}
    split = MemorySplit(torch.arange(8 * 4, dtype=torch.uint8).view(8, 1, 2, 2), torch.zeros(8))
    fill(compute)
    monkeypatch.undo()
    cache = ArrayCache.open(tmp_path / "cache", facts)
    cache.verify()
    assert cache.missing() == []


def png(number):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (8, 8), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def fork_server():
    """It is sent what a spawned process is sent (of which the verbs start one, above), and has imported PyTorch already."""
    before = torch.multiprocessing.get_start_method(allow_none=True)
    torch.multiprocessing.set_start_method("forkserver", force=True)
    yield
    torch.multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("name", ["digits", "folder", "shards"])
def test_processes_that_read_ahead_may_be_spawned(name, fork_server, tmp_path):
    files = {f"{label}/{number}.png": png(number) for label in ("cat", "dog") for number in range(6)}
    if name == "folder":
        for path, content in files.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes(content)
    if name == "shards":
        with tarfile.open(tmp_path / "all.tar", "w") as tar:
            for path, content in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    disk = {} if name == "digits" else {"path": str(tmp_path), "image_size": 8, "channels": 1}
    train = load_data(DataConfig(name=name, **disk)).train
    wanted, found = (list(batches(train, 4, 0, 0, 3, workers=workers)) for workers in (0, 2))
    assert len(found) == 3
    for one, other in zip(wanted, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


def test_on_windows_a_process_waits_for_the_end_of_the_one_that_started_it(monkeypatch, capsys):
    calls = []

    def wait(handle, milliseconds):
        calls.append((handle, milliseconds))

    def leave(status):
        raise SystemExit(status)

    windows = SimpleNamespace(OpenProcess=lambda *words: words, WaitForSingleObject=wait, INFINITE=-1)
    monkeypatch.setitem(sys.modules, "_winapi", windows)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="1"):
        _end_with(os.getppid())  # which there stays the same when the parent is gone
    assert calls == [((0x00100000, False, os.getppid()), -1)]
    assert "another process of this run is gone" in capsys.readouterr().err
