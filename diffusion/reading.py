"""Reads the files of a checkpoint: JSON, safetensors, .pt. Nothing here ever unpickles code.

Whatever is wrong with a file is a ValueError of one line that names it.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .unet import UNet


def read_json(path: Path) -> dict:
    """The JSON object in a file; ValueError if it is missing or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file; ValueError if it is missing, truncated or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is truncated or damaged: {_one_line(error)}") from error


def read_torch(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of `torch.save` (.pt, .pth, .bin), tensors only.

    ValueError if it is missing, truncated or damaged, or holds anything but named tensors.
    """
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = _one_line(error).split(". ")[0]
        raise ValueError(f"{path} is damaged, or holds more than tensors: {reason}") from error
    if not isinstance(value, dict) or not all(isinstance(t, torch.Tensor) for t in value.values()):
        raise ValueError(f"{path} holds no state dict, which is a dictionary of tensors")
    return value


def load_weights(unet: UNet, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Puts `weights` into `unet`, as float32; ValueError if they do not fit it or are not finite."""
    expected = unet.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{path} is of another architecture than its configuration: "
            f"{len(missing)} tensors missing {missing[:1]}, {len(unknown)} unknown {unknown[:1]}"
        )
    for key, tensor in weights.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{path} is of another architecture than its configuration: {key} is "
                f"{list(tensor.shape)}, not {list(expected[key].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} holds NaN or infinite values")
    # A UNet on the meta device has no memory of its own yet.
    assign = any(tensor.is_meta for tensor in expected.values())
    unet.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, assign=assign)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
