"""Everything that only an accelerator can tell, in one command of under ten minutes: `make gpu`.

    python benchmarks/gpu.py [--out benchmarks/results/gpu] [--page docs/gpu.md] [--fashion-mnist FOLDER]

The tests of devices run on it, then the quickstart, the training step at the papers' width (utilization against a measured
matrix product, eager and compiled), the alignment's gradients at full width, and decoding at batch 1, 8 and 64, by a flow
that is trained for it: with 256 tokens on Fashion-MNIST where its files are here, or else with 64 on digits. Each writes a
JSON into the folder, and all of them the tables of the page. A part that fails is named there, with its last lines.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from flowback.core.devices import machine, pick_device
from flowback.data.datasets import DEBIAN_FASHION_MNIST

ROOT = Path(__file__).parents[1]
DIGITS = ["--config=configs/digits.yaml", "--alignment.strategy=none", "--flow.patch_size=1", "--flow.width=256"]
DIGITS += ["--flow.blocks=8", "--flow.layers=4", "--train.steps=300", "--train.precision=bf16-mixed", "--train.lr=1e-3"]
FASHION = ["--config=configs/fashion_mnist_patch2.yaml", "--train.steps=300"]


def parts(out: Path, device: str, fashion: Path) -> dict[str, tuple[list[str], int]]:
    """Name -> command, and seconds after which it is stopped."""
    decoded = [*FASHION, f"--data.path={fashion}"] if fashion.is_dir() else DIGITS
    python, flowback = [sys.executable], [sys.executable, "-m", "flowback"]
    run, training = str(out / "runs" / "decoded"), ["benchmarks/training.py", "--recipe=imagenet64", "--repeats=5"]
    return {
        "tests": ([*python, "-m", "pytest", "-q", "-n4", "tests/test_devices.py"], 100),
        "quickstart": ([*flowback, "quickstart", f"--run={out / 'runs' / 'quickstart'}", "--steps=300"], 60),
        "training": ([*python, *training, "--batch=32", "--precisions=bf16-mixed", f"--json={out / 'training.json'}"], 90),
        "alignment": (
            [*python, "benchmarks/alignment.py", "--width=1024", "--batch=8", "--repeats=3", "--precision=bf16-mixed",
             f"--json={out / 'alignment.json'}"],
            80,
        ),
        "flow to decode": ([*flowback, "train", *decoded, f"--run={run}", f"--device={device}"], 70),
        "decoding": (
            [*python, "benchmarks/decoding.py", run, "--batches=1,8,64", "--guidance=0", "--repeats=2", "--compile",
             f"--json={out / 'decoding.json'}"],
            195,
        ),
    }  # fmt: skip


def table(rows: list[dict]) -> list[str]:
    """Rows of a JSON as a table in Markdown; what is nested becomes columns of its own."""
    flat = [
        {f"{k} {n}": v for k, value in row.items() if isinstance(value, dict) for n, v in value.items()} for row in rows
    ]
    flat = [{k: v for k, v in row.items() if not isinstance(v, dict)} | more for row, more in zip(rows, flat, strict=True)]
    names = list(dict.fromkeys(name for row in flat for name in row))
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in flat:
        texts = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row.get(name, "") for name in names))
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def main() -> int:
    """Run the parts and write the page. Returns 1 if a part failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", default="benchmarks/results/gpu")
    options.add_argument("--page", default="docs/gpu.md")
    options.add_argument("--fashion-mnist", type=Path, default=DEBIAN_FASHION_MNIST, help="a folder of its IDX files")
    options.add_argument("--device", default="auto")
    o = options.parse_args()
    device = pick_device(o.device)
    if device.type == "cpu":
        print("there is no accelerator here; make gpu is for a machine that has one", file=sys.stderr)
        return 2
    out = ROOT / o.out
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "FLOWBACK_TEST_DEVICE": device.type}
    page = ["# On an accelerator", "", f"Written by `make gpu` on {machine(device)}.", "", "| part | result | seconds |"]
    page.append("|---|---|---|")
    failed, details = False, []
    for name, (command, limit) in parts(out, device.type, o.fashion_mnist).items():
        print(f"{name} …", flush=True)
        started = time.perf_counter()
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
            said, result = done.stdout + done.stderr, "passed" if done.returncode == 0 else f"status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            said, result = bytes(error.stdout or b"").decode(), f"stopped after {limit} s"
        page.append(f"| {name} | {result} | {time.perf_counter() - started:.0f} |")
        (out / f"{name.replace(' ', '_')}.log").write_text(said)
        if result != "passed":
            failed = True
            details += ["", f"## {name}: {result}", "", "```", *said.strip().splitlines()[-20:], "```"]
        print(f"{name}: {result}", flush=True)
    for name in ("training", "alignment", "decoding"):
        file = out / f"{name}.json"
        if file.is_file():
            content = json.loads(file.read_text())
            rows = content.get("steps") or content["rows"]
            details += ["", f"## {name}", "", *table(rows)]
    (ROOT / o.page).write_text("\n".join([*page, *details]) + "\n")
    print(f"{o.page} and {o.out} say what came out")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
