"""`flowback classify`."""

from jsonargparse import Namespace

from flowback.cli.common import add_flow, add_images, class_names, flow_and_clean_images, say
from flowback.cli.parser import Verb
from flowback.core.errors import InputError
from flowback.tasks.classify import RULES, ClassStatistics, classify


def add(verb: Verb) -> None:
    """Add this verb to the command line."""
    command = verb("classify", _classify)
    add_flow(command)
    add_images(command)
    command.add_argument("--rule", type=str, default=None, help=f"{', '.join(RULES)} (default: as evaluated, see the docs)")
    command.add_argument("--top", type=int, default=3, help="classes to print for each image")
    command.add_argument("--draws", type=int, default=4, help="draws of the training noise that are averaged")


def _classify(options: Namespace) -> int:
    if options.top < 1:
        raise InputError(f"--top must be a whole number of at least 1, got {options.top}")
    flow, images = flow_and_clean_images(options)
    names = class_names(options.run, flow)
    statistics = ClassStatistics.load(flow.core.folder, flow.num_classes)
    rule = options.rule or ("shortlist_3" if statistics else "single_gradient")
    scores = classify(flow, images, rule=rule, draws=options.draws).cpu()
    calibrated = statistics is not None and rule in statistics.temperatures
    likely = calibrated or rule == "exact" or rule.startswith("shortlist")
    shown = scores.softmax(dim=1) if likely else scores
    if calibrated and statistics is not None:
        shown = statistics.probabilities(rule, scores)
    top = shown.topk(min(options.top, flow.num_classes), dim=1)
    for file, values, classes in zip(options.images, top.values.tolist(), top.indices.tolist(), strict=True):
        form = "{} {:.3f}" if likely else "{} {:+.2f}"
        say(f"{file}: {', '.join(form.format(names[k], value) for k, value in zip(classes, values, strict=True))}")
    what = "calibrated probabilities" if calibrated else "probabilities, not calibrated" if likely else "scores"
    say(f"{what}, by {rule}" + ("" if statistics else "; `flowback evaluate` makes a better rule and calibrates it"))
    return 0
