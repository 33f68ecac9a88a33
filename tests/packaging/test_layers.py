"""The order of the package's layers: a module imports from its own layer and from those below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.paths import ROOT

LAYERS = [
    "kernels",
    "utils",
    "planner",
    "process",
    "models",
    "samplers",
    "steps",
    "inference",
    "storage",
    "importers",
    "data",
    "ddpm",
    "exporters",
    "certificates",
]
LAYERS += ["training", "classifier", "evaluation", "cli"]
LEVEL = {name: level for level, name in enumerate(LAYERS)}
PROGRAMS = ("diffusion/__main__.py", "diffusion/classifier/__main__.py")  # on top, as cli is
MODULES = sorted([*ROOT.glob("diffusion/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def layer_of(path: Path) -> str:
    where = str(path.relative_to(ROOT))
    return "cli" if where in PROGRAMS else where.removeprefix("diffusion/").split("/")[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the layer of each import from this package, wherever in the module it is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = [*(["diffusion"] if parts[0] == "kernels" else []), *parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "diffusion" and name[1:] != ["__version__"]:
                yield node.lineno, name[1] if len(name) > 1 else ""


def test_every_module_has_a_layer():
    found = {layer_of(path) for path in MODULES} - {"__init__"}
    assert found == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_leads_upwards(path):
    if path == ROOT / "diffusion" / "__init__.py":
        return
    layer = layer_of(path)
    upwards = [
        f"line {line}: {layer} imports {other or 'the whole package'}"
        for line, other in imported(path)
        if LEVEL.get(other, len(LAYERS)) > LEVEL[layer]
    ]
    assert not upwards
