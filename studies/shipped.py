"""Makes the flows that come with the package, from finished runs, and their students.

    flowback train --config configs/digits.yaml --run runs/digits
    python studies/latents/latent_study.py --only pixels_all,pca_32_longest_reverse --seeds 0    # the two of Fashion-MNIST
    python studies/shipped.py flow runs/digits digits --draws 4
    python studies/shipped.py flow runs/studies/latents/flow/pixels_all-0 fashion_mnist
    python studies/shipped.py flow runs/studies/latents/flow/pca_32_longest_reverse-0 fashion_mnist_semantic --draws 4
    python studies/shipped.py student digits --steps 1500 --width 64 --layers 4 --lr 4e-3
    python studies/shipped.py student fashion_mnist --steps 5000
    python studies/shipped.py student fashion_mnist_semantic --steps 5000

A flow's weights are rounded to bfloat16, which halves the file, and only then measured: the figures of its card are of what
is shipped. Its student is trained on the rounded flow, and rounded, too; its own figures are in student/README.md. Loaded,
both are float32, so inverses and likelihoods are exact as ever. The students' runs are in runs/shipped; what was cut off
goes on.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from common import markdown
from flowback import classify, from_pretrained
from flowback.core.files import file_hash, write_whole
from flowback.flow.io import CARD, OWNER, SHIPPED, WEIGHTS
from flowback.flow.student import StudentConfig
from flowback.latents import Flow
from flowback.reports.card import export, of_student
from flowback.reports.evaluate import EvaluationConfig, evaluate
from flowback.runs.checkpoint import newest
from flowback.runs.config import DataConfig, DistillRunConfig, TrainConfig
from flowback.training.distillation import distill

CHECKSUMS = "checksums.json"
LICENSE = "apache-2.0"
SAMPLES = 500  # by which a student is measured
SETTINGS = ((1, 0.0), (2, 0.0), (4, 0.0), (8, 0.0), (2, 1.0), (4, 1.0))  # its steps, and guidance


def rounded(file: Path) -> None:
    """Round the weights in a file to bfloat16."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    write_whole(file, lambda whole: save_file(weights, whole))


def ship(run: Path, name: str, images: int, draws: int) -> Path:
    """Measure the flow of a run as it will be shipped, and write it into the package."""
    folder = SHIPPED / name
    with TemporaryDirectory() as temporary:
        copy = Path(temporary) / name
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("events", "samples", "training.safetensors"))
        checkpoint = newest(copy)
        assert checkpoint is not None
        rounded(checkpoint / WEIGHTS)
        evaluate(copy, EvaluationConfig(metrics=("bpd", "accuracy"), images=images, draws=draws), device="auto")
        shutil.rmtree(folder, ignore_errors=True)
        export(str(copy), folder, license=LICENSE, repo_id=f"{OWNER}/{name}")
    rounded(folder / WEIGHTS)
    return seal(folder)


def ship_student(name: str, train: TrainConfig, network: StudentConfig) -> Path:
    """Train a student of a flow of the package, and put it beside the flow, rounded and then measured."""
    folder, teacher = SHIPPED / name, Path("runs/shipped") / name
    if not teacher.exists():
        export(f"{OWNER}/{name}", teacher)
    data = DataConfig(name="digits" if name == "digits" else "fashion_mnist")
    config = DistillRunConfig(teacher=str(teacher), data=data, student=network, train=train)
    result = distill(replace(config, train=replace(train, resume=newest(config.folder) is not None)))
    if result.interrupted:
        sys.exit(f"interrupted at step {result.state.step}; the same command goes on from there")
    student, card = folder / "student", (folder / CARD).read_text()
    shutil.rmtree(student, ignore_errors=True)
    shutil.copytree(teacher / "student", student)
    rounded(student / WEIGHTS)
    flow = from_pretrained(str(folder))
    (student / CARD).write_text(student_card(flow, name, train))
    if (said := of_student(flow.core.student)) not in card:
        before, after = card.split("Images are `[B")
        (folder / CARD).write_text(f"{before}{said}\n\nImages are `[B{after}")
    return seal(folder)


def student_card(flow: Flow, name: str, train: TrainConfig) -> str:
    """How a student was trained, and how many of its samples the flow takes for the class that was asked for."""
    y, rows = torch.arange(SAMPLES) % flow.num_classes, []
    for steps, guidance in SETTINGS:
        x = flow.sample(y=y, sampler="student", steps=steps, guidance=guidance, seed=0)
        right = (classify(flow, x, "exact").argmax(dim=1) == y).float().mean()
        rows.append([str(steps), f"{guidance:g}", f"{100 * float(right):.0f} %"])
    c = flow.core.student.config
    return f"""# The student of {OWNER}/{name}

It draws in a few passes: `from_pretrained("{OWNER}/{name}").sample(8, sampler="student", steps=4)`. Flow matching from the
flow's own z, a transformer of {c.layers} layers and width {c.width}, trained on the images of the flow: {train.steps} steps
of {train.batch_size}, learning rate {train.lr:g}, EMA {train.ema:g}, seed {train.seed}. License: {LICENSE}.

The share of {SAMPLES} samples that the flow itself, by `exact`, takes for the class that was asked for:

{markdown(["steps", "guidance", "right"], rows)}
"""


def seal(folder: Path) -> Path:
    """Write the checksums of a flow of the package."""
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # others read what is installed
    sums = {str(file.relative_to(folder)): file_hash(file) for file in sorted(folder.rglob("*.safetensors"))}
    write_whole(folder / CHECKSUMS, lambda whole: whole.write_text(json.dumps(sums, indent=1) + "\n"))
    return folder


def main() -> None:
    """Ship one flow, or the student of one that is shipped."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = options.add_subparsers(dest="what", required=True)
    flow = what.add_parser("flow", help="of a finished run")
    flow.add_argument("run", type=Path)
    flow.add_argument("name", help="under which the package has it, after flowback/")
    flow.add_argument("--images", type=int, default=2000, help="held-out images by which it is measured")
    flow.add_argument("--draws", type=int, default=1, help="of the noise, averaged in its accuracy")
    student = what.add_parser("student", help="of a flow of the package")
    student.add_argument("name", help="of the flow, after flowback/")
    student.add_argument("--steps", type=int, required=True)
    student.add_argument("--lr", type=float, default=2e-3)
    student.add_argument("--width", type=int, default=128)
    student.add_argument("--layers", type=int, default=6)
    o = options.parse_args()
    if o.what == "flow":
        folder = ship(o.run, o.name, o.images, o.draws)
    else:
        train = TrainConfig(steps=o.steps, batch_size=64, lr=o.lr, warmup=200, ema=0.998, eval_every=1000)
        train = replace(train, sample_every=o.steps, checkpoint_every=500, keep=1)
        folder = ship_student(o.name, train, StudentConfig(width=o.width, layers=o.layers))
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
