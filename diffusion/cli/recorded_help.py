"""The arguments of all commands, recorded in help.json, so that help is printed without importing PyTorch.

Options take their names and words from samplers, recipes and importers, whose modules need PyTorch. After a
change of an option, `python -m diffusion.cli.record_help` writes the file anew; a test compares it with the
commands.
"""

import argparse
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("help.json")
CLASSIFIER = "python -m diffusion.classifier"  # the program beside the commands
TYPES = {"int": int, "float": float, "str": str}
# Actions of arguments by their classes, for `add_argument`; other arguments store their values.
ACTIONS: dict[str, Any] = {
    "_StoreTrueAction": "store_true",
    "_AppendAction": "append",
    "_ExtendAction": "extend",
    "BooleanOptionalAction": argparse.BooleanOptionalAction,
}


class RecordedCommand:
    """A command of help.json, with the same help and the same errors of the parser as the command itself."""

    def __init__(self, record: dict[str, Any]):
        self.__doc__ = record["description"]
        self._record = record

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the recorded arguments."""
        for name, options in self._record["arguments"].items():
            options = dict(options)
            if "action" in options:
                options["action"] = ACTIONS[options["action"]]
            if "type" in options:
                options["type"] = TYPES[options["type"]]
            if isinstance(options.get("metavar"), list):
                options["metavar"] = tuple(options["metavar"])
            parser.add_argument(name, **options)
        if self._record["epilog"] is not None:
            parser.epilog = self._record["epilog"]
            parser.formatter_class = argparse.RawDescriptionHelpFormatter


def read() -> dict[str, RecordedCommand]:
    """The recorded commands, by name."""
    return {name: RecordedCommand(record) for name, record in _records().items() if name != CLASSIFIER}


def read_program(name: str) -> RecordedCommand:
    """The recorded arguments of a program beside the commands: CLASSIFIER."""
    return RecordedCommand(_records()[name])


def _records() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))
