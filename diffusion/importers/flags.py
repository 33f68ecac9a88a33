"""The flags of an import: facts that a checkpoint does not tell."""

from collections.abc import Iterable
from typing import Any

from ..utils.validation import known_names, typed


def image_size(name: str, value: Any) -> int | tuple[int, int]:
    """A flag of an image's size: 32, "32x48" (height x width), or [32, 48]; ValueError for anything else."""
    if isinstance(value, str):
        words = value.lower().split("x")
        value = [int(word) if word.isdecimal() else word for word in words]
        value = value[0] if len(value) == 1 else value
    return typed(name, value, int | tuple[int, int], least=1, most=65536)


class Flags:
    """The flags that a caller gave, and those that were assumed for want of them.

    given: flags by name. known: the names that the importer takes. origin: the checkpoint, for messages.
    assumed: {name: value} of the defaults that `get` returned. ValueError for an unknown name.
    """

    def __init__(self, given: dict[str, Any], known: Iterable[str], origin: str):
        known_names("flag", given, sorted(known))
        self.given, self.origin = given, origin
        self.assumed: dict[str, Any] = {}

    def get(self, name: str, default: Any, hint: Any) -> Any:
        """The flag's value in an annotated type, or the default, which is then noted as assumed."""
        if name in self.given:
            return typed(f"flag {name}", self.given[name], hint)
        self.assumed[name] = default
        return default

    def agree(self, name: str, found: Any, hint: Any) -> None:
        """ValueError if the caller gave another value than the checkpoint holds; a number stands for all."""
        if name not in self.given:
            return
        value = typed(f"flag {name}", self.given[name], hint)
        same = (
            set(found) == {value} if isinstance(found, tuple) and isinstance(value, int) else value == found
        )
        if not same:
            raise ValueError(f"{self.origin} has {name} {found}, not {value}")
