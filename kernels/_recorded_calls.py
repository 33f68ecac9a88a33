"""Records calls of compiled operators, to run them again without the dispatcher and the checks of arguments.

Both together take as long as a small operator."""

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

    Only operators that call `run_or_record` in C++ (csrc/runtime/recorded_calls.h) are recorded. They write
    into tensors of the caller, and check their arguments while recording. All other code runs at once.
    Recordings nest, and each thread has its own. `run` of other recorded calls within the context is recorded
    as one call.

    `len(calls)` is the number of recorded calls; calls on empty tensors have no work and are not counted.
    `calls.run(times=1)` runs them in their order, so many times, without the GIL; two threads take turns. The
    calls own their tensors, and each run reads and writes the tensors' memory. In the main thread, signals
    such as that of Ctrl-C are handled between two times, at most 50 times a second.

    RuntimeError: there is no compiled library; `run` is called before the recording has ended, or after it
    ended in an exception; the context is left in another thread, or before a recording within it. ValueError:
    a negative number of times. `run` passes on the errors of operators, such as MemoryError, and of signal
    handlers, such as KeyboardInterrupt. copy and pickle raise TypeError.
    """
    return _native.library().RecordedCalls()
