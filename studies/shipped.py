"""Makes the flows that come with the package, from finished runs.

    flowback train --config configs/digits.yaml --run runs/digits
    python studies/latents/latent_study.py --only pixels_all,pca_32_all --seeds 0    # the two of Fashion-MNIST
    python studies/shipped.py runs/digits digits --draws 4 --student 1500
    python studies/shipped.py runs/studies/latents/flow/pixels_all-0 fashion_mnist
    python studies/shipped.py runs/studies/latents/flow/pca_32_all-0 fashion_mnist_semantic

A flow's weights are rounded to bfloat16, which halves the file, and only then measured: the figures of its card are of what
is shipped. Its student is trained on the rounded flow, and rounded, too. Loaded, both are float32, so inverses and
likelihoods are exact as ever.
"""

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from flowback.core.files import file_hash, write_whole
from flowback.flow.io import CARD, OWNER, SHIPPED
from flowback.flow.student import StudentConfig
from flowback.reports.card import export
from flowback.reports.evaluate import EvaluationConfig, evaluate
from flowback.runs.checkpoint import newest
from flowback.runs.config import DistillRunConfig, RunConfig, TrainConfig
from flowback.training.distillation import distill

CHECKSUMS = "checksums.json"
ROUNDED = ("model.safetensors", "student/model.safetensors")
LICENSE = "apache-2.0"


def rounded(file: Path) -> None:
    """Round the weights in a file to bfloat16."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    write_whole(file, lambda whole: save_file(weights, whole))


def ship(run: Path, name: str, images: int, draws: int, student: int) -> Path:
    """Measure the flow of a run as it will be shipped, with a student of so many steps, and write it into the package."""
    folder = SHIPPED / name
    with TemporaryDirectory() as temporary:
        copy = Path(temporary) / name
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("events", "samples", "training.safetensors"))
        checkpoint = newest(copy)
        assert checkpoint is not None
        rounded(checkpoint / "model.safetensors")
        if student:
            train = TrainConfig(steps=student, batch_size=64, lr=4e-3, warmup=100, ema=0.99, eval_every=student)
            recipe = RunConfig.read(copy / "config.yaml")
            network = StudentConfig(width=recipe.flow.width, layers=recipe.flow.blocks)
            distill(DistillRunConfig(teacher=str(copy), data=recipe.data, student=network, train=train))
        evaluate(copy, EvaluationConfig(metrics=("bpd", "accuracy"), images=images, draws=draws), device="auto")
        shutil.rmtree(folder, ignore_errors=True)
        export(str(copy), folder, license=LICENSE, repo_id=f"{OWNER}/{name}")
    for file in ROUNDED:
        if (folder / file).exists():
            rounded(folder / file)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # others read what is installed
    sums = {str(file.relative_to(folder)): file_hash(file) for file in sorted(folder.rglob("*.safetensors"))}
    write_whole(folder / CHECKSUMS, lambda whole: whole.write_text(json.dumps(sums, indent=1) + "\n"))
    return folder


def main() -> None:
    """Ship one flow."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run", type=Path, help="of the flow")
    options.add_argument("name", help="under which the package has it, after flowback/")
    options.add_argument("--images", type=int, default=2000, help="held-out images by which it is measured")
    options.add_argument("--draws", type=int, default=1, help="of the noise, averaged in its accuracy")
    options.add_argument("--student", type=int, default=0, help="training steps of its student; 0 for none")
    o = options.parse_args()
    folder = ship(o.run, o.name, o.images, o.draws, o.student)
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    print(f"{folder}: {size / 1e6:.1f} MB; its figures are in {CARD}")


if __name__ == "__main__":
    main()
