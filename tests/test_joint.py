"""Autoencoders that are trained together with the flow in their latents."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from builders import refuse
from flowback import InputError, LatentFlow, TarFlow
from flowback.data import DataConfig, load_data
from flowback.data.splits import MemorySplit
from flowback.flow.config import FlowConfig
from flowback.latents import load_autoencoder
from flowback.latents.joint import ConvEncoder, JointAutoencoder, JointConfig, hide, signal, signal_figures
from flowback.latents.losses import ReconstructionConfig
from flowback.runs import checkpoint
from flowback.runs.checkpoint import load_flow, load_trained_autoencoder
from flowback.runs.config import AlignmentConfig, LatentConfig, RunConfig, TrainConfig
from flowback.runs.log import read_metrics
from flowback.tasks.classify import classify
from flowback.training import train

OPTIONS = JointConfig(channels=4, width=32, mask=0.3)


def config(run, joint=OPTIONS, **train_options):
    """A run of both on digits: masked, with a discriminator from the middle on."""
    options = {"steps": 8, "batch_size": 16, "warmup": 2, "log_every": 2, "eval_every": 8, "eval_images": 20}
    options |= {"sample_every": 100, "checkpoint_every": 4}
    return RunConfig(
        run=str(run),
        data=DataConfig(limit=64),
        flow=FlowConfig(patch_size=1, width=32, blocks=2, layers=1),
        latents=LatentConfig(joint=True),
        joint=joint,
        reconstruction=ReconstructionConfig(adversarial=0.1, adversarial_from=0.5, discriminator_width=4),
        alignment=AlignmentConfig(projector_width=16),
        train=TrainConfig(**(options | train_options)),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, own_cache):
    """The folder of an undisturbed run."""
    run = tmp_path_factory.mktemp("joint") / "whole"
    train(config(run))
    return run


def tensors(run):
    folder = checkpoint.newest(run)
    return load_file(folder / "model.safetensors") | load_file(folder / "training.safetensors")


# ---- the nets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("downsample", "size"), [(2, (6, 4)), (4, (8, 8)), (6, (12, 18)), (14, (28, 14))])
def test_images_become_a_grid_of_latents_and_images_again(downsample, size):
    autoencoder = JointAutoencoder.new(JointConfig(channels=3, downsample=downsample, width=32), size, 2)
    images = torch.rand(2, 2, *size) * 2 - 1
    latents = autoencoder.encode(images)
    assert latents.shape == (2, 3, size[0] // downsample, size[1] // downsample)
    assert autoencoder.decode(latents).shape == images.shape


@pytest.mark.parametrize(("downsample", "width", "widths"), [(4, 64, [64, 32, 32]), (16, 128, [128, 64, 32, 32, 32])])
def test_the_encoder_is_as_wide_as_the_decoder_at_each_resolution(downsample, width, widths):
    options = JointConfig(downsample=downsample, width=width)
    steps = [layer for layer in ConvEncoder(options, 1) if isinstance(layer, torch.nn.Conv2d) and layer.stride != (1, 1)]
    assert options.widths == widths
    assert [(step.in_channels, step.out_channels) for step in steps[::-1]] == list(zip(widths[1:], widths, strict=False))


def test_after_one_step_every_weight_has_a_gradient(digits):
    """At the start the residual blocks add nothing, and their inner weights have none."""
    model, x = JointAutoencoder.new(OPTIONS, (8, 8), 1), digits[0][:16]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        _, _, reconstructed = model(x, torch.randn(16, 4, 2, 2), torch.rand(16, *model.places))
        (reconstructed - x).square().mean().backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_latents_are_what_the_encoder_says_with_noise_of_the_fixed_strength(digits):
    model = JointAutoencoder.new(replace(OPTIONS, mask=0.0), (8, 8), 1)
    noise = torch.randn(5, 4, 2, 2)
    mean, z, reconstructed = model(digits[0][:5], noise)
    assert torch.equal(mean, model.encode(digits[0][:5]))
    assert torch.equal(z, mean + 0.5 * noise)
    assert torch.equal(reconstructed, model.decode(z))


def test_a_share_of_the_patches_is_hidden_and_the_rest_is_left(digits):
    images, value = digits[0][:5], torch.tensor(7.0).view(1, 1, 1)
    noise = torch.rand(5, 4, 4)
    shown = hide(images, value, noise, 0.4, 2)
    hidden = (shown == 7).unflatten(3, (4, 2)).unflatten(2, (4, 2))  # patches of 2x2 pixels
    assert (hidden.float().mean((1, 3, 5)).sum((1, 2)) == 6).all()  # 0.4 of 16, rounded down
    assert torch.equal(shown[shown != 7], images[shown != 7])
    assert torch.equal(hidden[:, 0, :, 0, :, 0], noise < noise.flatten(1).sort().values[:, 6, None, None])
    assert torch.equal(hide(images, value, noise, 0.0, 2), images)


def test_patches_at_an_edge_may_be_cut(digits):
    shown = hide(digits[0][:2, :, :, :6], torch.zeros(1, 1, 1), torch.rand(2, 2, 2), 0.5, 4)  # patches of 4x4 pixels
    assert shown.shape == (2, 1, 8, 6)
    assert ((shown == 0).all(1).unflatten(1, (2, 4)).all(2)[..., [0, 4]].sum((1, 2)) == 2).all()


# ---- whether it collapses -------------------------------------------------------------------------------------------


def test_the_signal_of_a_channel_is_what_differs_between_images():
    torch.manual_seed(0)
    between = torch.tensor([2.0, 0.5, 0.0, 0.01])[:, None, None] * torch.randn(4096, 4, 2, 3)
    pattern = 5 * torch.randn(4, 2, 3)  # the same in all images
    found = signal(between + pattern, 0.5)
    assert torch.allclose(found, torch.tensor([4.0, 1.0, 0.0, 0.02]), rtol=0.02, atol=1e-5)
    figures = signal_figures(between + pattern, JointConfig(channels=4, dead_below=0.1))
    assert figures["dead_channels"] == 0.5
    assert figures["least_signal"] < 1e-5


def test_a_collapse_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, capsys):
    """The likelihood outweighs the reconstruction: the encoder learns to say nothing."""
    begun = config(tmp_path, joint=replace(OPTIONS, mask=0.0, nll_weight=30.0), steps=100, lr=5e-3)
    (tmp_path / "recipe.yaml").write_text(begun.to_yaml())
    said = refuse(["train", f"--config={tmp_path / 'recipe.yaml'}", f"--run={tmp_path / 'run'}"], capsys)
    assert "the latents collapsed: " in said
    assert "of their channels say nothing of the images" in said
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.csv") if "signal" in row]
    assert rows[0]["dead_channels"] == 0
    assert rows[-1]["dead_channels"] > begun.joint.most_dead
    assert rows[-1]["signal"] < 0.2 < rows[0]["signal"]
    assert checkpoint.damage(checkpoint.newest(tmp_path / "run")) is None
    assert rows[-1]["step"] < 100


# ---- training both --------------------------------------------------------------------------------------------------


def test_one_run_one_folder_one_checkpoint(whole):
    assert sorted(file.name for file in checkpoint.newest(whole).iterdir()) == [
        "checksums.json",
        "config.json",
        "model.safetensors",
        "state.json",
        "training.safetensors",
    ]
    rows = read_metrics(whole / "metrics.csv")
    first, last, measured = rows[0], rows[-2], rows[-1]
    assert first["loss"] == pytest.approx(first["pixels"] + 0.1 * first["nll"], abs=1e-5)
    parts = last["pixels"] + last["adversarial"] + last["discriminator"] + 0.1 * last["nll"]
    assert last["loss"] == pytest.approx(parts, abs=1e-5)
    assert last["pixels"] < first["pixels"]
    assert {"signal", "least_signal", "dead_channels"} <= last.keys()
    assert {"held_out_psnr", "held_out_ssim", "held_out_exact", "held_out_nats_per_dim"} <= measured.keys()
    assert (whole / "samples" / "step_00000008.png").exists()


def test_what_was_trained_draws_reconstructs_and_classifies(whole, digits):
    flow, _ = load_flow(whole)
    assert isinstance(flow, LatentFlow)
    assert flow.config.noise_std == OPTIONS.noise_std
    assert not flow.denoises
    assert flow.sample(y=[3, 7], seed=0).shape == (2, 1, 8, 8)
    x = digits[0][:6]
    z, _ = flow.encode(x, 3)
    assert torch.allclose(flow.decode(z, 3), flow.autoencoder.decode(flow.autoencoder.encode(x)), atol=1e-4)
    assert classify(flow, x, rule="exact").shape == (6, 10)


def test_autoencoder_is_an_average_too(whole):
    averaged, raw = (load_flow(whole, weights)[0].autoencoder.state_dict() for weights in ("ema", "raw"))
    assert all(not torch.equal(averaged[name], raw[name]) for name in ("to_latents.0.weight", "unseen"))
    assert torch.equal(raw["unseen"], tensors(whole)["weights.autoencoder.unseen"])


@pytest.mark.parametrize("stops", [[4], [3, 5]])
def test_resumed_equals_undisturbed_bit_for_bit(whole, tmp_path, stops):
    for i, stop in enumerate([*stops, None]):
        train(config(tmp_path / "run", until=stop, resume=i > 0))
    expected, found = tensors(whole), tensors(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_batch_in_pieces_gives_the_gradient_of_the_whole(tmp_path):
    """But for the discriminator, whose spectral norms are powered once a piece."""
    weights = []
    for pieces in (1, 2):
        one = config(tmp_path / str(pieces), steps=1, grad_accum_steps=pieces)
        train(replace(one, reconstruction=ReconstructionConfig()))
        weights.append(tensors(tmp_path / str(pieces)))
    assert all(torch.allclose(weights[0][name], value, atol=1e-4) for name, value in weights[1].items())


def test_pieces_of_one_image_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"train\.batch_size must be at least 32, 2 in a piece, got 16"):
        train(config(tmp_path, grad_accum_steps=16))


@pytest.mark.parametrize("strategy", ["forward", "detach", "reverse"])
def test_both_are_trained_with_an_alignment(tmp_path, strategy):
    one = config(tmp_path, steps=2)
    aligned = replace(one.alignment, strategy=strategy, at=[[1, 1], [2, 1]])
    joint = replace(OPTIONS, align_encoder=strategy == "forward")
    train(replace(one, joint=joint, alignment=aligned, reconstruction=ReconstructionConfig(features=0.1)))
    row = read_metrics(tmp_path / "metrics.csv")[0]
    assert row["loss"] == pytest.approx(row["pixels"] + row["features"] + 0.1 * (row["nll"] + 0.1 * row["align"]), abs=1e-5)
    assert tensors(tmp_path)["optimizer.autoencoder.to_latents.0.weight.exp_avg"].any()


def test_images_that_are_not_square(tmp_path):
    digits = load_data(DataConfig(limit=64))

    class Halves:
        train = MemorySplit(digits.train.images[:, :, :, :4], digits.train.labels)
        held_out = MemorySplit(digits.held_out.images[:, :, :, :4], digits.held_out.labels)
        levels = 17

    result = train(config(tmp_path, steps=2), data=Halves)
    assert result.flow.core.grid == (2, 1)
    assert load_flow(tmp_path)[0].sample(3, seed=0).shape == (3, 1, 8, 4)


def test_a_run_begins_with_both_of_another(whole, tmp_path):
    begun = RunConfig(run=str(tmp_path), data=DataConfig(limit=64), train=TrainConfig(steps=1, lr=1e-12, init=str(whole)))
    heavier = replace(begun, joint=JointConfig(nll_weight=0.5), latents=LatentConfig(joint=True))
    result = train(heavier)
    start, _ = load_flow(whole)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(result.flow.parameters(), start.parameters(), strict=True))
    assert RunConfig.read(tmp_path / "config.yaml").joint == replace(OPTIONS, nll_weight=0.5)
    with pytest.raises(InputError, match=r"joint\.channels must be 4 for this flow, got 8"):
        train(replace(heavier, run=str(tmp_path / "other"), joint=JointConfig(channels=8)))


def test_its_autoencoder_serves_other_flows(whole, tmp_path, digits):
    load_trained_autoencoder(whole).save_pretrained(tmp_path / "autoencoder")
    own, again = load_flow(whole)[0].autoencoder, load_autoencoder(str(tmp_path / "autoencoder"))
    assert torch.equal(own.encode(digits[0][:3]), again.encode(digits[0][:3]))
    assert again.config.noise_std == OPTIONS.noise_std
    plain = replace(config(tmp_path / "run", steps=2), latents=LatentConfig(autoencoder=str(tmp_path / "autoencoder")))
    result = train(plain)
    assert result.flow.autoencoder.config.name == str(tmp_path / "autoencoder")
    assert all(torch.equal(p, q) for p, q in zip(result.flow.autoencoder.parameters(), own.parameters(), strict=True))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": {"channels": 4, "width": 2**20}}, "describes"),
        ({"options": {"channels": 4, "layers": 10**9}}, "joint.layers must be at most 100"),
        ({"options": {"channels": 5, "width": 32}}, "its options do not fit its facts"),
        ({"options": {"colour": 1}}, "colour"),
        ({"options": None}, "does not describe a joint autoencoder"),
        ({"options": {"channels": 4, "width": 2**40}}, "overflow"),
        ({"model": "AutoencoderKL"}, "must name a JointAutoencoder as trained with the flow, got AutoencoderKL"),
        ({"model": ["JointAutoencoder"]}, "does not describe an autoencoder"),
    ],
)
def test_a_config_that_is_not_its_own_is_refused(whole, tmp_path, change, said):
    folder = shutil.copytree(checkpoint.newest(whole), tmp_path / "flow")
    described = json.loads((folder / "config.json").read_text())
    described["autoencoder"] |= change
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=said):
        load_flow(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channels": 0}, "joint.channels must be a whole number of at least 1, got 0"),
        ({"downsample": 1}, "joint.downsample must be a whole number of at least 2, got 1"),
        ({"noise_std": 0.0}, "joint.noise_std must be above 0, got 0.0"),
        ({"nll_weight": -1.0}, "joint.nll_weight must be at least 0, got -1.0"),
        ({"mask": 1.0}, "joint.mask must be a share from 0 to 1, 1 excluded, got 1.0"),
        ({"most_dead": 2.0}, "joint.most_dead must be a share from 0 to 1, got 2.0"),
        ({"width": 72, "downsample": 8}, "joint.width must be a multiple of 8, and so its halves down to 32, got 72"),
    ],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(InputError) as caught:
        JointConfig(**options)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"flow": FlowConfig(noise_std=0.2)}, "flow.noise_std must be joint.noise_std 0.5, or left out, got 0.2"),
        ({"joint": JointConfig(align_encoder=True)}, "joint.align_encoder needs alignment.strategy forward, got 'none'"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(sections, said):
    with pytest.raises(InputError) as caught:
        RunConfig(latents=LatentConfig(joint=True), **sections)
    assert str(caught.value) == said


def test_a_loss_that_cannot_be_had_is_said_before_anything_is_written(tmp_path):
    one = config(tmp_path / "run")
    with pytest.raises(InputError, match="LPIPS needs images of at least 16 pixels a side"):
        train(replace(one, reconstruction=ReconstructionConfig(lpips=1.0)))
    assert not (tmp_path / "run").exists()


def test_a_flow_of_images_of_another_size_than_its_autoencoders_is_refused(whole):
    flow = load_flow(whole)[0]
    larger = TarFlow(replace(flow.config, image_size=4))
    with pytest.raises(InputError, match=r"the autoencoder's image size must be \[8, 8\], got \[16, 16\]"):
        LatentFlow(larger, flow.autoencoder)


def test_the_files_of_a_run_are_found_from_any_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vgg16.pth").touch()
    one = replace(config("run"), reconstruction=ReconstructionConfig(lpips_weights="vgg16.pth"))
    assert one.rooted().reconstruction.lpips_weights == str(tmp_path / "vgg16.pth")


def test_another_autoencoder_beside_it_is_refused():
    with pytest.raises(InputError, match=r"leave out latents\.autoencoder and latents\.posterior, got vae and mean"):
        LatentConfig(joint=True, autoencoder="vae")
