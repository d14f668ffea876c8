"""A run's configuration: one dataclass a section, from which the YAML, `--help` and the checks are made."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Self, cast

import docstring_parser
import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader

from flowback.alignment.alignment import PROJECTORS
from flowback.alignment.gradients import GRADIENTS, STRATEGIES
from flowback.core.errors import InputError
from flowback.data import DataConfig
from flowback.flow.config import FlowConfig
from flowback.flow.student import Lesson, StudentConfig
from flowback.latents.autoencoder import POSTERIORS
from flowback.latents.joint import JointConfig
from flowback.latents.kl import KLConfig
from flowback.latents.losses import ReconstructionConfig
from flowback.latents.semantic import SemanticConfig

READ_YAML: Callable[[str], Any] = get_loader("yaml")
MOST_NODES = 100_000  # of a YAML text
PRECISIONS = ("32-true", "bf16-mixed")
SHARING = ("ddp", "fsdp")
TRAINABLE = ("semantic", "kl")  # kinds of autoencoders, on their own
OF_FLOWS = ("compile", "strategy", "checkpoint_activations", "eval_passes", "init")  # options of `train`
CLASSES = "classes.json"  # names of the classes, in the folder of a run


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """What the flow is aligned with, where, and how.

    Args:
        strategy: none, forward, detach or reverse: where the alignment's gradient flows.
        gradient: of reverse: cached, one_step, a whole number k (terms of the adjoint), exact or sequential.
        at: aligned pairs [block, layer], counted from 1.
        weight: of the alignment loss.
        encoder: efficientnet_lite0 (ships with its weights), dinov2_b, dinov2_l, dinov3_b, clip_b, mae_b, siglip_b, or any
            timm model name.
        encoder_weights: a local file of weights, or random; null for the shipped ones or the hub.
        encoder_precision: 32-true, or bf16-mixed (autocast).
        projector: mlp (REPA's, token by token) or conv (iREPA's, one 3x3 convolution over the grid).
        projector_width: hidden size of the MLP.
        spatial_norm: take what all patches of an image share out of the targets (iREPA).
        separate_projectors: a projector for each aligned pair, instead of one that all share.
        every: n for an alignment at each n-th step, from the first on; the others cost what steps of a plain flow cost.
        reverse_from: of forward: the step after which the gradient flows as in reverse; null for never.
        until: the step after which the flow is trained on likelihood alone; null for never.
        shuffled: a control: every training image gets the features of another one, the same in all steps.
        cache: compute the encoder's features once and keep them on disk.

    Raises:
        InputError: if a value is impossible.
    """

    strategy: str = "none"
    gradient: int | str = "one_step"
    at: list[list[int]] = field(default_factory=list)
    weight: float = 0.1
    encoder: str = "efficientnet_lite0"
    encoder_weights: str | None = None
    encoder_precision: str = "32-true"
    projector: str = "mlp"
    projector_width: int = 1024
    spatial_norm: bool = False
    separate_projectors: bool = False
    every: int = 1
    reverse_from: int | None = None
    until: int | None = None
    shuffled: bool = False
    cache: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in ("none", *STRATEGIES):
            raise InputError(f"alignment.strategy must be one of none, {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if isinstance(self.gradient, str) and self.gradient not in GRADIENTS:
            raise InputError(
                f"alignment.gradient must be one of {', '.join(GRADIENTS)}, or a number, got {self.gradient!r}"
            )
        if any(len(pair) != 2 for pair in self.at):
            raise InputError(f"alignment.at must be pairs of block and layer, like [[3, 2], [4, 2]], got {self.at}")
        for name, allowed in (("encoder_precision", PRECISIONS), ("projector", PROJECTORS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"alignment.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("until", "reverse_from"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"alignment.{name} must be a whole number of at least 1, or null, got {value}")
        if self.every < 1:
            raise InputError(f"alignment.every must be a whole number of at least 1, got {self.every}")
        if self.reverse_from is not None and self.strategy != "forward":
            raise InputError(f"alignment.reverse_from needs alignment.strategy forward, got {self.strategy!r}")
        if self.shuffled and not self.cache:
            raise InputError("alignment.shuffled needs features that are kept; use alignment.cache true with it")
        if self.projector_width < 1:
            raise InputError(f"alignment.projector_width must be at least 1, got {self.projector_width}")


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """In which latents the flow works, if in any.

    Args:
        autoencoder: a folder or hub id of an autoencoder, or a run of `flowback autoencoder train`; null for pixels.
        posterior: which latent of an image: the mean of the autoencoder's posterior, or a sample of it.
        cache: compute the latents once and keep them on disk.
        joint: train an autoencoder together with the flow, of the sections joint and reconstruction.

    Raises:
        InputError: if the posterior does not exist, or another autoencoder is to be trained.
    """

    autoencoder: str | None = None
    posterior: str = "mean"
    cache: bool = True
    joint: bool = False

    def __post_init__(self) -> None:
        if self.joint and (self.autoencoder, self.posterior) != (None, "mean"):
            raise InputError(
                f"latents.joint trains an autoencoder of its own; leave out latents.autoencoder and latents.posterior, "
                f"got {self.autoencoder} and {self.posterior}"
            )
        if self.posterior not in POSTERIORS:
            raise InputError(f"latents.posterior must be one of {', '.join(POSTERIORS)}, got {self.posterior!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the flow is trained. AdamW with linear warm-up and a cosine to zero.

    Args:
        steps: optimizer steps in all; the schedule spans them.
        batch_size: images per step.
        lr: learning rate at the end of the warm-up.
        warmup: steps over which the learning rate rises from zero.
        weight_decay: of AdamW.
        betas: of AdamW.
        grad_clip: largest norm of the gradient; null for no clipping.
        ema: decay of the averaged weights, which are the ones used for sampling and evaluation.
        class_dropout: share of the samples that are trained without their label, for guidance.
        hflip: mirror half of the images.
        seed: of weights, order, noise, flips and dropped labels.
        precision: 32-true, or bf16-mixed (autocast; about twice as fast on CPUs with bfloat16 units, slower on others).
        compile: compile the blocks with torch.compile; needs a C++ compiler on CPUs.
        accelerator: where to run: auto (an accelerator, if there is one), cpu, or another device by PyTorch's name, like
            cuda; `--device` on the command line comes before it.
        devices: processes on each node, one a device, that share every batch; torchrun's number where it starts them.
        nodes: machines, each of which runs this command with its NODE_RANK, MASTER_ADDR and MASTER_PORT, or torchrun.
        strategy: of several processes: ddp has the whole flow in each; fsdp shares weights, gradients and the optimizer's
            state out among them, for flows too large for one device, and writes checkpoints in as many files.
        grad_accum_steps: pieces in which each process takes its share of a batch, to save memory.
        checkpoint_activations: keep only the layers' inputs and compute the rest again, to save more.
        deterministic: only algorithms that repeat bit for bit, slower on accelerators; on a CPU runs repeat anyway.
        log_every: steps between rows of metrics.csv.
        eval_every: steps between evaluations on held-out images.
        eval_images: held-out images in such an evaluation.
        eval_passes: forward passes of one image that an evaluation may take, all processes together. Exact likelihoods
            cost one a class; where that is too much they are of fewer images, or left out, as is said at the start.
        sample_every: steps between sample grids.
        checkpoint_every: steps between checkpoints.
        keep: newest checkpoints that are kept; besides, the one with the best held-out likelihood.
        caches: a folder of caches that `flowback cache` made for this configuration; others are refused. null for the
            user's cache folder, where what is missing is made.
        fit_prior: images to fit a prior to after the last step, at most (see `flowback fit-prior`); each costs 1.25 passes,
            and a step of training 3 for each of its images. 0 for none.
        init: a run, a checkpoint, a flow's folder or hub id whose averaged weights to begin with; what options of `flow`
            leave open is that flow's. null for random weights.
        resume: go on from the newest checkpoint of the run; more steps than before are a longer schedule.
        until: stop at this step as if interrupted; the schedule still spans all steps.

    Raises:
        InputError: if a value is impossible.
    """

    steps: int = 1000
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float | None = 1.0
    ema: float = 0.999
    class_dropout: float = 0.1
    hflip: bool = False
    seed: int = 0
    precision: str = "32-true"
    compile: bool = False
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: str = "ddp"
    grad_accum_steps: int = 1
    checkpoint_activations: bool = False
    deterministic: bool = False
    log_every: int = 10
    eval_every: int = 250
    eval_images: int = 500
    eval_passes: int = 100_000
    sample_every: int = 500
    checkpoint_every: int = 500
    keep: int = 2
    caches: str | None = None
    fit_prior: int = 0
    init: str | None = None
    resume: bool = False
    until: int | None = None

    def __post_init__(self) -> None:
        least = dict.fromkeys(("steps", "batch_size", "keep", "eval_images", "devices", "nodes", "grad_accum_steps"), 1)
        least |= dict.fromkeys(("log_every", "eval_every", "eval_passes", "sample_every", "checkpoint_every"), 1)
        for name, minimum in (least | {"warmup": 0, "fit_prior": 0, "seed": 0, "until": 1}).items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise InputError(f"train.{name} must be a whole number of at least {minimum}, got {value}")
        for name, most in (("seed", 2**63 - 1), ("batch_size", 2**20), ("steps", 10**8 - 1)):
            if getattr(self, name) > most:
                raise InputError(f"train.{name} must be at most {most}, got {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise InputError(f"train.lr must be above 0, got {self.lr}")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise InputError(f"train.grad_clip must be above 0, or null, got {self.grad_clip}")
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(f"train.weight_decay must be at least 0, got {self.weight_decay}")
        if len(self.betas) != 2:
            raise InputError(f"train.betas must be two numbers, got {self.betas}")
        for name, value in (("ema", self.ema), ("beta 1", self.betas[0]), ("beta 2", self.betas[1])):
            if not 0 <= value < 1:
                raise InputError(f"train.{name} must be a number from 0 to 1, 1 excluded, got {value}")
        if not 0 <= self.class_dropout <= 1:
            raise InputError(f"train.class_dropout must be a share from 0 to 1, got {self.class_dropout}")
        for name, allowed in (("precision", PRECISIONS), ("strategy", SHARING)):
            if getattr(self, name) not in allowed:
                raise InputError(f"train.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


class Recipe:
    """What the configurations of all runs share: they are written as YAML, and read back."""

    run: str | None
    data: DataConfig
    train: TrainConfig

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(os.path.expanduser(self.run or f"runs/{self.data.name}"))

    def rooted(self) -> Self:
        """The same from any working folder: what lies on this machine by its whole path."""
        data, train = self.data, self.train
        data = replace(data, path=_whole_path(data.path, True))
        train = replace(train, caches=_whole_path(train.caches, True), init=_whole_path(train.init))
        return replace(cast(Any, self), run=str(self.folder.absolute()), data=data, train=train)

    def to_yaml(self) -> str:
        """All values, in a form that `--config` takes."""
        return yaml.safe_dump(_plain(dataclasses.asdict(cast(Any, self))), sort_keys=False)

    @classmethod
    def read(cls, file: Path) -> Self:
        """The configuration in a recipe, or in a run's config.yaml: of the run in that folder, wherever it was moved.

        Raises:
            InputError: if the file does not hold one.
        """
        try:
            config = cls.from_yaml(file.read_text("utf-8"))
        except (InputError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be used: {error}") from error
        return replace(cast(Any, config), run=str(file.parent)) if is_of_run(file) else config

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """The inverse of `to_yaml`; what a recipe leaves out has its default.

        Raises:
            InputError: if the text is not a configuration.
        """
        parser = _parser(cls)
        try:
            return cls(**vars(parser.instantiate(parser.parse_object(load_yaml(text)))))
        except InputError:
            raise
        except (yaml.YAMLError, ArgumentError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"this is not the configuration of a run ({error})") from error


@cache
def _parser(config: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config)
    return parser


@dataclass(frozen=True, kw_only=True)
class RunConfig(Recipe):
    """A training run.

    Args:
        run: the run's folder; null for runs/ and the name of the data set.
        data: which images.
        flow: the model.
        latents: in which latents it works, if in any.
        joint: the autoencoder that is trained together with it, where `latents.joint` says so.
        reconstruction: the loss of that autoencoder; features are those of the alignment's encoder.
        alignment: with what the flow is aligned, if at all.
        train: how.

    Raises:
        InputError: if sections contradict each other.
    """

    run: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    latents: LatentConfig = field(default_factory=LatentConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not self.latents.joint:
            return
        noise_std, strategy = self.joint.noise_std, self.alignment.strategy
        if self.flow.noise_std not in (FlowConfig().noise_std, noise_std):
            raise InputError(f"flow.noise_std must be joint.noise_std {noise_std}, or left out, got {self.flow.noise_std}")
        if self.joint.align_encoder and (strategy != "forward" or self.alignment.reverse_from is not None):
            later = "" if self.alignment.reverse_from is None else " with alignment.reverse_from"
            raise InputError(f"joint.align_encoder needs alignment.strategy forward, got {strategy!r}{later}")
        object.__setattr__(self, "flow", replace(self.flow, noise_std=noise_std))

    def rooted(self) -> Self:
        """The same from any working folder: what lies on this machine by its whole path."""
        latents, alignment, loss = self.latents, self.alignment, self.reconstruction
        return replace(
            super().rooted(),
            latents=replace(latents, autoencoder=_whole_path(latents.autoencoder)),
            reconstruction=replace(loss, lpips_weights=_whole_path(loss.lpips_weights)),
            alignment=replace(alignment, encoder_weights=_whole_path(alignment.encoder_weights)),
        )


@dataclass(frozen=True, kw_only=True)
class AutoencoderRunConfig(Recipe):
    """A run that trains an autoencoder.

    Args:
        run: the run's folder; null for runs/autoencoder.
        data: which images.
        kind: semantic or kl.
        semantic: options of that kind.
        kl: options of that kind.
        reconstruction: the loss.
        cache: compute a frozen encoder's features once and keep them on disk.
        train: how it is trained.

    Raises:
        InputError: if there is no such kind, or an option of `train` is one of flows.
    """

    run: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    kind: str = "semantic"
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    cache: bool = True
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.kind not in TRAINABLE:
            raise InputError(f"kind must be one of {', '.join(TRAINABLE)}, got {self.kind!r}")
        if self.kind == "kl" and self.reconstruction.features:
            raise InputError(
                f"reconstruction.features must be 0 for kind kl, which has no encoder, got {self.reconstruction.features}"
            )
        _refuse_options_of_flows(self.train, ("class_dropout", *OF_FLOWS), "an autoencoder")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(os.path.expanduser(self.run or "runs/autoencoder"))

    def rooted(self) -> Self:
        """The same from any working folder: what lies on this machine by its whole path."""
        semantic, loss = self.semantic, self.reconstruction
        return replace(
            super().rooted(),
            semantic=replace(semantic, encoder_weights=_whole_path(semantic.encoder_weights)),
            reconstruction=replace(loss, lpips_weights=_whole_path(loss.lpips_weights)),
        )


@dataclass(frozen=True, kw_only=True)
class DistillRunConfig(Recipe):
    """A run that trains a student of a flow.

    Args:
        teacher: the flow: a run's folder, a checkpoint, or a folder of a flow.
        run: the folder of this run; null for students/METHOD in the teacher's.
        method: flow_matching (any number of steps), inverse (one pass), or denoiser (removes the noise of samples).
        noise: of flow_matching: flow, the flow's own z of an image, or independent (plain flow matching, the control).
        guidance: of inverse: the largest guidance scale that it learns; 0 for none.
        features: of inverse: weight of the relative squared error of the encoder's features (a perceptual loss).
        align: of inverse: weight of minus the cosine between the encoder's features and a projected hidden state.
        encoder: a frozen vision model for these two, as in an alignment.
        encoder_weights: a local file of its weights, or random; null for the shipped ones or the hub.
        encoder_precision: 32-true, or bf16-mixed (autocast).
        student: the network.
        data: which images; what is left out is as in the teacher's run.
        cache: compute latents, and the encoder's features of the images, once and keep them on disk.
        train: how it is trained; images are mirrored if they were for the teacher.

    Raises:
        InputError: if a value is impossible, or an option is of another method or of flows.
    """

    teacher: str | None = None
    run: str | None = None
    method: str = "flow_matching"
    noise: str = "flow"
    guidance: float = 0.0
    features: float = 0.0
    align: float = 0.0
    encoder: str = "efficientnet_lite0"
    encoder_weights: str | None = None
    encoder_precision: str = "32-true"
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cache: bool = True
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        Lesson(method=self.method, noise=self.noise, tokens=1, dim=1, classes=0)
        for name in ("guidance", "features", "align"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must be a number of at least 0, got {value}")
            if value and self.method != "inverse":
                raise InputError(f"{name} is an option of method inverse, got {value} with {self.method}")
        if self.encoder_precision not in PRECISIONS:
            raise InputError(f"encoder_precision must be one of {', '.join(PRECISIONS)}, got {self.encoder_precision!r}")
        _refuse_options_of_flows(self.train, OF_FLOWS, "a student")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        place = Path(os.path.expanduser(self.teacher or "runs"))
        place = place.parent.parent if place.parent.name == "checkpoints" else place
        return Path(os.path.expanduser(self.run)) if self.run else place / "students" / self.method

    def rooted(self) -> Self:
        """The same from any working folder: what lies on this machine by its whole path."""
        paths = {"teacher": _whole_path(self.teacher), "encoder_weights": _whole_path(self.encoder_weights)}
        return replace(super().rooted(), **paths)


def _refuse_options_of_flows(train: TrainConfig, names: Iterable[str], what: str) -> None:
    default = TrainConfig()
    for name in names:
        if getattr(train, name) != getattr(default, name):
            raise InputError(f"train.{name} is an option of flows; leave it out for {what}")


def recipe(name: str) -> Path:
    """The file of a recipe that ships with the package: `configs/<name>.yaml`; of an autoencoder, `autoencoder/<name>`."""
    package = Path(__file__).parents[1]
    candidates = (package / "configs" / f"{name}.yaml", package.parents[1] / "configs" / f"{name}.yaml")
    return next(file for file in candidates if file.exists())


def recipe_file(path: str) -> str:
    """The file that a path means: itself, or else a recipe of the package, by `configs/<name>.yaml` or its name alone.

    Raises:
        InputError: if there is neither.
    """
    if Path(path).exists() and not Path(path).is_dir():
        return path
    folder = recipe("digits").parent
    known = {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")}
    name = Path(path).as_posix().removeprefix("configs/").removesuffix(".yaml")
    if name not in known:
        raise InputError(f"there is no file {path}; recipes of the package: {', '.join(sorted(known))}")
    return str(known[name])


def recipes() -> list[str]:
    """The names of the recipes that ship with the package."""
    return sorted(file.stem for file in recipe("digits").parent.glob("*.yaml"))


RENAMED = {  # options of version 0.1.0, by dotted names; None for what is gone
    "train.clip": "train.grad_clip",
    "train.accumulate": "train.grad_accum_steps",
    "train.label_drop": "train.class_dropout",
    "train.flip": "train.hflip",
    "train.cache_latents": "latents.cache",
    "flow.autoencoder": "latents.autoencoder",
    "flow.latent_posterior": "latents.posterior",
    **{f"flow.latent_{name}": None for name in ("channels", "downsample", "scale", "shift", "weights")},
}


def of_earlier_versions(values: Any) -> Any:
    """A configuration as read from YAML, with the names that options have today."""
    if not isinstance(values, dict):
        return values
    values = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    for old, new in RENAMED.items():
        section, name = old.split(".")
        if isinstance(values.get(section), dict) and name in values[section]:
            value = values[section].pop(name)
            if new is not None:
                section, name = new.split(".")
                values.setdefault(section, {})[name] = value
    return values


def is_of_run(file: Path) -> bool:
    """Whether a configuration lies in the folder of a run, and so is of that one."""
    return file.name == "config.yaml" and (file.parent / CLASSES).is_file()


def _whole_path(path: str | None, always: bool = False) -> str | None:
    """A path from the root, if it is one, and not the name of something else; patterns that begin with a brace stay."""
    if path is None or path == "random" or path.startswith("{"):
        return path
    expanded = os.path.expanduser(path)
    return str(Path(expanded).absolute()) if always or os.path.exists(expanded) else path


def load_yaml(text: str) -> Any:
    """A YAML text as jsonargparse reads it (1e-3 is a number), with the names that options have today.

    Raises:
        yaml.YAMLError: if it is none, or its aliases stand for more than any recipe has.
    """
    try:
        if "*" in text and _nodes(yaml.compose(text, yaml.SafeLoader), {}) > MOST_NODES:
            raise yaml.YAMLError(f"its aliases stand for more than {MOST_NODES} values")
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    return of_earlier_versions(READ_YAML(text))


def _nodes(node: Any, known: dict[int, float]) -> float:
    """How many values a YAML node stands for, with those of its aliases; infinite if it contains itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_nodes(part, known) for part in parts)
    return known[id(node)]


def descriptions(config: type) -> dict[str, str]:
    """What the docstring of a dataclass says of its fields, by their names."""
    return {entry.arg_name: entry.description or "" for entry in docstring_parser.parse(config.__doc__ or "").params}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def _plain(value: Any) -> Any:
    """Tuples to lists, all the way down."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
