"""The notebooks run, and their stored outputs are the ones that running them gives."""

import ast
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from execute_notebooks import NOTEBOOKS, TIMEOUT, execute, main
from nbclient.exceptions import CellExecutionError, CellTimeoutError

import diffusion
from helpers.paths import FIXTURES
from helpers.training import torchvision_works

MAX_BYTES = 2**20
# An absolute path of POSIX or of Windows, but for what follows a URL's scheme or is part of a relative path.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~<])/\w[\w.-]*/[\w.-]+|(?<!\w)[A-Za-z]:\\\w")
NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NOTEBOOK_STEPS": "4"}


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """The outputs of a cell: its streams, and the media types of its results and pictures."""
    found = set()
    for output in cell.outputs:
        found |= {output.name} if output.output_type == "stream" else set(output.get("data", ["error"]))
    return found


def words(cell: nbformat.NotebookNode) -> list[str]:
    """The printed words of a cell, without numbers, which differ with times and training steps."""
    printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    return NUMBER.sub("#", printed).split()


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """All stored outputs except pictures."""
    found = [json.dumps(notebook.metadata)]
    for cell in notebook.cells:
        found += [cell.source, json.dumps(cell.metadata)]
        for output in cell.get("outputs", []):
            found += [output.get("text", ""), *output.get("traceback", [])]
            data = output.get("data", {})
            found += [value for kind, value in data.items() if not kind.startswith("image/")]
    return found


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == ["1-ddpm-and-guidance.ipynb", "2-train-and-sample.ipynb"]


@pytest.mark.exhaustive
@pytest.mark.skipif(not torchvision_works(), reason="the digits are read by torchvision")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_puts_out_what_is_stored(path, tmp_path):
    stored, notebook = read(path), read(path)
    environment = dict(ENVIRONMENT)
    if path == NOTEBOOKS[1]:  # the other one finds the digits where it looks by itself
        environment["MNIST_DIR"] = str(FIXTURES)
    where = "import sys\nprint(sys.executable, diffusion.__file__, sep='\\n')"
    notebook.cells.append(nbformat.v4.new_code_cell(where))
    execute(notebook, tmp_path, timeout=TIMEOUT, **environment)
    *cells, last = code_cells(notebook)
    assert last.outputs[0].text.splitlines() == [sys.executable, diffusion.__file__]
    for before, after in zip(code_cells(stored), cells, strict=True):
        assert kinds(before) == kinds(after), after.source
        assert words(before) == words(after)
    assert [entry.name for entry in (tmp_path / "notebooks").iterdir()] == []


@pytest.mark.skipif(not torchvision_works(), reason="a notebook imports it")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_is_there(path):
    """The imports are checked by default, because running the notebook takes long."""
    tree = ast.parse("\n".join(cell.source for cell in code_cells(read(path))))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert any("diffusion" in ast.unparse(node) for node in imports)
    for node in imports:
        exec(ast.unparse(node), {})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored(path):
    notebook = read(path)
    assert path.stat().st_size < MAX_BYTES
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [cell.source for cell in cells if kinds(cell) & {"stderr", "error"}]
    assert sum("image/png" in kinds(cell) for cell in cells) >= 5
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell.metadata == {} for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_tells_of_the_machine(path):
    for text in texts(read(path)):
        assert not ABSOLUTE_PATH.search(text), text


@pytest.mark.parametrize(
    "text", ["in /home/somebody/digits", "File '/usr/lib/python3'", r"C:\Users\somebody", "(/a/b.py:3)"]
)
def test_an_absolute_path_is_recognised(text):
    assert ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize(
    "text",
    ["https://arxiv.org/abs/2006.11239", "../tests/fixtures", "runs / name", "data_dir/MNIST/raw"],
)
def test_what_is_no_absolute_path(text):
    assert not ABSOLUTE_PATH.search(text)


def test_a_cell_that_fails_is_an_error(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3")])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook, tmp_path)


def test_a_cell_without_end_is_an_error(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("while True: pass")])
    with pytest.raises(CellTimeoutError):
        execute(notebook, tmp_path, timeout=1)


def test_the_program_stores_the_outputs(tmp_path, monkeypatch):
    path = tmp_path / "sum.ipynb"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(19 + 23)")])
    notebook.metadata.update(read(NOTEBOOKS[0]).metadata)
    nbformat.write(notebook, path)
    monkeypatch.setattr("execute_notebooks.NOTEBOOKS", [path])
    main()
    stored = read(path)
    assert stored.cells[0].outputs[0].text == "42\n"
    assert stored.cells[0].execution_count == 1
    assert stored.metadata == notebook.metadata
    assert stored.cells[0].metadata == {}
