"""Draw the pictures of the README that commands make, from the digits in the package.

    pip install '.[tools]'
    python scripts/draw_pictures.py          # into scripts/pictures, a minute or two

    demo.png                 equivision-timm demo
    rotate_eval_digits.png   equivision-timm rotate-eval, of four small networks
    show_digit.png           equivision-timm show, of an equivariant network and its plain twin

`scripts/examples/segment.py --picture` draws segment.jpg; the scripts that measure draw those in scripts/benchmarks.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from equivision_timm.cli import demo
from equivision_timm.cli.main import main as run

MODELS = ["test_c8resnetaf", "test_c8resnet", "test_d4resnet", "test_c1resnet"]
SHOWN = ["test_c8resnet", "test_c1resnet"]
OUT = Path(__file__).parent / "pictures"


def write_digits(folder: Path) -> None:
    """The held-out digits as `folder`/CLASS/NUMBER.png."""
    digits, labels = demo.load_digits()
    for number, (digit, label) in enumerate(zip(digits.numpy(), labels.tolist(), strict=True)):
        path = folder / str(label) / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digit).save(path)


def main() -> None:
    with TemporaryDirectory() as temporary:
        data, results = Path(temporary, "digits"), Path(temporary, "results")
        write_digits(data)
        place = ["--data", str(data), "--out", str(results)]
        run(["rotate-eval", "--models", *MODELS, *place, "-j", "0", "--device", "cpu"])
        shutil.copyfile(results / "rotation.png", OUT / "rotate_eval_digits.png")
        two = min((data / "2").iterdir())
        run(["show", str(two), "--model", *SHOWN, "--out", str(OUT / "show_digit.png")])
    demo.measure(OUT / "demo.png")


if __name__ == "__main__":
    main()
