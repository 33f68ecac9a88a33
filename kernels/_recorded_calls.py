"""Calls of compiled operators, recorded once and then run without the dispatcher and the checks of arguments,
which take as long as a small operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _native

if TYPE_CHECKING:
    from ._cpp import RecordedCalls


def recording() -> RecordedCalls:
    """A context that records this thread's calls of operators instead of running them.

        with recording() as calls:
            convolution_(...)
        calls.run()

    Only operators that call `run_or_record` in C++ (csrc/runtime/recorded_calls.h) are recorded:
    group_norm_affine_, convolution_, attention_amx_ and upsample_nearest2x_. They check their arguments while
    recording. All other code runs at once. Recordings nest, and each thread has its own.

    `len(calls)` is the number of recorded calls; a call on empty tensors has nothing to do and is not one.
    `calls.run()` runs them in their order, as often as wanted, without the GIL; two threads take turns. The
    calls own their tensors, and each run reads and writes the tensors' memory.

    Errors: RuntimeError without the compiled library; from `run` where the recording has not ended, or ended
    in an exception; from leaving the context in another thread, or before a recording within it. `run` raises
    what an operator does, such as MemoryError. TypeError from copy and pickle.
    """
    return _native.library().RecordedCalls()
