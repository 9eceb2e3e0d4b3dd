"""Foreign checkpoints (read, translated, loaded strictly, written) and model folders (verified, published)."""
