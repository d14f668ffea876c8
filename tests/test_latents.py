import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from builders import normal_, tiny_autoencoder
from flowback import InputError, TarFlow
from flowback.cli import main
from flowback.data import DataConfig
from flowback.flow.config import FlowConfig
from flowback.runs.config import AlignmentConfig, RunConfig, TrainConfig
from flowback.training import train
from flowback.training.caches import make_caches

OPTIONS = {"image_size": 8, "channels": 1, "patch_size": 2, "width": 32, "blocks": 2, "layers": 1, "num_classes": 10}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path_factory.getbasetemp() / "latent_cache"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def flow(vae):
    return normal_(TarFlow(**OPTIONS, autoencoder=str(vae), noise_std=0.2), 0.1).eval()


def pictures(n=5, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def run_config(run, vae, aligned=False, **train_options):
    options = {"steps": 6, "batch_size": 16, "warmup": 2, "log_every": 2, "eval_every": 6, "eval_images": 20, "hflip": True}
    return RunConfig(
        run=str(run),
        data=DataConfig(limit=64),
        flow=FlowConfig(patch_size=1, width=32, blocks=2, layers=[1, 2], noise_std=0.2, autoencoder=str(vae), mlp="swiglu"),
        alignment=AlignmentConfig(strategy="reverse" if aligned else "none", at=[[2, 1]], projector_width=16),
        train=TrainConfig(**(options | {"sample_every": 100, "checkpoint_every": 3} | train_options)),
    )


def test_flow_takes_its_shape_and_its_scale_from_the_autoencoder(flow):
    assert flow.data_shape == (3, 4, 4)
    assert flow.token_shape == (4, 12)
    assert (flow.config.latent_scale, flow.config.latent_shift, flow.config.latent_downsample) == (0.5, 0.1, 2)


def test_latents_are_the_scaled_means_and_images_their_decoded_inverse(flow, vae):
    model = AutoencoderKL.from_pretrained(vae)
    x = pictures(20)  # more than one chunk
    latents = flow.to_data(x)
    with torch.no_grad():
        mean = model.encode(x).latent_dist.mean
        assert torch.allclose(latents, (mean - 0.1) * 0.5, atol=1e-6)
        assert torch.allclose(flow.to_images(latents), model.decode(mean).sample, atol=1e-5)
    assert not latents.requires_grad


def test_samples_of_the_posterior_are_a_function_of_the_generator(vae):
    flow = TarFlow(**OPTIONS, autoencoder=str(vae), latent_posterior="sample")
    x = pictures(1).expand(4000, -1, -1, -1)
    first, again = (flow.to_data(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(vae).encode(x[:1]).latent_dist
    assert torch.allclose(first.std(dim=0), 0.5 * posterior.std[0], rtol=0.1)
    assert torch.allclose(first.mean(dim=0), 0.5 * (posterior.mean[0] - 0.1), atol=0.05)


def test_sample_and_classify_speak_images_and_the_rest_latents(flow):
    x, log_prob = flow.sample([3, 7], generator=torch.Generator().manual_seed(0), return_log_prob=True)
    assert x.shape == (2, 1, 8, 8)
    assert log_prob.shape == (2,)
    latents = flow.to_data(x)
    z, _ = flow.encode(latents, torch.tensor([3, 7]))
    assert torch.allclose(flow.decode(z, torch.tensor([3, 7])), latents, atol=1e-4)
    assert flow.classify(x).shape == (2, 10)
    with pytest.raises(InputError, match=r"latents of shape \[2, 1, 8, 8\] do not fit; allowed is \[B, 3, 4, 4\]"):
        flow.encode(x)
    with pytest.raises(InputError, match="latents have no bins"):
        flow.dequantize(latents)


def test_denoising_is_the_score_step_in_latent_space(flow):
    x = flow.to_data(pictures()) + 0.2 * torch.randn(5, 3, 4, 4)
    y = torch.arange(5)
    probe = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(flow.log_prob(probe, y).sum(), probe)
    assert torch.allclose(flow.denoise(x, y), x + 0.2**2 * score, atol=1e-5)


def test_copies_and_checkpoints_share_the_autoencoder_and_find_it_again(flow, vae, tmp_path):
    flow.save_pretrained(tmp_path / "flow")
    assert not any("autoencoder" in name for name in load_file(tmp_path / "flow" / "model.safetensors"))
    loaded = TarFlow.from_pretrained(tmp_path / "flow")
    assert torch.equal(loaded.to_data(pictures()), flow.to_data(pictures()))
    shutil.copytree(vae, tmp_path / "flow" / "autoencoder")  # one that travels with the flow comes first
    config = json.loads((tmp_path / "flow" / "config.json").read_text())
    (tmp_path / "flow" / "config.json").write_text(json.dumps(config | {"autoencoder": "/not/here"}))
    assert torch.equal(TarFlow.from_pretrained(tmp_path / "flow").to_data(pictures()), flow.to_data(pictures()))


def test_other_weights_than_those_of_training_are_refused(flow, vae, tmp_path):
    other = tiny_autoencoder(tmp_path / "other", seed=1)
    known = {name: getattr(flow.config, name) for name in vars(flow.config) if name.startswith("latent_")}
    moved = TarFlow(**OPTIONS, **known, autoencoder=str(other))
    with pytest.raises(InputError, match=r"has weights \w{16}; allowed are \w{16}, in whose latents the flow was trained"):
        moved.to_data(pictures())


def spoil_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


BROKEN = {
    "no folder": (lambda f: shutil.rmtree(f), "is neither a folder nor a hub id"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no readable config.json"),
    "of another kind": (lambda f: spoil_config(f, _class_name="VQModel"), "does not describe a diffusers AutoencoderKL"),
    "a scale a channel": (lambda f: spoil_config(f, latents_mean=[0.0] * 3), "scales every channel by itself"),
    "no safetensors": (lambda f: next(f.glob("*.safetensors")).unlink(), "has no diffusion_pytorch_model.safetensors"),
    "colour": (lambda f: spoil_config(f, in_channels=3), "images of 1 channels do not fit .*; allowed is 3"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_unusable_autoencoders_are_named(damage, vae, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(vae, folder)
    spoil, message = BROKEN[damage]
    spoil(folder)
    with pytest.raises(InputError, match=message):
        TarFlow(**OPTIONS, autoencoder=str(folder))


def test_weights_that_do_not_belong_to_the_config_are_an_input_error(vae, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(vae, folder)
    save_file({"a": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"the weights in .* are not those of its config\.json"):
        TarFlow(**OPTIONS, autoencoder=str(folder)).to_data(pictures())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 9}, r"flow\.image_size 9 does not fit the autoencoder; allowed are multiples of 2"),
        ({"patch_size": 3}, r"flow\.patch_size 3 does not divide the side of the latents, 4; allowed: 1, 2, 4"),
        ({"noise": "uniform"}, r"flow\.noise is 'uniform'; allowed in an autoencoder's latents"),
        ({"latent_posterior": "mode"}, r"flow\.latent_posterior is 'mode'; allowed: mean, sample"),
    ],
)
def test_options_that_do_not_fit_latents_are_named(vae, options, message):
    with pytest.raises(InputError, match=message):
        TarFlow(**{**OPTIONS, **options}, autoencoder=str(vae))


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_cached_and_computed_latents_train_alike(vae, tmp_path, posterior):
    config = run_config(tmp_path / "cached", vae, aligned=True)
    config = replace(config, flow=replace(config.flow, latent_posterior=posterior))
    direct = replace(config, run=str(tmp_path / "direct"), train=replace(config.train, cache_latents=False))
    a, b = (train(c).flow.state_dict() for c in (config, direct))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-3


def test_resumed_latent_run_equals_the_undisturbed_one(vae, tmp_path):
    whole = train(run_config(tmp_path / "whole", vae, aligned=True)).flow.state_dict()
    train(run_config(tmp_path / "cut", vae, aligned=True, until=4))
    again = train(run_config(tmp_path / "cut", vae, aligned=True, resume=True)).flow.state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_images_are_not_read_where_everything_is_cached(vae, tmp_path, monkeypatch):
    config = run_config(tmp_path / "first", vae, aligned=True, eval_every=100)
    make_caches(config, tmp_path / "caches")
    from flowback.data.datasets import MemorySplit

    read, real = [], MemorySplit.__getitem__

    def note(split, indices):
        read.append(len(split))
        return real(split, indices)

    monkeypatch.setattr(MemorySplit, "__getitem__", note)
    train(replace(config, train=replace(config.train, caches=str(tmp_path / "caches"))))
    assert 64 not in read  # held-out images only


def test_caches_that_do_not_fit_are_refused_with_the_reason(vae, tmp_path):
    config = run_config(tmp_path / "run", vae, aligned=True)
    caches = str(tmp_path / "caches")
    with pytest.raises(InputError, match="holds no cache of latents"):
        train(replace(config, train=replace(config.train, caches=caches)))
    make_caches(config, tmp_path / "caches")
    for changed, reason in (
        (replace(config, data=DataConfig(limit=63)), "was made with images '.*', this run has '.*'"),
        (replace(config, train=replace(config.train, hflip=False)), "was made with flips True, this run has False"),
        (replace(config, flow=replace(config.flow, latent_posterior="sample")), "made with moments 1, this run has 2"),
        (replace(config, flow=replace(config.flow, patch_size=2)), r"made with grid \[4, 4\], this run has \[2, 2\]"),
    ):
        again = replace(changed, run=str(tmp_path / "other"), train=replace(changed.train, caches=caches))
        with pytest.raises(InputError, match=reason):
            train(again)


def test_every_verb_takes_and_gives_images(vae, tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    recipe = ["--flow.patch_size=1", "--flow.width=32", "--flow.blocks=2", "--flow.layers=1", "--flow.noise_std=0.2"]
    recipe += [f"--flow.autoencoder={vae}", "--data.limit=64", "--train.batch_size=16", "--train.steps=4"]
    recipe += ["--train.eval_images=20", "--train.warmup=2"]
    aligned = ["--alignment.strategy=reverse", "--alignment.at=[[2,1]]", "--alignment.projector_width=16"]
    caches = ["-o", "caches", *recipe, *aligned]
    assert main(["cache", "--plan=true", *caches]) == 0
    assert not (tmp_path / "caches").exists()
    assert main(["cache", "--part=1/1", *caches]) == 0
    assert main(["cache", "--verify=true", *caches]) == 0
    out = capsys.readouterr().out
    assert "latents" in out
    assert "features" in out
    assert main(["train", "--run=run", "--train.caches=caches", *recipe, *aligned]) == 0
    assert main(["sample", "run", "--num=4", "-o", "images"]) == 0
    files = sorted(str(file) for file in (tmp_path / "images").glob("*.png"))
    assert Image.open(files[0]).size == (8, 8)
    assert main(["classify", "run", files[0]]) == 0
    assert main(["evaluate", "run", "--metrics=bpd,accuracy,probe", "--images=40"]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert "bits_per_dim" not in found
    assert found["latent_bits_per_dim"] == pytest.approx(found["nats_per_dim"] / 0.6931471805599453)
    assert main(["encode", "run", *files[:2], "--labels=1"]) == 0
    assert main(["decode", "run", "z.safetensors"]) == 0
    assert main(["interpolate", "run", *files[:2], "--steps=3"]) == 0
    assert main(["inpaint", "run", files[0], "--box=1,1,2,3", "--steps=2", "--num=2", "--tries=1"]) == 0
    assert main(["swap", "run", files[0], "--to=1,2"]) == 0
    assert Image.open("swapped.png").size[1] > 8
