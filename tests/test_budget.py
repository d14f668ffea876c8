"""The dry run against arithmetic, against the model that is built, and against steps that are taken."""

import ctypes
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flowback import TarFlow
from flowback.alignment import Alignment
from flowback.cli import build_parser
from flowback.core.devices import autocast
from flowback.core.errors import InputError
from flowback.runs.config import RunConfig
from flowback.training.apply import checkpoint_layers
from flowback.training.budget import Device, plan
from flowback.training.flows import Likelihood
from flowback.training.meter import Meter
from forked import Forked

RECIPES = Path(__file__).parents[1] / "configs"


def recipe_config(name: str, *changes: str) -> RunConfig:
    """A recipe with changes, as the command line reads it."""
    parser, verbs = build_parser("train")
    command, _ = verbs["train"]
    options = command.instantiate(parser.parse_args(["train", f"--config={RECIPES / name}.yaml", *changes])["train"])
    return RunConfig(**{field.name: options[field.name] for field in fields(RunConfig)})


def mlp(width: int, kind: str) -> int:
    """Weights of the MLP's matrices."""
    return 8 * width**2 if kind == "gelu" else 3 * width * 32 * round(8 / 3 * width / 32)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("imagenet64", "none"), ("imagenet64", "reverse"), ("imagenet256", "reverse"), ("imagenet256_patch1", "reverse")],
)
def test_the_papers_recipes_are_what_arithmetic_says(name, strategy):
    f = recipe_config(name).flow
    assert (f.blocks, f.layers) == (8, 8)  # 3 blocks of 2 layers are counted here, each as large as the recipe's
    few = ["--flow.blocks=3", "--flow.layers=2", "--alignment.at=[[2,1],[3,1]]", "--train.batch_size=1"]
    budget = plan(recipe_config(name, f"--alignment.strategy={strategy}", *few), Device(gigabytes=1e6))
    N, D = budget.tokens
    C, K, kind = f.width, 1000, f.mlp
    hidden = mlp(C, kind) // C // (2 if kind == "gelu" else 3)
    biases = C + (hidden if kind == "gelu" else 2 * hidden)
    layer = 4 * C + (4 * C**2 + 4 * C) + mlp(C, kind) + biases  # two norms, attention, MLP
    block = D * C + C + K * C + (N * C if f.positions == "learned" else 0) + 2 * layer + 2 * D * C + 2 * D
    assert budget.parameters == 3 * block

    matrices = 2 * N * (4 * C**2 + mlp(C, kind))  # operations of a layer's forward pass
    attention = 4 * N**2 * C
    ends = 2 * N * 3 * D * C + 2 * K * C  # of a block: into and out of the transformer, the classes
    forward = 3 * (2 * (matrices + attention) + ends)
    plain = 3 * forward + 3 * 2 * attention / 2  # attention computes its scores again
    if strategy == "none":
        expected = plain
    else:
        # each of the two aligned blocks has one product down from z and one from layer 1, without the weights' gradients
        product = matrices + 2.5 * attention
        projector = 2 * N * (2 * C**2 + C * 768)
        expected = plain + 2 * (2 + 1) * product + 2 * (3 + 1) * projector
    (step,) = budget.steps
    assert step.flops == pytest.approx(expected, rel=2e-3)


class Fixed(torch.nn.Module):
    grid, dim = (4, 4), 24


@pytest.mark.parametrize("strategy", ["none", "forward", "detach", "reverse"])
def test_a_step_without_content_counts_like_a_real_one(strategy):
    def counted() -> Meter:
        options = {"image_size": 8, "channels": 1, "patch_size": 2, "width": 32, "blocks": 3, "layers": 2, "head_dim": 16}
        flow = TarFlow(**options, num_classes=5)
        objective = Likelihood(flow) if strategy == "none" else Alignment(flow, Fixed(), [(2, 1)], strategy, 2)
        with Meter([*objective.parameters(), *objective.buffers()]) as meter:
            x, classes, targets = torch.ones(6, 1, 8, 8), torch.full((6, 5), 0.2), torch.ones(6, 16, 24)
            objective(x, classes, targets=targets)[0].backward()
        return meter

    real = counted()
    with FakeTensorMode():
        fake = counted()
    assert fake.flops == real.flops > 0
    assert fake.peak == pytest.approx(real.peak, rel=0.02)


def measure(options, precision, checkpointed, images):
    """Print the memory that a step takes of a process that has had no peak yet."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back at once
    flow = TarFlow(**options)
    objective = Likelihood(flow)
    if checkpointed:
        checkpoint_layers(flow)

    def step(count):
        with autocast(torch.device("cpu"), precision):
            loss, _ = objective(torch.randn(count, *flow.data_shape), torch.zeros(count, dtype=torch.long))
        loss.backward()
        flow.zero_grad(set_to_none=True)

    def memory(name):
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return 1024 * int(line.split()[1])

    step(1)
    before = memory("VmRSS")
    step(images)
    print(memory("VmHWM") - before)  # ru_maxrss would be the parent's, where that is larger


CASES = [("32-true", False, 17), ("bf16-mixed", False, 25), ("32-true", True, 49)]  # and images, of one device alone


def predicted(precision, checkpointed, number):
    shallow = ["--alignment.strategy=none", "--flow.width=64", "--flow.blocks=2", "--flow.layers=3", "--flow.head_dim=32"]
    case = [f"--train.precision={precision}", f"--train.checkpoint_activations={str(checkpointed).lower()}"]
    budget = plan(recipe_config("imagenet64", *shallow, *case, f"--train.batch_size={number}"), Device(gigabytes=1e6))
    return budget.steps[0].bytes - 16 * budget.parameters


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
def test_memory_is_what_a_step_takes():
    options = {"image_size": 64, "channels": 3, "num_classes": 1000, "log_scale_bound": None}
    options |= {"patch_size": 4, "width": 64, "blocks": 2, "layers": 3, "head_dim": 32}
    for case in CASES:
        wanted = predicted(*case)
        assert wanted > 7e7, case
        said, errors = Forked(measure, options, *case).communicate()
        assert int(said or 0) == pytest.approx(wanted, rel=0.15), (case, errors)


def test_a_smaller_memory_takes_more_pieces_and_a_larger_batch_more_of_all():
    narrow = (
        "--flow.width=64",
        "--flow.blocks=2",
        "--flow.layers=1",
        "--alignment.at=[[2,1]]",
        "--alignment.projector_width=64",
        "--train.batch_size=64",
    )
    config = recipe_config("imagenet64", *narrow)
    large, small = plan(config, Device(gigabytes=1e6)), plan(config, Device(gigabytes=0.5))
    assert [(step.images, step.pieces) for step in large.steps] == [(64, 1), (8, 1), (1, 1)]
    assert small.steps[0].pieces > 1
    assert small.steps[0].bytes < 5e8 < large.steps[0].bytes
    assert small.steps[0].flops == large.steps[0].flops == 8 * large.steps[1].flops
    assert large.caches == {"features": 1_281_167 * 2 * 256 * 768 * 2}
    assert (large.evaluations, large.evaluation.images, large.evaluation.exact) == (100, 500, 97)
    assert large.pass_flops == pytest.approx(large.steps[2].flops / 4, rel=0.35)  # which has an alignment, too
    assert "exact likelihoods of 1,000 classes for 97 of them, 99,500 forward passes; 100 times" in str(large)
    assert large.seconds(large.steps[0]) == pytest.approx(large.steps[0].flops / (989e12 * 0.4))
    shared = plan(recipe_config("imagenet64", *narrow, "--train.strategy=fsdp"), Device(gigabytes=1e6))
    assert shared.steps[0] == large.steps[0]
    assert shared.steps[2].bytes < large.steps[2].bytes
    without = plan(recipe_config("imagenet64", *narrow, "--alignment.cache=false"), Device(gigabytes=1e6))
    assert without.caches == {}
    assert without.steps[0].flops > 10 * large.steps[0].flops  # the encoder is much larger than this flow


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(InputError, match="gigabytes must be a number above 0, got -1"):
        Device(gigabytes=-1)
    with pytest.raises(InputError, match=r"sequential.*a dry run measures all others"):
        plan(recipe_config("imagenet64", "--alignment.gradient=sequential"))
    with pytest.raises(InputError, match="no_such_folder"):
        plan(recipe_config("imagenet64", "--data.path=no_such_folder"))
