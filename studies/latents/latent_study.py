"""Runs the study of README.md, run by run; what is finished is skipped, what was cut off goes on where it was.

    python studies/latents/latent_study.py [--only NAME,…] [--seeds 0] [--hours 12] [--list]

A run is an arm and a seed: an autoencoder (unless the arm works in pixels), then a flow in its latents, or both at once.
What was measured of it is in results/ARM-SEED.json. Runs stand in runs/studies/latents. CPU seconds
are of a training that was not cut off: what other work on the machine disturbs least.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowback.core.devices import machine, pick_device, put
from flowback.core.seeds import keyed_generator
from flowback.core.units import from_levels, to_uint8
from flowback.data import ImageSet, load_data
from flowback.data.cache import ArrayCache
from flowback.data.splits import spread
from flowback.flow.config import FlowConfig
from flowback.latents import Flow, LatentFlow
from flowback.latents.joint import JointConfig
from flowback.latents.kl import KLConfig
from flowback.latents.losses import ReconstructionConfig
from flowback.latents.semantic import SemanticAutoencoder, SemanticConfig
from flowback.measure.density import seen
from flowback.reports.evaluate import EvaluationConfig, evaluate
from flowback.runs import checkpoint
from flowback.runs.checkpoint import State, load_flow
from flowback.runs.config import (
    AlignmentConfig,
    AutoencoderRunConfig,
    DataConfig,
    LatentConfig,
    RunConfig,
    TrainConfig,
)
from flowback.tasks.classify import accuracies
from flowback.training import train
from flowback.training.autoencoders import train_autoencoder
from flowback.training.caches import feature_plan, open_cache

HERE = Path(__file__).parent
sys.path += [str(HERE.parent), str(HERE.parent / "alignment")]

from judge import right, trained

from common import Run, carry_out, chosen, judged, missing, options, run_named, unseen, write_result

RESULTS = HERE / "results"
RUNS = Path("runs/studies/latents")
JUDGE = RUNS / "judge.pth"

STEPS, AUTOENCODER_STEPS, LONG_STEPS, LONGEST_STEPS, WIDE_STEPS = 800, 1500, 2500, 12_000, 4000
SEEDS = (0, 1, 2)
IMAGES, SAMPLES, PROBED, DRAWS = 2000, 1000, 5000, 4
TEMPERATURES, SCALES = (1.0, 0.9, 0.8), (0.0, 1.0)  # of samples; guidance at temperature 1
DATA = DataConfig(name="fashion_mnist", limit=12_000)
TRAIN = TrainConfig(
    steps=STEPS,
    batch_size=64,
    lr=4e-3,
    warmup=100,
    ema=0.99,
    log_every=20,
    eval_every=10**6,
    eval_images=100,
    sample_every=10**6,
    checkpoint_every=500,
    keep=1,
)
FLOW = FlowConfig(patch_size=1, width=96, blocks=4, layers=3, head_dim=32)
PIXELS = replace(FLOW, patch_size=4, noise_std=0.1)
SHARP = ReconstructionConfig(adversarial=0.3, adversarial_from=0.2, discriminator_width=16)


@dataclass(frozen=True)
class Arm:
    """One space, and how the flow in it is trained.

    Args:
        name: of the arm.
        kind: pixels, kl, semantic or joint.
        options: of the autoencoder.
        loss: of its reconstructions.
        alignment: options of the flow's alignment; none for a plain flow.
        data, flow, train: of the flow.
        seeds: which are run.
        space: the arm whose autoencoder it works in; None for its own.
    """

    name: str
    kind: str = "semantic"
    options: dict[str, Any] = field(default_factory=dict)
    loss: ReconstructionConfig = SHARP
    alignment: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = DATA
    flow: FlowConfig = FLOW
    train: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS
    space: str | None = None

    def folder(self, seed: int, what: str = "flow") -> Path:
        """Of a run."""
        name = self.space if self.space and what == "autoencoder" else self.name
        return RUNS / what / f"{name}-{seed}"

    def autoencoder(self, seed: int) -> AutoencoderRunConfig | None:
        """The configuration of the autoencoder's run, if it is trained on its own."""
        if self.kind not in ("kl", "semantic"):
            return None
        own: dict[str, Any] = {"kl": KLConfig(**self.options)} if self.kind == "kl" else {}
        own = own or {"semantic": SemanticConfig(decoder_width=96, decoder_layers=1, **self.options)}
        return AutoencoderRunConfig(
            run=str(self.folder(seed, "autoencoder")),
            data=self.data,
            kind=self.kind,
            reconstruction=self.loss,
            train=replace(TRAIN, steps=AUTOENCODER_STEPS, batch_size=32, lr=2e-3, betas=(0.5, 0.95), seed=seed),
            **own,
        )

    def config(self, seed: int) -> RunConfig:
        """The configuration of the flow's run."""
        joint = JointConfig(**self.options) if self.kind == "joint" else JointConfig()
        latents = LatentConfig(joint=self.kind == "joint")
        if self.kind in ("kl", "semantic"):
            latents = replace(latents, autoencoder=str(self.folder(seed, "autoencoder")))
        return RunConfig(
            run=str(self.folder(seed)),
            data=self.data,
            flow=self.flow if self.kind != "joint" else replace(self.flow, noise_std=joint.noise_std),
            latents=latents,
            joint=joint,
            reconstruction=self.loss,
            alignment=AlignmentConfig(**self.alignment),
            train=replace(TRAIN, seed=seed, **self.train),
        )


def noised(std: float) -> FlowConfig:
    """The flow with constant noise of this deviation."""
    return replace(FLOW, noise_std=std)


ALIGNED: dict[str, Any] = {"gradient": "one_step", "at": [[3, 2], [4, 2]], "weight": 0.5, "projector": "conv"}
ALIGNED |= {"spatial_norm": True}
PCA = {"compressor": "pca", "channels": 32}
FULL = replace(DATA, limit=None)
ALIGNED_KINDS = {  # arms whose flow is aligned, too
    "pca_32": Arm("pca_32", options=PCA, flow=noised(0.4)),
    "kl_16": Arm("kl_16", "kl", {"channels": 16, "width": 16}, flow=noised(0.2)),
    "joint_16": Arm("joint_16", "joint", {"channels": 16, "nll_weight": 0.2}, train={"lr": 3e-3}),
}
MAIN = [
    Arm("pixels", "pixels", flow=PIXELS),
    *(ALIGNED_KINDS[name] for name in ("kl_16", "pca_32", "joint_16")),
    Arm("attention_32", options={"compressor": "attention", "channels": 32}, flow=noised(0.4)),
    Arm("transformer_32", options={"compressor": "transformer", "channels": 32}, flow=noised(0.4)),
]
SIZES = [
    Arm(f"{compressor}_{d}", options={"compressor": compressor, "channels": d}, flow=noised(0.4), seeds=(0,))
    for compressor in ("pca", "attention", "transformer")
    for d in (16, 64)
]
ALIGNMENT = [
    replace(plain, name=f"{name}_{s}", alignment=ALIGNED | {"strategy": s}, space=None if plain.kind == "joint" else name)
    for name, plain in ALIGNED_KINDS.items()
    for s in ("forward", "reverse")
]
LOSSES = [
    Arm("pca_32_l1", options=PCA, loss=ReconstructionConfig(), flow=noised(0.4), seeds=(0,)),
    Arm("pca_32_l2", options=PCA, loss=replace(SHARP, pixels="l2"), flow=noised(0.4), seeds=(0,)),
    Arm("pca_32_features", options=PCA, loss=ReconstructionConfig(features=0.5), flow=noised(0.4), seeds=(0,)),
    Arm("pca_32_sharp_features", options=PCA, loss=replace(SHARP, features=0.5), flow=noised(0.4), seeds=(0,)),
]
ALL = Arm("pca_32_all", options=PCA, data=FULL, flow=noised(0.4), train={"steps": LONG_STEPS})
ALL_REVERSE = replace(ALL, name="pca_32_all_reverse", alignment=ALIGNED | {"strategy": "reverse"}, space="pca_32_all")
LONGEST = {"steps": LONGEST_STEPS, "precision": "bf16-mixed", "ema": 0.998}
WIDE = LONGEST | {"steps": WIDE_STEPS, "batch_size": 128, "lr": 3e-3}
LONG = [
    ALL,
    ALL_REVERSE,
    replace(ALL_REVERSE, name="pca_32_longest_reverse", train=LONGEST),
    replace(ALL_REVERSE, name="pca_32_wide_0.3", flow=replace(noised(0.3), width=192), train=WIDE),
    Arm("pixels_all", "pixels", data=FULL, flow=PIXELS, train={"steps": LONG_STEPS, "lr": 8e-3, "warmup": 200}),
]
ARMS = [*MAIN, *LOSSES, *ALIGNMENT, *SIZES, *LONG]


def order() -> list[tuple[Arm, int]]:
    """The runs: seed 0 of all arms, then the other seeds."""
    return sorted([(arm, seed) for arm in ARMS for seed in arm.seeds], key=lambda run: run[1])


def result_file(arm: Arm, seed: int) -> Path:
    """Where a finished run stands."""
    return RESULTS / f"{arm.name}-{seed}.json"


def run(arm: Arm, seed: int) -> None:
    """Train and measure one run, from where it is."""
    facts: dict[str, Any] = {"arm": arm.name, "seed": seed, "kind": arm.kind, "machine": machine(pick_device("auto"))}
    recipe, config = arm.autoencoder(seed), arm.config(seed)
    if recipe is not None:
        begun, cpu = _begun(recipe.folder), time.process_time()
        state = train_autoencoder(replace(recipe, train=replace(recipe.train, resume=begun))).state
        if not begun:
            facts["autoencoder_cpu_seconds"] = round(time.process_time() - cpu, 1)
        if state.step < recipe.train.steps:
            sys.exit(f"interrupted at step {state.step}; the same command goes on from there")
        facts["autoencoder_seconds"] = round(state.seconds, 1)
    begun, cpu = _begun(config.folder), time.process_time()
    if not begun or _state(config.folder).step < config.train.steps:
        state = train(replace(config, train=replace(config.train, resume=begun))).state
        if state.step < config.train.steps:
            sys.exit(f"interrupted at step {state.step}; the same command goes on from there")
    if not begun:
        facts["cpu_seconds"] = round(time.process_time() - cpu, 1)
    state = _state(config.folder)
    facts |= {"steps": state.step, "seconds": round(state.seconds, 1), "skipped": state.skipped}
    flow, _ = load_flow(config.folder, device="auto")
    data = load_data(config.data)
    facts |= measure(flow, data, config.folder)
    write_result(result_file(arm, seed), facts)


def _begun(folder: Path) -> bool:
    return checkpoint.newest(folder) is not None


def _state(folder: Path) -> State:
    newest = checkpoint.newest(folder)
    assert newest is not None
    return State.read(newest)


@torch.no_grad()
def measure(flow: Flow, data: ImageSet, folder: Path) -> dict[str, Any]:
    """Classification, samples, and what the space itself gives away."""
    found = evaluate(folder, EvaluationConfig(metrics=("bpd", "accuracy"), images=IMAGES), device=flow.device)
    figures: dict[str, Any] = {"classification": found["classification"], "density": found["density"]}
    figures["averaged"] = averaged(flow, data, DRAWS)
    y = torch.arange(SAMPLES) % flow.num_classes
    figures["samples"] = []
    for temperature, scale in [(t, 0.0) for t in TEMPERATURES] + [(1.0, s) for s in SCALES if s]:
        generator = keyed_generator(0)
        x = flow.sample(y=y, temperature=temperature, guidance=scale, generator=generator, batch_size=250)
        images = to_uint8(x.float().cpu())
        row = {"temperature": temperature, "guidance": scale, **judged(images, data, JUDGE)}
        figures["samples"].append(row | {"right": right(trained(JUDGE), images, y)})
    if isinstance(flow, LatentFlow):
        figures |= reconstructed(flow, data, spread(len(data.held_out), SAMPLES))
        figures["unseen"] = reconstructed(flow, data, unseen(data, SAMPLES))
    return figures | {"space": probed(flow, data, PROBED)}


def reconstructed(flow: LatentFlow, data: ImageSet, indices: list[int]) -> dict[str, Any]:
    """What the judge says of reconstructions of these held-out images, without and with the flow's noise."""
    figures: dict[str, Any] = {}
    real, labels = data.held_out[indices]
    latents = flow.to_data(from_levels(real, data.levels))
    for name, std in (("reconstruction", 0.0), ("noised", flow.config.noise_std)):
        noise = put(torch.randn(latents.shape, generator=keyed_generator(0)), flow.device)
        images = to_uint8(flow.to_images(latents + std * noise).cpu())
        figures[name] = judged(images, data, JUDGE) | {"right": right(trained(JUDGE), images, labels)}
    return figures


def averaged(flow: Flow, data: ImageSet, draws: int) -> dict[str, float]:
    """Accuracy by exact class likelihoods that are averaged over draws of the flow's noise."""
    x, y = seen(flow, data.held_out, spread(len(data.held_out), IMAGES), data.levels)
    return {"draws": draws, "exact": accuracies(flow.core, x, y, draws, ("exact",))["exact"]}


def probed(flow: Flow, data: ImageSet, images: int, cached: ArrayCache | None = None) -> dict[str, float]:
    """What simple classifiers, fitted to so many images, read in what the flow sees, and in the encoder's features.

    `cached` features of the training images spare the encoder.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestCentroid
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    semantic = flow.autoencoder if isinstance(flow, LatentFlow) else None

    def values(split: Any, part: Tensor, cached: ArrayCache | None) -> dict[str, Tensor]:
        if cached is not None and isinstance(semantic, SemanticAutoencoder):
            features = cached(part, torch.zeros_like(part, dtype=torch.bool))
        else:
            x = from_levels(split[part][0], data.levels)
            if not isinstance(semantic, SemanticAutoencoder):
                return {"flat": flow.to_data(x).flatten(1)}
            features = semantic.features(x)
        features = put(features, flow.device).float()
        latents = semantic.from_moments(semantic.compressed(features))
        return {"flat": latents.flatten(1), "features": features.mean(dim=1)}

    def inputs(split: Any, count: int, cached: ArrayCache | None = None) -> tuple[dict[str, Any], Any]:
        parts: dict[str, list[Tensor]] = {}
        indices = torch.tensor(spread(len(split), count))
        for part in indices.split(250):
            for name, value in values(split, part, cached).items():
                parts.setdefault(name, []).append(value.float().cpu())
        return {name: torch.cat(pieces).numpy() for name, pieces in parts.items()}, split.labels[indices].numpy()

    fit, fit_y = inputs(data.train, images, cached)
    held, held_y = inputs(data.held_out, IMAGES)
    figures = {}
    for name in fit:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
        figures[f"linear_{name}"] = float(probe.fit(fit[name], fit_y).score(held[name], held_y))
    figures["nearest_mean"] = float(NearestCentroid().fit(fit["flat"], fit_y).score(held["flat"], held_y))
    return figures


def main() -> None:
    """Run what is missing."""
    parser = options(__doc__, jobs=1)
    parser.add_argument("--probe", action="store_true", help="fit the probes of finished runs to all their images, instead")
    parser.add_argument("--draws", type=int, help="classify with so many draws of noise, instead")
    parser.add_argument("--unseen", action="store_true", help="judge reconstructions of other held-out images, instead")
    o = parser.parse_args()
    if o.run:
        return run(*run_named(o.run, order()))
    wanted = chosen(o, order())
    finished = [run for run in wanted if result_file(*run).is_file()]
    if o.probe:
        return amend(finished, "space_of_all", probed_by_all)
    if o.unseen:
        return amend([run for run in finished if run[0].kind != "pixels"], "unseen", unseen_reconstructed)
    if o.draws:
        return amend(finished, "averaged_more", lambda flow, data, _: averaged(flow, data, o.draws))
    chains: dict[tuple[str, int], list[Run[Arm]]] = {}  # runs that share an autoencoder, which the first of them trains
    for arm, seed in missing(wanted, result_file, o.list):
        chains.setdefault((arm.space or arm.name, seed), []).append((arm, seed))
    if o.list:
        return None
    trained(JUDGE)
    end = time.monotonic() + 3600 * o.hours
    sys.exit(0 if carry_out(__file__, chains.values(), RUNS / "logs", o.jobs, end) else 1)


def probed_by_all(flow: Flow, data: ImageSet, config: RunConfig) -> dict[str, float]:
    """What `probed` finds with all training images, the features of which are kept on disk."""
    cached = None
    if isinstance(flow, LatentFlow) and isinstance(flow.autoencoder, SemanticAutoencoder):
        cached = open_cache(feature_plan(config, data, flow.autoencoder), config, data)
    return probed(flow, data, len(data.train), cached)


def unseen_reconstructed(flow: Flow, data: ImageSet, config: RunConfig) -> dict[str, Any]:
    """Reconstructions of held-out images that are not in the judge's reference."""
    assert isinstance(flow, LatentFlow)
    return reconstructed(flow, data, unseen(data, SAMPLES))


def amend(runs: list[Run[Arm]], name: str, measured: Callable[[Flow, ImageSet, RunConfig], dict[str, Any]]) -> None:
    """Add to the results of finished runs, as `name`, what is `measured` of each flow."""
    for arm, seed in runs:
        file, config = result_file(arm, seed), arm.config(seed)
        flow, _ = load_flow(config.folder, device="auto")
        with torch.no_grad():
            found = measured(flow, load_data(config.data), config)
        write_result(file, json.loads(file.read_text()) | {name: found})
        print(file.name, found, flush=True)


if __name__ == "__main__":
    main()
