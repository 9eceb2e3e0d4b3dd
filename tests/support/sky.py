"""A folder as that of Debian's `stellarium-data`."""

import gzip
import json
import math
import re
import struct

import numpy as np
from PIL import Image


def write_sky(folder, count=12, mirrored=False, kinds=(0,)):
    """Photographs of one ellipse each, as Stellarium describes them; returns position angles plus rotations, degrees.

    North is up and east to the left before the photograph is rotated counter-clockwise. `kinds` in the catalogue
    alternate: a globular cluster, 7, is round. Photograph 18 is at the place of the first.
    """
    entries, tiles, angles = [struct.pack(">I", 2) + "1".encode("utf-16-be") + struct.pack(">I", 0)], [], []
    axis = np.linspace(-1, 1, 160)
    for index in range(count):
        position, rotation, ra = 15.0 * index, 100.0 * index, 20.0 * index
        theta = math.radians(90 + position + rotation)
        right, up = axis[None], -axis[:, None]
        along, across = (right * math.cos(a) + up * math.sin(a) for a in (theta, theta + math.pi / 2))
        kind = kinds[index % len(kinds)]
        light = np.exp(-8 * along**2 - (8 if kind == 7 else 80) * across**2)
        Image.fromarray((255 * light).astype(np.uint8)).save(folder / f"{index}.png")
        cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
        corners = [(cos * x + sin * y, -sin * x + cos * y) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        sky = [[ra + (x if mirrored else -x) / 10, y / 10] for x, y in corners]
        tiles.append(
            {"imageUrl": f"{index}.png", "worldCoords": [sky], "textureCoords": [[[0, 0], [1, 0], [1, 1], [0, 1]]]}
        )
        numbers = struct.pack(">Idddd", index, math.radians(ra), 0, 9, 9) + struct.pack(">II", kind, 0)
        entries.append(numbers + struct.pack(">ddi6d", 0.1, 0.04, round(position), *[0] * 6) + bytes(4 * 29))
        angles.append(90 + position + rotation)
    (folder / "catalog.dat").write_bytes(gzip.compress(b"".join(entries)))
    (folder / "textures.json").write_text(re.sub(r"\b0\.(?=\d)", ".", json.dumps({"subTiles": tiles})))
    return angles
