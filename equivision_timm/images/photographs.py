"""Former place of the photographs."""

from equivision_timm.data import draw_crops, find_photographs, load_crops, load_photographs

__all__ = ["draw_crops", "find_photographs", "load_crops", "load_photographs"]
