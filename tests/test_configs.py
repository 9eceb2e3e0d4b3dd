"""Every recipe in configs/ loads through timm's own parser and builds model, optimiser, scheduler and augmentation."""

import argparse
import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import timm
import torch
import yaml
from support.small_models import TEXTURES, write_textures
from timm.data import Mixup, create_dataset, create_transform
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

import equivision_timm
from equivision_timm.cli.configs import find_configs
from equivision_timm.cli.main import main
from equivision_timm.rotation import RotatedFolder

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
NEEDS_CLONE = "needs timm's scripts: set TIMM_SCRIPTS to a clone of its repository"


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def train_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """timm's train.py as a module."""
    if "TIMM_SCRIPTS" not in os.environ:
        pytest.skip(NEEDS_CLONE)
    spec = importlib.util.spec_from_file_location("timm_train", Path(os.environ["TIMM_SCRIPTS"], "train.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_timm_parser_knows_every_key_and_value(
    config: Path, train_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm takes defaults from YAML unchecked; here each must come out as if it had been typed."""
    values = yaml.safe_load(config.read_text())
    actions = {action.dest: action for action in train_script.parser._actions}
    assert not values.keys() - actions.keys()
    typed = ["train.py", "--data-dir", "DIR"]
    for key, value in values.items():
        action = actions[key]
        words = [] if value is True else [str(v) for v in value] if isinstance(value, list) else [str(value)]
        assert not (value is True and not isinstance(action, argparse._StoreTrueAction)), key
        typed += [action.option_strings[-1], *words]
    monkeypatch.setattr(sys, "argv", typed)
    as_typed, _ = train_script._parse_args()
    monkeypatch.setattr(sys, "argv", ["train.py", "--data-dir", "DIR", "--config", str(config)])
    from_config, _ = train_script._parse_args()
    assert vars(from_config) == vars(as_typed)
    for key, value in values.items():
        assert getattr(from_config, key) == value


def test_mixed_precision_is_left_to_the_command_line(config: Path) -> None:
    """timm has no options that switch them off; bfloat16 without its instructions takes 15 times as long."""
    values = yaml.safe_load(config.read_text())
    assert not values.keys() & {"amp", "pin_mem", "model_dtype"}
    assert ("--amp" in config.read_text()) is ("amp_dtype" in values)


def test_scratch_is_the_twin_of_finetune() -> None:
    """The same recipe without what takes weights for granted, longer and at a higher rate."""
    finetune, scratch = (
        yaml.safe_load((CONFIGS[0].parent / f"{name}.yaml").read_text()) for name in ("finetune", "scratch")
    )
    assert finetune.keys() - scratch.keys() == {"pretrained", "layer_decay"}
    assert finetune["pretrained"] is True
    assert not scratch.keys() - finetune.keys()
    assert {key for key in scratch if scratch[key] != finetune[key]} == {"lr", "epochs", "warmup_epochs"}


def _commands(config: Path) -> list[list[str]]:
    """The commands in the head of a recipe, each as words."""
    head = re.split(r"^[^#]", config.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    lines = re.sub(r"\\\n#", " ", head).splitlines()
    return [line.removeprefix("#").split() for line in lines if line.startswith("#   ")]


def test_command_copies_the_recipes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Into a new folder, again into the same; an edited recipe is not replaced."""
    folder = tmp_path / "new"
    for _ in range(2):
        assert main(["configs", str(folder)]) == 0
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {p.name: p.read_bytes() for p in CONFIGS}
    assert str(folder / "finetune.yaml") in capsys.readouterr().out.splitlines()
    (folder / "scratch.yaml").write_text("lr: 1")
    assert main(["configs", str(folder)]) == 2
    assert "scratch.yaml" in capsys.readouterr().err
    assert (folder / "scratch.yaml").read_text() == "lr: 1"


def test_recipes_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder inside the package, where the build puts it, comes before one beside the package."""
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '[tool.hatch.build.targets.wheel.force-include]\n"configs" = "equivision_timm/configs"' in pyproject
    monkeypatch.setattr(equivision_timm, "__file__", str(tmp_path / "equivision_timm" / "__init__.py"))
    for folder in (tmp_path / "configs", tmp_path / "equivision_timm" / "configs"):
        folder.mkdir(parents=True)
        (folder / "one.yaml").touch()
        assert find_configs() == [folder / "one.yaml"]


# The smallest run: what is given last counts
SMALL = ["--device", "cpu", "--img-size", "65", "--epochs", "1", "-j", "1", "-b", "16"]


@pytest.mark.parametrize("name", ["finetune", "scratch"])
def test_commands_in_the_head_run(name: str, tmp_path: Path) -> None:
    """With small images and the smallest model: train, validate, measure under rotation, predict, as written."""
    if "TIMM_SCRIPTS" not in os.environ:
        pytest.skip(NEEDS_CLONE)
    data = write_textures(tmp_path / "data", train=16, validation=4, size=65)
    (data / "validation").rename(data / "val")
    config = CONFIGS[0].parent / f"{name}.yaml"
    words = {
        "DATA": str(data),
        "DATA/train": f"{data}/train",
        "N": "3",
        "IMAGES": f"{data}/val",
        "train.py": f"{os.environ['TIMM_SCRIPTS']}/train.py",
        "validate.py": f"{os.environ['TIMM_SCRIPTS']}/validate.py",
        f"configs/{name}.yaml": str(config),
    }
    model = next(c[c.index("--model") + 1] for c in _commands(config) if "train.py" in c)
    best = "output/train/first/model_best.pth.tar"
    assert best in config.read_text()
    added = {
        "train.py": SMALL,
        "validate.py": ["--device", "cpu", "--img-size", "65", "-j", "0"],
        "rotate-eval": ["--device", "cpu", "--size", "65", "--angles", "0,90", "-j", "0"],
        "predict": ["--device", "cpu"],
    }
    ran = []
    for command in _commands(config):
        what = next((word for word in command if word in added), None)
        if what is None or command[0] == "torchrun":
            continue
        command = [words.get(word, word).replace(model, "test_c8resnet").replace("BEST", best) for word in command]
        program = ["-m", "equivision_timm"] if command[0] == "equivision-timm" else []
        assert program or command[0] == "python"
        done = subprocess.run(
            [sys.executable, *program, *command[1:], *added[what]],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (what, done.stderr[-3000:])
        ran.append(what)
    assert ran == list(added)
    predicted = list(csv.DictReader(done.stdout.splitlines()))
    assert len(predicted) == 3 * 4 * 3  # classes, images of each, rows of each
    assert {row["name"] for row in predicted} == set(TEXTURES)


def _build(args: SimpleNamespace | argparse.Namespace) -> SimpleNamespace:
    """Model, optimizer, ... that train.py makes from its arguments, by timm's own factories."""
    model = timm.create_model(
        "c4resnet18_fast", num_classes=10, drop_path_rate=getattr(args, "drop_path", None), width=2
    )
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    transform = create_transform(
        (3, args.img_size, args.img_size),
        is_training=True,
        scale=getattr(args, "scale", None),
        hflip=getattr(args, "hflip", 0.5),
        color_jitter=getattr(args, "color_jitter", 0.4),
        auto_augment=getattr(args, "aa", None),
        interpolation=getattr(args, "train_interpolation", "random"),
    )
    return SimpleNamespace(model=model, optimizer=optimizer, scheduler=scheduler, epochs=epochs, transform=transform)


def _train_one_step(built: SimpleNamespace, args: SimpleNamespace | argparse.Namespace) -> None:
    """A step on noise: finite loss, parameters that move."""
    torch.manual_seed(0)
    images, targets = torch.randn(4, 3, 33, 33), torch.arange(4)
    loss_function = torch.nn.CrossEntropyLoss()
    if getattr(args, "mixup", 0):
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=10)
        images, targets = mixup(images, targets)
        loss_function = SoftTargetCrossEntropy()
        if getattr(args, "bce_loss", False):
            loss_function = BinaryCrossEntropy(target_threshold=args.bce_target_thresh)
    built.scheduler.step(args.warmup_epochs)
    before = built.model.conv1.conv.weight.clone()
    loss = loss_function(built.model(images), targets)
    loss.backward()
    built.optimizer.step()
    assert loss.isfinite()
    assert not torch.equal(before, built.model.conv1.conv.weight)


def test_builds_and_trains_from_the_values(config: Path) -> None:
    """Without timm's scripts: the same factories, fed from the file."""
    args = SimpleNamespace(**{"momentum": 0.9, **yaml.safe_load(config.read_text())})
    built = _build(args)
    assert built.epochs == args.epochs
    _train_one_step(built, args)


@pytest.mark.parametrize("name", ["equivision_in1k", "rotated_in1k"])
def test_original_recipe(name: str) -> None:
    """The original's command line and defaults, read back from what timm builds."""
    args = SimpleNamespace(**yaml.safe_load((CONFIGS[0].parent / f"{name}.yaml").read_text()))
    built = _build(args)
    assert type(built.optimizer) is torch.optim.SGD
    for group in built.optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["lr"]) == (0.9, False, 0.1)
        assert group["weight_decay"] in (0.0, 1e-4)
    rates = []
    for epoch in range(90):
        built.scheduler.step(epoch)
        rates.append(built.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(30 * [0.1] + 30 * [0.01] + 30 * [0.001])
    assert 4 * args.batch_size * args.grad_accum_steps == 256
    assert (args.amp_dtype, args.seed, args.img_size, args.crop_pct) == ("float16", 10, 224, 0.875)
    names = [type(step).__name__ for step in built.transform.transforms]
    assert names[:2] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]
    assert built.transform.transforms[0].interpolation.value == "bilinear"


def test_rotated_recipe_rotates(tmp_path: Path) -> None:
    args = yaml.safe_load((CONFIGS[0].parent / "rotated_in1k.yaml").read_text())
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "image.png").write_bytes(b"")
    assert isinstance(create_dataset(args["dataset"], root=str(tmp_path), split="train"), RotatedFolder)
