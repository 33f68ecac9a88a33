"""The commands, by name."""

from . import evaluate, export, import_model, info, sample, train

COMMANDS = {
    "sample": sample,
    "train": train,
    "evaluate": evaluate,
    "import": import_model,
    "export": export,
    "info": info,
}
