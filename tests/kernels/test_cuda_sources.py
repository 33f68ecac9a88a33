"""The CUDA sources compile wherever nvcc is found, keep to registers, and contract nothing."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
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


def disassembler() -> str | None:
    """cuobjdump, of the CUDA toolkit or of Triton, beside nvdisasm, which it calls."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


@functools.cache
def instructions(source: str) -> dict[str, Counter[str]]:
    """Of each kernel in csrc/<source> for sm_90a, by its mangled name: how often it has each instruction."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "x.cubin")
        compile_device_code(CSRC / source, cubin, "-cubin", "-arch=sm_90a")
        path = os.pathsep.join([str(Path(tool).parent), os.environ["PATH"]])
        run = subprocess.run(
            [tool, "-sass", cubin],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PATH": path},
        )
    line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)")
    kernels = (part.split("\n", 1) for part in run.stdout.split("Function : ")[1:])
    return {name: Counter(op for op in line.findall(text) if op != "NOP") for name, text in kernels}


def counts_of(source: str, kernel: str) -> Counter[str]:
    (counts,) = (counts for name, counts in instructions(source).items() if kernel in name)
    return counts


def test_a_reverse_step_divides_once_at_most():
    """A division of 64 bits is some hundred instructions, with a conversion to floating point for each."""
    source = "reverse_step/reverse_step.cu"
    rgb = counts_of(source, "reverse_step_rgb_kernelINS_8BFloat16ELi3E")
    assert rgb["I2F"] == 0
    assert rgb.total() <= 2500  # of 12 numbers; it was 3485 for 4
    one = counts_of(source, "reverse_step_kernelINS_8BFloat16E")
    assert one["I2F"] <= 3  # it was 31
    assert one.total() <= 2900


@pytest.mark.exhaustive
def test_a_norm_converts_by_instructions_and_knows_its_shared_memory():
    for kernel in ("whole", "moments", "apply"):
        counts = counts_of("group_norm_silu/group_norm_silu.cu", f"{kernel}_kernelINS_8BFloat16ELb1E")
        assert counts["LD"] == counts["ST"] == 0  # generic accesses; there were 38 and 62
        assert counts["LDS"]
        if kernel != "moments":
            assert counts["F2FP"] >= 16  # two numbers at a time
            assert counts["FSETP"] <= 40  # it was 140, for subnormal numbers
            assert counts.total() <= 5000  # it was 5898


def test_normals_are_the_same_operations_as_on_the_cpu(tmp_path):
    """Correctly rounded roots, sums and products only: nothing approximate, nothing flushed to zero."""
    compile_device_code(CSRC / "philox" / "philox.cu", tmp_path / "x.ptx", "-ptx", "-arch=compute_80")
    ptx = (tmp_path / "x.ptx").read_text()
    operations = set(
        re.findall(r"\b(?:sqrt|rsqrt|rcp|div|fma|mad|mul|add|sub|lg2|ex2|sin|cos)\.[\w.]*f32", ptx)
    )
    assert operations == {"sqrt.rn.f32", "fma.rn.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32"}
