"""Python processes that start fast: forked from one that has imported PyTorch, which is most of a start."""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

# For each message it forks a supervisor, which forks the process, and reports its id and later its status.
# The process leaves the loop, so that its interpreter ends as any other.
SERVER = """
import json, os, signal, socket, sys
import torch
import PIL.Image, safetensors.torch, torch._dynamo  # which training imports, too
server = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors leave no zombies
while True:
    message, files, *_ = socket.recv_fds(server, 1 << 20, 4)
    if not message:
        os._exit(0)
    if os.fork():
        for file in files:
            os.close(file)
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child, report = os.fork(), files.pop()
    if not child:
        break
    for file in files:
        os.close(file)
    os.write(report, f"{child} ".encode())
    os.write(report, str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    os._exit(0)
for number, file in enumerate(files):
    os.dup2(file, number)
for file in (report, *files):
    os.close(file)
server.close()
sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
request = json.loads(message)
os.environ.clear()
os.environ.update(request["environment"])
os.chdir(request["folder"])
sys.path[:] = request["path"]
sys.argv = ["-c", *request["arguments"]]
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
"""


@functools.cache
def _server() -> socket.socket:
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(other.fileno())], pass_fds=[other.fileno()])
    other.close()
    atexit.register(lambda: (own.close(), process.wait()))
    return own


class _Forked:
    """As much of subprocess.Popen, with pipes of text, as tests use."""

    def __init__(self, code: str, arguments: list[str], environment: dict[str, str]):
        pipes = [os.pipe() for _ in range(4)]
        (read_in, write_in), *outputs = pipes
        request = dict(code=code, arguments=arguments, environment=environment)
        request |= dict(path=sys.path, folder=os.getcwd())
        files = [read_in, *(write for _, write in outputs)]
        socket.send_fds(_server(), [json.dumps(request).encode()], files)
        for file in files:
            os.close(file)
        self.stdin = os.fdopen(write_in, "w")
        self.stdout, self.stderr, self._report = (os.fdopen(read) for read, _ in outputs)
        self.returncode: int | None = None
        digits = iter(functools.partial(self._report.read, 1), " ")
        self.pid = int("".join(digits))

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} runs after {timeout} seconds")
            self.returncode = int(self._report.read())
            self._report.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """The unread rest of stdout and stderr, to the end of the process."""
        if self.stdin is not None:
            self.stdin.close()
        with ThreadPoolExecutor(2) as threads:
            outputs = [threads.submit(file.read) for file in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except TimeoutError:
                self.kill()
                raise
        return outputs[0].result(), outputs[1].result()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_python(code: str, *arguments: str, environment: dict[str, str] | None = None):
    """A process that runs `code` with sys.path as it is here and the standard streams in pipes of text."""
    environment = dict(os.environ if environment is None else environment)
    if sys.platform == "linux":
        return _Forked(code, list(arguments), environment)
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
