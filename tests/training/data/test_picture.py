"""Pictures of every kind come out RGB, upright and on white; a bin gets what the reference's data set would give it."""
from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, features

from pixart.errors import DataError
from pixart.training.data.picture import fitted, picture_size, read_picture, to_tensor
from tests.support.data_sets import encoded, picture


def left_to_right(kind: str, image: Image.Image, **options: object) -> np.ndarray:
    return np.asarray(read_picture(encoded(image, kind, **options))).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_formats(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    image = picture(48, 32)
    data = encoded(image, kind)
    assert picture_size(data) == (32, 48)
    assert np.abs(np.asarray(read_picture(data)).astype(int) - np.asarray(image)).mean() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_upright(orientation):
    """The red half of the upright picture is its upper one."""
    upright = Image.new("RGB", (32, 48), "blue")
    upright.paste("red", (0, 0, 32, 24))
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # Image.Transpose that stores it lying
    lying = upright
    for method in undo.get(orientation, []):
        lying = lying.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(lying, "JPEG", exif=exif, quality=95, subsampling=0)
    assert picture_size(data) == (48, 32)
    found = np.asarray(read_picture(data)).astype(int)
    assert found.shape == (48, 32, 3) and found[2, :, 0].mean() > 200 and found[-2, :, 2].mean() > 200


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 16))
    if mode == "P":
        image = Image.new("P", (16, 16), 1)
        image.putpalette([255, 0, 255, 0, 0, 0])
        image.paste(0, (0, 0, 8, 16))
        data = encoded(image, "PNG", transparency=0)
    else:
        data = encoded(image.convert(mode), "PNG")
    found = np.asarray(read_picture(data))
    assert found[:, :8].min() == 255 and found[:, 8:].max() == 0


def test_half_transparent_is_half_white():
    assert abs(left_to_right("PNG", Image.new("RGBA", (4, 4), (0, 0, 0, 128))).mean() - 127) <= 1


def test_sixteen_bits_keep_their_brightness():
    """Pillow's own conversion clips at 255, so that such a picture would be all white."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, axis=0)
    found = left_to_right("PNG", Image.fromarray(ramp))
    assert found.shape == (8, 64, 3) and np.abs(found[0, :, 0] - ramp[0] / 257).max() <= 1


def test_cmyk_is_converted():
    found = left_to_right("JPEG", Image.new("CMYK", (16, 16), (0, 255, 255, 0)))
    assert found[..., 0].min() > 180 and found[..., 1:].max() < 80  # red


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_has_three_channels(mode):
    assert left_to_right("PNG", Image.new(mode, (8, 8), 255)).shape == (8, 8, 3)


BIN = (208, 304)
SIZES = [(size, BIN, 256) for size in ((333, 257), (100, 400), (304, 208), (61, 47), (1001, 999))]


@pytest.mark.parametrize("size, bin_size, base", [*SIZES, ((333, 257), (2048, 2048), 2048)])
def test_a_bin_gets_what_the_reference_gives_it(size, bin_size, base):
    """Resize until it covers, then the centre: torchvision's, with the sizes that the reference computes."""
    transforms = pytest.importorskip("torchvision.transforms")
    image, (height, width) = picture(*size), bin_size
    old_width, old_height = size
    if height / old_height > width / old_width:
        resized = height, int(old_width * height / old_height)
    else:
        resized = int(old_height * width / old_width), width
    method = transforms.InterpolationMode.LANCZOS if base >= 2048 else transforms.InterpolationMode.BICUBIC
    expected = transforms.CenterCrop(bin_size)(transforms.Resize(resized, interpolation=method)(image))
    found = fitted(image, height, width, base)
    assert found.size == (width, height)
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert to_tensor(found).shape == (3, height, width)


def test_nothing_is_squeezed():
    """The reference's extractor distorts to the bin; a circle would become an ellipse."""
    image = Image.new("RGB", (400, 100), "white")
    image.paste("black", (150, 0, 250, 100))
    found = np.asarray(fitted(image, 64, 64, 256))
    assert found.max() < 128  # the middle square is all black


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("no picture", b"nope", "not a JPEG, PNG, WebP or AVIF"),
        ("nothing", b"", "not a JPEG, PNG, WebP or AVIF"),
        ("another kind", encoded(Image.new("RGB", (8, 8)), "BMP"), "not a JPEG, PNG, WebP or AVIF"),
        ("cut JPEG", encoded(picture(256, 256), "JPEG")[:2000], "damaged.*truncated"),
        ("cut PNG", encoded(picture(256, 256), "PNG")[:5000], "damaged"),
        ("cut WebP", encoded(picture(256, 256), "WEBP")[:300], "damaged"),
    ],
)
def test_broken_pictures_are_sentences(name, data, message):
    for read in (picture_size, read_picture):
        with pytest.raises(DataError, match=message):
            read(data)


def test_a_bomb_is_not_decoded():
    """A PNG of 30000x30000 pixels in 100 kilobytes."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    for read in (picture_size, read_picture):
        with pytest.raises(DataError, match="too large"):
            read(io.BytesIO(data).getvalue())
