"""Accuracy against rotation angle: `measure.py` measures, `results.py` keeps, `report.py` shows, `run.py` does all."""
