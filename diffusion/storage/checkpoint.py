"""Model folders: `config.json` beside `model.safetensors`. Nothing here ever unpickles code."""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..models.network import Network, NetworkConfig
from ..models.registry import build_on_meta, config_from_dict, config_to_dict
from ..models.structure import config_of, configured
from ..process.noise_levels import NoiseLevels, process_from_config
from ..process.schedule import NoiseSchedule
from ..utils.errors import first_line
from ..utils.names import own_name
from ..utils.validation import plain_number
from .atomic import replacing
from .reading import (
    WEIGHT_DTYPES,
    WrongDigest,
    check_architecture,
    check_finite,
    check_weights,
    is_folder,
    load_weights,
    read_json,
    read_safetensors,
    sha256,
    stored_digest,
)

FORMAT = "fused-diffusion"
FORMAT_VERSION = 1
REQUIRED = ("prediction_type", "clip", "variance")
OPTIONAL = (
    "sampler_options",
    "sampler",
    "guidance_scale",
    "guidance_rescale",
    "guidance_parallel",
    "value_range",
    "normalize",
    "clip_output",
    "class_names",
    "metadata",
)
DIGEST = "weights_sha256"
FILES = ("config.json", "model.safetensors")
RETRY_SECONDS = 0.2  # time for another process that is replacing both files
BUNDLED = Path(__file__).parents[1] / "weights"


def bundled_models() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/model.safetensors") if is_model(path.parent))


def is_model(folder: Path) -> bool:
    """Whether the folder's config.json says that this package wrote it as a model."""
    try:
        return read_json(folder / "config.json").get("format") == FORMAT
    except ValueError:
        return False


def write(folder: str | os.PathLike, unet: Network, config: dict, dtype: torch.dtype | None = None) -> None:
    """Writes a model folder; a former model in it is replaced only once the new files are complete.

    config: the entries of config.json beside the UNet's own configuration. dtype: of the stored weights, one
    of reading.WEIGHT_DTYPES. config.json gets the SHA-256 of the weights' file, so that a pair of files of
    which only one was replaced is refused. ValueError if the folder cannot be written, or if the weights
    could not be loaded again, because they are of another architecture than the configuration, of another
    dtype, or not finite in `dtype`.
    """
    if dtype not in (None, *WEIGHT_DTYPES):
        known = ", ".join(map(str, WEIGHT_DTYPES))
        raise ValueError(f"weights cannot be stored in dtype {dtype}; choose from: {known}")
    if not os.fspath(folder):
        raise ValueError("cannot write a model: the name of its folder is empty")
    folder = Path(folder)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"cannot write a model to {folder}: it is a file, and a model is a folder")
    architecture = configured(config_of(unet))
    unet = getattr(unet, "_orig_mod", unet)  # the module that torch.compile wraps
    try:
        text = json.dumps(config, indent=2, default=plain_number)
        json.dumps(config.get("metadata"), allow_nan=False, default=plain_number)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot write {folder}: the metadata are no JSON values: {error}") from error
    state = unet.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            kind = "on the meta device" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
            raise ValueError(f"cannot write {folder}: {name} of the UNet is {kind}, not a weight")
    weights = {name: t.detach().to("cpu", _stored_dtype(t, dtype)).contiguous() for name, t in state.items()}
    check_architecture(architecture, weights, f"cannot write {folder}: the UNet")
    counters = {name for name, t in architecture.state_dict().items() if not t.is_floating_point()}
    first = {tensor.untyped_storage().data_ptr(): name for name, tensor in reversed(weights.items())}
    for name, tensor in weights.items():
        if first[tensor.untyped_storage().data_ptr()] != name:
            weights[name] = tensor.clone()  # tied weights are stored for each of their names
    check_weights({name: t for name, t in weights.items() if name not in counters}, f"cannot write {folder}")
    check_finite(weights, f"cannot write {folder}")
    about: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
    with replacing(folder / "model.safetensors", folder / "config.json") as (weights_path, config_path):
        save_file(weights, weights_path)
        config = (
            about | {DIGEST: sha256(weights_path), "unet": config_to_dict(unet.config)} | json.loads(text)
        )
        config_path.write_text(json.dumps(config, indent=2) + "\n")


def _stored_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to store a tensor in: `dtype` for weights; counters, such as BatchNorm's, stay integers."""
    return tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype


def read(folder: Path, verify: bool = True) -> tuple[Network, NoiseSchedule | NoiseLevels, dict]:
    """Reads a model folder: its network in float32 on the CPU, its noise schedule, and its conventions.

    The conventions are the arguments of `DDPM` that config.json holds. verify: refuse weights that are not
    those of the SHA-256 in config.json, where it holds one. ValueError, in one line, for anything that is
    missing, damaged, or not a model.
    """
    try:
        return _read(folder, verify)
    except WrongDigest:  # another process may be saving, and may have replaced one of the two files
        time.sleep(RETRY_SECONDS)
        return _read(folder, verify)


def _read(folder: Path, verify: bool) -> tuple[Network, NoiseSchedule | NoiseLevels, dict]:
    path = folder / "config.json"
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise ValueError(f"{path} is not that of a model, of this package or of another known format")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is of format version {config.get('format_version')}; this release reads {FORMAT_VERSION}"
        )
    missing = [key for key in ("unet", "schedule", *REQUIRED) if key not in config]
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}")
    digest = stored_digest(config, DIGEST, path) if verify else None
    weights = read_safetensors(folder / "model.safetensors", digest)
    try:
        unet = build_on_meta(config_from_dict(config["unet"]))
        schedule = process_from_config(config["schedule"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    load_weights(unet, weights, folder / "model.safetensors")
    return unet, schedule, {key: config[key] for key in (*REQUIRED, *OPTIONAL) if key in config}


def load_network(config: NetworkConfig, weights: dict[str, torch.Tensor], path: str | os.PathLike) -> Network:
    """A network with these weights, in float32 on the CPU; ValueError naming `path` if they do not fit it."""
    network = build_on_meta(config)
    load_weights(network, weights, path)
    return network


def locate(name: str | os.PathLike, patterns: Iterable[str] = FILES) -> Path:
    """The file or folder of a model: a bundled one by name, a path, or "hf:owner/name", which is fetched.

    A bundled name goes before a folder, see `names.own_name`.

    patterns: of the names of the files to fetch, such as "*.json". ValueError if there is no such model, or
    if the hub cannot be reached.
    """
    if not os.fspath(name):
        raise ValueError("the name of a model must not be empty")
    if isinstance(name, str) and name.startswith("hf:"):
        return _download(name[3:], patterns)
    if bundled := own_name(name, bundled_models(), "model"):
        return BUNDLED / bundled
    path = Path(name)
    if is_folder(path) or path.exists():
        return path
    raise ValueError(
        f"unknown model {os.fspath(name)!r}: no such folder or file; bundled models: "
        f"{', '.join(bundled_models())}; "
        'models on the hub are written "hf:owner/name"'
    )


def _download(repository: str, patterns: Iterable[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            'models from the hub need huggingface_hub: pip install "fused-diffusion[hub]"'
        ) from error
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # its errors are of many kinds: HTTP, validation, file system
        raise ValueError(f"cannot fetch hf:{repository}: {first_line(error)}") from error
