"""The commands of the command line: each module has `add_arguments`, `run`, and its help as its docstring."""
