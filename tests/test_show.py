"""The picture of an image and its feature maps at several angles."""

import html
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import timm
import torch
from matplotlib.text import Text
from PIL import Image
from support.small_models import save_small_model

from equivision_timm.cli import figures as figure_module
from equivision_timm.cli.main import main
from equivision_timm.cli.show import map_error, scalar_maps
from equivision_timm.errors import one_line
from equivision_timm.rotation import rotate


@pytest.fixture
def photograph(tmp_path: Path) -> str:
    data = pytest.importorskip("skimage.data", reason="the photograph for this test comes from scikit-image")
    Image.fromarray(data.astronaut()).resize((128, 128)).save(tmp_path / "astronaut.png")
    return str(tmp_path / "astronaut.png")


@pytest.mark.parametrize(("name", "maps"), [("c4resnet18_fast", 16), ("d4resnet18_fast", 8), ("test_c1resnet", None)])
def test_maps_of_equivariant_models_rotate(name: str, maps: int | None) -> None:
    """The error of every map at level 1 under a quarter turn; without a group it is large."""
    model = timm.create_model(name).eval()
    image = torch.nn.functional.interpolate(torch.randn(1, 3, 9, 9), (97, 97), mode="bicubic", align_corners=True)
    with torch.inference_mode():
        upright, rotated = (scalar_maps(model, x, 1)[0] for x in (image, rotate(image, 90)))
    errors = [map_error(rotate(t[None, None], -90)[0, 0], u) for t, u in zip(rotated, upright, strict=True)]
    if maps is None:
        assert np.median(errors) > 0.2
    else:
        assert len(errors) == maps
        assert max(errors) < 1e-4


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that the command saves."""
    found: list = []
    save = figure_module.figure_bytes
    monkeypatch.setattr(figure_module, "check_figure_file", lambda path: None)
    monkeypatch.setattr(figure_module, "figure_bytes", lambda *args: found.append(args[0]) or save(*args))
    return found


def test_differences_have_one_scale_for_all_models(photograph: str, figures: list, tmp_path) -> None:
    """It ends at the largest difference, that of a network of timm; and the text can be read."""
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "plain.pth")
    models, out = ["test_c8resnet", f"test_resnet={tmp_path}/plain.pth"], tmp_path / "folder" / "show.png"
    for count in (2, 1):
        assert main(["show", photograph, "--model", *models[:count], "--angles", "0,90", "--out", str(out)]) == 0
        with Image.open(out) as picture:
            assert len(picture.getcolors(1 << 24)) > 1000
    rotated = figures[1].subfigs[0].axes[7].images[0]  # rounding errors stay dark
    assert rotated.norm.vmax == 0.01 > 100 * rotated.get_array().max() > 0
    c8, plain = figures[0].subfigs
    rows = [[block.axes[6].images[0], block.axes[7].images[0]] for block in (c8, plain)]  # upright, rotated
    assert {image.norm.vmax for row in rows for image in row} == {rows[1][1].get_array().max()}
    assert rows[0][1].get_array().max() < 1e-4 < 0.1 < rows[1][1].get_array().max()
    assert rows[1][0].get_array().max() == 0  # against itself
    for block in (c8, plain):
        scale = block.axes[-1]
        assert "difference" in scale.get_xlabel()
        assert scale.get_xlim()[1] == rows[0][0].norm.vmax
    texts = [text for block in (c8, plain) for text in block.findobj(Text) if text.get_text()]
    assert len(texts) >= 2 * (2 + 4 + 2)  # predictions, rows, errors
    assert min(text.get_fontsize() for text in texts) >= 12


def test_class_names_are_drawn_as_they_stand(photograph: str, tmp_path: Path) -> None:
    """A `$` begins no formula, neither in class names nor in the names of models; long names are cut."""
    name = "$\\nosuch$ two\nlines\udcff" * 9
    folder = tmp_path / "$\\x$"
    save_small_model(folder, width=2)
    config = json.loads((folder / "config.json").read_text())
    config["label_names"] = config["pretrained_cfg"]["label_names"] = [name] * 3
    (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "show.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        assert main(["show", photograph, "--model", f"local-dir:{folder}", "--angles", "0,90", "--out", str(out)]) == 0
    drawn = html.unescape(out.read_text())
    assert one_line(name)[:15] in drawn
    assert "$\\x$, 33 px" in drawn
    assert "feature map: layer1, field" in drawn
