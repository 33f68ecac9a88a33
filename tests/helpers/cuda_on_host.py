"""Builds the CUDA sources for the host, with tests/kernels/on_host/cuda_runtime.h in the place of CUDA's."""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT

CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent
CXX = next(filter(shutil.which, [os.environ.get("CXX", ""), "g++", "clang++"]), None)
SANITIZER = "-fsanitize=alignment"  # a device refuses accesses that are not aligned; a host would not mind
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-DTORCH_TARGET_VERSION=0x020a000000000000", SANITIZER]
INCLUDE = [
    "-I",
    str(ROOT / "tests" / "kernels" / "on_host"),
    "-I",
    str(CSRC),
    "-isystem",
    str(TORCH / "include"),
]

requires_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


def run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"


@functools.cache
def load(op: str) -> ctypes.CDLL:
    """Registers the CUDA operators of csrc/<op> as fused_diffusion::on_host_<name>, for CPU tensors.

    `on_host_device(processors, shared_bytes)` sets what the kernels are told of the device.
    """
    sources = sorted((CSRC / op).glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder, source.stem + ".o")) for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [
                (CXX, *FLAGS, *INCLUDE, "-x", "c++", "-c", str(source), "-o", target)
                for source, target in zip(sources, objects, strict=True)
            ]
            list(pool.map(lambda command: run(*command), commands))
        library = str(Path(folder, "on_host.so"))
        run(CXX, "-shared", *objects, "-o", library, SANITIZER, f"-L{TORCH / 'lib'}", "-ltorch_cpu")
        torch.ops.load_library(library)
        return ctypes.CDLL(library)


def launches(op: str) -> list[tuple[int, int, int]]:
    """The grids of the launches of csrc/<op> since the device was last set."""
    grids = ((ctypes.c_uint * 3) * 64)()
    count = load(op).on_host_launches(grids, len(grids))
    return [tuple(grid) for grid in grids[:count]]


@pytest.fixture
def on_host(capfd, request):
    """Loads the ops that the module names in ON_HOST; a function that sets the device that kernels see.

    Memory that a kernel does not write is NaN, and its accesses are aligned.
    """
    libraries = [load(op) for op in request.module.ON_HOST]

    def set_device(processors: int, shared_bytes: int) -> None:
        for library in libraries:
            library.on_host_device(processors, shared_bytes)

    set_device(132, 227 << 10)
    torch.use_deterministic_algorithms(True)  # also fills the tensors of torch.empty
    try:
        yield set_device
    finally:
        torch.use_deterministic_algorithms(False)
    assert "runtime error" not in capfd.readouterr().err
