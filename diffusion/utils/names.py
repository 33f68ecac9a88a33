"""Names of what comes with the package, beside paths."""

import os
import warnings
from collections.abc import Container


def own_name(name: str | os.PathLike | None, known: Container[str], kind: str) -> str | None:
    """`name` if it is one of the `known` names of what comes with the package, such as a model; else None.

    A text that is such a name always means it: a file or folder of this name is meant by "./name" or by a
    `Path`. A UserWarning tells so where there is one. kind: of what is named, such as "model".
    """
    if not isinstance(name, str) or name not in known:
        return None
    if os.path.lexists(name):
        what = "folder" if os.path.isdir(name) else "file"
        here = os.path.join(os.curdir, name)
        warnings.warn(f"{name} is the {kind} of the package; the {what} of this name is {here}", stacklevel=3)
    return name
