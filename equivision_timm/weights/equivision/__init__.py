"""The original, equivision (Klee): its checkpoint files become state dicts of ours; nothing else knows their format."""
