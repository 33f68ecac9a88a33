"""The CUDA sources compile wherever nvcc is found, keep to registers, and contract nothing."""

import functools
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from helpers.paths import ROOT
from helpers.thinning import exhaustive_but

CSRC = ROOT / "csrc"
with mock.patch("setuptools.setup"):
    SETUP = runpy.run_path(str(ROOT / "setup.py"))  # the options that it compiles with
STEP, NORM = "reverse_step/reverse_step.cu", "group_norm_silu/group_norm_silu.cu"
ATTENTION, WGMMA = "attention/attention.cu", "attention/attention_wgmma.cu"
NVCC = shutil.which(os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc")) or shutil.which("nvcc")
SPILLS_OF_A_GRADIENT = 32  # bytes of a thread

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def compile_device_code(source: Path, output: Path, *flags: str) -> str:
    include = ["-I", str(CSRC), "-isystem", str(Path(torch.__file__).parent / "include")]
    command = [NVCC, *SETUP["NVCC_FLAGS"], *include, *flags, str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def archs(source: Path) -> dict[str, str]:
    """The devices that a source is compiled for, sm_..., each with the PTX that it is made from."""
    found = {}
    for option in SETUP["device_code"](str(source)):
        virtual, real = re.fullmatch(r"-gencode=arch=(\w+),code=\[([\w,]+)\]", option).groups()
        found |= {arch: virtual for arch in real.split(",") if arch.startswith("sm_")}
    return found


@functools.cache
def cubin(source: Path, arch: str) -> tuple[bytes, str]:
    """The device code of a source, compiled once, and what ptxas says of its registers."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "x.cubin")
        code = f"-gencode=arch={archs(source)[arch]},code={arch}"
        report = compile_device_code(source, output, "-cubin", code, "-Xptxas", "-v")
        return output.read_bytes(), report


COMPILED = [(source, arch) for source in sorted(CSRC.rglob("*.cu")) for arch in archs(source)]


def test_devices():
    """Machine code for 8.0 and 9.0, PTX for later devices, and what only 9.0a has."""
    assert SETUP["device_code"](ATTENTION) == ["-gencode=arch=compute_80,code=[sm_80,sm_90,compute_80]"]
    assert SETUP["device_code"](WGMMA) == ["-gencode=arch=compute_90a,code=[sm_90a]"]


@pytest.mark.parametrize(
    "compiled",
    exhaustive_but(COMPILED, default=[(CSRC / "biased_sum" / "biased_sum.cu", "sm_90")]),
    ids=lambda compiled: f"{compiled[0].stem}-{compiled[1]}",
)
def test_register_spills(compiled):
    source, arch = compiled
    _, report = cubin(source, arch)
    assert "Used" in report
    assert "serialized" not in report  # ptxas says so of wgmma that it makes wait for each other
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


class MachineCode(NamedTuple):
    """Of a kernel: its registers, and its instructions with their addresses and, of a branch, the target."""

    registers: int
    instructions: list[tuple[int, str, int | None]]

    def counts(self) -> Counter[str]:
        return Counter(name for _, name, _ in self.instructions)

    def loops(self) -> Iterator[Counter[str]]:
        """The instructions of each loop, with those of the loops in it."""
        for end, name, begin in self.instructions:
            if name == "BRA" and begin is not None and begin < end:
                yield Counter(name for at, name, _ in self.instructions if begin <= at <= end)


@functools.cache
def machine_code(source: str) -> dict[str, MachineCode]:
    """Each kernel in csrc/<source> for compute capability 9.0, by its mangled name."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump")
    code, report = cubin(CSRC / source, list(archs(CSRC / source))[-1])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.cubin")
        file.write_bytes(code)
        path = os.pathsep.join([str(Path(tool).parent), os.environ["PATH"]])
        run = subprocess.run(
            [tool, "-sass", file],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PATH": path},
        )
    registers = dict(re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", report, re.DOTALL))
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)\S*(?: [^;]*?0x([0-9a-f]+))?[^;]*;")
    kernels = (part.split("\n", 1) for part in run.stdout.split("Function : ")[1:])
    found = {}
    for name, text in kernels:
        listed = [
            (int(at, 16), op, int(target, 16) if target and op == "BRA" else None)
            for at, op, target in line.findall(text)
            if op != "NOP"
        ]
        found[name] = MachineCode(int(registers[name]), listed)
    return found


def code_of(source: str, kernel: str) -> MachineCode:
    (code,) = (code for name, code in machine_code(source).items() if kernel in name)
    return code


def counts_of(source: str, kernel: str) -> Counter[str]:
    return code_of(source, kernel).counts()


DOCUMENTED = {  # rows of docs/gpu.md
    "reverse step of RGB images": (STEP, "reverse_step_rgb_kernelINS_8BFloat16ELi3E"),
    "reverse step of others": (STEP, "reverse_step_kernelINS_8BFloat16E"),
    "`group_norm_silu` whole": (NORM, "whole_kernelINS_8BFloat16ELb1E"),
    "`group_norm_silu` moments": (NORM, "moments_kernelINS_8BFloat16ELb1E"),
    "`group_norm_silu` apply": (NORM, "apply_kernelINS_8BFloat16ELb1E"),
    "`biased_sum_`": ("biased_sum/biased_sum.cu", "biased_sum_kernelINS_8BFloat16ELi8EjE"),
    "64 queries": (ATTENTION, "attention_kernelINS_8BFloat16ELi256ELi1E"),
    "16 queries": (ATTENTION, "attention_kernelINS_8BFloat16ELi256ELi4E"),
    "merging the parts": (ATTENTION, "merge_parts_kernelINS_8BFloat16E"),
    "128 queries by wgmma": (WGMMA, "attention_wgmma_kernelINS_8BFloat16ELi256E"),
}


@pytest.mark.parametrize("row", exhaustive_but(DOCUMENTED, default=["`biased_sum_`"]))
def test_the_counts_of_the_documentation(row):
    """Of nvcc 13.0; another one may differ by some instructions."""
    text = (ROOT / "docs" / "gpu.md").read_text()
    found = re.search(rf"^\| {re.escape(row)} \| ([\d,]+)[^|]*\| (\d+)", text, re.MULTILINE)
    instructions, registers = (int(number.replace(",", "")) for number in found.groups())
    code = code_of(*DOCUMENTED[row])
    assert code.counts().total() == pytest.approx(instructions, rel=0.02)
    if "wgmma" not in row:  # whose warps set their registers themselves
        assert abs(code.registers - registers) <= 2


@pytest.mark.slow
def test_a_reverse_step_divides_once_at_most():
    """A division of 64 bits is some hundred instructions, with a conversion to floating point for each."""
    rgb = counts_of(STEP, "reverse_step_rgb_kernelINS_8BFloat16ELi3E")
    assert rgb["I2F"] == 0
    assert rgb.total() <= 2100  # of 12 numbers; it was 3485 for 4
    one = counts_of(STEP, "reverse_step_kernelINS_8BFloat16E")
    assert one["I2F"] <= 3  # it was 31
    assert one.total() <= 2700


@pytest.mark.exhaustive
@pytest.mark.parametrize("kernel", ["whole", "moments", "apply"])
def test_a_norm_fits_four_times_on_a_multiprocessor(kernel):
    code = code_of(NORM, f"{kernel}_kernelINS_8BFloat16ELb1E")
    counts = code.counts()
    assert code.registers <= 64  # of 256 threads in each of four blocks; it was 126
    assert counts["LD"] == counts["ST"] == 0  # generic accesses; there were 38 and 62
    assert counts["LDS"]
    assert (counts["LDGSTS"] > 0) == (kernel != "apply")  # asynchronous copies into shared memory
    assert counts["FSETP"] <= 40  # it was 140, for subnormal numbers
    assert counts.total() <= 3800  # it was 5898


@pytest.mark.exhaustive
def test_instructions_of_a_norm_for_each_number():
    """In the loops over the numbers of a tile: sum, squares, and normalisation with SiLU."""
    code = code_of(NORM, "whole_kernelINS_8BFloat16ELb1E")
    # What each pass does once for each number, or of F2FP for two, and not at all.
    passes = {"sum": ("FADD", 1, "FFMA"), "squares": ("FFMA", 1, "MUFU"), "normalise": ("F2FP", 2, "FSETP")}
    of_a_number = {}
    for name, (once, numbers, never) in passes.items():
        loops = [loop for loop in code.loops() if loop[once] >= 4 and loop[never] == 0]
        loops = [loop for loop in loops if (loop["MUFU"] > 0) == (name == "normalise")]
        of_a_number[name] = min(loop.total() / (numbers * loop[once]) for loop in loops)
    assert of_a_number["sum"] <= 4  # it was 15
    assert of_a_number["squares"] <= 6
    assert of_a_number["normalise"] <= 11.5  # it was 45


@pytest.mark.exhaustive
def test_attention_divides_once_for_each_query():
    """Each of a lane's numbers was divided by the sum of the weights: some ten instructions, and a call."""
    many = counts_of(ATTENTION, "attention_kernelINS_8BFloat16ELi256ELi1E")
    assert (many["LDSM"], many["HMMA"]) == (144, 256)
    assert many.total() <= 3200
    assert many["CALL"] <= 1
    few = counts_of(ATTENTION, "attention_kernelINS_8BFloat16ELi256ELi4E")
    assert (few["LDSM"], few["HMMA"]) == (48, 64)
    assert few.total() <= 3700
    assert few["CALL"] <= 1
    merged = counts_of(ATTENTION, "merge_parts_kernelINS_8BFloat16E")
    assert merged.total() <= 1100


@pytest.mark.exhaustive
@pytest.mark.parametrize(("width", "products"), [(64, 12), (128, 16), (256, 20)])
def test_attention_by_wgmma_multiplies_whole_tiles(width, products):
    """Keys, 16 columns at a time, and values, 16 rows at a time; neither goes through registers."""
    kernel = f"attention_wgmma_kernelINS_8BFloat16ELi{width}E"
    counts = counts_of(WGMMA, kernel)
    assert counts["HGMMA"] == products
    assert counts["HMMA"] == counts["LDSM"] == counts["LDL"] == counts["STL"] == 0
    assert counts["UTMALDG"] > 0


def test_normals_are_the_same_operations_as_on_the_cpu(tmp_path):
    """Correctly rounded roots, sums and products only: nothing approximate, nothing flushed to zero."""
    compile_device_code(CSRC / "philox" / "philox.cu", tmp_path / "x.ptx", "-ptx", "-arch=compute_80")
    ptx = (tmp_path / "x.ptx").read_text()
    operations = set(
        re.findall(r"\b(?:sqrt|rsqrt|rcp|div|fma|mad|mul|add|sub|lg2|ex2|sin|cos)\.[\w.]*f32", ptx)
    )
    assert operations == {"sqrt.rn.f32", "fma.rn.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32"}
