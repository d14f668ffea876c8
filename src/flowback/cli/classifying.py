"""`flowback classify`."""

from jsonargparse import Namespace

from flowback.cli.common import add_flow, add_images, check_counts, refuse_unread, say
from flowback.cli.parser import Verb
from flowback.runs.checkpoint import class_names, load_flow
from flowback.tasks.classify import (
    RULES,
    ClassStatistics,
    classify_files,
    likeliest,
    readable,
    rule_named,
    usual_rule,
)


def add(verb: Verb) -> None:
    """Add this verb to the command line."""
    command = verb("classify", _classify)
    add_flow(command)
    add_images(command)
    command.add_argument("--rule", type=str, default=None, help=f"{', '.join(RULES)} (default: as evaluated, see the docs)")
    command.add_argument("--top", type=int, default=3, help="classes to print for each image")
    command.add_argument("--draws", type=int, default=4, help="draws of the training noise that are averaged")


def _classify(options: Namespace) -> int:
    check_counts(options, "top", "batch_size")
    flow, _ = load_flow(options.run, options.weights, options.device)
    names = class_names(options.run, flow)
    statistics = ClassStatistics.load(flow.core.folder, flow.num_classes)
    rule = options.rule or usual_rule(statistics)
    rule_named(rule, flow.num_classes)
    kind, unread = "", []
    for part in classify_files(flow, options.images, [rule], options.draws, options.batch_size, statistics):
        unread += part.unread  # the others are classified all the same
        if not part.files:
            continue
        shown, kind = readable(rule, part.scores[rule], statistics)
        form = "{} {:+.2f}" if kind == "scores" else "{} {:.3f}"
        top = shown.topk(min(options.top, flow.num_classes), dim=1)
        for file, best, values, classes in zip(
            part.files, likeliest(part.scores[rule]).tolist(), top.values.tolist(), top.indices.tolist(), strict=True
        ):
            if best < 0:
                say(f"{file}: no score is a finite number")
                continue
            say(f"{file}: {', '.join(form.format(names[k], value) for k, value in zip(classes, values, strict=True))}")
    if kind:
        say(f"{kind}, by {rule}" + ("" if statistics else "; `flowback evaluate` makes a better rule and calibrates it"))
    refuse_unread(unread)
    return 0
