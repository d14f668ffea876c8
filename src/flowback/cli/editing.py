"""What a flow does with one's own images: encode, decode, interpolate, swap, inpaint."""

from functools import partial
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
    kept,
    labelled_batches,
    one_each,
    say,
)
from flowback.cli.parser import Parser, Verb
from flowback.core.errors import InputError
from flowback.core.files import names_folder, save_tensors
from flowback.core.units import to_uint8
from flowback.data import load_image
from flowback.data.pictures import save_grid, save_images
from flowback.runs.checkpoint import class_names, load_flow
from flowback.tasks.editing import BATCH, beside, box_mask, inpaint, interpolate, swap_class
from flowback.tasks.sampling import shown_classes


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
    command.add_argument("--to", type=str, default=None, help="classes, by number or name (default: up to 20)")
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
    output = checked_output(options, ".safetensors")
    flow, _ = load_flow(options.run, options.weights, options.device)
    batches = labelled_batches(options, flow, options.batch_size)

    def write(file: Path, parts: list[dict[str, Tensor]]) -> None:
        save_tensors({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, file)

    with kept(output, write) as parts, torch.no_grad():
        for images, y in batches:
            z, log_det = flow.encode(images, y)
            part = {"z": z, "log_det": log_det, "log_prob": flow.log_prob(images, y), "labels": y}
            parts.append({name: tensor.cpu() for name, tensor in part.items()})
    shape = [len(options.images), *flow.token_shape]
    say(f"z {shape}, log_det, log_prob and labels of {shape[0]} images in {output}")
    return 0


def _decode(options: Namespace) -> int:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    output = checked_output(options, ".png", "")
    flow, _ = load_flow(options.run, options.weights, options.device)
    try:
        if not Path(options.file).is_file() and Path(options.file).exists():
            raise OSError("it is not a file")  # a pipe would be waited for
        content = load_file(options.file)
        z, y = content["z"], content["labels"]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{options.file} is not a file that encode wrote ({error})") from error
    if not z.dim() or not len(z) or y.shape != z.shape[:1]:
        raise InputError(f"{options.file} holds no images with a label each; expected what encode wrote")
    if options.labels:
        y = one_each(chosen_labels(options.labels, class_names(options.run, flow), flow), len(z))
    drawn = (to_uint8(flow.decode(*part)).cpu() for part in zip(z.split(BATCH), y.split(BATCH), strict=True))
    with torch.no_grad():
        if not names_folder(output):
            with kept(output, partial(_grid, columns=max(1, round(len(z) ** 0.5)))) as rows:
                rows.extend(drawn)
        else:
            save_images(drawn, output)
    say(f"{len(z)} images in {output}")
    return 0


def _interpolate(options: Namespace) -> int:
    output = checked_output(options, ".png")
    if len(options.images) < 2:
        raise InputError(f"{len(options.images)} image has no other to go to; expected at least 2")
    flow, _ = load_flow(options.run, options.weights, options.device)
    batches, last = labelled_batches(options, flow, options.batch_size, overlap=1), None
    with kept(output, partial(_grid, columns=options.steps)) as rows:
        for x, y in batches:
            y[:1] = y[:1] if last is None else last  # an image has one label in both of its walks
            walks = interpolate(flow, x[:-1], x[1:], options.steps, y[:-1], y[1:], batch_size=options.batch_size)
            rows.append(to_uint8(walks.flatten(0, 1)).cpu())
            last = y[-1:].clone()
    say(f"{len(options.images) - 1} walks of {options.steps} images in {output}")
    return 0


def _swap(options: Namespace) -> int:
    output = checked_output(options, ".png")
    flow, _ = load_flow(options.run, options.weights, options.device)
    names = class_names(options.run, flow)
    targets = (options.to is None and shown_classes(flow)) or chosen_labels(options.to, names, flow)
    batches = labelled_batches(options, flow, options.batch_size)
    with kept(output, partial(_grid, columns=1 + len(targets))) as rows:
        for x, y in batches:
            columns = [x, *(swap_class(flow, x, y, torch.full_like(y, k)) for k in targets)]
            rows.append(torch.stack([to_uint8(column).cpu() for column in columns], dim=1).flatten(0, 1))
    say(f"{len(options.images)} images as {len(targets)} classes in {output}")
    return 0


def _inpaint(options: Namespace) -> int:
    output = checked_output(options, ".png")
    if options.num < 1 or not 0 <= options.seed < 2**63:
        raise InputError(f"--num must be at least 1 and --seed 0 to 2^63 - 1, got {options.num} and {options.seed}")
    flow, _ = load_flow(options.run, options.weights, options.device)
    mask = _mask(options, *flow.image_size)
    size = min(options.batch_size, max(1, options.batch_size // options.num))  # images whose drawings are a batch
    batches, generator = labelled_batches(options, flow, size), torch.Generator().manual_seed(options.seed)
    shares = []
    with kept(output, partial(_grid, columns=options.num + 2)) as rows:
        for x, y in batches:
            many, labels = x.repeat_interleave(options.num, dim=0), y.repeat_interleave(options.num)
            result = inpaint(flow, many, mask, labels, options.steps, options.tries, generator)
            rows.append(to_uint8(beside(x, mask, result.x.cpu()).flatten(0, 1)))
            shares.append(result.acceptance.cpu())
    accepted = f"; {100 * float(torch.cat(shares).mean()):.0f} % of the steps were accepted" if options.steps else ""
    say(f"{len(options.images) * options.num} drawings in {output}{accepted}")
    return 0


def _grid(file: Path, parts: list[Tensor], columns: int) -> None:
    save_grid(torch.cat(parts), file, columns)


def _mask(options: Namespace, height: int, width: int) -> Tensor:
    if (options.mask is None) == (options.box is None):
        raise InputError("where to draw is not clear; use either --mask or --box")
    if options.mask is not None:
        return (load_image(Path(options.mask), (height, width), 1) > 127)[None]
    return box_mask(options.box, height, width)
