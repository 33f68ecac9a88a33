"""Calls of compiled operators, checked and written down once, and then run without the dispatcher.

Which takes as long as a small operator: csrc/runtime/program.h. Only for operators that know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import _native


class Program:
    """The calls (operator, arguments), to be run in their order, as often as wanted, one at a time.

    The tensors among the arguments stay where they are; the program keeps them. Errors: those of the
    operators for their arguments, and RuntimeError without the compiled library.
    """

    def __init__(self, calls: Sequence[tuple[Callable, tuple]]):
        self._handle = None
        self._library = _native.library()
        self._calls = list(calls)  # with their tensors
        self._handle = self._library.fused_diffusion_program_begin()
        if not self._handle:
            raise MemoryError("no memory for a program")
        try:
            for function, arguments in self._calls:
                function(*arguments)
        finally:
            self._library.fused_diffusion_program_end(self._handle)

    def __len__(self) -> int:
        """How many calls were written down: those on empty tensors have nothing to do."""
        return self._library.fused_diffusion_program_size(self._handle)

    def run(self) -> None:
        """RuntimeError: what an operator raised, such as std::bad_alloc where memory is short."""
        error = self._library.fused_diffusion_program_run(self._handle)
        if error is not None:
            raise RuntimeError(f"a compiled operator failed: {error.decode(errors='replace')}")

    def __del__(self) -> None:
        if self._handle:
            self._library.fused_diffusion_program_delete(self._handle)
