"""Checkpoints of the published TARFlow code (arXiv 2412.06329) as flows with equal outputs.

Such a file is a `state_dict` that was saved with `torch.save`; only tensors are read from it, and no other object.

    blocks.t.pos_embed [N, C]                         position
    blocks.t.class_embed [K, 1, C]                    class_embed [K, C]
    blocks.t.attn_blocks.i.attention.*                transformer.layers.i.attention.*
    blocks.t.attn_blocks.i.mlp.norm, .main.*          transformer.layers.i.norm, .mlp.*
    blocks.t.proj_out, rows (a, mu), or mu alone      proj_out, rows (mu, a)
    blocks.t.attn_mask [N, N]                         (none: the mask is always the causal one)
    var [N, D], of z                                  prior_std, its square root
"""

import math
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.files import check_zip
from flowback.flow.tarflow import TarFlow

WRAPPERS = ("ema", "model", "state_dict")  # keys under which a larger checkpoint may hold the state_dict
PREFIX = re.compile(r"^((module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile
FILE_NAME = re.compile(r"_model_([0-9]+)_([0-9]+)_([0-9]+)_([0-9]+)_([0-9]+(\.[0-9]+)?)(\.pth?)?$")
TO_THEIRS = (
    (r"^prior_std$", "var"),
    (r"\.position$", ".pos_embed"),
    (r"\.mlp\.", ".mlp.main."),
    (r"\.layers\.([0-9]+)\.norm\.", r".layers.\1.mlp.norm."),
    (r"\.transformer\.layers\.", ".attn_blocks."),
)


def import_tarflow(
    checkpoint: str | Path,
    noise_std: float | None = None,
    patch_size: int | None = None,
    channels: int | None = None,
    head_dim: int = 64,
) -> TarFlow:
    """Read a checkpoint in the layout of the published TARFlow code.

    Args:
        checkpoint: a local file. A name like `afhq_model_8_768_8_8_0.07.pth` (data set, patch size, width, blocks, layers,
            noise_std) tells what the tensors do not.
        noise_std: standard deviation of the noise of training; None for that in the name.
        patch_size: pixels; None for that in the name, or else as it follows from the channels.
        channels: None for what the patch size leaves, or, without one, for 3 or else 1, whichever makes square patches.
        head_dim: size of an attention head.

    Returns:
        The flow, in float32.

    Raises:
        InputError: if the file is not such a checkpoint, or something cannot be inferred.
    """
    file = Path(checkpoint)
    tensors = read_tensors(file)
    named = options_in_name(file.name)
    _, D = _shape(file, tensors, "blocks.0.proj_in.weight", dims=2)
    p, channels = _patches(file, D, patch_size if patch_size is not None else named.get("patch_size"), channels)
    noise_std = noise_std if noise_std is not None else named.get("noise_std")
    if noise_std is None:
        raise InputError(f"{file} does not say the noise_std of its training; give it, like 0.05")
    sizes = _sizes(file, tensors)
    for name in ("width", "blocks", "layers"):
        if named and sizes[name] != named[name]:
            raise InputError(
                f"{file} has {name} {named[name]} in its name but {sizes[name]} in its tensors; expected a name that fits"
            )
    flow = TarFlow(
        image_size=p * _side(file, tensors),
        channels=channels,
        patch_size=p,
        head_dim=head_dim,
        log_scale_bound=None,
        noise_std=noise_std,
        prior="scaled",
        **sizes,
    )
    flow.load_state_dict(_converted(file, tensors, flow))
    return flow.eval()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a `state_dict` on disk, memory-mapped where the format allows, by names without prefixes of wrappers.

    A dict that holds it under a key of `WRAPPERS` will do; the first of them counts.

    Raises:
        InputError: if the file is not there, is damaged, or holds anything but tensors.
    """
    if not file.is_file():
        raise InputError(f"{file} does not exist; expected a local file that was saved with torch.save")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are refused below
            check_zip(file)
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except PermissionError:
        raise
    except Exception as error:  # torch.load raises many kinds, with advice to load without safety
        raise InputError(
            f"{file} cannot be read; expected an undamaged file of tensors only, since other objects can run code"
        ) from error
    if isinstance(found, dict):
        found = next((found[key] for key in WRAPPERS if _is_state(found.get(key))), found)
    if not _is_state(found):
        raise InputError(f"{file} is not a state_dict; expected one, or a dict with one as {', '.join(WRAPPERS)}")
    tensors = {PREFIX.sub("", name): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        raise InputError(f"{file} has tensors that differ in the prefixes of their names only; expected one of each")
    return tensors


def options_in_name(name: str) -> dict[str, Any]:
    """What a name `{dataset}_model_{patch_size}_{width}_{blocks}_{layers}_{noise_std}`, perhaps with `.pth`, says."""
    match = FILE_NAME.search(name)
    if match is None:
        return {}
    patch_size, width, blocks, layers = (int(number) for number in match.groups()[:4])
    return {"patch_size": patch_size, "width": width, "blocks": blocks, "layers": layers, "noise_std": float(match[5])}


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _shape(file: Path, tensors: dict[str, Tensor], name: str, dims: int) -> torch.Size:
    if name not in tensors:
        raise InputError(f"{file} is not a checkpoint of the published TARFlow code: it lacks the tensor {name}")
    if tensors[name].dim() != dims:
        raise InputError(f"{file} has {name} of shape {list(tensors[name].shape)}; expected {dims} dimensions")
    return tensors[name].shape


def _count(tensors: dict[str, Tensor], prefix: str) -> int:
    """How many different numbers follow `prefix` in the names, at least one; gaps show as missing tensors."""
    return max(1, len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)}))


def _sizes(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The options that the tensors tell."""
    width, _ = _shape(file, tensors, "blocks.0.proj_in.weight", dims=2)
    hidden, _ = _shape(file, tensors, "blocks.0.attn_blocks.0.mlp.main.0.weight", dims=2)
    if hidden % width:
        raise InputError(f"{file} has MLPs of {hidden} units; expected a multiple of the width {width}")
    blocks = _count(tensors, "blocks.")
    layers = [_count(tensors, f"blocks.{t}.attn_blocks.") for t in range(blocks)]
    conditional = "blocks.0.class_embed" in tensors
    return {
        "width": width,
        "blocks": blocks,
        "layers": layers[0] if len(set(layers)) == 1 else layers,
        "mlp_ratio": float(hidden // width),
        "num_classes": _shape(file, tensors, "blocks.0.class_embed", dims=3)[0] if conditional else 0,
    }


def _side(file: Path, tensors: dict[str, Tensor]) -> int:
    """Tokens along a side of the image."""
    N, _ = _shape(file, tensors, "blocks.0.pos_embed", dims=2)
    if math.isqrt(N) ** 2 != N:
        raise InputError(f"{file} has {N} tokens; expected a square number")
    return math.isqrt(N)


def _patches(file: Path, D: int, patch_size: int | None, channels: int | None) -> tuple[int, int]:
    """Patch size and channels of tokens of D numbers."""
    possible = {p: D // p**2 for p in range(1, math.isqrt(D) + 1) if D % p**2 == 0}
    p = patch_size
    if p is None:
        wanted = (3, 1) if channels is None else (channels,)
        p = next((p for C in wanted for p in possible if possible[p] == C), None)
    if p not in possible or channels not in (None, possible[p]):
        given = [f"{what} {n}" for what, n in (("patch size", patch_size), ("channels", channels)) if n is not None]
        allowed = ", ".join(f"{p} ({C})" for p, C in possible.items())
        raise InputError(
            f"{file} has tokens of {D} numbers, which do not fit {' and '.join(given) or 'squares of 3 channels or 1'}; "
            f"possible patch sizes, and their channels: {allowed}"
        )
    return p, possible[p]


def _converted(file: Path, tensors: dict[str, Tensor], flow: TarFlow) -> dict[str, Tensor]:
    """The flow's `state_dict`, after a check of every tensor of the file."""
    N, D = flow.token_shape
    ours, shapes = {}, {}
    for name, tensor in flow.state_dict().items():
        their = _their_name(name)
        ours[their], shapes[their] = name, list(tensor.shape)
        if their.endswith(".class_embed"):
            shapes[their].insert(1, 1)
    if _shape(file, tensors, "blocks.0.proj_out.weight", dims=2)[0] == D:
        shapes.update({name: [D, *shape[1:]] for name, shape in shapes.items() if ".proj_out." in name})
    masks = [f"blocks.{t}.attn_mask" for t in range(flow.config.blocks)]
    shapes.update({name: [N, N] for name in masks})

    for names, what in ((shapes.keys() - tensors.keys(), "lacks"), (tensors.keys() - shapes.keys(), "has more than")):
        if names:
            raise InputError(f"{file} {what} the tensors of such a checkpoint: {', '.join(sorted(names))}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if list(tensor.shape) != shape:
            raise InputError(f"{file} has {name} of shape {list(tensor.shape)}; expected {shape}")
        if name not in masks and not (tensor.is_floating_point() and tensor.float().isfinite().all()):
            raise InputError(f"{file} has {name} of {tensor.dtype} with values that are no finite numbers")
    for name in masks:
        if not torch.equal(tensors[name].float(), torch.ones(N, N).tril()):
            raise InputError(f"{file} has {name} that is not the causal mask; expected ones on and below the diagonal")
    least = tensors["var"].float().min().item()
    if least <= 0:
        raise InputError(f"{file} has var with a variance of {least:g}; expected above 0")
    return {ours[name]: _convert(name, tensors[name].float(), D) for name in ours}


def _their_name(name: str) -> str:
    for pattern, replacement in TO_THEIRS:
        name = re.sub(pattern, replacement, name)
    return name


def _convert(name: str, tensor: Tensor, D: int) -> Tensor:
    """One of their tensors as ours."""
    if name == "var":
        return tensor.sqrt()
    if name.endswith(".class_embed"):
        return tensor[:, 0]
    if ".proj_out." in name:
        a, mu = tensor.split(D) if len(tensor) == 2 * D else (torch.zeros_like(tensor), tensor)
        return torch.cat([mu, a])
    return tensor
