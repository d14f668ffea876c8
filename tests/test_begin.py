"""Training that begins with a flow, goes on longer than planned, or where the run was moved or copied to."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from builders import SMALL, random_flow, refuse, tiny_autoencoder
from flowback.cli import main
from flowback.core.errors import InputError
from flowback.data import DataConfig, ImageSet
from flowback.data.splits import MemorySplit
from flowback.flow.config import FlowConfig
from flowback.latents import LatentFlow, load_autoencoder
from flowback.reports.evaluate import EvaluationConfig, evaluate
from flowback.runs import checkpoint
from flowback.runs.checkpoint import load_flow
from flowback.runs.config import AlignmentConfig, LatentConfig, RunConfig, TrainConfig
from flowback.runs.log import read_metrics
from flowback.training import train
from flowback.training.build import build_flow, describe_start, first_flow, settle
from flowback.training.optim import learning_rate


def image_set(classes, size=6, channels=2, count=24) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    split = MemorySplit(images, torch.arange(count) % max(1, len(classes)))
    return ImageSet("noise", split, split, list(classes), size, channels, 256)


def config(run: Path, **train_options) -> RunConfig:
    options = {"steps": 4, "batch_size": 8, "warmup": 1, "log_every": 1, "eval_images": 8, "sample_every": 100}
    return RunConfig(run=str(run), train=TrainConfig(**(options | train_options)))


def saved(folder: Path, classes=None, **options) -> Path:
    """The folder of a flow of the builders' kind, in float32, with names of its classes."""
    flow = random_flow(torch.float32, **options)
    flow.save_pretrained(folder)
    if classes is not None:
        (folder / "classes.json").write_text(json.dumps(classes))
    return folder


def begun(folder: Path, data: ImageSet, **flow_options):
    """The flow that training would begin with, that of the folder, and what is said of it."""
    wanted = RunConfig(flow=FlowConfig(**flow_options), train=TrainConfig(init=str(folder)))
    start, what = first_flow(wanted)
    built = build_flow(settle(wanted, flow=start), data, start=start).eval()
    return built, start, describe_start(what, start, data.classes if built.num_classes else [])


def embeddings(flow) -> torch.Tensor:
    return torch.stack([block.class_embed.detach() for block in flow.blocks])


def log_prob(flow, y=None) -> torch.Tensor:
    x = torch.rand(3, *flow.data_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return flow.log_prob(x, y).detach()


def test_classes_are_known_by_their_names_and_new_ones_begin_without_a_label(tmp_path):
    folder = saved(tmp_path / "flow", ["ant", "bee", "cat", "dog"])
    built, start, said = begun(folder, image_set(["bee", "cow", "dog"]))
    assert said.endswith("of " + str(folder) + ": 2 of 3 classes known, 1 new")
    assert torch.equal(embeddings(built)[:, [0, 2]], embeddings(start)[:, [1, 3]])
    new = embeddings(built)[:, 1] - embeddings(start).mean(1)
    assert 0.005 < float(new.std()) < 0.02  # the initialization of a block
    assert torch.equal(log_prob(built, 2), log_prob(start, 3))
    others = {name: t for name, t in built.state_dict().items() if "class_embed" not in name}
    assert all(torch.equal(start.state_dict()[name], t) for name, t in others.items())


def test_classes_without_names_are_known_by_number_if_they_are_as_many(tmp_path):
    folder = saved(tmp_path / "flow")
    built, start, said = begun(folder, image_set("abcd"))
    assert said.endswith("4 of 4 classes known by number, 0 new")
    assert torch.equal(embeddings(built), embeddings(start))
    assert begun(folder, image_set("abc"))[2].endswith("0 of 3 classes known, 3 new")
    (folder / "classes.json").write_text('["one"]')  # of another flow
    assert begun(folder, image_set("abcd"))[2].endswith("4 of 4 classes known by number, 0 new")


def test_without_classes_a_flow_is_as_it_was_without_a_label(tmp_path):
    built, start, said = begun(saved(tmp_path / "flow", list("abcd")), image_set("ab"), num_classes=0)
    assert built.num_classes == 0
    assert said.endswith("without its classes")
    assert torch.allclose(log_prob(built), log_prob(start), atol=1e-3)


def test_an_unconditional_flow_gets_classes_of_the_data(tmp_path):
    built, start, said = begun(saved(tmp_path / "flow", num_classes=0), image_set("abc"))
    assert said.endswith("0 of 3 classes known, 3 new")
    assert 0.005 < float(embeddings(built).std()) < 0.02
    assert torch.allclose(log_prob(built, 1), log_prob(start), atol=1)


def test_rotary_flows_begin_at_another_size_and_others_say_why_not(tmp_path):
    rotary = saved(tmp_path / "rotary", list("abcd"), positions="rotary")
    built, start, _ = begun(rotary, image_set("abcd", size=8))
    assert built.image_size == (8, 8)
    assert torch.equal(log_prob(built, 1), log_prob(start.resized(8), 1))
    learned = saved(tmp_path / "learned", list("abcd"))
    with pytest.raises(InputError, match=r"image_size must be 8 .*, got 6, of the flow .*; other sizes need rotary"):
        begun(learned, image_set("abcd", size=8))
    with pytest.raises(InputError, match=r"channels must be 3 .*, got 2, of the flow to begin with$"):
        begun(rotary, image_set("abcd", channels=3))
    with pytest.raises(InputError, match=r"flow.width must be 16 for this flow, got 32"):
        begun(rotary, image_set("abcd"), width=32)
    with pytest.raises(InputError, match=r"patch_size 2 does not divide the image size 7"):
        begun(rotary, image_set("abcd", size=7))


def test_a_run_begins_with_one_flow(tmp_path):
    with pytest.raises(InputError, match=r"train.init is a, and another flow was given; use one of the two"):
        train(config(tmp_path, init="a"), data=image_set("ab"), flow=random_flow())


def test_images_on_disk_are_read_as_the_flow_takes_them_where_nothing_else_is_said(tmp_path):
    start = load_flow(saved(tmp_path / "flow", channels=3))[0]
    wanted = RunConfig(data=DataConfig(name="folder", path="images"))
    found = settle(wanted, flow=start).data
    assert (found.image_size, found.channels) == (6, 3)
    said = replace(wanted, data=replace(wanted.data, image_size=8, channels=1))
    assert settle(said, flow=start).data == said.data
    assert settle(RunConfig(), flow=start).data == DataConfig()


def test_what_is_trained_has_a_standard_prior(tmp_path):
    flow = random_flow(torch.float32, prior="scaled")
    flow.prior_std.fill_(0.8)
    flow.save_pretrained(tmp_path / "imported")
    built, _, _ = begun(tmp_path / "imported", image_set("abcd"))
    assert built.prior_std is None
    assert built.config.prior == "standard"


def test_a_run_that_began_with_a_flow_resumes_without_it_bit_for_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "flow", list("abcd"))
    data = image_set("bcde")
    whole = config(tmp_path / "whole", init="flow", until=3)
    train(whole, data=data)
    assert "ema weights of flow of flow: 3 of 4 classes known, 1 new" in capsys.readouterr().out.replace("\n", " ")
    cut = config(tmp_path / "cut", init="flow", until=2)
    train(cut, data=data)
    kept = RunConfig.read(tmp_path / "cut" / "config.yaml")
    assert kept.train.init == str(tmp_path / "flow")
    assert (kept.flow.width, kept.flow.num_classes, kept.flow.image_size) == (16, None, 6)
    shutil.copytree(tmp_path / "cut", tmp_path / "same")
    (tmp_path / "flow").rename(tmp_path / "gone")
    capsys.readouterr()
    train(replace(kept, train=replace(kept.train, resume=True, until=3)), data=data)
    train(config("same", init="flow", resume=True, until=3), data=data)  # as it was begun
    assert "begins" not in capsys.readouterr().out
    expected = load_flow(tmp_path / "whole", "raw")[0].state_dict()
    for name in ("cut", "same"):
        found = load_flow(tmp_path / name, "raw")[0].state_dict()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    with pytest.raises(InputError, match=r"train.init was .*flow when .* is .*gone; expected the same"):
        train(config(tmp_path / "same", init="gone", resume=True), data=data)


def test_a_run_begins_with_a_run_or_its_checkpoint_and_other_alignment(tmp_path, small_run):
    options = replace(config(tmp_path / "run", steps=2), data=DataConfig(limit=64))
    aligned = AlignmentConfig(strategy="reverse", at=[[2, 1]], projector_width=16)
    weights = {}
    for name, start in (("run", small_run), ("checkpoint", checkpoint.newest(small_run))):
        one = replace(options, run=str(tmp_path / name), alignment=aligned)
        flow = train(replace(one, train=replace(one.train, init=str(start)))).flow
        weights[name] = flow.state_dict()
    assert all(torch.equal(weights["run"][name], t) for name, t in weights["checkpoint"].items())
    assert checkpoint.known_classes(load_flow(checkpoint.newest(small_run))[0]) == [str(k) for k in range(10)]


def test_a_run_begins_with_a_latent_flow_and_its_autoencoder(tmp_path):
    pytest.importorskip("diffusers")
    vae = load_autoencoder(str(tiny_autoencoder(tmp_path / "vae", channels=2)))
    flow = LatentFlow(random_flow(torch.float32, channels=3, image_size=4), vae)
    flow.save_portable(tmp_path / "flow")
    shutil.rmtree(tmp_path / "vae")
    data = image_set("abc", size=8)
    result = train(config(tmp_path / "run", init=str(tmp_path / "flow"), until=2), data=data)
    assert isinstance(result.flow, LatentFlow)
    kept = RunConfig.read(tmp_path / "run" / "config.yaml")
    assert kept.latents.autoencoder == str(tmp_path / "flow" / "autoencoder")
    again = replace(config(tmp_path / "run", init=str(tmp_path / "flow"), resume=True))
    assert train(again, data=data).state.step == 4
    other = replace(again, latents=LatentConfig(posterior="sample"), train=replace(again.train, resume=False))
    with pytest.raises(InputError, match=r"latents.posterior must be 'mean' for this flow, got 'sample'"):
        train(other, data=data)


def test_a_finished_run_goes_on_with_more_steps_and_the_rate_of_these(tmp_path, capsys):
    one = replace(config(tmp_path / "run"), flow=FlowConfig(**{**SMALL, "num_classes": None}))
    data = image_set("ab")
    train(one, data=data)
    capsys.readouterr()
    longer = replace(one, train=replace(one.train, steps=9, resume=True))
    assert train(longer, data=data).state.step == 9
    assert "9 steps in place of 4; the learning rate follows" in capsys.readouterr().out
    rates = [row["lr"] for row in read_metrics(tmp_path / "run" / "metrics.csv") if "lr" in row]
    assert rates == pytest.approx([learning_rate(s, 1e-3, 1, 4 if s < 4 else 9) for s in range(9)], abs=1e-8)
    kept = RunConfig.read(tmp_path / "run" / "config.yaml")
    assert (kept.train.steps, kept.train.resume) == (9, False)
    for steps in (8, 1):
        with pytest.raises(
            InputError, match=rf"train.steps must be at least 9, which .*step_00000009 has done, got {steps}"
        ):
            train(replace(longer, train=replace(longer.train, steps=steps)), data=data)
    assert RunConfig.read(tmp_path / "run" / "config.yaml") == kept
    with pytest.raises(InputError, match=r"train.lr was .*; expected the same, or a new run that begins from this one"):
        train(replace(longer, train=replace(longer.train, lr=0.1)), data=data)


def test_a_moved_or_copied_run_goes_on_with_itself_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tree = tmp_path / "images"
    for name in ("ant", "bee"):
        (tree / name).mkdir(parents=True)
        for number, image in enumerate(image_set("a", channels=3, count=6).train[range(6)][0]):
            from flowback.data.pictures import save_png

            save_png(image, tree / name / f"{number}.png")
    flow = ["--flow.patch_size=2", "--flow.width=16", "--flow.head_dim=8", "--flow.blocks=2", "--flow.layers=1"]
    options = ["--data.name=folder", "--data.path=images", "--data.image_size=6", *flow, "--train.batch_size=4"]
    run = "a [bold]run[/bold] here"
    assert main(["train", f"--run={run}", *options, "--train.steps=3", "--train.until=1"]) == 0
    out = capsys.readouterr().out
    assert "flowback train --config 'a [bold]run[/bold] here/config.yaml' --train.resume\n" in out
    shutil.copytree(run, "copy")
    Path("elsewhere").mkdir()
    Path(run).rename("elsewhere/moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--train.resume", "--config", "moved/config.yaml"]) == 0
    assert checkpoint.newest(tmp_path / "copy").name == "step_00000001"
    monkeypatch.chdir(tmp_path / "copy")
    assert main(["train", "--config=config.yaml", "--train.resume", "--train.until=2"]) == 0
    assert checkpoint.newest(tmp_path / "copy").name == "step_00000002"
    assert evaluate("../elsewhere/moved", EvaluationConfig(metrics=("bpd",)))["steps"] == 3
    again = refuse(["train", "--config=../elsewhere/moved/config.yaml"], capsys)
    assert "../elsewhere/moved holds a run already" in again
    tree.rename(tmp_path / "other")  # where the data lies may change, and is kept
    assert main(["train", "--config=config.yaml", "--data.path=../other", "--train.resume"]) == 0
    monkeypatch.chdir(tmp_path)
    assert evaluate("copy", EvaluationConfig(metrics=("bpd",)))["steps"] == 3


@pytest.mark.parametrize("name", ["config.yaml", "classes.json", "metrics.csv"])
def test_a_run_overwrites_no_file_that_is_of_none(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name} is not of a run, and would be overwritten; use another --run"):
        train(replace(config(tmp_path), flow=FlowConfig(patch_size=2, width=32)), data=image_set("ab"))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: "mine"}


def test_a_configuration_holds_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("weights.pth", "random", "vae"):
        Path(name).touch()
    one = RunConfig(
        run="~/run",
        data=DataConfig(name="shards", path="tars/{0..9}.tar"),
        latents=LatentConfig(autoencoder="vae"),
        alignment=AlignmentConfig(encoder_weights="weights.pth"),
        train=TrainConfig(caches="~/caches", init="owner/name"),
    )
    rooted = one.rooted()
    assert one.folder == Path(rooted.run) == tmp_path / "home" / "run"
    assert rooted.data.path == str(tmp_path / "tars" / "{0..9}.tar")
    assert rooted.latents.autoencoder == str(tmp_path / "vae")
    assert rooted.alignment.encoder_weights == str(tmp_path / "weights.pth")
    assert rooted.train.caches == str(tmp_path / "home" / "caches")
    assert rooted.train.init == "owner/name"  # on the hub
    assert rooted.rooted() == rooted
    named = RunConfig(
        data=DataConfig(path="{/a,/b}/0.tar"),
        latents=LatentConfig(autoencoder="some/vae"),
        alignment=AlignmentConfig(encoder_weights="random"),
    )
    assert named.rooted() == replace(named, run=str(tmp_path / "runs" / "digits"))


def test_init_is_read_by_a_dry_run_and_by_cache(small_run, monkeypatch, capsys):
    plans = []
    monkeypatch.setattr("flowback.cli.training.plan", lambda config, device: plans.append(config.flow))
    assert main(["train", f"--init={small_run}", "--dry-run"]) == 0
    assert (plans[0].width, plans[0].patch_size, plans[0].num_classes) == (32, 4, None)
    digits = ["--data.limit=64", "--alignment.strategy=reverse", "--alignment.at=[[2,1]]"]
    assert main(["cache", f"--init={small_run}", "--plan", *digits]) == 0
    assert "features" in capsys.readouterr().out
