"""The file or folder of a foreign checkpoint, read safely and only once, whichever importer asks."""

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..storage.reading import is_folder, open_regular, read_pickle, read_safetensors

T = TypeVar("T")
WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training loops keep a state dict
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
_SAFETENSORS = (".safetensors",)
_TORCH = (b"PK", b"\x80")  # a zip of torch.save, or its older pickle


class Checkpoint:
    """A foreign checkpoint, by its path. Nothing here executes what a file holds.

    path: the file or folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def is_folder(self) -> bool:
        """Whether the path is a folder."""
        return is_folder(self.path)

    @cached_property
    def contents(self) -> Any:
        """The contents of the file: nested dictionaries and lists of tensors, numbers and text.

        The first bytes tell the format, safetensors or torch.save. ValueError, in one line, for a folder,
        another format, a truncated or damaged file, or a pickle that needs code to be read.
        """
        with open_regular(self.path) as file:
            start = file.read(9)
        # The length of the JSON header in 8 bytes comes first, and its first byte may be that of a pickle.
        if start[6:] == b"\0\0{":
            return read_safetensors(self.path)
        if start.startswith(_TORCH):
            return read_pickle(self.path)
        if self.path.suffix in _SAFETENSORS:
            return read_safetensors(self.path)
        raise ValueError(f"{self.path} is no checkpoint: it is neither a file of torch.save nor safetensors")

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """`state_dict` of the contents; empty where they hold none, as in a folder."""
        return {} if self.is_folder else state_dict(self.contents)


def state_dict(contents: Any) -> dict[str, torch.Tensor]:
    """The named tensors among the contents of a checkpoint; empty if it holds none.

    A wrapper, such as {"state_dict": ...}, is taken off, and so is a prefix of all names, such as "module.".
    """
    for key in (None, *WRAPPERS):
        inner = contents if key is None else contents.get(key) if isinstance(contents, Mapping) else None
        if not isinstance(inner, Mapping) or not inner:
            continue
        if all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in inner.items()):
            return without_prefixes(inner)
    return {}


def without_prefixes(named: Mapping[str, T]) -> dict[str, T]:
    """Named tensors, or other values of the same names, without the `PREFIXES` that all their names have."""
    found = dict(named)
    while found and (prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in found)), None)):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found
