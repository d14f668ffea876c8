"""Published checkpoints, against a plain implementation of that architecture: no cache, no shared code."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from builders import normal_, refuse
from flowback import InputError, TarFlow
from flowback.cli import main
from flowback.core.seeds import keyed_normal
from flowback.flow import convert as imported
from flowback.flow.convert import import_tarflow, options_in_name, read_tensors

# ---- the published architecture, as its checkpoints have it -----------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h, mask):
        out = []
        for q, k, v in zip(*(part.split(self.head_dim, -1) for part in self.qkv(self.norm(h)).chunk(3, -1)), strict=True):
            weights = (q @ k.transpose(1, 2) * self.head_dim**-0.5).masked_fill(mask == 0, -torch.inf)
            out.append(weights.softmax(-1) @ v)
        return self.proj(torch.cat(out, -1))


class Mlp(nn.Module):
    def __init__(self, width, ratio):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.main = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))


class AttnBlock(nn.Module):
    def __init__(self, width, head_dim, ratio):
        super().__init__()
        self.attention, self.mlp = Attention(width, head_dim), Mlp(width, ratio)

    def forward(self, h, mask):
        h = h + self.attention(h, mask)
        return h + self.mlp.main(self.mlp.norm(h))


class MetaBlock(nn.Module):
    def __init__(self, N, D, width, layers, head_dim, ratio, classes, nvp, flip):
        super().__init__()
        self.nvp, self.order = nvp, torch.arange(N).flip(0) if flip else torch.arange(N)
        self.proj_in, self.proj_out = nn.Linear(D, width), nn.Linear(width, 2 * D if nvp else D)
        self.pos_embed = nn.Parameter(torch.zeros(N, width))
        if classes:
            self.class_embed = nn.Parameter(torch.zeros(classes, 1, width))
        self.attn_blocks = nn.ModuleList(AttnBlock(width, head_dim, ratio) for _ in range(layers))
        self.register_buffer("attn_mask", torch.ones(N, N).tril())

    def parameters_of(self, u, y):
        """xa, xb of the ordered tokens `u [B, N, D]`."""
        h = self.proj_in(u) + self.pos_embed[self.order]
        if hasattr(self, "class_embed"):
            h = h + torch.stack([self.class_embed.mean(0) if k < 0 else self.class_embed[k] for k in y])
        for block in self.attn_blocks:
            h = block(h, self.attn_mask)
        out = self.proj_out(h)
        out = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], 1)
        return out.chunk(2, -1) if self.nvp else (torch.zeros_like(out), out)

    def forward(self, x, y):
        u = x[:, self.order]
        xa, xb = self.parameters_of(u, y)
        return ((u - xb) * torch.exp(-xa))[:, self.order], -xa.mean((1, 2))

    def reverse(self, z, y):
        u = z[:, self.order].clone()
        for n in range(1, u.shape[1]):
            xa, xb = self.parameters_of(u, y)
            u[:, n] = u[:, n] * torch.exp(xa[:, n]) + xb[:, n]
        return u[:, self.order]


class Published(nn.Module):
    def __init__(
        self, side=2, patch=2, channels=3, width=16, layers=(2, 2, 2), head_dim=8, ratio=2, classes=4, nvp=True, seed=0
    ):
        super().__init__()
        self.patch, self.size, self.channels, self.classes = patch, side * patch, channels, classes
        self.shape = N, D = side**2, channels * patch**2
        common = (head_dim, ratio, classes, nvp)
        self.blocks = nn.ModuleList(MetaBlock(N, D, width, n, *common, t % 2 == 1) for t, n in enumerate(layers))
        eighths = torch.randint(3, 14, (N, D), generator=torch.Generator().manual_seed(seed)) / 8
        self.register_buffer("var", eighths**2)  # its square root is exact
        normal_(self, 0.12, seed)

    def forward(self, x, y):
        u = nn.functional.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        log_det = 0
        for block in self.blocks:
            u, part = block(u, y)
            log_det = log_det + part
        return u, log_det

    def decode(self, z, y):
        for block in reversed(self.blocks):
            z = block.reverse(z, y)
        return nn.functional.fold(z.transpose(1, 2), self.size, self.patch, stride=self.patch)

    def sample(self, noise, y):
        return self.decode(noise * self.var.sqrt(), y)

    def denoise(self, x, y, noise_std):
        """One step along the gradient of the training loss, a mean over images and dimensions without `var`."""
        x = x.clone().requires_grad_()
        z, log_det = self(x, y)
        loss = 0.5 * z.square().mean() - log_det.mean()
        return x.detach() - noise_std**2 * x.numel() * torch.autograd.grad(loss, x)[0]


NAME = "digits_model_2_16_3_2_0.25.pth"  # of Published() with its defaults
OPTIONS = {"noise_std": 0.25, "head_dim": 8}


def stored(folder, model=None, name=NAME, **changes):
    """A checkpoint file; `changes` replace tensors of the state, or take them out (None)."""
    state = {**(model or Published()).state_dict(), **changes}
    torch.save({key: value for key, value in state.items() if value is not None}, Path(folder) / name)
    return Path(folder) / name


def batch(model, dtype=torch.float32, n=3, seed=1):
    """Images, and labels with a dropped one; all dropped for an unconditional model."""
    x = 2 * torch.rand(n, model.channels, model.size, model.size, generator=torch.Generator().manual_seed(seed)) - 1
    y = torch.arange(n) % (model.classes + 1) - 1 if model.classes else torch.full((n,), -1)
    return x.to(dtype), y


def imported_with(model, **options):
    with tempfile.TemporaryDirectory() as folder:
        return import_tarflow(stored(folder, model, "model.pth"), **{**OPTIONS, **options})


def assert_equal_outputs(flow, model, dtype=torch.float32):
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    flow, model = flow.to(dtype), model.to(dtype)
    x, y = batch(model, dtype)
    with torch.no_grad():
        z, log_det = flow.encode(x, y)
        their_z, their_log_det = model(x, y)
        assert_close(z, their_z, **tolerance)
        assert_close(log_det / flow.dims, their_log_det, **tolerance)
        noise = torch.randn(len(x), *model.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
        samples = model.sample(noise, y)
        g = torch.Generator().manual_seed(2)
        assert_close(flow.sample(y=y, denoise=False, generator=g, method="sequential"), samples, **tolerance)
        assert_close(flow.decode(their_z, y), x, **tolerance)
    assert (z - nn.functional.unfold(x, model.patch, stride=model.patch).mT).abs().max() > 0.01 or model.shape[0] == 1
    return samples


# ---- equal outputs ----------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    side=st.integers(1, 4),
    patch=st.integers(1, 3),
    channels=st.integers(1, 4),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    layers=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    ratio=st.integers(1, 4),
    classes=st.integers(0, 3),
    nvp=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_outputs_equal_those_of_the_published_architecture(patch, heads, head_dim, dtype, **options):
    model = Published(patch=patch, width=heads * head_dim, head_dim=head_dim, **options)
    flow = imported_with(model, patch_size=patch, head_dim=head_dim)
    assert_equal_outputs(flow, model, dtype)


@pytest.mark.parametrize("options", [{}, {"classes": 0}, {"nvp": False}, {"layers": (1, 3, 2)}], ids=str)
def test_outputs_stay_equal_once_written_and_loaded(tmp_path, options):
    model = Published(**options)
    imported_with(model).save_pretrained(tmp_path / "flow")
    flow = TarFlow.from_pretrained(tmp_path / "flow")
    samples = assert_equal_outputs(flow, model)
    _, y = batch(model)
    with torch.no_grad():
        assert_close(flow.log_prob(samples, y), log_density(model, samples, y), rtol=1e-5, atol=1e-5)


def log_density(model, x, y):
    z, log_det = model(x, y)
    return torch.distributions.Normal(0, model.var.sqrt()).log_prob(z).sum((1, 2)) + log_det * z[0].numel()


def test_no_labels_are_dropped_labels():
    model = Published()
    x, _ = batch(model)
    with torch.no_grad():
        assert_close(imported_with(model).encode(x)[0], model(x, [-1, -1, -1])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("ones", [True, False])
def test_denoising_is_the_published_step(ones):
    model = Published()
    if ones:
        model.var.fill_(1)
    flow = imported_with(model)
    x, y = batch(model)
    step = model.denoise(x, y, 0.25)
    assert (step - x).abs().max() > 0.01
    assert_close(flow.denoise(x, y), step, rtol=0, atol=1e-5)


# ---- what is inferred -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".pth", ".pt"])
def test_a_name_says_what_tensors_do_not(suffix):
    expected = {"patch_size": 4, "width": 1024, "blocks": 8, "layers": 8, "noise_std": 0.05}
    assert options_in_name(f"imagenet_model_4_1024_8_8_0.05{suffix}") == expected


@pytest.mark.parametrize(
    "name", ["model.pth", "x_model_4_1024_8_8.pth", "x_model_4_1024_8_8_0.05_old.pth", "4_1024_8_8_0.05"]
)
def test_other_names_say_nothing(name):
    assert options_in_name(name) == {}


def test_all_options_follow_from_tensors_and_name(tmp_path):
    flow = import_tarflow(str(stored(tmp_path)), head_dim=8)
    assert not flow.training
    c = flow.config
    assert (c.image_size, c.channels, c.num_classes, c.levels) == (4, 3, 4, 256)
    assert (c.patch_size, c.width, c.blocks, c.layers, c.head_dim, c.mlp_ratio) == (2, 16, 3, 2, 8, 2.0)
    assert (c.noise, c.noise_std, c.prior, c.log_scale_bound) == ("gaussian", 0.25, "scaled", None)
    assert import_tarflow(stored(tmp_path, Published(width=64), "m"), noise_std=0.1).config.head_dim == 64


def test_options_given_go_before_the_name(tmp_path):
    config = import_tarflow(stored(tmp_path), noise_std=0.0, patch_size=1, head_dim=8).config
    assert (config.noise_std, config.patch_size, config.channels, config.image_size) == (0.0, 1, 12, 2)
    assert import_tarflow(stored(tmp_path, Published(channels=4)), head_dim=8).config.channels == 4


@pytest.mark.parametrize(
    ("patch", "channels", "given"),
    [(2, 3, {}), (3, 1, {}), (1, 3, {}), (2, 12, {"channels": 12}), (1, 12, {"patch_size": 1}), (2, 1, {"channels": 1})],
)
def test_patch_size_and_channels(patch, channels, given):
    flow = imported_with(Published(patch=patch, channels=channels), **given)
    assert (flow.config.patch_size, flow.channels, flow.image_size) == (patch, channels, (2 * patch, 2 * patch))


def test_layers_may_differ_by_block():
    assert imported_with(Published(layers=(1, 3, 2))).config.layers == [1, 3, 2]


# ---- how it may be stored -----------------------------------------------------------------------------------------------


def same(flow, other):
    state, others = flow.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(torch.equal(state[name], others[name]) for name in state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", [None, "ema", "model", "state_dict"])
def test_wrapped_checkpoints(tmp_path, prefix, key):
    model = Published()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state if key is None else {"epoch": 3, key: state}, tmp_path / "wrapped.pth")
    assert same(import_tarflow(tmp_path / "wrapped.pth", **OPTIONS), imported_with(model))


def test_of_averaged_and_last_weights_the_averaged_ones_are_read(tmp_path):
    average = Published(seed=1)
    torch.save({"model": Published().state_dict(), "ema": average.state_dict()}, tmp_path / "both.pth")
    assert same(import_tarflow(tmp_path / "both.pth", **OPTIONS), imported_with(average))
    torch.save({"model": average.state_dict(), "ema": {"decay": 0.999}}, tmp_path / "both.pth")
    assert same(import_tarflow(tmp_path / "both.pth", **OPTIONS), imported_with(average))


def test_other_precisions_become_float32(tmp_path):
    model = Published()
    low = {name: t.bfloat16() for name, t in model.state_dict().items() if "attention" in name}
    mask = {"blocks.1.attn_mask": torch.ones(4, 4, dtype=torch.bool).tril()}
    low["var"] = (1.1 * model.var).half()
    double = {"blocks.2.pos_embed": model.blocks[2].pos_embed.double()}
    flow = import_tarflow(stored(tmp_path, model, **low, **double, **mask), head_dim=8)
    assert {tensor.dtype for tensor in flow.state_dict().values()} == {torch.float32}
    model.load_state_dict(model.state_dict() | low)
    assert_equal_outputs(flow, model)


@pytest.mark.parametrize("new_format", [True, False])
def test_both_formats_of_torch_save_and_memory_mapping(tmp_path, monkeypatch, new_format):
    model, mapped, load = Published(), [], torch.load
    monkeypatch.setattr(imported.torch, "load", lambda *a, **k: mapped.append(k["mmap"]) or load(*a, **k))
    torch.save(model.state_dict(), tmp_path / NAME, _use_new_zipfile_serialization=new_format)
    flow = import_tarflow(tmp_path / NAME, head_dim=8)
    (tmp_path / NAME).write_bytes(b"")  # nothing of the flow lies in the file
    assert mapped == [new_format]
    assert same(flow, imported_with(model))


# ---- refusals -----------------------------------------------------------------------------------------------------------

BLOCK = "blocks.1"
POSITIONS, EMBED, MASK, PROJ_OUT = (
    f"{BLOCK}.{name}" for name in ("pos_embed", "class_embed", "attn_mask", "proj_out.bias")
)
BIAS, QKV = f"{BLOCK}.attn_blocks.0.mlp.main.2.bias", f"{BLOCK}.attn_blocks.1.attention.qkv.weight"
FIRST, MLP = "blocks.0.proj_in.weight", "blocks.0.attn_blocks.0.mlp.main.0.weight"
LACKS, HAS_MORE = (f"{what} the tensors of such a checkpoint: " for what in ("lacks", "has more than"))
NOT_FINITE = "with values that are no finite numbers"
NO_MASK = "attn_mask that is not the causal mask; expected ones on and below the diagonal"

BAD_TENSORS = {
    "missing": ({BIAS: None}, LACKS + BIAS),
    "two missing": ({QKV: None, "var": None}, f"{LACKS}{QKV}, var"),
    "no mask": ({MASK: None}, LACKS + MASK),
    "block without classes": ({EMBED: None}, LACKS + EMBED),
    "classes in later blocks": ({"blocks.0.class_embed": None}, f"{HAS_MORE}{EMBED}, blocks.2.class_embed"),
    "superfluous": ({"foo": torch.ones(2), f"{BLOCK}.bar": torch.ones(2)}, f"{HAS_MORE}{BLOCK}.bar, foo"),
    "gap in the layers": (
        {f"{BLOCK}.attn_blocks.x.y": torch.ones(2)},
        f"{BLOCK}.attn_blocks.2.mlp.norm.bias, {BLOCK}.attn_blocks.2.mlp.norm.weight",
    ),
    "not TARFlow": ({FIRST: None}, f"is not a checkpoint of the published TARFlow code: it lacks the tensor {FIRST}"),
    "another dimension": (
        {"blocks.0.pos_embed": torch.ones(1, 4, 16)},
        "pos_embed of shape [1, 4, 16]; expected 2 dimensions",
    ),
    "other shape": ({POSITIONS: torch.ones(9, 16)}, f"{POSITIONS} of shape [9, 16]; expected [4, 16]"),
    "other layout": ({EMBED: torch.ones(4, 16)}, f"{EMBED} of shape [4, 16]; expected [4, 1, 16]"),
    "other scale": ({PROJ_OUT: torch.ones(12)}, f"{PROJ_OUT} of shape [12]; expected [24]"),
    "open mask": ({MASK: torch.ones(4, 4)}, NO_MASK),
    "strict mask": ({MASK: torch.ones(4, 4).tril(-1)}, NO_MASK),
    "no square": ({"blocks.0.pos_embed": torch.ones(5, 16)}, "has 5 tokens; expected a square number"),
    "odd MLP": ({MLP: torch.ones(33, 16)}, "has MLPs of 33 units; expected a multiple of the width 16"),
    "not a number": ({POSITIONS: torch.full((4, 16), torch.nan)}, f"{POSITIONS} of torch.float32 {NOT_FINITE}"),
    "too large": (
        {POSITIONS: torch.full((4, 16), 1e39, dtype=torch.float64)},
        f"{POSITIONS} of torch.float64 {NOT_FINITE}",
    ),
    "whole numbers": ({POSITIONS: torch.ones(4, 16).long()}, f"{POSITIONS} of torch.int64 {NOT_FINITE}"),
    "no variance": ({"var": torch.zeros(4, 12)}, "has var with a variance of 0; expected above 0"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(tmp_path, case):
    changes, message = BAD_TENSORS[case]
    with pytest.raises(InputError) as caught:
        import_tarflow(stored(tmp_path, name="model.pth", **changes), **OPTIONS)
    assert str(caught.value).endswith(message)


PATCHES = "possible patch sizes, and their channels: 1 (12), 2 (3)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 64}, "flow.head_dim 64 does not divide flow.width 16; expected 1, 2, 4, 8, 16"),
        ({"noise_std": -1.0}, "flow.noise_std must be at least 0, got -1.0"),
        ({"patch_size": 3}, f"has tokens of 12 numbers, which do not fit patch size 3; {PATCHES}"),
        ({"patch_size": 0}, f"do not fit patch size 0; {PATCHES}"),
        ({"channels": 0}, f"do not fit channels 0; {PATCHES}"),
        ({"patch_size": 2, "channels": 1}, f"do not fit patch size 2 and channels 1; {PATCHES}"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        import_tarflow(stored(tmp_path, name="model.pth"), **{**OPTIONS, **options})
    assert str(caught.value).endswith(message)


def test_without_a_telling_name_the_noise_must_be_given(tmp_path):
    with pytest.raises(InputError, match=r"model\.pth does not say the noise_std of its training"):
        import_tarflow(stored(tmp_path, name="model.pth"), head_dim=8)


def test_tokens_that_do_not_say_their_patches(tmp_path):
    file = stored(tmp_path, Published(channels=2), "model.pth")
    with pytest.raises(InputError, match=r"8 numbers.* squares of 3 channels or 1; possible .*: 1 \(8\), 2 \(2\)$"):
        import_tarflow(file, **OPTIONS)


@pytest.mark.parametrize(
    ("name", "what"),
    [("x_model_2_32_3_2_0.1.pth", "width 32"), ("x_model_2_16_4_2_0.1", "blocks 4"), ("x_model_2_16_3_1_0.1", "layers 1")],
)
def test_a_name_that_contradicts_the_tensors_is_refused(tmp_path, name, what):
    with pytest.raises(InputError, match=f"has {what} in its name but .* in its tensors"):
        import_tarflow(stored(tmp_path, name=name), head_dim=8)


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path, new_format):
    torch.save(
        {**Published().state_dict(), "x": Malicious(tmp_path / "ran")},
        tmp_path / NAME,
        _use_new_zipfile_serialization=new_format,
    )
    with pytest.raises(InputError, match=r"cannot be read; expected an undamaged file of tensors only, since other") as e:
        import_tarflow(tmp_path / NAME, head_dim=8)
    assert "weights_only" not in str(e.value)  # torch's advice to load it nevertheless
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / NAME, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", None], ids=["empty", "text", "no zip", "cut"])
def test_damaged_files_are_refused(tmp_path, content):
    file = stored(tmp_path)
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(InputError, match=r"cannot be read; expected an undamaged file of tensors only"):
        read_tensors(file)


@pytest.mark.parametrize("content", [{}, [1], torch.ones(2), {"a": 1}, {"model": {"a": 1}}, {3: torch.ones(2)}], ids=str)
def test_other_contents_are_refused(tmp_path, content):
    torch.save(content, tmp_path / NAME)
    with pytest.raises(
        InputError, match=r"is not a state_dict; expected one, or a dict with one as ema, model, state_dict"
    ):
        read_tensors(tmp_path / NAME)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    torch.save({"module.var": torch.ones(2), "var": torch.ones(2)}, tmp_path / NAME)
    with pytest.raises(InputError, match="differ in the prefixes of their names only"):
        read_tensors(tmp_path / NAME)


@pytest.mark.parametrize("name", ["missing.pth", ""])
def test_a_file_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"does not exist; expected a local file"):
        import_tarflow(tmp_path / name)


# ---- the command line ---------------------------------------------------------------------------------------------------


def test_imported_and_sampled_from_the_command_line(tmp_path, capsys):
    model = Published()
    folder, samples = tmp_path / "a" / "flow", tmp_path / "samples.npz"
    assert main(["import-tarflow", str(stored(tmp_path, model)), str(folder), "--head-dim=8"]) == 0
    out = capsys.readouterr().out
    assert "4 x 4 pixels, 3 channels, 4 classes" in out
    assert "patches of 2 pixels: 4 tokens of 12 numbers; trained with noise of 0.25" in out
    assert "3 blocks, layers 2, width 16, heads of 8, MLP ratio 2" in out
    assert f"the flow is in {folder}" in out

    assert main(["sample", str(folder), "--num=8", "--seed=3", "--no-denoise", "-o", str(samples)]) == 0
    noise = torch.stack([keyed_normal(model.shape, 3, number, 0) for number in range(8)])
    with torch.no_grad():
        x = model.sample(noise, torch.arange(8) % 4)
    expected = ((x + 1) * 128).floor().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    with np.load(samples) as archive:
        assert abs(archive["arr_0"].astype(int) - expected).max() <= 1
        assert archive["arr_1"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert expected.std() > 50


def test_options_of_the_command_line(tmp_path):
    file = stored(tmp_path, Published(classes=0), "model.pth")
    options = ["--noise-std=0.5", "--patch-size=1", "--channels=12", "--head-dim=4"]
    (tmp_path / "flow").mkdir()
    assert main(["import-tarflow", str(file), str(tmp_path / "flow"), *options]) == 0
    config = TarFlow.from_pretrained(tmp_path / "flow").config
    assert (config.noise_std, config.patch_size, config.channels, config.head_dim) == (0.5, 1, 12, 4)


def test_a_refused_checkpoint_writes_nothing(tmp_path, capsys):
    file, folder = stored(tmp_path, foo=torch.ones(2)), tmp_path / "flow"
    assert refuse(["import-tarflow", str(file), str(folder), "--head-dim=8"], capsys).endswith("such a checkpoint: foo")
    assert not folder.exists()
    shutil.copy(file, tmp_path / "model.pth")
    assert "noise_std" in refuse(["import-tarflow", str(tmp_path / "model.pth"), str(folder)], capsys)
