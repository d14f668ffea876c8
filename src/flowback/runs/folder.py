"""The folder of a run: opened by one process at a time, begun once, resumed as what it was."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from filelock import AcquireReturnProxy, MarkerSoftFileLock, Timeout, UnixFileLock, WindowsFileLock

from flowback.core.console import say
from flowback.core.distributed import is_first
from flowback.core.errors import InputError
from flowback.core.files import read_json, write_whole
from flowback.data import DataConfig, ImageSet, Split, load_data
from flowback.data.batches import Tolerance
from flowback.data.inventory import Inventory, refuse_other_classes
from flowback.data.sources import DiskSplit
from flowback.data.splits import evaluated
from flowback.latents import Flow, LatentFlow
from flowback.runs import checkpoint
from flowback.runs.checkpoint import State
from flowback.runs.config import CLASSES, Recipe, RunConfig, flat

# what may change when a run goes on
FREE = {"run", "teacher", "data.workers", "data.path", "data.unreadable", "train.steps"}
FREE |= {f"train.{name}" for name in ("resume", "until", "keep", "accelerator", "devices", "nodes", "strategy")}
FREE |= {f"train.{name}" for name in ("grad_accum_steps", "compile", "checkpoint_activations", "deterministic")}
FREE |= {f"train.{name}" for name in ("caches", "eval_images", "eval_passes", "fit_prior")} | {
    "latents.cache",
    "alignment.cache",
}
FREE |= {f"train.{what}_every" for what in ("log", "eval", "sample", "checkpoint")}

NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # what file systems say that have none
DATA = "data.npz"  # the Inventory of the data when the run began


def training_data(config: Recipe, given: ImageSet | None = None) -> ImageSet:
    """The data of a run that begins, or of one that goes on, with the split that it had; says what was found.

    Args:
        config: of the run.
        given: the data, if `config` does not name it.

    Raises:
        InputError: if there is none; or if the run goes on, and anything of it differs.
    """
    if config.train.resume and (config.folder / "config.yaml").is_file():
        _refuse_other(config.rooted())
        data = _known(config.folder, config.data, given, exact=True, recipe=type(config))
    else:
        data = given or load_data(config.data)
        if config.train.init is not None:
            data = _unseen(data, Path(os.path.expanduser(config.train.init)))
    for note in data.notes:
        _say(note)
    _tolerate(data.held_out, config.data.unreadable)
    return data


def run_of(folder: str | Path) -> Path | None:
    """The run to which a run's folder or a checkpoint belongs; None for other folders."""
    places = (Path(folder), Path(folder).absolute().parent.parent)
    return next((place for place in places if (place / "config.yaml").is_file()), None)


def run_data(run: Path, config: DataConfig, recipe: type[Recipe] = RunConfig) -> ImageSet:
    """The data of a run as it was trained on: its classes and split. Images that came or changed since are left out.

    Args:
        run: the run's folder.
        config: of its data.
        recipe: the kind of its configuration.

    Raises:
        InputError: if classes have other names, or no image of a split is left.
    """
    data = _known(run, config, None, False, recipe)
    for note in data.notes:
        _say(note)
    for split in (data.train, data.held_out):
        _tolerate(split, config.unreadable)
    return data


def other_data(run: Path | None, config: DataConfig) -> ImageSet:
    """Data to measure a flow on that is not its run's; what that was trained on is not held out.

    Args:
        run: the run's folder, if there is one.
        config: of the data.

    Raises:
        InputError: if there is none, or all was trained on.
    """
    data = load_data(config) if run is None else _unseen(load_data(config), run)
    for note in data.notes:
        _say(note)
    return data


def check_fit(flow: Flow, data: ImageSet) -> None:
    """Whether a flow takes the images of a data set, and has its classes or none.

    Raises:
        InputError: if it does not.
    """
    levels = None if isinstance(flow, LatentFlow) else flow.levels
    facts = [("size", tuple(data.size), tuple(flow.image_size)), ("channels", data.channels, flow.channels)]
    facts += [("levels", data.levels, levels)] * (levels is not None)
    facts += [("number of classes", len(data.classes), flow.num_classes)] * (flow.num_classes > 0)
    for name, found, wanted in facts:
        if found != wanted:
            raise InputError(f"the {name} of the data {data.name} must be {wanted} for this flow, got {found}")


def _unseen(data: ImageSet, start: Path) -> ImageSet:
    """Data without those held-out images that a flow was trained on: of a run, or of a checkpoint of one."""
    for place in (start, start.absolute().parent.parent):
        begun = Inventory.read(place / DATA) if (place / DATA).is_file() else None
        data = data if begun is None else begun.unseen(data)
    return data


def _known(run: Path, config: DataConfig, data: ImageSet | None, exact: bool, recipe: type[Recipe] = RunConfig) -> ImageSet:
    """The data of a run that began; those of version 0.1.0 kept the names of the classes alone, if `classes.json`."""
    begun = Inventory.read(run / DATA)
    if data is None:
        if config.channels is None:
            config = replace(config, channels=recipe.read(run / "config.yaml").data.channels)
        data = load_data(config, earlier=begun is None)
    if begun is not None:
        return begun.split(data, exact, config.unreadable)
    if isinstance(data.train, DiskSplit):
        data = replace(data, notes=(f"{run} has no {DATA}; its split is drawn as version 0.1.0 did",))
    try:
        refuse_other_classes(read_json(run / CLASSES) if (run / CLASSES).is_file() else data.classes, data.classes)
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{run / CLASSES} cannot be read ({error}); expected a list of names, or no such file") from error
    return data


def _tolerate(split: Split, unreadable: float) -> None:
    """Let the next image of its class stand for one that cannot be read, as far as a share of them allows."""
    if isinstance(split, DiskSplit):
        split.tolerance = Tolerance(unreadable, len(split), _say)


def _say(text: str) -> None:
    if is_first():
        say(text)


@contextmanager
def open_run(config: Recipe, data: ImageSet, first: bool = True) -> Iterator[Path | None]:
    """Begin a run's folder, or find the newest whole checkpoint to resume from; nobody else can train in it meanwhile.

    Args:
        config: of the run.
        data: of the run, as `training_data` gives it.
        first: whether this is the process that writes; the others are told what it found.

    Raises:
        InputError: if the folder holds another run or none, or another process trains in it; or if more than
            `data.unreadable` of the held-out images that will be looked at cannot be read.
    """
    if not first:
        yield None
        return
    run = config.folder
    found = checkpoint.newest(run)
    if found is not None and not config.train.resume:
        raise InputError(f"{run} holds a run already; use --train.resume to go on, or another --run")
    if found is None and config.train.resume:
        raise InputError(f"{run} has no checkpoint to resume from; start it without --train.resume")
    if isinstance(data.held_out, DiskSplit):
        for index in evaluated(len(data.held_out), config.train.eval_images):
            data.held_out[[index]]  # now, and not at the first evaluation
    run.mkdir(parents=True, exist_ok=True)
    if not any((run / name).exists() for name in (".lock", ".lock.process")):
        for name in (CLASSES, "config.yaml", DATA, "metrics.csv"):
            if found is None and (run / name).exists():
                raise InputError(f"{run / name} is not of a run, and would be overwritten; use another --run")
    with _lock(run):
        rooted = config.rooted()
        if config.train.resume:
            begun = _refuse_other(rooted)
            found = _newest_whole(run)
            _settle_steps(begun, config.train.steps, found)
        else:
            write_whole(run / CLASSES, lambda file: file.write_text(json.dumps(data.classes) + "\n", "utf-8"))
            Inventory.of(data).write(run / DATA)
        again = replace(cast(Any, rooted), train=replace(rooted.train, resume=False, until=None))  # as it is run to its end
        if isinstance(data.train, DiskSplit):
            again = replace(again, data=replace(again.data, channels=data.channels))  # as found by looking
        write_whole(run / "config.yaml", lambda file: file.write_text(again.to_yaml(), "utf-8"))
        yield found


def _lock(run: Path) -> AcquireReturnProxy:
    """A lock on a run's folder that is held until the `with` ends, or the process, however that ends.

    Raises:
        InputError: if another process holds it, or none can.
    """
    kind = WindowsFileLock if os.name == "nt" else UnixFileLock
    try:
        try:
            return kind(run / ".lock", fallback_to_soft=False).acquire(timeout=0)
        except OSError as error:
            if error.errno not in NO_LOCKS:  # where there are locks, a marker would not be seen by those who hold them
                raise
        return _mark(run / ".lock.process")
    except Timeout as error:
        raise InputError(f"another process trains in {run}; use another --run, or wait") from error
    except OSError as error:
        raise InputError(f"{run} cannot be locked ({error.strerror}); expected a folder to write in") from error


def _mark(file: Path) -> AcquireReturnProxy:
    """A file that names this process, in place of a lock; that of a process of this machine which is gone is taken over.

    Raises:
        InputError: if it names another process, which runs, or of which this machine cannot know.
    """
    marker = MarkerSoftFileLock(file)
    try:
        return marker.acquire(timeout=0)
    except Timeout as error:
        owner = marker.owner
        who = f"process {owner.pid} on {owner.hostname}" if owner else "a process"
        raise InputError(
            f"{file} says that {who} trains here; wait, use another --run, or delete that file if the process is gone"
        ) from error


def _refuse_other(config: Recipe) -> int:
    """Refuse another configuration than the run's, but for what is `FREE`; returns how many steps it was begun for."""
    begun = type(config).read(config.folder / "config.yaml")  # old names are today's, options that came later have defaults
    before, now = (flat(asdict(cast(Any, c))) for c in (begun.rooted(), config))
    for options in (before, now):  # what a run began with need not be there any more
        options["train.init"] = options["train.init"] and str(Path(options["train.init"]).absolute())
    for name in now:
        found = name == "data.channels" and now[name] is None  # by looking at the images, as it was then
        if name not in FREE and before.get(name) != now[name] and not found:
            raise InputError(
                f"{name} was {before.get(name)} when {config.folder} began and is {now[name]}; expected the same, "
                "or a new run that begins from this one, by --init"
            )
    return begun.train.steps


def _settle_steps(begun: int, now: int, found: Path) -> None:
    """Refuse fewer steps than a checkpoint has done, and say if they are not those of before."""
    done = State.read(found).step
    if now < done:
        raise InputError(f"train.steps must be at least {done}, which {found} has done, got {now}")
    if now != begun:
        say(f"{now} steps in place of {begun}; the learning rate follows the schedule of these")


def _newest_whole(run: Path) -> Path:
    """The newest checkpoint that is what was written; damaged ones are named and passed over."""
    for folder in checkpoint.all_of(run):
        problem = checkpoint.damage(folder)
        if problem is None:
            return folder
        say(f"passed over: {problem}")
    raise InputError(f"{run} has no whole checkpoint to resume from; use another --run")
