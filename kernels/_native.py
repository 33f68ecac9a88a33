"""Loads the compiled libraries once, and keeps the reason where one is missing.

The C++ library is a Python module, csrc/runtime/module.cpp, whose file name holds the version of Python and
the platform. `_cuda.so` is a plain library. Loading either registers its kernels with PyTorch's dispatcher
for the ops that the op folders define. Both use LibTorch's stable ABI, so that one build serves every torch
from 2.10 on.

In a clone, whose sources Python prefers to an installation, there may be no libraries beside this file. Those
of the installation serve then, if they were built from the same csrc/.

The environment variable DIFFUSION_SIMD names the widest instruction set that may run, so that a new processor
can be tested as an older one.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import torch

from . import _limits
from ._sources import digest_of_sources

RECORD = "_build.json"  # the libraries that setup.py built, and reasons for the missing ones
CPP_FILE = "_cpp" + EXTENSION_SUFFIXES[0]  # such as _cpp.cpython-311-x86_64-linux-gnu.so
CUDA_FILE = "_cuda.so"
HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc"
VARIANTS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")  # instruction sets, each with those before it
CAP = os.environ.get("DIFFUSION_SIMD") or None


def _installed() -> Path | None:
    """The folder of an installation's libraries, if fused-diffusion is installed beside this clone."""
    for distribution in importlib.metadata.distributions(name="fused-diffusion"):
        folder = Path(str(distribution.locate_file("diffusion/kernels")))
        if (folder / RECORD).is_file() and folder != HERE:
            return folder
    return None


def _read_record(folder: Path) -> dict[str, dict[str, str]]:
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}


def _find() -> tuple[Path, dict[str, dict[str, str]], str]:
    """The folder of the libraries, setup.py's record there, and the reason if there are none."""
    if (HERE / RECORD).exists() or not SOURCES.is_dir():
        return HERE, _read_record(HERE), "this installation has no record of a build"
    folder = _installed()
    if folder is None:
        return HERE, {}, "this clone is not installed; run: pip install ."
    record = _read_record(folder)
    if record.get("sources") != digest_of_sources(SOURCES):
        return HERE, {}, f"the libraries in {folder} are not of this clone's sources; run: pip install ."
    return folder, record, ""


def _not_built(name: str) -> str:
    return f"the {name} library was not built: {_record.get(name, {}).get('reason', _missing)}"


def _cannot_be_loaded(name: str, error: Exception) -> str:
    return f"the {name} library cannot be loaded: {' '.join(str(error).split())}"


def _is_cut_short(path: Path) -> bool:
    """Whether an ELF file ends before its last table, as a broken copy does: the loader would crash on it."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return False
    offset = int.from_bytes(header[40:48], "little")  # e_shoff
    size, count = (int.from_bytes(header[at : at + 2], "little") for at in (58, 60))  # e_shentsize, e_shnum
    return offset + size * count > path.stat().st_size


def _load_cpp(path: Path) -> tuple[ModuleType | None, str | None]:
    """The imported module, or the reason why it is missing, as a short sentence."""
    if not path.exists():
        others = ", ".join(sorted(other.name for other in path.parent.glob("_cpp*.so")))
        if others and "reason" not in _record.get("cpp", {}):
            return None, f"the cpp library is {others}, and this Python needs {path.name}; run: pip install ."
        return None, _not_built("cpp")
    name = f"{__package__}._cpp"
    try:
        if _is_cut_short(path):
            return None, f"the cpp library is damaged: {path} is cut short; run: pip install ."
        loader = ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_loader(name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (ImportError, OSError, SystemError) as error:
        return None, _cannot_be_loaded("cpp", error)
    lacking = [part for part in _PARTS if not hasattr(module, part)]
    if lacking:
        return None, f"the cpp library is not of this version: it has no {lacking[0]}; run: pip install ."
    for limit, value in module.LIMITS.items():
        expected = getattr(_limits, limit, None)
        if value != expected:
            return None, f"the cpp library is not of this version: its {limit} is {value}, not {expected}"
    if module.BUILD["sources"] != _record.get("sources"):
        return None, f"the cpp library was built from other sources than {RECORD} says; run: pip install ."
    sys.modules[name] = module
    return module, None


def _load_cuda(path: Path) -> str | None:
    """Loads the library. Returns None, or the reason why it is missing, as a short sentence."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if not path.exists():
        return _not_built("cuda")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return _cannot_be_loaded("cuda", error)
    return None


# The names that Python uses of the module; `_cpp.pyi` describes them.
_PARTS = (
    "BUILD",
    "LIMITS",
    "SIMD_VARIANTS",
    "MemoryDigest",
    "RecordedCalls",
    "best_simd",
    "simd_in_use",
    "use_simd",
)
FOLDER, _record, _missing = _find()
_cpp, CPP_MISSING = _load_cpp(FOLDER / CPP_FILE)
CUDA_MISSING = _load_cuda(FOLDER / CUDA_FILE)
_found = "" if _cpp is None else _cpp.best_simd()


def library() -> ModuleType:
    """The module of the C++ ops. RuntimeError: it is missing."""
    if _cpp is None:
        raise RuntimeError(CPP_MISSING)
    return _cpp


def simd_in_use() -> str:
    """The instruction set that the C++ ops run with; empty where they are missing.

    ValueError: DIFFUSION_SIMD names no instruction set.
    """
    check_environment()
    return _simd


def use_simd(variant: str) -> None:
    """Runs the C++ ops with one instruction set: "baseline", "avx2", "avx512", "avx512_bf16", "amx" or
    "best".

    Results have the same bits on every instruction set, with these exceptions: attention in bfloat16, which
    avx512_bf16 multiplies in pairs and amx in tiles; group_norm_silu, which sums a contiguous tensor in the
    order of the vectors; conv3x3, whose weights are packed for one instruction set; and conv2d's gradients
    in float32, which round products on the baseline. In bfloat16 conv2d needs amx.
    ValueError if the processor does not have it, or DIFFUSION_SIMD does not allow it.
    """
    global _simd
    if _cpp is None:
        raise ValueError(f"no instruction set can be chosen: {CPP_MISSING}")
    choices = simd_variants()
    name = choices[-1] if variant == "best" else variant
    if name not in choices:
        forbidden = name in VARIANTS and not allows(name)
        reason = f"DIFFUSION_SIMD={CAP} allows no" if forbidden else "this processor has no"
        raise ValueError(f"{reason} {variant!r}; choose from: {', '.join(choices)}, best")
    _cpp.use_simd(name)
    _simd = name


def simd_variants() -> list[str]:
    """The instruction sets that the processor and the library have and DIFFUSION_SIMD allows, narrowest
    first."""
    if _cpp is None:
        return []
    most = VARIANTS.index(_found)
    return list(VARIANTS[: 1 + (min(most, VARIANTS.index(CAP)) if CAP in VARIANTS else most)])


def allows(variant: str) -> bool:
    """Whether DIFFUSION_SIMD permits this instruction set. ValueError: it names no instruction set."""
    check_environment()
    return CAP is None or VARIANTS.index(variant) <= VARIANTS.index(CAP)


def check_environment() -> None:
    """ValueError: DIFFUSION_SIMD names no instruction set."""
    if CAP is not None and CAP not in VARIANTS:
        raise ValueError(f"DIFFUSION_SIMD is {CAP!r}; choose from: {', '.join(VARIANTS)}")


def build_info() -> dict[str, str]:
    """The state of each library, the instruction sets and the CUDA archs, as lines to print by name."""
    check_environment()
    cuda = _record.get("cuda", {})
    info = {"cpp": CPP_MISSING or "loaded", "cuda": CUDA_MISSING or "loaded"}
    if _cpp is not None:
        info["compiler"] = _cpp.BUILD["compiler"]
        info["bindings"] = f"pybind11 {_cpp.BUILD['pybind11']}, for Python {_cpp.BUILD['python']}"
        info["simd"] = simd_in_use()
        if CAP is not None:
            lacking = VARIANTS.index(_found) < VARIANTS.index(CAP)
            beyond = f", which this processor lacks; its best is {_found}" if lacking else ""
            info["simd cap"] = f"DIFFUSION_SIMD={CAP}{beyond}"
        info["simd variants"] = ", ".join(simd_variants())
    if _cpp is not None and FOLDER != HERE:
        info["libraries"] = f"in {FOLDER}"
    info["cuda archs"] = cuda.get("archs") or f"none: {cuda.get('reason', 'no record of a build')}"
    return info


_simd = ""
if _cpp is not None:
    use_simd("best")
