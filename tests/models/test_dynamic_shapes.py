"""Open sizes: a graph of torch.compile or torch.export serves every batch and image size, as timm's ResNet does."""

import pytest
import timm
import torch
import torch.nn as nn
from torch.fx.experimental.symbolic_shapes import has_static_value

from equivision_timm import fuse
from equivision_timm.layers.norm import FieldBatchNorm2d

SHAPES = [(2, 3, 33, 33), (3, 3, 65, 65)]
PARITIES = [(2, 3, 33, 34), (3, 3, 66, 65), (3, 3, 64, 64), (2, 3, 65, 65)]
PATCHES = [(2, 3, 32, 32), (3, 3, 64, 64)]


class QuotesItsInput(nn.Module):
    """The control: a message that nobody reads, which quotes the height."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.shape[2] > 1, f"got {x.shape[2]}")
        return self.model(x)


def fixed_axes(model: nn.Module, shapes=SHAPES, gradients: bool = False) -> set[int]:
    """Which axes of the images the graph takes as constants; checks the numbers of each call against eager ones."""
    found, graphs = set(), []

    def look(graph, inputs):
        graphs.append(graph)
        (images,) = (n for n in graph.graph.nodes if n.op == "placeholder" and n.name.strip("_").lower() == "l_x")
        shape = images.meta["example_value"].shape
        found.update(axis for axis, length in enumerate(shape) if has_static_value(length))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model.eval(), backend=look, dynamic=True, fullgraph=True)
    for shape in shapes:
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(compiled(images), model(images), atol=1e-4, rtol=1e-4)
    assert len(graphs) == 1 or found != {1}
    return found


@pytest.mark.parametrize("strategy", ["expand", "native"])
def test_strategies(strategy):
    model = timm.create_model("test_c8resnet", conv_strategy=strategy)
    assert fixed_axes(model, gradients=strategy == "native") == {1}  # the channels, which a model knows


@pytest.mark.parametrize(
    ("name", "keywords", "shapes"),
    [
        ("test_c8resnetaf", {}, PARITIES),
        ("test_c8resnet", {"features_only": True, "map_pool": "max", "output_stride": 8}, SHAPES),
        ("test_d4vit", {"dynamic_img_size": True}, PATCHES),
    ],
)
def test_other_models(name, keywords, shapes):
    assert fixed_axes(timm.create_model(name, **keywords), shapes) == {1}


def test_control():
    """timm's network keeps all sizes open; with a message about the height none."""
    assert fixed_axes(timm.create_model("test_resnet")) == {1}
    assert fixed_axes(QuotesItsInput(timm.create_model("test_resnet"))) >= {1, 2}


def check_export(model: nn.Module) -> None:
    """Exports `model` with all sizes open; compares its numbers with eager ones at other sizes."""
    batch, height, width = (
        torch.export.Dim(name, min=low, max=512) for name, low in zip("bhw", (1, 33, 33), strict=True)
    )
    sizes = ({0: batch, 2: height, 3: width},)
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (torch.rand(2, 3, 65, 97),), dynamic_shapes=sizes).module()
        for shape in ((1, 3, 33, 33), (3, 3, 64, 50), (1, 3, 35, 64)):
            images = torch.rand(shape)
            torch.testing.assert_close(exported(images), model(images), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def control_exports():
    try:
        check_export(timm.create_model("test_resnet"))
    except torch._dynamo.exc.UserError as error:
        pytest.skip(f"torch {torch.__version__} refuses timm's network, too: {str(error).splitlines()[0]}")


@pytest.mark.usefixtures("control_exports")
def test_exported():
    check_export(timm.create_model("test_c8resnetaf"))
    check_export(fuse(timm.create_model("test_c8resnet", even="box"), "blocks"))


def test_export_control(monkeypatch):
    """A norm that joins the group with the height leaves no height open."""
    monkeypatch.setattr(FieldBatchNorm2d, "has_given_statistics", lambda self: False)
    with pytest.raises(Exception, match="Constraints"):
        check_export(timm.create_model("test_c8resnet"))
