"""Autoencoders that are trained here: the loop, its checkpoints, what is measured, and flows in their latents."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from flowback import InputError, LatentFlow, TarFlow, from_pretrained
from flowback.cli import main
from flowback.core.units import from_levels
from flowback.data import DataConfig, load_data
from flowback.data.splits import MemorySplit
from flowback.latents import load_autoencoder
from flowback.latents.kl import KLAutoencoder, KLConfig
from flowback.latents.losses import ReconstructionConfig
from flowback.latents.semantic import SemanticConfig
from flowback.runs import checkpoint
from flowback.runs.checkpoint import load_trained_autoencoder
from flowback.runs.config import AutoencoderRunConfig, RunConfig, TrainConfig, recipe
from flowback.runs.log import read_metrics
from flowback.runs.slices import Reader
from flowback.studio.draw import requested
from flowback.studio.shelf import Shelf
from flowback.tasks.sampling import draw_batches
from flowback.training.autoencoders import images, train_autoencoder

KINDS = {
    "kl": {"kind": "kl", "kl": KLConfig(channels=3, downsample=2, width=8)},
    "pca": {"semantic": SemanticConfig(channels=8, decoder_width=32, decoder_layers=1)},
    "attention": {"semantic": SemanticConfig(compressor="attention", channels=8, width=32, layers=1, decoder_width=32)},
}


def config(run, kind="kl", **train):
    options = {"steps": 6, "batch_size": 16, "warmup": 2, "log_every": 2, "eval_every": 4, "eval_images": 20}
    options |= {"sample_every": 6, "checkpoint_every": 3, "class_dropout": 0.1, "hflip": True, **train}
    loss = ReconstructionConfig(adversarial=0.1, adversarial_from=0.3, discriminator_width=8)
    data = DataConfig(name="digits", limit=64)
    return AutoencoderRunConfig(run=str(run), data=data, reconstruction=loss, train=TrainConfig(**options), **KINDS[kind])


def tensors(run):
    folder = checkpoint.newest(run)
    readers = [Reader(folder, "training"), Reader(folder, next(folder.glob("*model.safetensors")).stem)]
    return {name: reader.read(name).clone() for reader in readers for name in reader.slices}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    run = tmp_path_factory.mktemp("autoencoders") / request.param
    result = train_autoencoder(config(run, request.param))
    assert not result.interrupted
    return request.param, run


def test_a_run_that_was_interrupted_equals_the_undisturbed_one_bit_for_bit(trained, tmp_path):
    kind, whole = trained
    for i, stop in enumerate((1, 4, None)):
        train_autoencoder(config(tmp_path / "cut", kind, until=stop, resume=i > 0))
    expected, found = tensors(whole), tensors(tmp_path / "cut")
    assert expected.keys() == found.keys()
    assert any(name.startswith("buffers.discriminator") for name in expected)  # of the spectral norm
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_the_folder_of_a_run_has_what_every_run_has(trained):
    _, run = trained
    rows = [row for row in read_metrics(run / "metrics.csv") if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert "adversarial" not in rows[0]  # it begins at 0.3 of 6 steps
    assert {"pixels", "adversarial", "discriminator"} <= rows[2].keys()
    assert rows[2]["loss"] == pytest.approx(
        sum(rows[2].get(name, 0) for name in ("pixels", "adversarial", "discriminator", "kl", "latents")), rel=1e-5
    )
    held_out = [row for row in read_metrics(run / "metrics.csv") if "held_out_psnr" in row]
    assert [row["step"] for row in held_out] == [4, 6]
    assert (run / "samples" / "step_00000006.png").is_file()
    again = AutoencoderRunConfig.read(run / "config.yaml")
    assert again.train.steps == 6
    assert again.to_yaml() == (run / "config.yaml").read_text()


def test_what_is_offered_to_flows_is_the_last_checkpoint(trained):
    _, run = trained
    data = load_data(DataConfig(name="digits", limit=64))
    x = from_levels(data.held_out[range(20)][0], data.levels)
    offered, kept = load_autoencoder(str(run)), load_trained_autoencoder(run)
    assert torch.equal(offered.decode(offered.encode(x)), kept.decode(kept.encode(x)))
    assert not any(p.requires_grad for p in offered.parameters())
    assert not offered.train().training
    latents = offered.encode(from_levels(data.train[range(64)][0], data.levels))
    assert latents.std() == pytest.approx(1, abs=0.15)


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """A folder with the autoencoder's run and that of a flow in its latents."""
    kind, run = trained
    folder = tmp_path_factory.mktemp("runs") / "runs"
    shutil.copytree(run, folder / "autoencoder")
    words = ["train", f"--run={folder / 'flow'}", "--data.name=digits", "--data.limit=64", "--flow.noise_std=0.3"]
    words += [f"--latents.autoencoder={folder / 'autoencoder'}", "--flow.patch_size=1", "--flow.width=32"]
    words += ["--flow.blocks=2", "--flow.layers=1", "--train.steps=2", "--train.batch_size=8", "--train.eval_images=4"]
    assert main(words) == 0
    return kind, folder


def test_a_flow_works_in_its_latents(runs, tmp_path):
    kind, folder = runs
    flow = from_pretrained(checkpoint.newest(folder / "flow"))
    assert flow.denoises is (kind == "kl")
    y = [3, 7]
    assert torch.equal(flow.sample(y=y, seed=0), flow.to_images(flow.core.sample(y=y, seed=0, denoise=kind == "kl")))
    assert main(["sample", str(folder / "flow"), "--num=4", "-o", str(tmp_path / "grid.png")]) == 0
    assert main(["export", str(folder / "flow"), str(tmp_path / "exported")]) == 0
    moved = shutil.move(tmp_path / "exported", tmp_path / "elsewhere")
    assert torch.equal(from_pretrained(moved).sample(y=y, seed=0), flow.sample(y=y, seed=0))


def test_the_studio_offers_flows_in_latents_and_no_autoencoders(runs):
    kind, folder = runs
    shelf = Shelf([str(folder)], torch.device("cpu"))
    (name,) = shelf.entries
    assert name == "runs/flow"
    flow = shelf.flow(name)
    request = requested(shelf.classes(name), ["3"], 2, 0, 1, "linear", "standard", flow.denoises, 5)
    assert request.denoise is (kind == "kl")
    (drawn,) = draw_batches(flow, request, range(2))
    assert drawn.x.shape == (2, 1, 8, 8)


def test_figures_are_those_of_the_reconstructions(trained, capsys):
    kind, run = trained
    assert main(["autoencoder", "evaluate", str(run), "--images=20", "--extractor=none", "--batch-size=7"]) == 0
    found = json.loads((run / "reconstruction.json").read_text())
    data = load_data(DataConfig(name="digits", limit=64))
    indices = torch.linspace(0, len(data.held_out) - 1, 20).round().long().tolist()
    x = from_levels(data.held_out[indices][0], data.levels)
    autoencoder = load_autoencoder(str(run))
    x_hat = autoencoder.decode(autoencoder.encode(x)).clamp(-1, 1)
    psnr = 10 * (4 / (x - x_hat).square().mean(dim=(1, 2, 3))).log10()
    assert found["reconstruction"]["psnr"] == pytest.approx(psnr.mean().item(), abs=0.02)  # of 8-bit images
    assert found["reconstruction"]["images"] == 20
    assert ("noised" in found) is (kind != "kl")
    assert "rfid" not in found["reconstruction"]
    assert (run / "reconstruction.png").is_file()
    assert "psnr" in capsys.readouterr().out


def test_what_other_images_show_does_not_replace_the_runs_own(trained, tmp_path, capsys):
    _, run = trained
    words = ["autoencoder", "evaluate", str(run), "--data.limit=32", "--images=20", "--extractor=none"]
    with pytest.raises(SystemExit):
        main(words)
    assert "reconstruction.json is of the run's own data; give -o" in capsys.readouterr().err
    assert main([*words, "-o", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "reconstruction.json").read_text())["reconstruction"]["images"] == 20


def test_an_exported_autoencoder_is_the_runs(trained, tmp_path):
    _, run = trained
    folder = tmp_path / "out"
    assert main(["autoencoder", "export", str(run), str(folder)]) == 0
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(load_autoencoder(str(folder)).encode(x), load_autoencoder(str(run)).encode(x))
    with pytest.raises(SystemExit):
        main(["autoencoder", "export", str(run), str(folder)])


def test_diffusers_reads_what_kl_writes(tmp_path):
    train_autoencoder(config(tmp_path / "run"))
    model = AutoencoderKL.from_pretrained(tmp_path / "run" / "autoencoder")
    autoencoder, x = load_autoencoder(str(tmp_path / "run")), torch.rand(2, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        latents = model.encode(x).latent_dist.mean * model.config.scaling_factor
    assert torch.allclose(autoencoder.encode(x), latents, atol=1e-6)


def test_a_finished_run_that_goes_on_has_the_same_scale(tmp_path):
    train_autoencoder(config(tmp_path))
    scale = load_autoencoder(str(tmp_path)).config.scale
    assert scale != 1
    assert train_autoencoder(config(tmp_path, resume=True)).autoencoder.config.scale == scale
    assert load_autoencoder(str(tmp_path)).config.scale == scale


def test_a_flow_made_with_what_training_returns_finds_it_again(tmp_path):
    result = train_autoencoder(config(tmp_path / "run"))
    flow = LatentFlow(TarFlow(image_size=4, channels=3, patch_size=2, width=32, blocks=2, layers=1), result.autoencoder)
    flow.save_pretrained(tmp_path / "flow")
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(from_pretrained(tmp_path / "flow").to_data(x), flow.to_data(x))
    made = KLAutoencoder.new(KLConfig(channels=3, downsample=2, width=8), (8, 8), 1)
    with pytest.raises(InputError, match="the kl autoencoder must have a folder"):
        LatentFlow(flow.core, made)


def test_the_next_image_stands_for_one_that_cannot_be_read():
    class Damaged(MemorySplit):
        def __getitem__(self, indices):
            if 3 in torch.as_tensor(indices):
                raise InputError("image 3 cannot be read")
            return super().__getitem__(indices)

    train = load_data(DataConfig(name="digits", limit=64)).train
    (found,) = images(Damaged(train.images, train.labels), range(6), 17, torch.device("cpu"))
    assert torch.equal(found, from_levels(train[[0, 1, 2, 4, 4, 5]][0], 17))


def test_kl_reconstructs_a_sample_of_its_posterior():
    torch.manual_seed(0)
    made = KLAutoencoder.new(KLConfig(channels=3, downsample=2, width=8, kl_weight=0.5), (8, 12), 1)
    x, noise = torch.rand(4, 1, 8, 12) * 2 - 1, torch.randn(4, 3, 4, 6)
    x_hat, parts = made.reconstruct(x, noise, torch.rand(4))
    posterior = made.model.encode(x).latent_dist
    assert torch.equal(x_hat, made.model.decode(posterior.mean + posterior.std * noise).sample)
    nats = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum(
        dim=(1, 2, 3)
    )  # of N(mean, var) from N(0, I)
    assert parts["kl"].item() == pytest.approx(0.5 * nats.mean().item() / 96, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--kind=vq", "kind must be one of semantic, kl, got 'vq'"),
        (
            "--kind=kl --reconstruction.features=1",
            "reconstruction.features must be 0 for kind kl, which has no encoder, got 1.0",
        ),
        ("--kl.downsample=3", "kl.downsample must be a power of 2, got 3"),
        ("--kl.width=12", "kl.width must be a multiple of 8, got 12"),
        ("--kl.kl_weight=-1", "kl.kl_weight must be at least 0, got -1"),
        ("--kind=kl --kl.downsample=16", "image size must be a multiple of 16, got [8, 8]"),
        ("--train.eval_passes=5", "train.eval_passes is an option of flows"),
        ("--train.init=runs/other", "train.init is an option of flows"),
        ("--train.strategy=fsdp", "train.strategy is an option of flows"),
    ],
)
def test_impossible_options_are_one_sentence(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["autoencoder", "train", f"--run={tmp_path / 'run'}", "--data.name=digits", *words.split()])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_no_autoencoder_is_said(small_run, tmp_path, capsys):
    with pytest.raises(InputError, match="is a run that has not ended, or one of a flow; use the folder that"):
        load_autoencoder(str(small_run))
    with pytest.raises(InputError, match="holds no autoencoder that was trained with the flow"):
        load_trained_autoencoder(small_run)
    for words in (["evaluate", str(tmp_path)], ["export", str(tmp_path), str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as stop:
            main(["autoencoder", *words])
        assert stop.value.code == 2
    assert capsys.readouterr().err.count("holds no readable config.json of an autoencoder") == 2


def test_a_run_goes_on_with_its_own_options_only(tmp_path):
    train_autoencoder(config(tmp_path / "run", until=3))
    other = config(tmp_path / "run", resume=True)
    with pytest.raises(InputError, match=r"kl\.kl_weight was 1e-06 when .* began and is 0\.1"):
        train_autoencoder(replace(other, kl=replace(other.kl, kl_weight=0.1)))


@pytest.mark.parametrize("file", sorted(recipe("autoencoder/emoji").parent.glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_of_autoencoders_are_valid_and_those_of_flows_use_them(file):
    made = AutoencoderRunConfig.read(file)
    assert made.kind == "semantic"
    assert made.run == f"runs/{file.stem}_autoencoder"
    flow = RunConfig.read(recipe(f"{file.stem}_semantic"))
    assert flow.latents.autoencoder == made.run
    assert flow.data == made.data
    assert 0 < flow.flow.noise_std <= made.semantic.noise_std
