"""Processes that end with all their children. The beginning and the end of their output are kept."""

import os
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path

HEAD, TAIL = 16 << 10, 112 << 10  # bytes of output that are kept
MARK = "FUSED_DIFFUSION_PART"  # the environment variable by which a part's processes are known


class Process:
    """A process in a session of its own. `poll` reads its output and never waits."""

    def __init__(
        self, command: list[str], environment: dict[str, str], folder: Path, main: Callable | None = None
    ):
        """folder: the working directory. main: called with the command in a fork, instead of running it."""
        self._mark, self._head, self._tail, self.size = uuid.uuid4().hex, b"", b"", 0
        environment = environment | {MARK: self._mark}
        self._output, write = os.pipe()
        os.set_blocking(self._output, False)
        if main is None:
            child = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                start_new_session=True,
            )
            self.pid = child.pid
            child.returncode = 0  # this class waits for the child
        else:
            self.pid = _fork(main, command, environment, folder, write)
        os.close(write)
        self.status: int | None = None
        self.cpu = 0.0  # seconds, of its children too, once it has ended

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the process runs."""
        self._read()
        if self.status is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.cpu = usage.ru_utime + usage.ru_stime
                self.status = os.waitstatus_to_exitcode(status)
                self._kill_group()
                self._read()
                if self._output >= 0:
                    os.close(self._output)
                    self._output = -1
        return self.status

    def stop(self) -> None:
        """Kills the process and all its descendants."""
        self._kill_group()
        end = time.monotonic() + 10
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.01)

    def output(self) -> str:
        """The output of the process; in a very long one, a line in the middle says how much is left out."""
        missing = self.size - len(self._head) - len(self._tail)
        cut = f"\n... {missing} bytes ...\n".encode() if missing else b""
        return (self._head + cut + self._tail).decode(errors="replace")

    def _read(self) -> None:
        while self._output >= 0:
            try:
                data = os.read(self._output, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                os.close(self._output)
                self._output = -1
                return
            self.size += len(data)
            room = HEAD - len(self._head)
            self._head, data = self._head + data[: max(0, room)], data[max(0, room) :]
            self._tail = (self._tail + data)[-TAIL:]

    def _kill_group(self) -> None:
        for _ in range(3):  # processes can start while others are being killed
            _kill(os.killpg, self.pid)
            found = _marked(self._mark)
            for pid in found:
                _kill(os.kill, pid)
            if not found:
                return


def _kill(function: Callable[[int, int], None], pid: int) -> None:
    try:
        function(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _marked(mark: str) -> list[int]:
    """Processes that were started with this mark, also those in sessions of their own."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # the process has ended, or is another user's
            continue
        if wanted in words and state != "Z":
            found.append(int(folder.name))
    return found


def _fork(main: Callable, words: list[str], environment: dict[str, str], folder: Path, output: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        status = main(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
