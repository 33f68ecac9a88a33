"""The names of a model's classes."""

from collections.abc import Sequence
from typing import Any

from ..utils.errors import printable
from ..utils.validation import refuse, shown
from ..utils.words import counted

MAX_NAMED = 10  # classes named in a message


def check_names(names: Sequence[str], classes: int | None) -> tuple[str, ...]:
    """The names of so many classes; ValueError for another number of names, one twice, or no text."""
    words = counted(classes, "different name") if classes is not None else "None for a model without classes"
    if isinstance(names, str) or not isinstance(names, Sequence):
        refuse("class_names", words, names)
    found = tuple(names)
    if not all(isinstance(name, str) for name in found) or not len(set(found)) == len(found) == classes:
        refuse("class_names", words, names)
    return found


def numbered(labels: Any, names: tuple[str, ...] | None, classes: int) -> Any:
    """Labels with the number of its class for each name; others are returned as they are.

    ValueError for a name that is not among `names`.
    """
    if isinstance(labels, str):
        return [_number(labels, names, classes)]
    if not isinstance(labels, list | tuple) or not any(isinstance(label, str) for label in labels):
        return labels
    return [_number(label, names, classes) if isinstance(label, str) else label for label in labels]


def _number(name: str, names: tuple[str, ...] | None, classes: int) -> int:
    if names is None:
        raise ValueError(
            f"unknown label {shown(name)}: this model's classes have no names; give numbers in "
            f"0..{classes - 1}"
        )
    if name not in names:
        known = printable(", ".join([*names[:MAX_NAMED], *(["..."] if len(names) > MAX_NAMED else [])]))
        raise ValueError(f"unknown class {shown(name)}; the classes are: {known}")
    return names.index(name)
