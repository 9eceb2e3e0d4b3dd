"""Ctrl-C while one of the two commands still imports PyTorch: one line and exit status 130, as later.

The commands are `python -m equivision_timm` and `equivision-timm`.

A KeyboardInterrupt there ends in a traceback, or aborts the process inside PyTorch's C++ code. Nothing has been written
yet, so the process can end at once.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

__all__ = ["CONSOLE_SCRIPT", "end_on_ctrl_c", "raise_on_ctrl_c"]

CONSOLE_SCRIPT = "equivision-timm"  # as pyproject.toml names it


def end_on_ctrl_c() -> None:
    """From now on Ctrl-C ends the process, where it is one of these two and Ctrl-C would raise."""
    first = sys.argv[0] if sys.argv else ""
    is_module = first == "-m" and {"equivision_timm", "-mequivision_timm"} & set(sys.orig_argv)
    is_command = is_module or Path(first).stem == CONSOLE_SCRIPT
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_on_ctrl_c() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"equivision_timm: interrupted; nothing was done\n")
    os._exit(130)
