"""The error for input that a user can correct, and text on one line."""

__all__ = ["InputError", "one_line", "reason", "shortened"]


class InputError(ValueError):
    """Input of the user that cannot be used. The message quotes it and names a remedy; commands exit with status 2."""


def reason(error: BaseException, lines: int = 1) -> str:
    """The first lines of an error's message on one line; its type if the message is empty."""
    found = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(found[:lines]) or type(error).__name__


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
