"""Reading one image: upright, of the size and depth that are asked for. Unusual formats are refused."""

import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from flowback.core.errors import InputError
from flowback.core.files import typed_path
from flowback.core.units import from_levels

AVIF = "avif" in features.modules and bool(features.check("avif"))  # from Pillow 11.3 on
EARLIER_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}  # of version 0.1.0
IMAGE_SUFFIXES = EARLIER_SUFFIXES | {".apng", ".jfif", ".jpe", ".gif", ".pbm", ".pnm"} | ({".avif"} if AVIF else set())
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF", *["AVIF"] * AVIF)  # theirs; one of Pillow's starts a program
HEADS = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM....\0{4}|II\*\0|MM\0\*|P[1-6]\s|....ftypavi[fs]", re.DOTALL
)
MAX_BYTES = 2**30  # of a file; its pixels Pillow limits to 89 million
READING = 3  # part of every fingerprint: goes up when `load_image` makes other pixels of the same file
TURNED = (5, 6, 7, 8)  # EXIF orientations of images whose rows are columns when upright
FORMS = "a tensor, PIL images, uint8 arrays or paths"
Images = Tensor | np.ndarray | Image.Image | str | Path | Sequence[Image.Image | np.ndarray | str | Path]


class Decoded(NamedTuple):
    """An image as it is stored."""

    image: Image.Image  # grey or RGB, or RGBA if it is transparent somewhere
    width: float
    height: float
    orientation: int | None  # its EXIF tag


def as_images(images: Images, size: int | tuple[int, int], channels: int) -> Tensor:
    """Images in whatever form people have them as a tensor `[B, C, H, W]` in [-1, 1].

    Args:
        images: one or several PIL images or paths, which are cropped and resized; uint8 arrays `[H, W]`, `[H, W, C]`,
            `[B, H, W]` (if channels is 1) or `[B, H, W, C]`, which are too; a uint8 tensor `[B, C, H, W]` of pixel values;
            or a floating-point tensor, which passes unchanged. The batch dimension of tensors is added where it is missing.
        size: height and width, or one number for both, pixels.
        channels: C: 3 for color, 1 for grey.

    Raises:
        InputError: if they are something else, or cannot be read.
    """
    if isinstance(images, Tensor):
        if images.dim() not in (3, 4) or not (images.is_floating_point() or images.dtype == torch.uint8):
            raise InputError(
                "a tensor of images must be floating-point or uint8, [C, H, W] or [B, C, H, W], got "
                f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            )
        images = images if images.dim() == 4 else images[None]
        return images if images.is_floating_point() else from_levels(images)
    if isinstance(images, np.ndarray) and (
        images.ndim == 4 or (images.ndim == 3 and channels == 1 and _is_grey_batch(images, size))
    ):
        images = list(images)
    if isinstance(images, str | Path | Image.Image | np.ndarray):
        images = [images]
    if not isinstance(images, Sequence) or isinstance(images, bytes | bytearray):
        raise InputError(f"images must be {FORMS}, got {type(images).__name__}")
    if not images:
        raise InputError(f"images must be {FORMS}, at least one, got none")
    return from_levels(torch.stack([_one_image(image, size, channels) for image in images]))


def _is_grey_batch(array: np.ndarray, size: int | tuple[int, int]) -> bool:
    """Whether an array of three dimensions is `[B, H, W]`, and not one image `[H, W, C]`.

    Raises:
        InputError: if it can be either.
    """
    as_channels = array.shape[-1] in (1, 3, 4)
    if as_channels and array.shape[1:] == (size if isinstance(size, tuple) else (size, size)):
        raise InputError(f"an array of images {list(array.shape)} can be [B, H, W] or [H, W, C]; expected [B, H, W, C]")
    return not as_channels


def _one_image(image: Any, size: int | tuple[int, int], channels: int) -> Tensor:
    """One image of whatever form, uint8 `[C, H, W]`."""
    if isinstance(image, str | Path):
        return load_image(typed_path(str(image)), size, channels)
    if isinstance(image, np.ndarray):
        grey = image.ndim == 2 or (image.ndim == 3 and image.shape[-1] == 1)
        if image.dtype != np.uint8 or not image.size or not (grey or (image.ndim == 3 and image.shape[-1] in (3, 4))):
            raise InputError(
                "an array of images must be uint8 [H, W], [H, W, C], [B, H, W] or [B, H, W, C], where C is 1, 3 or 4, got "
                f"{image.dtype} {list(image.shape)}"
            )
        image = Image.fromarray(image.reshape(image.shape[:2]) if grey else image)
    if not isinstance(image, Image.Image):
        raise InputError(f"images must be {FORMS}, got {type(image).__name__} in a list")
    try:
        decoded = Decoded(_eight_bits(image, "RGB" if channels == 3 else "L"), *image.size, _orientation(image))
    except Exception as error:  # as in `decode`
        raise InputError(f"a PIL image of mode {image.mode} cannot be read ({_reason(error)})") from error
    return _fitted(decoded, size, channels)


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins with these 12 bytes or more is of a format that can be read."""
    return HEADS.match(head) is not None


def is_grey(file: bytes) -> bool:
    """Whether an image has no color: its channels differ by at most 2 of 255 levels, which lossy formats make of grey.

    Raises:
        InputError: as `load_image`.
    """
    image = decode(file, "RGB", (64, 64)).image
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    channels = np.asarray(image.convert("RGB"), np.int16)
    return bool(np.ptp(channels, axis=-1).max() <= 2)


def load_image(
    file: str | Path | bytes, image_size: int | tuple[int, int], channels: int, name: str | None = None
) -> Tensor:
    """Read one image: its center, resized to `image_size`, upright by its EXIF tag; uint8 `[C, H, W]`.

    A JPEG that is at least four times as large is decoded at 1/2, 1/4 or 1/8 of its size, which is the inverse DCT of
    fewer coefficients and saves most of the work. The decoded image has at least twice the target's size, so the Lanczos
    filter decides the result, not the coarser one of the DCT: pixels change by less than a level on average.

    Grey of 16 bits is scaled to 8. Transparent images are put on white.

    Args:
        file: path of the image, or its bytes.
        image_size: height and width, or one number for both, pixels.
        channels: C: 3 for color, 1 for grey.
        name: of the image in an error; its path by default.

    Raises:
        InputError: if it is not a complete image of a known format and of a size that fits in memory.
    """
    rows, columns = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    decoded = decode(file, "RGB" if channels == 3 else "L", (2 * rows, 2 * columns), name)
    return _fitted(decoded, image_size, channels)


def _fitted(decoded: Decoded, image_size: int | tuple[int, int], channels: int) -> Tensor:
    """The center of an image, resized and upright, uint8 `[C, H, W]`."""
    image, width, height, orientation = decoded
    rows, columns = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    across, down = (rows, columns) if orientation in TURNED else (columns, rows)
    scale = min(width / across, height / down)
    left, top = (width - scale * across) / 2, (height - scale * down) / 2
    box = (left, top, left + scale * across, top + scale * down)
    image = image.resize((across, down), Image.Resampling.LANCZOS, box)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    image.info.clear()  # what else is in its EXIF data may be damaged
    image.getexif()[ExifTags.Base.Orientation] = orientation
    array = np.array(ImageOps.exif_transpose(image)).reshape(rows, columns, channels)
    return torch.from_numpy(array).permute(2, 0, 1)


def decode(file: str | Path | bytes, mode: str, least: tuple[int, int] | None = None, name: str | None = None) -> Decoded:
    """Decode one image into eight bits a channel.

    Args:
        file: path of the image, or its bytes.
        mode: RGB or L.
        least: height and width, pixels: a JPEG may be decoded at a fraction of its size, but not below these; None decodes
            it in full.
        name: of the image in an error; its path by default.

    Raises:
        InputError: as `load_image`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what an error tells, or what does not matter
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if not isinstance(file, bytes) and Path(file).exists() and not Path(file).is_file():
                raise ValueError("it is not a file")  # a pipe would be waited for
            if not isinstance(file, bytes) and Path(file).stat().st_size > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES} bytes")
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as opened:
                if math.prod(opened.size) > (Image.MAX_IMAGE_PIXELS or math.inf):  # warnings are of no thread
                    raise ValueError(
                        f"Image size ({math.prod(opened.size)} pixels) exceeds limit of {Image.MAX_IMAGE_PIXELS}"
                    )
                drafted = None
                if least:
                    size = least if _orientation(opened) in TURNED else (least[1], least[0])
                    drafted = opened.draft("L" if mode == "L" else None, size)
                # where the size is no multiple of the scale, the last column or row reaches beyond the image
                width, height = drafted[1][2:] if drafted else opened.size
                return Decoded(_eight_bits(opened, mode), width, height, _orientation(opened))
    except Exception as error:  # decoders of damaged files raise many kinds
        where = name or (f"of {len(file)} bytes" if isinstance(file, bytes) else file)
        raise InputError(f"image {where} cannot be read ({_reason(error)})") from error


def _orientation(image: Image.Image) -> int | None:
    """The EXIF tag; once loaded, a TIFF has none, since Pillow turns it upright."""
    return image.getexif().get(ExifTags.Base.Orientation)


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """An image in `mode`, or in RGBA where it is transparent somewhere."""
    if image.mode.startswith("I"):  # grey of 16 bits, or of 32 that should hold no more
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() >= 2**16:
            raise ValueError("its numbers are no 16 bits; expected 8 or 16 a channel")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert(mode)
    if image.mode == "F":
        raise ValueError("its numbers are floating-point; expected 8 or 16 bits a channel")
    return image.convert("RGBA" if image.has_transparency_data else mode)


def _reason(error: Exception) -> str:
    """What a decoder complains of, in a line."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else repr(error)
