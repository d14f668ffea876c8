"""`flowback sample`, and `flowback autotune`, which makes it fast."""

import os
import re
import subprocess
import sys

import torch
from jsonargparse import Namespace

from flowback.cli.common import (
    add_flow,
    add_options,
    add_output,
    checked_output,
    chosen_labels,
    number_list,
    read_options,
    say,
)
from flowback.cli.parser import Verb
from flowback.core.devices import pick_device
from flowback.core.distributed import ENDS_WITH_INPUT, PeerLost, end_with_input, is_first
from flowback.core.errors import InputError
from flowback.core.files import check_place
from flowback.flow.autotune import FILE
from flowback.flow.decoding import DECODERS
from flowback.flow.prior import FILE as PRIOR
from flowback.runs.checkpoint import class_names, flow_folder, load_flow
from flowback.tasks.autotune import ROWS, autotune
from flowback.tasks.sampling import Request, checked_store, in_turn, sample_to_disk
from flowback.training.prior import IMAGES, data_of, fit_to, told

OUTPUTS = (".png", ".npz", "")


def add(verb: Verb) -> None:
    """Add these verbs to the command line."""
    command = verb("sample", _sample)
    add_flow(command)
    add_output(command, "samples.png", "a .png or .npz file, or a folder")
    command.add_argument("--labels", type=str, default=None, help="classes by number or name, like 3,7 (default: all)")
    add_options(command, Request, "labels")
    command.add_argument("--method", type=str, default="auto", help=f"of decoding: auto, {', '.join(DECODERS)}")
    command.add_argument("--batch-size", type=int, default=64, help="images decoded at once; bounds the memory")
    command.add_argument("--processes", type=int, default=1, help="processes that share the cores, or the accelerators")
    command.add_argument("--compile", type=bool, default=False, help="compile decoding; pays for many images")

    command = verb("autotune", _autotune)
    add_flow(command)
    command.add_argument(
        "--rows", type=str, default=",".join(map(str, ROWS)), help="batch sizes; guided images count twice"
    )

    command = verb("fit-prior", _fit_prior)
    add_flow(command)
    command.add_argument("--images", type=int, default=IMAGES, help="of training, and held out, at most; 1.25 passes each")
    command.add_argument("--seed", type=int, default=0, help="of the noise of training")


def _sample(options: Namespace) -> int:
    if options.processes < 1:
        raise InputError(f"processes must be at least 1, got {options.processes}")
    end_with_input(lambda: os._exit(1))
    starts = options.processes > 1 and "RANK" not in os.environ
    device = pick_device(options.device, turn=int(os.environ.get("LOCAL_RANK", 0)))
    flow, _ = load_flow(options.run, options.weights, "cpu" if starts else device)
    names = class_names(options.run, flow)
    labels = chosen_labels(options.labels, names, flow) if options.labels else in_turn(flow.num_classes, options.num)
    request, output = read_options(options, Request, labels=tuple(labels)), checked_output(options, *OUTPUTS)
    if starts:
        checked_store(flow, request, output, options.method, options.batch_size).open()
        _start(options)
        return 0
    d = flow.core.defaults
    if d.weights and is_first():
        s = request.settled(flow)
        said = f"temperature {s.temperature:g}, prior {s.prior}, guidance {s.guidance:g} ({s.guidance_rule})"
        say(f"drawn with {said}; what was not given is the flow's default, by `flowback sweep`")
    notes = sample_to_disk(flow, request, output, options.method, options.batch_size, options.compile)
    if not is_first():
        return 0
    say(f"{options.num} images in {options.output}")
    if not options.labels and options.num < flow.num_classes:
        say(f"they are of {options.num} of the {flow.num_classes} classes, evenly spread")
    residual, fell_back = max(note.residual for note in notes), sum(note.fell_back for note in notes)
    if residual or fell_back:
        say(f"largest residual of parallel decoding {residual:.1e}; {fell_back} blocks went over to the sequential loop")
    not_finite = sum(note.not_finite for note in notes)
    if not_finite:
        say(f"{not_finite} images had numbers that are not finite (grey there); less guidance or temperature may help")
    return 0


def _start(options: Namespace) -> None:
    """Run the same command in several processes by torchrun.

    They end when this process ends, however that happens.

    Raises:
        PeerLost: if one of them ends early.
    """
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
    words += [f"--nproc-per-node={options.processes}", "-m", "--", "flowback", "sample"]
    for name, value in vars(options).items():
        if value is not None and name not in ("run", "processes"):
            words.append(f"--{name.replace('_', '-')}={str(value).lower() if isinstance(value, bool) else value}")
    words += ["--", options.run]
    threads = max(1, torch.get_num_threads() // options.processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), ENDS_WITH_INPUT: "1"}
    pipe = subprocess.PIPE
    # in a session of their own, so that an interruption reaches this process alone, which ends them once
    with subprocess.Popen(
        words, env=environment, stdin=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
    ) as launcher:
        assert launcher.stderr is not None
        try:
            errors = launcher.stderr.read()
        finally:
            launcher.terminate()
            launcher.stderr.read()  # until all have ended
    if launcher.returncode:
        reason = re.search(r"^[\w.: ]*[Ee]rror: (.+)|exitcode: -(\d+)", errors, re.MULTILINE)
        said = f" ({reason[1] or f'signal {reason[2]}'})" if reason else ""
        raise PeerLost(f"a process ended early{said}; what was drawn is kept, run the same command again to resume")


def _autotune(options: Namespace) -> int:
    flow, _ = load_flow(options.run, options.weights, options.device)
    rows, folder = number_list(options.rows, "rows"), flow_folder(options.run)
    check_place(folder / FILE)
    autotune(flow.core, rows, report=say).save(folder)
    say(f"stored in {folder / FILE}")
    return 0


def _fit_prior(options: Namespace) -> int:
    flow, _ = load_flow(options.run, options.weights, options.device)
    if options.weights != "ema":
        raise InputError("a prior is stored with averaged weights; use --weights ema")
    data, folder = data_of(options.run), flow_folder(options.run)
    check_place(folder / PRIOR)
    fit = fit_to(flow, data, options.images, options.seed)
    say(told(fit))
    if fit.prior is None:
        (folder / PRIOR).unlink(missing_ok=True)
    else:
        fit.prior.save(folder)
        say(f"stored in {folder / PRIOR}")
    return 0
