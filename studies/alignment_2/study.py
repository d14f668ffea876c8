"""Runs the study of README.md, run by run; what is finished is skipped, what was cut off goes on where it was.

    python studies/alignment_2/study.py [--jobs 2] [--only color,plain,…] [--seeds 0] [--hours 16] [--list]

A run is an arm and a seed; `--only` takes arms and groups of arms. What was measured of it is in results/ARM-SEED.json, and
runs stand in runs/studies/alignment_2. Color needs runs/data/emoji, and cells runs/data/cells, as README.md says.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path += [str(HERE.parent), str(HERE.parent / "alignment")]

from judge import right, trained

from common import Run, carry_out, chosen, judged, missing, options, run_named, write_result
from flowback.core.devices import autocast, machine, pick_device
from flowback.core.errors import InputError
from flowback.core.seeds import keyed_generator
from flowback.core.units import to_uint8
from flowback.data import DataConfig, ImageSet, load_data
from flowback.data.splits import spread
from flowback.encoders import Encoder, TimmEncoder, load_encoder
from flowback.flow.config import FlowConfig
from flowback.flow.tarflow import TarFlow
from flowback.measure.density import density, seen
from flowback.runs import checkpoint
from flowback.runs.checkpoint import State, load_flow
from flowback.runs.config import AlignmentConfig, RunConfig, TrainConfig
from flowback.tasks.classify import class_scores_by_all, fit_statistics
from flowback.training import train
from flowback.training.caches import make_caches
from flowback.training.prior import fit_to

RESULTS = HERE / "results"
RUNS = Path("runs/studies/alignment_2")

STEPS, SEARCH_STEPS, SIZE_STEPS = 800, 400, 1600
LONGER = (1040, 1360)  # plain steps in the seconds of cheaper and of dearer alignment, about
SEEDS, SEARCH_SEED = (0, 1, 2), 101
RATES, GREY_RATE = (2e-3, 4e-3, 8e-3), 8e-3
WIDTH, WEIGHT, WEIGHTS = 96, 0.5, (0.1, 2.0)
RULES = ("single_gradient", "z_score", "exact")
TRIED, SAMPLES, FITTED, UNLABELLED = 500, 1000, 10_000, 512
TRAIN = TrainConfig(
    steps=STEPS,
    batch_size=64,
    warmup=200,
    ema=0.99,
    precision="bf16-mixed",
    log_every=20,
    eval_every=10**6,
    eval_images=100,
    sample_every=10**6,
    checkpoint_every=100,
    keep=1,
)
FLOW = FlowConfig(patch_size=4, width=WIDTH, blocks=4, layers=3, head_dim=32, noise_std=0.1)
Setting = dict[str, Any]
PLAIN: Setting = {"prior": "standard", "temperature": 1.0, "guidance": 0.0}
SETTINGS: list[Setting] = [
    {"prior": prior, "temperature": t, "guidance": w}
    for prior in ("standard", "fitted")
    for t, w in ((1.0, 0.0), (0.9, 0.0), (0.8, 0.0), (1.0, 1.0), (0.9, 1.0))
]


@dataclass(frozen=True)
class Domain:
    """Images, the flow for them, and how their judge is trained.

    Args:
        name: of the domain.
        data: its images.
        flow: the flow.
        measured: held-out images that are classified, at most.
        epochs: of the judge.
        few: whether images are few: they are mirrored, and the judge's are moved, too.
    """

    name: str
    data: DataConfig
    flow: FlowConfig = FLOW
    measured: int = 2000
    epochs: int = 4
    few: bool = False

    @property
    def judge(self) -> Path:
        """The file of its judge."""
        return RUNS / f"judge_{self.name}.pth"

    def train_judge(self) -> None:
        """Train the judge if there is none."""
        trained(self.judge, replace(self.data, limit=None), self.epochs, augment=self.few)


GREY = Domain("grey", DataConfig(name="fashion_mnist", limit=20_000))
COLOR = Domain("color", DataConfig(name="folder", path="runs/data/emoji", image_size=32, channels=3), epochs=60, few=True)
CELLS = Domain(
    "cells",
    DataConfig(name="folder", path="runs/data/cells", image_size=64, channels=1, holdout=0.25),
    replace(FLOW, patch_size=8),
    epochs=60,
    few=True,
)


class Before(TimmEncoder):
    """EfficientNet-Lite0's stage before the last: 192 channels on the same grid, which are sharper."""

    def _features(self, x: Tensor) -> Tensor:
        x = self.model.bn1(self.model.conv_stem(x.to(memory_format=torch.channels_last)))
        for stage in self.model.blocks[:-1]:
            x = stage(x)
        return x


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: of the arm.
        group: of arms that `--only` knows.
        domain: its images and its flow.
        alignment: options of the alignment; none for a plain flow.
        settled: further ones, which follow from results of other runs.
        steps: of the run.
        seeds: which are run.
        width: of the flow.
        limit: number of training images; 0 for the domain's, None for all.
        lr: learning rate; None for the domain's.
        before: whether the targets are those of `Before`.
    """

    name: str
    group: str
    domain: Domain = GREY
    alignment: dict[str, Any] = field(default_factory=dict)
    settled: Callable[[], dict[str, Any]] | None = None
    steps: int = STEPS
    seeds: tuple[int, ...] = SEEDS
    width: int = WIDTH
    limit: int | None = 0
    lr: float | None = None
    before: bool = False

    @property
    def searches(self) -> bool:
        """Whether it is a part of the search: fewer figures are measured."""
        return self.group == "search"

    @property
    def data(self) -> DataConfig:
        """Its images."""
        return self.domain.data if self.limit == 0 else replace(self.domain.data, limit=self.limit)

    def config(self, seed: int) -> RunConfig:
        """The configuration of a run."""
        rate = self.lr or (GREY_RATE if self.domain is GREY else chosen_rate())
        kept = 20 if seed == 0 and self.name in WATCHED else TRAIN.keep
        aligned = self.alignment | (self.settled() if self.settled else {})
        return RunConfig(
            run=str(RUNS / f"{self.name}-{seed}"),
            data=self.data,
            flow=replace(self.domain.flow, width=self.width),
            alignment=AlignmentConfig(**(COMMON | aligned)),
            train=replace(
                TRAIN, lr=rate * WIDTH / self.width, steps=self.steps, seed=seed, hflip=self.domain.few, keep=kept
            ),
        )


def result_file(arm: Arm, seed: int) -> Path:
    """Where a finished run stands."""
    return RESULTS / f"{arm.name}-{seed}.json"


def chosen_rate() -> float:
    """The learning rate with which the *plain* flow of color has the best held-out likelihood."""
    return min(_finished(TUNING), key=lambda found: found["nats_per_dim"])["lr"]


def choice(arms: Sequence[Arm]) -> dict[str, Any]:
    """Place and weight of that arm of a search whose samples have the lowest FID at the plain settings."""
    best = min(_finished(arms), key=lambda found: found["plain"]["fid"])["alignment"]
    return {"at": best["at"], "weight": best["weight"]}


def _finished(arms: Iterable[Arm]) -> list[dict[str, Any]]:
    found = [json.loads(result_file(arm, SEARCH_SEED).read_text()) for arm in arms]
    return [result for result in found if "failed" not in result]


def equal_norm() -> dict[str, Any]:
    """The weight at which exact's gradient is as long as one_step's was, the mean over the checkpoints of a run."""
    from alignment_2.gradients import measured

    rows = measured(RUNS / "one_step-0")["checkpoints"]
    ratios = [row["norms"]["one_step"] / row["norms"]["exact"] for row in rows]
    return {"weight": WEIGHT * sum(ratios) / len(ratios)}


COMMON: dict[str, Any] = {"encoder_precision": "bf16-mixed", "projector_width": 256}
LATE, EARLY = [[3, 2], [4, 2]], [[1, 2], [2, 2]]
IREPA: dict[str, Any] = {"projector": "conv", "spatial_norm": True}
FAMILIES: dict[str, dict[str, Any]] = {
    f"{prefix}{strategy}": {"strategy": strategy, **options}
    for prefix, options in (("", {}), ("irepa_", IREPA))
    for strategy in ("forward", "detach", "reverse")
}
WATCHED = ("plain", "one_step", "exact")  # of whose seed 0 all checkpoints are kept, for gradients.py


def aligned(strategy: str = "reverse", **more: Any) -> dict[str, Any]:
    """Options of an alignment that was not searched for."""
    return {"strategy": strategy, "at": LATE, "weight": WEIGHT} | more


search = partial(Arm, group="search", domain=COLOR, steps=SEARCH_STEPS, seeds=(SEARCH_SEED,))
TUNING = [search(f"emoji_rate_{rate:g}", lr=rate) for rate in RATES]
PLACES = {
    family: [
        search(f"search_{family}_{name}", alignment=options | {"at": at, "weight": WEIGHT})
        for name, at in [("early", EARLY), *((f"late_{layer}", [[3, layer], [4, layer]]) for layer in (1, 2, 3))]
    ]
    for family, options in FAMILIES.items()
}
SEARCHED = {
    family: [
        *places,
        *(
            search(
                f"search_{family}_weight_{weight:g}",
                alignment=FAMILIES[family],
                settled=lambda places=places, weight=weight: choice(places) | {"weight": weight},
            )
            for weight in WEIGHTS
        ),
    ]
    for family, places in PLACES.items()
}
FOUND = {family: partial(choice, arms) for family, arms in SEARCHED.items()}

color = partial(Arm, group="color", domain=COLOR)
grey = partial(Arm, group="grey")
cheaper = partial(Arm, group="cheaper")
places = partial(Arm, group="places")
encoders = partial(Arm, group="encoders", domain=COLOR, settled=FOUND["irepa_reverse"])
cells = partial(Arm, group="cells", domain=CELLS)
SIZES: dict[str, dict[str, Any]] = {
    **{f"width_{width}": {"width": width} for width in (64, 192)},
    "images_2000": {"limit": 2000, "steps": SIZE_STEPS},
    "images_20000": {"steps": SIZE_STEPS},
    "images_60000": {"limit": None, "steps": SIZE_STEPS},
}
ARMS = [
    color("emoji_plain"),
    *(color(f"emoji_{family}", alignment=options, settled=FOUND[family]) for family, options in FAMILIES.items()),
    *(color(f"emoji_plain_{steps}", steps=steps) for steps in LONGER),
    grey("plain"),
    grey("one_step", alignment=aligned()),
    grey("detach", alignment=aligned("detach")),
    grey("forward", alignment=aligned("forward")),
    grey("irepa", alignment=aligned(**IREPA)),
    grey("irepa_forward", alignment=aligned("forward", **IREPA)),
    grey("exact", alignment=aligned(gradient="exact")),
    *(grey(f"plain_{steps}", steps=steps) for steps in LONGER),
    cheaper("every_2", alignment=aligned(**IREPA, every=2)),
    cheaper("every_4", alignment=aligned(**IREPA, every=4)),
    cheaper("ends_halfway", alignment=aligned(**IREPA, until=STEPS // 2)),
    cheaper("forward_every_2", alignment=aligned("forward", **IREPA, every=2)),
    cheaper("forward_first", alignment=aligned("forward", **IREPA, reverse_from=STEPS // 2)),
    cheaper("one_block", alignment=aligned(**IREPA, at=[[4, 2]])),
    encoders("emoji_sharper", alignment=FAMILIES["irepa_reverse"], before=True),
    encoders("emoji_random_encoder", alignment=FAMILIES["irepa_reverse"] | {"encoder_weights": "random"}),
    encoders("emoji_shuffled", alignment=FAMILIES["irepa_reverse"] | {"shuffled": True}),
    places("forward_early", alignment=aligned("forward", at=EARLY)),
    places("reverse_early", alignment=aligned(at=EARLY)),
    places("detach_early", alignment=aligned("detach", at=EARLY)),
    places("detach_1", alignment=aligned("detach", at=[[3, 1], [4, 1]])),
    places("detach_3", alignment=aligned("detach", at=[[3, 3], [4, 3]])),
    places("separate", alignment=aligned(separate_projectors=True)),
    places("paper", alignment=aligned(gradient="cached", weight=0.1, projector_width=1024)),
    Arm("exact_equal_norm", "gradients", alignment=aligned(gradient="exact"), settled=equal_norm),
    *(
        Arm(f"{size}_{kind}", "size", alignment=options, **own)
        for size, own in SIZES.items()
        for kind, options in (("plain", {}), ("irepa", aligned(**IREPA)))
    ),
    cells("cells_plain"),
    cells("cells_irepa_forward", alignment=aligned("forward", **IREPA)),
    cells("cells_irepa", alignment=aligned(**IREPA)),
]
GROUPS = {group: [arm.name for arm in ARMS if arm.group == group] for group in dict.fromkeys(arm.group for arm in ARMS)}
STAGES = (("color", "grey"), ("cheaper",), ("encoders", "places", "gradients"), ("size",), ("cells",))


def searches() -> list[list[Run[Arm]]]:
    """The stages of the search, each of which needs what the one before it found."""
    weights = [arm for family, arms in SEARCHED.items() for arm in arms if arm not in PLACES[family]]
    stages = [TUNING, [arm for arms in PLACES.values() for arm in arms], weights]
    return [[(arm, SEARCH_SEED) for arm in stage] for stage in stages]


def order() -> list[Run[Arm]]:
    """The runs after the search, so that whatever time there is answers most: by stages, seed 0 of each first."""
    stage = {group: i for i, groups in enumerate(STAGES) for group in groups}
    return sorted([(arm, seed) for arm in ARMS for seed in arm.seeds], key=lambda run: (stage[run[0].group], run[1]))


def run(arm: Arm, seed: int) -> None:
    """Train and measure one run, from where it is."""
    config = arm.config(seed)
    facts: dict[str, Any] = {"arm": arm.name, "seed": seed, "group": arm.group, "domain": arm.domain.name}
    facts |= {"alignment": asdict(config.alignment), "lr": config.train.lr, "steps": arm.steps, "width": arm.width}
    facts |= {"images": config.data.limit, "machine": machine(pick_device("auto"))}
    spent, begun, cpu = config.folder / "cpu_seconds", _step(config.folder), time.process_time()
    if begun < arm.steps:
        try:
            train(replace(config, train=replace(config.train, resume=begun > 0)), encoder=encoder_of(arm))
        except InputError as error:
            if "not finite" not in str(error):
                raise
            return write_result(result_file(arm, seed), facts | {"failed": str(error)})  # it would come out so again
        if (step := _step(config.folder)) < arm.steps:
            sys.exit(f"interrupted at step {step}; the same command goes on from there")
        if not begun:
            spent.write_text(f"{time.process_time() - cpu:.1f}")
    newest = checkpoint.newest(config.folder)
    assert newest is not None
    state = State.read(newest)
    facts |= {"seconds": round(state.seconds, 1), "skipped": state.skipped}
    facts["cpu_seconds"] = float(spent.read_text()) if spent.is_file() else None
    flow, _ = load_flow(config.folder, device="auto")
    assert isinstance(flow, TarFlow)
    started = time.process_time()
    facts |= measure(flow, load_data(config.data), arm.domain, arm.searches)
    facts["cpu_seconds_of_measuring"] = round(time.process_time() - started, 1)
    return write_result(result_file(arm, seed), facts)


def _step(folder: Path) -> int:
    newest = checkpoint.newest(folder)
    return 0 if newest is None else State.read(newest).step


def encoder_of(arm: Arm) -> Encoder | None:
    """The encoder of an arm whose configuration does not name it."""
    if not arm.before:
        return None
    assert isinstance(arm.domain.data.image_size, int)
    patches = arm.domain.data.image_size // arm.domain.flow.patch_size
    whole = load_encoder(AlignmentConfig().encoder, grid=(patches, patches))
    return Before(whole.model, whole.size, whole.mean.flatten().tolist(), whole.std.flatten().tolist())


@torch.no_grad()
def measure(flow: TarFlow, data: ImageSet, domain: Domain, brief: bool) -> dict[str, Any]:
    """The figures of a flow; with `brief` samples are those of the plain settings alone."""
    x, y = seen(flow, data.held_out, spread(len(data.held_out), domain.measured), data.levels)
    figures: dict[str, Any] = {"nats_per_dim": density(flow, x, y)["nats_per_dim"]}
    with autocast(flow.device, TRAIN.precision):
        unlabelled, _ = seen(flow, data.train, spread(len(data.train), UNLABELLED), data.levels)
        scores = class_scores_by_all(flow, x, RULES, fit_statistics(flow, unlabelled))
    figures["accuracy"] = {rule: float((s.argmax(1).cpu() == y.cpu()).float().mean()) for rule, s in scores.items()}
    draw = partial(drawn, flow, data, domain.judge)
    figures["plain"] = draw(PLAIN, SAMPLES, 1)
    if brief:
        return figures
    fit = fit_to(flow, data, FITTED)
    figures["prior_gained"] = fit.gained
    settings = [setting for setting in SETTINGS if setting["prior"] == "standard" or fit.prior is not None]
    figures["settings"] = [draw(setting, TRIED, 0) for setting in settings]
    best = min(zip(figures["settings"], settings, strict=True), key=lambda pair: pair[0]["fid"])[1]
    figures["best"] = figures["plain"] if best == PLAIN else draw(best, SAMPLES, 1)
    return figures


def drawn(flow: TarFlow, data: ImageSet, judge: Path, setting: Setting, count: int, seed: int) -> dict[str, Any]:
    """What the judge says of samples, which have the classes of the held-out images in their shares."""
    labels = data.held_out.labels
    y = labels[torch.arange(count) * len(labels) // count]
    together = 250 if flow.device.type == "cpu" else count  # images at once, which changes them by rounding only
    x = flow.sample(y=y, generator=keyed_generator(seed), batch_size=together, **setting)
    images = to_uint8(torch.where(x.isfinite(), x, 0).float().cpu())
    return setting | judged(images, data, judge) | {"right": right(trained(judge), images, y)}


def prepare(runs: Iterable[Run[Arm]]) -> None:
    """What these runs share: the judge, its features of the reference, and the encoder's of the training images."""
    arms = {arm.name: arm for arm, _ in runs}.values()
    for domain in dict.fromkeys(arm.domain for arm in arms):
        domain.train_judge()
        data = load_data(domain.data)
        judged(data.train[range(8)][0], data, domain.judge)
    shared = {(arm.domain.name, arm.limit, arm.alignment.get("encoder_weights")): arm for arm in arms if arm.alignment}
    for arm in shared.values():
        if not arm.before:
            options = COMMON | arm.alignment | {"at": LATE}
            config = replace(arm, alignment={}, settled=None, lr=GREY_RATE).config(0)
            make_caches(replace(config, alignment=AlignmentConfig(**options)), None)


def main() -> None:
    """Run what is missing."""
    o = options(__doc__, jobs=2).parse_args()
    before = searches()
    if o.run:
        return run(*run_named(o.run, [*(each for stage in before for each in stage), *order()]))
    wanted = chosen(o, order(), GROUPS)
    stages = before if any(arm.domain is not GREY for arm, _ in wanted) else []
    stages = [*stages, *([each for each in wanted if each[0].group in groups] for groups in STAGES)]
    stages = [missing(stage, result_file, o.list) for stage in stages]
    if o.list:
        return None
    end = time.monotonic() + 3600 * o.hours
    for stage in stages:
        if stage and time.monotonic() < end:
            prepare(stage)
        chains: dict[str, list[Run[Arm]]] = {}
        for arm, seed in stage:  # those that wait for the same measurement follow each other
            chains.setdefault(arm.name if arm.settled is equal_norm else f"{arm.name}-{seed}", []).append((arm, seed))
        if not carry_out(__file__, chains.values(), RUNS / "logs", o.jobs, end):
            sys.exit(1)
    return None


if __name__ == "__main__":
    main()
