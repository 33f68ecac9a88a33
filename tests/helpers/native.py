"""Helpers of the tests of the C++ ops: the instruction sets that are tested."""

from collections.abc import Iterator

import pytest
import torch

from diffusion.kernels import _native

requires_native = pytest.mark.skipif(_native.CPP_MISSING is not None, reason=str(_native.CPP_MISSING))
# The instruction sets that are tested: all that the processor has, or under DIFFUSION_SIMD that one alone, as
# there is a run for each.
TESTED = _native.simd_variants() if _native.CAP is None else _native.simd_variants()[-1:]
requires_amx = pytest.mark.skipif("amx" not in _native.simd_variants(), reason="this processor has no AMX")


def every_variant() -> Iterator[str]:
    """Every instruction set with 1, 2 and 3 threads in turn."""
    threads = torch.get_num_threads()
    try:
        for variant in _native.simd_variants():
            _native.use_simd(variant)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                yield f"{variant}, {count} threads"
    finally:
        _native.use_simd("best")
        torch.set_num_threads(threads)
