"""The CUDA sources compile wherever nvcc is found, keep to registers, and contract nothing."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT
from helpers.thinning import exhaustive_but

CSRC = ROOT / "csrc"
NVCC = shutil.which(os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc")) or shutil.which("nvcc")
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
SPILLS_OF_A_GRADIENT = 32  # bytes of a thread

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def compile_device_code(source: Path, output: Path, *flags: str) -> str:
    include = ["-I", str(CSRC), "-isystem", str(Path(torch.__file__).parent / "include")]
    command = [NVCC, *FLAGS, *include, *flags, str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.parametrize("arch", exhaustive_but(["sm_80", "sm_90a"], default=["sm_90a"]))
@pytest.mark.parametrize(
    "source",
    exhaustive_but(sorted(CSRC.rglob("*.cu")), default=[CSRC / "reverse_step" / "reverse_step.cu"]),
    ids=lambda path: path.stem,
)
def test_register_spills(source, arch, tmp_path):
    report = compile_device_code(source, tmp_path / "x.cubin", "-cubin", f"-arch={arch}", "-Xptxas", "-v")
    assert "Used" in report
    sizes = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert sizes
    allowed = SPILLS_OF_A_GRADIENT if "backward" in source.stem else 0
    assert max(int(size) for kernel in sizes for size in kernel) <= allowed


def test_normals_are_the_same_operations_as_on_the_cpu(tmp_path):
    """Correctly rounded roots, sums and products only: nothing approximate, nothing flushed to zero."""
    compile_device_code(CSRC / "philox" / "philox.cu", tmp_path / "x.ptx", "-ptx", "-arch=compute_80")
    ptx = (tmp_path / "x.ptx").read_text()
    operations = set(
        re.findall(r"\b(?:sqrt|rsqrt|rcp|div|fma|mad|mul|add|sub|lg2|ex2|sin|cos)\.[\w.]*f32", ptx)
    )
    assert operations == {"sqrt.rn.f32", "fma.rn.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32"}
