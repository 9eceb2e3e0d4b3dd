"""The README's steps for a new user, timed: a pretrained model, training, prediction, export, deployment.

    pip install '.[export]' scikit-image
    python scripts/new_user.py                                       # fine-tunes by the plain loop below
    python scripts/new_user.py --train-script CLONE/train.py         # by timm's script, with configs/finetune.yaml
    python scripts/new_user.py --model test_c1resnet                 # the plain twin, which fails at the last step

Stand-ins: a folder with timm's `test_resnet`, its weights random, for timm's models on the Hub; the plain loop for
timm's train.py; a model of the package trained on handwritten digits for pretrained weights.

The images are pieces of three photographs of scikit-image, left halves for training, right halves for the test. The
ONNX file runs without PyTorch. Images rotated by 90, 180 and 270 degrees must get the same probabilities to 1e-4 from
the adapted model, from `equivision-timm predict` and from the ONNX file, otherwise the exit status is 1.
"""

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from timm.data import create_dataset, create_loader, create_transform, resolve_data_config
from timm.models import save_for_hf
from timm.utils import random_seed
from tqdm import tqdm

import equivision_timm  # noqa: F401  registers the models

CLASSES = ("brick", "grass", "gravel")
SIZE = 65  # pixels, 1 mod 32: quarter turns are exact
ANGLES = (0, 90, 180, 270)
EPOCHS, BATCH_SIZE = 6, 16
TOLERANCE = 1e-4
CONFIG = Path(__file__).parents[1] / "configs" / "finetune.yaml"


@contextmanager
def step(title: str) -> Iterator[list[str]]:
    """Print the seconds of the body, and the notes that it appends to the list."""
    notes, start = [], time.perf_counter()
    yield notes
    print(f"{title:12} {time.perf_counter() - start:5.1f} s  {' '.join(notes)}", flush=True)


def write_pictures(folder: Path) -> None:
    """`folder`/train and `folder`/val with a folder for each class; `folder`/new/ANGLE/CLASS: those of val, rotated."""
    random = np.random.default_rng(0)
    for name in CLASSES:
        photograph = getattr(data, name)()  # [512, 512]
        half = photograph.shape[1] // 2
        for split, count, left in (("train", 48, 0), ("val", 16, half)):
            for i in range(count):
                y, x = random.integers(0, photograph.shape[0] - SIZE), left + random.integers(0, half - SIZE)
                crop = photograph[y : y + SIZE, x : x + SIZE]
                _save(crop, folder / split / name / f"{i:03}.png")
                for angle in ANGLES if split == "val" else ():
                    _save(np.rot90(crop, angle // 90), folder / "new" / str(angle) / name / f"{i:03}.png")


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def adapt(folder: Path) -> dict[str, np.ndarray]:
    """{ANGLE/CLASS/FILE: probabilities} of a picture at four angles, by a timm model made equivariant."""
    save_for_hf(timm.create_model("test_resnet"), folder / "hub", safe_serialization=True)
    backbone = f"local-dir:{folder / 'hub'}"
    model = timm.create_model("symmetrized", backbone=backbone, group="d4", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model))
    files = [f"{angle}/{CLASSES[0]}/000.png" for angle in ANGLES]
    pictures = [transform(Image.open(folder / "new" / file).convert("RGB")) for file in files]
    with torch.inference_mode():
        return {file: model(image[None]).softmax(1)[0].numpy() for file, image in zip(files, pictures, strict=True)}


def fine_tune(name: str, folder: Path) -> Path:
    """Train on `folder`/train from the pretrained weights of model `name`; returns the file of the checkpoint."""
    random_seed(0)
    model = timm.create_model(name, pretrained=True, num_classes=len(CLASSES))
    config = resolve_data_config(model=model)
    images = {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")}
    loader = create_loader(
        create_dataset("", str(folder), split="train"),
        batch_size=BATCH_SIZE,
        is_training=True,
        scale=(0.5, 1.0),
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
        **images,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=EPOCHS * len(loader))
    with tqdm(total=EPOCHS * len(loader), desc=name, unit="batch") as progress:
        for _ in range(EPOCHS):
            for batch, classes in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(batch), classes).backward()
                optimizer.step()
                scheduler.step()
                progress.update()
    path = folder / "model_best.pth.tar"
    torch.save({"arch": name, "state_dict": model.state_dict()}, path)
    return path


def fine_tune_by_timm(train_script: Path, name: str, folder: Path) -> Path:
    """The same by timm's train.py, with configs/finetune.yaml."""
    command = [sys.executable, str(train_script), "--config", str(CONFIG), "--data-dir", ".", "--model", name]
    command += ["--num-classes", str(len(CLASSES)), "--experiment", "first", "--device", "cpu"]
    command += ["--img-size", str(SIZE), "--epochs", str(EPOCHS), "--warmup-epochs", "1", "-b", str(BATCH_SIZE)]
    command += ["-j", "1", "--lr", "2e-3", "--layer-decay", "1"]  # small images, and few
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "output" / "train" / "first" / "model_best.pth.tar"


def equivision_timm_command(*words: str) -> str:
    """Output of `equivision-timm WORDS`."""
    command = [sys.executable, "-m", "equivision_timm", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def predict(name: str, checkpoint: Path, folder: Path) -> dict[str, np.ndarray]:
    """{ANGLE/CLASS/FILE: probabilities [classes]} of `folder`/new, by `equivision-timm predict`."""
    model = ["--model", f"{name}={checkpoint}", "--class-map", str(folder / "train"), "--device", "cpu"]
    printed = equivision_timm_command("predict", str(folder / "new"), *model)
    probabilities: dict[str, np.ndarray] = {}
    for row in csv.DictReader(printed.splitlines()):
        file = Path(row["file"]).relative_to(folder / "new").as_posix()
        probabilities.setdefault(file, np.zeros(len(CLASSES)))[CLASSES.index(row["name"])] = float(row["probability"])
    return probabilities


def export(name: str, checkpoint: Path, folder: Path) -> Path:
    """The ONNX file written by `equivision-timm export`."""
    path = folder / "model.onnx"
    equivision_timm_command("export", f"{name}={checkpoint}", str(path), "--class-map", str(folder / "train"))
    return path


def deployed(path: Path, files: list[Path]) -> np.ndarray:
    """Probabilities [files, CLASSES] of an ONNX file, prepared by its metadata; without PyTorch."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    mean, std = (np.array(about[key].split(), np.float32) for key in ("mean", "std"))
    images = np.stack([np.asarray(Image.open(file).convert("RGB"), np.float32) for file in files])
    batch = np.ascontiguousarray(
        ((images * np.float32(about["scale"]) - mean) / std).transpose(0, 3, 1, 2)
    )  # [B, 3, H, W]
    (logits,) = session.run(["logits"], {"images": batch})
    exponential = np.exp(logits - logits.max(1, keepdims=True))
    order = [about["classes"].splitlines().index(name) for name in CLASSES]
    return (exponential / exponential.sum(1, keepdims=True))[:, order]


def accuracy(probabilities: dict[str, np.ndarray]) -> float:
    """The fraction of ANGLE/CLASS/FILE with CLASS as the most probable class."""
    return np.mean([CLASSES[row.argmax()] == Path(file).parts[1] for file, row in probabilities.items()]).item()


def change_under_rotation(probabilities: dict[str, np.ndarray]) -> float:
    """The largest difference of a probability between a rotated image and the unrotated image."""
    rotated = [(row, probabilities["0/" + file.partition("/")[2]]) for file, row in probabilities.items()]
    return max(np.abs(row - upright).max().item() for row, upright in rotated)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_c8resnet", help="of the package, with weights (default: %(default)s)")
    parser.add_argument("--train-script", type=Path, help="timm's train.py (default: a plain loop)")
    args = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with step("pictures") as notes:
            write_pictures(folder)
            notes.append(f"{len(list(folder.rglob('train/*/*')))} of {', '.join(CLASSES)}")
        with step("adapt") as notes:
            adapted = adapt(folder)
            notes.append("timm's test_resnet, symmetrized under d4")
        with step("fine-tune") as notes:
            if args.train_script:
                checkpoint = fine_tune_by_timm(args.train_script.resolve(), args.model, folder)
            else:
                checkpoint = fine_tune(args.model, folder)
            notes.append(f"{args.model}, {EPOCHS} epochs")
        with step("predict") as notes:
            predicted = predict(args.model, checkpoint, folder)
            notes.append(f"{accuracy(predicted):.1%} of {len(predicted)} new images correct")
        with step("export") as notes:
            path = export(args.model, checkpoint, folder)
            notes.append(f"{path.name}, {path.stat().st_size / 1e6:.1f} MB")
        with step("deploy") as notes:
            files = [folder / "new" / file for file in predicted]
            answers = dict(zip(predicted, deployed(path, files), strict=True))
            apart = max(np.abs(answers[file] - predicted[file]).max() for file in predicted)
            notes.append(f"{accuracy(answers):.1%} correct, probabilities {apart:.1e} from those of predict")
    sources = {"adapt": adapted, "predict": predicted, "deploy": answers}
    changes = {name: change_under_rotation(probabilities) for name, probabilities in sources.items()}
    print("rotated images: probabilities change by " + ", ".join(f"{v:.1e} in {k}" for k, v in changes.items()))
    if max(*changes.values(), apart) > TOLERANCE:
        print(f"rotated images do not get the same probabilities to {TOLERANCE:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
