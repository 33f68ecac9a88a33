"""The command line: `main`, and a module for each command of `commands.COMMANDS`.

PyTorch is imported only when a command runs. `recorded_help` prints the help of all commands without it.
"""

import argparse
import contextlib
import io
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, Protocol

from .. import __version__
from ..utils.errors import printable
from ..utils.modules import importing
from . import recorded_help

__getattr__ = importing(__name__)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:  # argparse parses `--opt=--` differently between versions
            option, equals, value = word.partition("=")
            if option.startswith("--") and equals and value == "--":
                self.error(f"{option} needs a value; '--' is not one")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        fail(self.prog, message)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command. Exit status: 0; 2 after a user's error, with one line on stderr; 130 after Ctrl-C."""
    escape_unencodable_names()
    words = sys.argv[1:] if arguments is None else arguments
    if not words or not {"-h", "--help", "--version"}.isdisjoint(words):
        make_parser(recorded_help.read()).parse_args(words)  # prints, and ends the process
    from .commands import COMMANDS

    parsed = make_parser(COMMANDS).parse_args(words)
    with one_line_errors("diffusion"), _cleaning_up(parsed.command):
        COMMANDS[parsed.command].run(parsed)


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the process with one line after a user's error, Ctrl-C or a closed pipe; shows warnings in one."""
    from ..kernels._native import check_environment
    from ..training.signals import Stopped
    from ..utils.memory import is_out_of_memory

    try:
        check_environment()
        with warnings.catch_warnings():
            warnings.showwarning = _teller_of_warnings()
            yield
    except Stopped as error:
        print(f"\nstopped at step {error.step}; go on with --resume", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        fail(program, str(error) or type(error).__name__)


class Command(Protocol):
    """A module of this folder, or the record of its help."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...


def make_parser(commands: Mapping[str, Command]) -> Parser:
    """The parser of the whole command line."""
    parser = Parser(prog="diffusion", description="Sample from, train and evaluate diffusion models.")
    parser.add_argument("--version", action="version", version=f"fused-diffusion {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        summary = (command.__doc__ or "").partition("\n")[0]
        subparser = subparsers.add_parser(name, help=summary, description=command.__doc__)
        command.add_arguments(subparser)
    return parser


@contextlib.contextmanager
def _cleaning_up(command: str) -> Iterator[None]:
    """Has SIGTERM end an import or an export by an exception, so that half-written files are deleted."""
    if command not in ("import", "export") or threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former or signal.SIG_DFL)


def _teller_of_warnings() -> Callable[..., None]:
    """Prints each warning once, in one line, without its position in the code."""
    told = set()

    def tell(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
        line = f"diffusion: warning: {printable(str(message))}"
        if line not in told:
            told.add(line)
            print(line, file=sys.stderr)

    return tell


def escape_unencodable_names() -> None:
    """Makes stdout escape characters of file names that its encoding lacks, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def fail(program: str, message: str) -> NoReturn:
    """Ends the process after a user's error: one line on stderr, exit status 2."""
    print(f"{program}: {printable(message)}", file=sys.stderr)
    sys.exit(2)
