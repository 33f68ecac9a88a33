"""Packages that import their modules, and names of these, when they are first used."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

NONE: Mapping[str, str] = MappingProxyType({})


def importing(package: str, names: Mapping[str, str] = NONE) -> Callable[[str], Any]:
    """The `__getattr__` of a package, for modules and names that it does not import itself.

    names: the module, within the package, that defines each name. AttributeError for any other name that is
    no module of the package.
    """

    def find(name: str) -> Any:
        module_name = name.isidentifier() and not name.startswith("_")
        if name not in names and not (module_name and importlib.util.find_spec(f"{package}.{name}")):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f".{names.get(name, name)}", package)
        value = getattr(module, name) if name in names else module
        setattr(sys.modules[package], name, value)
        return value

    return find
