"""Images that are unusual and legal, against the pixels that were written into them."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowback.data import load_image

RED, GREEN, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)
CLOCKWISE = Image.Exif()
CLOCKWISE[0x0112] = 6  # has to be turned so


def halves(mode: str, left: Any, right: Any) -> Image.Image:
    """8x8 pixels of two colours."""
    image = Image.new(mode, (8, 8), right)
    image.paste(left, (0, 0, 4, 8))
    return image


def palette() -> Image.Image:
    image = halves("P", 1, 0)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


DEEP = np.repeat([[0x8000] * 4 + [0xFFFF] * 4], 8, axis=0)
CMYK = halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 255))
UNUSUAL: dict[str, tuple[Image.Image, dict, tuple, tuple]] = {  # image, how it is saved, left and right colour
    "grey of 16 bits": (Image.fromarray(DEEP.astype(np.uint16)), {}, (128,) * 3, WHITE),
    "grey of 16 bits, TIFF": (Image.fromarray(DEEP.astype(np.uint16)), {"format": "TIFF"}, (128,) * 3, WHITE),
    "grey of 32 bits": (Image.fromarray(DEEP.astype(np.int32)), {"format": "TIFF"}, (128,) * 3, WHITE),
    "grey": (halves("L", 10, 200), {}, (10,) * 3, (200,) * 3),
    "one bit": (halves("1", 1, 0), {}, WHITE, BLACK),
    "palette": (palette(), {}, (200, 100, 50), BLACK),
    "palette, transparent": (palette(), {"transparency": 0}, (200, 100, 50), WHITE),
    "RGB, transparent": (halves("RGB", RED, GREEN), {"transparency": GREEN}, RED, WHITE),
    "RGBA": (halves("RGBA", (*RED, 255), (9, 9, 9, 0)), {}, RED, WHITE),
    "RGBA, half": (halves("RGBA", (*RED, 255), (0, 0, 0, 128)), {}, RED, (127,) * 3),
    "grey with alpha": (halves("LA", (7, 255), (7, 0)), {}, (7,) * 3, WHITE),
    "CMYK, TIFF": (CMYK, {"format": "TIFF"}, RED, BLACK),
    "CMYK, JPEG": (CMYK, {"format": "JPEG", "quality": 100}, RED, BLACK),
    "turned by EXIF": (halves("RGB", RED, WHITE).transpose(Image.Transpose.ROTATE_90), {"exif": CLOCKWISE}, RED, WHITE),
    "1x1": (Image.new("RGB", (1, 1), RED), {}, RED, RED),
    "1x5000": (Image.new("RGB", (1, 5000), RED), {}, RED, RED),
    "64 million pixels": (Image.new("1", (8000, 8000), 1), {}, WHITE, WHITE),
}


@pytest.mark.parametrize(("image", "options", "left", "right"), UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_images_are_read_right(image, options, left, right):
    stream = io.BytesIO()
    image.save(stream, **{"format": "PNG", **options})
    for channels, weights in ((3, np.eye(3)), (1, [(0.299, 0.587, 0.114)])):
        pixels = load_image(stream.getvalue(), 8, channels)
        for half, colour in ((pixels[:, :, 1], left), (pixels[:, :, 6], right)):
            assert (half - torch.tensor(weights @ np.array(colour))[:, None]).abs().max() <= 2
