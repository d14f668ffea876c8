"""Reading one image: upright, square, of the size that is asked for."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from flowback.errors import InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
READING = 2  # part of every fingerprint: goes up when `load_image` makes other pixels of the same file
UPRIGHT = {  # what turns an image upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(file: Path | bytes, image_size: int, channels: int, name: str | None = None) -> Tensor:
    """Read one image: centre square, resized to `image_size`, upright by its EXIF tag; uint8 `[C, S, S]`.

    A JPEG that is at least four times as large is decoded at 1/2, 1/4 or 1/8 of its size, which is the inverse DCT of
    fewer coefficients and saves most of the work. What is decoded keeps at least twice the target's size, so that
    the Lanczos filter, not the DCT's coarser one, decides what is seen: pixels change by less than a level on average.

    Args:
        file: the image, or where it lies.
        image_size: S, pixels.
        channels: C: 3 for colour, 1 for grey.
        name: of the image in an error; by default where it lies.

    Raises:
        InputError: if the file is not an image that can be read whole.
    """
    mode = "RGB" if channels == 3 else "L"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
                drafted = opened.draft("L" if channels == 1 else None, (2 * image_size, 2 * image_size))
                # where the size is no multiple of the scale, the last column or row reaches beyond the image
                width, height = drafted[1][2:] if drafted else opened.size
                image = opened.convert(mode)
                orientation = opened.getexif().get(ExifTags.Base.Orientation)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        where = name or (file if isinstance(file, Path) else f"of {len(file)} bytes")
        raise InputError(f"image {where} cannot be read ({reason})") from None
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    image = image.resize((image_size, image_size), Image.Resampling.LANCZOS, box)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    array = np.array(image, dtype=np.uint8).reshape(image_size, image_size, channels)
    return torch.from_numpy(array).permute(2, 0, 1)
