"""The folder of upright photographs that the orientation networks were trained on, from two Debian packages.

    apt-get download gcompris-qt-data tuxpaint-stamps-default
    dpkg -x gcompris-qt-data_*.deb packages; dpkg -x tuxpaint-stamps-default_*.deb packages
    python scripts/orientation_photographs.py packages PHOTOGRAPHS

writes PHOTOGRAPHS/train/upright/*.png, 160 pixels along the short side: photographs of gcompris-qt, and cut-out objects
of tuxpaint-stamps on a plain and on a blurred background. The selection of pictures with a clear upright, made by eye,
is orientation_photographs.json. Photographs of other sources belong in PHOTOGRAPHS/val.
"""

import argparse
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SELECTION = Path(__file__).with_suffix(".json")
SIDE = 160
RESOURCES = "usr/share/gcompris-qt/rcc"
STAMPS = "usr/share/tuxpaint/stamps"
_START = re.compile(rb"\xff\xd8\xff[\xe0\xe1\xdb\xee]|RIFF....WEBP", re.DOTALL)  # JPEG and WebP


def resources(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    """The pictures of at least 150 pixels in Qt's resource files, named FILE_NUMBER in the order of the file."""
    for file in sorted(folder.glob("**/*.rcc")):
        content = file.read_bytes()
        starts = [m.start() for m in _START.finditer(content)]
        counts: Counter[str] = Counter()
        for start in sorted(starts, key=lambda s: (content[s : s + 4] == b"RIFF", s)):
            try:
                picture = Image.open(io.BytesIO(content[start:])).convert("RGB")
            except OSError:  # bytes that only look like the start of a picture
                continue
            if min(picture.size) >= 150:
                yield f"{file.stem}_{counts[file.stem]:03}", picture
                counts[file.stem] += 1


def shrunk(picture: Image.Image) -> Image.Image:
    scale = SIDE / min(picture.size)
    size = [round(side * scale) for side in picture.size]
    return picture.resize(size, Image.Resampling.LANCZOS) if scale < 1 else picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder of the unpacked packages")
    parser.add_argument("folder", type=Path, help="folder to create")
    arguments = parser.parse_args()
    selection = json.loads(SELECTION.read_text())
    out = arguments.folder / "train" / "upright"
    out.mkdir(parents=True)

    chosen = set(selection["gcompris-qt-data"])
    photographs = [(n, shrunk(p)) for n, p in resources(arguments.packages / RESOURCES) if n in chosen]
    for name, photograph in photographs:
        photograph.save(out / f"{name}.png")
    random = np.random.default_rng(0)
    for number, stamp in enumerate(selection["tuxpaint-stamps-default"]):
        picture = Image.open(arguments.packages / STAMPS / stamp).convert("RGBA")
        picture.thumbnail((140, 140), Image.Resampling.LANCZOS)
        plain = Image.new("RGBA", (SIDE, SIDE), (*random.integers(60, 255, 3).tolist(), 255))
        _, photograph = photographs[random.integers(len(photographs))]
        blurred = photograph.resize((SIDE, SIDE)).resize((6, 6)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        for kind, ground in (("plain", plain), ("blurred", blurred.convert("RGBA"))):
            ground.alpha_composite(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
            ground.convert("RGB").save(out / f"stamp_{number:03}_{kind}.png")
    print(f"{len(list(out.iterdir()))} pictures in {out}")


if __name__ == "__main__":
    main()
