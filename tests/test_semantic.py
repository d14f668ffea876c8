"""Autoencoders in the features of a frozen encoder: what they keep, what they refuse, and that digits can be learned."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import gradients
from flowback import InputError, LatentFlow, TarFlow, from_pretrained, load_encoder
from flowback.data import DataConfig, load_data
from flowback.latents import load_autoencoder
from flowback.latents.losses import ReconstructionConfig, ReconstructionLoss
from flowback.latents.semantic import SemanticAutoencoder, SemanticConfig
from flowback.runs.config import AutoencoderRunConfig, TrainConfig
from flowback.training.caches import CachePlan, feature_plan

SMALL = {"encoder": "test_vit", "encoder_weights": "random", "channels": 3, "downsample": 2, "width": 32, "layers": 1}
SMALL |= {"decoder_width": 32, "decoder_layers": 1}


def made(images, size=None, **options):
    """Fitted to images."""
    torch.manual_seed(0)
    autoencoder = SemanticAutoencoder.new(SemanticConfig(**(SMALL | options)), size or images.shape[-2:], images.shape[1])
    autoencoder.fit(images.split(50))
    return autoencoder


def noise_of(autoencoder, images):
    noise = torch.randn(len(images), autoencoder.config.channels, *autoencoder.grid)
    return noise, torch.rand(len(images))


@pytest.fixture(scope="module")
def x(digits):
    return digits[0][:150]


@pytest.fixture
def saved(x, tmp_path):
    autoencoder = made(x).freeze()
    autoencoder.save_pretrained(tmp_path / "ae")
    return autoencoder, tmp_path / "ae"


@pytest.mark.parametrize("decoder", ["conv", "transformer"])
@pytest.mark.parametrize("compressor", ["pca", "attention", "transformer"])
def test_every_kind_is_loaded_as_it_was_saved(x, tmp_path, compressor, decoder):
    x = x[..., :6]  # 8 x 6 pixels on 4 x 3 latents
    autoencoder = made(x, compressor=compressor, decoder=decoder)
    autoencoder.reconstruct(x[:9], *noise_of(autoencoder, x[:9]))  # moves the running statistics
    autoencoder.freeze().save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    latents = autoencoder.encode(x[:5])
    assert latents.shape == (5, 3, 4, 3)
    assert torch.equal(loaded.encode(x[:5]), latents)
    assert torch.equal(loaded.decode(latents), autoencoder.decode(latents))
    assert loaded.decode(latents).shape == (5, 1, 8, 6)
    assert loaded.config.noise_std == 0.4
    assert loaded.config.image_size == (8, 6)
    assert not loaded.train().decoder.training


def test_latents_of_pca_have_mean_0_and_mean_variance_1(x):
    latents = made(x).encode(x)
    assert torch.allclose(latents.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert latents.var(dim=(0, 2, 3)).mean().item() == pytest.approx(1, rel=1e-3)


def test_averaged_weights_are_settled_to_mean_0_and_variance_1(x):
    autoencoder = made(x, compressor="attention").freeze()
    with torch.no_grad():
        autoencoder.compressor.there.leave.weight.mul_(7)
    autoencoder.settle(x)
    latents = autoencoder.encode(x)
    assert torch.allclose(latents.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(latents.var(dim=(0, 2, 3)), torch.ones(3), atol=1e-2)


@pytest.mark.parametrize("compressor", ["pca", "attention"])
def test_latents_are_made_of_cached_features_where_these_are_there(x, tmp_path, monkeypatch, compressor):
    autoencoder = made(x, compressor=compressor).freeze()
    data = load_data(DataConfig(limit=60))
    config = AutoencoderRunConfig(data=DataConfig(limit=60), train=TrainConfig(hflip=True))
    features = feature_plan(config, data, autoencoder)
    moments = CachePlan({"kind": "latents"}, (3, *autoencoder.grid), autoencoder.moments, features, autoencoder.compressed)

    def filled(plan, name):
        cache = plan.planned(tmp_path / name, len(data.train), flips=True)
        plan.fill(cache, config, data, lambda done: None)
        return cache

    expected = filled(moments, "alone")
    filled(features, "beside")
    monkeypatch.setattr(autoencoder, "encoder", None)  # which nothing is left to do for
    found = filled(moments, "beside")
    for flipped in (False, True):
        rows = torch.arange(len(data.train)), torch.full((len(data.train),), flipped)
        assert torch.allclose(found(*rows).float(), expected(*rows).float(), atol=0.02)
    assert not torch.allclose(found(*rows), found(rows[0], ~rows[1]), atol=0.1)


def test_noise_is_uniform_up_to_noise_std_on_latents_as_a_flow_sees_them(x):
    autoencoder = made(x, noise_std=0.8).eval()
    noise, levels = noise_of(autoencoder, x[:6])
    found, terms = autoencoder.reconstruct(x[:6], noise, levels)
    noisy = autoencoder.encode(x[:6]) + 0.8 * levels.view(-1, 1, 1, 1) * noise
    assert torch.allclose(found, autoencoder.decode(noisy), atol=1e-5)
    assert not terms
    features = autoencoder.features(x[:6])
    assert torch.equal(autoencoder.reconstruct(x[:6], noise, levels, features)[0], found)


def test_the_term_of_learned_compressors_is_the_share_of_variance_that_is_lost(digits):
    x = digits[0][:40]
    autoencoder = made(x, compressor="transformer", feature_weight=0.5).eval()
    noise, levels = noise_of(autoencoder, x)
    _, terms = autoencoder.reconstruct(x, noise, torch.zeros_like(levels))
    features = autoencoder.features(x)
    back = autoencoder.compressor.expand(autoencoder.compressor.compress(features))
    share = (back - features).square().mean() / features.var(dim=(0, 1)).mean()
    assert terms["latents"].item() == pytest.approx(0.5 * share.item(), rel=1e-3)


@pytest.mark.parametrize(("compressor", "encoder"), [("pca", "efficientnet_lite0"), ("transformer", "test_vit")])
def test_digits_are_learned_with_all_losses_in_one_backward(digits, compressor, encoder):
    x = digits[0][:200]
    autoencoder = made(x, compressor=compressor, encoder=encoder, channels=16, downsample=4)
    options = ReconstructionConfig(adversarial=0.05, features=0.1, discriminator_width=8)
    loss = ReconstructionLoss(options, 1, (8, 8), load_encoder("test_vit", "random", (1, 1)))
    optimizer = torch.optim.AdamW([*autoencoder.parameters(), *loss.parameters()], lr=3e-3)
    with torch.no_grad():
        features = torch.cat([autoencoder.features(part) for part in x.split(50)])

    def pixels(rows, training):
        noise, levels = noise_of(autoencoder, x[rows])
        image, terms = autoencoder.train(training).reconstruct(x[rows], noise, levels, features[rows])
        total, parts = loss(x[rows], image)
        if training:
            optimizer.zero_grad()
            torch.stack([total, *terms.values()]).sum().backward()
            optimizer.step()
        return parts["pixels"].item()

    before = pixels(torch.arange(160, 200), False)
    for step in range(40):
        pixels(torch.arange(step % 5 * 32, step % 5 * 32 + 32), True)
    assert pixels(torch.arange(160, 200), False) < 0.6 * before
    reached = gradients(autoencoder) | gradients(loss)
    assert all(gradient.abs().max() > 0 for gradient in reached.values())


def test_the_encoder_is_no_part_and_comes_along(x):
    autoencoder = made(x)
    assert not any("encoder" in name for name in [*autoencoder.state_dict(), *dict(autoencoder.named_parameters())])
    copied = deepcopy(autoencoder).double()
    assert copied.encode(x[:2].double()).dtype == copied.encoder.mean.dtype == torch.float64
    assert autoencoder.encoder.mean.dtype == torch.float32


def test_frozen_it_is_differentiable_in_images_and_latents(x):
    autoencoder = made(x, compressor="attention").freeze()
    images = x[:2].clone().requires_grad_()
    autoencoder.decode(autoencoder.encode(images)).square().sum().backward()
    assert images.grad.abs().max() > 0
    assert all(p.grad is None for p in [*autoencoder.parameters(), *autoencoder.encoder.parameters()])


# ---- on disk --------------------------------------------------------------------------------------------------------


def test_published_weights_are_not_saved_unless_asked(x, tmp_path):
    autoencoder = made(x, encoder="efficientnet_lite0", encoder_weights=None, downsample=4).freeze()
    autoencoder.save_pretrained(tmp_path / "without")
    autoencoder.save_pretrained(tmp_path / "with", with_encoder=True)
    assert sorted(file.name for file in (tmp_path / "without").iterdir()) == ["config.json", "model.safetensors"]
    held = load_file(tmp_path / "with" / "encoder.safetensors")
    assert all(torch.equal(held[name], t) for name, t in autoencoder.encoder.model.state_dict().items())
    latents = autoencoder.encode(x[:4])
    for folder in ("with", "without"):
        assert torch.allclose(load_autoencoder(str(tmp_path / folder)).encode(x[:4]), latents, atol=1e-6)


def test_another_encoder_is_refused(saved):
    _, folder = saved
    file = folder / "encoder.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(InputError, match=r"the encoder test_vit must be the one that the autoencoder in .* trained with"):
        load_autoencoder(str(folder))


@pytest.mark.parametrize(
    "change", [{"options": {"encoder": "test_vit", "depth": 3}}, {"options": None}, {"options": {**SMALL, "encoder": None}}]
)
def test_a_config_that_describes_none_is_refused(saved, change):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=r"config\.json does not describe a semantic autoencoder"):
        load_autoencoder(str(folder))


def test_a_flow_in_semantic_latents_goes_where_it_is_copied(saved, x, tmp_path):
    _, folder = saved
    sizes = {"image_size": 4, "channels": 3, "patch_size": 1, "width": 16, "head_dim": 8, "blocks": 2, "layers": 1}
    flow = TarFlow(**sizes, num_classes=10, noise_std=0.3)
    latent = LatentFlow(flow, load_autoencoder(str(folder))).eval()
    latent.save_portable(tmp_path / "flow")
    shutil.rmtree(folder)
    loaded = from_pretrained(tmp_path / "flow")
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    here, there = (f.log_prob(x[:3], 1, generator) for f, generator in zip((latent, loaded), generators, strict=True))
    assert torch.allclose(here, there, atol=1e-4)
    drawn = loaded.sample(2, y=[3, 7], seed=0)
    assert drawn.shape == (2, 1, 8, 8)
    assert torch.allclose(drawn, latent.sample(2, y=[3, 7], seed=0), atol=1e-4)


# ---- what is impossible ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compressor": "linear"}, "semantic.compressor must be one of pca, attention, transformer, got 'linear'"),
        ({"decoder": "unet"}, "semantic.decoder must be one of transformer, conv, got 'unet'"),
        ({"encoder_precision": "fp8"}, "semantic.encoder_precision must be one of 32-true, bf16-mixed, got 'fp8'"),
        ({"channels": 0}, "semantic.channels must be at least 1, got 0"),
        ({"width": 48}, "semantic.width must be a multiple of 32, got 48"),
        ({"decoder_width": 0}, "semantic.decoder_width must be a multiple of 32, got 0"),
        ({"noise_std": float("inf")}, "semantic.noise_std must be a number of at least 0, got inf"),
        ({"channels": 65}, "channels must be from 1 to 64, those of the encoder's features, got 65"),
        ({"downsample": 3}, "image size must be a multiple of 3"),
        ({"encoder": "nobody"}, "encoder 'nobody' is unknown"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SemanticAutoencoder.new(SemanticConfig(**(SMALL | options)), (8, 8), 1)
