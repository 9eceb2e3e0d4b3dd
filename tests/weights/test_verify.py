"""The commands `convert` and `verify`, from a checkpoint file to a checked model folder."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.reference_data import checkpoint
from timm.models import save_for_hf

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.cli.main import main
from equivision_timm.images.photographs import load_crops
from equivision_timm.kernel_basis import bases_sha256
from equivision_timm.models import EquivariantResNet
from equivision_timm.models.tensor_hash import hash_tensors
from equivision_timm.weights import verify as verify_module
from equivision_timm.weights.equivision import convert_file as convert_file_module
from equivision_timm.weights.equivision.convert import convert_original
from equivision_timm.weights.equivision.rivals import Statistics
from equivision_timm.weights.equivision.sign_groups import known_patterns
from equivision_timm.weights.equivision.signs import AmbiguousSigns, SignSearch
from equivision_timm.weights.folder import read_provenance, write_model_folder
from equivision_timm.weights.rooms import Released
from equivision_timm.weights.strict_load import load_strictly
from equivision_timm.weights.verify import verify

NAME = "c4resnet18_fast"
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves image files to the garbage collector


@pytest.fixture
def ckpt(tmp_path):
    """A checkpoint as Lightning writes it, in float16."""
    state = {f"model.{key}": v.half() if v.is_floating_point() else v for key, v in checkpoint(NAME).items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.fixture
def photographs(tmp_path):
    """A folder with two photographs, in a sub-folder, one of them grey."""
    folder = tmp_path / "photographs"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (80, 120, 3)), ("deeper/b.jpg", (90, 70))):
        coarse = rng.integers(0, 255, (8, 8, *shape[2:]), dtype=np.uint8)
        Image.fromarray(coarse).resize(shape[1::-1]).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def make_folder(tmp_path, provenance=None, name="test_d4resnet", change=None):
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    with torch.no_grad():
        model(torch.randn(8, 3, 65, 65))
    state = model.state_dict()
    if change:
        change(state)
    return write_model_folder(tmp_path / name, name, state, {"model": name} if provenance is None else provenance)


def rows(checks):
    return {check.name: check for check in checks}


def test_convert_writes_a_model_that_verify_accepts(ckpt, tmp_path, photographs, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(ckpt), "--model", NAME, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    expected = convert_original(
        {k: v.half() if v.is_floating_point() else v for k, v in checkpoint(NAME).items()}, NAME
    )
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    provenance = read_provenance(out)
    assert provenance["basis_sha256"] == bases_sha256(model.kernels())
    assert provenance["converted_dtypes"] == "float16 to float32"
    assert provenance["basis_from"] == "canonical"
    assert provenance["model"] == NAME
    assert len(provenance["source_sha256"]) == 64
    assert provenance["tensors_sha256"] == hash_tensors(load_file(out / "model.safetensors"))
    assert provenance["statistics"].startswith("log variances off by")
    assert {"torch", "timm", "equivision-timm", "date", "source_file"} <= set(provenance)
    for value in (provenance["source_sha256"], provenance["basis_sha256"], "float16 to float32", str(out)):
        assert value in printed

    assert main(["verify", str(out), "--images", str(photographs)]) == 0
    table = capsys.readouterr().out
    assert provenance["source_sha256"] in table
    assert "FAILED" not in table
    assert main(["verify", str(out), "--images", str(photographs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    named = {check["name"]: check["ok"] for check in found["checks"]}
    assert named["loads"] is named["finite"] is named["equivariance"] is named["basis_sha256"] is True
    assert "statistics" in named


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["missing.ckpt", "--model", NAME, "--out", "out"], 1, "missing.ckpt"),
        (["last.ckpt", "--model", "resnet18", "--out", "out"], 2, "no model of this package"),
        (["last.ckpt", "--model", "c4resnet18", "--out", "out"], 1, "it fits c4resnet18_fast"),
        (["last.ckpt", "--model", NAME, "--out", "out", "--signs", "++"], 1, "same on every machine"),
        ([".", "--model", NAME, "--out", "out"], 1, "is a folder"),
        (["last.ckpt", "--model", NAME, "--out", "last.ckpt"], 2, "is a file"),
        (["last.ckpt", "--model", NAME, "--out", "last.ckpt/below"], 2, "cannot write"),
        (["last.ckpt", "--model", NAME, "--out", "x" * 250], 2, "File name too long"),
        (
            ["last.ckpt", "--model", NAME, "--out", "out", "--images", "nowhere"],
            2,
            "nowhere is no folder of photographs",
        ),
    ],
)
def test_convert_says_what_is_wrong_and_writes_nothing(ckpt, tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    if status == 2:  # known before the work
        monkeypatch.setattr(convert_file_module, "read_checkpoint", lambda _: pytest.fail("work was done in vain"))
    assert main(["convert", *arguments]) == status
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_given_signs(tmp_path, capsys):
    name = "d4resnet18_fast"
    torch.save(checkpoint(name), tmp_path / "d4.ckpt")
    arguments = ["convert", str(tmp_path / "d4.ckpt"), "--model", name, "--out", str(tmp_path / "out")]
    assert main([*arguments, "--signs", "scipy1.9-avx2"]) == 0
    pattern = known_patterns("d4")["scipy1.9-avx2"]
    provenance = read_provenance(tmp_path / "out")
    assert provenance["signs"] == pattern
    assert provenance["signs_known_as"] == "scipy1.9-avx2"
    assert provenance["signs_given"] == "by the user"
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[k], v) for k, v in convert_original(checkpoint(name), name, pattern).items())
    assert "scipy1.9-avx2" in capsys.readouterr().out


def test_found_signs_and_their_scores_are_written_down(tmp_path, monkeypatch, photographs, capsys):
    """The search itself is tested in test_signs.py; here, what becomes of its result."""
    name, pattern = "d4resnet18_fast", known_patterns("d4")["scipy1.11-avx512"]
    search = SignSearch(pattern, "scipy1.11-avx512", 1.5, "-" * 24, 2.5, 7.25, 80, 0.5, {"scipy1.11-avx2": 30.0})
    seen = []

    def find(model, crops, more):
        seen.append((crops.shape, next(more).shape))
        return search

    monkeypatch.setattr(convert_file_module, "find_signs", find)
    statistics = Statistics(0.125, 40, {"c8resnet18_fast": 12.0})
    monkeypatch.setattr(convert_file_module, "check_before_search", lambda *_: None)  # the weights are random
    monkeypatch.setattr(convert_file_module, "check_statistics", lambda *_: statistics)
    torch.save(checkpoint(name), tmp_path / "d4.ckpt")
    arguments = ["convert", str(tmp_path / "d4.ckpt"), "--model", name, "--out", str(tmp_path / "out")]
    assert main([*arguments, "--images", str(photographs)]) == 0
    assert seen == [((40, 3, 97, 97), (40, 3, 97, 97))]  # the test's photographs are few: the least number of crops
    provenance = read_provenance(tmp_path / "out")
    expected = {
        "signs": pattern,
        "signs_misfit": "1.5",
        "runner_up": "-" * 24,
        "runner_up_misfit": "2.5",
        "separation": "7.2 standard errors",
        "compared_on": "80 crops",
        "statistics": "log variances off by 0.12 on 40 crops of photographs",
        "better_than_c8resnet18_fast": "12.0 standard errors",
        "logits_differ": "0.5 standard deviations",
        "known_misfits": "scipy1.11-avx2 30",
    }
    assert {key: provenance[key] for key in expected} == expected
    printed = capsys.readouterr().out
    assert all(value in printed for value in expected.values())
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[k], v) for k, v in convert_original(checkpoint(name), name, pattern).items())

    def refuse(*_, **__):
        raise AmbiguousSigns("too close")

    monkeypatch.setattr(convert_file_module, "find_signs", refuse)
    assert main([*arguments[:-1], str(tmp_path / "new"), "--images", str(photographs)]) == 1
    assert "too close" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_file_alone_and_a_name(tmp_path, photographs, monkeypatch):
    folder = make_folder(tmp_path)
    assert rows(verify(str(folder / "model.safetensors"), photographs))["equivariance"].ok
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not rows(verify("d4resnet18", photographs))["loads"].ok  # no weights here
    assert not rows(verify("no_such_model", photographs))["loads"].ok
    assert not rows(verify(str(tmp_path / "missing"), photographs))["loads"].ok
    assert not rows(verify(str(tmp_path), photographs))["loads"].ok


def change_entry(name, change):
    def apply(state):
        state[name] = change(state[name].clone())

    return apply


def nan(value):
    value.view(-1)[0] = float("nan")
    return value


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (change_entry("layer1.0.conv1.conv.weight", nan), "finite"),
        (change_entry("conv1.norm.per_field.running_var", lambda v: -v), "finite"),
        (change_entry("fc.weight", lambda v: v * 0), "equivariance"),
    ],
)
def test_bad_values_fail(tmp_path, photographs, change, failing, capsys):
    folder = make_folder(tmp_path, change=change)
    assert rows(verify(str(folder), photographs))[failing].ok is False
    assert main(["verify", str(folder), "--images", str(photographs)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_damaged_files_fail(tmp_path, photographs):
    folder = make_folder(tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])
    assert rows(verify(str(folder), photographs))["loads"].ok is False
    state = load_file(make_folder(tmp_path / "b") / "model.safetensors")
    del state["fc.bias"]
    save_file(state, folder / "model.safetensors")
    assert "fc.bias" in rows(verify(str(folder), photographs))["loads"].finding


def test_other_bases_fail(tmp_path, photographs):
    folder = make_folder(tmp_path, {"model": "test_d4resnet", "basis_sha256": "0" * 64})
    assert rows(verify(str(folder), photographs))["basis_sha256"].ok is False


def test_a_network_that_is_not_equivariant_fails(tmp_path, photographs, monkeypatch):
    """Negative control: the measured error decides."""
    folder = make_folder(tmp_path)
    monkeypatch.setattr(EquivariantResNet, "exact_sizes", lambda model, near: (96, 96))  # where none is exact
    assert rows(verify(str(folder), photographs))["equivariance"].ok is False


def test_statistics_tell_the_right_photographs_from_wrong_weights(tmp_path):
    pytest.importorskip("skimage", reason="photographs come with scikit-image, the extra `convert`")
    crops = load_crops(None)

    def settle(state):
        model = timm.create_model("test_d4resnet")
        model.load_state_dict(state)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            model.train()(crops)
        state.update(model.state_dict())

    def settle_and_negate(state):
        settle(state)
        state["layer1.0.conv1.conv.weight"][:, :, 20:30] *= -1

    right = make_folder(tmp_path / "right", change=settle)
    wrong = make_folder(tmp_path / "wrong", change=settle_and_negate)
    rms = [float(rows(verify(str(f)))["statistics"].finding.split("): ")[1].split()[0]) for f in (right, wrong)]
    assert rms[0] < 1e-3 < 0.05 < rms[1]


def test_no_photographs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    folder = make_folder(tmp_path)
    check = rows(verify(str(folder)))["statistics"]
    assert check.ok is None
    assert "--images DIR" in check.finding
    (tmp_path / "empty").mkdir()
    assert rows(verify(str(folder), tmp_path / "empty"))["statistics"].ok is False
    assert rows(verify(str(folder), tmp_path / "missing"))["statistics"].ok is False
    torch.save(checkpoint("d4resnet18_fast"), tmp_path / "d4.ckpt")
    arguments = ["convert", str(tmp_path / "d4.ckpt"), "--model", "d4resnet18_fast", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "--images DIR" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_accuracy(tmp_path, photographs, monkeypatch):
    """Ten classes that the model can tell, because we name them after its answers."""
    folder = make_folder(tmp_path)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data, rng = tmp_path / "data" / "validation", np.random.default_rng(0)
    for label in range(model.num_classes):
        (data / f"{label:04}").mkdir(parents=True)
        ending = ("png", "tif", "webp")[label % 3]  # timm alone finds no TIFF
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(data / f"{label:04}" / f"x.{ending}")
    found = rows(verify(str(folder), photographs, tmp_path / "data"))
    n = model.num_classes
    assert found["top-1"].finding.endswith(f"% of {n} images")
    assert found["top-1"].ok is None
    assert float(found["top-5"].finding.split()[0]) >= float(found["top-1"].finding.split()[0])

    monkeypatch.setattr(
        verify_module,
        "released",
        lambda: {"test_d4resnet": Released("nobody", "nowhere", "id", {"top1": 1.0, "top5": 1.0}, "")},
    )
    found = rows(verify(str(folder), photographs, tmp_path / "data"))
    assert found["top-1"].ok is False
    assert "reported 100.0 %" in found["top-1"].finding

    (data / "extra").mkdir()
    (data / "0000" / "x.png").rename(data / "extra" / "x.png")
    Image.new("RGB", (48, 48)).save(data / "0000" / "y.png")
    assert rows(verify(str(folder), photographs, tmp_path / "data"))["accuracy"].ok is False
    assert rows(verify(str(folder), photographs, tmp_path / "none"))["accuracy"].ok is False


def test_a_transformer_saved_by_timm(tmp_path, photographs):
    """timm writes its settings into the config, which may be those of the architecture and no others."""
    save_for_hf(timm.create_model("test_d4vit", pretrained=True), tmp_path, safe_serialization=True)
    found = rows(verify(str(tmp_path), photographs))
    assert found["loads"].ok
    assert found["equivariance"].ok
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["img_size"] == [64, 64]
    for key, value in (("img_size", [32, 64]), ("global_pool", "avg")):
        other = {**config, "model_args": {**config["model_args"], key: value}}
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"makes another network of test_d4vit, by the model_args .*{key}"):
            load_strictly(str(tmp_path))
