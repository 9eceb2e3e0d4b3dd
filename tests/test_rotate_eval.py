"""rotate-eval: the figures are right, an interrupted run goes on, and what cannot be used gets a clear error."""

import argparse
import csv
import datetime
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.small_models import TEXTURES, save_small_model, save_training, write_textures
from timm.data import create_transform, resolve_data_config
from torchvision.datasets import ImageFolder

from equivision_timm.arguments import InputError
from equivision_timm.cli.figures import plain_text
from equivision_timm.cli.main import main
from equivision_timm.cli.rotate_eval import run
from equivision_timm.cli.rotate_eval.measure import Folder, averaged, parse_angles
from equivision_timm.cli.rotate_eval.pictures import _curve, _style, draw, draw_samples, label
from equivision_timm.cli.rotate_eval.report import write_report
from equivision_timm.cli.rotate_eval.results import Cell, Results
from equivision_timm.cli.rotate_eval.run import rotate_eval
from equivision_timm.cli.trained import load_trained
from equivision_timm.models.tensor_hash import hash_tensors
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


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The batches that the models read; the first of each is the trial."""
    batches: list[torch.Tensor] = []

    def watch(*arguments) -> tuple[torch.nn.Module, dict]:
        model, training = load_trained(*arguments)
        model.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0]))
        return model, training

    monkeypatch.setattr(run, "load_trained", watch)
    return batches


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, textures: str, c4: str, c1: str) -> Path:
    """The output of one complete run."""
    out = tmp_path_factory.mktemp("out")
    options = ["--data", textures, "--angles", "0:180:45", "-b", "5", "-j", "0", "--device", "cpu", "--out", str(out)]
    assert main(["rotate-eval", "--models", c4, c1, "--size", "33", "32", *options]) == 0
    return out


def _rows(out: Path) -> dict[tuple[str, int, float], dict[str, float]]:
    """(model, size, angle) -> the figures of results.csv."""
    with (out / "results.csv").open() as file:
        return {
            (row.pop("model"), int(row.pop("size")), float(row.pop("angle"))): {k: float(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        }


def test_figures_are_those_of_a_plain_loop(measured: Path, textures: str, c4: str) -> None:
    """Against torchvision's folder and a loop over single images."""
    model = timm.create_model(c4, pretrained=True).eval()
    prepare = create_transform((3, 33, 33), crop_pct=1.0, interpolation="bilinear")
    folder = ImageFolder(f"{textures}/validation", transform=prepare)
    top1 = agreement = drift = 0.0
    for image, target in folder:
        with torch.inference_mode():
            upright, turned = model(torch.stack([image, image.rot90(1, dims=(-2, -1))]))
        top1 += (turned.argmax() == target).item()
        agreement += (turned.argmax() == upright.argmax()).item()
        centred, centred_turned = upright - upright.mean(), turned - turned.mean()
        drift += ((centred_turned - centred).norm() / centred.norm()).item()
    row = _rows(measured)[c4, 33, 90]
    assert row["images"] == 12
    assert row["top1"] == pytest.approx(100 * top1 / 12, abs=1e-3)
    assert row["top5"] == 100  # of three classes
    assert row["agreement"] == pytest.approx(100 * agreement / 12, abs=1e-3)
    assert row["drift"] == pytest.approx(drift / 12, abs=1e-5)


def test_what_equivariance_and_exact_sizes_buy(measured: Path, c4: str, c1: str) -> None:
    rows = _rows(measured)
    assert len(rows) == 2 * 2 * 5
    assert rows[c4, 33, 0]["drift"] == rows[c1, 33, 0]["drift"] == 0
    for quarter in (90, 180):
        assert rows[c4, 33, quarter]["drift"] < 1e-4
        assert rows[c4, 33, quarter]["agreement"] == 100
        assert rows[c4, 32, quarter]["drift"] > 1e-3  # 32 is no exact size
        assert rows[c1, 33, quarter]["drift"] > 1e-2  # not equivariant
    assert rows[c4, 33, 45]["drift"] > 1e-3  # 45 degrees are not in C4


class _Page(HTMLParser):
    """Collects what a page loads and says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads, self.words, self.rows = [], "", 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_report_is_one_page_that_loads_nothing(measured: Path) -> None:
    text = (measured / "report.html").read_text()
    page = _Page(text)
    assert [load[:22] for load in page.loads] == 4 * ["data:image/png;base64,"]  # three metrics, samples
    assert "http" not in text
    assert "@import" not in text
    assert page.rows == (1 + 4) + 4 * (1 + 5) + (3 + 4)  # summary, a table for each metric, how it was measured
    assert "Top-1 accuracy" in page.words
    with Image.open(measured / "rotation.png") as picture:
        assert picture.size[0] > 1000


def test_cells_know_their_columns(measured: Path) -> None:
    """A telephone shows a row of the summary as lines, each with the name of its column."""
    summary = (measured / "report.html").read_text().partition("<h2>Summary</h2>")[2].partition("</table>")[0]
    columns = re.findall("<th>(.*?)</th>", summary)
    cells = re.findall('<td data-column="(.*?)">', summary)
    assert columns[:2] == ["model", "images"]
    assert cells == columns * 4  # two models, two sizes


def test_report_says_how_it_was_measured(measured: Path, c4: str, c1: str) -> None:
    page = _Page((measured / "report.html").read_text())
    assert 'name="viewport" content="width=device-width' in (measured / "report.html").read_text()
    assert f"rotate-eval --models {c4} {c1} --size 33 32" in page.words
    assert datetime.date.today().isoformat() in page.words
    assert f"timm {timm.__version__}, torch {torch.__version__}; cpu" in page.words
    for name in (c4, c1):
        assert page.words.count(hash_tensors(timm.create_model(name, pretrained=True).state_dict())) == 2  # sizes


def test_other_weights_of_the_same_name_do_not_mix(textures: str, tmp_path: Path) -> None:
    """Refused before the work; the same weights go on."""
    spec, common = f"test_resnet={tmp_path}/model.pth", (textures, [0.0, 90.0], str(tmp_path / "out"), [33])
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / f"{seed}.pth")
    shutil.copy(tmp_path / "0.pth", tmp_path / "model.pth")
    rotate_eval([spec], *common, workers=0, device="cpu")
    before = (tmp_path / "out" / "results.json").read_bytes()
    rotate_eval([spec], *common, workers=0, device="cpu")
    shutil.copy(tmp_path / "1.pth", tmp_path / "model.pth")
    with pytest.raises(InputError, match=r"with other weights \(\w{8}\.\.\. there, .*choose another --out"):
        rotate_eval([spec], *common, workers=0, device="cpu")
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_curves_that_coincide_are_told_apart() -> None:
    """No two of ten look alike, and a later one leaves an earlier one visible at its sides."""
    styles = [_style(i, 10) for i in range(10)]
    looks = {(style["color"], style["marker"], style["linestyle"]) for style in styles}
    assert len(looks) == 10
    assert all(a["linewidth"] > b["linewidth"] for a, b in itertools.pairwise(styles))
    assert _style(0, 1)["linewidth"] > 0


def test_long_names_are_cut_before_what_tells_them_apart() -> None:
    cell = Cell("c8resnet18=" + "x" * 99, 225, 4)
    assert label(cell).endswith("x, 225 px, mean of 4 rotations")
    assert label(cell, 50) == "c8resnet18=xxxxxxxxx…, 225 px, mean of 4 rotations"
    assert len(label(cell, 50)) == 50


def test_samples_show_the_images_as_they_were_turned(textures: str) -> None:
    folder = Folder(textures, "validation", "")
    angles = parse_angles("0:360:90")
    reflected, circle = (draw_samples(folder, angles, corners) for corners in ("reflect", "circle"))
    assert [axes.get_title() for axes in reflected.axes[:4]] == ["0°", "90°", "180°", "270°"]
    assert len(reflected.axes) == 3 * 4  # an image of each class
    upright, quarter = (axes.images[0].get_array() for axes in reflected.axes[:2])
    assert np.array_equal(quarter, np.rot90(upright))
    assert not np.array_equal(quarter, upright)
    assert (circle.axes[0].images[0].get_array()[0, 0] == 0.5).all()
    assert not np.array_equal(reflected.axes[0].images[0].get_array(), reflected.axes[4].images[0].get_array())


def test_circle_hides_the_corners(textures: str, c1: str, tmp_path: Path, seen: list[torch.Tensor]) -> None:
    rotate_eval([c1], textures, [0.0, 30.0], str(tmp_path), corners="circle", workers=0, device="cpu")
    assert len(seen) == 3
    for images in seen[1:]:  # the first is the trial
        assert (images[..., :4, :4] == 0).all()
        assert (images[..., 16, :] != 0).float().mean() > 0.9


@pytest.mark.parametrize("flags", [["--amp", "--amp-dtype", "bfloat16"], ["--channels-last"], ["--reparam"]])
def test_options_change_little(flags: list[str], measured: Path, textures: str, c4: str, tmp_path: Path) -> None:
    options = ["--angles", "0:180:45", "--size", "33", "-j", "0", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["rotate-eval", "--models", c4, "--data", textures, *options, *flags]) == 0
    expected, tolerance = _rows(measured), 0.05 if "--amp" in flags else 1e-3
    for key, row in _rows(tmp_path).items():
        assert row["drift"] == pytest.approx(expected[key]["drift"], abs=tolerance)


def test_interrupted_run_goes_on(
    measured: Path, textures: str, c4: str, c1: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second batch of the second model; the rest gives the figures of the run that was not stopped."""
    options = ["--data", textures, "--angles", "0:180:45", "-b", "5", "-j", "0", "--device", "cpu"]
    command = ["rotate-eval", "--models", c4, c1, "--size", "33", "32", *options, "--out", str(tmp_path)]
    measure, calls = run.measure, []

    def stop_early(cell, *rest):
        calls.append(cell)
        for count, after in enumerate(measure(cell, *rest)):
            if len(calls) == 2 and count == 1:
                raise KeyboardInterrupt
            yield after

    monkeypatch.setattr(run, "measure", stop_early)
    assert main(command) == 130
    assert "interrupted after 5 of 12 files" in (tmp_path / "report.html").read_text()
    positions = [cell["position"] for cell in json.loads((tmp_path / "results.json").read_text())["cells"]]
    assert positions == [12, 5]
    monkeypatch.setattr(run, "measure", measure)
    assert main(command) == 0
    resumed, whole = _rows(tmp_path), _rows(measured)
    assert resumed.keys() == whole.keys()
    for key, row in whole.items():
        assert resumed[key] == pytest.approx(row, rel=1e-5)


def test_ctrl_c_leaves_what_was_measured(c4: str, tmp_path: Path) -> None:
    """A real SIGINT to a real process, once it has kept a batch."""
    folder = write_textures(tmp_path / "data", train=1, validation=300)
    options = ["--angles", "0:360:5", "-b", "4", "-j", "0", "--device", "cpu", "--out", str(tmp_path / "out")]
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
        "from equivision_timm.cli.main import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "rotate-eval", "--models", c4, "--data", str(folder), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    kept = tmp_path / "out" / "results.json"
    deadline = time.monotonic() + 120
    while not kept.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; what was measured is in" in errors
    assert "Traceback" not in errors
    (cell,) = json.loads(kept.read_text())["cells"]
    assert 0 < cell["images"] < 900
    names = {path.name for path in kept.parent.iterdir()}
    assert names == {".results.lock", "results.csv", "results.json", "rotation.png", "report.html"}


def test_unreadable_images_are_left_out_and_named(textures: str, c4: str, tmp_path: Path, capsys) -> None:
    folder = Path(shutil.copytree(textures, tmp_path / "data"))
    good = (folder / "validation" / "grass" / "000.png").read_bytes()
    (folder / "validation" / "brick" / "empty.png").write_bytes(b"")
    (folder / "validation" / "gravel" / "half.png").write_bytes(good[: len(good) // 2])
    (folder / "validation" / "gravel" / "text.jpg").write_text("no image")
    rotate_eval([c4], str(folder), [0.0, 90.0], str(tmp_path / "out"), batch_size=4, workers=0, device="cpu")
    (cell,) = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert cell["images"] == 12
    assert cell["position"] == 15
    assert cell["unreadable"] == ["brick/empty.png", "gravel/half.png", "gravel/text.jpg"]
    assert "left out 3 unreadable image(s): brick/empty.png" in capsys.readouterr().out
    assert "gravel/half.png" in (tmp_path / "out" / "report.html").read_text()


def test_only_unreadable_images(c4: str, tmp_path: Path) -> None:
    for name in TEXTURES:
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match="none of the 3 images"):
        rotate_eval([c4], str(tmp_path / "data"), [0.0], str(tmp_path / "out"), workers=0, device="cpu")


def test_unlabelled_folder(textures: str, c4: str, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(Path(textures, "validation").rglob("*.png")):
        shutil.copy(file, flat / f"{i}.png")
    with pytest.raises(InputError, match=r"lie in no class folders.*--unlabelled"):
        rotate_eval([c4], str(flat), [0.0], str(tmp_path / "out"))
    rotate_eval([c4], str(flat), [0.0, 90.0], str(tmp_path / "out"), unlabelled=True, workers=0, device="cpu")
    assert set(_rows(tmp_path / "out")[c4, 33, 90]) == {"turns", "images", "agreement", "drift"}


def test_too_little_memory_says_what_to_lower(
    textures: str, c4: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch runs out of memory: the first is kept."""
    calls = []

    def run_out(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if len(calls) > 3:  # the trial, and two angles of the first batch
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return x.mean((2, 3))

    class Model(torch.nn.Module):
        num_classes, pretrained_cfg = 3, {"input_size": (3, 33, 33)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run_out(x)

    monkeypatch.setattr(run, "load_trained", lambda name, num_classes: (Model(), {}))
    with pytest.raises(InputError, match=r"too little memory for 4 images of 33 x 33 pixels.*lower --batch-size"):
        rotate_eval([c4], textures, [0.0, 90.0], str(tmp_path), batch_size=4, workers=0, device="cpu")
    assert json.loads((tmp_path / "results.json").read_text())["cells"][0]["images"] == 4


def test_other_settings_do_not_mix(measured: Path, textures: str, c4: str) -> None:
    before = (measured / "results.json").read_bytes()
    with pytest.raises(InputError, match=r"measured with other settings .angles.*choose another --out"):
        rotate_eval([c4], textures, [0.0], str(measured))
    assert (measured / "results.json").read_bytes() == before


def test_foreign_results_file(textures: str, c4: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="holds no results of rotate-eval"):
        rotate_eval([c4], textures, [0.0], str(tmp_path))
    assert (tmp_path / "results.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("c8resnet19", "unknown model 'c8resnet19': did you mean c8resnet18"),
        ("xyzzy", "unknown model 'xyzzy'"),
        ("c8resnet18_fast=nowhere.pth", "cannot load the weights of 'c8resnet18_fast=nowhere.pth'.*nowhere.pth"),
        ("resnet10t.no_such_tag", "cannot load the weights of 'resnet10t.no_such_tag'.*tags are resnet10t.c3_in1k"),
        ("test_resnet2", "unknown model 'test_resnet2': did you mean test_resnet"),
    ],
)
def test_models_that_cannot_be_used(model: str, message: str, textures: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        rotate_eval([model], textures, [0.0], str(tmp_path), workers=0, device="cpu")
    assert not (tmp_path / "results.json").exists()


def test_no_network(textures: str, tmp_path: Path) -> None:
    """In a process of its own, because the Hub's client reads its settings once."""
    command = [sys.executable, "-m", "equivision_timm", "rotate-eval", "--models", "resnet10t", "--data", textures]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert "cannot load the weights of 'resnet10t'" in done.stderr
    assert "resnet10t=CHECKPOINT" in done.stderr
    assert "Traceback" not in done.stderr


def test_classes_that_do_not_fit(textures: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    five = save_small_model(tmp_path_factory.mktemp("five"), width=2, num_classes=5)
    with pytest.raises(InputError, match="tells 5 classes apart, the folder holds 3: give --class-map"):
        rotate_eval([five], textures, [0.0], str(tmp_path), workers=0, device="cpu")


def test_fixed_size_model_refuses_other_sizes(textures: str, tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(InputError, match="does not take images of 33 x 33 pixels"):
        rotate_eval(
            [f"test_vit={tmp_path}/vit.pth"], textures, [0.0], str(tmp_path / "out"), [33], workers=0, device="cpu"
        )


def test_other_timm_models_with_a_checkpoint(textures: str, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    rotate_eval(
        [f"test_resnet={tmp_path}/plain.pth"], textures, [0.0, 90.0], str(tmp_path / "out"), workers=0, device="cpu"
    )
    (upright, turned) = _rows(tmp_path / "out").values()
    assert upright["drift"] == 0
    assert turned["drift"] > 1e-2


def test_checkpoint_of_training(textures: str, tmp_path: Path, seen: list[torch.Tensor]) -> None:
    """Model, image size and normalisation are those of the training, as in predict."""
    spec = save_training(tmp_path, img_size=33, mean=[0.2, 0.3, 0.4], crop_pct=1.0)
    rotate_eval([spec], textures, [0.0], str(tmp_path / "out"), workers=0, device="cpu")
    ((_, size, _),) = _rows(tmp_path / "out")
    assert size == 33
    model = timm.create_model("c4resnet18_fast")
    options = {"img_size": 33, "mean": [0.2, 0.3, 0.4], "crop_pct": 1.0}
    transform = create_transform(**resolve_data_config(options, model=model), is_training=False)
    folder = Folder(textures, "validation", "")
    expected = torch.stack([transform(Image.open(path).convert("RGB")) for path, _ in folder.reader.samples])
    assert torch.equal(seen[1], expected)


def test_classifier_of_a_distilled_model(tmp_path: Path) -> None:
    """It has two heads, and the checkpoint shows the classes of both."""
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, depth=1)
    torch.save(
        {"state_dict": model.state_dict(), "args": argparse.Namespace(model_kwargs={"depth": 1})}, tmp_path / "d"
    )
    model, _ = load_trained(f"deit_tiny_distilled_patch16_224={tmp_path}/d")
    assert model.num_classes == 3


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_no_images(folder: str, c4: str, tmp_path: Path) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(InputError, match="no images to measure in"):
        rotate_eval([c4], str(tmp_path / folder), [0.0], str(tmp_path / "out"))


@pytest.mark.parametrize(
    "text",
    ["", "north", "0:360", "0:360:0", "0:360:-15", "90:0:15", "1:2:3:4", "0,,90", "nan", "0:inf:1", "0:360:1e-9"],
)
def test_what_is_no_list_of_angles(text: str, textures: str, c4: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(InputError, match="angles"):
        parse_angles(text)
    if text:
        assert main(["rotate-eval", "--models", c4, "--data", textures, "--angles", text]) == 2
        assert repr(text) in capsys.readouterr().err


@given(st.integers(-360, 360), st.integers(1, 90), st.integers(0, 30))
def test_range_of_angles(start: int, step: int, count: int) -> None:
    """Of every class modulo 360 the first one, less whole turns."""
    typed = [start + step * i for i in range(count + 1)]
    parsed = parse_angles(f"{start}:{start + count * step}:{step}")
    assert parsed == parse_angles(",".join(map(str, typed)))
    assert [angle % 360 for angle in parsed] == list(dict.fromkeys(angle % 360 for angle in typed))
    assert all(-360 < angle < 360 for angle in parsed)


def test_every_rotation_counts_once() -> None:
    assert parse_angles("0:360:15") == [15.0 * i for i in range(24)]
    assert parse_angles(",".join(["90"] * 210)) == [90]
    assert parse_angles("0,360,-360,720") == [0]
    assert parse_angles("-90,270,45") == [-90, 45]
    assert parse_angles("-30:30:30") == [-30, 0, 30]
    assert parse_angles("-1e300") == [math.fmod(-1e300, 360) + 0.0]


def test_two_runs_share_one_folder(
    measured: Path, textures: str, c4: str, c1: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run starts after the first batch of the first one and ends before its second."""
    options = ["--data", textures, "--angles", "0:180:45", "-b", "5", "-j", "0", "--device", "cpu"]
    command = ["rotate-eval", "--size", "33", "32", *options, "--out", str(tmp_path), "--models"]
    measure, inner = run.measure, []

    def with_another_run_inside(cell, *rest):
        for count, after in enumerate(measure(cell, *rest)):
            yield after
            if not inner and count == 0:
                inner.append(cell)
                assert main([*command, c1]) == 0

    monkeypatch.setattr(run, "measure", with_another_run_inside)
    assert main([*command, c4]) == 0
    assert len(inner) == 1
    both, whole = _rows(tmp_path), _rows(measured)
    assert both.keys() == whole.keys()
    for key, row in whole.items():
        assert both[key] == pytest.approx(row, rel=1e-5)
    assert _Page((tmp_path / "report.html").read_text()).rows == (1 + 4) + 4 * (1 + 5) + 2 * (3 + 2)


def test_other_settings_in_the_meantime_change_nothing(
    textures: str, c4: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = run.measure

    def after_another_run(cell, *rest):
        (tmp_path / "results.json").write_text(json.dumps({"settings": {"angles": [7]}, "cells": []}))
        yield from measure(cell, *rest)

    monkeypatch.setattr(run, "measure", after_another_run)
    with pytest.raises(InputError, match="measured with other settings"):
        rotate_eval([c4], textures, [0.0], str(tmp_path), workers=0, device="cpu")
    assert json.loads((tmp_path / "results.json").read_text()) == {"settings": {"angles": [7]}, "cells": []}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("images", -1),
        ("images", "many"),
        ("position", 99),
        ("sums", {}),
        ("sums", {name: [1.0] for name in ("top1", "top5", "agreement", "drift")}),
        ("unreadable", 3),
        ("stages", {"layer1": [0.1] * 5}),
        ("turns", "four"),
        ("model", None),
    ],
)
def test_damaged_cells_are_refused(key: str, value, measured: Path, textures: str, c4: str, tmp_path: Path) -> None:
    content = json.loads((measured / "results.json").read_text())
    content["cells"][1][key] = value
    if key == "model":
        del content["cells"][1][key]
    (tmp_path / "results.json").write_text(json.dumps(content))
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(InputError, match="holds no results of rotate-eval"):
        rotate_eval([c4], textures, parse_angles("0:180:45"), str(tmp_path), [33], workers=0, device="cpu")
    assert (tmp_path / "results.json").read_bytes() == before


def _results(tmp_path: Path, models: list[str], angles: list[float], values: list[float], data: str) -> Results:
    settings = {"data": data, "files": 1, "angles": angles, "corners": "reflect", "labelled": True}
    settings["by_stage"] = False
    results = Results(tmp_path / "results.json", settings)
    for model in models:
        sums = dict.fromkeys(("top1", "top5", "agreement", "drift"), values)
        results.put(Cell(model, 33, 1, 1, 1, (), sums))
    return results


def test_mean_over_a_turn_counts_zero_once(tmp_path: Path) -> None:
    """From one right answer upright alone: 1/24 of the angles, not 2/25."""
    angles = parse_angles("0:360:15")
    values = [1.0 if angle % 360 == 0 else 0.0 for angle in angles]
    write_report(_results(tmp_path, ["c8resnet18"], angles, values, "data"), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert ">4.17</td>" in page
    assert ">8.00</td>" not in page  # what 25 angles would give


def test_curves_close_where_they_go_round() -> None:
    assert _curve([0, 90, 180, 270], [1, 2, 3, 4]) == ([0, 90, 180, 270, 360], [1, 2, 3, 4, 1])
    assert _curve([90, 0, -90], [1, 2, 3]) == ([-90, 0, 90], [3, 2, 1])
    assert _curve([5], [1]) == ([5], [1])


def test_text_is_text_in_every_file(tmp_path: Path) -> None:
    """Formulas of TeX and of spreadsheets, tags, line breaks, stray bytes, a name that begins with '_'."""
    names = ["local-dir:/x/$\\nosuch$", "local-dir:/x/_hidden", "<script>alert(1)</script>", "=1+1", "a\nb\udcff", "@x"]
    data = "<b>$\\frac$\n\udcff"
    results = _results(tmp_path, names, [0.0, 90.0], [1.0, 0.5], data)
    write_report(results, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "<b>" not in text
    words = _Page(text).words
    for name in ("$\\nosuch$", "_hidden", "<script>alert(1)</script>", "=1+1", "a\\nb\\udcff", "<b>$\\frac$\\n\\udcff"):
        assert name in words
    with (tmp_path / "results.csv").open(newline="") as file:
        models = {row["model"] for row in csv.DictReader(file)}
    assert "'=1+1" in models
    assert "'@x" in models
    assert not [model for model in models if model[0] in "=+-@"]
    with plain_text():
        (legend,) = draw(results, ["top1"]).legends
    assert [entry.get_text() for entry in legend.get_texts()][:2] == ["$\\nosuch$, 33 px", "_hidden, 33 px"]


def test_deep_pictures_count(c4: str, tmp_path: Path) -> None:
    """16 bits a pixel and the same picture with 8: the same figures; a picture of unknown range is left out."""
    grey = (np.add.outer(np.arange(40), np.arange(40)) * 3).astype(np.uint8)
    for name in TEXTURES:
        for bits in ("8", "16"):
            (tmp_path / bits / name).mkdir(parents=True)
        Image.fromarray(grey).save(tmp_path / "8" / name / "a.png")
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16" / name / "a.png")
    Image.fromarray(grey.astype(np.uint16) * 16).save(tmp_path / "16" / TEXTURES[0] / "b.png")  # 12 bits
    rows = []
    for bits in ("8", "16"):
        out = tmp_path / f"out{bits}"
        rotate_eval([c4], str(tmp_path / bits), [0.0, 45.0], str(out), workers=0, device="cpu")
        rows.append(_rows(out)[c4, 33, 45])
    assert rows[1] == pytest.approx(rows[0], abs=1e-3)
    (cell,) = json.loads((tmp_path / "out16" / "results.json").read_text())["cells"]
    assert cell["unreadable"] == ["brick/b.png"]


def test_an_odd_angle_is_as_good_as_any(textures: str, c4: str, tmp_path: Path) -> None:
    """One class, huge angles, the same model twice: figures that are numbers."""
    angles = parse_angles("0,1e300,-1e17")
    rotate_eval([c4, c4], textures, angles, str(tmp_path), [33, 33], workers=0, device="cpu")
    rows = _rows(tmp_path)
    assert len(rows) == len(angles)
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())


def test_quarter_turns_averaged(textures: str, c4: str, c1: str, tmp_path: Path) -> None:
    """A plain network becomes exact at quarter turns, and nothing else; both ways are in one report."""
    common = (textures, [0.0, 45.0, 90.0], str(tmp_path), [33])
    rotate_eval([c1], *common, workers=0, device="cpu")
    rotate_eval([c1], *common, workers=0, device="cpu", test_time_turns=4)
    with (tmp_path / "results.csv").open() as file:
        drift = {(row["turns"], row["angle"]): float(row["drift"]) for row in csv.DictReader(file)}
    assert len(drift) == 6
    assert drift["4", "90"] < 1e-5 < 1e-2 < drift["1", "90"]
    assert drift["4", "45"] > 1e-3
    assert "33 px, mean of 4 rotations" in (tmp_path / "report.html").read_text()
    model = timm.create_model(c1, pretrained=True).eval()
    images = torch.randn(2, 3, 33, 33)
    mean = torch.stack([model(images.rot90(k, dims=(-2, -1))) for k in range(4)]).mean(0)
    assert torch.allclose(averaged(model, 4)(images), mean, atol=1e-5)
    assert not torch.allclose(averaged(model, 2)(images), mean, atol=1e-5)


def test_stages(textures: str, c4: str, c1: str, tmp_path: Path) -> None:
    options = ["--angles", "0,45,90", "--size", "65", "-b", "5", "-j", "0", "--device", "cpu", "--by-stage"]
    command = ["rotate-eval", "--models", c4, c1, "--data", textures, *options, "--out", str(tmp_path)]
    assert main(command) == 0
    with (tmp_path / "stages.csv").open() as file:
        rows = {(r["model"], r["stage"], float(r["angle"])): float(r["error"]) for r in csv.DictReader(file)}
    model = timm.create_model(c4, pretrained=True).eval()
    stages = [level["module"] for level in model.feature_info]
    assert len(rows) == 2 * len(stages) * 3
    folder = Folder(textures, "validation", "").prepare_for(
        {**resolve_data_config(model=model), "input_size": (3, 65, 65)}
    )
    images = torch.stack([folder[i][0] for i in range(12)])
    expected = angle_error(model, images, [0.0, 45.0, 90.0])
    for stage in stages:
        assert rows[c4, stage, 90] < 1e-4
        assert rows[c1, stage, 90] > 1e-2
        for angle, error in expected[stage].items():
            assert rows[c4, stage, angle] == pytest.approx(error, rel=1e-3, abs=1e-6)  # batches of five there
    with Image.open(tmp_path / "stages.png") as picture:
        assert len(picture.convert("L").getcolors()) > 50
    page = _Page((tmp_path / "report.html").read_text())
    assert len(page.loads) == 3 + 2 + 1  # metrics, models by stage, samples
    assert page.rows == (1 + 2) + 4 * (1 + 3) + (1 + 2 * len(stages)) + (3 + 2)
    assert main(command) == 0  # everything is there already
    assert main([*command[:-1], str(tmp_path / "other"), "--test-time-turns", "4"]) == 2
    assert not (tmp_path / "other").exists()
    with pytest.raises(InputError, match=r"cannot be measured by stage at 33 pixels: the map of layer4, .* use images"):
        rotate_eval([c4], textures, [45.0], str(tmp_path / "small"), [33], workers=0, device="cpu", by_stage=True)


@pytest.mark.parametrize("turns", ["0", "3", "8"])
def test_number_of_turns_that_does_not_exist(turns: str, textures: str, c4: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["rotate-eval", "--models", c4, "--data", textures, "--out", str(out), "--test-time-turns", turns]) == 2
    assert f"--test-time-turns {turns} does not exist: use one of 1, 2, 4" in capsys.readouterr().err
    assert not out.exists()


def test_model_without_maps(textures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(torch.nn.Module):
        num_classes, pretrained_cfg = 3, {"input_size": (3, 33, 33)}

    monkeypatch.setattr(run, "load_trained", lambda name, num_classes: (Model(), {}))
    with pytest.raises(InputError, match="'resnet18' shows no maps of its stages: leave --by-stage out"):
        rotate_eval(["resnet18"], textures, [0.0], str(tmp_path), workers=0, device="cpu", by_stage=True)
