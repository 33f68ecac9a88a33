"""A Griffe extension: the package's docstrings as Markdown.

A docstring lists its arguments as `name: text` or `name, name: text`, with their further lines indented. The
site shows such a paragraph as a list.
"""

import re

import griffe

_ARGUMENTS = re.compile(r"(\w+(?:, \w+)*): ")


def as_markdown(text: str) -> str:
    """The text with paragraphs of arguments as lists, and with asterisks that are not taken for emphasis."""
    return "\n\n".join(_paragraph(paragraph) for paragraph in text.split("\n\n"))


def _paragraph(text: str) -> str:
    if text.startswith("    "):  # a formula
        return text
    text, lines = _escaped(text), []
    for line in text.splitlines():
        arguments = _ARGUMENTS.match(line)
        if arguments:
            names = ", ".join(f"`{name}`" for name in arguments[1].split(", "))
            lines.append(f"- {names}: {line[arguments.end() :]}")
        elif lines and line.startswith("    "):
            lines.append(line)
        else:
            return text
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Asterisks outside of code, which mean multiplication here."""
    parts = text.split("`")
    return "`".join(part if i % 2 else part.replace("*", r"\*") for i, part in enumerate(parts))


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Called by Griffe for each module, class and function."""
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
