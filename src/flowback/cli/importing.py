"""`flowback import-tarflow`."""

from pathlib import Path

from jsonargparse import Namespace

from flowback.cli.common import say
from flowback.cli.parser import Verb
from flowback.core.files import new_folder
from flowback.flow.convert import import_tarflow


def add(verb: Verb) -> None:
    """Add this verb to the command line."""
    command = verb("import-tarflow", _import_tarflow)
    command.add_argument("checkpoint", type=str, help="a local file, such as afhq_model_8_768_8_8_0.07.pth")
    command.add_argument("folder", type=str, help="where to write the flow; new or empty")
    command.add_argument("--noise-std", type=float, default=None, help="of its training (default: as the name says)")
    command.add_argument("--patch-size", type=int, default=None, help="pixels (default: as the name or the channels say)")
    command.add_argument("--channels", type=int, default=None, help="(default: as the patch size says, or else 3, or 1)")
    command.add_argument("--head-dim", type=int, default=64, help="size of an attention head")


def _import_tarflow(options: Namespace) -> int:
    folder = Path(options.folder)
    with new_folder(folder) as inside:
        flow = import_tarflow(options.checkpoint, options.noise_std, options.patch_size, options.channels, options.head_dim)
        flow.save_pretrained(inside)
    c, (N, D) = flow.config, flow.token_shape
    say(f"{flow.image_size[0]} x {flow.image_size[1]} pixels, {flow.channels} channels, {flow.num_classes or 'no'} classes")
    say(f"patches of {c.patch_size} pixels: {N} tokens of {D} numbers; trained with noise of {c.noise_std:g}")
    say(f"{c.blocks} blocks, layers {c.layers}, width {c.width}, heads of {c.head_dim}, MLP ratio {c.mlp_ratio:g}")
    say(f"the flow is in {folder}")
    return 0
