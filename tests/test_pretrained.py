import json
from dataclasses import asdict

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import images, labels, random_flow
from flowback import InputError, TarFlow, from_pretrained


@pytest.fixture
def flow():
    return random_flow(torch.float32, noise="uniform", levels=17, log_scale_bound=None, mlp_ratio=2.0)


@pytest.fixture
def folder(flow, tmp_path):
    flow.save_pretrained(tmp_path / "deep" / "down")
    return tmp_path / "deep" / "down"


@pytest.mark.parametrize("as_text", [True, False])
def test_loaded_flow_gives_equal_outputs(flow, folder, as_text):
    loaded = TarFlow.from_pretrained(str(folder) if as_text else folder)
    assert loaded.config == flow.config
    assert not loaded.training
    x, y = images(flow), labels(flow)
    for found, expected in zip(loaded.encode(x, y), flow.encode(x, y), strict=True):
        assert torch.equal(found, expected)
    g = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(loaded.sample(y=[0, 1], generator=g[0]), flow.sample(y=[0, 1], generator=g[1]))


def test_every_parameter_can_be_trained_on(folder):
    assert all(p.requires_grad for p in TarFlow.from_pretrained(folder).parameters())


def test_config_is_complete_and_readable(flow, folder):
    config = json.loads((folder / "config.json").read_text())
    assert config == {"model": "TarFlow", "format": 1, **asdict(flow.config)}
    assert (config["noise"], config["levels"], config["log_scale_bound"]) == ("uniform", 17, None)


def test_the_folder_holds_two_files_and_every_tensor(flow, folder):
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors"]
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == flow.state_dict().keys()


def test_saving_again_replaces(folder):
    other = random_flow(torch.float32, seed=5, blocks=1)
    other.save_pretrained(folder)
    loaded = TarFlow.from_pretrained(folder)
    assert loaded.config.blocks == 1
    assert torch.equal(loaded.state_dict()["blocks.0.position"], other.state_dict()["blocks.0.position"])


# ---- broken checkpoints ---------------------------------------------------------------------------------------------


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


NAME = "blocks.1.proj_in.weight"
OTHER = "does not describe a TarFlow or LatentFlow of format 1"
BROKEN = {
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(NAME)), rf"lacks the tensor {NAME}"),
    "extra tensor": (lambda f: change_tensors(f, lambda t: t.update(foo=torch.zeros(2))), "has a tensor foo that the"),
    "other shape": (
        lambda f: change_tensors(f, lambda t: t.update({NAME: torch.zeros(16, 9)})),
        rf"has {NAME} of shape \[16, 9\]; expected \[16, 8\]",
    ),
    "truncated": (truncate, r"model\.safetensors cannot be read as safetensors"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"cannot be read as safetensors"),
    "pickle": (
        lambda f: torch.save({NAME: torch.zeros(16, 8)}, f / "model.safetensors"),
        r"cannot be read as safetensors",
    ),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), r"no readable config\.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("width: 16"), r"no readable config\.json"),
    "config is not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x80"), r"no readable config\.json"),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        OTHER,
    ),
    "config is of another model": (
        lambda f: change_config(f, model="GPT"),
        OTHER,
    ),
    "config is of another format": (
        lambda f: change_config(f, format=2),
        OTHER,
    ),
    "unknown option": (lambda f: change_config(f, depth=3), r"no option 'depth'"),
    "option of another type": (lambda f: change_config(f, width="16"), r"flow\.width must be .*, got '16'"),
    "impossible option": (lambda f: change_config(f, head_dim=5), r"flow\.head_dim 5 does not divide"),
    "option of another flow": (lambda f: change_config(f, num_classes=5), r"class_embed of shape \[4, 16\]"),
    "more blocks than tensors": (lambda f: change_config(f, blocks=4), r"lacks the tensor blocks\.3\."),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_checkpoint_is_refused_by_name(folder, damage):
    spoil, message = BROKEN[damage]
    spoil(folder)
    with pytest.raises(InputError, match=message):
        TarFlow.from_pretrained(folder)


# ---- the hub --------------------------------------------------------------------------------------------------------


def test_hub_id_is_downloaded(folder, flow, monkeypatch):
    asked = []

    def download(repo, allow_patterns, **options):
        asked.append((repo, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = TarFlow.from_pretrained("someone/some-flow")
    files = [
        "autoencoder/config.json",
        "autoencoder/diffusion_pytorch_model.safetensors",
        "autoencoder/encoder.safetensors",
        "autoencoder/model.safetensors",
        "classes.json",
        "classification.json",
        "config.json",
    ]
    files += ["decoding.json", "denoiser/config.json", "denoiser/model.safetensors", "held_out.safetensors"]
    files += ["model.safetensors", "prior.safetensors", "sampling.json", "student/config.json", "student/model.safetensors"]
    assert asked == [("someone/some-flow", files)]
    assert torch.equal(loaded.encode(images(flow))[0], flow.encode(images(flow))[0])


@pytest.mark.parametrize("error", [OSError("no route to host\nmore"), RuntimeError(""), ValueError("404")])
def test_unreachable_hub_is_an_input_error_of_one_line(monkeypatch, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"there is no folder someone/some-flow, and the hub did not give it") as caught:
        TarFlow.from_pretrained("someone/some-flow")
    assert "\n" not in str(caught.value)


def test_offline_hub_without_a_cached_copy(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="there is no folder flowback-tests/does-not-exist, and the hub did not give it"):
        TarFlow.from_pretrained("flowback-tests/does-not-exist")


@pytest.mark.parametrize("place", ["missing", "./missing/folder", "/missing/folder", "~/missing", "a/b/c"])
def test_missing_folder_is_not_looked_up_on_the_hub(monkeypatch, place):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(InputError, match="is neither a folder nor a hub id of the form owner/name"):
        TarFlow.from_pretrained(place)


@pytest.mark.parametrize("load", [TarFlow.from_pretrained, from_pretrained])
def test_options_of_the_hub_are_passed_on(folder, flow, monkeypatch, load, tmp_path):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.update(k, name=a) or str(folder))
    loaded = load("me/my-flow", revision="v1", token="secret", cache_dir=tmp_path, device="cpu")
    assert asked["name"] == ("me/my-flow",)
    assert (asked["revision"], asked["token"], asked["cache_dir"]) == ("v1", "secret", tmp_path)
    assert torch.equal(loaded.encode(images(flow))[0], flow.encode(images(flow))[0])


# ---- other shapes and versions --------------------------------------------------------------------------------------


LATENT = ("channels", "downsample", "scale", "shift", "weights")


def test_a_flow_of_version_0_1_0_is_loaded(folder, flow):
    old = {f"latent_{name}": None for name in LATENT} | {"latent_posterior": "mean", "autoencoder": None}
    for values in (old, old | {"latent_posterior": None}):
        change_config(folder, **values)
        for load in (TarFlow.from_pretrained, from_pretrained):
            loaded = load(folder)
            assert type(loaded) is TarFlow
            assert loaded.config == flow.config
            assert torch.equal(loaded.encode(images(flow))[0], flow.encode(images(flow))[0])


def test_images_that_are_not_square_come_back_so(tmp_path):
    flow = random_flow(image_size=(4, 6))
    flow.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["image_size"] == [4, 6]
    loaded = TarFlow.from_pretrained(tmp_path)
    assert loaded.config == flow.config
    assert loaded.image_size == (4, 6)


def test_the_cause_of_an_error_is_kept(folder, monkeypatch):
    def download(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError) as caught:
        TarFlow.from_pretrained("someone/some-flow")
    assert isinstance(caught.value.__cause__, OSError)
    truncate(folder)
    with pytest.raises(InputError) as caught:
        TarFlow.from_pretrained(folder)
    assert caught.value.__cause__ is not None


def test_precision_is_kept(tmp_path):
    random_flow().save_pretrained(tmp_path)
    assert next(TarFlow.from_pretrained(tmp_path).parameters()).dtype == torch.float64
