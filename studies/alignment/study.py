"""Runs the study of README.md, run by run; what is finished is skipped, what was cut off goes on where it was.

    python studies/alignment/study.py [--jobs 2] [--only plain,one_step] [--seeds 0] [--hours 12] [--list]

A run is an arm and a seed. It is trained up to each of its measuring points, measured there, and trained on; a finished one
leaves results/ARM-SEED.json here, with all that tables.py reads. Checkpoints stand in runs/studies/alignment meanwhile.
"""

import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from judge import right, trained

from flowback.core.devices import autocast, machine, pick_device
from flowback.core.errors import InputError
from flowback.core.files import write_whole
from flowback.core.units import to_uint8
from flowback.data import ImageSet, load_data
from flowback.data.splits import spread
from flowback.flow.config import FlowConfig
from flowback.flow.tarflow import TarFlow
from flowback.measure.density import density, seen
from flowback.measure.probe import probe_layers
from flowback.runs import checkpoint
from flowback.runs.checkpoint import load_flow
from flowback.runs.config import AlignmentConfig, DataConfig, RunConfig, TrainConfig
from flowback.runs.log import read_metrics
from flowback.tasks.classify import class_scores_by_all, fit_statistics
from flowback.training import train
from flowback.training.caches import make_caches

HERE = Path(__file__).parent
sys.path += [str(HERE.parent), str(HERE.parents[1] / "benchmarks")]

from common import carry_out, chosen, judged, missing, options, run_named, write_result
from convergence import errors_by_sweep, sweeps_until

RESULTS = HERE / "results"
RUNS = Path("runs/studies/alignment")
JUDGE = RUNS / "judge.pth"

STEPS, LONG_STEPS, SAME_SECONDS = 800, 2500, 1256  # the last: plain steps in the seconds of an aligned run
SEEDS = (0, 1, 2)
TUNING_SEED = 100  # of the learning rate's choice, and of nothing else
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
LONG_WARMUP = 200  # with 50 nearly every run at 8e-3 loses likelihood for a while, and two never came back
RULES = ("single_gradient", "z_score", "shortlist_3", "exact")
CURVE_IMAGES, FINAL_IMAGES, STANDARD_IMAGES = 1000, 2000, 512
CURVE_SAMPLES, FINAL_SAMPLES = 1000, 2000
SWEEP_TARGET = 1e-4

BASE = RunConfig(
    data=DataConfig(name="fashion_mnist", limit=20_000),
    flow=FlowConfig(patch_size=4, width=96, blocks=4, layers=3, head_dim=32, noise_std=0.1),
    alignment=AlignmentConfig(encoder_precision="bf16-mixed", projector_width=256),
    train=TrainConfig(
        steps=STEPS,
        batch_size=64,
        warmup=50,
        ema=0.99,
        precision="bf16-mixed",
        log_every=20,
        eval_every=10**6,
        eval_images=100,
        sample_every=10**6,
        checkpoint_every=10**6,
        keep=1,
    ),
)
LATE = [[3, 2], [4, 2]]
REVERSE: dict[str, Any] = {"strategy": "reverse", "gradient": "one_step", "at": LATE, "weight": 0.5}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: of the arm.
        alignment: options of the alignment; none for a plain flow.
        steps: of the run.
        curve: measure at a quarter, a half and three quarters, too.
        seeds: which are run.
        train: options of the training.
    """

    name: str
    alignment: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    curve: bool = False
    seeds: tuple[int, ...] = (0,)
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def points(self) -> list[int]:
        """Steps at which it is measured."""
        return [self.steps * quarter // 4 for quarter in (range(1, 5) if self.curve else (4,))]

    def config(self, seed: int) -> RunConfig:
        """The run's configuration."""
        c = replace(BASE, run=str(RUNS / f"{self.name}-{seed}"), alignment=replace(BASE.alignment, **self.alignment))
        options = {"lr": None if seed == TUNING_SEED else chosen_rate(), "steps": self.steps, "seed": seed} | self.train
        return replace(c, train=replace(c.train, **options))


def reverse(**options: Any) -> dict[str, Any]:
    """The aligned arms' common options, but for these."""
    return REVERSE | options


MAIN = {
    "plain": {},
    "one_step": reverse(),
    "detach": reverse(strategy="detach"),
    "forward": reverse(strategy="forward"),
    "neumann_2": reverse(gradient=2),
    "exact": reverse(gradient="exact"),
}
DEAR = ("neumann_2", "exact")
CONTROLS = {"random_encoder": reverse(encoder_weights="random"), "shuffled_targets": reverse(shuffled=True)}
SINGLE = {
    "weight_0.1": reverse(weight=0.1),
    "early_blocks": reverse(at=[[1, 2], [2, 2]]),
    "ends_halfway": reverse(until=STEPS // 2),
    "weight_1": reverse(weight=1.0),
    "layer_3": reverse(at=[[3, 3], [4, 3]]),
    "layer_1": reverse(at=[[3, 1], [4, 1]]),
    "conv": reverse(projector="conv"),
    "block_4": reverse(at=[[4, 2]]),
    "weight_3": reverse(weight=3.0),
    "spatial_norm": reverse(spatial_norm=True),
    "block_3": reverse(at=[[3, 2]]),
    "all_blocks": reverse(at=[[t, 2] for t in (1, 2, 3, 4)]),
    "weight_0.03": reverse(weight=0.03),
    "cached": reverse(gradient="cached"),
}
IREPA: dict[str, Any] = {"projector": "conv", "spatial_norm": True}
RETRIED = {"weight_0.1": 1}  # single runs whose seed 0 diverged: another seed
CANDIDATES = {"irepa": reverse(**IREPA), "irepa_forward": reverse(strategy="forward", **IREPA)}
LONG = {f"long_{name}": options for name, options in ({"plain": {}} | CANDIDATES | {"one_step": reverse()}).items()}

TUNING = [Arm(f"rate_{rate:g}", seeds=(TUNING_SEED,), train={"lr": rate}) for rate in RATES]
WARMUP = Arm("warmup_200", seeds=(TUNING_SEED,), train={"lr": RATES[-1], "warmup": LONG_WARMUP})
ARMS = [
    *(Arm(name, options, curve=True, seeds=SEEDS) for name, options in MAIN.items()),
    *(Arm(name, options, seeds=SEEDS) for name, options in CONTROLS.items()),
    Arm("same_seconds", steps=SAME_SECONDS, seeds=SEEDS),
    *(Arm(name, MAIN[name[:-6]], curve=True, train={"lr": 4e-3}) for name in ("plain_0.004", "one_step_0.004")),
    *(Arm(name, options, seeds=(RETRIED.get(name, SEEDS[0]),)) for name, options in SINGLE.items()),
    *(Arm(name, options, seeds=SEEDS) for name, options in CANDIDATES.items()),
    *(Arm(name, options, LONG_STEPS, True, SEEDS, {"warmup": LONG_WARMUP}) for name, options in LONG.items()),
]


def result_file(arm: Arm, seed: int) -> Path:
    """Where a finished run stands."""
    return RESULTS / f"{arm.name}-{seed}.json"


def order(arms: list[Arm]) -> list[tuple[Arm, int]]:
    """The runs, so that whatever time there is answers most.

    A round of seed 0, the other seeds of the cheap arms, single runs, candidates, long runs, then what is dear.
    """

    def stage(arm: Arm, seed: int) -> int:
        if arm.name in DEAR and seed != SEEDS[0]:
            return 4
        return 3 if arm.name in LONG else 2 if arm.name in CANDIDATES else 1 if len(arm.seeds) == 1 else 0

    return sorted([(arm, seed) for arm in arms for seed in arm.seeds], key=lambda run: (stage(*run), run[1]))


def chosen_rate() -> float:
    """The learning rate with which the *plain* flow has the best held-out likelihood."""
    nats = {
        arm.train["lr"]: json.loads(result_file(arm, TUNING_SEED).read_text())["final"]["nats_per_dim"] for arm in TUNING
    }
    return min(nats, key=lambda rate: nats[rate])


def run(arm: Arm, seed: int) -> None:
    """Train and measure one run, from where it is."""
    config = arm.config(seed)
    notes = config.folder / "measured.json"
    measured: dict[str, Any] = json.loads(notes.read_text()) if notes.is_file() else {}
    data = load_data(config.data)
    for point in arm.points:
        if str(point) in measured:
            continue
        begun = checkpoint.newest(config.folder) is not None
        try:
            state = train(replace(config, train=replace(config.train, until=point, resume=begun))).state
        except InputError as error:
            if "not finite" not in str(error):
                raise
            return keep(arm, seed, {"failed": str(error)})  # it would come out so again
        if state.step < point:
            sys.exit(f"interrupted at step {state.step}; the same command goes on from there")
        flow, _ = load_flow(str(config.folder))
        started = time.perf_counter()
        row = {"step": point, "seconds": round(state.seconds, 2), "skipped": state.skipped}
        row |= measure(flow, data, final=point == arm.points[-1], brief=seed == TUNING_SEED, inside=len(arm.seeds) > 1)
        measured[str(point)] = row | {"seconds_of_measuring": round(time.perf_counter() - started, 1)}
        write_whole(notes, lambda file: file.write_text(json.dumps(measured)))
    rows = read_metrics(config.folder / "metrics.csv")
    curve = [{k: row[k] for k in ("step", "nll", "align", "images_per_second") if k in row} for row in rows if "nll" in row]
    facts = {"alignment": arm.alignment, "lr": config.train.lr, "steps": arm.steps}
    facts |= {
        "machine": machine(pick_device("auto")),
        "points": list(measured.values()),
        "final": measured[str(arm.steps)],
        "training": curve,
    }
    return keep(arm, seed, facts)


def keep(arm: Arm, seed: int, facts: dict[str, Any]) -> None:
    """Write a result."""
    write_result(result_file(arm, seed), {"arm": arm.name, "seed": seed} | facts)


def measure(flow: TarFlow, data: ImageSet, final: bool, brief: bool, inside: bool) -> dict[str, Any]:
    """The figures of a flow with averaged weights; accuracies in the precision that it was trained in."""
    x, y = seen(flow, data.held_out, spread(len(data.held_out), FINAL_IMAGES), data.levels)
    row: dict[str, Any] = density(flow, x, y)
    if brief:
        return row
    some = slice(None, None, 1 if final else FINAL_IMAGES // CURVE_IMAGES)
    with autocast(flow.device, BASE.train.precision):
        unlabelled, _ = seen(flow, data.train, spread(len(data.train), STANDARD_IMAGES), data.levels)
        scores = class_scores_by_all(flow, x[some], RULES, fit_statistics(flow, unlabelled))
    correct = {rule: (s.argmax(1).cpu() == y[some]).float() for rule, s in scores.items()}
    if final:
        row["accuracy"] = {rule: float(c.mean()) for rule, c in correct.items()}
    thinned = slice(None, None, FINAL_IMAGES // CURVE_IMAGES if final else 1)
    row["curve_accuracy"] = {rule: float(c[thinned].mean()) for rule, c in correct.items()}

    count = FINAL_SAMPLES if final else CURVE_SAMPLES
    labels = torch.arange(count) % flow.num_classes
    samples = flow.sample(y=labels, generator=torch.Generator().manual_seed(0), batch_size=250)
    images = to_uint8(samples.float().cpu())
    row["judge"] = judged(images[:CURVE_SAMPLES], data, JUDGE)
    row["judge"]["right"] = right(trained(JUDGE), images[:CURVE_SAMPLES], labels[:CURVE_SAMPLES])
    if final:
        row["judge_final"], row["encoder_final"] = judged(images, data, JUDGE), judged(images, data, None)
    if final and inside:
        row["probe"] = probe_layers(flow, data)
        errors = errors_by_sweep(flow, 16)
        row["sweeps"] = {t: sweeps_until(e, SWEEP_TARGET) for t, e in errors.items()}
        row["errors_by_sweep"] = {t: e[:17] for t, e in errors.items()}
        row["blocks"] = what_blocks_do(flow, x[:500], y[:500])
    return row


@torch.no_grad()
def what_blocks_do(flow: TarFlow, x: torch.Tensor, y: torch.Tensor) -> dict[int, dict[str, float]]:
    """Block -> RMS of what it changes over that of its input, and its log-determinant a dimension."""
    noisy = flow.perturb(x, torch.Generator().manual_seed(0))
    rows, x_in, classes = {}, flow.tokenize(noisy), flow.class_weights(y, len(noisy))
    for t, block in enumerate(flow.blocks, start=1):
        out = block(x_in, classes)
        moved = (out.z - x_in).square().mean().sqrt() / x_in.square().mean().sqrt()
        rows[t] = {"moved": float(moved), "log_det": float(out.log_det.mean() / flow.dims)}
        x_in = out.z
    return rows


def prepare() -> None:
    """What runs share: features, the judge, the reference's features, and how near real images come to it."""
    for aligned in (REVERSE, CONTROLS["random_encoder"]):
        config = replace(BASE, alignment=replace(BASE.alignment, **aligned))
        make_caches(config, None)
    judge, data = trained(JUDGE), load_data(BASE.data)
    file = RESULTS / "real.json"
    if not file.is_file():
        images, y = data.train[spread(len(data.train), FINAL_SAMPLES)]
        held, held_y = data.held_out[list(range(len(data.held_out)))]
        facts: dict[str, Any] = {
            "judge": judged(images[:CURVE_SAMPLES], data, JUDGE),
            "judge_final": judged(images, data, JUDGE),
        }
        facts["encoder_final"] = judged(images, data, None)
        facts["judge_right"], facts["judge_held_out"] = right(judge, images, y), right(judge, held, held_y)
        write_result(file, facts)
    for extractor in (JUDGE, None):  # so that runs side by side find the reference's features
        judged(data.train[range(8)][0], data, extractor)


def main() -> None:
    """Run what is missing."""
    o = options(__doc__, jobs=2).parse_args()
    first = [(arm, TUNING_SEED) for arm in (*TUNING, WARMUP)]
    if o.run:
        return run(*run_named(o.run, [*first, *order(ARMS)]))
    stages = [missing(stage, result_file, o.list) for stage in (first, chosen(o, order(ARMS)))]
    if o.list or not any(stages):
        return None
    prepare()
    end = time.monotonic() + 3600 * o.hours
    for stage in stages:
        if not carry_out(__file__, ([run] for run in stage), RUNS / "logs", o.jobs, end):
            sys.exit(1)
    return None


if __name__ == "__main__":
    main()
