"""ResNets with even='box', the alias-free ones among them: exact at every image size."""

import pytest
import timm
import torch
from packaging.version import Version
from support.results import onnx_function, relative

import equivision_timm  # noqa: F401  registers the models
from equivision_timm import fuse
from equivision_timm.groups import Group

PARITIES = [(64, 64), (65, 65), (66, 49), (49, 66)]
RESIDUES = [(height, 33 + 7 * height // 2 % 32) for height in range(33, 65)]  # of 32, widths of both parities
SMALL = {
    "test_c8resnetaf": {},
    "test_d4resnet": {"even": "box"},
    "c8resnet50d": {"even": "box", "width": 1, "layers": (1, 1, 1, 1)},
    "d1resnet18_fast": {"even": "box", "width": 4, "replace_stem_pool": True},
}


def make(name: str, **keywords) -> torch.nn.Module:
    """With norms that are not the identity."""
    model = timm.create_model(name, num_classes=5, **keywords).train()
    with torch.no_grad():
        model(torch.randn(4, 3, 49, 49))
    return model.eval()


@torch.no_grad()
def error(model: torch.nn.Module, shape: tuple[int, int]) -> float:
    """The largest change of the last map and the logits under a quarter turn and a reflection, if in the group."""
    group, x = Group.from_name(model.group), torch.randn(1, 3, *shape)
    features = model.forward_features(x)
    errors = []
    for g in {group.grid_elements[1], group.grid_elements[-1]}:  # they generate the others
        moved = model.forward_features(group.transform_image(x, g))
        errors.append(relative(moved, group.transform_fields(features, g)))
        errors.append(relative(model.forward_head(moved), model.forward_head(features)))
    return max(errors)


@pytest.mark.parametrize("name", ["test_c8resnetaf", "test_d4resnet"])
def test_every_residue(name):
    model = make(name, **SMALL[name])
    assert {height % 32 for height, _ in RESIDUES} == set(range(32))
    for shape in RESIDUES:
        assert model.is_exact(shape)
        assert error(model, shape) < 2e-6, shape
    assert model.exact_sizes(224) == (224, 224)


@pytest.mark.parametrize("name", SMALL)
def test_every_parity(name):
    model = make(name, **SMALL[name])
    assert max(error(model, shape) for shape in PARITIES) < 2e-6
    without = timm.create_model(name, num_classes=5, **{**SMALL[name], "even": ""}).eval()
    assert without.load_state_dict(model.state_dict())  # no parameter more
    assert error(without, (64, 64)) > 1e-3  # the control
    x = torch.randn(1, 3, 97, 65)
    assert torch.equal(model(x), without(x))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(97, 130), (224, 160), (224, 224), (226, 226), (300, 300)])
@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        *[(name, {}) for name in ("c8resnetaf18_fast", "d8resnetaf18_fast", "c4resnetaf18", "c8resnetaf50")],
        *[(name, {"even": "box"}) for name in ("c8resnet18_fast", "d4resnet50_fast", "c8resnet50d")],
    ],
)
def test_whole_networks(name, keywords, shape):
    assert error(make(name, **keywords), shape) < 2e-6


def test_axes_that_nothing_reverses_are_left():
    models = [timm.create_model("test_d4resnet", group="d1", even=even, num_classes=5).eval() for even in ("", "box")]
    models[1].load_state_dict(models[0].state_dict())
    for shape in ((64, 64), (64, 65), (65, 64)):
        x = torch.randn(1, 3, *shape)
        assert torch.equal(models[0](x), models[1](x)) == (shape == (64, 65))


@pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="its ONNX exporter cannot write these graphs")
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside torch.onnx
def test_one_onnx_file_for_all_sizes(tmp_path):
    """Height and width are open; `test_dynamic_shapes.py` does the same for torch.export and torch.compile."""
    model, dim = make("test_c8resnetaf"), torch.export.Dim
    sizes = ({2: dim("height", min=33, max=512), 3: dim("width", min=33, max=512)},)
    x = torch.randn(1, 3, 64, 65)
    exported = onnx_function(tmp_path, fuse(model, "blocks"), x, dynamo=True, dynamic_shapes=sizes)
    for shape in PARITIES:
        x = torch.randn(1, 3, *shape)
        assert relative(exported(x), model(x)) < 1e-5
