"""Reads models: folders of this package, and checkpoints of other projects, each by a module of this folder.

A new format is a module with NAME, HUB_FILES, FLAGS, `recognises` and `load`, as `imported.Importer`
describes them, and its entry in REGISTRY.
"""

import itertools
import os
from pathlib import Path
from typing import Any

from ..storage import checkpoint
from ..utils.errors import one_line, printable
from ..utils.modules import importing
from ..utils.validation import choice
from . import (
    conditional_mnist,
    diffusers,
    edm,
    ermongroup_ddim,
    from_scratch,
    guided_diffusion,
    improved_diffusion,
    lucidrains,
    mindiffusion,
    pytorch_ddpm,
)
from .checkpoint_file import Checkpoint
from .diffusers_objects import read_object, scheduler_config
from .imported import Imported, Importer

__all__ = [
    "REGISTRY",
    "Checkpoint",
    "Imported",
    "Importer",
    "importer_of",
    "locate",
    "read",
    "read_object",
    "scheduler_config",
]

__getattr__ = importing(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")  # of checkpoints in a folder
# The first that recognises a checkpoint reads it.
REGISTRY: tuple[Importer, ...] = (
    diffusers,
    edm,
    from_scratch,
    conditional_mnist,
    mindiffusion,
    lucidrains,
    guided_diffusion,
    improved_diffusion,
    pytorch_ddpm,
    ermongroup_ddim,
)


def read(name: str | os.PathLike, *, verify: bool = True, flags: dict[str, Any] | None = None) -> Imported:
    """Reads a model by name: a bundled one, a folder or file of a known format, or "hf:owner/name".

    verify: refuse a folder of this package whose weights are not those of the SHA-256 in its config.json.
    flags: what a foreign checkpoint does not tell, by name; see `FLAGS` of its importer. The flag "format" is
    the NAME of an importer, for a checkpoint that is not recognised or that several could read. ValueError,
    in one line, if the model is missing or damaged, or is not a model.
    """
    path, flags = locate(name), dict(flags or {})
    if checkpoint.is_model(path):
        if flags:
            raise ValueError(f"{name} takes no flag {min(flags)}: it says itself how it was trained")
        return Imported(*checkpoint.read(path, verify))
    if path.suffix.lower() in PICTURES and path.is_file():
        raise ValueError(
            f"{name} is an image, not a model; diffusion sample --image changes it, and in Python "
            f"model.sample(image=Image.open({str(name)!r}))"
        )
    foreign, wanted = Checkpoint(path), flags.pop("format", None)
    if importer := importer_of(foreign, wanted):
        imported = _load(importer, foreign, flags)
        if wanted is not None and imported.assumed:
            imported = imported._replace(assumed={k: v for k, v in imported.assumed.items() if k != "format"})
        return imported
    if path.is_file():
        known = [importer.NAME for importer in REGISTRY]
        foreign.contents  # noqa: B018 (raises where the file is damaged)
        raise ValueError(
            f"{name} is no checkpoint of a known format, which are {', '.join(known)}; a model of this "
            "package is a folder with config.json and model.safetensors"
        )
    if not any(path.glob("*.json")) and _holds_pictures(path):
        raise ValueError(
            f"{name} is a folder of images, not of a model; "
            f"diffusion train --data {name} --out RUN trains a model on it"
        )
    return Imported(*checkpoint.read(path, verify))


def _load(importer: Importer, foreign: Checkpoint, flags: dict[str, Any]) -> Imported:
    """`importer.load`, whose every error is a ValueError of one line that names the file."""
    try:
        return importer.load(foreign, **flags)
    except ValueError as error:
        text = str(error)
        named = text if str(foreign) in text else f"{foreign}: {text}"
        raise ValueError(printable(named)) from error
    except (ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        # A tensor of a shape, or an entry of a type, that no checkpoint of the project has.
        raise ValueError(
            printable(f"{foreign} is no whole checkpoint of {importer.NAME}: {one_line(error)}")
        ) from error


def locate(name: str | os.PathLike) -> Path:
    """The file or folder of a model, by a name as `read` takes it; ValueError if there is none.

    A folder that is no model itself stands for the one checkpoint in it; ValueError if there are several.
    """
    patterns = (*checkpoint.FILES, *(pattern for importer in REGISTRY for pattern in importer.HUB_FILES))
    path = checkpoint.locate(name, patterns)
    if not path.is_dir() or any(path.glob("*.json")) or importer_of(Checkpoint(path)):
        return path
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES and file.is_file()]
    found = [file for file in files if _is_recognised(file)]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{name} holds several checkpoints; give the path of one of them: {names}")
    return found[0] if found else path


def _is_recognised(file: Path) -> bool:
    try:
        return importer_of(Checkpoint(file)) is not None
    except ValueError:  # it is damaged, or no checkpoint
        return False


def _holds_pictures(folder: Path) -> bool:
    """Whether a folder or the first of its folders holds a picture, by the names of the files."""
    folders = [folder, *itertools.islice((path for path in folder.iterdir() if path.is_dir()), 1)]
    return any(path.suffix.lower() in PICTURES for place in folders for path in place.iterdir())


def _plain(name: str) -> str:
    """A format's name without case and separators, so that guided_diffusion names it, too."""
    return name.lower().replace("_", "-")


def importer_of(foreign: Checkpoint, wanted: str | None = None) -> Importer | None:
    """The importer that reads a checkpoint, or None. wanted: its NAME, whatever the checkpoint looks like."""
    if wanted is not None:
        known = {importer.NAME: importer for importer in REGISTRY}
        if isinstance(wanted, str):
            wanted = next((name for name in known if _plain(name) == _plain(wanted)), wanted)
        return known[choice("format", wanted, known)]
    return next((importer for importer in REGISTRY if importer.recognises(foreign)), None)
