import csv
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from builders import refuse, tiny_autoencoder
from flowback.alignment import Alignment
from flowback.cli import main
from flowback.core.console import output
from flowback.core.devices import autocast
from flowback.core.distributed import ENDING
from flowback.core.errors import InputError
from flowback.core.files import file_hash
from flowback.core.units import from_levels
from flowback.data import DataConfig, ImageSet, load_data
from flowback.data.batches import Raw, ignore_interrupts
from flowback.data.splits import MemorySplit
from flowback.flow.config import FlowConfig
from flowback.flow.tarflow import TarFlow
from flowback.latents import LatentFlow
from flowback.runs import checkpoint
from flowback.runs.checkpoint import load_flow
from flowback.runs.config import AlignmentConfig, LatentConfig, RunConfig, TrainConfig
from flowback.runs.log import MetricsLog, read_metrics
from flowback.training import train
from flowback.training.budget import known_autoencoder
from flowback.training.build import build_flow, fingerprint, make_alignment
from flowback.training.inputs import Inputs
from flowback.training.optim import learning_rate, update_ema


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def config(run: Path, aligned: bool = False, **train_options) -> RunConfig:
    options = {"steps": 12, "batch_size": 16, "warmup": 3, "log_every": 3, "eval_every": 6, "eval_images": 20}
    options |= {"sample_every": 100, "checkpoint_every": 5}
    strategy = "reverse" if aligned else "none"
    return RunConfig(
        run=str(run),
        data=DataConfig(limit=64),
        flow=FlowConfig(patch_size=4, width=32, blocks=2, layers=1, noise_std=0.2),
        alignment=AlignmentConfig(strategy=strategy, at=[[2, 1]], projector_width=16),
        train=TrainConfig(**(options | train_options)),
    )


def tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.newest(run)
    return load_file(folder / "model.safetensors") | load_file(folder / "training.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed aligned run of 12 steps."""
    os.environ["FLOWBACK_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    run = tmp_path_factory.mktemp("whole")
    train(config(run, aligned=True))
    return run


def test_run_folder_has_what_it_should(whole):
    rows = read_metrics(whole / "metrics.csv")
    assert {row["step"] for row in rows} == {3, 6, 9, 12}
    assert all("held_out_exact" in row for row in rows if row["step"] in (6, 12) and "loss" not in row)
    assert rows[0]["loss"] == pytest.approx(rows[0]["nll"] + 0.1 * rows[0]["align"], abs=1e-5)
    assert list((whole / "events").glob("events.out.tfevents*"))
    assert (whole / "samples" / "step_00000012.png").exists()
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == ["step_00000010", "step_00000012"]
    assert json.loads((whole / "classes.json").read_text()) == [str(k) for k in range(10)]
    assert not [file for file in whole.rglob("*") if file.suffix in (".pt", ".pth", ".pkl", ".bin", ".ckpt")]


def test_config_in_the_run_folder_can_be_run_again(whole, tmp_path):
    again = RunConfig.from_yaml((whole / "config.yaml").read_text())
    assert again == config(whole, aligned=True)
    train(replace(again, run=str(tmp_path / "again")))
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(whole).values(), tensors(tmp_path / "again").values(), strict=True)
    )


@pytest.mark.parametrize("stops", [[1], [5], [4, 7, 11]])
def test_resumed_equals_undisturbed_bit_for_bit(whole, tmp_path, stops):
    run = tmp_path / "run"
    for i, stop in enumerate(stops):
        result = train(config(run, aligned=True, until=stop, resume=i > 0))
        assert result.interrupted
        assert result.state.step == stop
    result = train(config(run, aligned=True, resume=True))
    assert not result.interrupted
    expected, found = tensors(whole), tensors(run)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_alignment_that_ends_goes_on_as_a_plain_run(whole, tmp_path):
    aligned = config(tmp_path / "ends", aligned=True)
    train(replace(aligned, alignment=replace(aligned.alignment, until=6)))
    rows = [row for row in read_metrics(tmp_path / "ends" / "metrics.csv") if "loss" in row]
    assert [row["step"] for row in rows if "align" in row] == [3, 6]
    assert all(row["loss"] == pytest.approx(row["nll"]) for row in rows if row["step"] > 6)
    before = [row for row in read_metrics(whole / "metrics.csv") if "loss" in row]
    assert [row["loss"] for row in rows[:2]] == [row["loss"] for row in before[:2]]
    assert [row["nll"] for row in rows[2:]] != [row["nll"] for row in before[2:]]


def test_alignment_that_ended_resumes_bit_for_bit(tmp_path):
    for name, stops in (("whole", []), ("cut", [4, 9])):
        for i, stop in enumerate([*stops, None]):
            one = config(tmp_path / name, aligned=True, until=stop, resume=i > 0)
            train(replace(one, alignment=replace(one.alignment, until=7)))
    assert all(torch.equal(tensors(tmp_path / "whole")[name], value) for name, value in tensors(tmp_path / "cut").items())


def test_only_every_third_step_is_aligned_and_the_log_has_the_mean_of_those(tmp_path):
    options = {"steps": 9, "sample_every": 100, "eval_every": 100}
    for name, every in (("all", 1), ("third", 3), ("plain", 1)):
        one = config(tmp_path / name, aligned=name != "plain", log_every=3 if name == "third" else 1, **options)
        train(replace(one, alignment=replace(one.alignment, every=every)))
    logs = (read_metrics(tmp_path / name / "metrics.csv") for name in ("all", "plain", "third"))
    rows, plain, third = ([row for row in log if "loss" in row] for log in logs)
    assert [row["step"] for row in third] == [3, 6, 9]
    assert third[0]["align"] == pytest.approx(rows[0]["align"], abs=1e-6), "of the first step alone, not a third of it"
    assert third[0]["loss"] == pytest.approx(third[0]["nll"] + 0.1 * third[0]["align"] / 3, abs=1e-5)
    assert third[0]["nll"] != pytest.approx(sum(row["nll"] for row in plain[:3]) / 3, abs=1e-6)


@pytest.mark.parametrize("options", [{"every": 3}, {"strategy": "forward", "reverse_from": 6}, {"every": 2, "until": 7}])
def test_alignment_by_steps_resumes_bit_for_bit(tmp_path, options):
    for name, stops in (("whole", []), ("cut", [4, 8])):
        for i, stop in enumerate([*stops, None]):
            one = config(tmp_path / name, aligned=True, until=stop, resume=i > 0)
            train(replace(one, alignment=replace(one.alignment, **options)))
    assert all(torch.equal(tensors(tmp_path / "whole")[name], value) for name, value in tensors(tmp_path / "cut").items())


def test_forward_turns_into_reverse_at_its_step(tmp_path, monkeypatch):
    seen = []
    loss = Alignment.loss
    monkeypatch.setattr(Alignment, "loss", lambda self, *a, **k: seen.append(self.strategy) or loss(self, *a, **k))
    one = config(tmp_path / "turns", aligned=True)
    train(replace(one, alignment=replace(one.alignment, strategy="forward", reverse_from=5)))
    assert seen == ["forward"] * 5 + ["reverse"] * 7


def test_shuffled_targets_are_those_of_another_image_the_same_in_all_steps(tmp_path):
    plain = config(tmp_path / "run", aligned=True, steps=4, batch_size=64)  # every step has all images
    targets = {}
    for shuffled in (False, True):
        one = replace(plain, alignment=replace(plain.alignment, shuffled=shuffled))
        data = load_data(one.data)
        flow = build_flow(one, data)
        inputs = Inputs(one, data, flow, None, make_alignment(one.alignment, flow), torch.device("cpu"))
        for step, raw in enumerate(inputs.stream(0, 2)):
            order = raw[0].argsort()
            targets[shuffled, step] = inputs.prepare(raw, step).targets[order]
    assert torch.equal(targets[False, 0], targets[False, 1])
    assert torch.equal(targets[True, 0], targets[True, 1])
    own, others = targets[False, 0].flatten(1), targets[True, 0].flatten(1)
    matches = (others[:, None] == own).all(dim=2)
    assert matches.sum(dim=0).ge(1).all()  # the same features
    assert matches.diagonal().float().mean() < 0.2


def test_finished_run_is_not_trained_further(whole):
    before = tensors(whole)
    result = train(config(whole, aligned=True, resume=True))
    assert result.state.step == 12
    assert all(torch.equal(before[name], value) for name, value in tensors(whole).items())


def test_rows_of_a_run_that_was_killed_are_dropped_on_resume(whole, tmp_path):
    run = tmp_path / "run"
    train(config(run, until=6))
    with MetricsLog(run, 6) as log:
        log.write(9, loss=123.0)
    train(config(run, resume=True))
    steps = [row["step"] for row in read_metrics(run / "metrics.csv") if "loss" in row]
    assert steps == [3, 6, 9, 12]
    assert all(row.get("loss") != 123.0 for row in read_metrics(run / "metrics.csv"))


def send(monkeypatch, numbers, at=3):
    """Send this process signals while it prepares a step."""
    real = Inputs.prepare

    def interrupt(inputs, raw, step):
        for number in numbers if step == at else ():
            os.kill(os.getpid(), number)
        return real(inputs, raw, step)

    monkeypatch.setattr(Inputs, "prepare", interrupt)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_interruption_saves_and_ends_after_the_step(tmp_path, monkeypatch, name):
    number = getattr(signal, name)
    send(monkeypatch, [number])
    before = signal.getsignal(number)
    result = train(config(tmp_path))
    assert result.interrupted
    assert result.state.step == 4
    assert checkpoint.newest(tmp_path).name == "step_00000004"
    assert signal.getsignal(number) is before


def test_only_a_second_ctrl_c_interrupts_at_once(tmp_path, monkeypatch):
    send(monkeypatch, [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM])  # as queues and terminals send them
    assert train(config(tmp_path / "saved")).state.step == 4
    send(monkeypatch, [signal.SIGTERM, signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "at once"))


def test_under_nohup_a_closed_connection_does_not_end_a_run(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send(monkeypatch, [signal.SIGHUP])
        assert not train(config(tmp_path, steps=5)).interrupted
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_that_read_ahead_leave_signals_to_the_one_that_trains():
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        ignore_interrupts(0)
        assert {signal.getsignal(number) for number in ENDING} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [5, 28, 32])  # a closed terminal, a full disk, a closed pipe
def test_a_run_goes_on_when_nobody_can_be_told(tmp_path, monkeypatch, number):
    class Closed:
        encoding = "utf-8"

        def write(self, *text):
            raise OSError(number, "gone")

        flush = write

        def isatty(self):
            return False

    send(monkeypatch, [signal.SIGHUP])
    with monkeypatch.context() as patch:
        patch.setattr(output, "lost", None)  # and back, when the test ends
        patch.setattr("sys.stdout", Closed())
        result = train(config(tmp_path))
        assert output.lost is not None
    assert result.state.step == 4
    assert checkpoint.damage(checkpoint.newest(tmp_path)) is None


def test_every_parameter_moves_and_ema_lags_behind(whole):
    start = tensors(whole)
    flow = build_flow(config(whole), load_data(DataConfig()))
    names = dict(flow.named_parameters())
    torch.manual_seed(0)
    fresh = build_flow(config(whole), load_data(DataConfig())).state_dict()
    assert [n for n in names if torch.equal(start[f"weights.flow.{n}"], fresh[n])] == []
    assert [n for n in names if torch.equal(start[f"weights.flow.{n}"], start[n])] == []


def test_weights_are_chosen_by_name_and_stamped(whole):
    ema, stamp = load_flow(whole)
    raw, raw_stamp = load_flow(whole, "raw")
    assert stamp == "ema weights of step_00000012"
    assert raw_stamp == "raw weights of step_00000012"
    assert not torch.equal(ema.blocks[0].proj_out.weight, raw.blocks[0].proj_out.weight)
    with pytest.raises(InputError, match="weights 'best' do not exist; expected ema, raw"):
        load_flow(whole, "best")


def test_gradient_that_is_not_finite_is_skipped_counted_and_ends(tmp_path, monkeypatch):
    real = Inputs.prepare

    def poison(inputs, raw, step):
        batch = real(inputs, raw, step)
        return replace(batch, x=batch.x * (float("nan") if step >= poison.start and step < poison.stop else 1))

    monkeypatch.setattr(Inputs, "prepare", poison)
    poison.start, poison.stop = 4, 6
    result = train(config(tmp_path / "some"))
    assert result.state.skipped == 2
    assert all(value.isfinite().all() for value in tensors(tmp_path / "some").values())
    poison.start, poison.stop = 6, 10**6
    with pytest.raises(InputError, match="not finite for 10 steps in a row"):
        train(config(tmp_path / "all", steps=30))
    assert checkpoint.newest(tmp_path / "all").name == "step_00000015"
    assert all(value.isfinite().all() for value in tensors(tmp_path / "all").values())


def test_a_run_is_not_overwritten_and_not_resumed_as_another(whole, tmp_path):
    with pytest.raises(InputError, match="holds a run already"):
        train(config(whole, aligned=True))
    with pytest.raises(InputError, match=r"train.lr was 0.001 .* and is 0.01; expected the same"):
        train(config(whole, aligned=True, resume=True, lr=0.01))
    with pytest.raises(InputError, match="has no checkpoint to resume from"):
        train(config(tmp_path / "new", resume=True))


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_broken_checkpoint_is_refused(tmp_path, damage):
    train(config(tmp_path, until=2))
    file = checkpoint.newest(tmp_path) / "training.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:500])
    else:
        file.write_bytes((checkpoint.newest(tmp_path) / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="has no whole checkpoint to resume from"):
        train(config(tmp_path, resume=True))


@pytest.mark.parametrize("at", [[[3, 1]], [[1, 2]]])
def test_impossible_alignment_is_refused_before_anything_is_written(tmp_path, at):
    run = tmp_path / "run"
    impossible = replace(config(run, aligned=True), alignment=AlignmentConfig(strategy="reverse", at=at))
    with pytest.raises(InputError, match=r"block must be 1 to 2, got 3|layer 2 does not exist"):
        train(impossible)
    assert not run.exists()


def test_flow_takes_the_facts_of_the_data_and_refuses_others():
    data = load_data(DataConfig())
    flow = build_flow(RunConfig(flow=FlowConfig(patch_size=2)), data)
    assert (flow.image_size, flow.channels, flow.levels, flow.num_classes) == ((8, 8), 1, 17, 10)
    assert build_flow(RunConfig(flow=FlowConfig(patch_size=2, num_classes=0)), data).num_classes == 0
    for options in ({"image_size": 16}, {"channels": 3}, {"levels": 256}, {"num_classes": 7}):
        with pytest.raises(InputError, match=f"flow.{next(iter(options))} must be"):
            build_flow(RunConfig(flow=FlowConfig(patch_size=2, **options)), data)


def test_unconditional_uniform_bfloat16_and_uncached_runs_train(tmp_path):
    plain = config(tmp_path / "plain")
    train(replace(plain, flow=replace(plain.flow, num_classes=0, noise="uniform")))
    aligned = config(tmp_path / "aligned", aligned=True, precision="bf16-mixed", hflip=True, steps=4)
    result = train(replace(aligned, alignment=replace(aligned.alignment, cache=False, encoder_precision="bf16-mixed")))
    assert all(p.dtype == torch.float32 for p in result.flow.parameters())
    assert all(p.isfinite().all() for p in result.flow.parameters())


def test_cached_and_uncached_targets_train_alike(tmp_path):
    cached, direct = config(tmp_path / "a", aligned=True, steps=4), config(tmp_path / "b", aligned=True, steps=4)
    direct = replace(direct, alignment=replace(direct.alignment, cache=False))
    a, b = (train(c).flow.state_dict() for c in (cached, direct))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-3


def test_labels_are_dropped_by_a_coin_for_each_image():
    flow = TarFlow(image_size=8, channels=1, patch_size=4, width=32, num_classes=10, levels=17)
    images = torch.zeros(4000, 1, 8, 8, dtype=torch.uint8)
    images[..., 0] = 16
    labels = torch.arange(4000) % 10
    split = MemorySplit(images, labels)
    data = ImageSet("stripes", split, split, [str(k) for k in range(10)], image_size=8, channels=1, levels=17)
    settings = TrainConfig(class_dropout=0.1, hflip=True, batch_size=4000)
    inputs = Inputs(RunConfig(train=settings), data, flow, None, None, torch.device("cpu"))
    raw = Raw(torch.arange(4000), images, labels)
    batch = inputs.prepare(raw, step=7)
    assert 0.08 < float((batch.y == -1).float().mean()) < 0.12
    assert torch.equal(batch.y[batch.y >= 0], labels[batch.y >= 0])
    flipped = batch.x[..., -1].mean((1, 2)) > 0
    assert 0.45 < float(flipped.float().mean()) < 0.55
    x_clean = from_levels(images, 17)
    x_clean = torch.where(flipped[:, None, None, None], x_clean.flip(-1), x_clean)
    assert 0.045 < float((batch.x - x_clean).std()) < 0.055
    assert torch.equal(batch.x, inputs.prepare(raw, step=7).x)
    assert not torch.equal(batch.x, inputs.prepare(raw, step=8).x)


def test_autocast_keeps_the_images_and_the_parameters_of_the_map_precise():
    torch.manual_seed(0)
    flow = TarFlow(image_size=8, channels=1, patch_size=2, width=32, blocks=2, layers=1, head_dim=16)
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.05)
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    z, log_det = flow.encode(x)
    with autocast(torch.device("cpu"), "bf16-mixed"):
        z16, log_det16, trace = flow.encode(x, trace=[(1, 1)])
    assert z16.dtype == log_det16.dtype == trace.inputs[2].dtype == torch.float32
    assert torch.equal(trace.inputs[1], flow.tokenize(x))
    assert 0 < float((z - z16).detach().abs().max()) < 0.02
    assert float((log_det - log_det16).detach().abs().max()) < 0.1


def test_schedule_rises_linearly_and_falls_as_a_cosine_to_zero():
    rates = [learning_rate(step, 2.0, 10, 110) for step in range(111)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0)
    assert rates[110] == pytest.approx(0.0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_ema_of_a_constant_is_the_constant_and_forgets_the_start():
    average, target = torch.tensor([5.0]), torch.tensor([1.0])
    update_ema([average], [target], 0.999, step=1)
    assert float(average) == pytest.approx(1 + 4 * 2 / 11)
    for step in range(2, 60):
        update_ema([average], [target], 0.999, step)
    assert float(average) == pytest.approx(1.0, abs=1e-4)


BAD_CONFIGS = [
    (TrainConfig, {"steps": 0}, "train.steps must be a whole number of at least 1, got 0"),
    (TrainConfig, {"lr": 0.0}, "train.lr must be .*, got 0.0"),
    (TrainConfig, {"lr": float("nan")}, "train.lr must be .*, got nan"),
    (TrainConfig, {"grad_clip": -1.0}, "train.grad_clip must be .*, got -1.0"),
    (TrainConfig, {"weight_decay": -1.0}, "train.weight_decay must be .*, got -1.0"),
    (TrainConfig, {"ema": 1.0}, "train.ema must be .*, got 1.0"),
    (TrainConfig, {"betas": (0.9, 1.0)}, "train.beta 2 must be .*, got 1.0"),
    (TrainConfig, {"betas": (0.9,)}, "train.betas must be two numbers"),
    (TrainConfig, {"class_dropout": 1.5}, "train.class_dropout must be .*, got 1.5"),
    (TrainConfig, {"precision": "fp8"}, "train.precision must be one of 32-true, bf16-mixed, got 'fp8'"),
    (TrainConfig, {"seed": -1}, "train.seed must be .*, got -1"),
    (AlignmentConfig, {"strategy": "sideways"}, "alignment.strategy must be one of none, forward.*, got 'sideways'"),
    (AlignmentConfig, {"gradient": "two_step"}, "alignment.gradient must be .*, got 'two_step'"),
    (AlignmentConfig, {"at": [[1, 2, 3]]}, "alignment.at must be pairs of block and layer"),
    (AlignmentConfig, {"projector_width": 0}, "alignment.projector_width must be .*, got 0"),
    (AlignmentConfig, {"projector": "tree"}, "alignment.projector must be one of mlp, conv, got 'tree'"),
    (AlignmentConfig, {"until": 0}, "alignment.until must be a whole number of at least 1, or null, got 0"),
    (AlignmentConfig, {"every": 0}, "alignment.every must be a whole number of at least 1, got 0"),
    (AlignmentConfig, {"reverse_from": 0, "strategy": "forward"}, "alignment.reverse_from must be a whole number of at"),
    (AlignmentConfig, {"reverse_from": 9, "strategy": "detach"}, "reverse_from needs alignment.strategy forward, got 'det"),
    (AlignmentConfig, {"shuffled": True, "cache": False}, "alignment.shuffled needs features that are kept"),
    (AlignmentConfig, {"encoder_precision": "fp8"}, "alignment.encoder_precision must be .*, got 'fp8'"),
]


@pytest.mark.parametrize(("section", "options", "message"), BAD_CONFIGS, ids=lambda value: str(value)[:30])
def test_bad_config_is_refused(section, options, message):
    with pytest.raises(InputError, match=message):
        section(**options)


@pytest.mark.parametrize("text", ["", "- 1", "train: {stepz: 3}", "a: [", "run: x\ntrain: 3"])
def test_text_that_is_no_config_is_refused(text):
    with pytest.raises(InputError, match="not the configuration of a run"):
        RunConfig.from_yaml(text)


RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SIDES = {"digits": 8, "fashion_mnist": 28}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_are_valid(file):
    recipe = RunConfig.from_yaml(file.read_text())
    data, flow = recipe.data, recipe.flow
    side = data.image_size or SIDES[data.name]
    images = ImageSet(data.name, None, None, [""] * 10, side, 3 if data.name in ("imagenet", "folder") else 1, 256)
    autoencoder = known_autoencoder(recipe, images)
    with torch.device("meta"):
        built = build_flow(recipe, images, autoencoder)
    a = autoencoder
    assert built.data_shape == ((a.channels, *a.latent_size(images.size)) if a else (images.channels, side, side))
    assert a is None or flow.noise_std <= a.noise_std or a.kind == "kl"  # what the decoder has seen
    assert flow.check_pairs(recipe.alignment.at) == [tuple(pair) for pair in recipe.alignment.at]


def test_the_imagenet_recipes_have_the_papers_shapes():
    shapes = {}
    for file in (file for file in RECIPES if re.fullmatch(r"imagenet\d+(_patch1)?", file.stem)):
        values = yaml.safe_load(file.read_text())
        f, side = values["flow"], values["data"]["image_size"] // (8 if "latents" in values else 1)
        assert (f["width"], f["blocks"], f["layers"], f["head_dim"]) == (1024, 8, 8, 64)
        shapes[file.stem] = ((side // f["patch_size"]) ** 2, f["noise_std"])
    assert shapes == {"imagenet64": (256, 0.05), "imagenet256": (256, 0.2), "imagenet256_patch1": (1024, 0.2)}


def test_metrics_columns_are_those_that_are_written(whole):
    with (whole / "metrics.csv").open() as stream:
        header = next(csv.reader(stream))
    written = {name for row in read_metrics(whole / "metrics.csv") for name in row}
    assert written == set(header)


OF_0_1_0 = """
run: {run}
data: {{name: digits, path: null, image_size: null, channels: 3, holdout: 0.2, split_seed: 0, limit: 64, workers: 0,
  unreadable: 0.0}}
flow: {{image_size: null, channels: null, num_classes: null, levels: null, patch_size: 4, width: 32, blocks: 2, layers: 1,
  head_dim: 32, mlp: gelu, mlp_ratio: 4.0, positions: learned, log_scale_bound: 8.0, noise: gaussian, noise_std: 0.2,
  prior: standard, autoencoder: null, latent_channels: null, latent_downsample: null, latent_scale: null,
  latent_shift: null, latent_weights: null, latent_posterior: mean}}
alignment: {{strategy: none, gradient: one_step, at: [[2, 1]], weight: 0.1, encoder: efficientnet_lite0,
  encoder_weights: null, encoder_precision: 32-true, projector: mlp, projector_width: 16, spatial_norm: false, until: null,
  shuffled: false, cache: true}}
train: {{steps: 12, batch_size: 16, lr: 1e-3, warmup: 3, weight_decay: 0.0001, betas: [0.9, 0.95], clip: 0.5, ema: 0.999,
  label_drop: 0.2, flip: true, seed: 0, precision: 32-true, compile: false, accelerator: auto, devices: 1, nodes: 1,
  strategy: ddp, accumulate: 2, checkpoint_activations: false, deterministic: false, log_every: 3, eval_every: 6,
  eval_images: 20, sample_every: 100, checkpoint_every: 5, keep: 2, cache_latents: true, caches: null, resume: false,
  until: null}}
"""


def test_a_run_of_version_0_1_0_goes_on_bit_for_bit(tmp_path, capsys):
    renamed = {"grad_clip": 0.5, "class_dropout": 0.2, "hflip": True, "grad_accum_steps": 2}
    train(config(tmp_path / "whole", **renamed))
    run = tmp_path / "old"
    train(config(run, until=7, **renamed))
    (run / "config.yaml").write_text(OF_0_1_0.format(run=run))
    folder = checkpoint.newest(run)
    described = json.loads((folder / "config.json").read_text())
    names = ("channels", "downsample", "scale", "shift", "weights")
    described |= {"autoencoder": None, **{f"latent_{name}": None for name in names}, "latent_posterior": "mean"}
    (folder / "config.json").write_text(json.dumps(described))
    checksums = json.loads((folder / "checksums.json").read_text()) | {"config.json": file_hash(folder / "config.json")}
    (folder / "checksums.json").write_text(json.dumps(checksums))
    assert load_flow(run)[0].config.width == 32
    other = ["train", f"--config={run / 'config.yaml'}", "--train.resume", "--train.grad_clip=2"]
    assert re.search(r"train.grad_clip was 0.5 .* is 2", refuse(other, capsys))
    assert main(["train", f"--config={run / 'config.yaml'}", "--train.resume"]) == 0
    expected, found = tensors(tmp_path / "whole"), tensors(run)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_options_of_version_0_1_0_have_todays_names():
    old = OF_0_1_0.format(run="a").replace("autoencoder: null", "autoencoder: some/vae")
    found = RunConfig.from_yaml(old.replace("latent_posterior: mean", "latent_posterior: sample"))
    assert found.latents == LatentConfig(autoencoder="some/vae", posterior="sample", cache=True)
    assert (found.train.grad_clip, found.train.lr, found.train.betas) == (0.5, 1e-3, (0.9, 0.95))
    assert RunConfig.from_yaml(found.to_yaml()) == found


def test_the_config_of_an_interrupted_run_goes_on_to_its_end(tmp_path):
    train(config(tmp_path, until=2))
    kept = RunConfig.read(tmp_path / "config.yaml")
    assert train(replace(kept, train=replace(kept.train, resume=True))).state.step == 12


class Data:
    def __init__(self, seed=0, size=(8, 12)):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(256, (40, 3, *size), dtype=torch.uint8, generator=generator)
        self.train, self.held_out = (images[:32], torch.arange(32) % 2), (images[32:], torch.arange(8) % 2)


def test_a_data_set_of_ones_own_is_trained_on_and_resumed_with(tmp_path):
    data = Data()
    data.classes = ["cat", "dog"]
    one = config(tmp_path / "run", until=3, hflip=True)
    result = train(one, data=data)
    assert result.flow.data_shape == (3, 8, 12)
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == ["cat", "dog"]
    kept = RunConfig.read(tmp_path / "run" / "config.yaml")
    kept = replace(kept, train=replace(kept.train, resume=True))
    with pytest.raises(InputError, match=r"given in Python; pass them to train\(config, data="):
        train(kept)
    train(kept, data=data)
    train(replace(one, run=str(tmp_path / "whole"), train=replace(one.train, until=None)), data=data)
    assert all(torch.equal(tensors(tmp_path / "whole")[name], t) for name, t in tensors(tmp_path / "run").items())


@pytest.mark.parametrize("fault", ["no splits", "floats", "a class too many", "no images"])
def test_what_is_no_data_set_is_refused(tmp_path, fault):
    data = Data()
    if fault == "no splits":
        del data.held_out
    if fault == "floats":
        data.train = (data.train[0] / 255, data.train[1])
    if fault == "a class too many":
        data.classes = ["cat"]
    if fault == "no images":
        data.train = (data.train[0][:0], data.train[1][:0])
    with pytest.raises(InputError, match="data set cannot be used"):
        train(config(tmp_path / "run"), data=data)
    assert not (tmp_path / "run").exists()


class Means(torch.nn.Module):
    """Means of patches: an encoder without tensors."""

    grid, dim = (2, 2), 1

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x[:, :1], self.grid).flatten(2).transpose(1, 2)


class Layer(Means):
    dim = 6

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layer = torch.nn.Linear(1, self.dim)

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.layer(super().forward(x))


def test_features_of_ones_own_encoder_are_cached_by_its_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "cache"))
    one, encoder, again = config(tmp_path / "run", aligned=True, until=3), Layer(), Layer()
    train(one, encoder=encoder)
    assert encoder.calls > 0
    resumed = replace(one, train=replace(one.train, until=None, resume=True))
    train(resumed, encoder=again)
    assert not hasattr(again, "calls")  # its features are there
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with pytest.raises(InputError, match=r"alignment\.encoder_weights was"):
        train(resumed, encoder=Layer(seed=1))
    with pytest.raises(InputError, match=r"given in Python; pass it to train\(config, encoder="):
        train(replace(RunConfig.read(tmp_path / "run" / "config.yaml"), run=str(tmp_path / "other")))
    train(replace(one, run=str(tmp_path / "direct"), alignment=replace(one.alignment, cache=False)), encoder=Layer())
    rows = [read_metrics(tmp_path / name / "metrics.csv")[0]["align"] for name in ("run", "direct")]
    assert rows[0] == pytest.approx(rows[1], abs=1e-4)
    train(replace(one, run=str(tmp_path / "second")), encoder=Layer(seed=1))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_encoder_that_nothing_tells_from_others_is_not_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "cache"))
    one = config(tmp_path / "run", aligned=True, until=3)
    train(one, encoder=Means())
    assert not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match="shuffled"):
        train(replace(one, alignment=replace(one.alignment, shuffled=True)), encoder=Means())
    with pytest.raises(InputError, match=r"alignment\.strategy must be .*, got 'none'"):
        train(config(tmp_path / "plain"), encoder=Layer())


def test_a_fingerprint_is_of_structure_and_weights_and_not_of_places_in_memory():
    assert fingerprint(Layer()) == fingerprint(Layer()) != fingerprint(Layer(seed=1))
    with_tanh, with_relu = (torch.nn.Sequential(Layer(), kind()) for kind in (torch.nn.Tanh, torch.nn.ReLU))
    assert fingerprint(with_tanh) != fingerprint(with_relu)
    assert fingerprint(Means()) is None
    assert fingerprint(lambda x: x) is None
    odd = Layer().to(torch.bfloat16)
    odd.register_buffer("scalar", torch.tensor(True))
    odd.register_buffer("empty", torch.empty(0, 3))
    odd.extra_repr = lambda: repr(object())
    assert fingerprint(odd) == fingerprint(odd)


def test_training_begins_with_a_flow_of_ones_own(whole, tmp_path):
    start = load_flow(whole)[0]
    before = {name: t.clone() for name, t in start.state_dict().items()}
    still = config(tmp_path / "run", steps=2, lr=1e-12, weight_decay=0.0)
    still = replace(still, flow=FlowConfig())
    train(still, flow=start)
    after = tensors(tmp_path / "run")
    assert all(torch.allclose(before[name], after[f"weights.flow.{name}"], atol=1e-8) for name in before)
    assert all(torch.equal(before[name], t) for name, t in start.state_dict().items())
    assert RunConfig.read(tmp_path / "run" / "config.yaml").flow.width == 32
    assert load_flow(tmp_path / "run")[0].config == start.config
    for options in ({"width": 64}, {"mlp": "swiglu"}, {"blocks": 5}):
        with pytest.raises(InputError, match=f"flow.{next(iter(options))} must be .* for this flow"):
            train(replace(still, run=str(tmp_path / "new"), flow=FlowConfig(**options)), flow=start)
    with pytest.raises(InputError, match="image_size must be 8 for the data set Data, got 12"):
        train(replace(still, run=str(tmp_path / "new")), data=Data(size=(8, 8)), flow=TarFlow(image_size=12, channels=3))
    assert not (tmp_path / "new").exists()


def test_training_begins_with_a_latent_flow_and_its_autoencoder(tmp_path):
    pytest.importorskip("diffusers")
    folder = tiny_autoencoder(tmp_path / "vae")
    one = config(tmp_path / "run", steps=2, lr=1e-12, weight_decay=0.0)
    one = replace(one, latents=LatentConfig(autoencoder=str(folder)), flow=FlowConfig(patch_size=2, width=32, blocks=2))
    start = train(one).flow
    again = replace(one, run=str(tmp_path / "again"), latents=LatentConfig())
    result = train(again, flow=start)
    assert isinstance(result.flow, LatentFlow)
    assert RunConfig.read(tmp_path / "again" / "config.yaml").latents.autoencoder == str(folder)
    found = result.flow.core.state_dict()
    assert all(torch.allclose(t, found[name], atol=1e-8) for name, t in start.core.state_dict().items())
    other = LatentConfig(autoencoder="another/vae")
    with pytest.raises(InputError, match=r"latents\.autoencoder must be .* for this flow, got 'another/vae'"):
        train(replace(again, run=str(tmp_path / "new"), latents=other), flow=start)


def test_folders_that_are_not_ours_are_neither_listed_nor_pruned(tmp_path):
    train(config(tmp_path, until=3))
    folder = tmp_path / "checkpoints"
    ours = folder / "step_00000003"
    others = ["step_00000002_v2", "step_best1", "step_00000003 2", "step_3", "step_000000031", "step_99999999"]
    others += ["step_٠٠٠٠٠٠٠٤", "step_00000001"]
    for name in others:
        shutil.copytree(ours, folder / name)
    (folder / "step_20_notes_1").write_text("mine")
    (folder / "step_00000099").mkdir()  # nothing in it is ours
    (folder / "step_00000098").symlink_to(folder / "step_00000098")
    kept = tmp_path / "elsewhere"
    ours.rename(kept)
    ours.symlink_to(kept)  # moved to a larger disk
    assert checkpoint.newest(tmp_path) == ours
    train(config(tmp_path, resume=True, keep=1, checkpoint_every=1))
    assert checkpoint.newest(tmp_path).name == "step_00000012"
    assert all((folder / name / "checksums.json").exists() for name in others)
    assert (kept / "checksums.json").exists()
    assert (folder / "step_20_notes_1").exists()
    assert (folder / "step_00000099").exists()


def test_what_lies_where_a_checkpoint_will_be_is_put_aside_or_was_ours(tmp_path):
    train(config(tmp_path / "run", until=3))
    folder, mine = tmp_path / "run" / "checkpoints", tmp_path / "mine"
    shutil.copytree(folder / "step_00000003", mine)  # a copy of another step, linked under a name of the run
    (folder / "step_00000004").symlink_to(mine)
    (folder / "step_00000005").write_text("mine")
    (folder / "step_00000006").mkdir()
    (folder / "step_00000006" / "notes").write_text("mine")
    train(config(tmp_path / "run", resume=True, until=7, checkpoint_every=1, keep=9))
    assert [found.name for found in checkpoint.all_of(tmp_path / "run")] == [f"step_{n:08d}" for n in (7, 6, 5, 4, 3)]
    assert not any(found.is_symlink() for found in checkpoint.all_of(tmp_path / "run"))
    assert (mine / "checksums.json").exists()
    found = {file.name.split("_found_")[0]: file for file in folder.glob("*_found_*")}
    assert found["step_00000004"].resolve() == mine
    assert found["step_00000005"].read_text() == "mine"
    assert (found["step_00000006"] / "notes").read_text() == "mine"
    damaged = folder / "step_00000007"
    (damaged / "state.json").write_text("{")
    train(config(tmp_path / "run", resume=True, until=8, checkpoint_every=1, keep=9))  # from 6, through 7
    assert checkpoint.damage(damaged) is None


@pytest.mark.parametrize("content", ['{"held_out_nats_per_dim": "1.5", "step": 3}', '{"step": [3]}', "[]", '"x"', "NaN"])
def test_a_state_that_is_none_is_said_and_ends_no_later_checkpoint(tmp_path, content):
    train(config(tmp_path, until=3))
    (checkpoint.newest(tmp_path) / "state.json").write_text(content)
    with pytest.raises(InputError, match=r"has no usable state.json of a run"):
        checkpoint.State.read(checkpoint.newest(tmp_path))
    assert checkpoint._best(tmp_path) is None


def test_figures_that_are_no_numbers_are_not_the_best_and_leave_valid_json(tmp_path, monkeypatch):
    figures = iter([float("nan"), 3.0, 2.0, float("inf"), float("-inf"), float("nan")])
    monkeypatch.setattr("flowback.training.flows.FlowJob.measure", lambda *_: {"held_out_nats_per_dim": next(figures)})
    train(config(tmp_path, steps=6, eval_every=1, checkpoint_every=1, keep=1))
    assert [folder.name for folder in checkpoint.all_of(tmp_path)] == ["step_00000006", "step_00000003"]

    def refused(word):
        raise ValueError(word)

    for folder in checkpoint.all_of(tmp_path):
        json.loads((folder / "state.json").read_text(), parse_constant=refused)
    assert checkpoint.State.read(checkpoint.newest(tmp_path)).held_out_nats_per_dim is None


CUT = ["9,1.5,0.1", "\0" * 40, "\0" * 40 + "\n", "9,x\n", "9" + ",1" * 40 + "\n", "\n", ",\n", "\0" * 200_000 + "\n"]
CUT += ['"9,', "nan" + "," * 13 + "\n", "\u2028\n", "," * 13 + "\n"]


@pytest.mark.parametrize("left", CUT, ids=lambda left: repr(left)[:20])
def test_a_log_that_was_cut_is_read_up_to_there_and_continued(whole, tmp_path, left):
    rows = read_metrics(whole / "metrics.csv")
    shutil.copy(whole / "metrics.csv", tmp_path)
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write(left)
    assert read_metrics(tmp_path / "metrics.csv") == rows
    with MetricsLog(tmp_path, 12) as log:
        log.write(15, loss=1.0)
    assert read_metrics(tmp_path / "metrics.csv") == [*rows, {"step": 15, "loss": 1.0}]


@given(st.binary(max_size=200))
def test_whatever_follows_the_whole_lines_of_a_log_they_are_read(tmp_path_factory, garbage):
    file = tmp_path_factory.mktemp("log") / "metrics.csv"
    file.write_bytes(b"step,loss\r\n3,1.5\r\n6,\r\n" + garbage)
    assert read_metrics(file)[:2] == [{"step": 3, "loss": 1.5}, {"step": 6}]
    file.write_bytes(b"\0" * 30 + b"\n" + b"3," + b"," * 12 + b"0.5\n" + garbage)  # today's columns
    assert read_metrics(file)[0] == {"step": 3, "held_out_exact": 0.5}


def test_a_resumed_log_goes_on_after_a_line_that_was_cut(tmp_path):
    train(config(tmp_path, until=6))
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("9,1.5\0\0")
    train(config(tmp_path, resume=True))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv") if "loss" in row] == [3, 6, 9, 12]


@pytest.mark.parametrize("name", ["metrics.csv", "events", "samples"])
def test_a_log_in_whose_place_something_else_lies_does_not_end_a_run(tmp_path, name, capsys):
    train(config(tmp_path, until=2, sample_every=2))
    file = tmp_path / name
    shutil.rmtree(file, ignore_errors=True)
    file.unlink(missing_ok=True)
    file.mkdir() if file.suffix else file.write_text("mine")
    assert train(config(tmp_path, resume=True, sample_every=2)).state.step == 12
    assert capsys.readouterr().out.count("cannot be written") == 1
    assert checkpoint.newest(tmp_path).name == "step_00000012"


def test_a_log_that_cannot_be_written_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flowback.runs.log._write_rows", full)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", full)
    assert train(config(tmp_path)).state.step == 12
    assert capsys.readouterr().out.count("No space left on device") == 1


def test_the_log_is_closed_when_training_fails(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", lambda events: closed.append(events))
    monkeypatch.setattr(Inputs, "prepare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config(tmp_path))
    assert len(closed) == 1
