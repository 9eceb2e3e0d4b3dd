"""Opening pictures: every depth that occurs gives the same picture as 8 bits do, or an error that names the file."""

import io
import random

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

from equivision_timm.data import ENDINGS, ImageFolder, PictureError, find_photographs, open_rgb
from equivision_timm.rotation import RotatedFolder

GREY = np.random.default_rng(0).integers(0, 256, (24, 40), dtype=np.uint8)
GREY[0, :2] = 0, 255
COLOUR = np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)
WIDE = GREY.astype(np.uint16) * 257  # the same greys in 16 bits


def tiff(values, white_is_zero=False, big_endian=False, signed=False):
    """A TIFF file of one channel, uncompressed, written by hand."""
    order, mark = (">", b"MM") if big_endian else ("<", b"II")
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    sample = 3 if values.dtype.kind == "f" else 2 if signed else 1
    size = 8 * values.dtype.itemsize
    tags = [(256, 4, values.shape[1]), (257, 4, values.shape[0]), (258, 3, size), (259, 3, 1)]
    tags += [(262, 3, 0 if white_is_zero else 1), (273, 4, 8), (277, 3, 1), (278, 4, values.shape[0])]
    tags += [(279, 4, len(data)), (339, 3, sample)]
    endian = "big" if big_endian else "little"
    directory = len(tags).to_bytes(2, endian)
    for tag, kind, value in tags:
        content = value.to_bytes(2, endian) + bytes(2) if kind == 3 else value.to_bytes(4, endian)
        directory += tag.to_bytes(2, endian) + kind.to_bytes(2, endian) + (1).to_bytes(4, endian) + content
    return mark + (42).to_bytes(2, endian) + (8 + len(data)).to_bytes(4, endian) + data + directory + bytes(4)


def saved(picture, format, **options):
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


SAME = {
    "8 bits": saved(Image.fromarray(GREY), "PNG"),
    "palette": saved(Image.fromarray(GREY).convert("P"), "PNG"),
    "palette with transparency": saved(Image.fromarray(GREY).convert("P"), "PNG", transparency=bytes(range(9))),
    "alpha": saved(Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(GREY.T.reshape(24, 40)))), "PNG"),
    "PNG of 16 bits": saved(Image.fromarray(WIDE), "PNG"),
    "PPM of 16 bits": b"P5 40 24 65535\n" + WIDE.astype(">u2").tobytes(),
    "TIFF of 16 bits": saved(Image.fromarray(WIDE), "TIFF"),
    "TIFF of 16 bits, big-endian": tiff(WIDE, big_endian=True),
    "TIFF of 16 bits, white is zero": tiff(65535 - WIDE, white_is_zero=True),
    "TIFF of 8 bits, white is zero": tiff(255 - GREY, white_is_zero=True),
    "TIFF of floats": tiff((GREY / 255).astype(np.float32)),
}


@pytest.mark.parametrize("content", SAME.values(), ids=SAME)
def test_every_depth_gives_the_same_picture(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    picture = open_rgb(tmp_path / "x")
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), np.repeat(GREY[..., None], 3, axis=2))


def test_pillow_alone_makes_16_bits_white(tmp_path):
    """Negative control: what the conversion of Pillow does, and with it timm's readers."""
    Image.fromarray(np.maximum(WIDE, 257)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as file:
        white = np.asarray(file.convert("RGB"))
    assert white.mean() > 250 > 200 > np.asarray(open_rgb(tmp_path / "x.png")).mean()


REFUSED = {
    "12 of 16 bits": (saved(Image.fromarray(WIDE // 16), "PNG"), "values are from 0 to 4095, .* white 65535"),
    "signed 16 bits": (tiff(WIDE // 2, signed=True), "from 0 to 32767, where white is unknown"),
    "32 bits": (tiff(WIDE.astype(np.uint32)), "from 0 to 65535, where white is unknown"),
    "floats to 255": (tiff(GREY.astype(np.float32)), "from 0 to 255, where black is 0 and white 1"),
    "negative floats": (tiff(GREY.astype(np.float32) / 255 - 0.5), "from -0.5 to 0.5"),
    "NaN": (tiff(np.full((4, 4), np.nan, np.float32)), "from nan"),
    "nothing": (b"", "cannot identify"),
    "text": (b"hello", "cannot identify"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(PictureError, match=rf"x\.png.*{message}"):
        open_rgb(tmp_path / "x.png")


def test_colours_and_extremes_are_read(tmp_path):
    Image.fromarray(WIDE * 0).save(tmp_path / "black.png")
    assert np.asarray(open_rgb(tmp_path / "black.png")).max() == 0
    Image.fromarray(COLOUR).save(tmp_path / "colour.png")
    assert np.array_equal(np.asarray(open_rgb(tmp_path / "colour.png")), COLOUR)


@pytest.mark.parametrize("name", ["missing.png", "two\nlines.png", "zero\0.png"])
def test_no_file(tmp_path, name):
    with pytest.raises(PictureError) as raised:
        open_rgb(tmp_path / name)
    assert repr(str(tmp_path / name)) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_damaged_files(tmp_path, format):
    """Cut, overwritten, repeated: a picture or an error of one line that names the file."""
    content, path, refused = saved(Image.fromarray(COLOUR), format), tmp_path / "x.png", 0
    rng = random.Random(0)
    for i in range(100):
        copy, at = bytearray(content), rng.randrange(len(content))
        if i % 4 == 0:
            del copy[at:]
        elif i % 4 == 1:
            copy[at : at + 4] = rng.randbytes(4)
        elif i % 4 == 2:
            copy[at % 64 : at % 64 + 2] = rng.randbytes(2)
        else:
            del copy[at : at + 16]
        path.write_bytes(copy)
        try:
            message = open_rgb(path).mode
        except PictureError as error:
            message, refused = str(error), refused + 1
        assert message == "RGB" or (repr(str(path)) in message and "\n" not in message)
    assert refused > 5


def test_folders_are_read_as_timm_reads_them(tmp_path):
    """The same files, classes and order, with any of the endings; of TIFF timm itself finds nothing."""
    for label in ("b10", "b2", "a"):
        (tmp_path / "val" / label / "deep").mkdir(parents=True)
        for ending in (*ENDINGS, ".TIF"):
            Image.new("L", (8, 8), 99).save(tmp_path / "val" / label / f"x{ending}", "TIFF")
        Image.new("L", (8, 8), 99).save(tmp_path / "val" / label / "deep" / "10.png")
        Image.new("L", (8, 8), 99).save(tmp_path / "val" / label / "deep" / "9.png")
    reader = create_dataset("", str(tmp_path), split="validation").reader
    folder = ImageFolder(tmp_path, "validation")
    png = [sample for sample in folder.samples if sample[0].endswith((".png", ".jpg", ".jpeg"))]
    assert (png, folder.class_to_idx) == (reader.samples, reader.class_to_idx)
    assert len(folder) == 3 * (len(ENDINGS) + 1 + 2) > len(reader.samples)
    assert folder[0][0].getpixel((4, 4)) == (99, 99, 99)
    assert len(find_photographs(tmp_path)) == len(folder)
    assert len(RotatedFolder(tmp_path, "validation", training=False)) == len(folder)
