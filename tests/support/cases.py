"""The groups and kernels for which bases are frozen: the table that drives the tests of groups, bases and layers."""

GROUPS = ("c1", "d1", "c4", "d4", "c8", "d8")
KERNELS = ((1, "regular"), (3, "regular"), (1, "trivial"), (3, "trivial"), (7, "trivial"))
FROZEN = [(group, size, input_type) for group in GROUPS for size, input_type in KERNELS]
