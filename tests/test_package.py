"""What is installed: the flow needs six packages and says what a command lacks; the wheel has all that runs."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from flowback.cli import VERBS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = [Requirement(line).name for line in PROJECT["dependencies"]]

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
WORK = """
import tempfile, torch
import flowback
from flowback import LatentFlow, TarFlow, classify, from_pretrained
from flowback.latents import Autoencoder

flow = TarFlow(image_size=8, channels=1, patch_size=4, width=32, blocks=2, layers=1, num_classes=10)
x = flow.sample(2, y=[3, 7], guidance=1.0, seed=0)
z, log_det = flow.encode(x, [3, 7])
assert (flow.decode(z, [3, 7]) - x).abs().max() < 1e-3
assert classify(flow, x, rule="exact").shape == (2, 10)
with tempfile.TemporaryDirectory() as folder:
    flow.save_pretrained(folder)
    again = from_pretrained(folder)
assert torch.equal(again.encode(x, [3, 7])[0], z)
print("fine")
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_with(names: list[str]) -> set[str]:
    """The distributions that come with these, themselves included."""
    found, todo = set(), [*names]
    while todo:
        name = normal(todo.pop())
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        needed = [Requirement(line) for line in lines]
        todo += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def alone(program: str, shown: set[str] = frozenset(), **options) -> subprocess.CompletedProcess:
    """Run a program that sees the base's packages only, and those `shown`."""
    base = installed_with(BASE)
    owners = importlib.metadata.packages_distributions()
    hidden = {module for module, names in owners.items() if not base & {normal(name) for name in names}}
    hidden -= {"flowback", *shown}
    command = [sys.executable, "-c", f"HIDDEN = {hidden!r}\n{HIDE}\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_the_flow_needs_the_base_only():
    done = alone(WORK)
    assert done.stdout == "fine\n", done.stderr


def test_importing_the_package_and_the_help_are_light():
    heavy = {"torchvision", "timm", "lightning_fabric", "sklearn", "matplotlib", "rich", "diffusers", "torch_fidelity"}
    program = (
        f"import sys, flowback; assert not {heavy | {'torch'}} & set(sys.modules); flowback.TarFlow, flowback.LatentFlow"
    )
    program += f"; flowback.classify; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    program = "import sys; from flowback.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"    {verb} " in done.stdout for verb in VERBS)
