"""Our network as an escnn network, and back: same output, same weights, whatever signs this machine's escnn has."""

import pytest
import timm
import torch

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.weights.equivision.convert import convert_with_details
from equivision_timm.weights.equivision.to_escnn import to_escnn

pytest.importorskip("escnn", reason="needs the extra `escnn`")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:escnn"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:escnn"),
]


@pytest.fixture(scope="module", params=["test_d4resnet", "test_c8resnet", "d1resnet18_fast", "test_c1resnet"])
def name(request):
    return request.param


def small_model(name):
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    with torch.no_grad():
        for _ in range(2):  # running statistics other than 0 and 1
            model(torch.randn(4, 3, 33, 33))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return model.eval()


def test_same_output_and_back(name):
    model = small_model(name)
    network = to_escnn(model)
    x = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        expected, found = model(x), network(x)
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp_min(1)
    assert not torch.allclose(found, network(x.flip(-1).roll(7, -1)))  # depends on the image

    conversion = convert_with_details(network.state_dict(), name)
    assert conversion.basis == "sampled_basis"
    assert conversion.residual < 1e-5
    for key, value in model.state_dict().items():
        assert torch.equal(conversion.state_dict[key], value), key  # to the bit: the translation is signs


def test_train_mode_filters_and_order(name):
    model = small_model(name)
    network = to_escnn(model)
    evaluated = network.state_dict()
    assert any(key.endswith(".filter") for key in evaluated)
    trained = network.train().state_dict()
    assert not any(key.endswith(".filter") for key in trained)
    only_filters = {key: value for key, value in evaluated.items() if "sampled_basis" not in key}
    for state, basis in ((trained, "sampled_basis"), (only_filters, "filter")):
        conversion = convert_with_details(state, name)
        assert conversion.basis == basis
        for key, value in model.state_dict().items():
            assert torch.allclose(conversion.state_dict[key], value, rtol=1e-4, atol=1e-6), key


def test_what_the_original_lacks_is_refused():
    with pytest.raises(ValueError, match="ReLU"):
        to_escnn(timm.create_model("test_c8resnet", act_layer="silu"))
    with pytest.raises(ValueError, match="dilated"):
        to_escnn(timm.create_model("test_c8resnet", output_stride=16))
    with pytest.raises(ValueError, match="pools by"):
        to_escnn(timm.create_model("test_c8resnet", num_classes=0))
