"""Bad input, as users give it: a table of commands, each with the parts that its one sentence must have, between bars:
which value it is, and what it must be.

Every command runs in a folder that `world` makes; names in it are relative. Status 2, one line, and the folder stays as it
was, to the byte. `docs/robustness.md` counts the rows.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from builders import SMALL_RUN, random_flow, refuse, student_of, tiny_autoencoder
from flowback import TarFlow
from flowback.cli import main
from flowback.data import DataConfig, folders, load_data
from flowback.latents.semantic import SemanticAutoencoder, SemanticConfig


class Code:
    """What runs a command as it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


# ---- what lies in the folder ----------------------------------------------------------------------------------------


def png(width: int, height: int, rows: bytes, depth: int = 8) -> bytes:
    """A grey PNG that says it has some size, whatever its rows are."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def write_images(root: Path) -> None:
    root.mkdir()
    for k, digit in enumerate(load_digits().images[:3]):
        Image.fromarray((digit * 15).astype(np.uint8)).save(root / f"{k}.png")
    whole = (root / "0.png").read_bytes()
    (root / "text.png").write_text("no image")
    (root / "zero.png").write_bytes(b"")
    (root / "truncated.png").write_bytes(whole[: len(whole) // 2])
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(root / "whole.jpg")
    (root / "truncated.jpg").write_bytes((root / "whole.jpg").read_bytes()[:500])
    spoiled = bytearray(whole)
    spoiled[45:50] = b"spoil"
    (root / "spoiled.png").write_bytes(spoiled)
    (root / "bomb.png").write_bytes(png(50_000, 50_000, b""))
    (root / "huge.png").write_bytes(png(10_000, 10_000, bytes(10_001 * 10_000)))
    (root / "short.png").write_bytes(png(64, 64, bytes(65)))
    (root / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(EXECUTED) (w) file closefile\n")
    (root / "drawing.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    Image.new("RGB", (8, 8)).save(root / "painting.png", "PCX")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(root / "float.tif")
    Image.fromarray(np.full((8, 8), 2**20, np.int32)).save(root / "deep.tif")
    os.mkfifo(root / "pipe.png")
    (root / "gone.png").symlink_to("nowhere.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "folder.png").mkdir()


def tree(root: Path, **counts: int) -> Path:
    """Class folders with so many images each."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (9, 9), (i, 0, 0)).save(root / name / f"{i}.png")
    return root


def write_trees(root: Path) -> None:
    tree(root / "good", cat=4, dog=4)
    (root / "empty").mkdir()
    tree(root / "one_class", only=4)
    tree(root / "empty_class", cat=4, dog=4, bird=0)
    tree(root / "one_image", cat=4, dog=1)
    tree(root, flat=4, flat_one=1)
    tree(root / "flat_parts", train=4, Val=2)
    for part in ("train", "Train", "val"):
        tree(root / "two_trains" / part, cat=4, dog=4)
    tree(root / "hidden", **{".cat": 4, ".dog": 4})
    tree(root / "bare_val", cat=4, dog=4)
    (root / "bare_val").rename(root / "train")
    (root / "bare_val" / "val").mkdir(parents=True)
    (root / "train").rename(root / "bare_val" / "train")
    for part, classes in (("train", {"cat": 4, "dog": 4}), ("val", {"cat": 4, "cow": 4})):
        tree(root / "other_val" / part, **classes)
    tree(root / "looped", cat=4, dog=4)
    (root / "looped" / "loop").symlink_to("loop")
    tree(root / "unreadable", cat=4, dog=4)
    for file in (root / "unreadable").glob("*/*.png"):
        file.write_text("no image")
    tree(root / "pipes", cat=4, dog=0)
    for i in range(4):
        os.mkfifo(root / "pipes" / "dog" / f"{i}.png")
    tree(root / "large", cat=4, dog=4)
    for file in (root / "large").glob("*/*.png"):
        os.truncate(file, 2**31)  # sparse
    tree(root / "dangling", cat=4, dog=0)
    for i in range(4):
        (root / "dangling" / "dog" / f"{i}.png").symlink_to("nowhere.png")
    tree(root / "locked", cat=4, dog=4)
    (root / "file").write_text("no folder")


def tar(file: Path, members: dict[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_tars(root: Path, picture: bytes) -> None:
    numbered = {f"{i}.{kind}": content for i in range(6) for kind, content in (("png", picture), ("cls", b"%d" % (i % 2)))}
    tar(root / "good" / "a.tar", numbered)
    whole = (root / "good" / "a.tar").read_bytes()
    for name, content in {
        "truncated": whole[:700],
        "text": b"text" * 500,
        "zero": b"",
        "gzip": zlib.compress(whole),
    }.items():
        (root / name).mkdir()
        (root / name / "a.tar").write_bytes(content)
    (root / "none").mkdir()
    tar(root / "unlabelled" / "a.tar", {f"{i}.png": picture for i in range(4)})
    tar(root / "half_labelled" / "a.tar", {"0.png": picture, **{f"cat/{i}.png": picture for i in range(4)}})
    tar(root / "no_image" / "a.tar", {"1.cls": b"0", "2.cls": b"1"})
    tar(root / "word" / "a.tar", {**numbered, "x.png": picture, "x.cls": b"cat"})
    tar(root / "negative" / "a.tar", {**numbered, "x.png": picture, "x.cls": b"-1"})
    tar(root / "beyond" / "a.tar", {**numbered, "x.png": picture, "x.cls": b"9999999"})
    tar(root / "json" / "a.tar", {**numbered, "x.png": picture, "x.json": b"{"})
    tar(root / "deep_json" / "a.tar", {**numbered, "x.png": picture, "x.json": b"[" * 100_000})
    tar(root / "twice" / "a.tar", {**numbered, "x.png": picture, "x.jpg": picture, "x.cls": b"0"})
    sparse = tarfile.TarInfo("hole.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    (root / "sparse").mkdir()
    (root / "sparse" / "a.tar").write_bytes(sparse.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    tar(root / "names" / "a.tar", numbered)
    (root / "names" / "classes.json").write_text('["cat"]')
    tar(root / "no_names" / "a.tar", numbered)
    (root / "no_names" / "classes.json").write_text('{"cat": 1}')


def write_flows(root: Path, run: Path) -> None:
    """Damaged copies of a flow, and what else is taken for one."""
    whole = run / "checkpoints" / "step_00000002"

    def copy(name: str) -> Path:
        return Path(shutil.copytree(whole, root / name))

    def changed(name: str, change: Callable[[dict], object]) -> None:
        file = copy(name) / "config.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    def tensors(name: str, change: Callable[[dict], object]) -> None:
        file = copy(name) / "model.safetensors"
        content = load_file(file)
        change(content)
        save_file(content, file)

    changed("wide", lambda c: c.update(width=10**9, head_dim=10**9))
    changed("deep", lambda c: c.update(blocks=1000, layers=1000))
    changed("large", lambda c: c.update(image_size=8 * 10**9, patch_size=2 * 10**9))
    for name in ("config.json", "model.safetensors"):
        file = copy(f"pipe_{name}") / name
        file.unlink()
        os.mkfifo(file)
    os.truncate(copy("long_config") / "config.json", 2**40)  # sparse
    changed("version", lambda c: c.update(format=2))
    changed("foreign", lambda c: c.update(model="UNet"))
    changed("option", lambda c: c.update(colour="red"))
    changed("type", lambda c: c.update(width="wide"))
    changed("shape", lambda c: c.update(width=64))
    changed("size", lambda c: c.update(mlp_ratio=1e12))
    changed("patch", lambda c: c.update(patch_size=3))
    changed("classes", lambda c: c.update(num_classes=11))
    tensors("missing", lambda t: t.pop("blocks.1.proj_out.bias"))
    tensors("more", lambda t: t.update(extra=torch.ones(1)))
    tensors("none", lambda t: t.clear())
    tensors("nan", lambda t: t["blocks.1.proj_out.bias"].fill_(float("nan")))
    (copy("no_config") / "config.json").unlink()
    (copy("text_config") / "config.json").write_text("width: 3")
    (copy("list_config") / "config.json").write_text("[]")
    (copy("deep_config") / "config.json").write_text("[" * 100_000)
    (copy("no_weights") / "model.safetensors").unlink()
    (copy("text_weights") / "model.safetensors").write_text("no tensors")
    (copy("zero_weights") / "model.safetensors").write_bytes(b"")
    (copy("header") / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    os.truncate(copy("cut_weights") / "model.safetensors", 5000)
    (copy("pickled") / "model.safetensors").write_bytes(pickle.dumps(Code()))
    (copy("calibration") / "decoding.json").write_text('{"format": 9}')
    (copy("statistics") / "classification.json").write_text('{"format": 1, "mean": [0]}')
    (copy("held_out") / "held_out.safetensors").write_text("no tensors")
    beside = student_of(TarFlow.from_pretrained(whole))
    for name in ("text", "wide", "none", "lesson", "other", "stale"):
        beside.save_pretrained(copy(f"student_{name}") / "student")
    students = {name: root / f"student_{name}" / "student" for name in ("text", "wide", "none", "lesson", "other", "stale")}
    (students["text"] / "config.json").write_text("{")
    (students["none"] / "model.safetensors").unlink()
    known = json.loads((students["wide"] / "config.json").read_text())
    for name, section, values in (
        ("wide", "student", {"width": 2**40, "head_dim": 2**40}),
        ("lesson", "lesson", {"method": "magic"}),
        ("stale", "lesson", {"teacher": "another"}),
    ):
        (students[name] / "config.json").write_text(json.dumps(known | {section: known[section] | values}))
    student_of(random_flow(torch.float32)).save_pretrained(students["other"])
    (copy("prior") / "prior.safetensors").write_text("no tensors")
    (copy("defaults") / "sampling.json").write_text('{"format": 9}')
    (copy("bad_raw") / "training.safetensors").write_text("no tensors")
    (copy("other_raw") / "training.safetensors").unlink()
    save_file({"weights.flow.x": torch.ones(1)}, root / "other_raw" / "training.safetensors")
    for name in ("damaged", "no_yaml", "bad_yaml", "bad_state", "bad_classes"):
        shutil.copytree(run, root / name)
    os.truncate(root / "damaged" / "checkpoints" / "step_00000002" / "training.safetensors", 100)
    (root / "no_yaml" / "config.yaml").unlink()
    (root / "bad_yaml" / "config.yaml").write_text("data: [unclosed")
    (root / "bad_state" / "evaluation.json").write_text("[1")
    (root / "bad_classes" / "classes.json").write_text("[1")
    torch.save({"a": Code()}, root / "code.pth")
    (root / "old.pth").write_bytes(pickle.dumps({"a": Code()}))
    torch.save({"weight": torch.ones(2)}, root / "foreign.pth")
    torch.save([1, 2], root / "list.pth")
    (root / "text.pth").write_text("no tensors")
    save_file({"z": torch.zeros(2, 3, 5), "labels": torch.zeros(2, dtype=torch.long)}, root / "z_shape.safetensors")
    save_file({"z": torch.zeros(2, 4, 16), "labels": torch.tensor([0, 99])}, root / "z_label.safetensors")
    save_file({"z": torch.zeros(2, 4, 16)}, root / "z_alone.safetensors")
    save_file({"z": torch.zeros(0, 4, 16), "labels": torch.zeros(0, dtype=torch.long)}, root / "z_none.safetensors")
    np.savez(root / "objects.npz", arr_0=np.full((2, 8, 8, 1), Code(), dtype=object))
    np.savez(root / "flat.npz", arr_0=np.zeros(5, np.uint8))


def write_models(root: Path) -> None:
    """Encoders and VAEs."""
    root.mkdir()
    torch.save(Code(), root / "code.pth")
    (root / "code.safetensors").write_bytes(pickle.dumps(Code()))
    (root / "text.safetensors").write_text("no tensors")
    torch.save({"conv.weight": torch.ones(3)}, root / "foreign.pth")
    save_file({"conv.weight": torch.ones(3)}, root / "foreign.safetensors")
    tiny_autoencoder(root / "vae")
    tiny_autoencoder(root / "vae_rgb", channels=3)
    for name in ("vae_text", "vae_config", "vae_class", "vae_list", "vae_none", "vae_code", "vae_other"):
        shutil.copytree(root / "vae", root / name)
    weights = "diffusion_pytorch_model.safetensors"
    (root / "vae_text" / weights).write_text("no tensors")
    (root / "vae_config" / "config.json").write_text("{")
    (root / "vae_list" / "config.json").write_text("[]")
    (root / "vae_class" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (root / "vae_none" / weights).unlink()
    (root / "vae_code" / weights).unlink()
    torch.save(Code(), root / "vae_code" / "diffusion_pytorch_model.bin")
    save_file({"conv.weight": torch.ones(3)}, root / "vae_other" / weights)
    for name, change in {"wide": {"block_out_channels": [2**40] * 2}, "scale": {"scaling_factor": 0}, "cut": {}}.items():
        folder = Path(shutil.copytree(root / "vae", root / f"vae_{name}"))
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
    (root / "vae_cut" / f"{weights}.index.json").write_text('{"weight_map": {"a": "../../text.safetensors"}}')
    write_semantic(root)


def write_semantic(root: Path) -> None:
    """Autoencoders in the features of a tiny vision model, whole and damaged."""
    options = SemanticConfig(encoder="test_vit", encoder_weights="random", channels=4, decoder_width=32, decoder_layers=1)
    made = SemanticAutoencoder.new(options, (8, 8), 1)
    made.save_pretrained(root / "semantic")
    damaged = ("text", "none", "facts", "options", "unfit", "wide", "deep", "large", "encoder", "other", "tensor")
    folders = {name: Path(shutil.copytree(root / "semantic", root / f"semantic_{name}")) for name in damaged}
    (folders["text"] / "model.safetensors").write_text("no tensors")
    (folders["none"] / "model.safetensors").unlink()
    changes = {"facts": {"facts": {}}, "options": {"options": {"depth": 3}}, "unfit": {"options": {"channels": 5}}}
    changes |= {"wide": {"options": {"decoder_width": 2**20}}, "deep": {"options": {"decoder_layers": 10**9}}}
    changes |= {"large": {"facts": {"image_size": [2**20, 2**20]}}}
    for name, change in changes.items():
        described = json.loads((folders[name] / "config.json").read_text())
        for section, values in change.items():
            described[section] = values and described[section] | values
        (folders[name] / "config.json").write_text(json.dumps(described))
    save_file({"conv.weight": torch.ones(3)}, folders["encoder"] / "encoder.safetensors")
    other = {name: torch.randn(tensor.shape) for name, tensor in made.encoder.model.state_dict().items()}
    save_file(other, folders["other"] / "encoder.safetensors")
    weights = folders["tensor"] / "model.safetensors"
    save_file(load_file(weights) | {"conv.weight": torch.ones(3)}, weights)


def write_configs(root: Path) -> None:
    root.mkdir()
    texts = {
        "tree": "data: {name: folder, image_size: 8}",
        "tars": "data: {name: shards, image_size: 8}",
        "aligned": "alignment: {strategy: reverse, at: [[1, 1]], projector_width: 16}",
        "latent": "flow: {patch_size: 1}",
        "unknown": "train: {stepz: 3}",
        "section": "trane: {steps: 3}",
        "list": "[1, 2]",
        "word": "train",
        "syntax": "train: {steps: [",
        "tag": "train: !!python/object/apply:os.system ['touch EXECUTED']",
        "null": "train: null",
        "deep": "[" * 20_000,
        "bytes": "\0\0",
        "tab": "train:\n\tsteps: 3",
        "laughs": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
        "number": "train: {lr: fast}",
        "aliases": "a: &a [1, 2]\nb: &b [*a, *a]\ntrain: {steps: *b}",
    }
    for name, text in texts.items():
        (root / f"{name}.yaml").write_text(text)
    (root / "empty.yaml").write_text("")
    (root / "binary.yaml").write_bytes(bytes(range(256)))


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_run) -> Path:
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(small_run, folder / "run")
    assert main(["evaluate", str(folder / "run"), "--metrics=bpd", "--images=10"]) == 0
    write_images(folder / "images")
    write_trees(folder / "trees")
    write_tars(folder / "tars", (folder / "images" / "0.png").read_bytes())
    write_flows(folder / "flows", folder / "run")
    write_models(folder / "models")
    write_configs(folder / "configs")
    (folder / "samples").mkdir()
    for i in range(2):
        Image.new("L", (8, 8), i).save(folder / "samples" / f"{i}.png")
    (folder / "sizes").mkdir()
    for i in (8, 9):
        Image.new("L", (i, i)).save(folder / "sizes" / f"{i}.png")
    shutil.copytree(folder / "run" / "checkpoints" / "step_00000002", folder / "flow")
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("mine")
    return folder


@pytest.fixture(scope="module")
def at_first(world) -> dict[str, str]:
    return contents(world)


# ---- the table ------------------------------------------------------------------------------------------------------

SHORT = {  # in the rows' commands
    "INCEPTION=": "evaluate run --metrics=fid --extractor=inception --samples-from=samples --extractor-weights=",
    "FID=": "evaluate run --metrics=fid --samples-from=",
    "TREE=": "train --config=configs/tree.yaml --data.path=trees/",
    "TARS=": "train --config=configs/tars.yaml --data.path=tars/",
    "ALIGNED": "train --config=configs/aligned.yaml",
    "VAE=": "train --config=configs/latent.yaml --latents.autoencoder=models/",
    "LPIPS=": "autoencoder train --data.name=folder --data.path=samples --data.image_size=16 --semantic.downsample=8 "
    "--reconstruction.lpips=1 --reconstruction.lpips_weights=",
    "DISTILL": "distill run --train.steps=1 --train.batch_size=16 --student.width=16 --student.head_dim=8",
    "JOINT": "train --config=configs/latent.yaml --latents.joint --flow.noise_std=0.5",
}
TABLE: dict[str, list[tuple[str, str]]] = {
    "arguments": [
        ("", "command"),
        ("paint", "paint"),
        ("train --train.stepz=3", "--train.stepz"),
        ("train --train.steps=many", "train.steps"),
        ("sample run --config=nowhere.yaml", "unrecognized arguments: --config=nowhere.yaml"),
        ("train --config=nowhere.yaml", "there is no file nowhere.yaml | recipes of the package | digits"),
        ("classify run", "images"),
        ("sample", "run"),
    ],
    "configs": [
        ("train --config=configs/unknown.yaml", "Group 'train' | 'stepz'"),
        ("train --config=configs/section.yaml", "trane.steps"),
        ("train --config=configs/list.yaml", "[1, 2]"),
        ("train --config=configs/word.yaml", "train"),
        ("train --config=configs/syntax.yaml", "line 2, column 1"),
        ("train --config=configs/tag.yaml", "os.system"),
        ("train --config=configs/null.yaml", "configs/null.yaml | train without options | give some, or leave"),
        ("train --config=configs/deep.yaml", "nesting depth"),
        ("train --config=configs/bytes.yaml", "control characters"),
        ("train --config=configs/binary.yaml", "configs/binary.yaml | text in UTF-8 | recipe, or the"),
        ("train --config=configs/tab.yaml", "line 2, column 1"),
        ("train --config=configs/aliases.yaml", "train.steps"),
        ("train --config=configs/laughs.yaml", "aliases stand for more than 100000 values"),
        ("train --config=configs/number.yaml", "train.lr | fast"),
        ("train --config=trees", "trees"),
        ("train --config=images/0.png", "images/0.png | text in UTF-8 | recipe, or the config.yaml of a"),
        ("train --train.lr=-1", "train.lr | -1.0 | above | 0"),
        ("train --train.lr=nan", "train.lr"),
        ("train --train.lr=inf", "train.lr"),
        ("train --train.steps=0", "train.steps | 0 | at least 1"),
        ("train --train.steps=1.5", "train.steps"),
        ("train --train.batch_size=0", "train.batch_size | 0 | at least 1"),
        ("train --train.batch_size=1000000000000", "train.batch_size | 1000000000000 | at most 1048576"),
        ("train --train.ema=1", "train.ema | 1.0 | from 0 to 1, 1 excluded"),
        ("train --train.betas=[0.9]", "train.betas"),
        ("train --train.betas=[0.9,1.5]", "train.beta | 2 | 1.5 | from 0 to 1, 1 excluded"),
        ("train --train.precision=half", "train.precision | 'half' | 32-true, bf16-mixed"),
        ("train --train.accelerator=abacus", "device | 'abacus'"),
        ("train --train.devices=0", "train.devices | 0 | at least 1"),
        (
            "train --train.grad_accum_steps=3",
            "train.batch_size | 16 | train.grad_accum_steps | 3",
        ),
        ("train --train.hflip=perhaps", "train.hflip"),
        ("train --train.grad_clip=0", "train.grad_clip | 0.0 | above 0, or null"),
        ("train --train.class_dropout=2", "train.class_dropout | 2.0 | from 0 to 1"),
        ("train --train.weight_decay=-1", "train.weight_decay | -1.0 | at least 0"),
        ("train --train.weight_decay=nan", "train.weight_decay"),
        ("train --data.name=cats", "data.name | 'cats' | digits | fashion_mnist | folder | imagenet | shards"),
        ("train --data.image_size=0", "data.image_size | 0 | at least 1"),
        ("train --data.image_size=16", "data.image_size | 16 | digits | 8"),
        ("train --data.channels=2", "data.channels | 2 | 1 (grey) or 3 (color"),
        ("train --data.holdout=1", "data.holdout | 1.0 | between 0 and 1, both excluded"),
        ("train --data.holdout=nan", "data.holdout"),
        ("train --data.unreadable=1", "data.unreadable | 1.0 | from 0 to 1, 1 excluded"),
        ("train --data.unreadable=nan", "data.unreadable"),
        ("train --data.limit=0", "data.limit | 0 | at least 1"),
        ("train --data.workers=-1", "data.workers | -1 | at least 0"),
        ("train --data.workers=100000", "data.workers | 100000 | at most 1000"),
        ("train --flow.patch_size=3", "flow.patch_size | 3 | size | 8 | 1, 2, 4, 8"),
        ("train --flow.patch_size=0", "flow.patch_size | 0 | at least 1"),
        ("train --flow.width=0", "flow.width | 0 | at least 1"),
        ("train --flow.width=wide", "flow.width"),
        ("train --flow.blocks=1000000", "flow.blocks | 1000000 | at most 1000"),
        ("train --flow.mlp_ratio=1e12", "not enough memory"),
        ("train --flow.head_dim=5", "flow.head_dim | 5 | flow.width | 32 | 1, 2, 4, 8, 16, 32"),
        ("train --flow.layers=[1,2,3]", "flow.layers | [1, 2, 3] | from 1 to 1000, or a list of"),
        ("train --flow.layers=0", "flow.layers | 0 | from 1 to 1000, or a list of 2 of them"),
        ("train --flow.mlp=relu", "flow.mlp | 'relu' | gelu, swiglu"),
        ("train --flow.positions=none", "flow.positions | 'none' | learned, rotary"),
        ("train --flow.noise=pink", "flow.noise | 'pink' | gaussian, uniform"),
        ("train --flow.noise_std=-1", "flow.noise_std | -1.0 | at least 0"),
        ("train --flow.noise_std=nan", "flow.noise_std"),
        ("train --flow.log_scale_bound=0", "flow.log_scale_bound | 0.0 | above 0, or null"),
        ("train --flow.image_size=16", "flow.image_size | 16 | 8 for the data set digits"),
        ("train --flow.channels=3", "flow.channels | 3 | 1 for the data set digits"),
        ("train --flow.num_classes=3", "flow.num_classes | 3 | 10 here, or 0 for no classes"),
        ("train --flow.levels=256", "flow.levels | 256 | 17 for the data set digits"),
        ("train --flow.mlp_ratio=0", "flow.mlp_ratio | 0.0 | at least 1/width"),
        ("train --alignment.strategy=sideways", "alignment.strategy | 'sideways' | none, forward, detach"),
        ("train --alignment.strategy=reverse", "at | at least one pair of block and layer"),
        ("ALIGNED --alignment.at=[[9,1]]", "block | 9 | 1 to 2"),
        ("ALIGNED --alignment.at=[[0,1]]", "block | 0 | 1 to 2"),
        ("ALIGNED --alignment.at=[[1,9]]", "layer | 9 | in block 1 | 1 to 1"),
        ("ALIGNED --alignment.at=[[1]]", "alignment.at | [[1]] | pairs of block and layer, like [[3, 2], [4"),
        ("ALIGNED --alignment.at=1", "alignment.at"),
        ("ALIGNED --alignment.gradient=-1", "gradient | -1 | cached, one_step, exact, sequential"),
        ("ALIGNED --alignment.gradient=newton", "alignment.gradient | 'newton' | cached, one_step, exact"),
        ("ALIGNED --alignment.weight=-1", "weight | -1.0 | at least 0"),
        ("ALIGNED --alignment.weight=nan", "weight"),
        ("ALIGNED --alignment.projector_width=0", "alignment.projector_width | 0 | at least 1"),
        ("ALIGNED --alignment.projector=tree", "alignment.projector | 'tree' | mlp, conv"),
        ("ALIGNED --alignment.until=0", "alignment.until | 0 | at least 1, or null"),
        ("ALIGNED --alignment.every=0", "alignment.every | 0 | at least 1"),
        ("ALIGNED --alignment.reverse_from=5", "alignment.reverse_from | forward | 'reverse'"),
        ("ALIGNED --alignment.shuffled=true --alignment.cache=false", "alignment.shuffled | features that are kept"),
        ("ALIGNED --alignment.encoder_precision=8", "alignment.encoder_precision | '8' | 32-true, bf16-mixed"),
    ],
    "runs": [
        ("train --run=run", "run holds a run already | --train.resume to go on, or another --run"),
        ("train --train.resume", "new | checkpoint | without --train.resume"),
        ("train --run=run --train.resume --flow.layers=2", "flow.layers | 1 | 2 | the same"),
        ("train --run=flows/damaged --train.resume", "flows/damaged | whole checkpoint to resume from"),
        ("train --run=flows/bad_yaml --train.resume", "flows/bad_yaml/config.yaml | configuration of a run"),
        ("train --run=flows/no_yaml --train.resume", "flows/no_yaml/config.yaml | No such file or"),
        ("train --run=run --train.resume --train.steps=1", "train.steps | at least 2 | step_00000002 has done | 1"),
        ("train --run=run --train.resume --train.lr=1", "train.lr | 0.001 | 1.0 | the same | by --init"),
        ("train --init=nowhere", "nowhere | neither a folder nor a hub id of the form owner/name"),
        ("train --init=some/flow", "there is no folder some/flow | the hub did not give it"),
        ("train --init=trees", "trees | checkpoint and no flow | run's folder, a checkpoint or a flow"),
        ("train --init=flows/missing", "flows/missing/model.safetensors | tensor blocks.1.proj_out.bias"),
        ("train --init=run --flow.blocks=3", "flow.blocks | 2 for this flow | 3"),
        (
            "train --init=run --config=configs/tree.yaml --data.path=trees/good --data.channels=3",
            "flow.channels | 3 | 1, of the flow to begin",
        ),
        ("train --init=run --train.resume --run=flows/damaged", "train.init | None | run | the same"),
        ("train --run=trees/file", "trees/file | File exists"),
        ("train --run=trees/file/x", "trees/file/x | Not a directory"),
        ("quickstart --run=new --steps=0", "train.steps | 0 | at least 1"),
        ("quickstart --run=trees/file --steps=1", "trees/file/plain | Not a directory"),
        ("cache --part=half", "part | half | 1/4"),
        ("cache --part=0/1 --config=configs/aligned.yaml", "part | 1 to 1, of at least 1 | 0 of 1"),
        ("cache --part=3/2 --config=configs/aligned.yaml", "part | 1 to 2, of at least 1 | 3 of 2"),
        ("cache", "this configuration | nothing to cache | one with a trained autoencoder, or an alignment"),
        ("cache --config=configs/aligned.yaml -o trees/file", "trees/file"),
        ("ALIGNED --train.caches=trees/empty", "trees/empty | cache of features | what `flowback cache`"),
        ("ALIGNED --train.caches=nowhere", "nowhere | cache of features | what `flowback cache` makes of"),
        ("compare run run", "a run | twice"),
        ("compare nowhere", "nowhere | config.yaml | runs on which `flowback train` was run"),
        ("compare flows/bad_state", "flows/bad_state/evaluation.json | Expecting ',' delimiter: line 1"),
        ("compare flows/bad_yaml", "flows/bad_yaml/config.yaml | configuration of a run"),
    ],
    "images": [
        ("score run images/text.png", "image images/text.png | none of PNG, JPEG, WEBP, BMP, TIFF"),
        ("score run trees/empty trees/hidden", "no image in trees/empty, trees/hidden"),
        ("classify run images/text.png", "image images/text.png | none of PNG, JPEG, WEBP, BMP, TIFF"),
        ("classify run images/zero.png", "image images/zero.png | none of PNG, JPEG, WEBP, BMP, TIFF"),
        ("classify run images/truncated.png", "image images/truncated.png | image file | truncated"),
        ("classify run images/truncated.jpg", "image images/truncated.jpg | Truncated File Read"),
        ("classify run images/spoiled.png", "image images/spoiled.png | broken data stream when reading"),
        ("classify run images/bomb.png", "bomb.png | Image size (2500000000 pixels) exceeds limit"),
        ("classify run images/huge.png", "huge.png | Image size (100000000 pixels) exceeds limit of"),
        ("classify run images/script.png", "image images/script.png | none of PNG, JPEG, WEBP, BMP"),
        ("classify run images/drawing.png", "image images/drawing.png | none of PNG, JPEG, WEBP, BMP"),
        ("classify run images/painting.png", "image images/painting.png | none of PNG, JPEG, WEBP, BMP"),
        ("classify run images/float.tif", "image images/float.tif | its numbers are floating-point"),
        ("classify run images/deep.tif", "image images/deep.tif | its numbers | 16 bits | 8"),
        ("classify run images/pipe.png", "image images/pipe.png | file"),
        ("classify run images/gone.png", "image images/gone.png | No such file or directory"),
        ("classify run images/loop.png", "image images/loop.png | Too many levels of symbolic links"),
        ("classify run images/folder.png", "image images/folder.png | file"),
        ("classify run images/nowhere.png", "image images/nowhere.png | No such file or directory"),
        ("classify run images/text.png images/0.png images/zero.png", "images/text.png | image images/zero.png | none of"),
        ("classify run images/0.png --batch-size=0", "batch-size | 0 | at least 1"),
        ("encode run images/0.png images/zero.png", "image images/zero.png | none of PNG, JPEG"),
        ("classify run images/0.png images/zero.png", "image images/zero.png | none of PNG, JPEG"),
        ("classify run images/text.png --rule=guess", "rule | 'guess' | single_gradient"),
        ("classify run images/0.png --rule=guess", "rule | 'guess' | single_gradient | z_score | exact"),
        ("classify run images/0.png --rule=shortlist_0", "rule | 'shortlist_0' | single_gradient | z_score | exact"),
        ("classify run images/0.png --top=0", "top | 0 | at least 1"),
        ("classify run images/0.png --draws=0", "draws | 0 | at least 1"),
        ("encode run images/text.png", "images/text.png"),
        ("encode run nowhere.png", "nowhere.png | No such file"),
    ],
    "folders": [
        ("train --config=configs/tree.yaml", "data.path | folder | tree of class/image files, or of"),
        ("train --config=configs/tree.yaml --data.image_size=null --data.path=trees/good", "data.image_size"),
        ("train --config=configs/tree.yaml --data.path=nowhere", "data.path nowhere | folder | tree of"),
        ("TREE=file", "data.path trees/file | folder | tree of class/image files"),
        ("TREE=empty", "data.path trees/empty | 0 class folders | at least 2"),
        (
            "TREE=one_class",
            "data.path trees/one_class | 1 class | at least 2 | --flow.num_classes 0 makes an unconditional",
        ),
        ("TREE=empty_class", "class folder trees/empty_class/bird | 0 images | at least 2"),
        ("TREE=one_image", "class folder trees/one_image/dog | 1 images | at least 2"),
        ("TREE=flat", "data.path trees/flat | 0 classes | at least 2 | --flow.num_classes 0 makes an unconditional"),
        ("TREE=flat_parts", "data.path trees/flat_parts | 0 classes | at least 2 | --flow.num_classes 0 makes an"),
        ("TREE=two_trains", "data.path trees/two_trains | folders Train and train | one of them"),
        ("TREE=flat_one --flow.num_classes=0", "folder trees/flat_one | 1 images | at least 2"),
        ("TREE=hidden", "data.path trees/hidden | 0 class folders | at least 2"),
        ("TREE=bare_val", "data.path trees/bare_val/val | class folders | same in train and val"),
        ("TREE=other_val", "class folder trees/other_val/val/cow | in trees/other_val/train | its classes"),
        ("TREE=looped", "folder trees/looped/loop | Too many levels of symbolic links"),
        ("TREE=pipes", "class folder trees/pipes/dog | 0 images | at least 2"),
        ("TREE=unreadable", "cannot be read | none of PNG, JPEG, WEBP, BMP, TIFF, PPM"),
        ("TREE=large", "cannot be read | larger than 1073741824 bytes"),
        ("TREE=dangling", "cannot be read (No such file or directory)"),
        ("TREE=dangling --data.unreadable=0.1", "cannot be read (No such file or directory)"),
        ("TREE=good --data.image_size=10000000", "not enough memory"),
        ("train --data.name=fashion_mnist --data.path=trees/empty", "trees/empty | train-images-idx3-ubyte or"),
        ("train --data.name=fashion_mnist --data.path=nowhere", "nowhere | train-images-idx3-ubyte or"),
        ("TREE=locked", "locked/cat | Permission denied"),
    ],
    "tars": [
        ("train --config=configs/tars.yaml", "data.path | shards | folder of .tar files, or a pattern of"),
        ("train --config=configs/tars.yaml --data.path=nowhere", "data.path nowhere | nowhere, which"),
        ("TARS=none", "data.path tars/none | .tar files | folder of shards, or a pattern of their paths"),
        ("TARS=good/{0..3}.tar", "data.path tars/good/{0..3}.tar | tars/good/0.tar, which"),
        ("TARS=good/{0..99999999999}.tar", "tars/good/{0..99999999999}.tar | too many | 1000000"),
        ("TARS=truncated", "shard tars/truncated/a.tar | unexpected end of data | whole tar"),
        ("TARS=text", "shard tars/text/a.tar | invalid header | whole tar without compression"),
        ("TARS=zero", "shard tars/zero/a.tar | empty file | whole tar without compression"),
        ("TARS=gzip", "shard tars/gzip/a.tar | truncated header | whole tar without"),
        (
            "TARS=unlabelled",
            "data.path tars/unlabelled | 0 classes | at least 2 | --flow.num_classes 0 makes an unconditional",
        ),
        ("TARS=half_labelled", "image 0.png of tars/half_labelled/a.tar | label | .cls, .json, or a folder in its"),
        ("TARS=no_image", "sample 1 of tars/no_image/a.tar | image | one, of .apng"),
        ("TARS=word", "sample x of tars/word/a.tar | b'cat' in .cls"),
        ("TARS=negative", "sample x of tars/negative/a.tar | class -1 in .cls | 0 to 999999"),
        ("TARS=beyond", "sample x of tars/beyond/a.tar | class 9999999 in .cls | 0 to 999999"),
        ("TARS=json", "sample x of tars/json/a.tar | b'{' in .json | JSON"),
        ("TARS=deep_json", "sample x of tars/deep_json/a.tar | b'[[[[[[[[[[[[[[[[[[[[' in .json | JSON"),
        ("TARS=twice", "sample x of tars/twice/a.tar | images png and jpg | one, of .apng"),
        ("TARS=sparse", "shard tars/sparse/a.tar | hole.png has holes"),
        ("TARS=names", "image 1.png of tars/names/a.tar | class number 1 | at most 0"),
        ("TARS=no_names", "tars/no_names/classes.json | list of classes | their names in order, each once"),
    ],
    "checkpoints": [
        ("sample nowhere", "nowhere | neither a folder nor a hub id of the form owner/name"),
        ("sample trees", "trees | checkpoint and no flow | run's folder, a checkpoint or a flow"),
        ("sample some/flow", "there is no folder some/flow | the hub did not give it"),
        ("sample trees/file", "trees/file | readable config.json of a flow ([Errno 20] Not a directory"),
        ("sample runs/fashoin", "there is no folder runs/fashoin | revision"),
        ("sample trees/goood", "there is no folder trees/goood | near it: trees/good"),
        ("sample flows/wide", "flows/wide/config.json | describes a flow of"),
        ("sample flows/deep", "flows/deep/model.safetensors | lacks tensors | 1000000 layers"),
        ("sample flows/large", "flows/large/config.json | numbers | flows/large/model.safetensors"),
        ("sample flows/pipe_config.json", "flows/pipe_config.json | it is not a file"),
        ("sample flows/pipe_model.safetensors", "flows/pipe_model.safetensors/model.safetensors | it is not a file"),
        ("sample flows/long_config", "flows/long_config | larger than 268435456 bytes"),
        ("decode run images/pipe.png", "images/pipe.png | it is not a file"),
        ("sample flows/version", "flows/version/config.json | TarFlow | format 1"),
        ("sample flows/foreign", "flows/foreign/config.json | TarFlow | format 1"),
        ("sample flows/option", "TarFlow | option | 'colour' | image_size, channels"),
        ("sample flows/type", "flow.width | 'wide' | at least 1"),
        ("sample flows/shape", "flows/shape/model.safetensors | blocks.0.class_embed | [10, 32] | [10"),
        ("sample flows/size", "flows/size/config.json | describes a flow of | flows/size/model.safetensors"),
        ("sample flows/patch", "flow.patch_size | 3 | size | 8 | 1, 2, 4, 8"),
        ("sample flows/classes", "flows/classes/model.safetensors | blocks.0.class_embed | [10, 32]"),
        ("sample flows/missing", "flows/missing/model.safetensors | tensor blocks.1.proj_out.bias"),
        ("sample flows/more", "flows/more/model.safetensors | tensor extra that the model does not know"),
        ("sample flows/none", "flows/none/model.safetensors | lacks tensors"),
        ("sample flows/no_config", "flows/no_config | checkpoint and no flow | run's folder, a"),
        ("sample flows/text_config", "flows/text_config | readable config.json of a flow (Expecting value: line 1"),
        ("sample flows/list_config", "flows/list_config/config.json | TarFlow | format 1"),
        ("sample flows/deep_config", "flows/deep_config | readable config.json of a flow | nested too deeply"),
        ("sample flows/no_weights", "flows/no_weights/model.safetensors | as safetensors (No such file or"),
        ("sample flows/text_weights", "flows/text_weights/model.safetensors | as safetensors (Error while"),
        ("sample flows/zero_weights", "flows/zero_weights/model.safetensors | as safetensors (Error while"),
        ("sample flows/header", "flows/header/model.safetensors | as safetensors (Error while deserializing"),
        ("sample flows/cut_weights", "flows/cut_weights/model.safetensors | as safetensors (Error while"),
        ("sample flows/pickled", "flows/pickled/model.safetensors | as safetensors (Error while"),
        ("sample flows/calibration", "flows/calibration/decoding.json | format 9, not 1 | delete it"),
        ("score flows/held_out images/0.png", "flows/held_out/held_out.safetensors | cannot be used | delete it"),
        (
            "classify flows/statistics images/0.png",
            "flows/statistics/classification.json | cannot be used",
        ),
        ("sample flows/bad_raw --weights=raw", "flows/bad_raw | raw weights that | Error while"),
        ("sample flows/other_raw --weights=raw", "flows/other_raw | raw weights of another flow"),
        ("sample flows/no_weights --weights=raw", "flows/no_weights/model.safetensors | as safetensors (No"),
        ("sample flows/bad_classes --labels=cat", "flows/bad_classes/classes.json | Expecting"),
        ("sample flows/code.pth", "flows/code.pth | readable config.json of a flow ([Errno 20] Not a directory"),
        ("sample run --weights=best", "weights | 'best' | ema, raw"),
        ("evaluate flows/no_yaml", "flows/no_yaml | config.yaml that | its data | folder of a run"),
        ("evaluate flows/bad_yaml", "flows/bad_yaml/config.yaml | configuration of a run"),
        ("export flows/bad_state out", "flows/bad_state/evaluation.json | Expecting ',' delimiter: line 1"),
        ("import-tarflow nowhere.pth out", "nowhere.pth | local file that was saved with"),
        ("import-tarflow trees out", "trees | local file that was saved with torch.save"),
        ("import-tarflow flows/code.pth out", "flows/code.pth | undamaged file of tensors"),
        ("import-tarflow flows/old.pth out", "flows/old.pth | undamaged file of tensors only"),
        ("import-tarflow flows/foreign.pth out", "flows/foreign.pth | checkpoint of the published TARFlow code"),
        ("import-tarflow flows/list.pth out", "flows/list.pth | state_dict | one, or a dict with one as"),
        ("import-tarflow flows/text.pth out", "flows/text.pth | undamaged file of tensors"),
        ("import-tarflow flows/foreign.pth full", "full | new or an empty folder"),
        ("import-tarflow flows/foreign.pth trees/file", "trees/file | new or an empty folder"),
        ("decode run images/text.png", "images/text.png | file that encode wrote (Error while deserializing"),
        ("decode run nowhere.safetensors", "nowhere.safetensors | file that encode wrote (No such file or"),
        ("decode run flow/model.safetensors", "flow/model.safetensors | file that encode wrote"),
        ("decode run flows/z_shape.safetensors", "z | [2, 3, 5] | [B, 4, 16]"),
        ("decode run flows/z_label.safetensors", "label | 99 | out of range | 0 to 9, or -1 for no label"),
        ("decode run flows/z_alone.safetensors", "flows/z_alone.safetensors | file that encode wrote ('labels'"),
        ("decode run flows/z_none.safetensors", "flows/z_none.safetensors | no images | what encode wrote"),
        ("decode run flows/code.pth", "flows/code.pth | file that encode wrote (Error while deserializing header"),
        ("FID=flows/objects.npz", "objects.npz | samples"),
        ("FID=flows/flat.npz", "flat.npz | samples"),
        ("FID=flows/code.pth", "code.pth | samples"),
        ("FID=images", "images/bomb.png"),
        ("FID=nowhere", "nowhere | samples"),
        ("FID=sizes", "image sizes/9.png | 9x9 pixels | 8x8, as"),
    ],
    "encoders": [
        ("ALIGNED --alignment.encoder=dino_v9", "encoder | 'dino_v9' | unknown | timm model name, like"),
        ("ALIGNED --alignment.encoder=vit_tiny_patch16_224", "weights from the hub ("),
        ("ALIGNED --alignment.encoder_weights=nowhere.pth", "encoder weights nowhere.pth | file"),
        ("ALIGNED --alignment.encoder_weights=trees", "encoder weights trees | file | .safetensors or"),
        ("ALIGNED --alignment.encoder_weights=models/code.pth", "weights from models/code.pth"),
        ("ALIGNED --alignment.encoder_weights=models/foreign.pth", "models/foreign.pth | 1 tensors"),
        ("ALIGNED --alignment.encoder_weights=models/foreign.safetensors", "weights from models/foreign.safetensors"),
        ("ALIGNED --alignment.encoder_weights=models/text.safetensors", "weights from models/text.safetensors"),
        ("ALIGNED --alignment.encoder_weights=models/code.safetensors", "weights from models/code.safetensors"),
        ("ALIGNED --alignment.encoder=vit_tiny_patch16_224 --alignment.encoder_weights=models/code.pth", "weights from"),
        ("ALIGNED --alignment.encoder=vit_tiny_patch16_224 --alignment.encoder_weights=models/foreign.pth", "weights from"),
        ("ALIGNED --alignment.encoder=vit_tiny_patch16_224 --alignment.encoder_weights=models/code.safetensors", "weights"),
        ("evaluate run --metrics=fid --extractor=vgg", "extractor | 'vgg' | efficientnet_lite0"),
        ("evaluate run --metrics=shift --encoder=dino_v9", "encoder | 'dino_v9' | unknown | timm model name, like"),
        ("INCEPTION=nowhere.pth", "extractor weights nowhere.pth | file | local file"),
        ("INCEPTION=models/code.pth", "extractor weights models/code.pth | tensors"),
        ("INCEPTION=models/code.safetensors", "extractor weights models/code.safetensors | tensors"),
        ("INCEPTION=flows/list.pth", "extractor weights flows/list.pth | state_dict"),
        ("INCEPTION=models/foreign.pth", "weights given"),
    ],
    "VAEs": [
        ("train --config=configs/latent.yaml --latents.autoencoder=nowhere", "nowhere | neither a folder nor a hub id of"),
        ("train --config=configs/latent.yaml --latents.autoencoder=some/vae", "there is no folder some/vae | the hub did"),
        ("train --config=configs/latent.yaml --latents.autoencoder=trees/empty", "empty | readable config.json"),
        ("VAE=vae_rgb", "models/vae_rgb | 3"),
        ("VAE=vae_text", "models/vae_text | as safetensors"),
        ("VAE=vae_config", "models/vae_config | readable config.json of an autoencoder (Expecting property name"),
        ("VAE=vae_class", "models/vae_class/config.json | does not describe an autoencoder | AutoencoderKL, Semantic"),
        ("VAE=vae_none", "models/vae_none | diffusion_pytorch_model.safetensors | autoencoder saved as"),
        ("VAE=vae_code", "models/vae_code | diffusion_pytorch_model.safetensors | autoencoder saved as"),
        ("VAE=vae_other", "models/vae_other | those of its config.json"),
        ("VAE=vae_wide", "models/vae_wide | those of its config.json"),
        ("VAE=vae_scale", "scale must be a finite number, or one for each of 3 channels | 0"),
        ("VAE=vae_cut", "models/vae_cut | is cut into several files"),
        ("VAE=vae --flow.patch_size=3", "flow.patch_size | 3 | 4 | 1, 2, 4"),
        ("VAE=vae --flow.noise=uniform", "flow.noise | 'uniform' | gaussian"),
        ("VAE=vae --latents.posterior=mode", "latents.posterior | 'mode' | mean, sample"),
        ("VAE=vae_list", "models/vae_list/config.json | does not describe an autoencoder"),
    ],
    "semantic latents": [
        ("VAE=semantic --latents.posterior=sample", "latents.posterior | 'sample' | mean with a semantic autoencoder"),
        ("VAE=semantic --flow.image_size=4", "flow.image_size | 4 | 2 for these latents"),
        ("VAE=semantic --flow.channels=3", "flow.channels | 3 | 4 for these latents"),
        ("VAE=semantic_text", "models/semantic_text | cannot be read as safetensors"),
        ("VAE=semantic_none", "models/semantic_none | model.safetensors | autoencoder saved as safetensors"),
        ("VAE=semantic_facts", "models/semantic_facts/config.json | does not describe a semantic autoencoder"),
        ("VAE=semantic_options", "models/semantic_options/config.json | does not describe a semantic autoencoder"),
        ("VAE=semantic_unfit", "models/semantic_unfit/config.json | its options do not fit its facts"),
        ("VAE=semantic_wide", "models/semantic_wide/config.json | it describes | numbers, the weights have"),
        ("VAE=semantic_deep", "semantic.decoder_layers | 1000000000 | at most 100"),
        ("VAE=semantic_large", "semantic.downsample must leave at most 4096 latents"),
        ("VAE=semantic_encoder", "encoder.safetensors | a local file of this model's weights"),
        ("VAE=semantic_other", "the encoder test_vit must be the one | models/semantic_other was trained with"),
        ("VAE=semantic_tensor", "models/semantic_tensor/model.safetensors has a tensor conv.weight"),
    ],
    "autoencoders": [
        ("autoencoder", "autoencoder.task"),
        ("autoencoder paint", "paint"),
        ("autoencoder train --kind=vq", "kind | 'vq' | semantic, kl"),
        ("autoencoder train --semantic.encoder=vgg99", "'vgg99' | unknown"),
        ("autoencoder train --semantic.downsample=3", "[8, 8] | multiple of 3"),
        ("autoencoder train --semantic.compressor=linear", "semantic.compressor | 'linear' | pca, attention, transformer"),
        ("autoencoder train --semantic.decoder=gan", "semantic.decoder | 'gan'"),
        ("autoencoder train --semantic.channels=99999", "channels | 99999 | 320"),
        ("autoencoder train --semantic.width=33", "semantic.width | 33 | multiple of 32"),
        ("autoencoder train --semantic.noise_std=-1", "semantic.noise_std | -1.0"),
        ("autoencoder train --reconstruction.pixels=l3", "reconstruction.pixels | 'l3' | l1, l2"),
        ("autoencoder train --reconstruction.lpips=-1", "reconstruction.lpips | -1.0"),
        ("autoencoder train --reconstruction.lpips=1", "LPIPS needs images of at least 16 pixels | [8, 8]"),
        ("LPIPS=nowhere.pth", "nowhere.pth | local file"),
        ("LPIPS=models/code.pth", "models/code.pth | VGG16"),
        ("autoencoder train --reconstruction.adversarial_from=2", "reconstruction.adversarial_from | 2.0"),
        ("autoencoder train --config=run/config.yaml", "flow"),
        ("autoencoder train --train.class_dropout=0.5", "train.class_dropout | option of flows"),
        ("autoencoder evaluate run", "run holds no autoencoder that was trained with the flow"),
        ("autoencoder evaluate models/semantic", "models/semantic | config.yaml | --data.name"),
        ("autoencoder evaluate models/semantic --data.name=digits --extractor=vgg", "extractor | 'vgg'"),
        ("autoencoder evaluate models/semantic --data.name=digits --images=1", "--images | 1 | at least 2"),
        ("autoencoder evaluate trees/empty", "trees/empty | readable config.json of an autoencoder"),
        ("autoencoder evaluate some/autoencoder", "some/autoencoder | local folder"),
        ("autoencoder export models/semantic full", "full | is there already"),
        ("autoencoder export models/vae_code out", "models/vae_code | autoencoder saved as safetensors"),
        ("JOINT --latents.autoencoder=models/vae", "latents.joint"),
        ("JOINT --joint.downsample=3", "[8, 8] | multiple of 3"),
        ("JOINT --joint.mask=1", "joint.mask | 1"),
        ("JOINT --joint.noise_std=0", "joint.noise_std | 0"),
        ("JOINT --joint.width=33", "joint.width | 33"),
        ("JOINT --joint.layers=1000000", "joint.layers | 1000000 | at most 100"),
    ],
    "students": [
        ("distill", "a student needs a flow"),
        ("distill nowhere", "nowhere | is no folder"),
        ("distill flow --data.name=folder --data.path=trees/good", "levels of the data folder | 17 | 256"),
        ("distill some/flow", "some/flow | is no folder"),
        ("DISTILL --method=magic", "method | 'magic' | flow_matching, inverse, denoiser"),
        ("DISTILL --noise=blue", "noise | 'blue' | flow, independent"),
        ("DISTILL --method=inverse --noise=independent", "noise independent | flow_matching"),
        ("DISTILL --guidance=2", "guidance | 2.0 | inverse"),
        ("DISTILL --method=inverse --features=-1", "features | -1.0 | at least 0"),
        ("DISTILL --method=inverse --student.layers=2", "student.layers | 2 | above 2"),
        ("DISTILL --student.layers=1000", "student.layers | 1000 | at most 512"),
        ("DISTILL --student.head_dim=5", "student.head_dim | 5 | divide student.width 16"),
        ("DISTILL --student.mlp_ratio=nan", "student.mlp_ratio | nan"),
        ("DISTILL --train.compile", "train.compile | option of flows"),
        ("DISTILL --train.resume", "run/students/flow_matching | no checkpoint"),
        ("DISTILL --run=full --train.resume", "full | no checkpoint"),
        ("DISTILL --data.name=fashion_mnist --data.path=nowhere", "nowhere"),
        ("DISTILL --data.name=folder --data.path=trees/good --data.image_size=16", "size | (8, 8) | (16, 16)"),
        ("distill models/vae", "models/vae"),
        ("sample run --sampler=student", "no student | flowback distill"),
        ("sample run --sampler=best", "sampler | 'best' | exact, student"),
        ("sample run --steps=2", "steps | sampler student"),
        ("sample run --sampler=student --steps=0", "steps | 0 | at least 1"),
        ("sample run --sampler=student --solver=rk4", "solver | 'rk4' | euler, heun"),
        ("sample run --denoiser=learned", "no denoiser | flowback distill"),
        ("sample run --denoiser=best", "denoiser | 'best' | score, learned"),
        ("sample flows/student_text", "flows/student_text/student/config.json | flowback distill"),
        ("sample flows/student_wide", "flows/student_wide/student/config.json | overflowed"),
        ("sample flows/student_none", "flows/student_none/student/model.safetensors"),
        ("sample flows/student_lesson", "method | 'magic' | flow_matching"),
        ("sample flows/student_other", "flows/student_other/student | another flow"),
        ("sample flows/student_stale --sampler=student", "student | other weights | flowback distill"),
    ],
    "labels": [
        ("sample run --labels=3,12", "label | '12' | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ("sample run --labels=3,cat", "label | 'cat' | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ("sample run --labels=-1", "label | '-1' | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ("sample run --labels=²", "label | '²' | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ("sample run --labels=99999999999999999999", "label | '99999999999999999999' | 0, 1"),
        ("sample run --labels=,", "label | '' | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ("encode run images/0.png --labels=cat", "label | 'cat' | 0, 1, 2, 3, 4, 5, 6, 7"),
        ("swap run images/0.png --to=cat", "label | 'cat' | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ("encode run images/0.png images/1.png --labels=1,2,3", "3 labels | 2 images | one for all, or"),
        ("sample run --labels=٣", "label | '٣' | 0, 1, 2, 3"),
        ("swap run images/0.png --labels=1,2", "2 labels | 1 images | one for all, or one for each"),
    ],
    "seeds, counts, choices": [
        ("score run images/0.png --draws=0", "draws | 0 | at least 1"),
        ("score run images/0.png --batch-size=0", "batch-size | 0 | at least 1"),
        ("train --train.seed=-1", "train.seed | -1 | at least 0"),
        ("train --train.seed=99999999999999999999", "train.seed | 99999999999999999999 | at most"),
        ("train --data.split_seed=-1", "data.split_seed | -1 | at least 0"),
        ("train --data.split_seed=99999999999999999999", "data.split_seed | 99999999999999999999 | at most"),
        ("quickstart --run=new --steps=1 --seed=99999999999999999999", "train.seed | 99999999999999999999"),
        ("evaluate run --seed=-1", "seed | -1 | from 0 to 2^63 - 1"),
        ("evaluate run --seed=-1 --metrics=fid --samples=2", "seed | -1 | from | 0"),
        ("evaluate run --seed=99999999999999999999", "seed | 99999999999999999999"),
        ("inpaint run images/0.png --box=0,0,2,2 --seed=99999999999999999999", "seed | 99999999999999999999 | 2^63 - 1"),
        ("sample run --seed=-1", "seed | -1 | at least 0"),
        ("sample run --seed=99999999999999999999", "seed | 99999999999999999999 | at most 9223372036854775807"),
        ("sample run --num=0", "num | 0 | at least 1"),
        ("sample run --num=many", "num"),
        ("sample run --num=1000000000000", "1000000000000 images | 64000000000000 bytes"),
        ("sample run --num=1000000000000 -o out", "1000000000000 images | 64000000000000 bytes"),
        ("sample run --num=1000000000000 -o out.npz", "1000000000000 images | 64000000000000 bytes"),
        ("sample run --batch-size=0", "batch_size | 0 | at least 1"),
        ("sample run --processes=0", "processes | 0 | at least 1"),
        ("sample run --best-of=0", "best_of | 0 | at least 1"),
        ("sample run --best-of=1000000000000 --num=1", "best_of | 1000000000000 | at most 10000"),
        ("sample run --least=0", "least | 0 | at least 1"),
        ("sample run --best-of=2 --rule=guess", "rule | single_gradient, z_score | guess"),
        ("sample run --temperature=0", "temperature | 0.0 | above 0"),
        ("sample run --temperature=inf", "temperature"),
        ("sample run --temperature=nan", "temperature"),
        ("sample run --guidance=-1", "guidance scale | -1.0 | at least 0"),
        ("sample run --guidance=nan", "guidance"),
        ("sample run --guidance=inf", "guidance"),
        ("sample run --method=newton", "method | 'newton' | auto, sequential, jacobi"),
        ("sample run --device=nowhere", "device | 'nowhere' | Expected one of cpu, cuda, ipu, xpu, mkldnn"),
        ("sample run --precision=half", "precision | 'half' | 32-true, bf16-mixed"),
        ("sample run --guided=sigma", "guid | 'sigma' | both, a, mu"),
        ("sample run --prior=own", "prior | 'own' | standard, fitted"),
        ("sample run --prior=fitted", "no fitted prior | flowback fit-prior | standard"),
        ("sample run --guidance=1 --guidance-rule=sum", "guidance rule | 'sum' | linear, product"),
        ("sample run --guidance=1 --guidance-blocks=3", "guided blocks | 1 to 2 | [3]"),
        ("sample run --guidance=1 --guidance-blocks=x", "guidance_blocks | whole numbers | 'x'"),
        ("sample run --guidance=1 --guidance-tokens=0.5", "guidance_tokens | two shares | [0.5]"),
        ("sample run --guidance=1 --guidance-tokens=1,0", "guided tokens | ascending | [1.0, 0.0]"),
        ("classify run images/0.png --rule=exact_fitted", "no fitted prior | flowback fit-prior"),
        ("fit-prior run --images=0", "images | at least 1 | 0"),
        ("fit-prior run --images=8", "a prior needs at least 20 training images | got 10"),
        ("fit-prior run --weights=raw", "averaged weights | --weights ema"),
        ("fit-prior flows/no_yaml", "flows/no_yaml | config.yaml that names its data | folder of a run"),
        ("sample flows/prior", "flows/prior/prior.safetensors | cannot be used | fit-prior"),
        ("sample flows/defaults", "flows/defaults/sampling.json | cannot be used | format 9, not 1 | sweep"),
        ("sweep run --samples=1000", "samples | at most the 359 held-out images | 1000"),
        ("sweep run --recall=2", "recall | from 0 to 1 | 2.0"),
        ("sweep run --temperatures=0,1", "temperature | above 0 | 0.0"),
        ("sweep run --rules=sum", "guidance rule | 'sum' | linear, product"),
        ("sweep run --guidances=-1", "guidance scale | at least 0 | -1.0"),
        ("train --train.fit_prior=-1", "train.fit_prior | -1 | at least 0"),
        ("sample run --schedule=cubic", "schedule | 'cubic' | constant, annealed"),
        ("autotune run --rows=a,b", "rows | a,b | whole numbers | 1,8,32"),
        ("autotune run --rows=", "rows | '' | whole numbers | 1,8,32"),
        ("autotune run --rows=0", "rows | 0 | at least 1"),
        ("autotune nowhere", "nowhere | neither a folder nor a hub id of the form owner/name"),
        ("evaluate run --images=0", "images | 0 | at least 1"),
        ("evaluate run --samples=0", "samples | 0 | at least 1"),
        ("evaluate run --draws=0", "draws | 0 | at least 1"),
        ("evaluate run --passes=0", "passes | 0 | at least 1"),
        ("evaluate run --labels=some", "labels | shares, equal | 'some'"),
        ("evaluate run --metrics=bpd,is --samples=9", "is needs at least 10 samples | 9"),
        ("evaluate run --metrics=bpd,prc --samples=3", "prc needs at least 4 samples | 3"),
        (
            "evaluate run --metrics=fid --reference=trees/file",
            "trees/file | holds no samples | expected a folder of images",
        ),
        ("evaluate run --data.name=paintings", "data.name | digits, fashion_mnist | 'paintings'"),
        ("evaluate run --data.holdout=0.5", "run/evaluation.json | of the run's own data | give -o"),
        ("evaluate run --data.name=folder --data.path=trees", "trees/locked/cat cannot be read"),
        ("evaluate nobody/flow --data.name=digits", "nobody/flow is no local folder | give -o"),
        ("evaluate run -o trees/file/a.json", "trees/file/a.json cannot be written"),
        ("evaluate run --reference=all", "reference | 'all' | train, held_out"),
        ("evaluate run --metrics=lpips", "metric | 'lpips' | bpd, accuracy, probe, fid, sfid, is"),
        ("evaluate run --metrics=", "metric | '' | bpd, accuracy, probe, fid, sfid, is, kid, prc"),
        ("evaluate run --metrics=sfid", "sfid | figure of inception, not of efficientnet_lite0 | extractor"),
        ("evaluate run --sweep=a,b", "sweep | a,b | numbers | 0,1,2"),
        ("evaluate run --sweep=0,nan --metrics=bpd", "guidance | nan"),
        ("evaluate run --sweep=0,1 --samples-from=x.npz", "samples from disk have one guidance | --sweep or"),
        ("evaluate run --weights=best", "weights | 'best' | ema, raw"),
        ("evaluate run --metrics=ood --outliers=paintings", "outliers | digits, upside_down, noise | folder | 'paintings'"),
        ("evaluate run --metrics=ood --outliers=digits", "ood needs outliers other than the data digits | got digits"),
        ("evaluate run --metrics=ood --outliers=noise,trees/empty", "trees/empty has no images | folder of images"),
        ("evaluate run --metrics=ood --outliers=images", "images/bomb.png | cannot be read"),
        ("evaluate run --metrics=coverage --images=79", "coverage need at least 80 held-out images | 79"),
        ("evaluate run --metrics=shift,coverage --passes=99", "shift, coverage need at least 80 | --passes 99"),
        ("interpolate run images/0.png images/1.png --steps=1", "steps | 1 | at least 2"),
        ("interpolate run images/0.png images/1.png --steps=1000000000000", "not enough memory"),
        ("inpaint run images/0.png --box=0,0,2,2 --num=0", "num | 0 | at least 1"),
        ("inpaint run images/0.png --box=0,0,2,2 --num=1000000000000", "not enough memory"),
        ("inpaint run images/0.png --box=0,0,2,2 --tries=0", "tries | 0 | at least 1"),
        ("inpaint run images/0.png --box=0,0,2,2 --steps=-1", "steps | -1 | at least 0"),
    ],
    "outputs": [
        ("score run images/0.png --csv=t.txt", "csv | a .csv file | t.txt"),
        ("score run images/0.png --csv=trees/file/t.csv", "trees/file/t.csv | Not a directory"),
        ("score run images/0.png --maps=full", "maps | new or empty folder | full"),
        ("score run images --maps=images/new", "maps | outside of the folders that are read | images/new in images"),
        ("score run images/0.png --maps=new", "maps | held-out images | flowback evaluate"),
        ("sample run -o a.gif", "output | a.gif | .png | .npz | folder"),
        ("sample run --num=1 -o trees/file/x.png", "output trees/file/x.png | Not a directory"),
        ("sample run --num=1 -o trees/file/x.npz", "output trees/file/x.npz | Not a directory"),
        ("sample run --num=1 -o trees/file/x", "output trees/file/x | Not a directory"),
        ("sample run --num=1 -o trees/file", "trees/file/.flowback | Not a directory"),
        ("sample run --num=1 -o full", "full holds other files | new or empty folder"),
        ("sample run --num=1 -o images/folder.png", "images/folder.png | folder | file"),
        (f"sample run --num=1 -o {'x' * 300}", "cannot be written (File name too long)"),
        (f"encode run images/0.png -o {'x' * 300}.safetensors", "File name too long"),
        ("swap run images/0.png images/1.png -o images/1.png", "output images/1.png | one of the files that are read"),
        ("inpaint run images/0.png --mask=images/1.png -o images/1.png", "output images/1.png | one of the files"),
        ("decode run flows/z_label.safetensors -o full", "full holds other files | new or empty folder"),
        ("decode run flows/z_label.safetensors -o a.jpg", "output | a.jpg | .png file or a folder"),
        ("export run trees/file/x", "output trees/file/x | Not a directory"),
        ("import-tarflow flows/foreign.pth trees/file/x", "output trees/file/x | Not a directory"),
        ("encode run images/0.png -o z.npz", "output | z.npz | .safetensors file"),
        ("encode run images/0.png -o trees/file/z.safetensors", "trees/file/z.safetensors | Not a directory"),
        ("decode run images/text.png -o a.gif", "output | a.gif | .png file or a folder"),
        ("interpolate run images/0.png", "1 image | other to go to | at least 2"),
        ("interpolate run images/0.png images/1.png -o walk", "output | walk | .png file"),
        ("interpolate run images/0.png images/1.png --steps=2 -o trees/file/x.png", "trees/file/x.png | Not a directory"),
        ("swap run images/0.png -o images/folder.png", "images/folder.png, which is a folder | .png file"),
        ("inpaint run images/0.png", "where to draw | either --mask or --box"),
        ("inpaint run images/0.png --box=0,0,2,2 --mask=images/0.png", "where to draw"),
        ("inpaint run images/0.png --box=1,2,3", "box | 1,2,3 | box | four numbers"),
        ("inpaint run images/0.png --box=0,0,9,2", "box | 0,0,9,2 | image | what lies within"),
        ("inpaint run images/0.png --box=2,2,0,2", "box | 2,2,0,2 | image | what lies within"),
        ("inpaint run images/0.png --mask=images/text.png", "image images/text.png | none of PNG"),
        ("export run full", "full | new or an empty folder"),
        ("export run full/file", "full/file | new or an empty folder"),
        ("export run out --license=My_own!", "license | 'My_own!' | identifier | one of the hub's, like"),
        ("export run out --push=flow", "'flow' | owner | owner/name"),
        ("export run out --push=a/b/c", "'a/b/c' | name on the hub | owner/name of letters, digits, -, _"),
        ("export run out --private", "--private | a repository on the hub | --private with --push"),
        ("export run out --weights=best", "weights | 'best' | ema, raw"),
        ("export trees out", "trees | checkpoint and no flow | run's folder, a checkpoint or a flow"),
        ("export nowhere out", "nowhere | neither a folder nor a hub id of the form owner/name"),
        ("swap run images/0.png -o trees/file/x.png", "trees/file"),
        ("inpaint run images/0.png --box=0,0,2,2 --steps=0 -o trees/file/x.png", "trees/file"),
        ("inpaint run images/0.png --box=a,b,c,d", "box | a,b,c,d | box | four numbers"),
        ("inpaint run images/0.png --box=-1,0,2,2", "box | -1,0,2,2 | image"),
    ],
}


def contents(folder: Path) -> dict[str, str]:
    """What lies in a folder: of every file a hash, or its size if that is large; of every link where it leads."""

    def content(file: str) -> str:
        about = os.lstat(file)
        if stat.S_ISLNK(about.st_mode):
            return f"to {os.readlink(file)}"
        if not stat.S_ISREG(about.st_mode):
            return "no file"
        return hashed(file, about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns)

    found = [os.path.join(place, name) for place, *names in os.walk(folder) for name in (*names[0], *names[1])]
    return {file.removeprefix(f"{folder}/"): content(file) for file in found}


@cache
def hashed(file: str, size: int, *_: int) -> str:
    """A file's hash, or its size if that is large; computed again once the system says that anything changed."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if size < 2**24 else str(size)


def words_of(command: str) -> list[str]:
    """A row's command as arguments; training is told to be short and to begin the run `new`."""
    for short, long in SHORT.items():
        command = command.replace(short, long)
    verb, *options = command.split() or [""]
    if verb == "autoencoder" and options:
        verb, options = f"autoencoder {options[0]}", options[1:]
    short = ["--run=new", "--train.steps=2"]
    defaults = {"train": [*short, *SMALL_RUN], "cache": SMALL_RUN, "autoencoder train": [*short, "--data.name=digits"]}
    return [*verb.split(), *defaults.get(verb, []), *options]


def says(said: str, part: str) -> bool:
    """Whether a part is in a sentence; a number not as a piece of another one, a word not as the end of another one."""
    is_number = part.lstrip("-").replace(".", "").isdecimal()
    pattern = rf"(?<![\w.]){re.escape(part)}(?!\.?\w)" if is_number else re.escape(part)
    return re.search(rf"(?<!\w){pattern}" if part[0].isalnum() else pattern, said) is not None


@pytest.fixture
def locked(monkeypatch):
    """A folder that cannot be listed, whoever runs the tests."""
    real = os.scandir

    def scandir(path):
        if path == b"trees/locked/cat":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


ROWS = [pytest.param(command, words, id=f"{group}: {command}") for group, rows in TABLE.items() for command, words in rows]


@pytest.mark.parametrize(("command", "words"), ROWS)
def test_bad_input_is_one_sentence_and_nothing_is_lost(world, at_first, locked, monkeypatch, capsys, command, words):
    monkeypatch.chdir(world)
    said = refuse(words_of(command), capsys)
    assert all(says(said, part) for part in words.split(" | ")), said
    assert "Traceback" not in said
    shutil.rmtree("new", ignore_errors=True)  # what a run leaves that ends as it reads its first images
    assert contents(world) == at_first


def test_the_documentation_counts_the_rows():
    text = (Path(__file__).parents[2] / "docs" / "robustness.md").read_text()
    counts = {name: int(count) for name, count in re.findall(r"^\| (.+?) \|.*\| ([0-9]+) \|$", text, flags=re.MULTILINE)}
    assert counts == {**{group: len(rows) for group, rows in TABLE.items()}, "all": len(ROWS)}


def test_a_process_of_its_own_ends_alike(world, at_first):
    words = [sys.executable, "-m", "flowback", "import-tarflow", "flows/code.pth", "out"]
    done = subprocess.run(words, cwd=world, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"flowback: error: .*objects can run code.*\n", done.stderr)
    assert contents(world) == at_first


# ---- names, and what is unreadable among much -------------------------------------------------------------------------


def test_names_in_any_script_nested_and_linked_folders(tmp_path, capsys):
    root, elsewhere = tmp_path / "images", tree(tmp_path / "elsewhere", cat=4)
    names = ["猫", "собака", "كلب", "🐈", "a b", "a\nb", "<b>&", "-x", os.fsdecode(b"\xff\xfe")]
    tree(root, **dict.fromkeys(names, 3))
    (root / "linked").symlink_to(elsewhere / "cat")
    (root / "deep" / "er").mkdir(parents=True)
    for i in range(3):
        (root / "deep" / "er" / f"{i}.png").symlink_to(elsewhere / "cat" / "0.png")
    before = contents(elsewhere)
    run = tmp_path / "run"
    options = ["--data.name=folder", f"--data.path={root}", "--data.image_size=8", "--flow.patch_size=4"]
    assert main(["train", f"--run={run}", "--train.steps=1", *SMALL_RUN, *options]) == 0
    classes = json.loads((run / "classes.json").read_text())
    assert set(classes) == {*names[:-1], "\\xff\\xfe", "linked", "deep"}
    assert main(["sample", str(run), "--labels=猫,linked", "--num=2", "-o", str(tmp_path / "a.png")]) == 0
    image = str(root / names[-1] / "0.png")
    assert main(["classify", str(run), image, f"--top={len(classes)}", "--rule=exact"]) == 0
    assert main(["evaluate", str(run), "--metrics=accuracy"]) == 0
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "<b>&" not in (run / "report.html").read_text("utf-8")
    assert contents(elsewhere) == before


def test_names_in_tars_and_lists_lead_nowhere(tmp_path, world):
    """Folders of keys as classes, with ways up and absolute ones; all that is written lies in the run's folder."""
    picture = (world / "images" / "0.png").read_bytes()
    up, absolute = "../../../up", str(tmp_path / "absolute")
    tar(tmp_path / "tars" / "a.tar", {f"{name}/{i}.png": picture for name in (up, absolute) for i in range(12)})
    run = tmp_path / "runs" / "run"
    options = ["--data.name=shards", f"--data.path={tmp_path / 'tars'}", "--data.image_size=8", "--flow.patch_size=4"]
    before = contents(tmp_path)
    assert main(["train", f"--run={run}", "--train.steps=1", *SMALL_RUN, *options]) == 0
    assert set(json.loads((run / "classes.json").read_text())) == {up, absolute}
    assert main(["evaluate", str(run), "--metrics=accuracy"]) == 0
    assert main(["sample", str(run), "--num=2", f"--labels={up},{absolute}", "-o", str(run / "drawn")]) == 0
    assert main(["export", str(run), str(run / "out")]) == 0
    assert sorted(file.name for file in (run / "drawn").glob("*.*")) == [".flowback", "000000.png", "000001.png"]
    after = contents(tmp_path)
    assert {name: what for name, what in after.items() if not name.startswith("runs")} == before
    assert {name for name in after if name.startswith("runs/")} <= {"runs/run"} | {
        name for name in after if name.startswith("runs/run/")
    }


@pytest.mark.parametrize("share", [0.1, 0.01])
def test_unreadable_images_are_counted_up_to_the_stated_share(tmp_path, capsys, share):
    root = tree(tmp_path / "images" / "train", cat=20, dog=20)
    tree(tmp_path / "images" / "val", cat=4, dog=4)
    for name in ("cat/3.png", "dog/7.png"):
        (root / name).write_text("no image")
    options = ["--data.name=folder", f"--data.path={root.parent}", "--data.image_size=8", f"--data.unreadable={share}"]
    arguments = ["train", f"--run={tmp_path / 'run'}", "--train.steps=10", *SMALL_RUN, *options, "--train.batch_size=40"]
    if share * 40 < 2:
        assert "cannot be read" in refuse(arguments, capsys)
        return
    assert main(arguments) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert said.count("the next one is taken instead: image") == 2
    assert all(f"{name} cannot be read" in said for name in ("cat/3.png", "dog/7.png"))


# ---- many files -----------------------------------------------------------------------------------------------------


def many(root: Path, classes: int, images: int) -> Path:
    """A tree of hard links, a file a class, long settled."""
    for k in range(classes):
        folder = root / f"{k:04d}"
        folder.mkdir(parents=True)
        Image.new("L", (8, 8), k % 256).save(folder / "0.png")
        for i in range(1, images):
            os.link(folder / "0.png", folder / f"{i}.png")
        os.utime(folder, (1e9, 1e9))
    os.utime(root, (1e9, 1e9))
    return root


def check_scan(root: Path, cache: Path, monkeypatch, classes: int, images: int) -> None:
    """Scan, start again from the index, and scan again where that is damaged."""
    monkeypatch.setenv("FLOWBACK_CACHE", str(cache))
    scans, real = [], folders._scan
    monkeypatch.setattr(folders, "_scan", lambda base, unit: scans.append(unit) or real(base, unit))
    config = DataConfig(name="folder", path=str(root), image_size=8, channels=1)
    for spoil, scanned in ((None, classes), (None, classes), ("no index", 2 * classes)):
        for index in (cache / "folders").glob("*.npz") if spoil else ():
            index.write_text(spoil)
        data = load_data(config)
        assert len(data.train) + len(data.held_out) == classes * images
        assert len(scans) == scanned
        pixels, labels = data.train[[0, len(data.train) - 1]]
        assert pixels[:, 0, 0, 0].tolist() == [0, (classes - 1) % 256]
        assert labels.tolist() == [0, classes - 1]


def test_twelve_thousand_files_are_scanned_once(tmp_path, monkeypatch):
    check_scan(many(tmp_path / "images", 12, 1000), tmp_path / "cache", monkeypatch, 12, 1000)


@pytest.mark.soak
def test_a_million_files_are_scanned_once(tmp_path, monkeypatch):
    check_scan(many(tmp_path / "images", 1000, 1000), tmp_path / "cache", monkeypatch, 1000, 1000)
