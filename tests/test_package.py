"""What is installed: the flow needs six packages, a command names the one that it lacks, the wheel has all that runs."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Collection
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from flowback.cli import EXTRAS, VERBS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

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
from flowback import FlowConfig, Guidance, LatentFlow, TarFlow, classify, from_pretrained

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
CALL = """
from contextlib import suppress
from flowback.cli import main
for verb in VERBS:
    with suppress(SystemExit):
        main([*verb.split(), *WORDS])
"""


HEAVY = {"torchvision", "timm", "lightning_fabric", "sklearn", "matplotlib", "rich", "diffusers", "torch_fidelity"}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_with(names: Collection[str]) -> set[str]:
    """The distributions that come with these, themselves included."""
    found, todo = set(), [*names]
    while todo:
        name = plain(todo.pop())
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        needed = [Requirement(line) for line in lines]
        todo += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def alone(program: str, hidden: Collection[str], **names: object) -> subprocess.CompletedProcess[str]:
    """Run a program, with these names, in which some modules cannot be imported."""
    names["HIDDEN"] = set(hidden)
    first = "\n".join(f"{name} = {value!r}" for name, value in names.items())
    return subprocess.run([sys.executable, "-c", f"{first}\n{HIDE}\n{program}"], capture_output=True, text=True)


@pytest.fixture(scope="module")
def beyond_base() -> set[str]:
    """The modules that `pip install flowback` does not bring."""
    base = installed_with([Requirement(line).name for line in PROJECT["dependencies"]])
    owners = importlib.metadata.packages_distributions()
    hidden = {module for module, names in owners.items() if not base & {plain(name) for name in names}}
    assert HEAVY | {"jsonargparse"} <= hidden
    return hidden - {"flowback", "packaging"}


def test_the_flow_needs_the_base_only(beyond_base):
    done = alone(WORK, beyond_base)
    assert done.stdout == "fine\n", done.stderr


def test_every_verb_names_the_package_and_the_extra_that_it_lacks(beyond_base):
    done = alone(CALL, beyond_base, VERBS=["--help", *VERBS], WORDS=[])
    lines = done.stderr.splitlines()
    assert len(lines) == 1 + len(VERBS), done.stderr
    assert set(lines) == {"flowback: error: this needs the package jsonargparse: pip install 'flowback[train]'"}


def test_only_what_measures_fidelity_needs_what_measures_it():
    done = alone(CALL, EXTRAS["eval"] | EXTRAS["latent"], VERBS=["classify", "evaluate"], WORDS=["--help"])
    assert "usage: flowback [options] classify" in done.stdout
    assert "usage: flowback [options] evaluate" in done.stdout
    assert done.stderr == ""


def test_the_table_of_extras_is_that_of_the_project():
    extras = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
    for extra, packages in EXTRAS.items():
        wanted = {r.name for r in extras[extra] if r.name != "flowback"}
        assert {name for name in packages.values() if name != "docstring-parser"} == wanted  # which signatures bring
    assert set(EXTRAS) <= set().union(*(r.extras for r in extras["all"]))
    assert "all" in extras["dev"][0].extras


def test_the_help_is_light():
    done = alone(CALL, HEAVY | {"torch", "numpy"}, VERBS=["--help"], WORDS=[])
    assert done.stderr == ""
    assert all(f"\n    {verb.split()[0]} " in done.stdout for verb in VERBS)


def test_the_wheel_runs_outside_the_source_tree(tmp_path):
    """In an environment of its own, which sees this one's packages, flowback itself excepted."""
    pytest.importorskip("hatchling")
    build = f"from hatchling.build import build_wheel; build_wheel({str(tmp_path)!r})"  # what pip calls
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("flowback-*.whl")
    source = {file for file in (ROOT / "src" / "flowback").rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    wanted = {file.relative_to(ROOT / "src").as_posix() for file in source}
    wanted |= {f"flowback/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "configs").rglob("*.yaml")}
    assert wanted <= set(ZipFile(wheel).namelist())
    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / Path(sys.executable).name
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", str(python)]
    install = [*pip, "install", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    ask = [str(python), "-c", "import site; print(site.getsitepackages()[0])"]
    own = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    (own / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = "import flowback.core.errors; print(flowback.__file__)"
    commands = [[str(python), "-c", program], [str(python.with_name("flowback")), "--help"]]
    said = [subprocess.run(each, cwd=tmp_path, env=environment, capture_output=True, text=True) for each in commands]
    assert said[0].stdout == f"{own / 'flowback' / '__init__.py'}\n", said[0].stderr
    assert "flowback COMMAND" in said[1].stdout, said[1].stderr
