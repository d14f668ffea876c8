"""Images on disk: one a file, or many in a grid."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from flowback.core.errors import InputError
from flowback.core.files import write_whole
from flowback.core.units import to_uint8


def save_images(batches: Iterable[Tensor], folder: Path) -> None:
    """Images, batches of uint8 `[B, C, H, W]`, as 000000.png, … in a folder, each batch when it is there.

    Raises:
        InputError: if the folder holds something already.
        OSError: if an image cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"output must be a new or empty folder, but {folder} holds other files")
    for number, image in enumerate(chain.from_iterable(batches)):
        write_whole(folder / f"{number:06d}.png", lambda file, image=image: save_png(image, file))


def save_png(image: Tensor, file: Path) -> None:
    """One image, uint8 `[C, H, W]`, grey or RGB."""
    Image.fromarray(image.movedim(0, -1).squeeze(-1).cpu().numpy()).save(file)


def save_grid(x: Tensor, file: Path, columns: int, smallest: int = 28) -> None:
    """Images `[B, C, H, W]` as one PNG; arguments as in `grid_array`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid_array(x, columns, smallest).numpy()).save(file)


def with_map(x: Tensor, maps: Tensor, limit: float = 6.0) -> Tensor:
    """Images `[B, C, H, W]` in [-1, 1], in grey, under maps `[B, rows, columns]`: red above zero, blue below; uint8 RGB.

    A value of `limit` or more covers the image by three quarters, one of zero not at all. The default is for anomaly maps,
    whose unit is a standard deviation.
    """
    grey = (x.cpu().float().mean(dim=1, keepdim=True) + 1) / 2
    maps = interpolate(maps.cpu().float()[:, None].nan_to_num(), x.shape[-2:], mode="nearest-exact")
    cover = 0.75 * (maps.abs() / limit).clamp(max=1)
    red, blue = (torch.tensor(color).view(3, 1, 1) for color in ((0.86, 0.15, 0.15), (0.15, 0.39, 0.92)))
    return to_uint8(2 * ((1 - cover) * grey + cover * torch.where(maps > 0, red, blue)) - 1)


def grid_array(x: Tensor, columns: int, smallest: int = 28) -> Tensor:
    """Images `[B, C, H, W]`, in [-1, 1] or uint8, as one RGB picture, uint8 `[height, width, 3]`, white lines between them.

    A single image has no lines. Images narrower than `smallest` pixels are enlarged by a whole factor. Of images that are
    neither grey nor RGB the first channel is shown.
    """
    x = x if x.shape[1] in (1, 3) else x[:, :1]
    factor, columns, line = max(1, -(-smallest // x.shape[-1])), min(columns, len(x)), 2 if len(x) > 1 else 0
    x = (x if x.dtype == torch.uint8 else to_uint8(x)).cpu().expand(-1, 3, -1, -1)
    x = x.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    x = pad(x, (line, 0, line, 0, 0, 0, 0, -len(x) % columns), value=255)
    rows = x.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # row of images, of pixels, column of images, of pixels
    return pad(rows.flatten(2, 3).flatten(0, 1), (0, 0, 0, line, 0, line), value=255)
