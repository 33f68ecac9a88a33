"""The command that trains a classifier: python -m diffusion.classifier."""

import sys

from ..cli import Parser, escape_unencodable_names, one_line_errors, recorded_help

PROGRAM = recorded_help.CLASSIFIER


def main(arguments: list[str] | None = None) -> None:
    """Trains a classifier. Exit status as that of `diffusion.cli.main`."""
    escape_unencodable_names()
    words = sys.argv[1:] if arguments is None else arguments
    recorded = recorded_help.read_program(PROGRAM)
    parser = Parser(prog=PROGRAM, description=recorded.__doc__)
    recorded.add_arguments(parser)
    parsed = parser.parse_args(words)  # prints the help, where it is asked for, without PyTorch
    from .command import run

    with one_line_errors(PROGRAM):
        run(parsed)


if __name__ == "__main__":
    main()
