"""Commands that measure and draw: what needs matplotlib, tqdm and photographs."""
