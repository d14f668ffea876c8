"""Reading one image: upright, square, of the size and depth that are asked for; what no image should need is refused."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.units import from_levels

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")  # theirs; of the others that Pillow reads one starts a program
MAX_BYTES = 2**30  # of a file; its pixels Pillow limits to 89 million
Images = "Tensor | np.ndarray | Image.Image | str | Path | Sequence[Image.Image | np.ndarray | str | Path]"
READING = 3  # part of every fingerprint: goes up when `load_image` makes other pixels of the same file
UPRIGHT = {  # what turns an image upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Decoded(NamedTuple):
    """An image as it lies in its file."""

    image: Image.Image  # grey or RGB, or RGBA where it is transparent somewhere
    width: float
    height: float
    orientation: int | None  # by its EXIF tag


def as_images(images: Images, size: int | tuple[int, int], channels: int) -> Tensor:
    """Images in whatever form people have them as a tensor `[B, C, H, W]` in [-1, 1].

    Args:
        images: one or several PIL images or paths, which are cropped and resized; uint8 arrays `[H, W]`, `[H, W, C]` or
            `[B, H, W, C]`, which are too; a uint8 tensor `[B, C, H, W]` of pixel values; or a floating-point tensor, which
            passes unchanged, with a batch dimension added where it has none.
        size: height and width, or one number for both, pixels.
        channels: C: 3 for color, 1 for grey.

    Raises:
        InputError: if they are something else, or cannot be read.
    """
    if isinstance(images, Tensor):
        images = images[None] if images.dim() == 3 else images
        return images if images.is_floating_point() else from_levels(images)
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.ndim not in (2, 3, 4):
            raise InputError(
                f"an array of images must be uint8 [H, W], [H, W, C] or [B, H, W, C], got {images.dtype}"
                f" {list(images.shape)}"
            )
        images = list(images) if images.ndim == 4 else [images]
    if isinstance(images, str | Path | Image.Image):
        images = [images]
    if not isinstance(images, Sequence) or not len(images):
        raise InputError(f"images must be a tensor, PIL images, uint8 arrays or paths, got {type(images).__name__}")
    return from_levels(torch.stack([_one_image(image, size, channels) for image in images]))


def _one_image(image: Any, size: int | tuple[int, int], channels: int) -> Tensor:
    """One image of whatever form, uint8 `[C, H, W]`."""
    if isinstance(image, str | Path):
        return load_image(Path(image), size, channels)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image)
    if not isinstance(image, Image.Image):
        raise InputError(f"images must be a tensor, PIL images, uint8 arrays or paths, got {type(image).__name__}")
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=image.getexif())
    return load_image(stream.getvalue(), size, channels)


def load_image(file: Path | bytes, image_size: int | tuple[int, int], channels: int, name: str | None = None) -> Tensor:
    """Read one image: its centre, resized to `image_size`, upright by its EXIF tag; uint8 `[C, H, W]`.

    A JPEG that is at least four times as large is decoded at 1/2, 1/4 or 1/8 of its size, which is the inverse DCT of
    fewer coefficients and saves most of the work. What is decoded keeps at least twice the target's size, so that
    the Lanczos filter, not the DCT's coarser one, decides what is seen: pixels change by less than a level on average.

    Grey of 16 bits is scaled to 8. What is transparent is laid on white.

    Args:
        file: the image, or where it lies.
        image_size: height and width, or one number for both, pixels.
        channels: C: 3 for colour, 1 for grey.
        name: of the image in an error; by default where it lies.

    Raises:
        InputError: if the file is not an image that can be read whole, of a known format and a size that fits in memory.
    """
    mode = "RGB" if channels == 3 else "L"
    rows, columns = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    image, width, height, orientation = decode(file, mode, 2 * max(rows, columns), name)
    turned = orientation is not None and orientation >= 5  # its rows are the columns of the upright image
    across, down = (rows, columns) if turned else (columns, rows)
    scale = min(width / across, height / down)
    left, top = (width - scale * across) / 2, (height - scale * down) / 2
    box = (left, top, left + scale * across, top + scale * down)
    image = image.resize((across, down), Image.Resampling.LANCZOS, box)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    array = np.array(image, dtype=np.uint8).reshape(rows, columns, channels)
    return torch.from_numpy(array).permute(2, 0, 1)


def decode(file: Path | bytes, mode: str, smallest: int | None = None, name: str | None = None) -> Decoded:
    """Decode one image into eight bits a channel.

    Args:
        file: the image, or where it lies.
        mode: RGB or L.
        smallest: size that will do, pixels: a JPEG may be decoded at a fraction of its own; None for that.
        name: of the image in an error; by default where it lies.

    Raises:
        InputError: as `load_image`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what an error tells, or what does not matter
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(file, Path) and file.exists() and not file.is_file():
                raise ValueError("it is not a file")  # a pipe would be waited for
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as opened:
                drafted = opened.draft("L" if mode == "L" else None, (smallest, smallest)) if smallest else None
                # where the size is no multiple of the scale, the last column or row reaches beyond the image
                width, height = drafted[1][2:] if drafted else opened.size
                return Decoded(_eight_bits(opened, mode), width, height, opened.getexif().get(ExifTags.Base.Orientation))
    except Exception as error:  # decoders of damaged files raise many kinds
        where = name or (file if isinstance(file, Path) else f"of {len(file)} bytes")
        raise InputError(f"image {where} cannot be read ({_reason(error)})") from None


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """An image in `mode`, or in RGBA where it is transparent somewhere."""
    if image.mode.startswith("I"):  # grey of 16 bits, or of 32 that should hold no more
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() >= 2**16:
            raise ValueError("its numbers are no 16 bits; allowed are 8 or 16 a channel")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert(mode)
    if image.mode == "F":
        raise ValueError("its numbers are floating-point; allowed are 8 or 16 bits a channel")
    return image.convert("RGBA" if image.has_transparency_data else mode)


def _reason(error: Exception) -> str:
    """What a decoder complains of, in a line."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else repr(error)
