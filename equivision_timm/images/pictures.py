"""Open picture files as RGB: one way for every command, so that no file becomes white, black or a raw error.

8 bits a channel stay as they are, and colour with 16 bits a channel keeps the upper 8 (Pillow does that). One grey
channel with more than 8 bits, as microscopes and satellites write it, is scaled by the range of its type: 16-bit
integers from 0 ... 65535, floating-point numbers from 0 ... 1, to 0 ... 255. A picture whose values do not show that
this is their range is refused: 32-bit integers, floats beyond 0 ... 1, and 16-bit pictures that use less than the
lower sixteenth of the range, which hold 12 bits or fewer and would become nearly black.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from timm.data import get_img_extensions, set_img_extensions

__all__ = ["ENDINGS", "MOST_PIXELS", "PictureError", "every_ending", "open_rgb"]

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".avif", ".bmp")  # of files taken for pictures in folders

MOST_PIXELS = 178_956_970  # Pillow's own limit; decoded, such a picture takes 0.7 GB
_FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "PPM")  # none runs other programs
_WHITE_IS_ZERO = 262, 0  # tag and value in a TIFF file; Pillow inverts 8 bits, but not 16


class PictureError(ValueError):
    """A picture file that cannot be read as RGB; the message names the file and says how to mend it."""


def open_rgb(path: str | Path) -> Image.Image:
    """The picture in a file as RGB with 8 bits a channel, the first one where the file holds several.

    Transparency is dropped, and an orientation in the metadata ignored, as timm does it.

    Args:
        path: a PNG, JPEG, TIFF, WebP, AVIF, JPEG 2000, GIF, BMP or PPM file, whatever its name ends in.

    Raises:
        PictureError: missing, unreadable, damaged or truncated, no picture, too large, or of a range that is not known.
    """
    name = repr(str(path))
    try:
        if not Path(path).is_file():  # opening a pipe would wait for ever
            raise PictureError(f"there is no picture file {name}: give the name of one")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata; sizes that Pillow still reads
            with _open(path, name) as file:
                if file.mode.startswith("I") or file.mode == "F":
                    return Image.fromarray(_scale(file, name)).convert("RGB")
                return (file.convert("RGBA") if "transparency" in file.info else file).convert("RGB")
    except PictureError:
        raise
    except Exception as error:  # what damaged files provoke in Pillow: a dozen types
        raise PictureError(
            f"cannot read the picture {name} ({_reason(error)}): save it anew or leave it out"
        ) from error


@contextlib.contextmanager
def every_ending() -> Iterator[None]:
    """Within this, timm's reader of folders finds files with any of `ENDINGS`; by itself PNG and JPEG alone."""
    before = get_img_extensions()
    set_img_extensions((*before, *ENDINGS))
    try:
        yield
    finally:
        set_img_extensions(before)


def _open(path: str | Path, name: str) -> Image.Image:
    Image.init()
    try:
        file = Image.open(path, formats=[format for format in _FORMATS if format in Image.OPEN])
    except Image.UnidentifiedImageError as error:
        raise PictureError(
            f"{name} is no picture in one of the formats {', '.join(_FORMATS)}, or a damaged one: convert it, save it "
            "anew or leave it out"
        ) from error
    except Image.DecompressionBombError as error:
        raise PictureError(_too_large(name)) from error
    if file.width * file.height > MOST_PIXELS:
        raise PictureError(_too_large(name))
    return file


def _too_large(name: str) -> str:
    return f"the picture {name} has more than {round(MOST_PIXELS / 1e6)} megapixels: make it smaller or cut it"


def _scale(file: Image.Image, name: str) -> np.ndarray:
    """The one channel of a picture with more than 8 bits, [H, W] uint8."""
    values = np.asarray(file)
    low, high = values.min(), values.max()
    if file.mode == "F":
        top, least = 1.0, 0.0
    elif file.mode.startswith("I;16") or file.format in ("PNG", "PPM"):  # these two know no more than 16 bits
        top, least = 65535.0, 4096
    else:
        raise PictureError(
            f"the picture {name} holds 32-bit integers, here {low} to {high}, and does not say which is white: "
            "save it with 8 or 16 bits"
        )
    if not (low >= 0 and high <= top and (high >= least or high == low == 0)):
        raise PictureError(
            f"the picture {name} holds values from {low:g} to {high:g}, where black is 0 and white {top:g}: scale them "
            "to this range, or save it with 8 bits"
        )
    grey = values * (255 / top)
    tag, white_is_zero = _WHITE_IS_ZERO
    if isinstance(file, TiffImageFile) and file.tag_v2.get(tag) == white_is_zero:
        grey = 255 - grey
    return np.rint(grey).astype(np.uint8)


def _reason(error: Exception) -> str:
    """The first line of an error, or its type where it says nothing."""
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
