"""Reads models: folders of this package, and checkpoints of other projects, each by a module of this folder.

A new format is a module with NAME, HUB_FILES, `recognises` and `load`, as `imported.Importer` describes them,
and its entry in REGISTRY.
"""

import os
from typing import Any

from ..storage import checkpoint
from . import diffusers, guided_diffusion
from .imported import Imported, Importer

__all__ = ["REGISTRY", "Imported", "Importer", "read"]

# The first that recognises a checkpoint reads it.
REGISTRY: tuple[Importer, ...] = (diffusers, guided_diffusion)


def read(name: str | os.PathLike, *, verify: bool = True, flags: dict[str, Any] | None = None) -> Imported:
    """Reads a model by name: a bundled one, a folder or file of a known format, or "hf:owner/name".

    verify: refuse a folder of this package whose weights are not those of the SHA-256 in its config.json.
    flags: what a foreign checkpoint does not tell, by name; see `load` of its importer. ValueError, in one
    line, if the model is missing or damaged, or is not a model.
    """
    patterns = (*checkpoint.FILES, *(pattern for importer in REGISTRY for pattern in importer.HUB_FILES))
    path, flags = checkpoint.locate(str(name), patterns), flags or {}
    if not checkpoint.is_model(path):
        for importer in REGISTRY:
            if importer.recognises(path):
                return importer.load(path, **flags)
    if path.is_file():
        known = ", ".join(importer.NAME for importer in REGISTRY)
        raise ValueError(
            f"{name} is a file; a model is a folder with config.json and model.safetensors, or a checkpoint "
            f"of {known}"
        )
    if flags:
        raise ValueError(f"{name} takes no flag {min(flags)}: it says itself how it was trained")
    return Imported(*checkpoint.read(path, verify))
