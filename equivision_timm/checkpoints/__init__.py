"""Published checkpoints of the original network, as state dicts of ours."""
