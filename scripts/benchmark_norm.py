"""Time of the batch norm of fields: by channel, PyTorch's on [B, fields, |G| * H, W], and plain, of all channels.

    python scripts/benchmark_norm.py
    python scripts/benchmark_norm.py --device cuda --dtype bfloat16 --batch-size 128

Maps of the stages of c8resnet50, channels-last, forward and backward with ReLU, interleaved; medians, and their ratios
to the plain batch norm of as many channels.
"""

import argparse
import statistics
import time

import torch
import torch.nn as nn
from report import markdown

from equivision_timm.layers import FieldNorm

ORDER = 8
MAPS = ((25, 57), (100, 57), (200, 29), (400, 15), (800, 8))  # fields, pixels along a side


class Reshaped(nn.BatchNorm2d):
    """PyTorch's batch norm on [B, fields, |G| * H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        fields = x.reshape(B, self.num_features, ORDER * H, W)  # from [B, fields * |G|, H, W]
        return super().forward(fields).reshape(B, C, H, W).contiguous(memory_format=torch.channels_last)


def seconds(norm: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> float:
    """Of one forward and backward pass."""
    x = x.detach().requires_grad_()
    start = time.perf_counter()
    norm(x).relu_().backward(dy)
    if x.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=9, help="default: %(default)s")
    args = parser.parse_args()
    rows = []
    for fields, size in MAPS:
        norms = {
            "by channel": FieldNorm(fields, ORDER),
            "reshaped": Reshaped(fields),
            "plain": nn.BatchNorm2d(fields * ORDER),
        }
        shape = (args.batch_size, fields * ORDER, size, size)
        x, dy = (
            torch.randn(shape, device=args.device)
            .to(getattr(torch, args.dtype))
            .contiguous(memory_format=torch.channels_last)
            for _ in range(2)
        )
        measured: dict[str, list[float]] = {name: [] for name in norms}
        for repeat in range(args.repeats + 2):  # the first two warm up
            for name, norm in norms.items():
                taken = seconds(norm.to(args.device), x, dy)
                if repeat > 1:
                    measured[name].append(taken)
        median = {name: statistics.median(values) for name, values in measured.items()}
        cells = [f"{1e3 * value:.2f} ({value / median['plain']:.2f})" for value in median.values()]
        rows.append([f"{list(shape)}", *cells])
    print(markdown(["map", *(f"{name}, ms" for name in norms)], rows))


if __name__ == "__main__":
    main()
