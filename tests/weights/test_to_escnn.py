"""What `to_escnn` refuses, which needs no escnn: networks of which the original has no like."""

import pytest
import timm
import torch

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.weights.equivision.to_escnn import to_escnn


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"stem_type": "deep"}, "conv1 is a Sequential"),
        ({"aa_layer": "blur"}, "maxpool is a Sequential"),
        ({"stem_pool": "blur"}, "maxpool is a Blur2d"),
        ({"avg_down": True}, r"layer2\.0\.downsample\.0 is a Blur2d"),
        ({"block_args": {"attn_layer": "se"}}, r"layer1\.0\.conv2\.attn is a FieldAttention"),
        ({"act_layer": "silu"}, r"conv1\.act is a SiLU"),
        ({"global_pool": "max"}, "pools by average"),
    ],
)
def test_other_networks_are_refused(keywords, says):
    with torch.device("meta"):
        model = timm.create_model("test_c8resnet", **keywords)
    with pytest.raises(ValueError, match=says):
        to_escnn(model)
