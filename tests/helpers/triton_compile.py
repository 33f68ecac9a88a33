"""Compiles, without a GPU, every kernel that an op would launch: for the tests."""

import re
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # CUDA C programming guide, table 30


class Launch(NamedTuple):
    """A kernel, and the properties it is compiled for; equal launches share one binary."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, object], ...]

    @property
    def name(self) -> str:
        shape = [f"{k}={v}" for k, v in (*self.constants, *self.options) if k.isupper() or k in OPTIONS]
        return f"{self.kernel.__name__}({', '.join(shape)})"

    def compile(self, target: GPUTarget):
        source = ASTSource(
            self.kernel,
            signature=dict(self.signature),
            constexprs=dict(self.constants),
            attrs={(i,): [["tt.divisibility", 16]] for i in self.aligned},
        )
        return triton.compile(source, target=target, options=dict(self.options))


def specialised(kernel: JITFunction, args: tuple, kwargs: dict) -> Launch:
    """Triton's specialisation of a call: on None, on 1 and on multiples of 16; tensors count as aligned."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, aligned = {}, {}, []
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        fixed = value is None or (type(value) is int and value == 1)
        if parameter.is_constexpr or (fixed and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            aligned.append(i)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            wide = parameter.annotation_type == "i64" or not -(2**31) <= value < 2**31
            signature[parameter.name] = "i64" if wide else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(i)
    return Launch(
        kernel, *(tuple(d.items()) for d in (signature, constants)), tuple(aligned), tuple(options.items())
    )


@contextmanager
def recorded_launches():
    """The launches of the kernels called within, of every tiling; none of them runs."""
    launches = {}

    def record(kernel, *args, grid, warmup, **kwargs):
        launches[specialised(kernel, args, kwargs)] = None

    def every(op, problem, candidates, launch, device):
        for candidate in candidates[1:]:
            launch(candidate)
        return candidates[0]

    from diffusion.kernels import _triton

    with mock.patch.object(JITFunction, "run", record), mock.patch.object(_triton, "fastest", every):
        yield launches


class Usage(NamedTuple):
    registers: int
    stack: int  # bytes of local memory, which spilled registers take
    shared: int


def usage(compiled, folder: Path) -> Usage:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", report).groups())
    return Usage(registers, stack + local, compiled.metadata.shared)
