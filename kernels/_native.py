"""Loads the compiled libraries once, and keeps the reason where one is missing.

`_cpp.so` and `_cuda.so` register their kernels with the dispatcher for the ops that the op folders define.
They use LibTorch's stable ABI and no symbol of Python, so one build serves every torch from 2.10 on.

In a clone, whose sources Python prefers to an installation, there may be no libraries beside this file. Those
of the installation serve then, if they were built from the same csrc/.

The environment variable DIFFUSION_SIMD names the widest instruction set that may run, so that a processor can
do what a lesser one does.
"""

import ctypes
import importlib.metadata
import json
import os
from pathlib import Path

import torch

from ._sources import digest_of_sources

RECORD = "_build.json"  # what setup.py built, or why not
HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc"
VARIANTS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")  # instruction sets, each with those before it
CAP = os.environ.get("DIFFUSION_SIMD") or None


def _installed() -> Path | None:
    """Where an installation has its libraries, if there is one beside this clone."""
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
    """The folder with the libraries, what setup.py recorded there, and why nothing may be found."""
    if (HERE / RECORD).exists() or not SOURCES.is_dir():
        return HERE, _read_record(HERE), "this installation has no record of a build"
    folder = _installed()
    if folder is None:
        return HERE, {}, "this clone is not installed; run: pip install ."
    record = _read_record(folder)
    if record.get("sources") != digest_of_sources(SOURCES):
        return HERE, {}, f"the libraries in {folder} are not of this clone's sources; run: pip install ."
    return folder, record, ""


def _load(name: str, path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """The loaded library, or the reason why there is none, as a short sentence."""
    if not path.exists():
        reason = _record.get(name, {}).get("reason", _missing)
        return None, f"the {name} library was not built: {reason}"
    try:
        torch.ops.load_library(str(path))
        return ctypes.CDLL(str(path)), None
    except OSError as error:
        return None, f"the {name} library cannot be loaded: {' '.join(str(error).split())}"


def _load_cpp(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    library, reason = _load("cpp", path)
    if library is None:
        return None, reason
    try:
        for function in ("simd_best", "simd_in_use", "compiler"):
            getattr(library, f"fused_diffusion_{function}").restype = ctypes.c_char_p
        library.fused_diffusion_simd_use.argtypes = [ctypes.c_char_p]
        library.fused_diffusion_program_begin.restype = ctypes.c_void_p
        library.fused_diffusion_program_size.restype = ctypes.c_int64
        library.fused_diffusion_program_run.restype = ctypes.c_char_p
        for function in ("end", "size", "run", "delete"):
            getattr(library, f"fused_diffusion_program_{function}").argtypes = [ctypes.c_void_p]
    except AttributeError as error:
        return None, f"the cpp library is not of this version: {error}"
    return library, None


def _load_cuda(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return None, "torch finds no CUDA device"
    return _load("cuda", path)


FOLDER, _record, _missing = _find()
_cpp, CPP_MISSING = _load_cpp(FOLDER / "_cpp.so")
_cuda, CUDA_MISSING = _load_cuda(FOLDER / "_cuda.so")
_found = "" if _cpp is None else _cpp.fused_diffusion_simd_best().decode()


def library() -> ctypes.CDLL:
    """The loaded library of the C++ ops. RuntimeError: there is none."""
    if _cpp is None:
        raise RuntimeError(CPP_MISSING)
    return _cpp


def simd_in_use() -> str:
    """The instruction set that the C++ ops run with; empty where they are missing.

    ValueError: DIFFUSION_SIMD names none.
    """
    check_environment()
    return _simd


def use_simd(variant: str) -> None:
    """Runs the C++ ops with one instruction set: "baseline", "avx2", "avx512", "avx512_bf16", "amx" or
    "best".

    The bits of every result are the same in all of them, but for attention in bfloat16, which avx512_bf16
    multiplies in pairs and amx in tiles, for group_norm_silu, whose sums over a contiguous tensor run in the
    order of the vectors, and for conv3x3, whose weights are packed for one of them; conv2d is for amx alone.
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
    _cpp.fused_diffusion_simd_use(name.encode())
    _simd = name


def simd_variants() -> list[str]:
    """The instruction sets that the processor and the library have and DIFFUSION_SIMD allows, narrowest
    first."""
    if _cpp is None:
        return []
    most = VARIANTS.index(_found)
    return list(VARIANTS[: 1 + (min(most, VARIANTS.index(CAP)) if CAP in VARIANTS else most)])


def allows(variant: str) -> bool:
    """Whether DIFFUSION_SIMD leaves what depends on an instruction set to the processor."""
    check_environment()
    return CAP is None or VARIANTS.index(variant) <= VARIANTS.index(CAP)


def check_environment() -> None:
    """ValueError: DIFFUSION_SIMD names no instruction set."""
    if CAP is not None and CAP not in VARIANTS:
        raise ValueError(f"DIFFUSION_SIMD is {CAP!r}; choose from: {', '.join(VARIANTS)}")


def build_info() -> dict[str, str]:
    """What is built and loaded, as lines to print: each library, the instruction sets, the CUDA archs."""
    check_environment()
    cuda = _record.get("cuda", {})
    info = {"cpp": CPP_MISSING or "loaded", "cuda": CUDA_MISSING or "loaded"}
    if _cpp is not None:
        info["compiler"] = _cpp.fused_diffusion_compiler().decode()
        info["simd"] = simd_in_use()
        if CAP is not None:
            lesser = VARIANTS.index(_found) < VARIANTS.index(CAP)
            beyond = f", which this processor lacks; its best is {_found}" if lesser else ""
            info["simd cap"] = f"DIFFUSION_SIMD={CAP}{beyond}"
        info["simd variants"] = ", ".join(simd_variants())
    if _cpp is not None and FOLDER != HERE:
        info["libraries"] = f"in {FOLDER}"
    info["cuda archs"] = cuda.get("archs") or f"none: {cuda.get('reason', 'no record of a build')}"
    return info


_simd = ""
if _cpp is not None:
    use_simd("best")
