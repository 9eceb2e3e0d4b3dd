"""The examples in scripts/examples run and keep their promises."""

import gzip
import importlib.util
import json
import math
import re
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from PIL import Image

from equivision_timm.groups import Group

EXAMPLES = Path(__file__).parents[1] / "scripts" / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """`example("probe", needs=[...])`: the file as a module."""

    def load(name: str, needs: list[str]) -> ModuleType:
        for module in needs:
            pytest.importorskip(module, reason=f"scripts/examples/{name}.py needs {module}")
        monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_probe(example) -> None:
    """Features of an equivariant network serve turned images as well as upright ones, those of a plain one do not."""
    probe = example("probe", needs=["sklearn"])
    models = (timm.create_model(name, pretrained=True).eval() for name in ("test_c8resnet", "test_c1resnet"))
    equivariant, plain = (probe.probe(model, count=600, views=("0°", "90°")) for model in models)
    for classifier in ("linear probe", "5 nearest neighbours"):
        assert equivariant[classifier]["0°"] > 0.7
        assert abs(equivariant[classifier]["90°"] - equivariant[classifier]["0°"]) < 0.02
        assert plain[classifier]["90°"] < plain[classifier]["0°"] - 0.2


@pytest.mark.parametrize("method", ["grad_cam", "integrated_gradients"])
def test_explanations_rotate_with_the_image(method: str, example) -> None:
    """At an exact size and quarter turns; those of the plain network do not, nor any at 64 pixels."""
    explain = example("explain", needs=[])
    method = getattr(explain, method)
    equivariant, plain = (timm.create_model(f"test_{g}resnet", pretrained=True).eval().double() for g in ("c8", "c1"))
    images = explain.with_noise(explain.digits(equivariant, 4))
    assert equivariant.is_exact(images.shape[-1])
    for degrees in (90, 180, 270):
        assert explain.error(method, equivariant, images, degrees) < 1e-5
    assert explain.error(method, plain, images) > 0.1
    assert explain.error(method, equivariant, images[..., :64, :64]) > 0.01


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of ONNX
@pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="its ONNX exporter cannot write this graph")
def test_int8_is_invariant_bit_by_bit(example, tmp_path: Path) -> None:
    """The float network changes in the last bits, a plain 8-bit one throughout."""
    int8 = example("int8", needs=["onnx", "onnxscript", "onnxruntime"])
    equivariant = int8.compare("test_c8resnet", tmp_path, count=40)
    assert equivariant["int8"] == 0 < equivariant["float"]
    assert equivariant["agreement"] >= 0.95
    assert equivariant["size"] < 0.5
    assert int8.compare("test_c1resnet", tmp_path, count=40)["int8"] > 0.5


@pytest.mark.parametrize("name", ["c8reresnet50", pytest.param("c8resnet50_fast", marks=pytest.mark.slow)])
def test_detection(name: str, example) -> None:
    """A few steps on photographs; the maps rotate with the image, at this size and not at the next."""
    detection = example("detection", needs=["skimage"])
    torch.manual_seed(0)
    model = detection.detector(name, width=1)
    losses = detection.train(model, steps=14)
    assert losses[-1] < 0.8 * losses[0]
    body = model.eval().backbone.body
    assert body.feature_info.reduction() == [8, 16, 32]

    def errors(x: torch.Tensor) -> list[float]:
        """Of the map of each level, under a rotation by 90 degrees: element 2 of C8."""
        with torch.no_grad():
            pairs = zip(body(x), body(x.rot90(1, (-2, -1))), strict=True)
        c8 = Group.from_name("c8")
        return [((c8.transform_fields(y, 2) - rotated).abs().max() / y.abs().max()).item() for y, rotated in pairs]

    images, _ = detection.photographs()
    batch = model.transform(images)[0].tensors  # [2, 3, H, W], as torchvision hands it to the backbone
    assert batch.shape[2:] == images[0].shape[1:]
    assert all(timm.create_model(name, width=1).is_exact(side) for side in batch.shape[2:])
    assert max(errors(batch)) < 1e-4
    assert min(errors(batch[..., :-1, :-1])) > 0.1


@pytest.mark.filterwarnings("ignore::UserWarning")  # of segmentation_models.pytorch
def test_segmentation(example) -> None:
    segmentation = example("segmentation", needs=["segmentation_models_pytorch", "skimage"])
    torch.manual_seed(0)
    scores = segmentation.train(segmentation.unet("c8resnet18_fast", width=4), steps=8)
    assert scores[-1] > max(0.5, scores[0])
    with torch.device("meta"):  # a model at its full width
        assert segmentation.unet("c8resnet18").encoder.out_channels == [3, 224, 224, 448, 896, 1792]


@pytest.mark.parametrize("group", ["c4", "c8"])
def test_escnn_head(group: str, example) -> None:
    head = example("escnn_head", needs=["escnn"])
    torch.manual_seed(0)
    model = head.VectorHead(f"{group}resnet18_fast", width=2)
    assert head.error(model) < 1e-3
    assert head.error(model, size=96) > 1e-3  # 96 is no exact size


@pytest.mark.filterwarnings("ignore::UserWarning")  # of segmentation_models.pytorch
def test_segment(example, tmp_path: Path) -> None:
    """The mask rotates with the image, that of the U-Net does not; both learn, at equal parameters."""
    segment = example("segment", needs=["segmentation_models_pytorch", "skimage"])
    torch.manual_seed(0)
    models = {"U-Net": segment.unet(), "EquivariantFPN": segment.equivariant()}
    plain, equivariant = (sum(p.numel() for p in model.parameters()) for model in models.values())
    assert abs(equivariant - plain) < 0.05 * plain
    for model in models.values():
        segment.train(model, steps=12)
    unet, ours = (segment.measure(model) for model in models.values())
    assert ours["error"] < 1e-5 < 0.1 < unet["error"]
    assert ours["same"] > 0.999 > 0.9 > unet["same"]
    assert min(ours["scores"]) > 0.3
    segment.draw(models, tmp_path / "masks.png")
    assert (tmp_path / "masks.png").stat().st_size > 10_000


# The notebook

TOUR = EXAMPLES / "tour.ipynb"
LIBRARIES = ("nbclient", "ipykernel", "matplotlib", "sklearn", "skimage", "onnx", "onnxscript", "onnxruntime")


@pytest.fixture
def run_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`run_notebook(text)`: run a notebook, given as JSON, beside the examples; returns it as it is then."""
    for library in LIBRARIES:
        pytest.importorskip(library, reason=f"scripts/examples/tour.ipynb needs {library}")
    import nbclient
    import nbformat

    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))

    def run(text: str):
        notebook = nbformat.reads(text, as_version=4)
        resources = {"metadata": {"path": str(EXAMPLES)}}
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
        return notebook

    return run


def _without_numbers(notebook: dict) -> list[list[str]]:
    """For every cell what it printed, digits as 0: what a machine changes are the figures."""
    outputs = [[o for o in cell.get("outputs", []) if o["output_type"] == "stream"] for cell in notebook["cells"]]
    printed = [["".join(output["text"]) for output in of_cell] for of_cell in outputs]
    return [[re.sub(r"[\d.,e+-]+", "0", text) for text in of_cell] for of_cell in printed]


def test_notebook(run_notebook) -> None:
    """Its assertions hold, and what is stored in it is what it prints."""
    text = TOUR.read_text(encoding="utf-8")
    done = run_notebook(text)
    assert sum("assert " in cell.source for cell in done.cells) >= 7
    assert _without_numbers(done) == _without_numbers(json.loads(text))


def _sky(folder: Path, count: int = 12, mirrored: bool = False) -> list[float]:
    """Photographs of one ellipse each, as Stellarium describes them; returns position angles plus rotations, degrees.

    North is up and east to the left before the photograph is rotated counter-clockwise.
    """
    entries, tiles, angles = [struct.pack(">I", 2) + "1".encode("utf-16-be") + struct.pack(">I", 0)], [], []
    axis = np.linspace(-1, 1, 160)
    for index in range(count):
        position, rotation, ra = 15.0 * index, 100.0 * index, 20.0 * index
        theta = math.radians(90 + position + rotation)
        right, up = axis[None], -axis[:, None]
        along, across = (right * math.cos(a) + up * math.sin(a) for a in (theta, theta + math.pi / 2))
        light = np.exp(-8 * along**2 - 80 * across**2)
        Image.fromarray((255 * light).astype(np.uint8)).save(folder / f"{index}.png")
        cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
        corners = [(cos * x + sin * y, -sin * x + cos * y) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        sky = [[ra + (x if mirrored else -x) / 10, y / 10] for x, y in corners]
        tiles.append(
            {"imageUrl": f"{index}.png", "worldCoords": [sky], "textureCoords": [[[0, 0], [1, 0], [1, 1], [0, 1]]]}
        )
        numbers = struct.pack(">Idddd", index, math.radians(ra), 0, 9, 9) + struct.pack(">II", 0, 0)
        entries.append(numbers + struct.pack(">ddi6d", 0.1, 0.04, round(position), *[0] * 6) + bytes(4 * 29))
        angles.append(90 + position + rotation)
    (folder / "catalog.dat").write_bytes(gzip.compress(b"".join(entries)))
    (folder / "textures.json").write_text(re.sub(r"\b0\.(?=\d)", ".", json.dumps({"subTiles": tiles})))
    return angles


def test_galaxies(example, tmp_path: Path) -> None:
    """Axes come from the catalogue and the places on the sky; a mirrored sky is the control; the heads learn them."""
    galaxies = example("galaxies", needs=[])
    wanted = torch.deg2rad(torch.tensor(_sky(tmp_path)))
    crops, axes, files = galaxies.load(tmp_path)
    assert len(files) == 12
    assert galaxies.errors(axes, wanted).max() < 0.5
    assert galaxies.cross_validate("moments", crops, axes, files, 0).max() < 1
    for name in ("plain", "D8 FieldAngle"):
        body, head = galaxies.train(name, crops, axes, math.pi, seed=0, steps=25)
        quarter = galaxies.rotated(crops, torch.full((12,), math.pi / 2))
        upright, turned = head(body(galaxies.rotated(crops, torch.zeros(12))))[:, 0], head(body(quarter))[:, 0]
        assert galaxies.errors(upright, axes).median() < 20
        assert (galaxies.errors(turned, upright + math.pi / 2).max() < 0.1) == (name != "plain")
    _sky(tmp_path, mirrored=True)
    assert galaxies.errors(galaxies.load(tmp_path)[1], wanted).median() > 20
