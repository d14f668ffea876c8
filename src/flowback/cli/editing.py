"""What a flow does with one's own images: encode, decode, interpolate, swap, inpaint."""

from pathlib import Path

import torch
from jsonargparse import Namespace
from torch import Tensor

from flowback.cli.common import (
    add_flow,
    add_images,
    add_output,
    checked_output,
    chosen_labels,
    class_names,
    flow_and_images,
    one_each,
    say,
)
from flowback.cli.parser import Parser, Verb
from flowback.core.errors import InputError
from flowback.data import load_image
from flowback.data.pictures import save_grid, save_images
from flowback.runs.checkpoint import load_flow
from flowback.tasks.editing import inpaint, interpolate, swap_class


def add(verb: Verb) -> None:
    """Add these verbs to the command line."""
    command = verb("encode", _encode)
    _add_flow_and_images(command)
    add_output(command, "z.safetensors", "a .safetensors file")

    command = verb("decode", _decode)
    add_flow(command)
    command.add_argument("file", type=str, help="a .safetensors file of encode")
    command.add_argument("--labels", type=str, default=None, help="classes to decode with (default: those in the file)")
    add_output(command, "decoded.png", "a .png file for a grid, or a folder")

    command = verb("interpolate", _interpolate)
    _add_flow_and_images(command)
    command.add_argument("--steps", type=int, default=8, help="images on the way, ends included")
    add_output(command, "interpolation.png", "a .png file")

    command = verb("swap", _swap)
    _add_flow_and_images(command)
    command.add_argument("--to", type=str, default=None, help="classes, by number or name (default: all)")
    add_output(command, "swapped.png", "a .png file")

    command = verb("inpaint", _inpaint)
    _add_flow_and_images(command)
    command.add_argument("--mask", type=str, default=None, help="an image file: bright where to draw")
    command.add_argument("--box", type=str, default=None, help="or LEFT,TOP,WIDTH,HEIGHT in pixels")
    command.add_argument("--num", type=int, default=4, help="drawings of each image")
    command.add_function_arguments(inpaint, as_group=False, skip={"flow", "x", "mask", "y", "generator"})
    command.add_argument("--seed", type=int, default=0, help="seed of the drawings")
    add_output(command, "inpainted.png", "a .png file")


def _add_flow_and_images(command: Parser) -> None:
    add_flow(command)
    add_images(command)
    command.add_argument("--labels", type=str, default=None, help="their classes (default: as the flow classifies them)")


def _encode(options: Namespace) -> int:
    from safetensors.torch import save_file

    output = checked_output(options, ".safetensors")
    flow, images, y = flow_and_images(options)
    with torch.no_grad():
        z, log_det = flow.encode(images, y)
        log_prob = flow.log_prob(images, y)
    if output.is_dir():
        raise InputError(f"output {output} is a folder; expected a file's name")
    output.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"z": z, "log_det": log_det, "log_prob": log_prob, "labels": y}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, output)
    say(f"z {list(z.shape)}, log_det, log_prob and labels of {len(z)} images in {output}")
    return 0


def _decode(options: Namespace) -> int:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    output = checked_output(options, ".png", "")
    flow, _ = load_flow(options.run, options.weights, options.device)
    try:
        content = load_file(options.file)
        z, y = content["z"], content["labels"]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{options.file} is not a file that encode wrote ({error})") from error
    if not len(z):
        raise InputError(f"{options.file} holds no images; expected at least one")
    if options.labels:
        y = one_each(chosen_labels(options.labels, class_names(options.run, flow), flow), len(z))
    with torch.no_grad():
        save_images(flow.decode(z, y), output)
    say(f"{len(z)} images in {output}")
    return 0


def _interpolate(options: Namespace) -> int:
    output = checked_output(options, ".png")
    flow, images, y = flow_and_images(options)
    if len(images) < 2:
        raise InputError(f"{len(images)} image has no other to go to; expected at least 2")
    x = interpolate(flow, images[:-1], images[1:], options.steps, y[:-1], y[1:])
    save_grid(x.flatten(0, 1), output, columns=options.steps)
    say(f"{len(x)} walks of {options.steps} images in {output}")
    return 0


def _swap(options: Namespace) -> int:
    output = checked_output(options, ".png")
    flow, images, y = flow_and_images(options)
    targets = chosen_labels(options.to, class_names(options.run, flow), flow)
    columns = [images, *(swap_class(flow, images, y, torch.full_like(y, k)) for k in targets)]
    save_grid(torch.stack([c.cpu() for c in columns], dim=1).flatten(0, 1), output, columns=len(columns))
    say(f"{len(images)} images as {len(targets)} classes in {output}")
    return 0


def _inpaint(options: Namespace) -> int:
    output = checked_output(options, ".png")
    if options.num < 1 or not 0 <= options.seed < 2**63:
        raise InputError(f"--num must be at least 1 and --seed 0 to 2^63 - 1, got {options.num} and {options.seed}")
    flow, images, y = flow_and_images(options)
    mask = _mask(options, *flow.image_size)
    many = images.repeat_interleave(options.num, dim=0)
    generator = torch.Generator().manual_seed(options.seed)
    result = inpaint(flow, many, mask, y.repeat_interleave(options.num), options.steps, options.tries, generator)
    drawn = result.x.cpu().view(len(images), options.num, *images.shape[1:])
    masked = torch.where(mask, torch.zeros_like(images), images)
    rows = torch.cat([images[:, None], masked[:, None], drawn], dim=1)
    save_grid(rows.flatten(0, 1), output, columns=options.num + 2)
    accepted = "" if not options.steps else f"; {100 * float(result.acceptance.mean()):.0f} % of the steps were accepted"
    say(f"{len(many)} drawings in {output}{accepted}")
    return 0


def _mask(options: Namespace, height: int, width: int) -> Tensor:
    if (options.mask is None) == (options.box is None):
        raise InputError("where to draw is not clear; use either --mask or --box")
    if options.mask is not None:
        return (load_image(Path(options.mask), (height, width), 1) > 127)[None]
    try:
        left, top, across, down = (int(word) for word in options.box.split(","))
    except ValueError as error:
        raise InputError(f"--box {options.box} is not a box; expected four numbers, LEFT,TOP,WIDTH,HEIGHT") from error
    if not (0 <= left < left + across <= width and 0 <= top < top + down <= height):
        raise InputError(
            f"--box {options.box} does not lie in the image; expected what lies within {width}x{height} pixels"
        )
    mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
    mask[..., top : top + down, left : left + across] = True
    return mask
