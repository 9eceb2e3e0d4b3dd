"""Filter maps with a few 1x1 or 3x3 functions at once, by sums and differences of neighbouring pixels.

A function phi(y, x) = sum_ab terms[a, b] e_a(y) e_b(x) with e = (0, 1, 0), (1, 0, 1), (-1, 0, 1) needs, for all
functions together, two sums along the rows, six along the columns, and a combination of what its terms name.

Maps are stored flat. With s the stride and d the dilation of the convolution, pixel (s y + f, s x + g) lies in plane
(f, g) at y * width + x; behind each row and each image come `pad` zeros, which serve the neighbours on both sides.
The neighbour at distance t d is then in one plane, a fixed step away:

    s y + t d = s (y + shift) + phase,   shift = floor(t d / s),   phase = t d mod s

so that every step adds two contiguous stretches of memory. The steps are prepared once for given buffers, and run for
what the buffers hold at the time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

__all__ = ["Grid"]

Steps = list[Callable[[], torch.Tensor]]
Terms = list[tuple[int, int, float]]  # (a, b, value) of one function


@dataclass(frozen=True)
class Grid:
    """Where the pixels of maps [..., in_height, in_width] lie, for a k x k convolution with padding d * (k // 2)."""

    kernel_size: int
    stride: int
    dilation: int
    in_height: int
    in_width: int

    @cached_property
    def taps(self) -> list[tuple[int, int]]:
        """(phase, shift) of the neighbours t = 0, 1, -1; of t = 0 alone for 1x1."""
        neighbours = (0, 1, -1)[: self.kernel_size]
        return [(t * self.dilation % self.stride, t * self.dilation // self.stride) for t in neighbours]

    @cached_property
    def phases(self) -> list[int]:
        """The rows (and the columns) s y + f that some neighbour lies in."""
        return sorted({phase for phase, _ in self.taps})

    @cached_property
    def pad(self) -> int:
        """Zero columns behind each row and zero rows behind each image."""
        return max(abs(shift) for _, shift in self.taps)

    @cached_property
    def out_height(self) -> int:
        return (self.in_height - 1) // self.stride + 1

    @cached_property
    def out_width(self) -> int:
        return (self.in_width - 1) // self.stride + 1

    @cached_property
    def height(self) -> int:
        """Rows of an image in a plane, with the zeros."""
        return self.out_height + self.pad

    @cached_property
    def width(self) -> int:
        """Columns of an image in a plane, with the zeros."""
        return self.out_width + self.pad

    @cached_property
    def margin(self) -> int:
        """Zeros that a flat buffer needs before and behind its pixels."""
        return self.pad * (self.width + 1)

    def rows(self, x: torch.Tensor, own: slice) -> torch.Tensor:
        """The rows of x [..., in_height, in_width] that the output rows `own` need, a view; of 1x1, or all."""
        last = self.stride * (own.stop - 1) + 1 if own.stop < self.out_height else self.in_height
        return x[..., self.stride * own.start : last, :]

    def of_rows(self, n: int) -> "Grid":
        """The grid of `rows` for n output rows."""
        return self if n == self.out_height else replace(self, in_height=self.stride * (n - 1) + 1)

    def plane(self, x: torch.Tensor, f: int, g: int) -> torch.Tensor:
        """The pixels that belong to plane (f, g), a view: [..., in_height, in_width] -> [..., rows, columns]."""
        return x[..., f :: self.stride, g :: self.stride]

    def steer(self, planes: dict[tuple[int, int], torch.Tensor], terms: list[Terms], out: list[torch.Tensor]) -> Steps:
        """The steps of out[j] = phi_j * x.

        Args:
            planes: (f, g) -> flat buffer [margin + N + margin], zero in the margins.
            terms: of each function.
            out: [N] of each function, written.
        """
        steps: Steps = []
        step, total, like = self.width, len(out[0]), out[0]
        reach = self.pad * step  # the rows above and below
        block = _block(total, like.device)
        scratch = like.new_empty(3 * len(self.phases) + 9, block + 2 * reach).unbind()
        used = sorted({(a, b) for function in terms for a, b, _ in function})

        for start in range(0, total, block):
            n = min(block, total - start)
            free = iter(scratch)
            rows = {}  # (f, b) -> e_b(x) * x in the rows of phase f, [reach + n + reach]
            for f in self.phases:
                for b in sorted({b for _, b in used}):
                    parts = []
                    for t, sign in _SIGNS[b]:
                        g, shift = self.taps[t]
                        first = self.margin - reach + start + shift
                        parts.append((planes[f, g][first : first + n + 2 * reach], sign))
                    rows[f, b] = _sum(parts, free, steps)
            filtered = {}  # (a, b) -> e_a(y) e_b(x) * x, [n]
            for a, b in used:
                parts = []
                for t, sign in _SIGNS[a]:
                    f, shift = self.taps[t]
                    first = reach + shift * step
                    parts.append((rows[f, b][first : first + n], sign))
                filtered[a, b] = _sum(parts, free, steps)
            for function, result in zip(terms, out, strict=True):
                stretch = result[start : start + n]
                combined = _sum([(filtered[a, b], value) for a, b, value in function], iter([stretch]), steps)
                if combined is not stretch:  # a single term
                    steps.append(partial(stretch.copy_, combined))
        return steps

    def steer_transposed(
        self, grad: torch.Tensor, terms: list[Terms], planes: dict[tuple[int, int], torch.Tensor]
    ) -> Steps:
        """The steps of the transpose of `steer`: planes[f, g] += the gradient, given that of its output.

        Args:
            grad: [margin + J * N + margin], zero in the margins and behind rows and images.
            terms: of each function.
            planes: (f, g) -> [N], added to; what they hold behind rows and images means nothing.
        """
        steps: Steps = []
        total, step = next(iter(planes.values())).shape[0], self.width
        reach = self.pad * step
        wide = reach + self.pad  # what the sums along columns and rows reach, together
        block = _block(total, grad.device)
        scratch = grad.new_empty(24 + 12 * len(self.phases), block + 2 * wide).unbind()
        used = sorted({(a, b) for function in terms for a, b, _ in function})

        for start in range(0, total, block):
            n = min(block, total - start)
            free = iter(scratch)
            filtered = {}  # gradient of e_a(y) e_b(x) * x, [wide + n + wide]
            for a, b in used:
                parts = []
                for j, function in enumerate(terms):
                    first = self.margin + j * total + start - wide
                    stretch = grad[first : first + n + 2 * wide]
                    parts += [(stretch, value) for i, k, value in function if (i, k) == (a, b)]
                filtered[a, b] = _sum(parts, free, steps)
            rows = {}  # gradient of e_b(x) * x in the rows of phase f, [pad + n + pad]
            for b in sorted({b for _, b in used}):
                column = {a: filtered[a, b] for a in range(3) if (a, b) in used}
                for f, parts in self._scatter(column, step, reach, n + 2 * self.pad, free, steps).items():
                    rows[f, b] = _sum(parts, free, steps)
            for f in self.phases:
                row = {b: rows[f, b] for b in range(3) if (f, b) in rows}
                for g, parts in self._scatter(row, 1, self.pad, n, free, steps).items():
                    for part, factor in parts:
                        steps.append(partial(planes[f, g][start : start + n].add_, part, alpha=factor))
        return steps

    def _scatter(
        self,
        differences: dict[int, torch.Tensor],
        step: int,
        reach: int,
        n: int,
        free: Iterator[torch.Tensor],
        steps: Steps,
    ) -> dict[int, list[tuple[torch.Tensor, float]]]:
        """The transpose of e_0, e_1, e_2 along one axis: phase -> what it receives, as parts of a sum."""
        received: dict[int, list[tuple[torch.Tensor, float]]] = {}
        for t, (phase, shift) in enumerate(self.taps):
            parts = [(differences[a], dict(_SIGNS[a])[t]) for a in differences if t in dict(_SIGNS[a])]
            if parts:
                first = reach - shift * step
                received.setdefault(phase, []).append((_sum(parts, free, steps)[first : first + n], 1.0))
        return received


# e_0, e_1 and e_2 as (index of the neighbour in `taps`, sign)
_SIGNS = (((0, 1.0),), ((1, 1.0), (2, 1.0)), ((1, 1.0), (2, -1.0)))


def _block(total: int, device: torch.device) -> int:
    """How many pixels to work on at once: on the CPU about twenty stretches of them should stay in the cache."""
    return min(total, 1 << 18) if device.type == "cpu" else total


def _sum(parts: list[tuple[torch.Tensor, float]], free: Iterator[torch.Tensor], steps: Steps) -> torch.Tensor:
    """Where sum_i factor_i part_i will be: in the next free buffer, or the part itself if it is alone and plain."""
    (first, factor), *others = sorted(parts, key=lambda part: part[1] != 1)  # a factor of 1 costs nothing
    if factor == 1 and not others:
        return first
    out = next(free)[: len(first)]
    if factor != 1:
        steps.append(partial(torch.mul, first, factor, out=out))
    else:
        part, value = others.pop(0)
        steps.append(partial(torch.add, first, part, alpha=value, out=out))
    steps += [partial(out.add_, part, alpha=value) for part, value in others]
    return out
