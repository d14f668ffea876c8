"""`flowback classify`."""

import torch
from jsonargparse import Namespace

from flowback.cli.common import add_flow, add_images, say
from flowback.cli.parser import Verb
from flowback.core.errors import InputError
from flowback.data import as_images
from flowback.runs.checkpoint import class_names, load_flow
from flowback.tasks.classify import RULES, ClassStatistics, classify, likeliest, listed_only, rule_named

SHOWN = 5  # files that cannot be read and are named


def add(verb: Verb) -> None:
    """Add this verb to the command line."""
    command = verb("classify", _classify)
    add_flow(command)
    add_images(command)
    command.add_argument("--rule", type=str, default=None, help=f"{', '.join(RULES)} (default: as evaluated, see the docs)")
    command.add_argument("--top", type=int, default=3, help="classes to print for each image")
    command.add_argument("--draws", type=int, default=4, help="draws of the training noise that are averaged")


def _classify(options: Namespace) -> int:
    for name, value in (("top", options.top), ("batch-size", options.batch_size)):
        if value < 1:
            raise InputError(f"--{name} must be a whole number of at least 1, got {value}")
    flow, _ = load_flow(options.run, options.weights, options.device)
    names = class_names(options.run, flow)
    statistics = ClassStatistics.load(flow.core.folder, flow.num_classes)
    rule = options.rule or ("shortlist_3" if statistics else "single_gradient")
    rule_named(rule, flow.num_classes)
    calibrated = statistics is not None and rule in statistics.temperatures
    likely = calibrated or rule == "exact" or rule.startswith("shortlist")
    form, unread = "{} {:.3f}" if likely else "{} {:+.2f}", []
    for start in range(0, len(options.images), options.batch_size):
        files, images = [], []
        for file in options.images[start : start + options.batch_size]:
            try:
                images.append(as_images(file, flow.image_size, flow.channels))
                files.append(file)
            except InputError as error:  # the others are classified all the same
                unread.append(str(error))
        if not images:
            continue
        scores = classify(flow, torch.cat(images), rule=rule, draws=options.draws, batch_size=options.batch_size).cpu()
        scores = listed_only(scores)
        shown = scores.softmax(dim=1) if likely else scores
        if calibrated and statistics is not None:
            shown = statistics.probabilities(rule, scores)
        top = shown.topk(min(options.top, flow.num_classes), dim=1)
        for file, best, values, classes in zip(
            files, likeliest(scores).tolist(), top.values.tolist(), top.indices.tolist(), strict=True
        ):
            if best < 0:
                say(f"{file}: no score is a finite number")
                continue
            say(f"{file}: {', '.join(form.format(names[k], value) for k, value in zip(classes, values, strict=True))}")
    if len(unread) < len(options.images):
        what = "calibrated probabilities" if calibrated else "probabilities, not calibrated" if likely else "scores"
        say(f"{what}, by {rule}" + ("" if statistics else "; `flowback evaluate` makes a better rule and calibrates it"))
    if unread:
        more = f"; {len(unread) - SHOWN} more cannot be read" if len(unread) > SHOWN else ""
        raise InputError("; ".join(unread[:SHOWN]) + more)
    return 0
