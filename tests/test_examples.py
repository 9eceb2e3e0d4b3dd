"""The examples in scripts/examples run and keep their promises."""

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import explain
import galaxies
import pytest
import timm
import torch
from packaging.version import Version
from support.sky import write_sky

from equivision_timm.groups import Group

EXAMPLES = Path(__file__).parents[1] / "scripts" / "examples"


def needs(*libraries):
    """A test of an example that imports these."""
    missing = ", ".join(name for name in libraries if find_spec(name) is None)
    return pytest.mark.skipif(bool(missing), reason=f"the example needs {missing}")


@needs("sklearn")
def test_probe():
    """Features of an equivariant network serve rotated images as well as upright ones, those of a plain one do not."""
    import probe

    models = (timm.create_model(name, pretrained=True).eval() for name in ("test_c8resnet", "test_c1resnet"))
    equivariant, plain = (probe.probe(model, count=600, views=("0°", "90°")) for model in models)
    for classifier in ("linear probe", "5 nearest neighbours"):
        assert equivariant[classifier]["0°"] > 0.7
        assert abs(equivariant[classifier]["90°"] - equivariant[classifier]["0°"]) < 0.02
        assert plain[classifier]["90°"] < plain[classifier]["0°"] - 0.2


@pytest.mark.parametrize("method", ["grad_cam", "integrated_gradients"])
def test_explanations_rotate_with_the_image(method):
    """At an exact size and quarter turns; those of the plain network do not, nor any at 64 pixels."""
    method = getattr(explain, method)
    equivariant, plain = (timm.create_model(f"test_{g}resnet", pretrained=True).eval().double() for g in ("c8", "c1"))
    images = explain.with_noise(explain.digits(equivariant, 2))
    assert equivariant.is_exact(images.shape[-1])
    for degrees in (90, 180, 270):
        assert explain.error(method, equivariant, images, degrees) < 1e-5
    assert explain.error(method, plain, images) > 0.1
    assert explain.error(method, equivariant, images[..., :64, :64]) > 0.01


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of ONNX
@pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="its ONNX exporter cannot write this graph")
@needs("onnx", "onnxscript", "onnxruntime")
def test_int8_is_invariant_bit_by_bit(tmp_path):
    """The float network changes in the last bits, a plain 8-bit one throughout."""
    import int8

    equivariant = int8.compare("test_c8resnet", tmp_path, count=40)
    assert equivariant["int8"] == 0 < equivariant["float"]
    assert equivariant["agreement"] >= 0.95
    assert equivariant["size"] < 0.5
    assert int8.compare("test_c1resnet", tmp_path, count=40)["int8"] > 0.5


@needs("skimage")
@pytest.mark.parametrize("name", ["c8reresnet50", pytest.param("c8resnet50_fast", marks=pytest.mark.slow)])
def test_detection(name):
    """A few steps on photographs; the maps rotate with the image, at this size and not at the next."""
    import detection

    model = detection.detector(name, width=1)
    losses = detection.train(model, steps=14)
    assert losses[-1] < 0.8 * losses[0]
    body = model.eval().backbone.body
    assert body.feature_info.reduction() == [8, 16, 32]

    def errors(x):
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


@needs("segmentation_models_pytorch", "skimage")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of segmentation_models.pytorch
def test_segmentation():
    import segmentation

    scores = segmentation.train(segmentation.unet("c8resnet18_fast", width=4), steps=8)
    assert scores[-1] > max(0.5, scores[0])


@needs("escnn")
def test_escnn_head():
    import escnn_head

    model = escnn_head.VectorHead("c8resnet18_fast", width=2)
    assert escnn_head.error(model) < 1e-3
    assert escnn_head.error(model, size=96) > 1e-3  # 96 is no exact size


@needs("segmentation_models_pytorch", "skimage")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of segmentation_models.pytorch
def test_segment(tmp_path):
    """The mask rotates with the image, that of the U-Net does not; both learn, at equal parameters."""
    import segment

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


def without_numbers(cells):
    """For every cell what it printed, numbers as 0: they depend on the machine."""
    outputs = [[o for o in cell.get("outputs", []) if o["output_type"] == "stream"] for cell in cells]
    printed = [["".join(output["text"]) for output in of_cell] for of_cell in outputs]
    return [[re.sub(r"[\d.,e+-]+", "0", text) for text in of_cell] for of_cell in printed]


@needs("nbclient", "ipykernel", "matplotlib", "sklearn", "skimage", "onnx", "onnxscript", "onnxruntime")
def test_notebook(tmp_path, monkeypatch):
    """Its assertions hold, and what is stored in it is what it prints."""
    import nbclient
    import nbformat

    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    text = (EXAMPLES / "tour.ipynb").read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    resources = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert sum("assert " in cell.source for cell in notebook.cells) >= 7
    assert without_numbers(notebook.cells) == without_numbers(json.loads(text)["cells"])


def test_galaxies(tmp_path):
    """Axes come from the catalogue and the places on the sky; a mirrored sky is the control; the heads learn them."""
    wanted = torch.deg2rad(torch.tensor(write_sky(tmp_path)))
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
    write_sky(tmp_path, mirrored=True)
    assert galaxies.errors(galaxies.load(tmp_path)[1], wanted).median() > 20
