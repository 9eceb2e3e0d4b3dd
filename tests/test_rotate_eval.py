"""rotate-eval: correct figures, results under the settings they depend on, and clear errors."""

import argparse
import csv
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.small_models import save_small_model, save_training, write_textures
from timm.data import create_transform, resolve_data_config
from torchvision.datasets import ImageFolder

import equivision_timm.cli.rotate_eval as module
from equivision_timm import data
from equivision_timm.cli import rotate_report
from equivision_timm.cli.figures import plain_text
from equivision_timm.cli.main import main
from equivision_timm.cli.models import Loaded, load
from equivision_timm.cli.options import parse_angles
from equivision_timm.cli.rotate_eval import METRICS, Result, Settings, averaged, find_result
from equivision_timm.errors import InputError
from equivision_timm.models.pretrained import hash_tensors
from equivision_timm.testing import angle_error


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_textures(tmp_path_factory.mktemp("textures"), train=1, validation=4))


@pytest.fixture(scope="module")
def c4(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_small_model(tmp_path_factory.mktemp("c4"), width=2)


@pytest.fixture(scope="module")
def c1(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_small_model(tmp_path_factory.mktemp("c1"), "c1resnet18_fast", width=4)


def command(models: list[str], data: str | Path, out: Path, angles: str = "0,90", *options: str) -> list[str]:
    place = ["--data", str(data), "--angles", angles, "--out", str(out), "-j", "0", "--device", "cpu"]
    return ["rotate-eval", "--models", *models, *place, *options]


def results(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["results"]


def rows(out: Path) -> dict[tuple[str, int, float], dict[str, float]]:
    """(model, size, angle) -> the figures of results.csv."""
    with (out / "results.csv").open() as file:
        return {
            (row.pop("model"), int(row.pop("size")), float(row.pop("angle"))): {
                k: float(v) for k, v in row.items() if v
            }
            for row in csv.DictReader(file)
        }


WHOLE = ("0:180:45", "-b", "5", "--size", "33", "32")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, textures: str, c4: str, c1: str) -> Path:
    """The output of one complete run."""
    out = tmp_path_factory.mktemp("out")
    assert main(command([c4, c1], textures, out, *WHOLE)) == 0
    return out


# Figures


def test_figures_are_those_of_a_plain_loop(measured: Path, textures: str, c4: str) -> None:
    """Against torchvision's folder and a loop over single images."""
    model = timm.create_model(c4, pretrained=True).eval()
    prepare = create_transform((3, 33, 33), crop_pct=1.0, interpolation="bilinear")
    sums = np.zeros(3)
    for image, target in ImageFolder(f"{textures}/validation", transform=prepare):
        with torch.inference_mode():
            upright, rotated = model(torch.stack([image, image.rot90(1, dims=(-2, -1))]))
        centred, centred_rotated = upright - upright.mean(), rotated - rotated.mean()
        drift = ((centred_rotated - centred).norm() / centred.norm()).item()
        sums += [rotated.argmax() == target, rotated.argmax() == upright.argmax(), drift]
    row = rows(measured)[c4, 33, 90]
    assert (row["images"], row["top5"]) == (12, 100)  # of three classes
    found = [row["top1"] / 100, row["agreement"] / 100, row["drift"]]
    assert found == pytest.approx(sums / 12, abs=1e-5)


def test_equivariance_and_exact_sizes(measured: Path, c4: str, c1: str) -> None:
    result = results(measured)[0]
    assert result["versions"].endswith(f"timm {timm.__version__}, torch {torch.__version__}; cpu")
    assert result["settings"]["weights"] == hash_tensors(timm.create_model(c4, pretrained=True).state_dict())
    assert (measured / "rotation.png").stat().st_size > 10_000
    found = rows(measured)
    assert len(found) == 2 * 2 * 5
    assert found[c4, 33, 0]["drift"] == found[c1, 33, 0]["drift"] == 0
    for quarter in (90, 180):
        assert found[c4, 33, quarter]["drift"] < 1e-4
        assert found[c4, 33, quarter]["agreement"] == 100
        assert found[c4, 32, quarter]["drift"] > 1e-3  # not an exact size
        assert found[c1, 33, quarter]["drift"] > 1e-2  # not equivariant
    assert found[c4, 33, 45]["drift"] > 1e-3  # 45 degrees are not in C4


def test_options_change_little(measured: Path, textures: str, c4: str, tmp_path: Path) -> None:
    flags = ["--amp", "--amp-dtype", "bfloat16", "--channels-last", "--reparam"]
    assert main(command([c4], textures, tmp_path, "0:180:45", "--size", "33", *flags)) == 0
    expected = rows(measured)
    for key, row in rows(tmp_path).items():
        assert row["drift"] == pytest.approx(expected[key]["drift"], abs=0.05)


def test_images_are_those_of_the_training(textures: str, tmp_path: Path, monkeypatch) -> None:
    """Model, image size and normalisation, as in predict; a circle hides the corners."""
    seen: list[torch.Tensor] = []  # the batches that the model reads

    def watch(*args, **kwargs) -> Loaded:
        loaded = load(*args, **kwargs)
        loaded.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        return loaded

    monkeypatch.setattr(module, "load", watch)
    options = {"img_size": 33, "mean": [0.2, 0.3, 0.4], "crop_pct": 1.0}
    words = command([save_training(tmp_path, **options)], textures, tmp_path / "out", "0")
    assert main(words) == 0
    ((_, size, _),) = rows(tmp_path / "out")
    assert size == 33
    config = resolve_data_config(options, model=timm.create_model("c4resnet18_fast"))
    transform = create_transform(**config, is_training=False)
    samples = data.ImageFolder(textures, "validation").samples
    assert torch.equal(seen[0], torch.stack([transform(Image.open(path).convert("RGB")) for path, _ in samples]))
    seen.clear()
    assert main([*words, "--out", str(tmp_path / "circle"), "--angles", "0,30", "--corners", "circle"]) == 0
    assert len(seen) == 4  # two angles of all images, two of the samples
    for images in seen:
        assert (images[..., :4, :4] == 0).all()
        assert (images[..., 16, :] != 0).float().mean() > 0.9


def test_quarter_turns_averaged(textures: str, c1: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A plain network becomes exact at quarter turns, and nothing else; both are in one table."""
    for turns in ("1", "4"):
        words = command([c1], textures, tmp_path, "0,45,90", "--size", "33", "--test-time-turns", turns)
        assert main(words) == 0
    with (tmp_path / "results.csv").open() as file:
        drift = {(row["turns"], row["angle"]): float(row["drift"]) for row in csv.DictReader(file)}
    assert len(drift) == 6
    assert drift["4", "90"] < 1e-5 < 1e-2 < drift["1", "90"]
    assert drift["4", "45"] > 1e-3
    assert "33 px, mean of 4 rotations" in capsys.readouterr().out
    model, images = timm.create_model(c1, pretrained=True).eval(), torch.randn(2, 3, 33, 33)
    mean = torch.stack([model(images.rot90(k, dims=(-2, -1))) for k in range(4)]).mean(0)
    assert torch.allclose(averaged(model, 4)(images), mean, atol=1e-5)
    assert not torch.allclose(averaged(model, 2)(images), mean, atol=1e-5)


def test_stages(textures: str, c4: str, c1: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = command([c4, c1], textures, tmp_path, "0,45,90", "--size", "65", "-b", "5", "--by-stage")
    assert main(words) == 0
    found = {
        (name, stage, angle): error for (name, _, angle), row in rows(tmp_path).items() for stage, error in row.items()
    }
    model = timm.create_model(c4, pretrained=True).eval()
    stages = [level["module"] for level in model.feature_info]
    prepare = data.preparation({**resolve_data_config(model=model), "input_size": (3, 65, 65)})
    folder = data.ImageFolder(textures, "validation")
    expected = angle_error(model, torch.stack([prepare(folder.picture(i)) for i in range(12)]), [0.0, 45.0, 90.0])
    for stage in stages:
        assert found[c4, stage, 90] < 1e-4
        assert found[c1, stage, 90] > 1e-2
        for angle, error in expected[stage].items():
            assert found[c4, stage, angle] == pytest.approx(error, rel=1e-3, abs=1e-6)  # there in batches of five
    with Image.open(tmp_path / "stages.png") as picture:
        assert len(picture.convert("L").getcolors()) > 50
    assert main(command([c4], textures, tmp_path / "small", "45", "--size", "33", "--by-stage")) == 2
    assert "layer4" in capsys.readouterr().err  # a map of one pixel


def test_unlabelled_and_unreadable_images(textures: str, c4: str, tmp_path: Path, capsys) -> None:
    """Without labels only agreement and drift are measured; what cannot be read is left out and named."""
    folder = Path(shutil.copytree(f"{textures}/validation/grass", tmp_path / "data"))
    good = (folder / "000.png").read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "half.png").write_bytes(good[: len(good) // 2])
    Image.fromarray(np.full((9, 9), 2000, np.uint16)).save(folder / "thin.png")  # 12 bits, of which white is unknown
    assert main(command([c4], folder, tmp_path / "out", "0,90", "-b", "4", "--unlabelled")) == 0
    (result,) = results(tmp_path / "out")
    assert (result["images"], result["position"]) == (4, 7)
    assert result["unreadable"] == ["empty.png", "half.png", "thin.png"]
    assert set(rows(tmp_path / "out")[c4, 33, 90]) == {"turns", "images", "agreement", "drift"}
    assert "left out 3 unreadable image(s): empty.png" in capsys.readouterr().out


# Results belong to what they depend on


def refused(words: list[str], capsys: pytest.CaptureFixture) -> str:
    out = Path(words[words.index("--out") + 1])
    before = (out / "results.json").read_bytes()
    assert main(words) == 2
    assert (out / "results.json").read_bytes() == before
    return capsys.readouterr().err


def test_other_classes_or_pictures_of_the_same_names(textures: str, c4: str, tmp_path: Path, capsys) -> None:
    folder, classes = Path(shutil.copytree(f"{textures}/validation", tmp_path / "a" / "data")), tmp_path / "map.txt"
    for place in ("brick/000.png", "brick/001.png", "grass/000.png"):  # another number of pictures in each class
        (folder / place).unlink()
    classes.write_text("grass\ngravel\nbrick\n")
    words = command([c4], folder, tmp_path / "out", "0", "--class-map", str(classes))
    assert main(words) == 0
    wrong = rows(tmp_path / "out")[c4, 33, 0]["top1"]
    moved = Path(shutil.copytree(folder, tmp_path / "b" / "data"))
    assert main([*words, "--data", str(moved)]) == 0  # control: the same map and contents continue
    shutil.copy(folder / "grass" / "003.png", moved / "brick" / "003.png")
    assert "images" in refused([*words, "--data", str(moved)], capsys)
    classes.write_text("brick\ngrass\ngravel\n")
    assert "images" in refused(words, capsys)
    assert main([*words, "--out", str(tmp_path / "new")]) == 0
    assert rows(tmp_path / "new")[c4, 33, 0]["top1"] != wrong


def test_another_preparation_other_keywords_or_weights(textures: str, tmp_path: Path, capsys) -> None:
    """Of one name: equal weights of other images or keywords compute something else."""
    words = command([save_training(tmp_path, img_size=33)], textures, tmp_path / "out", "0")
    assert main(words) == 0
    save_training(tmp_path, img_size=33, epochs=7)
    assert main(words) == 0  # control: an argument that does not prepare images
    assert "options" in refused([*words, "--model-kwargs", "global_pool=max"], capsys)
    for change in ({"mean": [0.1, 0.2, 0.3]}, {"interpolation": "nearest"}):
        save_training(tmp_path, img_size=33, **change)
        assert "preparation" in refused(words, capsys)
    save_training(tmp_path, img_size=33)
    checkpoint = torch.load(tmp_path / "model_best.pth.tar", weights_only=False)
    checkpoint["state_dict"]["fc.bias"] += 1
    torch.save(checkpoint, tmp_path / "model_best.pth.tar")
    assert "weights" in refused(words, capsys)


def test_every_setting_counts() -> None:
    """Of one model, size and number of turns all must agree, of others those that a report states once."""
    (before,) = stored(["c8resnet18"], [0.0], [1.0])
    for name in asdict(before.settings):
        other = replace(before.settings, **{name: "another"})
        if name in ("model", "size", "turns"):
            assert find_result([before], other, Path("out")) == Result(other)
        else:
            with pytest.raises(InputError, match=f"settings .{name}: .* there, another here"):
                find_result([before], other, Path("out"))
    assert find_result([before], before.settings, Path("out")) is before


@pytest.mark.parametrize(("angle", "status"), [("0", 0), ("90", 2)])
def test_two_runs_into_one_folder(angle, status, textures, c4, c1, tmp_path, monkeypatch, capsys) -> None:
    """What another run writes in the meantime stays; with other settings it ends this one."""
    measure = module.measure

    def after_another_run(result, *rest):
        monkeypatch.setattr(module, "measure", measure)
        assert main(command([c1], textures, tmp_path, angle)) == 0
        yield from measure(result, *rest)

    monkeypatch.setattr(module, "measure", after_another_run)
    assert main(command([c4], textures, tmp_path, "0")) == status
    assert [result["settings"]["model"] for result in results(tmp_path)] == [c1, c4][: 2 - bool(status)]
    assert ("other settings" in capsys.readouterr().err) is bool(status)


# Interruptions


def test_interrupted_run_continues(measured, textures, c4, c1, tmp_path, monkeypatch, capsys) -> None:
    """Stopped in the second batch of the second result; the rest gives the figures of the complete run."""
    words, measure, calls = command([c4, c1], textures, tmp_path, *WHOLE), module.measure, []

    def stop_early(result, *rest):
        calls.append(result)
        for count, after in enumerate(measure(result, *rest)):
            if len(calls) == 2 and count == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield after

    monkeypatch.setattr(module, "measure", stop_early)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert "lower --batch-size" in err
    assert "5 of 12 files" in out
    assert [result["position"] for result in results(tmp_path)] == [12, 5]
    monkeypatch.setattr(module, "measure", measure)
    assert main(words) == 0
    found, whole = rows(tmp_path), rows(measured)
    assert found.keys() == whole.keys()
    for key, row in whole.items():
        assert found[key] == pytest.approx(row, rel=1e-5)


# The report


@pytest.mark.parametrize("corners", ["reflect", "circle"])
def test_samples_are_rotated_images_with_predictions(corners: str, textures: str) -> None:
    samples = rotate_report.Samples(data.ImageFolder(textures, "validation"), parse_angles("0:360:90"))
    found = stored(["c8resnet18", "other"], samples.angles, [0.5] * 4, corners=corners)
    count = len(samples.pictures)
    samples.titles = ["brick"] * count
    samples.predictions[found[0].settings.cell] = [[name] * count for name in ("brick", "grass", "gravel", "grass")]
    _, part = rotate_report.draw(found, samples).subfigs
    assert [axes.get_title() for axes in part.axes[:4]] == ["0°", "90°", "180°", "270°"]
    assert len(part.axes) == count * 4
    upright, quarter = (axes.images[0].get_array() for axes in part.axes[:2])
    assert np.array_equal(quarter, np.rot90(upright))
    assert not np.array_equal(quarter, upright)
    assert (upright[0, 0] == 0.5).all() is np.bool_(corners == "circle")
    first, *others = part.axes[0].texts
    assert not others  # the other model has no predictions
    assert first.get_text() == "brick"
    assert first.get_bbox_patch().get_facecolor()[:3] != (1, 1, 1)  # filled: correct
    assert part.axes[1].texts[0].get_bbox_patch().get_facecolor()[:3] == (1, 1, 1)


def stored(
    models: list[str], angles: list[float], values: list[float], name: str = "data", corners: str = "reflect"
) -> list[Result]:
    common = {"data": name, "images": "0", "labelled": True, "files": 1, "angles": angles}
    settings = [
        Settings(**common, corners=corners, precision="float32", by_stage=False, model=model, size=33, classes=3)
        for model in models
    ]
    return [Result(s, 1, 1, [], dict.fromkeys(METRICS, values)) for s in settings]


def test_axes_curves_and_summary(tmp_path: Path) -> None:
    """Rounding errors do not fill the axis of the drift, chance is one of the classes, zero counts once in the mean."""
    top1, _, drift = rotate_report.draw(stored(["c8resnet18"], [0.0, 90.0], [1e-6, 2e-6])).axes
    assert drift.get_ylim() == (0, 0.1)
    assert top1.lines[-1].get_ydata()[0] == pytest.approx(100 / 3)
    assert top1.texts[0].get_text() == "chance"
    angles = parse_angles("0:360:15")
    table = rotate_report.write(stored(["c8resnet18"], angles, [float(angle % 360 == 0) for angle in angles]), tmp_path)
    assert " 4.17  0.00 at 15°" in table  # 1/24 of the angles, not 2/25
    curves = []  # which close if they go round
    for angles in ([0.0, 90.0, 180.0, 270.0], [90.0, 0.0, -90.0]):
        axes = rotate_report.draw(stored(["c8resnet18"], angles, [0.1, 0.2, 0.3, 0.4][: len(angles)])).axes[0]
        curves.append([values.tolist() for values in axes.lines[0].get_data()])
    assert curves[0] == [[0, 90, 180, 270, 360], pytest.approx([10, 20, 30, 40, 10])]
    assert curves[1] == [[-90, 0, 90], pytest.approx([30, 20, 10])]


def test_text_is_text(tmp_path: Path) -> None:
    """Formulas of TeX, line breaks, stray bytes, a name that begins with '_'; long names."""
    found = stored(["local-dir:/x/$\\nosuch$", "local-dir:/x/_hidden", "x" * 99], [0.0, 90.0], [1.0, 0.5], "a\nb\udcff")
    assert "Rotated images of a\\nb\\udcff" in rotate_report.write(found, tmp_path)
    with plain_text():
        (legend,) = rotate_report.draw(found).subfigs[0].legends
    labels = [entry.get_text().lstrip("\u200b") for entry in legend.get_texts()]
    assert labels[:2] == ["$\\nosuch$, 33 px", "_hidden, 33 px"]
    assert labels[2].endswith("x" * 52 + "…, 33 px")  # 60 characters


# Input


def test_classes_and_sizes_are_those_of_the_checkpoint(
    textures: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), tmp_path / "vit.pth")
    words = command([f"test_vit={tmp_path}/vit.pth"], textures, tmp_path / "out", "0")
    assert main(words) == 2
    assert "5 classes" in capsys.readouterr().err
    rectangle = save_training(tmp_path, input_size=[3, 65, 33])
    assert main(command([rectangle], textures, tmp_path / "out")) == 2
    assert "65 x 33" in capsys.readouterr().err
    assert main(command([rectangle], textures, tmp_path / "out", "0,90", "--size", "33")) == 0
    distilled = "deit_tiny_distilled_patch16_224"  # has two heads; the checkpoint shows the classes of both
    torch.save(timm.create_model(distilled, num_classes=3, depth=1).state_dict(), tmp_path / "d")
    assert load(f"{distilled}={tmp_path}/d", model_kwargs={"depth": 1}).num_classes == 3


@given(st.integers(-360, 360), st.integers(1, 90), st.integers(0, 30))
def test_range_of_angles(start: int, step: int, count: int) -> None:
    """Of every class modulo 360 the first one, less full turns."""
    typed = [start + step * i for i in range(count + 1)]
    parsed = parse_angles(f"{start}:{start + count * step}:{step}")
    assert parsed == parse_angles(",".join(map(str, typed)))
    assert [angle % 360 for angle in parsed] == list(dict.fromkeys(angle % 360 for angle in typed))
    assert all(-360 < angle < 360 for angle in parsed)


def test_lists_of_angles() -> None:
    assert parse_angles("-90,270,45,-450") == [-90, 45]  # every rotation counts once
    assert parse_angles("-1e300") == [math.fmod(-1e300, 360) + 0.0]
    for text in ("", "0:360", "0:9:0", "0:9:-1", "90:0:15", "1:2:3:4", "0,,9", "inf", "0:inf:1"):
        with pytest.raises(argparse.ArgumentTypeError, match="angles"):
            parse_angles(text)
