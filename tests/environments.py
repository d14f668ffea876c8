"""Installs the built wheel in fresh environments and uses it there; prints rows of the table in docs/platforms.md.

    python tests/environments.py [--only base,train,eval,latent,studio,all] [--oldest] [--folder FOLDER]

The Python that runs this file is the one that is tried. Each row is an environment of its own, in which the package does
what its extra is for; `all` runs the whole test suite. `--oldest` installs the oldest release of each dependency that
pyproject.toml allows, as uv finds them (it must be on the PATH). A failure prints the end of the output of what failed, and
the next row follows. Takes minutes and several GB a row.
"""

import argparse
import json
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("torch", "numpy", "timm", "diffusers", "gradio")  # whose versions the table names
TESTERS = ("pytest", "pytest-xdist", "hypothesis", "scikit-image", "ninja", "playwright", "hatchling")
DRAW = """
from flowback import classify, from_pretrained
flow = from_pretrained("flowback/digits")
x = flow.sample(y=[3, 7], guidance=1.0, seed=0)
z, _ = flow.encode(x, y=[3, 7])
assert (flow.decode(z, y=[3, 7]) - x).abs().max() < 1e-4
assert classify(flow, x).argmax(dim=1).tolist() == [3, 7]
"""
SHORT = "--train.steps 20 --train.eval_every 20 --train.sample_every 20"
TRAIN = f"flowback train --config configs/digits.yaml --run run {SHORT}"
USES = {
    "base": ["python draw.py"],
    "train": [TRAIN, "flowback sample run --num 4 -o grid.png", "flowback evaluate run --images 50"],
    "eval": [TRAIN, "flowback evaluate run --metrics fid --samples 50"],
    "latent": [
        f"flowback autoencoder train --kind kl --data.name digits --kl.downsample 2 --run kl {SHORT}",
        f"flowback train --data.name digits --latents.autoencoder kl --flow.patch_size 1 --run flow {SHORT}",
        "flowback sample flow --num 4 -o grid.png",
    ],
    "studio": ["flowback studio --port {port}"],  # ended once it has answered
    "all": ["python -m pytest -n 2 --dist worksteal tests"],
}


def run(words: Sequence[str], folder: Path, log: Path, environment: Path) -> bool:
    """Run a command of an environment in a folder; whether it succeeded."""
    words = [str(environment / "bin" / words[0]), *words[1:]]
    with log.open("a") as out:
        print("$", *words, file=out, flush=True)
        return subprocess.call(words, cwd=folder, stdout=out, stderr=out) == 0


def serves(words: Sequence[str], folder: Path, log: Path, environment: Path) -> bool:
    """Whether a command that serves a page comes to answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(environment / "bin" / words[0]), *(word.format(port=port) for word in words[1:])]
    with log.open("a") as out, subprocess.Popen(words, cwd=folder, stdout=out, stderr=out) as server:
        try:
            for _ in range(120):
                time.sleep(1)
                try:
                    return urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).status == 200
                except OSError:
                    if server.poll() is not None:
                        return False
            return False
        finally:
            server.terminate()


def try_row(extra: str, wheel: Path, oldest: bool, folder: Path) -> str:
    """One row of the table: an environment made, used and deleted."""
    environment, log = folder / "environment", folder / f"{extra}.txt"
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    install = ["python", "-m", "pip", "install", "-qq", f"{wheel}[{extra}]" if extra != "base" else str(wheel)]
    if oldest:
        install += ["-c", str(oldest_versions(extra, folder))]
    done = run(install, folder, log, environment)
    if extra == "all":
        done = done and run(["python", "-m", "pip", "install", "-qq", *TESTERS], folder, log, environment)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        (Path(work) / "draw.py").write_text(DRAW)
        for words in USES[extra]:
            act = serves if extra == "studio" else run
            done = done and act(words.split(), ROOT if extra == "all" else Path(work), log, environment)
    if not done:
        print(log.read_text()[-3000:], file=sys.stderr, flush=True)
    versions = versions_in(environment)
    shutil.rmtree(environment)
    kind = "oldest" if oldest else "newest"
    words = [platform.python_version(), extra, kind, ", ".join(versions), "yes" if done else "**no**"]
    return f"| {' | '.join(words)} |"


def oldest_versions(extra: str, folder: Path) -> Path:
    """A file with the oldest releases that are allowed."""
    file = folder / f"oldest-{extra}.txt"
    words = ["uv", "pip", "compile", ROOT / "pyproject.toml", "--resolution", "lowest-direct", "-qq", "--no-header"]
    words += ["--python-version", platform.python_version(), "--no-annotate", "--output-file", file]
    subprocess.run(words + (["--extra", extra] if extra != "base" else []), check=True, stdout=subprocess.DEVNULL)
    return file


def versions_in(environment: Path) -> list[str]:
    """The dependencies that the table names, as they are installed."""
    words = [environment / "bin/python", "-m", "pip", "list", "--format", "json"]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return [f"{package['name']} {package['version']}" for package in found if package["name"] in SHOWN]


def main() -> None:
    """Try the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(USES), help="rows, with commas")
    parser.add_argument("--oldest", action="store_true", help="the oldest dependencies that are allowed")
    parser.add_argument("--folder", type=Path, default=None, help="where environments and logs go")
    o = parser.parse_args()
    if unknown := sorted(set(o.only.split(",")) - set(USES)):
        parser.error(f"rows {', '.join(unknown)} do not exist; allowed: {', '.join(USES)}")
    if o.oldest and shutil.which("uv") is None:
        parser.error("--oldest needs uv: pip install uv")
    folder = (o.folder or Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "builder"], check=True)
    subprocess.run([folder / "builder/bin/python", "-m", "pip", "install", "-qq", "build"], check=True)
    subprocess.run([folder / "builder/bin/python", "-m", "build", "--wheel", "--outdir", folder, ROOT], check=True)
    wheel = next(folder.glob("*.whl"))
    print("| Python | extra | dependencies | among them | works |\n|---|---|---|---|---|", flush=True)
    for extra in o.only.split(","):
        print(try_row(extra, wheel, o.oldest, folder), flush=True)


if __name__ == "__main__":
    main()
