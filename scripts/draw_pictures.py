"""Draw the pictures of the README that a command makes, of the digits that the package carries.

    pip install '.[tools]'
    python scripts/draw_pictures.py          # into scripts/pictures, a minute or two

    demo.png                 equivision-timm demo
    rotate_eval_digits.png   equivision-timm rotate-eval, of four small networks
    show_digit.png           equivision-timm show, of an equivariant network and its plain twin

Others: segment.jpg is that of `scripts/examples/segment.py --picture`; those in scripts/benchmarks are drawn by the
scripts that measure.
"""

import argparse
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from equivision_timm.cli import demo
from equivision_timm.cli.main import main as run

MODELS = ["test_c8resnetaf", "test_c8resnet", "test_d4resnet", "test_c1resnet"]
SHOWN = ["test_c8resnet", "test_c1resnet"]


def write_digits(folder: Path, every: int) -> None:
    """Every n-th of the held-out digits as `folder`/CLASS/NUMBER.png."""
    digits, labels = demo.load_digits()
    for number in range(0, len(digits), every):
        path = folder / str(labels[number].item()) / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits[number].numpy()).save(path)


def main(out: Path, every: int = 1) -> None:
    """Write the pictures into the folder `out`; of every n-th digit, for a quick look."""
    with TemporaryDirectory() as temporary:
        data, results = Path(temporary, "digits"), Path(temporary, "results")
        write_digits(data, every)
        place = ["--data", str(data), "--out", str(results)]
        run(["rotate-eval", "--models", *MODELS, *place, "-j", "0", "--device", "cpu"])
        shutil.copyfile(results / "rotation.png", out / "rotate_eval_digits.png")
        two = min((data / "2").iterdir())
        run(["show", str(two), "--model", *SHOWN, "--out", str(out / "show_digit.png")])
    demo.measure(out / "demo.png", every=every)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    sys.exit(main(Path(__file__).parent / "pictures"))
