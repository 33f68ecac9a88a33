"""Records the arguments of all commands: `python -m diffusion.cli.record_help` writes help.json."""

import argparse
import json
from typing import Any

from ..classifier import command as classifier
from .commands import COMMANDS
from .recorded_help import ACTIONS, CLASSIFIER, FILE


def text() -> str:
    """The contents of help.json, an argument in each line."""
    programs: dict[str, Any] = COMMANDS | {CLASSIFIER: classifier}
    return json.dumps({name: _record(command) for name, command in programs.items()}, indent=1) + "\n"


def _record(command: Any) -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False)
    command.add_arguments(parser)
    arguments = {(action.option_strings or [action.dest])[0]: _options(action) for action in parser._actions}
    return {"description": command.__doc__, "epilog": parser.epilog, "arguments": arguments}


def _options(action: argparse.Action) -> dict[str, Any]:
    """The arguments of `add_argument` for an action, but for its name."""
    kind = type(action).__name__
    options: dict[str, Any] = {"help": action.help, "default": action.default}
    if kind in ACTIONS:
        options["action"] = kind
    if kind not in ("_StoreTrueAction", "BooleanOptionalAction"):
        options |= {"nargs": action.nargs, "metavar": action.metavar, "choices": action.choices}
        options["type"] = getattr(action.type, "__name__", None)
    if action.option_strings:
        options["required"] = action.required
    return {name: value for name, value in options.items() if value is not None and value is not False}


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
