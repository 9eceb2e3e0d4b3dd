"""Every recipe in configs/ loads through timm's own parser and builds model, optimiser, scheduler and augmentation."""

import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))}
each_config = pytest.mark.parametrize("name", CONFIGS)


def read(name):
    return yaml.safe_load(CONFIGS[name].read_text())


@each_config
def test_timm_parser_knows_every_key_and_value(name, timm_scripts, monkeypatch):
    """timm takes defaults from YAML unchecked; here each must come out as if it had been typed."""
    spec = importlib.util.spec_from_file_location("timm_train", timm_scripts / "train.py")
    train_script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_script)
    actions = {action.dest: action for action in train_script.parser._actions}
    typed = []
    for key, value in read(name).items():
        words = [] if value is True else [str(v) for v in value] if isinstance(value, list) else [str(value)]
        assert value is not True or actions[key].nargs == 0, key
        typed += [actions[key].option_strings[-1], *words]
    parsed = []
    for options in (typed, ["--config", str(CONFIGS[name])]):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data-dir", "DIR", *options])
        parsed.append(vars(train_script._parse_args()[0]))
    assert parsed[0] == parsed[1]
    assert parsed[1].items() >= read(name).items()


def test_command_copies_the_recipes(tmp_path, capsys):
    """Into a new folder, again into the same; an edited recipe is not replaced."""
    folder = tmp_path / "new"
    for _ in range(2):
        assert main(["configs", str(folder)]) == 0
        copied = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert copied == {path.name: path.read_bytes() for path in CONFIGS.values()}
    assert str(folder / "finetune.yaml") in capsys.readouterr().out.splitlines()
    (folder / "scratch.yaml").write_text("lr: 1")
    assert main(["configs", str(folder)]) == 2
    assert "scratch.yaml" in capsys.readouterr().err
    assert (folder / "scratch.yaml").read_text() == "lr: 1"


def test_recipes_in_a_wheel(tmp_path, monkeypatch):
    """The folder inside the package, where the build puts it, comes before one beside the package."""
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '[tool.hatch.build.targets.wheel.force-include]\n"configs" = "equivision_timm/configs"' in pyproject
    monkeypatch.setattr(equivision_timm, "__file__", str(tmp_path / "equivision_timm" / "__init__.py"))
    for folder in (tmp_path / "configs", tmp_path / "equivision_timm" / "configs"):
        folder.mkdir(parents=True)
        (folder / "one.yaml").touch()
        assert find_configs() == [folder / "one.yaml"]


@pytest.mark.parametrize("name", ["finetune", "scratch"])
def test_commands_in_the_head_run(name, timm_scripts, tmp_path):
    """With small images and the smallest model: train, validate, measure under rotation, predict, as written."""
    data = write_textures(tmp_path / "data", train=16, validation=4, size=65)
    (data / "validation").rename(data / "val")
    head = re.split(r"^[^#]", CONFIGS[name].read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    lines = re.sub(r"\\\n#", " ", head).splitlines()
    commands = [line.removeprefix("#").split() for line in lines if line.startswith("#   ")]
    model = next(words[words.index("--model") + 1] for words in commands if "train.py" in words)
    replaced = {
        "DATA": str(data),
        "DATA/train": f"{data}/train",
        "N": "3",
        "IMAGES": f"{data}/val",
        "train.py": str(timm_scripts / "train.py"),
        "validate.py": str(timm_scripts / "validate.py"),
        f"configs/{name}.yaml": str(CONFIGS[name]),
    }
    added = {  # what is given last counts
        "train.py": ["--device", "cpu", "--img-size", "65", "--epochs", "1", "-j", "1", "-b", "16"],
        "validate.py": ["--device", "cpu", "--img-size", "65", "-j", "0"],
        "rotate-eval": ["--device", "cpu", "--size", "65", "--angles", "0,90", "-j", "0"],
        "predict": ["--device", "cpu"],
    }
    best = "output/train/first/model_best.pth.tar"
    assert best in head
    ran = []
    for command in commands:
        what = next((word for word in command if word in added), None)
        if what is None or command[0] == "torchrun":
            continue
        words = [replaced.get(word, word).replace(model, "test_c8resnet").replace("BEST", best) for word in command]
        program = ["-m", "equivision_timm"] if words[0] == "equivision-timm" else []
        assert program or words[0] == "python"
        done = subprocess.run(
            [sys.executable, *program, *words[1:], *added[what]],
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


def build(values):
    """The values, model, optimizer, scheduler and transform that train.py makes from them, by timm's own factories."""
    args = SimpleNamespace(**{"momentum": 0.9, **values})
    model = timm.create_model("c4resnet18_fast", num_classes=10, drop_path_rate=values.get("drop_path"), width=2)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    assert epochs == args.epochs
    keys = {"scale": "scale", "hflip": "hflip", "color_jitter": "color_jitter", "auto_augment": "aa"}
    augmentation = {keyword: values[key] for keyword, key in keys.items() if key in values}
    interpolation = values.get("train_interpolation", "random")
    transform = create_transform(args.img_size, is_training=True, interpolation=interpolation, **augmentation)
    return args, model, optimizer, scheduler, transform


@each_config
def test_builds_and_trains_from_the_values(name):
    """Without timm's scripts: the same factories, fed from the file; a step on noise moves the parameters."""
    args, model, optimizer, scheduler, _ = build(read(name))
    images, targets = torch.randn(4, 3, 33, 33), torch.arange(4)
    loss_function = torch.nn.CrossEntropyLoss()
    if hasattr(args, "mixup"):
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=10)
        images, targets = mixup(images, targets)
        loss_function = SoftTargetCrossEntropy()
        if hasattr(args, "bce_loss"):
            loss_function = BinaryCrossEntropy(target_threshold=args.bce_target_thresh)
    scheduler.step(args.warmup_epochs)
    before = model.conv1.conv.weight.clone()
    loss = loss_function(model(images), targets)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert not torch.equal(before, model.conv1.conv.weight)


@pytest.mark.parametrize("name", ["equivision_in1k", "rotated_in1k"])
def test_original_recipe(name):
    """The original's command line and defaults, read back from what timm builds."""
    args, _, optimizer, scheduler, transform = build(read(name))
    assert type(optimizer) is torch.optim.SGD
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["lr"]) == (0.9, False, 0.1)
        assert group["weight_decay"] in (0.0, 1e-4)
    rates = []
    for epoch in range(90):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(30 * [0.1] + 30 * [0.01] + 30 * [0.001])
    assert 4 * args.batch_size * args.grad_accum_steps == 256
    assert (args.amp_dtype, args.seed, args.img_size, args.crop_pct) == ("float16", 10, 224, 0.875)
    names = [type(step).__name__ for step in transform.transforms]
    assert names[:2] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]
    assert transform.transforms[0].interpolation.value == "bilinear"


def test_rotated_recipe_rotates(tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "image.png").write_bytes(b"")
    dataset = create_dataset(read("rotated_in1k")["dataset"], root=str(tmp_path), split="train")
    assert isinstance(dataset, RotatedFolder)
