"""The files of a diffusers folder: which parts it has, where they are, and their weights.

A pipeline has `model_index.json`, `unet/` and `scheduler/`. Its training script writes `checkpoint-N/` with
`unet/` and, for averaged weights, `unet_ema/`. Either part can also be a folder of its own.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..storage.reading import is_folder, read_json, sha256
from ..utils.validation import choice, shown, typed
from .checkpoint_file import Checkpoint, without_prefixes

T = TypeVar("T")
STEMS = ("diffusion_pytorch_model", "pytorch_model", "model")  # names of weights, the preferred one first
UNETS = ("unet_ema", "unet")  # folders of UNets, the preferred one first
EXPORTED = "_fused_diffusion"  # key of model_index.json in a pipeline that this package exported
_FORMATS = ("safetensors", "bin")
_SHARD = re.compile(r"-\d+-of-\d+$")


class Layout(NamedTuple):
    """Where the parts of a model are.

    folder: of the whole. unet: folder of the UNet. weights: its file, if the caller named it. scheduler: the
    scheduler_config.json, or None. chosen: the UNet's folder by name, if there was another to choose from.
    pipeline: the pipeline's class, or None without an index.
    """

    folder: Path
    unet: Path
    weights: Path | None = None
    scheduler: Path | None = None
    chosen: str | None = None
    pipeline: str | None = None


def is_unet(folder: Path) -> bool:
    """Whether a folder has the config.json of a model of diffusers."""
    try:
        config = read_json(folder / "config.json")
    except ValueError:
        return False
    return "_class_name" in config or "down_block_types" in config


def find(checkpoint: Checkpoint, wanted: str | None = None) -> Layout:
    """The layout of a folder, or of a file of weights beside its config.json.

    wanted: "unet" or "unet_ema", for a folder that has both; the average is preferred, except in a pipeline,
    whose index names `unet`. ValueError for a pipeline with a component that is neither a UNet nor a
    scheduler, also where the UNet's folder in it is given.
    """
    folder = checkpoint.path if checkpoint.is_folder else checkpoint.path.parent
    index = folder / "model_index.json"
    components = _components_of(folder)
    check_components(index if index.is_file() else folder, components)
    if is_unet(folder):
        index_above = folder.absolute().parent / "model_index.json"
        if index_above.is_file():
            check_components(index_above, read_json(index_above))
    found = Layout(folder, folder, None, _scheduler_in(folder), None, components.get("_class_name"))
    if not checkpoint.is_folder:
        return found._replace(weights=checkpoint.path)
    parts = {name: folder / name for name in UNETS if is_folder(folder / name)}
    if wanted is not None:
        choice("part of weights", wanted, sorted(UNETS))
        if wanted not in parts:
            raise ValueError(f"{folder} has no {wanted}/")
        return found._replace(unet=parts[wanted])
    if not parts:
        return found
    name = "unet" if index.is_file() and "unet" in parts else next(iter(parts))
    return found._replace(unet=parts[name], chosen=name if len(parts) > 1 else None)


def exported(layout: Layout) -> dict[str, Any]:
    """The entry that this package adds to the index of a pipeline that it writes; {} for all others.

    null_label: the label of no class, or None. schedule, conventions: of the model, as in config.json; left
    out if the scheduler's file has changed since, of which they also hold the SHA-256.
    """
    index = layout.folder / "model_index.json"
    if not index.is_file():
        return {}
    found = located(index, typed, EXPORTED, read_json(index).get(EXPORTED, {}), dict)
    if layout.scheduler is None or found.get("scheduler_sha256") != sha256(layout.scheduler):
        return {name: value for name, value in found.items() if name == "null_label"}
    return found


def _scheduler_in(folder: Path) -> Path | None:
    paths = (folder / part / "scheduler_config.json" for part in ("scheduler", "."))
    return next((path for path in paths if path.exists()), None)


def _components_of(folder: Path) -> dict[str, Any]:
    """The components of a pipeline, by its index, or by its folders with a config.json where it has none."""
    if (folder / "model_index.json").is_file():
        return read_json(folder / "model_index.json")
    if not any(is_unet(folder / part) for part in UNETS):
        return {}
    return {part.name: f"{part.name}/" for part in sorted(folder.iterdir()) if is_unet(part)}


def check_components(where: Path, components: dict[str, Any]) -> None:
    """ValueError, naming the component, for a pipeline of more than a UNet and a scheduler.

    where: the pipeline's index, folder or class, for the message.
    """
    for name, value in components.items():
        absent = value is None or value is False or (isinstance(value, list) and not any(value))
        if name.startswith("_") or name in (*UNETS, "scheduler") or absent:
            continue
        kind = ".".join(map(str, value)) if isinstance(value, list) else shown(value)
        raise ValueError(
            f"{where}: a pipeline with the component {name} ({kind}) cannot be imported, only one of a unet "
            "and a scheduler: without it, the UNet's samples are no images"
        )


def read_weights(layout: Layout, variant: str | None) -> tuple[Path, dict[str, torch.Tensor], str | None]:
    """The file or index of the UNet's weights, its tensors, and their variant, such as "fp16" or None.

    variant: the one to read; by default the weights without a variant, or else the only variant. ValueError,
    in one line: a file that is missing or damaged, or holds no weights.
    """
    if layout.weights is not None:
        return layout.weights, _tensors(layout.weights), None
    found = _weight_files(layout.unet)
    if not found:
        names = ", ".join(f"{stem}.{kind}" for stem in STEMS[:2] for kind in _FORMATS)
        raise ValueError(f"{layout.unet} has no weights, such as {names}")
    if variant is None and None not in found and len(found) > 1:
        names = ", ".join(sorted(filter(None, found)))
        raise ValueError(f"{layout.unet} has weights in several variants, {names}; give the flag variant")
    if variant is not None:
        choice("variant", variant, sorted(filter(None, found)))
    elif None not in found:
        (variant,) = found
    path = found[variant]
    return path, _sharded(path) if path.suffix == ".json" else _tensors(path), variant


def _weight_files(folder: Path) -> dict[str | None, Path]:
    """The preferred file or index of weights of each variant in a folder; None is that of no variant."""
    names = sorted(path.name for path in folder.iterdir()) if is_folder(folder) else []
    found: dict[str | None, Path] = {}
    for stem in STEMS:
        for kind in _FORMATS:
            # Such as model.fp16.safetensors, and model.safetensors.index.fp16.json.
            patterns = (rf"{stem}(?:\.([^.]+))?\.{kind}", rf"{stem}\.{kind}\.index(?:\.([^.]+))?\.json")
            for pattern in patterns:
                for match in filter(None, (re.fullmatch(pattern, name) for name in names)):
                    variant = match.group(1)
                    if variant is None or not _SHARD.search(variant):
                        found.setdefault(variant, folder / match.string)
    return found


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    tensors = Checkpoint(path).tensors
    if not tensors:
        raise ValueError(f"{path} holds no state dict, which is a dictionary of tensors")
    return tensors


def _sharded(index: Path) -> dict[str, torch.Tensor]:
    """The tensors of the files that an index names, each taken from the file that the index gives for it."""
    given = read_json(index).get("weight_map")
    places = without_prefixes(given) if isinstance(given, dict) else {}
    if not places or not all(isinstance(file, str) and Path(file).name == file for file in places.values()):
        raise ValueError(f"{index}: weight_map must give the name of a file beside it for each tensor")
    shards = {file: _tensors(index.parent / file) for file in sorted(set(places.values()))}
    listed = {(file, name) for name, file in places.items()}
    held = {(file, name) for file, tensors in shards.items() for name in tensors}
    if listed != held:
        file, name = min(listed ^ held)
        difference = "lacks" if (file, name) in listed else "also has"
        raise ValueError(f"{index} does not agree with {file}, which {difference} {name}")
    return {name: shards[file][name] for name, file in places.items()}


def located(path: Path, function: Callable[..., T], *args: Any, **options: Any) -> T:
    """function(*args, **options), whose errors get the name of the file."""
    try:
        return function(*args, **options)
    except (TypeError, ValueError) as error:  # TypeError: a list where JSON should hold a string
        raise ValueError(f"{path}: {error}") from error
