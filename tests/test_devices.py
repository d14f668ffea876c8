"""Everything on a device that is not the CPU: equal to the CPU's to rounding, done there, and without making the host wait.

The device is the tests' own (`second_device`), which refuses to be mixed with the CPU as a GPU does, and counts.
"""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import accelerator
import second_device
from builders import SMALL_RUN, PatchEncoder, images, labels, random_flow, student_of, tiny_autoencoder
from flowback import InputError, LatentFlow, TarFlow
from flowback.alignment import Alignment
from flowback.cli import main
from flowback.core.devices import device_name, pick_device, put
from flowback.data import DataConfig, load_data
from flowback.flow.autotune import solvers
from flowback.flow.decoding import Solver
from flowback.flow.guidance import Guidance
from flowback.flow.prior import FittedPrior
from flowback.flow.student import METHODS
from flowback.latents import load_autoencoder
from flowback.latents.compressors import COMPRESSORS, make_compressor
from flowback.latents.decoders import DECODERS
from flowback.latents.losses import ReconstructionConfig, ReconstructionLoss
from flowback.latents.semantic import SemanticAutoencoder, SemanticConfig
from flowback.measure.reconstruction import psnr, ssim
from flowback.quickstart import quickstart
from flowback.reports import decisions
from flowback.reports.decisions import Decisions
from flowback.reports.evaluate import EvaluationConfig
from flowback.runs.config import RunConfig, recipe
from flowback.runs.log import read_metrics
from flowback.samplers import LESSONS
from flowback.studio import classify as tab
from flowback.studio import edit
from flowback.tasks.autotune import autotune
from flowback.tasks.classify import classify, classify_files, fit_statistics
from flowback.tasks.editing import inpaint, interpolate, swap_class
from flowback.tasks.prior import fit_prior
from flowback.tasks.refinement import agreement, best_of
from flowback.tasks.sampling import Request, alike, trajectory
from flowback.tasks.score import HeldOut, evidence, score

Y = torch.tensor([0, 1, 2])
DRAWN = Request(3, (0, 1, 2), guidance=0.5, seed=4)
MASK = (torch.arange(6) >= 3).expand(1, 1, 6, 6)
STRATEGIES = [("forward", "one_step"), ("detach", "one_step")]
STRATEGIES += [("reverse", gradient) for gradient in ("cached", "one_step", 2, "exact", "sequential")]


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path_factory.getbasetemp() / "device_cache"))


@pytest.fixture(scope="module")
def second():
    if real := accelerator.named():
        yield real
        return
    if reason := second_device.missing():
        pytest.skip(reason)  # it cannot be built without a C++ compiler and ninja, and the reason says which is missing
    with second_device.plugged() as device:
        yield device


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(flow):
    return torch.randn(3, *flow.token_shape, dtype=flow.data_dtype, generator=seeded())


def candidates(flow):
    return torch.stack([noise(flow), noise(flow).flip(0)], dim=1)


def statistics(flow):
    return fit_statistics(random_flow(flow.dtype), images(flow, 8))


def trace(flow):
    z, log_det, found = flow.encode(images(flow), labels(flow), trace=[(1, 1), (3, 2)])
    return z, log_det, *found.hidden.values()


def with_prior(flow):
    """A copy of a flow, with a prior that is nowhere standard."""
    flow, (n, d), k = copy.deepcopy(flow), flow.token_shape, flow.num_classes + 1
    of = {"generator": seeded(), "dtype": flow.data_dtype}
    bases = torch.linalg.qr(torch.randn(k + 1, n * d, 2, **of))[0]
    parts = torch.randn(k, n, d, **of), torch.rand(n, d, **of) + 0.5, bases[0], torch.rand(2, **of)
    flow.fitted_prior = FittedPrior(*parts, bases[1:], torch.rand(k, 2, **of)).to(flow.device)
    return flow


def fitted(flow):
    x, y = images(flow, 60), labels(flow, 60)
    prior = fit_prior(flow, [(put(x, flow.device), y)], [(put(x.flip(0), flow.device), y.flip(0))]).prior
    return prior.to_z(put(noise(flow), flow.device), flow.class_weights(Y, 3))


def gradient(strategy, kind):
    def of(flow):
        torch.manual_seed(0)  # of the projector
        align = Alignment(flow, PatchEncoder(flow), [(2, 1), (3, 2)], strategy, kind, 0.5, projector_width=16)
        align.to(flow.device, flow.dtype)
        loss, _ = align.loss(flow.perturb(images(flow), seeded()), labels(flow), images(flow))
        loss.backward()
        return tuple(p.grad for p in align.parameters() if p.grad is not None)

    return of


def draft(method, **options):
    def of(flow):
        name = "denoiser" if method == "denoiser" else "student"
        flow.learned[name] = student_of(flow, method)
        given = {"denoise": "learned"} if name == "denoiser" else {"sampler": "student"}
        return flow.sample(y=Y, generator=seeded(), **given, **options)

    return of


def lesson(method):
    def of(flow):
        student = student_of(flow, method).to(flow.device).requires_grad_(True)
        x, y, levels = flow.enter(images(flow)), put(labels(flow), flow.device), torch.tensor([0.1, 0.6, 0.9])
        given = {"x": x, "y": y, "noised": flow.perturb(x, seeded())}
        given |= {} if method == "denoiser" else {"levels": flow.enter(levels)}
        options = {"guidance": 2.0} if method == "inverse" else {}
        loss, parts = LESSONS[method](flow, student, **options)(**given)
        loss.backward()
        return *parts.values(), *(p.grad for p in student.parameters() if p.grad is not None)

    return of


# name -> what is computed with a flow from inputs on the CPU
WORK = {
    "encode": lambda f: f.encode(images(f), labels(f)),
    "encode with a trace": trace,
    "one label for all": lambda f: f.log_prob(images(f), 3),
    "no labels": lambda f: f.log_prob(images(f)),
    "lists": lambda f: f.log_prob(images(f), [0, -1, 2]),
    "dequantize": lambda f: f.dequantize(images(f), seeded()),
    "denoise": lambda f: f.denoise(images(f), labels(f)),
    "inference mode": lambda f: torch.inference_mode()(f.sample)(y=Y, generator=seeded()),
    "sample": lambda f: f.sample(y=Y, guidance=1.0, generator=seeded(), return_log_prob=True),
    "sample from a fitted prior": lambda f: with_prior(f).sample(y=Y, prior="fitted", temperature=0.8, generator=seeded()),
    "density under a fitted prior": lambda f: with_prior(f).log_prob(images(f), labels(f), prior="fitted"),
    "fit a prior": fitted,
    "guidance by a product": lambda f: f.decode(noise(f), labels(f), Guidance(4.0, rule="product", blocks=(1, 3))),
    "sample a number": lambda f: f.sample(4, generator=seeded()),
    "known pixels": lambda f: f.decode(noise(f), Y, known=(images(f), ~MASK)),
    **{
        f"{method}, guidance {w}": lambda f, method=method, w=w: f.decode(noise(f), labels(f), w, method)
        for method in ("sequential", "jacobi", "gauss_seidel", "auto")
        for w in (0.0, 1.5)
    },
    **{
        rule: lambda f, rule=rule: classify(f, images(f), rule, draws=2, statistics=statistics(f)).nan_to_num(neginf=0)
        for rule in ("single_gradient", "z_score", "shortlist_2", "exact")
    },
    "agreement": lambda f: agreement(f, images(f), Y)[0],
    "best_of": lambda f: best_of(f, candidates(f), Y, 1.5).denoised,
    "best_of, ended early": lambda f: best_of(f, candidates(f), Y, 1.5, least=1).denoised,
    "interpolate": lambda f: interpolate(f, images(f), images(f).flip(0), 3, Y, Y.flip(0)),
    "swap": lambda f: swap_class(f, images(f), Y, Y.flip(0)),
    "inpaint": lambda f: inpaint(f, images(f), MASK, Y, steps=2, tries=2, generator=seeded()).x,
    "students in steps": draft("flow_matching", steps=3, solver="heun", guidance=1.0),
    "students in one pass": draft("inverse", guidance=1.0),
    "learned denoisers": draft("denoiser"),
    **{f"lessons: {method}": lesson(method) for method in METHODS},
    **{f"{strategy} {kind}": gradient(strategy, kind) for strategy, kind in STRATEGIES},
}
ROTARY = {"positions": "rotary", "mlp": "swiglu", "layers": [1, 3, 2], "prior": "scaled"}


def differences(second, work, here, there):
    """The largest difference of each result, relatively where it is large; all are on the device, where work was done."""
    found = work(here)
    with second.counted() as counts:
        results = work(there)
    assert counts.operations > 0
    pairs = [(found, results)] if isinstance(found, torch.Tensor) else list(zip(found, results, strict=True))
    assert all(result.device.type == second for _, result in pairs)
    pairs = [(value.detach(), result.detach().cpu()) for value, result in pairs]
    return [float(((result - value).abs() / value.abs().clamp(min=1)).max()) for value, result in pairs]


@pytest.mark.parametrize("name", WORK)
def test_all_work_equals_the_cpus(second, name):
    for options in ({}, ROTARY) if "reverse" not in name else ({},):
        pair = random_flow(**options), random_flow(**options).to(second)
        assert max(differences(second, WORK[name], *pair)) < 1e-11


@pytest.mark.parametrize("name", ["encode", "sequential, guidance 1.5", "exact", "reverse one_step"])
def test_float32_equals_the_cpus(second, name):
    pair = random_flow(torch.float32), random_flow(torch.float32).to(second)
    assert max(differences(second, WORK[name], *pair)) < 2e-5


@pytest.mark.parametrize("name", ["encode", "sample", "jacobi, guidance 1.5", "exact", "reverse one_step"])
def test_bfloat16_equals_the_cpus(second, name):
    here, there = random_flow(torch.float32, std=0.05), random_flow(torch.float32, std=0.05).to(second)

    def low(flow):
        with torch.autocast(flow.device.type, torch.bfloat16):
            return WORK[name](flow)

    assert max(differences(second, low, here, there)) < 0.05
    exactly = differences(second, WORK[name], here, there)
    assert max(exactly) < 1e-3  # so the larger ones above are bfloat16's


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["encode", "sample", "exact", "inpaint"])
def test_flows_of_half_precision_work(second, dtype, name):
    here, there = random_flow(dtype, std=0.05), random_flow(dtype, std=0.05).to(second)
    precise = random_flow(torch.float32, std=0.05)
    assert max(differences(second, WORK[name], here, there)) < 0.05
    if name == "encode":
        (z, log_det), (exact_z, _) = WORK[name](here), WORK[name](precise)
        assert z.dtype == log_det.dtype == torch.float32
        assert torch.allclose(z, exact_z, atol=0.05)


def test_a_flow_says_where_it_is_and_loads_anywhere(second, tmp_path):
    flow = random_flow(torch.float32)
    assert (flow.device, flow.dtype) == (torch.device("cpu"), torch.float32)
    flow.save_pretrained(tmp_path)
    loaded = TarFlow.from_pretrained(tmp_path, device=second)
    assert (loaded.device, loaded.dtype) == (torch.device(second, 0), torch.float32)
    assert TarFlow.from_pretrained(tmp_path, device="auto").device.type == second
    assert TarFlow.from_pretrained(tmp_path).device.type == "cpu"
    with pytest.raises(InputError, match=rf"device 'abacus' is not here .*; expected auto, cpu, {second}"):
        TarFlow.from_pretrained(tmp_path, device="abacus")


def test_auto_takes_what_is_there(second):
    assert pick_device("auto") == pick_device("gpu") == torch.device(second, 0)
    assert pick_device("cpu") == torch.device("cpu")


def test_decisions_are_those_of_the_cpu(second, monkeypatch, tmp_path):
    options = {"image_size": 8, "channels": 1, "levels": 17, "num_classes": 10}
    config = EvaluationConfig(metrics=("ood", "coverage"), encoder="toy", outliers=("noise",))
    data = load_data(DataConfig(limit=100))
    monkeypatch.setattr(decisions, "load_encoder", lambda *_: PatchEncoder(random_flow(torch.float32, **options)))

    def rows(device):
        monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / device))
        measures = Decisions(random_flow(torch.float32, **options).to(device), data, range(80), config).measures()
        return [row for measure in measures.values() for found in measure().values() for row in found]

    here = rows("cpu")
    with second.counted() as counts:
        there = rows(second)
    assert counts.operations > 0
    for pair in zip(here, there, strict=True):
        expected, found = map(flat_numbers, pair)
        assert found == pytest.approx(expected, abs=0.02)


def flat_numbers(row):
    values = (list(value.values()) if isinstance(value, dict) else [value] for value in row.values())
    return [value for own in values for value in own if isinstance(value, float)]


def test_the_encoder_follows(second):
    flow = random_flow()
    align = Alignment(flow, PatchEncoder(flow), [(2, 1)]).double()
    expected = align.targets(images(flow))
    align.to(second)
    assert next(align.encoder.parameters()).device.type == second
    assert torch.allclose(align.targets(images(flow)).cpu(), expected)


def test_the_autoencoder_follows(second, tmp_path):
    core = random_flow(torch.float32, image_size=4, channels=3, std=0.05)
    flow = LatentFlow(core, load_autoencoder(str(tiny_autoencoder(tmp_path / "vae"))))
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    work = {
        "to_data": lambda: flow.to_data(x),
        "to_images": lambda: flow.to_images(latents),
        "sample": lambda: flow.sample(y=[0, 3], guidance=1.0, seed=0),
        "log_prob": lambda: flow.log_prob(x, 1, seeded()),
        "classify": lambda: classify(flow, x, "exact"),
        "swap": lambda: swap_class(flow, x, 1, 2),
        "inpaint": lambda: inpaint(flow, x, torch.ones(8, 8).triu().bool(), 1, 1, 1, seeded()).x,
    }
    latents = flow.to_data(x)
    expected = {name: do() for name, do in work.items()}
    flow.to(second)
    assert {p.device.type for p in flow.parameters()} == {second}
    for name, do in work.items():
        found = do()
        assert found.device.type == second, name
        assert torch.allclose(found.cpu(), expected[name], atol=1e-3), name
    flow.to("cpu")
    assert {p.device.type for p in flow.parameters()} == {"cpu"}


def compressed(kind):
    def work(device):
        compressor = make_compressor(kind, 5, 3, 6, width=32, layers=1).to(device)
        compressor.fit([features(device)])
        latents = compressor.compress(features(device))
        return latents, compressor.expand(latents)

    return work


def reconstructed(device):
    loss = ReconstructionLoss(ReconstructionConfig(features=1.0, adversarial=1.0), 2, (6, 6), PatchEncoder(random_flow()))
    x, x_hat = (torch.rand(3, 2, 6, 6, dtype=torch.float64).to(device) for _ in range(2))
    loss.to(device)(x, x_hat.requires_grad_())[0].backward()
    return x_hat.grad, psnr(x, x_hat), ssim(x, x_hat)


def semantic(compressor):
    options = {"encoder": "test_vit", "encoder_weights": "random", "compressor": compressor, "channels": 3, "downsample": 3}
    options |= {"width": 32, "layers": 1, "decoder_width": 32, "decoder_layers": 1}

    def work(device):
        autoencoder = SemanticAutoencoder.new(SemanticConfig(**options), (6, 9), 1).to(device)
        x, noise = torch.rand(4, 1, 6, 9) * 2 - 1, torch.randn(4, 3, 2, 3)
        autoencoder.fit([x])
        image, terms = autoencoder.reconstruct(put(x, device), put(noise, device), torch.rand(4).to(device))
        latents = autoencoder.freeze().encode(x)
        return image, latents, autoencoder.decode(latents), *terms.values()

    return work


def features(device):
    return torch.randn(3, 6, 5, generator=seeded(), dtype=torch.float64).to(device)


# name -> what is computed on a device
LATENT_WORK = {
    **{kind: compressed(kind) for kind in COMPRESSORS},
    **{
        f"{kind} decoder": lambda device, kind=kind: DECODERS[kind](5, 2, (2, 3), 6, 32, 1).to(device)(features(device))
        for kind in DECODERS
    },
    "losses and figures": reconstructed,
    **{f"semantic, {kind}": semantic(kind) for kind in COMPRESSORS},
}


@pytest.mark.parametrize("name", LATENT_WORK)
def test_parts_of_autoencoders_equal_the_cpus(second, name):
    torch.set_default_dtype(torch.float64)
    try:

        def work(device):
            torch.manual_seed(0)
            return LATENT_WORK[name](device)

        assert max(differences(second, work, torch.device("cpu"), torch.device(second))) < 1e-9
    finally:
        torch.set_default_dtype(torch.float32)


# ---- waits ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_device(second):
    return random_flow(torch.float32, std=0.05).to(second)


def waits(second, run):
    with second.logged() as log:
        result = run()
    return len(log.waits), result


@pytest.mark.parametrize("y", [None, 2, [0, 1, 2], Y, labels(random_flow())])
def test_encoding_does_not_wait(second, on_device, y):
    assert waits(second, lambda: on_device.log_prob(images(on_device), y))[0] == 0


def test_the_sequential_loop_does_not_wait(second, on_device):
    assert waits(second, lambda: on_device.decode(noise(on_device), Y, 1.5, "sequential"))[0] == 0


@pytest.mark.parametrize("method", ["jacobi", "gauss_seidel"])
def test_a_sweep_waits_once(second, method):
    flow = random_flow(torch.float32, std=0.05, image_size=16, blocks=2).to(second)
    count, (_, report) = waits(second, lambda: flow.decode_with_report(noise(flow), Y, 1.5, method))
    assert not any(solved.fell_back for solved in report)
    assert count == sum(solved.sweeps for solved in report)


@pytest.mark.parametrize("name", ["denoise", "single_gradient", "z_score", "exact", "best_of"])
def test_other_work_does_not_wait(second, on_device, name):
    known = statistics(on_device)
    work = WORK[name] if name == "denoise" else lambda f: classify(f, images(f), name, statistics=known)
    if name == "best_of":

        def work(f):
            return best_of(f, candidates(f), Y, method="sequential")  # of two, which are drawn in any case

    assert waits(second, lambda: work(on_device))[0] == 0


@pytest.mark.parametrize("strategy", ["none", "forward", "detach", "reverse", "joint"])
@pytest.mark.parametrize("cache", ["true", "false"])
def test_training_does_not_wait_between_rows_of_the_log(second, tmp_path, strategy, cache):
    rare = [f"--train.{what}_every=100" for what in ("log", "eval", "sample", "checkpoint")]
    counts = {}
    for steps in (2, 6):
        words = [
            "train",
            f"--run={tmp_path / str(steps)}",
            *SMALL_RUN,
            *rare,
            "--train.steps=100",
            f"--train.until={steps}",
        ]
        words += [f"--alignment.strategy={'forward' if strategy == 'joint' else strategy}", "--alignment.at=[[2,1]]"]
        words += [*(JOINT if strategy == "joint" else []), f"--alignment.cache={cache}"]
        words += [*ENCODER, f"--device={second}", "--train.batch_size=4"]
        with second.counted() as counts[steps]:
            assert main(words) == 0
    assert counts[6].operations > counts[2].operations
    assert counts[6].waits <= counts[2].waits  # those of making caches in the first run, and of the checkpoint


def test_labels_are_checked_where_they_are_numbers(second, on_device):
    x = images(on_device)
    for y in (4, [0, 1, 4], torch.tensor([0, 1, 4]), torch.tensor([-2, 0, 0])):
        with pytest.raises(InputError, match="is out of range; expected 0 to 3, or -1 for no label"):
            on_device.encode(x, y)
    density = on_device.log_prob(x, torch.tensor([0, -1, 4]).to(second)).cpu()
    assert density.isfinite().tolist() == [True, True, False]  # not checked, and no wrong number either


# ---- verbs ----------------------------------------------------------------------------------------------------------

RUN = [*SMALL_RUN, "--data.name=digits", "--train.steps=6", "--train.log_every=2", "--train.eval_every=6"]
ENCODER = ["--alignment.encoder=test_vit", "--alignment.encoder_weights=random"]  # evaluations see with a larger one
ALIGNED = ["--alignment.strategy=reverse", "--alignment.at=[[2,1]]", *ENCODER]
SOME_STEPS = ["--alignment.strategy=forward", "--alignment.reverse_from=3", "--alignment.every=2"]
SOME_STEPS += ["--alignment.separate_projectors=true"]


@pytest.fixture(scope="module")
def run(second, tmp_path_factory):
    """A run that was trained on the CPU, and image files."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", f"--run={folder / 'run'}", *RUN, "--device=cpu"]) == 0
    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


VERBS = {
    "sample": "sample RUN --num 4 -o OUT/grid.png",
    "sample sequential": "sample RUN --num 4 --method sequential --guidance 1 --schedule annealed -o OUT/a.npz",
    "sample jacobi": "sample RUN --num 4 --method jacobi --guidance 1 --guided mu -o OUT/folder",
    "sample gauss_seidel": "sample RUN --num 4 --method gauss_seidel --no-denoise -o OUT/a.npz",
    "sample best of 2": "sample RUN --num 2 --labels 1,2 --best-of 2 -o OUT/a.npz",
    "sample best of 4 or fewer": "sample RUN --num 2 --labels 1,2 --best-of 4 --least 1 --rule exact -o OUT/a.npz",
    "classify": "classify RUN IMAGES --rule exact",
    "score": "score RUN IMAGES",
    "encode": "encode RUN IMAGES -o OUT/z.safetensors",
    "decode": "decode RUN Z -o OUT/decoded",
    "interpolate": "interpolate RUN IMAGES --steps 3 -o OUT/a.png",
    "swap": "swap RUN IMAGES --to 1,2 -o OUT/a.png",
    "inpaint": "inpaint RUN IMAGES --box 0,0,4,4 --num 2 --tries 2 --steps 2 -o OUT/a.png",
}


def perform(command, run, out, device):
    files = [str(run / f"{number}.png") for number in range(3)]
    words = (
        command.replace("OUT", str(out)).replace("RUN", str(run / "run")).replace("Z", str(run / "z.safetensors")).split()
    )
    words = [word for item in words for word in (files if item == "IMAGES" else [item])]
    assert main([*words, f"--device={device}"]) == 0


def contents(folder):
    """What a verb wrote, as arrays by name."""
    found = {}
    for file in sorted(path for path in Path(folder).rglob("*") if path.is_file() and ".flowback" not in path.parts):
        if file.suffix == ".png":
            found[file.name] = np.asarray(Image.open(file), dtype=float) / 127.5
        elif file.suffix == ".npz":
            found |= {name: array / 127.5 for name, array in np.load(file).items()}
        elif file.suffix == ".safetensors":
            found |= {name: tensor.numpy() for name, tensor in load_file(file).items()}
    return found


def numbers(text):
    return [float(word) for word in re.findall(r"-?\d+\.\d+", text)]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_works_on_the_device_and_says_the_same(second, run, verb, tmp_path, capsys):
    if verb == "decode":
        perform(VERBS["encode"], run, run, "cpu")
    said = {}
    for device in ("cpu", second):
        capsys.readouterr()
        with second.counted() as counts:
            perform(VERBS[verb], run, tmp_path / device, device)
        assert (counts.operations > 0) == (device == second)
        said[device] = numbers(capsys.readouterr().out.replace(str(tmp_path), ""))
    wanted, found = contents(tmp_path / "cpu"), contents(tmp_path / second)
    assert wanted.keys() == found.keys()
    assert wanted or said["cpu"]
    for name in wanted:  # pictures to two of 256 levels
        assert np.allclose(found[name], wanted[name], atol=2 / 127), name
    if verb in ("classify", "score"):
        assert np.allclose(said["cpu"], said[second], atol=2e-3)


def test_verbs_run_in_bfloat16(second, run, tmp_path):
    for device in ("cpu", second):
        perform("sample RUN --num 4 --precision bf16-mixed -o OUT/a.npz", run, tmp_path / device, device)
    wanted, found = (np.load(tmp_path / device / "a.npz")["arr_0"].astype(float) for device in ("cpu", second))
    assert np.abs(wanted - found).mean() < 6


def figures(value):
    """The numbers of a JSON file by place, but for those that are times."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    else:
        return {"": value} if isinstance(value, float | int) and not isinstance(value, bool) else {}
    return {f"{key}.{rest}": v for key, item in pairs if "seconds" not in str(key) for rest, v in figures(item).items()}


def test_evaluate_compare_and_export(second, run, tmp_path):
    found = {}
    for device in ("cpu", second):
        copy = tmp_path / device / "run"
        assert main(["train", f"--run={copy}", *RUN, "--device=cpu"]) == 0
        words = ["--metrics=bpd,accuracy,probe,fid,kid,prc", "--images=40", "--samples=12", "--reference=held_out"]
        with second.counted() as counts:
            assert main(["evaluate", str(copy), *words, f"--device={device}"]) == 0
        assert (counts.operations > 0) == (device == second)
        with second.counted() as counts:
            out = tmp_path / device / "page"
            assert main(["compare", str(copy), "-o", str(out), f"--device={device}"]) == 0
            assert main(["export", str(copy), str(tmp_path / device / "flow"), f"--device={device}"]) == 0
        assert (counts.operations > 0) == (device == second)
        found[device] = json.loads((copy / "evaluation.json").read_text())
        assert (tmp_path / device / "flow" / "model.safetensors").is_file()
    assert device_name(torch.device(second)) in found[second]["machine"]
    assert device_name(torch.device(second)) not in found["cpu"]["machine"]
    wanted, measured = figures(found["cpu"]), figures(found[second])
    assert wanted.keys() == measured.keys()
    for name, value in wanted.items():
        if "temperature" in name or "ece" in name or "fidelity" in name:  # which amplify rounding of pixels and scores
            assert measured[name] == pytest.approx(value, rel=0.05, abs=0.02), name
        elif "accuracy" in name:
            assert abs(measured[name] - value) <= 0.06, name  # an image or two that were level
        else:
            assert measured[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_timings_are_of_the_device_that_made_them(second, run, tmp_path):
    flow = random_flow(torch.float32).to(second)
    found = flow.autotune = autotune(flow, rows=(2,), repeats=1)
    assert found.machine.startswith(device_name(torch.device(second)))
    measured = solvers("auto", found, 3, 2, torch.device(second, 0))
    assert len(measured) == 3
    # not as it was measured elsewhere
    assert solvers("auto", found, 3, 9, torch.device("cpu")) == [Solver("sequential")] * 3
    assert main(["autotune", str(run / "run"), "--rows=1", f"--device={second}"]) == 0
    perform("sample RUN --num 2 -o OUT/a.npz", run, tmp_path, second)


JOINT = ["--latents.joint=true", "--joint.channels=4", "--joint.width=32", "--joint.mask=0.3", "--joint.noise_std=0.2"]
JOINT += ["--flow.patch_size=1", "--reconstruction.features=0.1", "--reconstruction.adversarial=0.1"]
JOINT += ENCODER
TRAINED = {
    "plain": [],
    "joint": JOINT,
    "joint, forward": [*ALIGNED, *JOINT, "--alignment.strategy=forward", "--joint.align_encoder=true"],
    "forward first, some steps": [*ALIGNED, *SOME_STEPS],
    **{f"{s} {g}": [*ALIGNED, f"--alignment.strategy={s}", f"--alignment.gradient={g}"] for s, g in STRATEGIES},
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_has_the_cpus_curve(second, name, tmp_path):
    rows = {}
    for device in ("cpu", second):
        cache = "true" if device == "cpu" else "false"  # equal, too
        words = ["train", f"--run={tmp_path / device}", *RUN, *TRAINED[name], f"--alignment.cache={cache}"]
        with second.counted() as counts:
            assert main([*words, f"--train.until={6 if device == 'cpu' else 4}", f"--device={device}"]) == 0
            if device == second:
                resume = [f"--config={tmp_path / device / 'config.yaml'}", "--train.resume", "--train.until=6"]
                assert main(["train", *resume, f"--run={tmp_path / device}", f"--device={device}"]) == 0
        assert (counts.operations > 0) == (device == second)
        rows[device] = read_metrics(tmp_path / device / "metrics.csv")
    assert len(rows["cpu"]) == len(rows[second]) == 4
    for wanted, found in zip(rows["cpu"], rows[second], strict=True):
        for column in ("loss", "nll", "align", "grad_norm", "held_out_nats_per_dim", "pixels", "signal", "held_out_psnr"):
            assert found.get(column, 0) == pytest.approx(wanted.get(column, 0), rel=2e-3, abs=2e-3), (
                column
            )  # float16 features


def test_training_in_bfloat16(second, tmp_path):
    words = ["train", *RUN, "--train.precision=bf16-mixed", "--train.batch_size=4", "--train.eval_images=4"]
    rows = []
    for device in ("cpu", second):
        assert main([*words, f"--run={tmp_path / device}", f"--device={device}"]) == 0
        rows.append(read_metrics(tmp_path / device / "metrics.csv")[0])
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=0.02)


def test_latents_with_and_without_caches(second, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "cache"))
    vae = tiny_autoencoder(tmp_path / "vae")
    losses = {}
    for device, cache in (("cpu", "true"), (second, "true"), (second, "false")):
        words = ["train", *RUN, "--flow.patch_size=2", f"--latents.autoencoder={vae}", f"--latents.cache={cache}"]
        words += [*ALIGNED, "--alignment.cache=false", f"--run={tmp_path / device / cache}", f"--device={device}"]
        with second.counted() as counts:
            assert main(words) == 0
        assert (counts.operations > 0) == (device == second)
        losses[device, cache] = read_metrics(tmp_path / device / cache / "metrics.csv")[0]["loss"]
    assert list(losses.values()) == pytest.approx([losses["cpu", "true"]] * 3, abs=5e-3)
    folder = tmp_path / second / "true"
    assert main(["sample", str(folder), "--num=2", "-o", str(tmp_path / "a.png"), f"--device={second}"]) == 0
    config = [f"--config={folder / 'config.yaml'}", "--alignment.cache=true", f"--output={tmp_path / 'caches'}"]
    with second.counted() as counts:
        assert main(["cache", *config, f"--device={second}"]) == 0
    assert counts.operations > 0


def test_an_inverse_is_distilled_with_and_without_a_cache(second, run, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "cache"))
    shutil.copytree(run / "run", tmp_path / "run")
    words = ["distill", str(tmp_path / "run"), "--method=inverse", "--guidance=1", "--features=0.5", "--align=0.5"]
    words += ["--encoder_weights=random", "--student.width=16", "--student.layers=5", "--student.head_dim=8"]
    words += ["--train.steps=3", "--train.batch_size=8", "--train.log_every=1", "--train.eval_images=8"]
    losses = []
    for device, cache in (("cpu", "true"), (second, "true"), (second, "false")):
        out = tmp_path / device / cache
        with second.counted() as counts:
            assert main([*words, f"--run={out}", f"--cache={cache}", f"--device={device}"]) == 0
        assert (counts.operations > 0) == (device == second)
        losses.append([row["loss"] for row in read_metrics(out / "metrics.csv") if "loss" in row])
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], abs=5e-3)  # features on disk are float16


@pytest.mark.parametrize("kind", ["kl", "semantic"])
def test_autoencoders_are_trained_and_measured_on_the_device(second, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "cache"))
    words = ["--data.name=digits", "--data.limit=32", f"--kind={kind}", "--train.steps=3", "--train.batch_size=8"]
    words += ["--train.log_every=1", "--train.eval_images=8", "--kl.downsample=2", "--kl.width=8"]
    words += ["--semantic.encoder=test_vit", "--semantic.encoder_weights=random", "--semantic.compressor=attention"]
    words += ["--semantic.channels=4", "--semantic.width=32", "--semantic.layers=1", "--semantic.decoder_width=32"]
    words += ["--reconstruction.adversarial=0.1", "--reconstruction.discriminator_width=8"]
    rows, figures = {}, {}
    for device in ("cpu", second):
        run = tmp_path / device
        with second.counted() as counts:
            assert main(["autoencoder", "train", f"--run={run}", f"--device={device}", *words]) == 0
            measure = ["autoencoder", "evaluate", str(run), "--images=8", "--extractor=none", f"--device={device}"]
            assert main(measure) == 0
        assert (counts.operations > 0) == (device == second)
        rows[device] = [row["loss"] for row in read_metrics(run / "metrics.csv") if "loss" in row]
        figures[device] = json.loads((run / "reconstruction.json").read_text())["reconstruction"]["psnr"]
    assert rows[second] == pytest.approx(rows["cpu"], abs=5e-3)
    assert figures[second] == pytest.approx(figures["cpu"], abs=0.05)


def test_the_quickstart_ends_on_the_device(second, tmp_path):
    """That of the recipe, made small."""
    config = RunConfig.from_yaml(recipe("digits").read_text())
    flow = replace(config.flow, width=16, head_dim=8, patch_size=4, blocks=2, layers=1)
    train = replace(config.train, steps=2, eval_images=10, accelerator=f"{second}")
    data = replace(config.data, holdout=0.03)
    alignment = replace(config.alignment, at=[[2, 1]], encoder_weights="random", cache=False)
    config = replace(config, run=str(tmp_path), flow=flow, train=train, data=data, alignment=alignment)
    with second.counted() as counts:
        report = quickstart(config)
    assert counts.operations > 0
    assert device_name(torch.device(second)) in report["machine"]
    assert all({"single_gradient", "exact"} <= set(report[name]["accuracy"]) for name in ("plain", "aligned"))
    assert (tmp_path / "report.html").is_file()


def test_saved_precisions_work_in_the_verbs(second, run, tmp_path):
    flow = TarFlow.from_pretrained(next((run / "run" / "checkpoints").iterdir()))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        folder = tmp_path / str(dtype) / "run"
        flow.to(dtype).save_pretrained(folder)
        assert load_file(folder / "model.safetensors")["blocks.0.proj_in.weight"].dtype == dtype
        for command in ("sample", "classify", "encode", "inpaint", "swap"):
            perform(VERBS[command].replace("RUN", str(folder)), run, tmp_path / str(dtype), second)


def typical(flow):
    x = images(flow, 90)  # none is both scored and a held-out one, with which it would be level but for rounding
    return score(flow, x[60:], held_out=HeldOut.fit(score(flow, x[:30]), score(flow, x[30:60])))


STUDIO = {
    "trajectory": lambda flow: trajectory(flow, DRAWN, 1),
    "alike": lambda flow: alike(flow, DRAWN, 1, 0.4, seed=5, num=2),
    "walk by hand": lambda flow: edit.moved(flow, edit.Start("", noise(flow)[:1], Y[:1], 3, None), [20, -10], 0.9)[0],
    "inpaint by step": lambda flow: [p.x.cpu() for p in edit.drawings(flow, images(flow)[:1], MASK, Y[:1], 2, 4, 2, 0)][-1],
    "likelihoods": lambda flow: torch.tensor(tab.likelihoods(flow, images(flow), labels(flow))),
    "evidence": lambda flow: evidence(flow, images(flow), Y[:3], Y[:3] - 1, draws=2).cpu(),
    "typicality": lambda flow: typical(flow).typicality.cpu(),
    "anomaly": lambda flow: typical(flow).anomaly.cpu(),
    "classify files": lambda flow: next(
        classify_files(
            flow, "abc", ["exact", "single_gradient"], 2, read=lambda file: images(flow)["abc".index(file)][None]
        )
    ).scores["exact"],
}


@pytest.mark.parametrize("name", STUDIO)
def test_what_the_studio_does_equals_the_cpus(second, name):
    here = STUDIO[name](random_flow())
    flow = random_flow().to(second)
    with second.counted() as counts:
        there = STUDIO[name](flow)
    assert counts.operations > 0
    torch.testing.assert_close(there, here, atol=1e-6, rtol=1e-6)
