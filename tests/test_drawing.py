"""Images to disk: a function of request and number, whoever draws them, in whatever parts, interrupted or not."""

import json
import os
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import flowback.tasks.sampling
from builders import random_flow, tiny_autoencoder
from flowback import Guidance, InputError, LatentFlow, TarFlow
from flowback.cli import main
from flowback.core.devices import pick_device
from flowback.core.distributed import PeerLost
from flowback.core.files import write_whole
from flowback.core.units import to_uint8
from flowback.latents import load_autoencoder
from flowback.tasks.refinement import best_of
from flowback.tasks.sampling import Request, checked_store, class_grid, draw, noise, sample_to_disk
from forked import torchrun

OPTIONS = {"image_size": 4, "patch_size": 2, "blocks": 2, "layers": 1, "noise_std": 0.1}


def a_flow(**options):
    return random_flow(torch.float32, std=0.1, **{**OPTIONS, "channels": 3, "num_classes": 3, **options})


@pytest.fixture(scope="module")
def flow():
    return a_flow()


@pytest.fixture
def request_():
    return Request(num=11, labels=(0, 2, 1))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(flowback.tasks.sampling, "PART", 4)


@pytest.fixture
def drawn(monkeypatch, small_parts):
    """The parts that are drawn, as they are."""
    parts = []
    monkeypatch.setattr(flowback.tasks.sampling, "draw", lambda *args: parts.append(args[2]) or draw(*args))
    return parts


@contextmanager
def interruption(monkeypatch, part):
    def interrupted(*args):
        if args[2] == part:
            raise KeyboardInterrupt
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(flowback.tasks.sampling, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


def difference(a, b):
    return (a.int() - b.int()).abs().max().item()


def snapshot(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def load(file):
    with np.load(file) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        return archive["arr_0"], archive["arr_1"]


# ---- what is drawn --------------------------------------------------------------------------------------------------


def drawn_one_by_one(flow, request):
    """By the definition, token by token, batches of one."""
    request = request.settled(flow)
    guidance = Guidance(request.guidance, request.schedule, request.guided)
    images = []
    for i in range(request.num):
        y = torch.tensor([request.labels[i % len(request.labels)]])
        z = request.temperature * noise(flow, request.seed, i, request.best_of)[None]
        if request.best_of > 1:
            z = best_of(flow, z, y, guidance, request.rule, request.least, method="sequential").z[:, None]
        z = z[:, 0]
        x = flow.decode(z, y, guidance, "sequential")
        images.append(x if request.denoise is False else flow.denoise(x, y))
    return to_uint8(torch.cat(images))


CHANGES = {
    "plain": {},
    "one class": {"labels": (1,)},
    "no class": {"labels": (-1,)},
    "guided": {"guidance": 2.0, "schedule": "annealed", "guided": "mu"},
    "cool": {"temperature": 0.5},
    "with noise": {"denoise": False},
    "another seed": {"seed": 5},
    "best of 3": {"best_of": 3},
    "best of 5 or fewer": {"best_of": 5, "least": 1, "rule": "exact"},
    "all": {"best_of": 2, "guidance": 1.0, "temperature": 0.9, "denoise": False},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_images_are_those_of_the_definition(flow, request_, change):
    request = replace(request_, **change)
    found, note = draw(flow, request, 0, "auto", 64)
    assert found.dtype == torch.uint8
    assert found.shape == (11, 3, 4, 4)
    assert difference(found, drawn_one_by_one(flow, request)) <= 1
    assert found.float().std() > 20  # not black, not white
    assert (note.part, note.not_finite, note.fell_back) == (0, 0, 0)
    assert note.seconds > 0
    plain = draw(flow, request_, 0, "auto", 64)[0]
    assert difference(found, plain) == 0 if request == request_ else difference(found, plain) > 3


def test_a_request_is_always_answered_by_the_same_images(flow, request_):
    first, second = (draw(flow, replace(request_, best_of=3, least=1), 0, "auto", 4)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("method", ["sequential", "jacobi", "gauss_seidel"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batch_size_and_method_hardly_change_the_images(flow, request_, guidance, method, batch_size):
    request = replace(request_, guidance=guidance)
    expected = draw(flow, request, 0, "auto", 64)[0]
    found, note = draw(flow, request, 0, method, batch_size)
    assert difference(found, expected) <= 1
    assert note.residual < 1e-4


def test_a_part_drawn_alone_is_that_of_the_whole(flow, request_, monkeypatch):
    whole = draw(flow, request_, 0, "sequential", 4)[0]
    monkeypatch.setattr(flowback.tasks.sampling, "PART", 4)
    for part in (2, 0, 1):
        assert torch.equal(draw(flow, request_, part, "sequential", 4)[0], whole[4 * part : 4 * part + 4])


def test_the_first_images_of_many_are_those_of_few(flow, request_):
    many, few = (draw(flow, replace(request_, num=num), 0, "sequential", 1)[0] for num in (7, 3))
    assert torch.equal(many[:3], few)


def test_mixed_precision_changes_the_images_a_little(flow, request_):
    full, mixed = (draw(flow, replace(request_, precision=p), 0, "auto", 64)[0] for p in ("32-true", "bf16-mixed"))
    assert mixed.dtype == torch.uint8
    assert 1 <= difference(full, mixed) <= 12


def test_noise_is_a_function_of_seed_number_and_candidate(flow):
    keys = [(seed, number, candidate) for seed in (0, 1) for number in (0, 1, 2) for candidate in (0, 1)]
    all_noise = [noise(flow, seed, number, 2)[candidate] for seed, number, candidate in keys]
    for i, a in enumerate(all_noise):
        for b in all_noise[:i]:
            assert (a - b).abs().max() > 0.5
    torch.rand(1)
    assert torch.equal(noise(flow, 1, 2, 2), torch.stack(all_noise[-2:]))
    assert torch.equal(noise(flow, 1, 2), all_noise[-2][None])  # more candidates leave the first as it is
    assert noise(flow, 3, 4, 5).shape == (5, *flow.token_shape)


def test_noise_is_normal(flow):
    z = torch.cat([noise(flow, 0, number) for number in range(400)])
    assert abs(z.mean()) < 4 / z.numel() ** 0.5
    assert abs(z.std() - 1) < 4 / (2 * z.numel()) ** 0.5
    correlation = torch.corrcoef(torch.stack([z[:-1].flatten(), z[1:].flatten()]))[0, 1]
    assert abs(correlation) < 4 / z.numel() ** 0.5


@pytest.mark.parametrize("method", ["auto", "jacobi", "gauss_seidel"])
@pytest.mark.parametrize("change", [{}, {"best_of": 3}, {"denoise": False, "guidance": 1.0}], ids=str)
def test_a_flow_that_is_not_finite_draws_grey_and_says_so(flow, request_, method, change):
    broken = a_flow()
    broken.blocks[0].proj_out.bias.data.fill_(float("nan"))
    images, note = draw(broken, replace(request_, **change), 0, method, 4)
    assert note.not_finite == 11
    assert (images == 128).flatten(1).any(dim=1).all()


def test_only_numbers_that_are_not_finite_are_drawn_grey(flow, request_, monkeypatch):
    decode = TarFlow.decode_with_report

    def poisoned(self, *args, **kwargs):
        x, report = decode(self, *args, **kwargs)
        x[1, 0, 0, 0], x[2, 1], x[2, 2] = float("nan"), float("inf"), -float("inf")
        x[3] = 1e30  # finite
        return x, report

    request = replace(request_, denoise=False)
    expected = draw(flow, request, 0, "auto", 64)[0]
    expected[1, 0, 0, 0], expected[2, 1:], expected[3] = 128, 128, 255
    monkeypatch.setattr(TarFlow, "decode_with_report", poisoned)
    images, note = draw(flow, request, 0, "auto", 64)
    assert note.not_finite == 2
    assert torch.equal(images, expected)


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.fixture
def expected(flow, request_):
    """The images in one part, `[n, H, W, C]`."""
    return draw(flow, request_, 0, "auto", 4)[0].permute(0, 2, 3, 1).numpy()


def test_npz_has_the_adm_format(flow, request_, expected, small_parts, tmp_path):
    notes = sample_to_disk(flow, request_, tmp_path / "new" / "samples.npz", batch_size=4)
    images, labels = load(tmp_path / "new" / "samples.npz")
    assert images.dtype == np.uint8
    assert np.array_equal(images, expected)
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2]
    assert [note.part for note in notes] == [0, 1, 2]
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["samples.npz"]


def test_folder_has_one_png_an_image(flow, request_, expected, small_parts, tmp_path):
    sample_to_disk(flow, request_, tmp_path / "images", batch_size=4)
    files = sorted((tmp_path / "images").glob("*.png"))
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(11)]
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), expected)
    assert {file.name for file in (tmp_path / "images").iterdir()} - {file.name for file in files} == {".flowback"}
    assert not list((tmp_path / "images").rglob("*partial*"))


def test_png_is_a_grid_of_all_images(flow, request_, expected, small_parts, tmp_path):
    sample_to_disk(flow, request_, tmp_path / "grid.png", batch_size=4)
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (4 * 30 + 2, 3 * 30 + 2, 3)  # 4 rows of 3, enlarged sevenfold, lines of 2 pixels
    for number, image in enumerate(expected):
        top, left = 2 + 30 * (number // 3), 2 + 30 * (number % 3)
        assert np.array_equal(grid[top : top + 28 : 7, left : left + 28 : 7], image)


def test_grey_images_stay_grey(tmp_path):
    flow, request = a_flow(channels=1, num_classes=0), Request(num=3)
    sample_to_disk(flow, request, tmp_path / "a.npz")
    sample_to_disk(flow, request, tmp_path / "images")
    images, labels = load(tmp_path / "a.npz")
    assert images.shape == (3, 4, 4, 1)
    assert labels.tolist() == [-1, -1, -1]
    for number, image in enumerate(images):
        picture = Image.open(tmp_path / "images" / f"{number:06d}.png")
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), image[..., 0])


def sample_in(folder, said, words):
    os.chdir(folder)
    with open(f"{said} {os.environ['RANK']}", "w") as stream, redirect_stdout(stream):
        main(["sample", *words])


def test_processes_of_torchrun_draw_what_one_draws(flow, request_, tmp_path):
    request, folder = replace(request_, num=130, best_of=2), tmp_path / "images"  # three parts
    notes = sample_to_disk(flow, request, folder / "one.npz")
    assert [note.part for note in notes] == [0, 1, 2]
    flow.save_pretrained(folder / "flow")
    words = ["flow", "--num=130", "--labels=0,2,1", "--best-of=2", "--device=cpu", "-o", "two.npz"]
    torchrun(2, sample_in, folder, tmp_path / "said", words)
    said = [(tmp_path / f"said {rank}").read_text() for rank in (0, 1)]
    assert said[0].count("130 images in two.npz") == 1
    assert said[1] == ""  # only the first one speaks
    for a, b in zip(load(folder / "one.npz"), load(folder / "two.npz"), strict=True):
        assert np.array_equal(a, b)
    assert sorted(file.name for file in folder.iterdir()) == ["flow", "one.npz", "two.npz"]


@contextmanager
def as_process(monkeypatch, rank, world, barrier):
    """This process is one of several, of which nobody else is there."""
    with monkeypatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_rank", lambda: rank)
        patch.setattr(torch.distributed, "get_world_size", lambda: world)
        patch.setattr(torch.distributed, "barrier", barrier)
        yield


@pytest.mark.parametrize("world", [2, 3])
def test_each_process_draws_its_share_and_waits_for_the_others(flow, request_, world, monkeypatch, drawn, tmp_path):
    request, output, met = replace(request_, num=19), tmp_path / "a.npz", []  # five parts
    checked_store(flow, request, output).open()
    for rank in reversed(range(world)):
        drawn.clear()
        with as_process(monkeypatch, rank, world, lambda: met.append(drawn.copy())):
            notes = sample_to_disk(flow, request, output, batch_size=4)
        assert drawn == list(range(rank, 5, world))
        assert met[-2:] == [[], drawn]  # before and after
        assert [note.part for note in notes] == (drawn if rank else list(range(5)))
        assert output.exists() == (rank == 0)
    sample_to_disk(flow, request, tmp_path / "alone.npz", batch_size=4)
    assert content(output) == content(tmp_path / "alone.npz")


def test_a_process_that_is_gone_is_said(flow, request_, monkeypatch, tmp_path):
    def closed():
        raise RuntimeError("Connection closed by peer")

    with as_process(monkeypatch, 0, 2, closed), pytest.raises(PeerLost, match="again to resume"):
        sample_to_disk(flow, request_, tmp_path / "a.npz")


def test_latents_are_drawn_and_decoded(tmp_path):
    pytest.importorskip("diffusers")
    folder = tiny_autoencoder(tmp_path / "vae")
    flow = a_flow(channels=3, image_size=4)
    latent = LatentFlow(flow, load_autoencoder(str(folder)))
    request = Request(num=5, labels=(0, 2))
    images, _ = draw(latent, request, 0, "auto", 2)
    z = torch.cat([noise(flow, 0, i) for i in range(5)])
    y = torch.tensor([0, 2, 0, 2, 0])
    expected = latent.to_images(flow.denoise(flow.decode(z, y, method="sequential"), y))
    assert images.shape == (5, 1, 8, 8)
    assert difference(images, to_uint8(expected)) <= 1
    assert class_grid(latent, per_class=2).shape == (6, 1, 8, 8)

    sample_to_disk(latent, request, tmp_path / "images")
    other = LatentFlow(flow, load_autoencoder(str(tiny_autoencoder(tmp_path / "other", seed=1))))
    with pytest.raises(InputError, match="other weights"):
        sample_to_disk(other, request, tmp_path / "images")


# ---- interrupted, and taken up again --------------------------------------------------------------------------------

outputs = pytest.mark.parametrize("name", ["samples.npz", "grid.png", "images"])


def parts_of(output):
    return output.with_name(output.name + ".parts") if output.suffix else output / ".flowback"


def content(output):
    """What is in a finished output; an .npz holds the time too."""
    if output.suffix == ".npz":
        return [array.tobytes() for array in load(output)]
    return [file.read_bytes() for file in ([output] if output.is_file() else sorted(output.glob("*.png")))]


@outputs
def test_an_interrupted_run_goes_on_where_it_was(flow, request_, name, monkeypatch, drawn, tmp_path):
    output, undisturbed = tmp_path / "a" / name, tmp_path / "b" / name
    sample_to_disk(flow, request_, undisturbed, batch_size=4)
    with interruption(monkeypatch, 1):
        sample_to_disk(flow, request_, output, batch_size=4)
    assert output.is_dir() if name == "images" else not output.exists()
    assert sorted(file.name for file in parts_of(output).glob("*.json")) == ["part_000000.json", "request.json"]

    drawn.clear()
    notes = sample_to_disk(flow, request_, output, batch_size=4)
    assert drawn == [1, 2]
    assert [note.part for note in notes] == [0, 1, 2]
    assert content(output) == content(undisturbed)
    assert parts_of(output).exists() == (name == "images")


def full(store):
    raise OSError("full")


@outputs
def test_only_missing_parts_are_drawn(flow, request_, name, monkeypatch, drawn, tmp_path):
    output = tmp_path / name
    with monkeypatch.context() as patch:
        patch.setattr(flowback.tasks.sampling.Store, "finish", full)
        with pytest.raises(OSError, match="full"):  # all drawn, nothing put together
            sample_to_disk(flow, request_, output, batch_size=4)
    assert drawn == [0, 1, 2]
    (parts_of(output) / "part_000001.json").unlink()
    for file in parts_of(output).glob("part_000001.npy"):
        file.write_bytes(b"half of it")  # a part without its note is not whole
    drawn.clear()
    sample_to_disk(flow, request_, output, batch_size=4)
    assert drawn == [1]
    sample_to_disk(flow, request_, tmp_path / f"again_{name}", batch_size=4)
    assert content(output) == content(tmp_path / f"again_{name}")


def test_a_finished_folder_is_not_drawn_again(flow, request_, drawn, tmp_path):
    first = sample_to_disk(flow, request_, tmp_path / "images")
    before = snapshot(tmp_path)
    drawn.clear()
    assert sample_to_disk(flow, request_, tmp_path / "images", batch_size=1) == first
    assert drawn == []
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"num": 12}, {"labels": (0,)}, {"best_of": 2}, {"guidance": 0.5}], ids=str)
@outputs
def test_another_request_does_not_go_on_with_it(flow, request_, name, change, monkeypatch, small_parts, tmp_path):
    with interruption(monkeypatch, 1):
        sample_to_disk(flow, request_, tmp_path / name)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=rf"{name}.* was begun by another request or with other weights"):
        sample_to_disk(flow, replace(request_, **change), tmp_path / name)
    assert snapshot(tmp_path) == before


def test_a_folder_with_other_files_is_left_alone(flow, request_, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000000.png").write_text("mine")
    with pytest.raises(InputError, match=r"new or empty folder.*mine holds other files"):
        sample_to_disk(flow, request_, tmp_path / "mine")
    assert list(snapshot(tmp_path).values()) == [b"mine"]


def test_an_empty_folder_is_used(flow, request_, tmp_path):
    (tmp_path / "images").mkdir()
    sample_to_disk(flow, request_, tmp_path / "images")
    assert len(list((tmp_path / "images").glob("*.png"))) == 11


@pytest.mark.parametrize("name", ["a.png", "a.npz"])
def test_a_folder_with_a_files_name_is_refused(flow, request_, name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"must be a file.*{name} is a folder"):
        sample_to_disk(flow, request_, tmp_path / name)
    assert list(tmp_path.rglob("*")) == [tmp_path / name]


def test_an_output_is_replaced_only_when_the_new_one_is_whole(flow, request_, monkeypatch, small_parts, tmp_path):
    sample_to_disk(flow, request_, tmp_path / "a.npz")
    before = (tmp_path / "a.npz").read_bytes()
    with interruption(monkeypatch, 2):
        sample_to_disk(flow, replace(request_, seed=1), tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == before
    sample_to_disk(flow, replace(request_, seed=1), tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() != before


def test_an_output_that_is_cut_off_while_written_leaves_the_old_one(flow, request_, monkeypatch, small_parts, tmp_path):
    sample_to_disk(flow, request_, tmp_path / "a.npz")
    before, read = (tmp_path / "a.npz").read_bytes(), flowback.tasks.sampling.Store._load

    def cut_off(store, part):
        if part == 2:
            raise KeyboardInterrupt
        return read(store, part)

    with monkeypatch.context() as patch:
        patch.setattr(flowback.tasks.sampling.Store, "_load", cut_off)
        with pytest.raises(KeyboardInterrupt):
            sample_to_disk(flow, replace(request_, seed=1), tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == before
    sample_to_disk(flow, replace(request_, seed=1), tmp_path / "a.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_the_notes_on_disk_are_those_returned(flow, request_, small_parts, tmp_path):
    notes = sample_to_disk(flow, request_, tmp_path / "images", method="jacobi")
    on_disk = [json.loads((tmp_path / "images" / ".flowback" / f"part_{n:06d}.json").read_text()) for n in range(3)]
    assert [vars(note) for note in notes] == on_disk
    assert json.loads((tmp_path / "images" / ".flowback" / "request.json").read_text())["labels"] == [0, 2, 1]


# ---- what is refused ------------------------------------------------------------------------------------------------

BAD_REQUESTS = [
    ({"num": 0}, "num must be at least 1, got 0"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"seed": 2**63}, f"seed must be at most .*, got {2**63}"),
    ({"best_of": 0}, "best_of must be at least 1, got 0"),
    ({"best_of": 10_001}, "best_of must be at most 10000, got 10001"),
    ({"least": 0}, "least must be at least 1, got 0"),
    ({"temperature": 0.0}, r"temperature .*above 0.* got 0\.0"),
    ({"temperature": -1.0}, r"temperature .* got -1\.0"),
    ({"temperature": float("nan")}, "temperature .* got nan"),
    ({"temperature": float("inf")}, "temperature .* got inf"),
    ({"precision": "16"}, "precision .*32-true, bf16-mixed, got '16'"),
    ({"rule": "guess"}, "rule must be one of single_gradient, z_score, exact, exact_fitted, .*got 'guess'"),
    ({"labels": ()}, "labels must name"),
    ({"labels": (0, -1), "best_of": 2}, "guidance and best_of need a label"),
    ({"labels": (0, -1), "guidance": 1.0}, "guidance.* a label"),
    ({"guidance": -1.0}, r"guidance.* -1\.0"),
    ({"guidance": float("nan")}, "guidance.* nan"),
    ({"schedule": "cosine"}, "schedule.*'cosine'"),
    ({"guided": "sigma"}, "guid.*'sigma'"),
]


@pytest.mark.parametrize(("change", "message"), BAD_REQUESTS)
def test_an_impossible_request_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        Request(**{"labels": (0,), **change})


BAD_CALLS = [
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"method": "newton"}, "method must be one of .*, got 'newton'"),
    ({"output": "a.gif"}, r"output must be .*\.png.*a\.gif"),
    ({"labels": (0, 3)}, "label 3 is out of range.* 0 to 2"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CALLS)
def test_what_cannot_be_done_is_refused_before_anything_is_written(flow, request_, change, message, tmp_path):
    request = replace(request_, labels=change.pop("labels", request_.labels))
    output = tmp_path / change.pop("output", "a.npz")
    with pytest.raises(InputError, match=message):
        sample_to_disk(flow, request, output, **change)
    assert not list(tmp_path.iterdir())


def test_a_folder_may_have_a_dot_in_its_name(flow, request_, tmp_path):
    sample_to_disk(flow, request_, tmp_path / "guidance_1.5")
    assert len(list((tmp_path / "guidance_1.5").glob("*.png"))) == 11


def test_devices_by_name():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(InputError, match=r"^device 'nowhere' is not here \([^\n]*\); expected auto, cpu"):
        pick_device("nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without such a device")
def test_a_device_that_is_not_here_is_refused():
    assert pick_device("auto") == torch.device("cpu") or torch.accelerator.is_available()
    with pytest.raises(InputError, match=r"^device 'cuda' is not here"):
        pick_device("cuda")


def test_a_finished_folder_is_not_that_of_other_weights(flow, request_, small_parts, tmp_path):
    output = tmp_path / "images"
    sample_to_disk(flow, request_, output)
    before = snapshot(output)
    with pytest.raises(InputError, match="other weights"):
        sample_to_disk(a_flow(seed=1), request_, output)
    assert snapshot(output) == before


def test_parts_left_by_an_interrupted_end_do_not_reach_another_request(flow, request_, monkeypatch, small_parts, tmp_path):
    def cut(folder, ignore_errors=False):
        if not ignore_errors:
            raise KeyboardInterrupt

    output = tmp_path / "samples.npz"
    with monkeypatch.context() as patch:
        patch.setattr(flowback.tasks.sampling.shutil, "rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            sample_to_disk(flow, request_, output)
    first = load(output)[0]
    sample_to_disk(flow, replace(request_, seed=1), output)
    assert not np.array_equal(load(output)[0], first)


def test_noise_does_not_repeat_in_large_sets(flow):
    assert not torch.equal(noise(flow, 16, 23565), noise(flow, 16, 49940))  # equal in the lowest 32 bits of a torch seed


# ---- one atomic write ------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path):
    def half(path):
        path.write_text("half")
        raise OSError("full")

    file = tmp_path / "new" / "a.txt"
    write_whole(file, lambda path: path.write_text("first"))
    with pytest.raises(OSError, match="full"):
        write_whole(file, half)
    assert snapshot(tmp_path) == {file.relative_to(tmp_path): b"first"}


def test_writes_at_once_do_not_meet(tmp_path):
    file = tmp_path / "a.txt"

    def another_meanwhile(path):
        path.write_text("first")
        write_whole(file, lambda other: other.write_text("second"))
        assert file.read_text() == "second"
        assert path.suffix == ".txt"

    write_whole(file, another_meanwhile)
    assert snapshot(tmp_path) == {file.relative_to(tmp_path): b"first"}
