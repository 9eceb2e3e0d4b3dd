"""What a user gives to a sub-command: the error that says how to mend it, numbers within limits, text as one line."""

__all__ = ["InputError", "check_number", "one_line", "shortened"]


class InputError(ValueError):
    """What the user gave cannot be used; the message says what and how to mend it."""


def check_number(option: str, number: int | None, least: int, most: int) -> None:
    """Raises InputError where the number of an option is not within `least` ... `most`; None stands for the default."""
    if number is not None and not least <= number <= most:
        raise InputError(f"{option} {number} is not possible: give a number from {least} to {most}")


def one_line(text: str) -> str:
    """The text with everything that is no printable character (line breaks, escape codes, stray bytes) written out.

    Example:
        >>> one_line("two\\nlines")
        'two\\\\nlines'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shortened(text: str, most: int) -> str:
    """`one_line` of the text, its end cut off where it is longer than `most` characters."""
    text = one_line(text)
    return text if len(text) <= most else text[: most - 1] + "…"
