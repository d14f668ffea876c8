"""Images that are unusual and legal, against the pixels that were written into them."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from flowback.core.errors import InputError
from flowback.core.units import from_levels
from flowback.data import as_images, load_image
from flowback.data.images import decode

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


@pytest.mark.parametrize(("image", "options"), [row[:2] for row in list(UNUSUAL.values())[:-1]])
def test_unusual_images_in_memory_are_the_same_as_their_files(tmp_path, image, options):
    file = tmp_path / "image"
    image.save(file, **{"format": "PNG", **options})
    for channels in (1, 3):
        assert torch.equal(as_images(Image.open(file), 8, channels)[0], from_levels(load_image(file, 8, channels)))


# ---- images that are not square -------------------------------------------------------------------------------------


def ramp(width: int, height: int) -> Image.Image:
    """Grey that is different in every corner."""
    values = np.linspace(0, 200, width)[None, :] * np.linspace(0.2, 1, height)[:, None] + 40 * np.eye(height, width)
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stored", [(30, 20), (500, 300), (300, 500)], ids=["whole", "drafted, wide", "drafted, high"])
@pytest.mark.parametrize("size", [(8, 8), (6, 12), (12, 6), (5, 31)])
def test_any_shape_is_cropped_from_the_upright_middle(tmp_path, orientation, stored, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "ramp.jpg"
    ramp(*stored).save(file, exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(file))
    expected = np.array(ImageOps.fit(upright, size[::-1], Image.Resampling.LANCZOS)).astype(float)
    found = load_image(file, size, 3)
    assert found.shape == (3, *size)
    difference = np.abs(found.numpy() - expected)
    assert difference.max() < 8
    assert difference.mean() < 1.5


@pytest.mark.parametrize(("exif", "least"), [(Image.Exif(), (32, 64)), (CLOCKWISE, (64, 32))], ids=["upright", "turned"])
def test_a_jpeg_is_decoded_at_the_fraction_that_both_sides_allow(tmp_path, exif, least):
    ramp(640, 320).save(tmp_path / "wide.jpg", exif=exif)
    decoded = decode(tmp_path / "wide.jpg", "L", least)
    assert decoded.image.size == (80, 40)  # an eighth; a tenth would do
    assert decode(tmp_path / "wide.jpg", "L", (65, 65)).image.size == (160, 80)
    assert decode(tmp_path / "wide.jpg", "L").image.size == (640, 320)


# ---- images in whatever form people have them -----------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
COLOR = from_levels(torch.from_numpy(PIXELS).permute(2, 0, 1))
GREY = from_levels(torch.from_numpy(np.array(Image.fromarray(PIXELS).convert("L"))))[None]
FORMS: dict[str, Any] = {  # what is given, how many images that is
    "PIL": (Image.fromarray(PIXELS), 1),
    "PIL, opaque": (Image.fromarray(PIXELS).convert("RGBA"), 1),
    "array of one": (PIXELS, 1),
    "array of one, opaque": (np.dstack([PIXELS, np.full((8, 6), 255, np.uint8)]), 1),
    "array of many": (np.stack([PIXELS, PIXELS]), 2),
    "array, not contiguous": (PIXELS[::-1][::-1], 1),
    "array that cannot be written": (np.broadcast_to(PIXELS, (2, 8, 6, 3)), 2),
    "list": ([Image.fromarray(PIXELS), PIXELS], 2),
    "tuple": ((PIXELS, PIXELS, PIXELS), 3),
    "uint8 tensor of one": (torch.from_numpy(PIXELS).permute(2, 0, 1), 1),
    "uint8 tensor of many": (torch.from_numpy(PIXELS).permute(2, 0, 1).expand(2, 3, 8, 6), 2),
    "float tensor of one": (COLOR, 1),
    "float tensor of many": (COLOR.expand(2, 3, 8, 6), 2),
}


@pytest.mark.parametrize(("images", "count"), FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_numbers(images, count):
    found = as_images(images, (8, 6), 3)
    assert found.dtype == torch.float32
    assert found.shape == (count, 3, 8, 6)
    assert torch.equal(found, COLOR.expand(count, 3, 8, 6))


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 1), (2, 8, 6, 1)])
def test_grey_arrays_are_read_as_grey_and_as_color(shape):
    pixels = np.array(Image.fromarray(PIXELS).convert("L"))
    array = np.broadcast_to(pixels.reshape(8, 6, 1) if shape[-1] == 1 else pixels, shape)
    for channels in (1, 3):
        found = as_images(array, (8, 6), channels)
        assert found.shape == (2 if len(shape) == 4 else 1, channels, 8, 6)
        assert torch.equal(found, GREY.expand_as(found))
    assert torch.equal(as_images(Image.fromarray(pixels), (8, 6), 1), GREY[None])


def test_paths_are_read_whether_str_or_path(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(file)
    for images in (str(file), file, [str(file)], [file]):
        assert torch.equal(as_images(images, (8, 6), 3), COLOR[None])
    assert len(as_images([str(file), file, PIXELS, Image.open(file)], (8, 6), 3)) == 4
    assert torch.equal(load_image(str(file), (8, 6), 3), load_image(file, (8, 6), 3))
    with pytest.raises(InputError, match=r"image nowhere\.png cannot be read \(No such file"):
        load_image("nowhere.png", 8, 3)
    with pytest.raises(InputError, match=r"image nowhere\.png cannot be read \(No such file"):
        as_images(["nowhere.png"], 8, 3)


def test_images_of_other_sizes_are_cropped_and_resized(tmp_path):
    image = ramp(300, 200)
    image.save(tmp_path / "a.png")
    expected = from_levels(load_image(tmp_path / "a.png", (16, 8), 1))
    for images in (image, np.array(image), tmp_path / "a.png"):
        assert torch.equal(as_images(images, (16, 8), 1)[0], expected)


def test_an_image_in_memory_is_turned_by_its_tag():
    stream = io.BytesIO()
    halves("RGB", RED, WHITE).transpose(Image.Transpose.ROTATE_90).save(stream, "PNG", exif=CLOCKWISE)
    found = as_images(Image.open(stream), 8, 3)
    assert torch.equal(found[0, :, 0, 0], from_levels(torch.tensor(RED)))
    assert (found[0, :, :, 7] > 0.99).all()


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (PIXELS / 255, r"must be uint8 .* got float64 \[8, 6, 3\]"),
        (np.zeros((2, 8, 6, 3), np.float32), r"must be uint8 .* got float32 \[8, 6, 3\]"),
        ([PIXELS, PIXELS.astype(np.int64)], r"must be uint8 .* got int64 \[8, 6, 3\]"),
        (PIXELS.transpose(2, 0, 1), r"C is 1, 3 or 4, got uint8 \[3, 8, 6\]"),
        (np.zeros(5, np.uint8), r"got uint8 \[5\]"),
        (np.zeros((0, 6, 3), np.uint8), r"got uint8 \[0, 6, 3\]"),
        (np.zeros((0, 8, 6, 3), np.uint8), "at least one, got none"),
        ([], "at least one, got none"),
        (b"\x89PNG", "images must be a tensor, PIL images, uint8 arrays or paths, got bytes"),
        ([b"\x89PNG"], "got bytes in a list"),
        (None, "got NoneType"),
        ({"a": 1}, "got dict"),
        ([[1, 2]], "got list in a list"),
        (torch.zeros(8, 6), r"\[C, H, W\] or \[B, C, H, W\], got float32 \[8, 6\]"),
        (torch.zeros(3, 8, 6, dtype=torch.int64), r"floating-point or uint8.*got int64 \[3, 8, 6\]"),
        ([torch.zeros(3, 8, 6)], "got Tensor in a list"),
        (Image.new("F", (8, 6)), r"mode F cannot be read .*floating-point"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(images, words):
    with pytest.raises(InputError, match=words) as refused:
        as_images(images, (8, 6), 3)
    assert "\n" not in str(refused.value)


def test_a_damaged_pil_image_is_refused(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(PIXELS).resize((64, 64)).save(file)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(InputError, match="cannot be read"):
        as_images(Image.open(file), 8, 3)
