"""scripts/draw_pictures.py draws the pictures of the README that commands make."""

import runpy
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]


def test_draws_what_the_readme_shows(tmp_path: Path) -> None:
    """Of every 25th digit, as large as those that lie in the repository."""
    runpy.run_path(str(ROOT / "scripts" / "draw_pictures.py"))["main"](tmp_path, every=25)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"demo.png", "rotate_eval_digits.png", "show_digit.png"}
    for name in drawn:
        with Image.open(tmp_path / name) as new, Image.open(ROOT / "scripts" / "pictures" / name) as shown:
            assert new.size == shown.size
            assert len(new.convert("L").getcolors()) > 100  # not blank
