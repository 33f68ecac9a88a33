"""Ctrl-C and SIGTERM, noted while a step is finished."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a run, which is saved. step: the last one taken."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}; go on with resume=True")
        self.step = step


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Gives a list to which the numbers of signals are appended as they come, instead of ending the process.

    A second signal raises KeyboardInterrupt. Only a program's main thread may handle signals; in another one
    the list stays empty.
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
