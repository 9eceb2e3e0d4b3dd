"""Exact algorithms for one layer, one a file: `expand` is the definition, the others are faster, `auto` chooses.

Each has `conv2d(x, weights, bias, group, kernel_size, stride, dilation)`, differentiable, and for inference the same in
two steps, of which the first depends on the weights alone: `pack(weights, bias, group, kernel_size)` and
`infer(x, packed, group, kernel_size, stride, dilation, shortcut, relu)`. The weights are the dense filter
(`expand.expand_filter`) or the block weights (`irreps.block_weights`).
"""

STRATEGIES = ("auto", "expand", "block_diagonal", "native")
