import copy
import json
import pickle
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from builders import normal_, tiny_autoencoder
from flowback import InputError, LatentFlow, TarFlow, classify, from_pretrained
from flowback.cli import main
from flowback.core.units import from_levels
from flowback.data import DataConfig
from flowback.flow import io
from flowback.flow.config import FlowConfig
from flowback.latents import load_autoencoder
from flowback.latents.kl import KLAutoencoder
from flowback.latents.loading import read_config
from flowback.runs.config import AlignmentConfig, LatentConfig, RunConfig, TrainConfig
from flowback.tasks.classify import fit_statistics
from flowback.tasks.editing import inpaint, interpolate, swap_class
from flowback.tasks.refinement import agreement, best_of
from flowback.training import train
from flowback.training.caches import make_caches

OPTIONS = {"image_size": 4, "channels": 3, "patch_size": 2, "width": 32, "blocks": 2, "layers": 1, "num_classes": 10}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path_factory.getbasetemp() / "latent_cache"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny_autoencoder(tmp_path_factory.mktemp("vae"))


def latent_flow(vae, posterior="mean", **options):
    core = normal_(TarFlow(**{**OPTIONS, "noise_std": 0.2, **options}), 0.1)
    return LatentFlow(core, load_autoencoder(str(vae), posterior)).eval()


@pytest.fixture
def flow(vae):
    return latent_flow(vae)


def pictures(n=5, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- one module that speaks images ----------------------------------------------------------------------------------


def test_it_takes_its_shape_from_flow_and_autoencoder(flow):
    assert flow.data_shape == (1, 8, 8)
    assert flow.image_size == (8, 8)
    assert flow.channels == 1
    assert flow.core.data_shape == (3, 4, 4)
    assert flow.token_shape == flow.core.token_shape == (4, 12)
    known = flow.autoencoder.config
    assert (known.scale, known.shift, known.downsample, known.channels) == (0.5, 0.1, 2, 3)


def test_images_need_not_be_square(vae):
    flow = latent_flow(vae, image_size=(4, 6))
    assert flow.data_shape == (1, 8, 12)
    assert flow.sample(2, seed=0).shape == (2, 1, 8, 12)
    assert flow.log_prob(torch.zeros(2, 1, 8, 12)).shape == (2,)


def test_latents_are_the_scaled_means_and_images_their_decoded_inverse(flow, vae):
    model = AutoencoderKL.from_pretrained(vae)
    x = pictures(20)  # more than one chunk
    latents = flow.to_data(x)
    with torch.no_grad():
        mean = model.encode(x).latent_dist.mean
        assert torch.allclose(latents, (mean - 0.1) * 0.5, atol=1e-6)
        assert torch.allclose(flow.to_images(latents), model.decode(mean).sample, atol=1e-5)
    assert not latents.requires_grad


def test_channels_are_scaled_each_by_its_own_numbers(vae, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(vae, folder)
    means, deviations = [0.5, -1.0, 2.0], [0.5, 2.0, 4.0]
    spoil_config(folder, latents_mean=means, latents_std=deviations)
    autoencoder, x = load_autoencoder(str(folder)), pictures()
    with torch.no_grad():
        mean = AutoencoderKL.from_pretrained(vae).encode(x).latent_dist.mean
    # as diffusers' pipelines undo it: latents * latents_std / scaling_factor + latents_mean
    wide = [torch.tensor(values).view(-1, 1, 1) for values in (means, deviations)]
    assert torch.allclose(autoencoder.encode(x) * wide[1] / 0.5 + wide[0], mean, atol=1e-5)
    assert torch.allclose(
        autoencoder.decode(autoencoder.encode(x)), load_autoencoder(str(vae)).decode((mean - 0.1) * 0.5), atol=1e-5
    )
    core = normal_(TarFlow(**OPTIONS), 0.1)
    flow = LatentFlow(core, autoencoder)
    flow.save_pretrained(tmp_path / "flow")
    assert from_pretrained(tmp_path / "flow").autoencoder.config == autoencoder.config
    assert torch.equal(from_pretrained(tmp_path / "flow").to_data(x), flow.to_data(x))


def test_samples_of_the_posterior_are_a_function_of_the_generator(vae):
    flow = latent_flow(vae, "sample")
    x = pictures(1).expand(1000, -1, -1, -1)
    first, again = (flow.to_data(x, seeded(3)) for _ in range(2))
    assert torch.equal(first, again)
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(vae).encode(x[:1]).latent_dist
    assert torch.allclose(first.std(dim=0), 0.5 * posterior.std[0], rtol=0.1)
    assert torch.allclose(first.mean(dim=0), 0.5 * (posterior.mean[0] - 0.1), atol=0.05)


def test_every_method_speaks_images_and_z_is_that_of_the_latents(flow):
    x, y = pictures(), torch.tensor([3, 7, -1, 0, 9])
    latents = flow.to_data(x)
    for trace in (None, [(1, 1), (2, 1)]):
        found, expected = flow.encode(x, y, trace=trace), flow.core.encode(latents, y, trace=trace)
        assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))
        assert trace is None or found[2].hidden.keys() == {(1, 1), (2, 1)}
    z, _ = flow(x, y)
    assert torch.allclose(flow.decode(z, y), flow.autoencoder.decode(latents), atol=1e-4)
    images, report = flow.decode_with_report(z, y, 1.0, "jacobi")
    assert images.shape == x.shape
    assert len(report) == 2
    expected = flow.core.log_prob(flow.core.perturb(latents, seeded()), y)
    assert torch.equal(flow.log_prob(x, y, seeded()), expected)


@pytest.mark.parametrize(
    ("num", "y", "shape"),
    [(3, None, (3,)), ((2, 2), None, (2, 2)), (None, [3, 7], (2,)), (2, 4, (2,)), ((1, 3), 4, (1, 3))],
)
def test_samples_are_images(flow, num, y, shape):
    options = {"seed": 1, "guidance": 1.0 if y else 0.0}
    x, log_prob = flow.sample(num, y, return_log_prob=True, **options)
    assert x.shape == (*shape, 1, 8, 8)
    assert log_prob.shape == shape
    latents, expected = flow.core.sample(num, y, return_log_prob=True, **options)
    assert torch.equal(log_prob, expected)
    assert torch.equal(x.flatten(0, -4), flow.to_images(latents.flatten(0, -4)))
    assert torch.equal(flow.sample(num, y, **options), x)


def test_other_shapes_than_those_of_images_are_refused(flow):
    for wrong in (torch.zeros(2, 3, 4, 4), torch.zeros(1, 8, 8), torch.zeros(2, 1, 8, 6)):
        for use in (flow.encode, flow.log_prob, flow.to_data):
            with pytest.raises(InputError, match=r"images must have the shape \[B, 1, 8, 8\], got"):
                use(wrong)


def test_gradients_pass_the_autoencoder_which_gets_none(flow):
    x, z = pictures(1).requires_grad_(), torch.randn(1, *flow.token_shape).requires_grad_()
    assert torch.autograd.grad(flow.log_prob(x).sum(), x)[0].abs().min() > 0
    direction = torch.randn(1, 1, 8, 8)
    (gradient,) = torch.autograd.grad((flow.decode(z, 3) * direction).sum(), z)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        slope = ((flow.decode(z + step, 3) - flow.decode(z - step, 3)) * direction).sum() / 0.02
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.02)
    flow.decode(z, 3).sum().backward()
    assert all(p.grad is None for p in flow.autoencoder.parameters())
    assert any(p.grad is not None and p.grad.any() for p in flow.flow.parameters())


def test_denoising_is_the_score_step_in_latent_space(flow):
    x = flow.to_data(pictures()) + 0.2 * torch.randn(5, 3, 4, 4)
    y = torch.arange(5)
    probe = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(flow.core.log_prob(probe, y).sum(), probe)
    assert torch.allclose(flow.core.denoise(x, y), x + 0.2**2 * score, atol=1e-5)


# ---- what is done with it -------------------------------------------------------------------------------------------


def forms(tmp_path):
    """The same two images in every form."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    pils = [Image.fromarray(image) for image in pixels]
    for number, image in enumerate(pils):
        image.save(tmp_path / f"{number}.png")
    tensor = torch.from_numpy(pixels)[:, None]
    files = [tmp_path / "0.png", str(tmp_path / "1.png")]
    return from_levels(tensor), [tensor, pixels[..., None], list(pixels), pils, files]


def test_tasks_take_images_of_every_form_and_give_images(flow, tmp_path):
    x, others = forms(tmp_path)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :4] = True
    tasks = {
        "classify": lambda x: classify(flow, x, "exact"),
        "shortlist": lambda x: classify(flow, x, "shortlist_2", statistics=fit_statistics(flow, x)).nan_to_num(neginf=0),
        "interpolate": lambda x: interpolate(flow, x, x, 3, [0, 1], 2),
        "swap": lambda x: swap_class(flow, x, [0, 1], 2),
        "inpaint": lambda x: inpaint(flow, x, mask, 3, 2, 2, seeded()).x,
    }
    shapes = {"classify": (2, 10), "shortlist": (2, 10), "interpolate": (2, 3, 1, 8, 8)}
    for name, task in tasks.items():
        expected = task(x)
        assert expected.shape == shapes.get(name, (2, 1, 8, 8)), name
        assert not expected.requires_grad
        for same in others:
            assert torch.equal(task(same), expected), name
        with torch.inference_mode():
            assert torch.equal(task(x.clone()), expected), name


def test_classification_is_that_of_the_latents(flow):
    x = pictures()
    assert torch.equal(classify(flow, x, "exact"), classify(flow.core, flow.to_data(x), "exact"))


def test_edits_are_edits_of_the_latents(flow):
    a, b = pictures(), pictures(seed=1)
    way = interpolate(flow, a, b, 3, 1, 2)
    for end, x in ((0, a), (-1, b)):  # as the autoencoder reconstructs them
        assert torch.allclose(way[:, end], flow.to_images(flow.to_data(x)), atol=1e-4)
    latents = interpolate(flow.core, flow.to_data(a), flow.to_data(b), 3, 1, 2)
    assert torch.equal(way, torch.stack([flow.to_images(x) for x in latents.unbind(1)], dim=1))
    assert torch.equal(swap_class(flow, a, 1, 2), flow.to_images(swap_class(flow.core, flow.to_data(a), 1, 2)))


def test_a_latent_is_drawn_if_one_of_its_pixels_is(flow):
    x, mask = pictures(2), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 2, 5] = True
    touched = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    touched[..., 1, 2] = True
    found, expected = (
        inpaint(flow, x, mask, 1, 2, 1, seeded()),
        inpaint(flow.core, flow.to_data(x), touched, 1, 2, 1, seeded()),
    )
    assert torch.equal(found.x, flow.to_images(expected.x))
    assert torch.equal(found.log_prob, expected.log_prob)


def test_better_samples_are_those_of_the_flow_in_latents(flow):
    z, y = torch.randn(2, 3, *flow.token_shape, generator=seeded()), torch.tensor([1, 2])
    assert torch.equal(best_of(flow, z, y).z, best_of(flow.core, z, y).z)
    x = flow.core.decode(z[:, 0], y)
    assert torch.equal(agreement(flow, x, y)[0], agreement(flow.core, x, y)[0])


def test_a_sampled_latent_is_independent_of_the_noise(vae):
    """Both noises from streams of equal seed would be one noise of another variance."""
    flow = latent_flow(vae, "sample")
    seen = []
    perturb = flow.core.perturb
    flow.core.perturb = lambda x, generator=None: seen.append((x, perturb(x, generator))) or seen[-1][1]
    for seed in (0, 1):
        classify(flow, pictures(1).expand(500, -1, -1, -1), "single_gradient", seed=seed)
    (clean, noisy), (again, _) = seen
    assert torch.equal(clean, again)
    both = torch.stack([(clean - clean.mean(0)).flatten(), (noisy - clean).flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.02


# ---- a module like others -------------------------------------------------------------------------------------------


def test_to_moves_both_and_training_mode_leaves_the_autoencoder_alone(flow):
    assert flow.to(torch.float64) is flow
    assert {p.dtype for p in flow.parameters()} == {torch.float64}
    assert flow.dtype == torch.float64
    assert flow.log_prob(pictures()).dtype == torch.float64
    flow.train()
    assert flow.core.training
    assert not any(module.training for module in flow.autoencoder.modules())
    assert not any(p.requires_grad for p in flow.autoencoder.parameters())
    assert all(p.requires_grad for p in flow.core.parameters())


def test_state_holds_both_and_is_loaded_strictly(flow, vae):
    state = flow.state_dict()
    assert {name.split(".")[0] for name in state} == {"flow", "autoencoder"}
    other = LatentFlow(TarFlow(**OPTIONS, noise_std=0.2), load_autoencoder(str(vae))).eval()
    assert not torch.equal(other.sample(2, seed=0), flow.sample(2, seed=0))
    other.load_state_dict(state)
    assert torch.equal(other.sample(2, seed=0), flow.sample(2, seed=0))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_copies_are_equal_and_their_own(flow, duplicate):
    again = duplicate(flow)
    assert torch.equal(again.sample(2, seed=0), flow.sample(2, seed=0))
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    assert any(p.any() for p in flow.core.parameters())
    assert any(p.any() for p in flow.autoencoder.parameters())


def test_constructors_read_and_download_nothing(flow, monkeypatch):
    def fail(*args, **options):
        pytest.fail("something was loaded")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", fail)
    monkeypatch.setattr(io, "find_folder", fail)
    monkeypatch.setattr("flowback.latents.loading.find_folder", fail)
    monkeypatch.setattr("pathlib.Path.open", fail)
    known = replace(flow.autoencoder.config, name="/not/here")
    made = LatentFlow(TarFlow(**OPTIONS), KLAutoencoder(flow.autoencoder.model, known).freeze())
    assert made.sample(2).shape == (2, 1, 8, 8)


# ---- on disk --------------------------------------------------------------------------------------------------------


def test_a_saved_flow_finds_its_autoencoder_again(flow, vae, tmp_path):
    folder = tmp_path / "flow"
    flow.save_pretrained(folder)
    assert not any("autoencoder" in name for name in load_file(folder / "model.safetensors"))
    for load in (from_pretrained, LatentFlow.from_pretrained):
        loaded = load(folder)
        assert isinstance(loaded, LatentFlow)
        assert not loaded.training
        assert loaded.core.folder == folder
        assert torch.equal(loaded.sample(y=[3, 7], seed=0), flow.sample(y=[3, 7], seed=0))
        assert torch.equal(classify(loaded, pictures(), "exact"), classify(flow, pictures(), "exact"))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (folder / "config.json").read_text()
    shutil.copytree(vae, folder / "autoencoder")  # one in the flow's own folder comes first
    config = json.loads((folder / "config.json").read_text())
    config["autoencoder"]["name"] = "/not/here"
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(from_pretrained(folder).to_data(pictures()), flow.to_data(pictures()))


def test_the_kind_of_flow_is_found_or_named(flow, tmp_path):
    flow.save_pretrained(tmp_path / "latent")
    flow.core.save_pretrained(tmp_path / "plain")
    assert type(from_pretrained(tmp_path / "plain")) is TarFlow
    for kind, name in ((TarFlow, "latent"), (LatentFlow, "plain")):
        with pytest.raises(InputError, match=rf"not a {kind.__name__}; flowback\.from_pretrained loads either"):
            kind.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_a_flow_of_version_0_1_0_loads_with_equal_outputs(vae, posterior, tmp_path):
    """Whose config.json had the autoencoder's facts among the flow's options, and the size of images."""
    flow = latent_flow(vae, posterior)
    flow.save_pretrained(tmp_path)
    known = asdict(flow.autoencoder.config)
    options = asdict(flow.config) | {"image_size": 8, "channels": 1, "autoencoder": known["name"]}
    options |= {
        f"latent_{name}": known[name] for name in ("channels", "downsample", "scale", "shift", "weights", "posterior")
    }
    (tmp_path / "config.json").write_text(json.dumps({"model": "TarFlow", "format": 1, **options}))
    loaded = from_pretrained(tmp_path)
    assert isinstance(loaded, LatentFlow)
    assert loaded.config == flow.config
    assert loaded.autoencoder.config == flow.autoencoder.config
    x = pictures()
    assert torch.equal(loaded.encode(x, 3, generator=seeded())[0], flow.encode(x, 3, generator=seeded())[0])
    assert torch.equal(loaded.sample(y=[3, 7], guidance=1.0, seed=0), flow.sample(y=[3, 7], guidance=1.0, seed=0))
    assert torch.equal(classify(loaded, x, "exact"), classify(flow, x, "exact"))
    with pytest.raises(InputError, match=r"flowback\.from_pretrained"):
        TarFlow.from_pretrained(tmp_path)


def test_a_flow_of_version_0_1_0_in_pixels_stays_a_tarflow(tmp_path):
    flow = TarFlow(**OPTIONS)
    flow.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    without = dict.fromkeys(["autoencoder", *(f"latent_{name}" for name in ("channels", "downsample", "scale", "shift"))])
    old = json.loads(file.read_text()) | without | {"latent_weights": None, "latent_posterior": "mean"}
    file.write_text(json.dumps(old))
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is TarFlow
    assert loaded.config == flow.config
    assert torch.equal(TarFlow.from_pretrained(tmp_path).sample(2, seed=0), flow.sample(2, seed=0))


def test_other_weights_than_those_of_training_are_refused(flow, vae, tmp_path):
    other = tiny_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"must have the weights \w{16}, in whose latents .* got \w{16}"):
        load_autoencoder(replace(flow.autoencoder.config, name=str(other)))
    flow.save_pretrained(tmp_path / "flow")
    shutil.copytree(other, tmp_path / "flow" / "autoencoder")
    with pytest.raises(InputError, match="must have the weights"):
        from_pretrained(tmp_path / "flow")


# ---- what does not fit ----------------------------------------------------------------------------------------------


def spoil_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


BROKEN = {
    "no folder": (lambda f: shutil.rmtree(f), "is neither a folder nor a hub id"),
    "no config": (lambda f: (f / "config.json").unlink(), r"holds no readable config\.json"),
    "of another kind": (lambda f: spoil_config(f, _class_name="VQModel"), "does not describe an autoencoder; expected one"),
    "means alone": (lambda f: spoil_config(f, latents_mean=[0.0] * 3), "has latents_std None; expected a number"),
    "two deviations": (lambda f: spoil_config(f, latents_std=[1.0] * 2), "or one for each of 3 channels"),
    "a deviation of 0": (
        lambda f: spoil_config(f, latents_std=[1.0, 0.0, 1.0]),
        "expected a number above 0 for each",
    ),
    "no safetensors": (lambda f: next(f.glob("*.safetensors")).unlink(), r"has no diffusion_pytorch_model\.safetensors"),
    "colour": (lambda f: spoil_config(f, in_channels=3), "cannot be loaded|not those of its config"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_unusable_autoencoders_are_named(damage, vae, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(vae, folder)
    spoil, message = BROKEN[damage]
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_autoencoder(str(folder))


def test_weights_that_do_not_belong_to_the_config_are_an_input_error(vae, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(vae, folder)
    save_file({"a": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"the weights in .* are not those of its config\.json"):
        load_autoencoder(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 4}, "must have the 3 channels of the latents, got 4"),
        ({"noise": "uniform"}, r"flow\.noise must be gaussian in latents, .* got 'uniform'"),
    ],
)
def test_flows_that_do_not_fit_the_latents_are_named(vae, options, message):
    with pytest.raises(InputError, match=message):
        latent_flow(vae, **options)


def test_what_are_no_flow_and_autoencoder_is_named(flow, vae):
    for wrong in ((flow.core, str(vae)), (flow.core, flow.autoencoder.model), (flow, flow.autoencoder)):
        with pytest.raises(InputError, match="made of a TarFlow and an Autoencoder"):
            LatentFlow(*wrong)


def test_impossible_facts_of_an_autoencoder_are_named(vae):
    known = read_config(str(vae))
    assert known.latent_size((8, 12)) == (4, 6)
    for size in ((9, 8), (8, 9)):
        with pytest.raises(InputError, match=rf"multiple of 2, got \[{size[0]}, {size[1]}\]"):
            known.latent_size(size)
    with pytest.raises(InputError, match=r"posterior must be one of mean, sample, got 'mode'"):
        load_autoencoder(str(vae), "mode")


# ---- training -------------------------------------------------------------------------------------------------------


def run_config(run, vae, aligned=False, latents=None, **train_options):
    options = {"steps": 6, "batch_size": 16, "warmup": 2, "log_every": 2, "eval_every": 6, "eval_images": 20, "hflip": True}
    return RunConfig(
        run=str(run),
        data=DataConfig(limit=64),
        flow=FlowConfig(patch_size=1, width=32, blocks=2, layers=[1, 2], noise_std=0.2, mlp="swiglu"),
        latents=LatentConfig(autoencoder=str(vae), **(latents or {})),
        alignment=AlignmentConfig(strategy="reverse" if aligned else "none", at=[[2, 1]], projector_width=16),
        train=TrainConfig(**(options | {"sample_every": 100, "checkpoint_every": 3} | train_options)),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, flow=replace(c.flow, patch_size=3)), r"patch_size 3 does not divide the image size 4"),
        (lambda c: replace(c, flow=replace(c.flow, noise="uniform")), r"flow\.noise .*latents"),
        (lambda c: replace(c, flow=replace(c.flow, channels=1)), r"flow\.channels must be 3 for these latents, got 1"),
        (lambda c: replace(c, flow=replace(c.flow, image_size=8)), r"flow\.image_size must be 4 for these latents, got 8"),
        (lambda c: replace(c, latents=LatentConfig(autoencoder="/not/here")), "neither a folder nor a hub id"),
    ],
)
def test_recipes_that_do_not_fit_latents_are_named(vae, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        train(change(run_config(tmp_path / "run", vae)))


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_cached_and_computed_latents_train_alike(vae, tmp_path, posterior):
    config = run_config(tmp_path / "cached", vae, aligned=True, latents={"posterior": posterior})
    direct = replace(config, run=str(tmp_path / "direct"), latents=replace(config.latents, cache=False))
    a, b = (train(c).flow.state_dict() for c in (config, direct))
    assert any(name.startswith("autoencoder") for name in a)
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
        (replace(config, latents=replace(config.latents, posterior="sample")), "made with moments 1, this run has 2"),
        (replace(config, flow=replace(config.flow, patch_size=2)), r"made with grid \[4, 4\], this run has \[2, 2\]"),
    ):
        again = replace(changed, run=str(tmp_path / "other"), train=replace(changed.train, caches=caches))
        with pytest.raises(InputError, match=reason):
            train(again)


def test_every_verb_takes_and_gives_images(vae, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = ["--flow.patch_size=1", "--flow.width=32", "--flow.blocks=2", "--flow.layers=1", "--flow.noise_std=0.2"]
    recipe += [f"--latents.autoencoder={vae}", "--data.limit=64", "--train.batch_size=16", "--train.steps=4"]
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
