"""Tells whether Triton can run on a device, and measures which of a few launch configurations is the fastest.

Not every platform has Triton, so only the modules with kernels import it, at the first call.
"""

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ._dispatch import constant_in_graphs

# With TRITON_INTERPRET=1, kernels run in Python on any tensor. Triton reads the variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MISSING = None if importlib.util.find_spec("triton") else "the package triton is not installed"
OLDEST_CAPABILITY = (8, 0)

Candidate = TypeVar("Candidate")
_fastest: dict[Hashable, Any] = {}


@constant_in_graphs
def _too_old(device_index: int | None) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device_index)
    if capability >= OLDEST_CAPABILITY:
        return None
    return "Triton needs compute capability {}.{}, and the device has {}.{}".format(
        *OLDEST_CAPABILITY, *capability
    )


def unsupported(device: torch.device) -> str | None:
    """The reason why no Triton kernel can run on `device`, or None."""
    if MISSING is not None:
        return MISSING
    if INTERPRETED:
        served = device.type in ("cpu", "cuda")
        return None if served else f"Triton's interpreter takes no {device.type} tensors"
    if device.type != "cuda":
        return f"it runs on CUDA and ROCm devices, not on {device} (unless TRITON_INTERPRET=1)"
    return _too_old(device.index)


@functools.cache
def _sources() -> str:
    """A digest of this package's kernels. A stored choice is valid only for the same kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*triton*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def fastest(
    op: str,
    problem: tuple[Hashable, ...],
    candidates: Sequence[Candidate],
    launch: Callable[[Candidate], object],
    device: torch.device,
) -> Candidate:
    """The candidate whose `launch` is the fastest for `problem`: measured once, kept in Triton's cache.

    The first candidate stands in where nothing can be measured: in the interpreter, and while a CUDA graph
    is captured. Candidates beyond the device's resources are skipped.
    """
    if len(candidates) == 1 or INTERPRETED:
        return candidates[0]
    key = (op, problem, device)
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        _fastest[key] = candidates[_measured(op, problem, candidates, launch, device)]
    return _fastest[key]


def _measured(
    op: str,
    problem: tuple[Hashable, ...],
    candidates: Sequence[Candidate],
    launch: Callable[[Candidate], object],
    device: torch.device,
) -> int:
    import triton
    from triton.runtime.cache import get_cache_manager

    name = torch.cuda.get_device_name(device)
    identity = repr((op, problem, list(candidates), name, triton.__version__, _sources()))
    store = get_cache_manager(hashlib.sha256(identity.encode()).hexdigest())
    kept = store.get_file("fastest.json")
    if kept is not None:
        with open(kept) as file:
            return json.load(file)["index"]
    times = [_time(launch, candidate) for candidate in candidates]
    index = times.index(min(times))
    store.put(json.dumps({"index": index, "milliseconds": times, "key": identity}), "fastest.json", False)
    return index


def _time(launch: Callable[[Candidate], object], candidate: Candidate) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(lambda: launch(candidate), warmup=5, rep=20, return_mode="median")
    except OutOfResources:
        return float("inf")
