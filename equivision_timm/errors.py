"""The error for input that a user can correct, a check of numbers, and text on one line."""

__all__ = ["InputError", "check_number", "one_line", "shortened"]


class InputError(ValueError):
    """Input of the user that cannot be used. The message quotes it and names a remedy; commands exit with status 2."""


def check_number(option: str, number: int | None, least: int, most: int) -> None:
    """Raise InputError unless `least <= number <= most`; None stands for the default of an option."""
    if number is not None and not least <= number <= most:
        raise InputError(f"{option} {number} is not possible: give a number from {least} to {most}")


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
