"""Students: what they draw by definition, what they learn, and the runs that train them."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from builders import images, labels, random_flow, refuse, student_of, tiny_autoencoder
from flowback import InputError, LatentFlow, TarFlow
from flowback.cli import main
from flowback.encoders import TimmEncoder
from flowback.flow.student import SOLVERS, Student, integrate
from flowback.latents import from_pretrained, load_autoencoder
from flowback.reports.card import export
from flowback.runs import checkpoint
from flowback.runs.checkpoint import load_flow
from flowback.runs.config import DistillRunConfig, StudentConfig, TrainConfig
from flowback.runs.log import read_metrics
from flowback.runs.slices import Reader
from flowback.samplers import LESSONS, FlowMatching, Inverse, measure
from flowback.tasks.sampling import Request, alike, candidates, checked_store, draw, trajectory
from flowback.training.distillation import distill

METHODS = ("flow_matching", "inverse", "denoiser")


def noise(flow, n=3):
    return torch.randn(n, *flow.token_shape, dtype=flow.data_dtype, generator=torch.Generator().manual_seed(2))


# ---- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_euler_is_exact_where_the_paths_of_a_linear_pairing_are_straight(steps):
    A = torch.tensor([[0.9, 0.3], [-0.2, 0.5]], dtype=torch.float64)
    identity, z = torch.eye(2, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)

    def velocity(x, t):  # z - x of the pair x = A z whose mean at t is x_t
        return x @ torch.linalg.inv((1 - t) * A + t * identity).T @ (identity - A).T

    assert torch.allclose(integrate(velocity, z, steps), z @ A.T, atol=1e-12)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_by_the_order_of_the_solver(solver, order):
    z = torch.ones(1, 1, 1, dtype=torch.float64)
    exact = math.exp(1 - math.e)  # of dx/dt = x e^t, from x(1) = 1
    errors = [float(integrate(lambda x, t: x * math.exp(t), z, n, solver)) - exact for n in (32, 64)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def test_heun_never_asks_for_the_velocity_at_an_image_without_noise():
    seen = []

    def velocity(x, t):
        seen.append(round(t, 9))
        return -x

    integrate(velocity, torch.ones(1, 1, 1), 4, "heun")
    assert seen == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert torch.equal(integrate(velocity, torch.ones(1), 1, "heun"), integrate(velocity, torch.ones(1), 1, "euler"))


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_untrained_student_leaves_z_where_it_is_and_an_inverse_gives_grey(solver):
    flow = random_flow()
    flow.learned["student"] = student_of(flow, std=0)
    assert torch.equal(flow.tokenize(flow.draft(noise(flow), [0, 1, -1], 1.5, 3, solver)), noise(flow))
    flow.learned["student"] = student_of(flow, "inverse", std=0)
    assert not flow.draft(noise(flow), 1).any()


def test_guidance_extrapolates_the_velocity_away_from_that_without_a_label():
    flow, w = random_flow(), 1.5
    student = flow.learned["student"] = student_of(flow)
    z, one = noise(flow), torch.ones(3, dtype=torch.float64)
    v, unlabelled = (student(z, one, flow.class_weights(y, 3))[0] for y in ([0, 1, 2], None))
    drawn = flow.tokenize(flow.draft(z, [0, 1, 2], w, steps=1))
    assert torch.allclose(drawn, z - v - w * (v - unlabelled), atol=1e-12)
    assert (v - unlabelled).abs().max() > 1e-3


def test_an_inverse_sees_the_scale_of_guidance():
    flow = random_flow()
    student = flow.learned["student"] = student_of(flow, "inverse")
    z, at = noise(flow), torch.full((3,), 0.6, dtype=torch.float64)
    assert torch.equal(flow.tokenize(flow.draft(z, 1, 1.5)), student(z, at, flow.class_weights(1, 3))[0])


@pytest.mark.parametrize("classes", [0, 4])
def test_samples_are_drafts_of_z_that_is_drawn_with_the_students_deviation(classes):
    flow = random_flow(num_classes=classes)
    student = flow.learned["student"] = student_of(flow)
    student.z_std.fill_(0.5)
    y = torch.tensor([2, 0, 1]) if classes else None
    found = flow.sample(3, y, temperature=0.8, seed=3, sampler="student", steps=2, batch_size=2)
    z = 0.8 * torch.randn(3, *flow.token_shape, dtype=flow.dtype, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(found, flow.draft(0.5 * z, y, steps=2), atol=1e-12)
    assert torch.allclose(flow.to_noise(0.4 * z, y, 0.8, sampler="student"), z, atol=1e-12)


def test_a_student_of_independent_noise_knows_no_prior():
    flow = random_flow(prior="scaled")
    flow.prior_std.fill_(3)
    flow.learned["student"] = student_of(flow, noise="independent")
    z = noise(flow)
    assert torch.equal(flow.draw_z(z, 1, 0.5, "fitted", "student"), 0.5 * z)
    assert torch.equal(flow.draw_z(z, 1, 0.5), 1.5 * z)


def test_a_learned_denoiser_takes_the_place_of_the_score_step():
    flow = random_flow(noise_std=0.3)
    denoiser = flow.learned["denoiser"] = student_of(flow, "denoiser")
    x, y = images(flow), labels(flow)
    step = denoiser(flow.tokenize(x), torch.zeros(3, dtype=torch.float64), flow.class_weights(y, 3))[0]
    assert torch.allclose(flow.denoise(x, y, learned=True), x + 0.3 * flow.to_grid(step), atol=1e-12)
    options = {"y": [0, 1], "seed": 1}
    noisy = flow.sample(**options, denoise=False)
    assert torch.allclose(flow.sample(**options, denoise="learned"), flow.denoise(noisy, [0, 1], learned=True))


def test_a_flow_in_latents_draws_by_the_student_of_its_latents(tmp_path):
    autoencoder = load_autoencoder(str(tiny_autoencoder(tmp_path / "ae", channels=1)))
    flow = LatentFlow(random_flow(torch.float32, channels=3, image_size=4, num_classes=3), autoencoder)
    flow.core.learned["student"] = student_of(flow.core)
    found = flow.sample(y=[0, 2], seed=1, sampler="student", steps=2)
    assert torch.allclose(found, flow.to_images(flow.core.sample(y=[0, 2], seed=1, sampler="student", steps=2)))
    assert found.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("change", [{}, {"guidance": 1.0}, {"best_of": 3}, {"sampler": "exact", "denoiser": "learned"}])
def test_images_of_a_request_depend_on_nothing_but_it(change):
    flow = random_flow(torch.float32, channels=1)
    flow.learned |= {
        name: student_of(flow, method) for name, method in zip(("student", "denoiser"), METHODS[::2], strict=True)
    }
    request = replace(Request(7, (0, 1, 2), seed=4, sampler="student"), **change)
    found, note = draw(flow, request, 0, "auto", 64)
    other, _ = draw(flow, request, 0, "auto", 3)
    assert (found.int() - other.int()).abs().max() <= 1
    assert (note.residual, note.fell_back) == (0, 0) or request.sampler == "exact"
    if request.best_of == 1:
        z, y = candidates(flow, request, range(7))
        x = flow.draft(z[:, 0], y, request.guidance or 0.0) if request.sampler == "student" else None
        x = flow.denoise(flow.decode(z[:, 0], y), y, learned=True) if x is None else x
        assert (found.int() - (127.5 * (x + 1)).round().clamp(0, 255).int()).abs().max() <= 1


def test_what_one_student_began_another_does_not_go_on_with(tmp_path):
    flow = random_flow(torch.float32, channels=1)
    flow.learned["student"] = student_of(flow)
    request, output = Request(70, (0, 1), sampler="student"), tmp_path / "images"
    checked_store(flow, request, output).open()
    checked_store(flow, request, output).open()
    flow.learned["student"] = student_of(flow, std=0.1)
    with pytest.raises(InputError, match="was begun by another request or with other weights"):
        checked_store(flow, request, output).open()


def test_like_an_image_of_a_student_at_no_distance_is_that_image():
    flow = random_flow(torch.float32, channels=1)
    flow.learned["student"] = student_of(flow)
    flow.student.z_std.fill_(0.7)
    request = Request(4, (0, 1), seed=4, sampler="student", temperature=0.9)
    z, y = candidates(flow, request, [3])
    assert torch.allclose(alike(flow, request, 3, 0.0, 1, 2), flow.draft(z[:, 0], y), atol=1e-5)
    with pytest.raises(InputError, match="sampler must be exact to show images block by block, got student"):
        trajectory(flow, request, 0)


# ---- learning -------------------------------------------------------------------------------------------------------


def batch_of(flow, method, n=8):
    x, y = images(flow, n), labels(flow, n)
    given = {"x": x, "y": y, "noised": flow.perturb(x, torch.Generator().manual_seed(3))}
    return given if method == "denoiser" else given | {"levels": torch.linspace(0.05, 0.95, n, dtype=flow.dtype)}


@pytest.mark.parametrize("method", METHODS)
def test_one_batch_is_learned(method):
    flow = random_flow(torch.float32, noise_std=0.3)
    student = student_of(flow, method, std=0).requires_grad_(True).train()
    objective, batch = LESSONS[method](flow, student), batch_of(flow, method)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-2)
    seen = []
    for _ in range(25):
        loss, parts = objective(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(parts)
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in flow.parameters())
    for name in seen[0]:
        assert seen[-1][name] < 0.3 * seen[0][name], name


def test_times_are_logit_normal():
    flow, times = random_flow(), []
    student = student_of(flow)
    student.register_forward_pre_hook(lambda module, arguments: times.append(arguments[1]))
    x = images(flow, 1000)
    levels = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    FlowMatching(flow, student)(x, levels, noise=noise(flow, 1000))
    logits = torch.logit(times[0])
    assert float(logits.mean()) == pytest.approx(-0.2, abs=0.01)
    assert float(logits.std()) == pytest.approx(1, abs=0.01)


def test_the_loss_of_the_flows_own_noise_is_that_of_its_z_as_noise():
    flow = random_flow()
    student, batch = student_of(flow), batch_of(flow, "flow_matching")
    student.z_std.fill_(1.7)
    z = flow.encode(batch["noised"], batch["y"])[0] / 1.7
    objective = FlowMatching(flow, student)
    found, _ = objective(**batch)
    del batch["noised"]
    assert found.item() == pytest.approx(objective(**batch, noise=z)[0].item(), rel=1e-9)


def test_only_labelled_images_are_guided_and_half_of_them():
    flow = random_flow()
    student, levels = student_of(flow, "inverse").requires_grad_(True), []
    student.register_forward_pre_hook(lambda module, arguments: levels.append(arguments[1]))
    batch = batch_of(flow, "inverse") | {"y": torch.tensor([-1, -1, 0, 1, -1, -1, 2, 3])}
    Inverse(flow, student, guidance=3.0)(**batch)
    w = (3 * (2 * batch["levels"][6:] - 1)).tolist()  # of the two with a label and a level above a half
    assert levels[-1].tolist() == pytest.approx([0] * 6 + [scale / (1 + scale) for scale in w])
    unlabelled = batch | {"y": torch.full((8,), -1)}
    losses = [Inverse(flow, student, guidance=scale)(**unlabelled)[0] for scale in (0.0, 3.0)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)


def test_states_are_those_before_the_flows_blocks_the_last_block_first():
    flow = random_flow()
    student, x = student_of(flow, "inverse"), images(flow, 16)
    measure(flow, student, x, None)
    z, _, trace = flow.encode(x, None, trace=())
    assert student.z_std.item() == pytest.approx(z.std().item())
    assert student.state_std.tolist() == pytest.approx([trace.inputs[t].std().item() for t in (3, 2, 1)])
    plain = student_of(flow, noise="independent")
    measure(flow, plain, x, None)
    assert float(plain.z_std) == 1


# ---- runs -----------------------------------------------------------------------------------------------------------


def config(teacher, method, run=None, **train):
    options = {"steps": 6, "batch_size": 16, "warmup": 2, "log_every": 2, "eval_every": 4, "eval_images": 20}
    options |= {"sample_every": 6, "checkpoint_every": 3, **train}
    extra = {"guidance": 1.0, "features": 0.1, "align": 0.1, "encoder_weights": "random"} if method == "inverse" else {}
    student = StudentConfig(width=16, layers=3, head_dim=8)
    run = None if run is None else str(run)
    return DistillRunConfig(
        teacher=str(teacher), run=run, method=method, student=student, train=TrainConfig(**options), **extra
    )


def tensors(run):
    folder = checkpoint.newest(run)
    readers = [Reader(folder, "training"), Reader(folder, "model")]
    return {name: reader.read(name).clone() for reader in readers for name in reader.slices}


@pytest.fixture(scope="module", params=METHODS)
def distilled(request, small_run, tmp_path_factory):
    teacher = tmp_path_factory.mktemp("students") / "digits"
    shutil.copytree(small_run, teacher)
    result = distill(config(teacher, request.param))
    assert not result.interrupted
    assert result.run == teacher / "students" / request.param
    return request.param, teacher, result


def test_a_run_that_was_interrupted_equals_the_undisturbed_one_bit_for_bit(distilled, tmp_path):
    method, teacher, result = distilled
    for i, stop in enumerate((1, 4, None)):
        distill(config(teacher, method, tmp_path / "cut", until=stop, resume=i > 0))
    expected, found = tensors(result.run), tensors(tmp_path / "cut")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_an_inverse_takes_the_encoders_features_of_images_from_disk(small_run, tmp_path, monkeypatch):
    shutil.copytree(small_run, tmp_path / "digits")
    begin = replace(config(tmp_path / "digits", "inverse"), features=0.0)
    kept = distill(begin)
    seen, forward = [], TimmEncoder.forward

    def counted(self, x):
        seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(TimmEncoder, "forward", counted)
    distill(replace(begin, run=str(tmp_path / "again")))
    assert seen == []
    computed = distill(replace(begin, run=str(tmp_path / "computed"), cache=False))
    assert seen == [16] * 6
    rows = [read_metrics(run / "metrics.csv") for run in (kept.run, tmp_path / "again", computed.run)]
    align = [[row["align"] for row in part if "align" in row] for part in rows]
    assert align[1] == align[0]
    assert align[2] == pytest.approx(align[0], abs=1e-3)  # features on disk are float16
    half = replace(begin.train, precision="bf16-mixed")
    distill(replace(begin, run=str(tmp_path / "perceptual"), features=1.0, align=0.0, train=half))
    assert seen == [16] * 12  # of what the student makes alone


def test_what_was_distilled_lies_beside_the_flow_and_goes_with_it(distilled, tmp_path):
    method, teacher, result = distilled
    name = "denoiser" if method == "denoiser" else "student"
    flow, _ = load_flow(teacher)
    export(str(teacher), tmp_path / "exported")
    copies = [flow, from_pretrained(tmp_path / "exported")]
    copies[1].save_pretrained(tmp_path / "saved")
    copies.append(TarFlow.from_pretrained(tmp_path / "saved"))
    for copy in copies:
        student = copy.core.taught(name)
        assert student.lesson == result.flow.core.learned[name].lesson
        assert not any(p.requires_grad for p in student.parameters())
        for key, value in result.flow.core.learned[name].state_dict().items():
            assert torch.equal(student.state_dict()[key], value), key
    assert ("student lies beside the flow" in (tmp_path / "exported" / "README.md").read_text()) == (name == "student")
    assert not [key for key in flow.state_dict() if "learned" in key]
    rows = read_metrics(result.run / "metrics.csv")
    part = {"flow_matching": "velocity", "inverse": "image", "denoiser": "score"}[method]
    assert [row["step"] for row in rows if part in row] == [2, 4, 6]
    assert [row["step"] for row in rows if f"held_out_{part}" in row] == [4, 6]
    assert (result.run / "samples" / "step_00000006.png").is_file()


def test_a_student_of_other_weights_is_refused(distilled, tmp_path):
    method, teacher, _ = distilled
    name = "denoiser" if method == "denoiser" else "student"
    with pytest.raises(InputError, match=f"the {name} was distilled of other weights"):
        load_flow(teacher, "raw")[0].core.taught(name)
    flow, _ = load_flow(teacher)
    with torch.no_grad():
        next(flow.parameters()).add_(1)
    flow.save_pretrained(tmp_path / "other")
    shutil.copytree(flow.core.folder / name, tmp_path / "other" / name, dirs_exist_ok=True)
    changed = TarFlow.from_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="flowback distill RUN"):
        changed.taught(name)
    known = json.loads((tmp_path / "other" / name / "config.json").read_text())
    known["lesson"]["tokens"] += 1
    (tmp_path / "other" / name / "config.json").write_text(json.dumps(known))
    with pytest.raises(InputError, match="position"):
        TarFlow.from_pretrained(tmp_path / "other")


def test_a_run_does_not_go_on_with_another_teacher(distilled, small_run, tmp_path):
    method, teacher, _ = distilled
    other = tmp_path / "digits"
    shutil.copytree(small_run, other)
    flow, _ = load_flow(other)
    with torch.no_grad():
        next(flow.parameters()).add_(1)
    flow.save_pretrained(checkpoint.newest(other))
    distill(config(teacher, method, tmp_path / "cut", until=1))
    with pytest.raises(InputError, match="was begun with another teacher"):
        distill(config(other, method, tmp_path / "cut", resume=True))


def test_from_the_command_line_to_images(small_run, tmp_path, capsys):
    run = tmp_path / "digits"
    shutil.copytree(small_run, run)
    words = ["--student.width=16", "--student.layers=3", "--student.head_dim=8", "--train.batch_size=16"]
    words += ["--train.eval_images=20", "--train.steps=3"]
    assert main(["distill", str(run), *words, "--train.until=1"]) == 0
    begun = str(run / "students" / "flow_matching" / "config.yaml")
    assert f"flowback distill --config {begun} --train.resume" in capsys.readouterr().out.replace("\n", "")
    assert main(["distill", "--config", begun, "--train.resume"]) == 0
    assert "--sampler student" in capsys.readouterr().out
    out = str(tmp_path / "samples.npz")
    assert main(["sample", str(run), "-o", out, "--num=6", "--sampler=student", "--steps=2", "--guidance=1"]) == 0
    drawn = np.load(out)["arr_0"]
    assert drawn.shape == (6, 8, 8, 1)
    assert drawn.std() > 0
    assert main(["evaluate", str(run), "--metrics=fid", "--samples=24", "--sampler=student", "--steps=2"]) == 0
    found = json.loads((run / "evaluation.json").read_text())["fidelity"]
    assert found["sampler"] == "student, 2 steps by euler"
    assert "Samples of the student" in (run / "report.html").read_text()
    said = refuse(["sample", str(run), "--denoiser=learned"], capsys)
    assert "this flow has no denoiser; flowback distill RUN --method denoiser makes one" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": "best"}, "sampler must be one of exact, student, got 'best'"),
        ({"sampler": "student"}, "this flow has no student; flowback distill RUN makes one"),
        ({"denoise": "score"}, "denoise must be true, false, learned or None, got 'score'"),
        ({"denoise": "learned"}, "this flow has no denoiser"),
    ],
)
def test_a_flow_without_students_says_so(options, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        random_flow(noise_std=0.3).sample(1, **options)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("flow_matching", {"solver": "rk4"}, "solver must be one of euler, heun, got 'rk4'"),
        ("flow_matching", {"steps": 0}, "steps must be at least 1, got 0"),
        ("inverse", {"steps": 2}, "an inverse draws in 1 step by euler, got 2 by euler"),
        ("inverse", {"solver": "heun"}, "an inverse draws in 1 step by euler, got None by heun"),
        ("flow_matching", {"return_log_prob": True}, "return_log_prob is of images with noise"),
    ],
)
def test_what_a_student_cannot_do_is_said(method, options, said):
    flow = random_flow()
    flow.learned["student"] = student_of(flow, method)
    with pytest.raises(InputError, match=said):
        flow.sample(2, sampler="student", **options)


def test_a_student_has_no_schedule_of_guidance():
    flow = random_flow()
    flow.learned["student"] = student_of(flow)
    with pytest.raises(InputError, match="a student knows only the scale of guidance"):
        draw(flow, Request(2, (0,), 1.0, schedule="annealed", sampler="student"), 0, "auto", 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "magic"}, "method must be one of flow_matching, inverse, denoiser, got 'magic'"),
        ({"method": "inverse", "noise": "independent"}, "noise independent is of flow_matching alone"),
        ({"guidance": 1.0}, "guidance is an option of method inverse, got 1.0 with flow_matching"),
        ({"method": "inverse", "align": -1.0}, "align must be a number of at least 0, got -1.0"),
        ({"encoder_precision": "fp8"}, "encoder_precision must be one of 32-true, bf16-mixed, got 'fp8'"),
        ({"train": TrainConfig(compile=True)}, "train.compile is an option of flows; leave it out for a student"),
    ],
)
def test_impossible_options_are_one_sentence(options, said):
    with pytest.raises(InputError, match=said):
        DistillRunConfig(**options)


def test_an_inverse_needs_a_layer_more_than_its_flow_has_blocks():
    flow = random_flow()
    lesson = student_of(flow, "inverse").lesson
    with pytest.raises(InputError, match=r"student\.layers must be above 3, the flow's blocks, for an inverse, got 3"):
        Student(StudentConfig(width=16, layers=3, head_dim=8), lesson)
