"""The text of an exception, for messages that must fit into one line."""

_LONGEST = 2000  # characters of a message


def one_line(error: BaseException) -> str:
    """An exception's text with its line breaks replaced by spaces.

    An OSError gives the system's own words, such as "Permission denied", without number and path. An
    exception without text gives the name of its type.
    """
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its type where it has none.

    For libraries that append advice or a stack trace to the reason, such as CUDA errors of PyTorch.
    """
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def printable(text: str) -> str:
    """Text from a file or a user as one line: control characters are escaped, a very long text is cut."""
    line = " ".join(text.split())
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
