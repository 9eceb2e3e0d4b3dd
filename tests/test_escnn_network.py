"""A network of this package in escnn, and back: same output, same weights, whatever signs the installed escnn has."""

import pytest
import timm
import torch
from escnn_network import to_escnn
from support.small_models import stirred

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.weights.equivision import convert_original


def test_layers_that_the_original_lacks_are_refused():
    for options, noun in (
        ({"act_layer": "silu"}, "ReLU"),
        ({"output_stride": 16}, "dilated"),
        ({"num_classes": 0}, "pools"),
        ({"stem_type": "deep"}, "conv1"),
        ({"stem_pool": "blur"}, "maxpool"),
        ({"avg_down": True}, "downsample"),
        ({"block_args": {"attn_layer": "se"}}, "attn"),
    ):
        with torch.device("meta"):
            model = timm.create_model("test_c8resnet", **options)
        with pytest.raises(ValueError, match=noun):
            to_escnn(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:escnn")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:escnn")
@pytest.mark.parametrize("name", ["test_d4resnet", "test_c8resnet", "d1resnet18_fast", "test_c1resnet"])
def test_same_output_and_back(name):
    pytest.importorskip("escnn", reason="needs the extra `escnn`")
    torch.manual_seed(0)
    model = stirred(timm.create_model(name))
    network, x = to_escnn(model), torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        expected, found = model(x), network(x)
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp_min(1)
    assert not torch.allclose(found, network(x.flip(-1).roll(7, -1)))  # depends on the image

    state = network.state_dict()
    only_filters = {key: value for key, value in state.items() if "sampled_basis" not in key}
    in_training = network.train().state_dict()
    assert len(in_training) < len(state)  # without filters
    back = [convert_original(weights, name) for weights in (state, in_training, only_filters)]
    for key, value in model.state_dict().items():
        assert torch.equal(back[0][key], value), key  # exact: the translation is signs
        assert torch.equal(back[1][key], value), key
        assert torch.allclose(back[2][key], value, rtol=1e-4, atol=1e-6), key
