"""`flowback sample`, and `flowback autotune`, which makes it fast."""

from pathlib import Path

from jsonargparse import Namespace

from flowback.cli.common import add_flow, chosen_labels, class_names, say
from flowback.cli.parser import Verb
from flowback.core.errors import InputError
from flowback.flow.autotune import FILE
from flowback.flow.decoding import DECODERS
from flowback.flow.guidance import SCHEDULES, TARGETS
from flowback.runs.checkpoint import flow_folder, load_flow
from flowback.tasks.autotune import ROWS, autotune
from flowback.tasks.refinement import OBJECTIVES
from flowback.tasks.sampling import Request, sample_to_disk


def add(verb: Verb) -> None:
    """Add these verbs to the command line."""
    command = verb("sample", _sample)
    add_flow(command)
    command.add_argument("-o", "--output", type=str, default="samples.png", help="a .png or .npz file, or a folder")
    command.add_argument("--labels", type=str, default=None, help="classes by number or name, like 3,7 (default: all)")
    command.add_argument("--num", type=int, default=64, help="number of images; the labels take turns")
    command.add_argument("--guidance", type=float, default=0.0, help="guidance scale; 0 for none")
    command.add_argument("--schedule", type=str, default="constant", help=f"of the guidance: {' or '.join(SCHEDULES)}")
    command.add_argument("--guided", type=str, default="both", help=f"what is guided: {', '.join(TARGETS)}")
    command.add_argument("--temperature", type=float, default=1.0, help="standard deviation of the latent noise")
    command.add_argument("--no-denoise", type=bool, default=False, help="keep the training noise in the images")
    command.add_argument("--best-of", type=int, default=1, help="draw so many for each image and keep the flow's favourite")
    command.add_argument("--refine", type=int, default=0, help="gradient steps on z that raise log p(label | image)")
    command.add_argument("--objective", type=str, default="posterior", help=f"of the steps: {' or '.join(OBJECTIVES)}")
    command.add_argument("--seed", type=int, default=0, help="seed; an image is a function of it and of its number")
    command.add_argument("--precision", type=str, default="32-true", help="32-true or bf16-mixed")
    command.add_argument("--method", type=str, default="auto", help=f"of decoding: auto, {', '.join(DECODERS)}")
    command.add_argument("--batch-size", type=int, default=64, help="images decoded at once; bounds the memory")
    command.add_argument("--compile", type=bool, default=False, help="compile decoding; pays for many images")

    command = verb("autotune", _autotune)
    add_flow(command)
    command.add_argument(
        "--rows", type=str, default=",".join(map(str, ROWS)), help="batch sizes; guided images count twice"
    )


def _sample(options: Namespace) -> int:
    flow, _ = load_flow(options.run, options.weights, options.device)
    names = class_names(options.run, flow)
    request = Request(
        num=options.num,
        labels=tuple(chosen_labels(options.labels, names, flow) if options.labels else range(flow.num_classes)) or (-1,),
        denoise=not options.no_denoise,
        **{name: options[name] for name in ("guidance", "schedule", "guided", "temperature", "seed", "precision")},
        **{name: options[name] for name in ("best_of", "refine", "objective")},
    )
    notes = sample_to_disk(flow, request, Path(options.output), options.method, options.batch_size, options.compile)
    say(f"{options.num} images in {options.output}")
    residual, fell_back = max(note.residual for note in notes), sum(note.fell_back for note in notes)
    if residual or fell_back:
        say(f"largest residual of parallel decoding {residual:.1e}; {fell_back} blocks went over to the sequential loop")
    not_finite = sum(note.not_finite for note in notes)
    if not_finite:
        say(f"{not_finite} images had numbers that are not finite (grey there); less guidance or temperature may help")
    return 0


def _autotune(options: Namespace) -> int:
    flow, _ = load_flow(options.run, options.weights, options.device)
    try:
        rows = [int(word) for word in options.rows.split(",")]
    except ValueError as error:
        raise InputError(f"--rows {options.rows} is not a list of numbers; allowed is something like 1,8,32") from error
    folder = flow_folder(options.run)
    autotune(flow.core, rows, report=say).save(folder)
    say(f"stored in {folder / FILE}")
    return 0
