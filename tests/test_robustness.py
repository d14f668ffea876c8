"""What strangers do: outputs that cannot be written, ends before the end, names as people type them, foreign files."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import unicodedata
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from builders import images, random_flow, refuse, tiny_autoencoder
from flowback import InputError, TarFlow, classify, from_pretrained
from flowback.cli import main
from flowback.cli.common import chosen_labels
from flowback.core import console
from flowback.core.console import command, say
from flowback.core.files import cache_folder, check_place, names_folder, new_folder, read_json, typed_path, write_whole
from flowback.data import DataConfig, as_images, load_data, load_image
from flowback.encoders import load_encoder
from flowback.flow.convert import read_tensors
from flowback.latents import load_autoencoder
from flowback.measure.extractors import checked_weights
from flowback.measure.fidelity import open_images
from flowback.runs import checkpoint
from flowback.runs.config import load_yaml
from flowback.tasks.editing import inpaint, interpolate, swap_class

NAMES = st.text(st.characters(codec="utf-8", blacklist_characters="/\0"), min_size=1, max_size=30)
NAMES = NAMES.filter(lambda name: name not in (".", "..") and len(os.fsencode(name)) < 200)


@pytest.fixture
def here(small_run, tmp_path, monkeypatch):
    """A working folder with a flow, three images and what encode made of them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint.newest(small_run), "flow")
    for k in range(3):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (8, 8), np.uint8)).save(f"{k}.png")
    Path("file").write_text("mine")
    return tmp_path


def listing() -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in Path().rglob("*") if file.is_file()}


THREE = "0.png 1.png 2.png --labels=1"
EDITS = {
    "encode": (f"encode flow {THREE}", ".safetensors"),
    "interpolate": (f"interpolate flow {THREE} --steps=3", ".png"),
    "swap": (f"swap flow {THREE} --to=2,3", ".png"),
    "inpaint": (f"inpaint flow {THREE} --box=0,0,4,4 --steps=1 --tries=1 --num=2", ".png"),
}
edits = pytest.mark.parametrize("verb", EDITS)


# ---- outputs --------------------------------------------------------------------------------------------------------


@edits
@pytest.mark.parametrize("place", ["file/x", "folder", f"{'x' * 300}"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(here, monkeypatch, capsys, verb, place):
    words, suffix = EDITS[verb]
    Path(f"folder{suffix}").mkdir()
    before = listing()
    monkeypatch.setattr("flowback.cli.editing.load_flow", lambda *_: pytest.fail("loaded"))
    assert place[:6] in refuse([*words.split(), "-o", place + suffix], capsys)
    assert listing() == before


@pytest.mark.parametrize("words", ["export flow", "import-tarflow nowhere.pth"])
@pytest.mark.parametrize("place", ["file/x", "file", "x" * 300])
def test_folders_that_cannot_be_made_are_refused_before_the_work(here, monkeypatch, capsys, words, place):
    monkeypatch.setattr("flowback.reports.card.load_flow", lambda *_: pytest.fail("loaded"))
    before = listing()
    assert place in refuse([*words.split(), place], capsys)
    assert listing() == before


def test_a_place_is_checked_without_a_trace(here, monkeypatch):
    check_place(Path("new/folder/a.png"))
    check_place(Path("file"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"output file cannot be written .*read-only"):
        check_place(Path("file"))
    assert set(os.listdir()) == {"flow", "file", "0.png", "1.png", "2.png"}


@pytest.mark.parametrize("words", ["swap flow 0.png 1.png -o 1.png", "inpaint flow 0.png --mask=2.png -o ./2.png"])
def test_an_output_is_none_of_the_inputs(here, capsys, words):
    before = listing()
    assert "is one of the files that are read" in refuse(words.split(), capsys)
    assert listing() == before


@edits
def test_what_was_done_before_an_interruption_is_kept(here, monkeypatch, capsys, verb):
    words, suffix = EDITS[verb]
    whole = TarFlow.denoise if verb == "inpaint" else TarFlow.encode
    calls, most = [], {"encode": 3, "interpolate": 2, "swap": 4, "inpaint": 2}[verb]

    def interrupted(*args, **kwargs):
        calls.append(0)
        if len(calls) > most:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    assert main([*words.split(), "--batch-size=1", "-o", f"whole{suffix}"]) == 0
    monkeypatch.setattr(TarFlow, "denoise" if verb == "inpaint" else "encode", interrupted)
    assert main([*words.split(), "--batch-size=1", "-o", f"part{suffix}"]) == 130
    assert f"what was done before it ended is in part{suffix}" in capsys.readouterr().out
    if verb == "encode":
        whole, part = load_file("whole.safetensors"), load_file("part.safetensors")
        rows = len(part["z"])
        assert 1 <= rows < 3
        assert all(torch.equal(part[name], whole[name][:rows]) for name in whole)
    else:
        assert Image.open("part.png").height < Image.open("whole.png").height


@contextmanager
def small_disk(size: int):
    """No file grows beyond so many bytes."""
    import resource

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(sys.platform != "linux", reason="limits files as Linux does")
@pytest.mark.parametrize(
    "words",
    [
        *(f"{words} -o out{suffix}" for words, suffix in EDITS.values()),
        "decode flow z.safetensors -o out.png",
        "decode flow z.safetensors -o out",
        "export flow out",
        "sample flow --num=3 -o out.png",
        "sample flow --num=3 -o out.npz",
        "sample flow --num=3 -o out",
    ],
)
def test_a_full_disk_is_one_sentence_and_an_earlier_output_stays(here, capsys, words):
    assert main(["encode", "flow", "0.png", "1.png", "--labels=1", "-o", "z.safetensors"]) == 0
    output = Path(words.split()[-1])
    if output.suffix:
        output.write_text("earlier")
    before = listing()
    capsys.readouterr()
    with small_disk(60):
        said = refuse(words.split(), capsys)
    assert "cannot be used" in said
    assert str(output) in said
    assert {name: what for name, what in listing().items() if ".parts" not in name and ".flowback" not in name} == before


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="limits files as Linux does")
@pytest.mark.parametrize("verb", [*EDITS, "export", "sample"])
def test_a_disk_that_is_full_after_any_number_of_bytes(here, capsys, verb):
    words, suffix = {**EDITS, "export": ("export flow", ""), "sample": ("sample flow --num=70", ".npz")}[verb]
    output = Path(f"out{suffix}")
    arguments = [*words.split(), *([str(output)] if verb == "export" else ["-o", str(output)])]
    kept = listing()
    for size in (int(1.5**k) for k in range(5, 45)):
        if suffix:
            output.write_text("earlier")
        with small_disk(size):
            try:
                done = main(arguments) == 0
            except SystemExit as stop:
                done = stop.code != 2
        if done:
            break
        assert len(capsys.readouterr().err.splitlines()) == 1
        if suffix:
            assert output.read_text() == "earlier"
            output.unlink()
        assert {name: what for name, what in listing().items() if ".parts" not in name} == kept
    assert output.exists()
    assert size > 1000


@pytest.mark.soak
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    TarFlow(image_size=32, patch_size=2, channels=3, width=64, blocks=2, layers=2).save_pretrained(tmp_path / "flow")
    Image.new("RGB", (32, 32), (9, 8, 7)).save(tmp_path / "a.png")
    code = "import resource, sys; from flowback.cli import main; main(sys.argv[1:]); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = {}
    for verb, options in {"encode": ["-o", "z.safetensors"], "swap": [], "interpolate": ["--steps=2"]}.items():
        for count in (16, 512):
            words = [verb, "flow", *["a.png"] * count, "--batch-size=16", *options]
            done = subprocess.run(
                [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=True
            )
            peaks[verb, count] = int(done.stdout.split()[-1]) / 1024
        assert peaks[verb, 512] < peaks[verb, 16] + 100, peaks  # MiB; the images themselves take 6 to 30


def test_a_folder_is_filled_at_once_or_not_at_all(tmp_path):
    for place in (tmp_path / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        there = place.exists()
        with pytest.raises(IsADirectoryError), new_folder(place) as inside:
            inside.write_text("a")
        assert place.exists() == there
        with new_folder(place) as inside:
            (inside / "a").write_text("a")
            (inside / "b").mkdir()
            assert not (place / "a").exists()
        assert sorted(os.listdir(place)) == ["a", "b"]


def test_a_file_with_a_long_name_is_written_whole(tmp_path):
    file = tmp_path / f"{'é' * 120}.txt"
    write_whole(file, lambda partial: partial.write_text("a"))
    assert file.read_text() == "a"
    assert len(os.listdir(tmp_path)) == 1


def test_a_class_is_printed_for_each_file_that_can_be_read(here, capsys):
    Path("bad.png").write_text("no image")
    with pytest.raises(SystemExit) as stop:
        main(["classify", "flow", "0.png", "bad.png", "2.png", "nowhere.png", "--rule=exact", "--batch-size=1"])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert [line.split(":")[0] for line in said.out.splitlines()][:2] == ["0.png", "2.png"]
    assert len(said.err.splitlines()) == 1
    assert "bad.png cannot be read" in said.err
    assert "nowhere.png cannot be read" in said.err


def test_scores_that_are_not_finite_name_no_class(here, capsys):
    flow = TarFlow.from_pretrained("flow")
    with torch.no_grad():
        flow.blocks[0].proj_in.weight.fill_(torch.nan)
    flow.save_pretrained("broken")
    for rule in ("exact", "single_gradient"):
        assert main(["classify", "broken", "0.png", f"--rule={rule}"]) == 0
        assert capsys.readouterr().out.splitlines()[0] == "0.png: no score is a finite number"


@pytest.mark.parametrize("number", [5, 28, 32])
def test_a_verb_ends_its_work_though_nobody_listens(here, monkeypatch, capsys, number):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as gone:
        gone.setattr(sys, "stdout", Gone())
        assert main([*EDITS["encode"][0].split(), "-o", "z.safetensors"]) == 1
    assert len(load_file("z.safetensors")["z"]) == 3
    assert os.strerror(number) in capsys.readouterr().err
    assert console.output.lost is None


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_batches_bound_what_the_flow_sees_and_change_nothing(monkeypatch):
    flow, seen = random_flow(), []
    encode, decode = TarFlow.encode, TarFlow.decode
    a, b, y = images(flow, 5), images(flow, 5, seed=2), torch.tensor([0, 1, 2, 3, -1])
    whole = interpolate(flow, a, b, 3, y, 2), swap_class(flow, a, y, 1), swap_class(flow, a, y, y.flip(0))
    monkeypatch.setattr(TarFlow, "encode", lambda self, x, *args, **kw: seen.append(len(x)) or encode(self, x, *args, **kw))
    monkeypatch.setattr(TarFlow, "decode", lambda self, z, *args, **kw: seen.append(len(z)) or decode(self, z, *args, **kw))
    parts = (
        interpolate(flow, a, b, 3, y, 2, batch_size=2),
        swap_class(flow, a, y, 1, batch_size=2),
        swap_class(flow, a, y, y.flip(0), batch_size=2),
    )
    assert max(seen) == 2
    assert all(torch.allclose(x, w, atol=1e-10) for x, w in zip(parts, whole, strict=True))
    for edit in (lambda: interpolate(flow, a, b, 3, batch_size=0), lambda: swap_class(flow, a, y, y, batch_size=0)):
        with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
            edit()


@edits
def test_batches_change_nothing_on_the_command_line(here, verb):
    words, suffix = EDITS[verb]
    for size in (1, 2, 64):
        assert main([*words.split(), f"--batch-size={size}", "-o", f"by_{size}{suffix}"]) == 0
    if verb == "encode":
        one, all_ = load_file("by_1.safetensors"), load_file("by_64.safetensors")
        assert all(torch.allclose(one[name], all_[name], atol=1e-4) for name in one)
        return
    one, all_ = (np.asarray(Image.open(f"by_{size}.png")).astype(int) for size in ("1", "64"))
    assert one.shape == all_.shape
    if verb != "inpaint":  # whose noise is drawn in turn
        assert np.abs(one - all_).max() <= 1


# ---- names ----------------------------------------------------------------------------------------------------------


@given(st.lists(NAMES, min_size=1, max_size=4))
@example(["a b", "[red]", "-x", "$HOME", "`id`", "it's", ":dog:", "!", "*", "~"])
def test_a_printed_command_is_read_back_by_a_shell(names):
    names = [name for name in names if name.isprintable()] or ["x"]
    assert shlex.split(command(*names)) == names
    assert shlex.split(command("flowback", Path(f"-{names[0]}")))[1] == f"./-{names[0]}"


def test_a_printed_command_is_read_back_whatever_bytes_it_has():
    names = ["a\nb", "\x1b[2J", os.fsdecode(b"\xff7"), "a'\\b\t", "\u202eabc", "é\x7f", "'"]
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command(*names)}"], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(name) for name in names]


def test_names_are_printed_as_they_are_and_drive_no_terminal(capsys):
    for name in ("[bold]a[/bold]", ":dog:", "[/x]", "👨‍👩‍👧", "كلب"):
        say(name)
        assert capsys.readouterr().out == f"{name}\n"
    say("\x1b]0;title\x07\u202e\t")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07\\u202e\\t\n"
    with pytest.raises(SystemExit):
        main(["sample", "a  \x1b[2Jb"])
    assert "a  \\x1b[2Jb is neither" in capsys.readouterr().err


def check_name(flow, tmp_path, name):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        folder.mkdir()
        patch.chdir(folder)
        shutil.copytree(flow, f"./{name}")
        Image.new("L", (8, 8), 3).save("a.png")
        os.rename("a.png", f"./{name}.png")
        run, image = f"./{name}", f"./{name}.png"
        assert main(["encode", run, image, "--labels=1", "-o", f"./{name}.safetensors"]) == 0
        assert main(["decode", run, f"./{name}.safetensors", "-o", f"./{name}.out"]) == 0
        assert main(["export", run, f"./{name}.export"]) == 0
        assert sorted(os.listdir()) == sorted([name, *(f"{name}.{end}" for end in ("png", "safetensors", "out", "export"))])


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES)
@example("[run]")
@example("-run")
@example("-é")
@example("1")
def test_a_flow_and_its_images_may_be_called_anything(small_run, tmp_path, name):
    check_name(checkpoint.newest(small_run), tmp_path, name)


@pytest.mark.soak
@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(NAMES)
def test_a_flow_and_its_images_may_be_called_any_of_many_names(small_run, tmp_path, name):
    check_name(checkpoint.newest(small_run), tmp_path, name)


def test_a_name_that_is_no_text_is_one_sentence_where_a_library_takes_none(here, capsys):
    name = os.fsdecode(b"\xff run")
    Path("flow").rename(name)
    assert "is not valid UTF-8" in refuse(["encode", name, "0.png"], capsys)


@given(st.lists(NAMES.filter(lambda name: name.strip() and "," not in name), min_size=2, max_size=6), st.data())
def test_labels_are_found_by_name(names, data):
    names = list({unicodedata.normalize("NFC", name).strip(): name for name in names}.values())
    flow = random_flow(num_classes=len(names), blocks=1, layers=1)
    wanted = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=4))
    for form in ("NFC", "NFD"):
        text = ",".join(unicodedata.normalize(form, names[k]) for k in wanted)
        assert chosen_labels(text, names, flow) == wanted


def test_labels_with_commas_and_numbers_for_names():
    flow = random_flow(num_classes=4)
    names = ["salt, pepper", "salt", "7", " mug"]
    assert chosen_labels("salt, pepper,salt,mug,7", names, flow) == [0, 1, 3, 2]
    assert chosen_labels("salt", names, flow) == [1]
    with pytest.raises(InputError, match=r"^label must be one of salt, pepper, .*got '1'$"):
        chosen_labels("1", names, flow)  # a number is a name here, and this is none
    with pytest.raises(InputError, match="got 'slat'; near it: salt"):
        chosen_labels("slat", names, flow)
    assert chosen_labels("1,sea", ["sea", "sky", "a", "b"], flow) == [1, 0]


def test_paths_are_taken_as_people_type_them(tmp_path, monkeypatch, here):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    decomposed = tmp_path / "home" / unicodedata.normalize("NFD", "é/ü")
    decomposed.mkdir(parents=True)
    assert typed_path("~/é/ü/new") == str(decomposed / "new")
    assert typed_path("~nobody-of-this-name/x") == "~nobody-of-this-name/x"
    assert typed_path("~") == "~"
    shutil.copytree("flow", decomposed / "flow")
    shutil.copy("0.png", decomposed)
    assert main(["encode", "~/é/ü/flow", "~/é/ü/0.png", "--labels=1", "--output=~/é/z.safetensors"]) == 0
    assert (decomposed.parent / "z.safetensors").exists()
    assert from_pretrained("~/é/ü/flow").image_size == (8, 8)
    assert as_images("~/é/ü/0.png", 8, 1).shape == (1, 1, 8, 8)


def test_a_folder_with_a_dot_in_its_name(here, capsys):
    assert main(["encode", "flow", "0.png", "--labels=1", "-o", "z.safetensors"]) == 0
    Path("made.gif").mkdir()
    for name in ("samples_g1.5", "v1.final", "made.gif"):
        assert names_folder(name)
        assert main(["decode", "flow", "z.safetensors", "-o", name]) == 0
        assert os.listdir(name) == ["000000.png"]
    assert main(["sample", "flow", "--num=1", "-o", "drawn.v2"]) == 0
    assert sorted(os.listdir("drawn.v2")) == [".flowback", "000000.png"]
    assert "other files" in refuse(["decode", "flow", "z.safetensors", "-o", "v1.final"], capsys)


def test_a_mistyped_run_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def offline(name, **options):
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    for mistyped in ("runs/fashoin", "mine/flow"):
        if mistyped.startswith("mine"):
            Path("mine").mkdir()
        with pytest.raises(InputError, match=f"^there is no folder {mistyped};"):
            from_pretrained(mistyped)
    assert asked == []
    Path("runs/fashion").mkdir(parents=True)
    with pytest.raises(InputError, match=r"^there is no folder runs/fashoin; near it: runs/fashion;"):
        from_pretrained("runs/fashoin")
    with pytest.raises(InputError, match=r"^there is no folder some/flow, and the hub did not give it .no network"):
        from_pretrained("some/flow")
    with pytest.raises(InputError, match=r"^there is no folder mine/flow, and the hub"):
        from_pretrained("mine/flow", revision="main")
    assert asked == ["some/flow", "mine/flow"]


# ---- people without a home ------------------------------------------------------------------------------------------


def test_caches_of_a_user_without_a_home(tmp_path, monkeypatch):
    monkeypatch.delenv("FLOWBACK_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: str(path))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by its specification
    assert cache_folder() == tmp_path / f"flowback-{os.getuid()}"
    assert cache_folder().stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "flowback"
    monkeypatch.delenv("XDG_CACHE_HOME")
    real = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: real + 1)
    (tmp_path / f"flowback-{real + 1}").mkdir()
    with pytest.raises(InputError, match="belongs to another user; set FLOWBACK_CACHE"):
        cache_folder()


# ---- the library ----------------------------------------------------------------------------------------------------


def test_flows_of_inference_mode_classify_and_edit(tmp_path):
    random_flow(torch.float32).save_pretrained(tmp_path)
    outside = TarFlow.from_pretrained(tmp_path)
    x = images(outside)
    mask = torch.ones(1, 1, *outside.image_size, dtype=torch.bool)

    def results(flow, x):
        yield classify(flow, x, rule="single_gradient")
        yield classify(flow, x, rule="exact")
        yield inpaint(flow, x, mask, 1, 1, 1, torch.Generator().manual_seed(0)).x
        yield swap_class(flow, x, 1, 2)

    expected = list(results(outside, x))
    with torch.inference_mode():
        for load in (TarFlow.from_pretrained, from_pretrained):
            flow = load(tmp_path)
            assert all(torch.equal(a, b) for a, b in zip(results(flow, x.clone()), expected, strict=True))
    flow.encode(x, 1)[0].sum().backward()
    assert all(p.grad is not None for p in flow.blocks[0].transformer.parameters())


def test_grey_arrays_of_three_dimensions():
    array = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)
    assert torch.equal(as_images(array, 8, 1), as_images(array[..., None], 8, 1))
    with pytest.raises(InputError, match=r"got uint8 \[5, 8, 8\]"):  # it may be [C, H, W]
        as_images(array, 4, 3)
    assert as_images(np.zeros((5, 8, 3), np.uint8), 8, 3).shape == (1, 3, 8, 8)
    assert as_images(np.zeros((5, 8, 1), np.uint8), 8, 1).shape == (1, 1, 8, 8)
    with pytest.raises(InputError, match=r"\[5, 4, 4\] can be \[B, H, W\] or \[H, W, C\]; expected \[B, H, W, C\]"):
        as_images(np.zeros((5, 4, 4), np.uint8), 4, 1)


# ---- foreign files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"width": 10**9, "head_dim": 10**9},
        {"mlp_ratio": 1e300},
        {"mlp_ratio": 1e12},
        {"blocks": 1000, "layers": 1000},
        {"num_classes": 10**12},
        {"channels": 10**9},
        {"image_size": 10**9},
        {"image_size": 8 * 10**5, "positions": "rotary"},
        {"image_size": 10**30},
        {"patch_size": 8, "channels": 10**18},
    ],
    ids=str,
)
def test_sizes_that_a_config_only_claims_take_no_memory(tmp_path, change, monkeypatch):
    random_flow(torch.float32, image_size=8, channels=1, positions=change.get("positions", "learned")).save_pretrained(
        tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError):
        from_pretrained(tmp_path)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.just([3, 3]),
)


def check_config(folder, data):
    if not (folder / "model.safetensors").exists():
        random_flow(torch.float32).save_pretrained(folder)
        (folder / "kept.json").write_bytes((folder / "config.json").read_bytes())
    config = json.loads((folder / "kept.json").read_text())
    name = data.draw(st.sampled_from([*config, "other"]))
    (folder / "config.json").write_text(json.dumps(config | {name: data.draw(VALUES)}))
    try:
        flow = from_pretrained(folder)
    except InputError:
        return
    flow.encode(torch.zeros(1, *flow.data_shape))


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_config_is_a_flow_or_one_sentence(tmp_path, data):
    check_config(tmp_path, data)


@pytest.mark.soak
@settings(max_examples=3000, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_thousands_of_configs_are_flows_or_one_sentence(tmp_path, data):
    check_config(tmp_path, data)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "decoding.json", "classification.json"])
def test_pipes_in_place_of_files_are_not_waited_for(tmp_path, name):
    random_flow(torch.float32).save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name in ("config.json", "model.safetensors"):
        with pytest.raises(InputError, match=name):
            from_pretrained(tmp_path)
    else:
        flow = from_pretrained(tmp_path)
        assert classify(flow, images(flow), rule="exact").shape == (3, 4)


def test_json_of_any_size_is_not_read(tmp_path):
    file = tmp_path / "a.json"
    file.touch()
    os.truncate(file, 2**40)
    with pytest.raises(ValueError, match="it is larger than"):
        read_json(file)


def test_checksums_lead_to_no_other_file(tmp_path, small_run):
    folder = Path(shutil.copytree(checkpoint.newest(small_run), tmp_path / "step_00000002"))
    file, known = folder / "checksums.json", json.loads((folder / "checksums.json").read_text())
    for name in ("/dev/zero", "../../x", ".", ""):
        file.write_text(json.dumps({name: "0", **known}))
        assert "which is no file beside it" in checkpoint.damage(folder)


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
        "a: &a [*a]",
        "a: &a {b: *a}",
        "[" * 600 + "*",
    ],
    ids=["lists", "merges", "itself", "itself, by name", "deep"],
)
def test_aliases_of_yaml_are_no_bomb(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


def test_aliases_of_a_recipe_still_work():
    assert load_yaml("a: &x {lr: 1e-3, b: .5}\nc: *x") == {"a": {"lr": 0.001, "b": 0.5}, "c": {"lr": 0.001, "b": 0.5}}


@pytest.mark.parametrize(
    "change", [{"block_out_channels": [2**40, 2**40]}, {"layers_per_block": 10**9}, {"latent_channels": 2**50}]
)
def test_sizes_that_an_autoencoder_only_claims_take_no_memory(tmp_path, change):
    folder = tiny_autoencoder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=r"are not those of its config\.json"):
        load_autoencoder(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": 0}, "scale must be a finite number"),
        ({"scaling_factor": "x"}, "scale must be a finite number"),
        ({"shift_factor": float("nan")}, "shift must be a finite number"),
        ({"latent_channels": "3"}, "channels must be a whole number"),
        ({"block_out_channels": 8}, "does not describe"),
    ],
)
def test_numbers_of_an_autoencoder_are_checked(tmp_path, change, message):
    folder = tiny_autoencoder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        load_autoencoder(str(folder))


def test_an_index_of_an_autoencoder_names_no_other_weights(tmp_path):
    folder = tiny_autoencoder(tmp_path)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x"}}')
    with pytest.raises(InputError, match="is cut into several files; expected"):
        load_autoencoder(str(folder))


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")
    monkeypatch.setattr(zipfile.ZipFile, "infolist", lambda _: [SimpleNamespace(file_size=2**31)])
    with pytest.raises(InputError, match="it unpacks to 2147483648 bytes"):
        open_images(tmp_path / "a.npz")
    for load in (
        lambda: load_encoder("efficientnet_lite0", tmp_path / "a.pth"),
        lambda: read_tensors(tmp_path / "a.pth"),
        lambda: checked_weights(str(tmp_path / "a.pth"), "inception"),
    ):
        with pytest.raises(InputError) as refused:
            load()
        assert "it unpacks to 2147483648 bytes" in str(refused.value.__cause__)


def test_downloads_are_of_named_files_only(monkeypatch):
    from flowback.flow import io as flow_io
    from flowback.latents import loading

    asked = []
    monkeypatch.setattr(loading, "find_folder", lambda name, files: asked.extend(files) or Path("nowhere"))
    with pytest.raises(InputError, match="nowhere holds no readable"):
        loading.read_config("some/autoencoder")
    assert {"model.safetensors", "vae/diffusion_pytorch_model.safetensors", "autoencoder/config.json"} <= set(asked)
    assert not any(set(name) & set("*?[") or ".." in name for name in (*flow_io.FILES, *asked))


def test_a_bomb_is_refused_whatever_another_thread_does_to_warnings(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    monkeypatch.setattr(warnings, "simplefilter", lambda *_: None)
    with warnings.catch_warnings(record=True), pytest.raises(InputError, match=r"10000 pixels\) exceeds limit of 6000"):
        load_image(tmp_path / "a.png", 8, 1)


def test_a_file_of_any_size_is_not_read(tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    os.truncate(tmp_path / "a.png", 2**31)
    with pytest.raises(InputError, match="larger than 1073741824 bytes"):
        load_image(tmp_path / "a.png", 8, 1)


def test_sizes_that_a_tar_only_claims(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "cache"))
    sparse = tarfile.TarInfo("a.png")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"%011o\0" % (2**32)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(bytes(header) + bytes(512) + bytes(1024))
    with pytest.raises(InputError, match=r"a\.png has holes"):
        load_data(DataConfig(name="shards", path=str(tmp_path / "tars"), image_size=8))
