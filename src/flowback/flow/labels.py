"""Labels of images, in any form that people write them in, as weights of the class embeddings."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowback.core.devices import put
from flowback.core.errors import InputError

Labels = Tensor | Sequence[int] | int | None  # [B], -1 for no label; one for all; class weights [B, K]; or none at all


def class_weights(y: Labels, batch: int, classes: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Labels as weights of the class embeddings, `[B, K]`: one-hot, or the mean of all where there is no label.

    Labels on an accelerator are not checked, because the host would wait for them. One that is out of range gives weights,
    and so results, that are NaN.

    Args:
        y: labels `[B]` with -1 for none; one label for all; weights `[B, K]`, which pass unchanged; None for no label.
        batch: B.
        classes: K; 0 for an unconditional flow, of which None is returned.
        dtype: of the weights.
        device: of the weights.

    Raises:
        InputError: if a label is out of range, or `y` has another length than the batch.
    """
    K = classes
    if y is None:
        return torch.full((batch, K), 1 / K, dtype=dtype, device=device) if K else None
    y = as_tensor(y)
    if y.is_floating_point():
        if y.shape != (batch, K):
            raise InputError(f"class weights must have the shape [{batch}, {K}], got {list(y.shape)}")
        return put(y, device).to(dtype)
    y = y.expand(batch) if y.dim() == 0 else y
    if y.shape != (batch,):
        raise InputError(f"labels must have the shape [{batch}], one for each image, got {list(y.shape)}")
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        check_range(y, K)
    if not K:
        return None
    y = put(y, device)[:, None]
    one_hot = (y == torch.arange(K, device=device)).to(dtype)
    weights = torch.where(y == -1, 1 / K, one_hot)
    return weights if y.device.type == "cpu" else torch.where((y < -1) | (y >= K), math.nan, weights)


def as_tensor(y: Tensor | Sequence[int] | int) -> Tensor:
    """Labels as a tensor.

    Raises:
        InputError: if they are not numbers.
    """
    try:
        tensor = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels must be whole numbers, got {y!r}") from error
    if not tensor.numel() and not isinstance(y, Tensor):
        tensor = tensor.long()  # an empty list
    if tensor.is_complex() or tensor.dtype == torch.bool or (tensor.is_floating_point() and tensor.dim() != 2):
        raise InputError(f"labels must be whole numbers, got {tensor.dtype}")
    return tensor


def check_range(y: Tensor, classes: int) -> None:
    """Check labels on the CPU.

    Raises:
        InputError: if one is out of range.
    """
    low, high = (int(y.min()), int(y.max())) if len(y) else (-1, -1)
    if low < -1 or high >= classes:
        allowed = f"0 to {classes - 1}, or -1 for no label" if classes else "-1 or None, since the flow is unconditional"
        raise InputError(f"label {low if low < -1 else high} is out of range; expected {allowed}")


def to_draw(
    num: int | tuple[int, ...] | None, y: Labels, classes: int, generator: torch.Generator | None
) -> tuple[tuple[int, ...], Labels]:
    """What `TarFlow.sample(num, y)` asks for: the shape of the batch, and labels, which are drawn if there are none.

    Raises:
        InputError: if `num` is not a number or a shape, or it and `y` are both missing.
    """
    labels = None if y is None else as_tensor(y)
    if num is None:
        if labels is None:
            raise InputError("give num, the number of images, or y, their labels")
        num = len(labels) if labels.dim() else 1
    shape = num if isinstance(num, tuple) else (num,)
    if not shape or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in shape):
        raise InputError(f"num must be a whole number of at least 1 or a tuple of them, got {num!r}; labels are y=")
    if labels is None and classes:
        device = None if generator is None else generator.device
        labels = torch.randint(classes, (math.prod(shape),), generator=generator, device=device)
    return shape, labels
