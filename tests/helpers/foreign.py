"""Weights of foreign checkpoints, made from a formula, beside stored outputs of the original code.

A file of tests/fixtures/small_ddpms holds the outputs, and in its metadata, as JSON, the shapes of the
checkpoint's tensors by name and the numbers that the project computes them from.
"""

import json
import math
from typing import Any

import torch
from safetensors import safe_open

from .paths import FIXTURES

FOLDER = FIXTURES / "small_ddpms"
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def uniform(shape: tuple[int, ...] | list[int], key: int) -> torch.Tensor:
    """Float32 numbers in [-1, 1) by integer arithmetic, the same on every machine."""
    x = (torch.arange(math.prod(shape)) + key * 1_000_003 + 1) * 0x9E3779B1 & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x85EBCA77 & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE3D & 0xFFFFFFFF
    return ((x ^ x >> 16) / 2**31 - 1).float().reshape(shape)


def weight(name: str, shape: list[int], key: int) -> torch.Tensor:
    """A weight of moderate size; positive variances; small biases."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    values = uniform(shape, key)
    if name.endswith("running_var"):
        return 1 + 0.5 * values
    if len(shape) < 2:
        return 0.3 * values + (1 if name.endswith("weight") else 0)
    return values * math.sqrt(3 / math.prod(shape[1:]))


def state_dict(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights of these names and shapes; the key of each is its position."""
    return {name: weight(name, shape, key) for key, (name, shape) in enumerate(shapes.items())}


def noise(shape: tuple[int, ...], k: int) -> torch.Tensor:
    """The k-th noise of a trajectory, of variance 1."""
    return math.sqrt(3) * uniform(shape, 500 + k)


def read(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The facts and the outputs of a stored file."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        return facts, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
