"""The code that torch.compile makes of the batch norm of fields for a GPU, written without one: reductions coalesced.

PyTorch's compiler is led through its own steps up to the Triton source, which nothing compiles or runs. Its internal
functions change from version to version: this test is for those of the newest.
"""

import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from equivision_timm.layers.norm import field_batch_norm_by_definition

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(Version(torch.__version__) < Version("2.14"), reason="other internals of torch.compile"),
]
LAST, ORDER, FIELDS = torch.channels_last, 8, 25
GPU = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    total_memory=80 << 30,
)


def _by_channel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As `FieldNorm` does it for channels-last maps: pixels in place of images."""
    B, C, H, W = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(B * H * W, C, 1)
    y = field_batch_norm_by_definition(pixels, ORDER, weight, bias, 1e-5)[0]
    return F.relu(y.reshape(B, H, W, C).permute(0, 3, 1, 2))


def _as_space(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The control: the group axis as space, as a batch norm of [B, fields, |G| * H, W] sees it."""
    B, C, H, W = x.shape
    y = F.batch_norm(x.reshape(B, FIELDS, ORDER * H, W), None, None, weight, bias, True)
    return F.relu(y.reshape(B, C, H, W).contiguous(memory_format=LAST))


def _inputs(device: str) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, and the gradient of the output."""
    x, dy = (torch.empty(32, FIELDS * ORDER, 56, 56, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight, bias = (torch.empty(FIELDS, device=device, requires_grad=True) for _ in range(2))
    return x.contiguous(memory_format=LAST).requires_grad_(), weight, bias, dy.contiguous(memory_format=LAST)


def _triton_source(norm) -> str:
    """Forward and backward pass of a channels-last training step in bfloat16."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    def step(x, weight, bias, dy):
        y = norm(x, weight, bias)
        return y, *torch.autograd.grad(y, (x, weight, bias), dy)

    patches = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.get_device_capability": lambda *args: (9, 0),
        "torch.cuda.get_device_properties": lambda *args: GPU,
        "torch.utils._triton.triton_hash_with_backend": lambda: "none",
    }
    with FakeTensorMode() as mode, mock.patch("torch.cuda._get_device_properties", return_value=GPU, create=True):
        differentiated = make_fx(step, tracing_mode="fake")(*_inputs("cpu"))  # autograd asks a real GPU for its streams
        for node in differentiated.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda")}
        differentiated.recompile()
        inputs = [tensor.detach() for tensor in _inputs("cuda")]
        graph = make_fx(differentiated, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
        for name, replacement in patches.items():
            patch = mock.patch(name, replacement)
            patch.start()
        try:
            lowering = GraphLowering(graph, example_inputs=inputs)
            with V.set_graph_handler(lowering), V.set_fake_mode(mode), DebugContext():
                lowering.run(*inputs)
                code, _ = lowering.codegen()
        finally:
            mock.patch.stopall()
    return code.value


def _scattered(source: str) -> tuple[int, list[str]]:
    """How many reductions there are, and their loads whose neighbouring lanes read distant values.

    The lanes run along x0 for an outer reduction and along r0 for an inner one: its factor in the index has to be 1.
    """
    kernels = re.findall(r"reduction_hint=ReductionHint\.(\w+).*?def (triton_\w+)\((.*?)\n'''", source, re.DOTALL)
    found = []
    for hint, name, body in kernels:
        lane = r"r0_\d" if hint == "INNER" else r"x0"
        indices = re.findall(r"tl\.load\(in_ptr\d+ \+ \((.*?)\), ", body)
        found += [f"{name}: {i}" for i in indices if re.search(rf"\d\*{lane}\b|\({lane} [%/]", i)]
    return len(kernels), found


@pytest.mark.filterwarnings("ignore")  # of PyTorch about its own internals
def test_reductions_are_coalesced() -> None:
    reductions, scattered = _scattered(_triton_source(_by_channel))
    assert reductions >= 4
    assert not scattered
    assert _scattered(_triton_source(_as_space))[1]
