"""The error for input that a user can correct, the check of an option, and text for error messages."""

import argparse
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path

__all__ = ["InputError", "check_choice", "install_command", "one_line", "reason", "shortened"]


class InputError(ValueError, argparse.ArgumentTypeError):
    """Input of the user that cannot be used. The message quotes it and names a remedy; commands exit with status 2."""


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """ValueError that names all choices unless `value`, of the option `name`, is one of them.

    Example:
        >>> check_choice("even", "circle", ("", "box"))
        Traceback (most recent call last):
        ValueError: unknown even 'circle': use '' or 'box'
    """
    known = list(choices)
    if value not in known:
        *others, last = map(repr, known)
        raise ValueError(f"unknown {name} {value!r}: use {', '.join(others)}{' or ' if others else ''}{last}")


def reason(error: BaseException, most: int = 1000) -> str:
    """The message of an error on one line of at most `most` characters, with its type unless that adds nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    explained = isinstance(error, (ValueError, OSError, ModuleNotFoundError)) or text == type(error).__name__
    return shortened(text if explained else f"{type(error).__name__}: {text}", most)


def one_line(text: str) -> str:
    """The text with all unprintable characters (line breaks, escape codes, undecodable bytes) escaped.

    Example:
        >>> one_line("two\\nlines")
        'two\\\\nlines'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shortened(text: str, most: int) -> str:
    """`one_line` of the text, cut to at most `most` characters."""
    text = one_line(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def install_command(extra: str = "", options: str = "") -> str:
    """The command that installs this package with an extra from its source: a clone, an address, or a package index."""
    clone, extra = Path(__file__).parents[1], f"[{extra}]" if extra else ""
    if (clone / "pyproject.toml").is_file():
        return f"pip install{options} -e '{clone}{extra}'"
    try:  # PEP 610: pip records the address unless the package came from an index
        record = importlib.metadata.distribution("equivision-timm").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        record = None
    origin = json.loads(record or "{}")
    vcs = origin.get("vcs_info")
    address = f"{vcs['vcs']}+{origin['url']}@{vcs['commit_id']}" if vcs else origin.get("url")
    return f"pip install{options} 'equivision-timm{extra}{f' @ {address}' if address else ''}'"
