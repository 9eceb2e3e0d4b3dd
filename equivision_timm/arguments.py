"""Former name of `errors.py`."""

from equivision_timm.errors import InputError, check_number, one_line, shortened

__all__ = ["InputError", "check_number", "one_line", "shortened"]
