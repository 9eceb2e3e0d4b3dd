"""Exact algorithms for one layer, one a file: `expand` is the definition, the others are faster, `auto` chooses."""

STRATEGIES = ("auto", "expand", "block_diagonal", "native")
