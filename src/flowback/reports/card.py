"""Publishing a flow: a folder that `TarFlow.from_pretrained` and the Hugging Face hub take, with a model card.

The card says what the run knows and nothing else: a figure stands with what it holds for, and the unknown is called so.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from flowback.core.console import command
from flowback.core.errors import InputError
from flowback.core.files import new_folder, read_json
from flowback.flow.io import CARD, check_repo_id, read_description, upload
from flowback.flow.student import Student
from flowback.latents import Flow, LatentFlow
from flowback.runs.checkpoint import State, load_flow, newest
from flowback.runs.config import RunConfig
from flowback.runs.folder import run_data
from flowback.tasks.classify import ClassStatistics
from flowback.tasks.score import HeldOut

CLASSES = "classes.json"
PUBLIC = {  # data set and its number of classes -> its name on the hub
    ("fashion_mnist", 10): "zalando-datasets/fashion_mnist",
    ("imagenet", 1000): "ILSVRC/imagenet-1k",
}
DENSITIES = {
    "nats_per_dim": "nats per dimension, of {seen} with the noise of training",
    "bits_per_dim": "bits per dimension of the pixels: an upper bound",
    "bits_per_dim_importance_weighted": "bits per dimension of the pixels: a tighter upper bound, importance-weighted",
    "latent_bits_per_dim": "latent bits per dimension: of noised latents, not of pixels",
}
FIDELITY = {"fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID", "precision": "precision", "recall": "recall"}
SHOWN_CLASSES = 20  # names in the card; all are in classes.json


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is known of a flow besides itself; None where it is not known.

    Args:
        weights: which weights of which checkpoint.
        config: of the run that trained it.
        state: where the run stood.
        images: how many for training, and held out.
        classes: their names.
        evaluation: what evaluation.json holds of these weights.
        evaluated: the weights that evaluation.json is of instead, where they are others.
    """

    weights: str | None = None
    config: RunConfig | None = None
    state: State | None = None
    images: tuple[int, int] | None = None
    classes: list[str] | None = None
    evaluation: dict[str, Any] | None = None
    evaluated: str | None = None


def export(
    run: str,
    folder: Path,
    weights: str = "ema",
    license: str | None = None,
    with_autoencoder: bool = False,
    repo_id: str | None = None,
) -> None:
    """Write the flow of a run, and a card on all that the run knows of it, into a new folder.

    Args:
        run: the run's folder; or a checkpoint, a folder or hub id of a flow, of which less is known.
        folder: new or empty.
        weights: ema or raw.
        license: the hub's identifier of one, like apache-2.0; None is called none.
        with_autoencoder: copy the autoencoder of a latent flow though it is on the hub; a local one always goes along.
        repo_id: where the folder will be on the hub, for the card.

    Raises:
        InputError: if the folder is not empty, the license is no identifier, or the run or its autoencoder is not usable.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise InputError(f"license {license!r} is no identifier; expected one of the hub's, like apache-2.0 or mit")
    with new_folder(folder) as inside:
        flow, measured = load_flow(run, weights)
        provenance = read_provenance(Path(run), flow, measured)
        if isinstance(flow, LatentFlow):
            flow.save_portable(inside, with_autoencoder)
        else:
            flow.save_portable(inside)
        if weights == "ema":  # what is stored is of these
            for stored in (ClassStatistics.load(flow.core.folder, flow.num_classes), HeldOut.load(flow)):
                if stored is not None:
                    stored.save(inside)
        if provenance.classes is not None:
            (inside / CLASSES).write_text(json.dumps(provenance.classes) + "\n")
        card = model_card(flow, repo_id or folder.resolve().name, provenance, license, (inside / "autoencoder").is_dir())
        (inside / CARD).write_text(card, "utf-8", "backslashreplace")  # names that are no text


def read_provenance(run: Path, flow: Flow, weights: str) -> Provenance:
    """What a run knows of its flow; of a folder that is no run only the names of the classes.

    Raises:
        InputError: if a file of the run is not what it should be.
    """
    classes = _read((run if run.is_dir() else flow.core.folder or run) / CLASSES)
    if not isinstance(classes, list) or len(classes) != flow.num_classes:
        classes = None
    checkpoint, file = newest(run), run / "config.yaml"
    if checkpoint is None or not file.is_file():
        return Provenance(classes=classes)
    config, evaluation = RunConfig.read(file), _read(run / "evaluation.json")
    try:
        data = run_data(run, config.data)
        images = len(data.train), len(data.held_out)
    except InputError:  # they are not here any more
        images = None
    state = State.read(checkpoint)
    try:
        evaluated = None if evaluation is None else evaluation["weights"]
    except (TypeError, KeyError) as error:
        raise InputError(f"{run / 'evaluation.json'} is not of a run ({error}); evaluate the run again") from error
    known = Provenance(weights=weights, config=config, state=state, images=images, classes=classes)
    if evaluated == weights:
        return replace(known, evaluation=evaluation)
    return replace(known, evaluated=evaluated)


def model_card(
    flow: Flow, name: str, provenance: Provenance = Provenance(), license: str | None = None, travels: bool = False
) -> str:
    """The model card of a flow, in Markdown with the hub's YAML in front.

    Args:
        flow: the flow.
        name: what `TarFlow.from_pretrained` will be given.
        provenance: what else is known.
        license: the hub's identifier, or None.
        travels: whether the autoencoder of a latent flow lies beside it.
    """
    from jinja2 import Environment, PackageLoader

    from flowback import __version__

    p, known = provenance, flow.autoencoder.config if isinstance(flow, LatentFlow) else None
    autoencoder = known and known.title
    aligned = p.config is not None and p.config.alignment.strategy != "none"
    public = PUBLIC.get((p.config.data.name, flow.num_classes)) if p.config else None
    tags = {"normalizing-flow": True, "tarflow": True, "image-generation": True, "class-conditional": flow.num_classes > 0}
    tags |= {"latent": autoencoder is not None, "representation-alignment": aligned}
    front = {"library_name": "flowback", "pipeline_tag": "unconditional-image-generation"}
    front |= {"tags": [tag for tag, holds in tags.items() if holds]}
    front |= {"license": license} if license else {}
    front |= {"datasets": [public]} if public else {}
    environment = Environment(
        loader=PackageLoader("flowback.reports"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"short": _short, "code": _code}
    e, where, density = p.evaluation or {}, None, (p.evaluation or {}).get("density")
    if autoencoder is not None:
        where = "the autoencoder in `autoencoder/`" if travels else _code(autoencoder)
        if known is not None and known.name is None:
            where = f"{autoencoder}, and part of it"
        density = density and density.replace(autoencoder, where)
    return environment.get_template("model_card.md").render(
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        name=name,
        flow=flow,
        f=flow.config,
        known=p,
        e=e,
        aligned=aligned,
        autoencoder=where,
        travels=travels,
        license=license,
        version=__version__,
        parameters=sum(parameter.numel() for parameter in flow.parameters()),
        shown_classes=SHOWN_CLASSES,
        student=flow.core.student and of_student(flow.core.student),
        densities=[
            (title.format(seen="images" if autoencoder is None else "latents"), e[figure])
            for figure, title in DENSITIES.items()
            if figure in e
        ],
        density=density,
        accuracies=e.get("classification")
        or [{"rule": r, "accuracy": share} for r, share in e.get("accuracy", {}).items()],
        fidelity=[
            {**row, "figure": title, "value": row[figure], "deviation": row.get(f"{figure}_std"), "source": _source(row)}
            | {"reference": Path(row["reference"]).name}
            for row in [*([e["fidelity"]] if "fidelity" in e else []), *e.get("guidance_sweep", [])]
            for figure, title in FIDELITY.items()
            if figure in row
        ],
    )


def of_student(student: Student) -> str:
    """What the card of a flow says of the student beside it."""
    method = student.lesson.method.replace("_", " ")
    return (
        'A student lies beside the flow, which draws in a few passes: `flow.sample(2, sampler="student")`. '
        f"It was trained on the same images ({method}). Densities are the flow's."
    )


def push_folder(folder: str | Path, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Upload a folder that `export` wrote to the hub: a flow's files and the card, nothing else of it.

    Files of an earlier flow there that this one does not have are deleted. Arguments and errors as `push_to_hub` of a flow.

    Returns:
        The address of the repository.
    """
    check_repo_id(repo_id)
    read_description(Path(folder))
    try:
        return upload(Path(folder), repo_id, private, token)
    except InputError as error:
        later = command("hf", "upload", repo_id, Path(folder))
        raise InputError(f"{error}; this sends the folder later: {later}") from error


def _read(file: Path) -> Any:
    """What a JSON file holds, or None where there is none."""
    if not file.is_file():
        return None
    try:
        return read_json(file)
    except ValueError as error:
        raise InputError(f"{file} cannot be read ({error}); expected what flowback wrote") from error


def _source(row: dict[str, Any]) -> str:
    """How the samples of a fidelity came about; of a place on disk only its name."""
    labels = {"shares": ", classes as often as in the data", "equal": ", all classes equally often"}
    drawn = "" if row.get("sampler") in (None, "exact") else f" by the {row['sampler']}"
    return Path(row.get("samples_from", "not recorded")).name + drawn + labels.get(row.get("labels") or "", "")


def _short(value: Any) -> str:
    """A number as the card shows it; null is one that was not finite."""
    if value is None:
        return "not finite"
    if isinstance(value, tuple):  # a number for each channel
        return ", ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _code(text: Any) -> str:
    """Foreign text as code, so that nothing in it is taken for Markdown."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39))}`"
