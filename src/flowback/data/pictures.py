"""Images on disk: grids of samples, and tensors as uint8 pixels."""

from pathlib import Path

import torch
from torch import Tensor

from flowback.core.units import to_uint8


def save_grid(x: Tensor, file: Path, columns: int, smallest: int = 28) -> None:
    """Write images `[B, C, H, W]` as one PNG; images smaller than `smallest` pixels are enlarged by a whole factor."""
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid_array(x, columns, smallest).numpy()).save(file)


def save_images(x: Tensor, output: Path) -> None:
    """Images `[B, C, H, W]` in [-1, 1] as a grid if `output` has a suffix, or else as 000000.png, … in that folder."""
    if output.suffix:
        save_grid(x, output, columns=max(1, round(len(x) ** 0.5)))
        return
    output.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(to_uint8(x)):
        save_png(image, output / f"{number:06d}.png")


def save_png(image: Tensor, file: Path) -> None:
    """One image, uint8 `[C, H, W]`."""
    from torchvision.io import write_png

    write_png(image.cpu(), str(file))


def grid_array(x: Tensor, columns: int, smallest: int = 28) -> Tensor:
    """Images `[B, C, H, W]`, in [-1, 1] or uint8, as one uint8 picture `[rows, columns, 3]`, thin lines between them."""
    from torchvision.utils import make_grid

    factor = max(1, -(-smallest // x.shape[-1]))
    x = x if x.dtype == torch.uint8 else to_uint8(x)
    x = x.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    return make_grid(x.cpu(), nrow=columns, padding=2, pad_value=255).permute(1, 2, 0)
