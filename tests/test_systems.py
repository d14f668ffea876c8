"""What other systems lack: POSIX modules, fork, locks of files. Simulated on this one, in processes of their own."""

import errno
import subprocess
import sys
import textwrap
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image

from builders import SMALL_RUN
from flowback.data import DataConfig, batches, load_data

WITHOUT_POSIX = """
    import multiprocessing, os, sys
    for name in ("fcntl", "pwd", "grp", "resource", "termios"):
        sys.modules[name] = None
    for name in ("fork", "pread", "posix_fadvise", "getuid", "geteuid"):
        if hasattr(os, name):
            delattr(os, name)

    if __name__ == "__main__":
        multiprocessing.set_start_method("spawn")
        import importlib, pkgutil, torch
        torch.set_num_threads(1)
        import flowback
        for module in pkgutil.walk_packages(flowback.__path__, "flowback."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        from flowback.cli import main
        run, out, image, *small = sys.argv[1:]
        train = ["train", f"--run={run}", "--train.steps=4", "--train.eval_every=4", "--data.workers=1", *small]
        assert main([*train, "--train.until=2"]) == 0
        assert main([*train, "--train.resume"]) == 0
        assert main(["sample", run, "--num", "2", "-o", f"{out}/a.png"]) == 0
        assert main(["sample", run, "--num", "66", "--processes", "2", "-o", f"{out}/a.npz"]) == 0
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
    words = [sys.executable, str(script), str(tmp_path / "run"), str(tmp_path), str(image), *SMALL_RUN]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.glob("?.*")) == ["a.npz", "a.png", "b.png", "z.safetensors"]


HOLDER = """
    import fcntl, sys, time
    from pathlib import Path
    if int(sys.argv[1]):
        def flock(*args):
            raise OSError(int(sys.argv[1]), "no locks here")
        fcntl.flock = flock
    from flowback.training.run import _lock
    with _lock(Path(sys.argv[2])):
        print("held", flush=True)
        time.sleep(float(sys.argv[3]))
"""


@pytest.mark.parametrize("code", [0, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_run_is_locked_with_and_without_locks_of_the_file_system(code, tmp_path):
    def hold(seconds):
        words = [sys.executable, "-c", textwrap.dedent(HOLDER), str(code), str(tmp_path), str(seconds)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    (tmp_path / ".lock").touch()  # of an earlier run
    first = hold(100)
    assert first.stdout.readline() == "held\n"
    said, complaint = hold(0).communicate(timeout=60)
    assert said == ""
    assert "another process trains in" in complaint
    first.kill()
    first.communicate()
    said, complaint = hold(0).communicate(timeout=60)  # the lock of a process that is gone is none
    assert said == "held\n", complaint


def spawned_batches(config, queue):
    torch.multiprocessing.set_start_method("spawn", force=True)
    data = load_data(config)
    queue.put([(raw.indices.tolist(), raw.images.sum().item()) for raw in batches(data.train, 4, 0, 0, 3, workers=2)])


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_processes_that_read_ahead_may_be_spawned(name, tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (6, 8, 8), dtype=np.uint8)):
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    config = DataConfig(name="folder", path=str(tmp_path), image_size=8, channels=1) if name == "folder" else DataConfig()
    wanted = [(raw.indices.tolist(), raw.images.sum().item()) for raw in batches(load_data(config).train, 4, 0, 0, 3)]
    context = get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=spawned_batches, args=(config, queue))
    process.start()
    assert queue.get(timeout=100) == wanted
    process.join(60)
