"""Executes the notebooks. As a program it stores their outputs: `python tests/execute_notebooks.py`."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

import diffusion
from diffusion.storage.atomic import replacing
from helpers.paths import FIXTURES, ROOT

TIMEOUT = 300  # seconds, with a kernel on a machine however busy
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(
    notebook: nbformat.NotebookNode, folder: Path, timeout: int | None = None, **environment: str
) -> None:
    """Runs all cells and puts their outputs into `notebook`.

    CellExecutionError where a cell fails, CellTimeoutError where one takes more than `timeout` seconds.

    The kernel runs this interpreter, imports this package, and works in a new `folder/notebooks` beside a
    copy of the tests' digits, so that the default paths hold and nothing is written into the repository.
    """
    work = folder / "notebooks"
    work.mkdir()
    shutil.copytree(FIXTURES / "MNIST", folder / "tests" / "fixtures" / "MNIST")
    package = str(Path(diffusion.__file__).parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "IPYTHONDIR": str(folder),
        **environment,
    }
    # No folders to look for kernels in: only this interpreter's own kernel remains.
    kernels = AsyncKernelManager(
        kernel_name="python3",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
        connection_file=str(folder / "kernel.json"),
    )
    client = NotebookClient(
        notebook,
        km=kernels,
        resources={"metadata": {"path": str(work)}},
        timeout=timeout,
        startup_timeout=TIMEOUT,
        iopub_timeout=TIMEOUT,  # for what a cell has put out: else it would be left out
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=environment, cleanup_kc=True)


def main() -> None:
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        metadata = dict(notebook.metadata)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        notebook.metadata.clear()
        notebook.metadata.update(metadata)  # without the version of this Python
        with replacing(path) as (temporary,):
            nbformat.write(notebook, temporary)
        print(path.name, file=sys.stderr)


if __name__ == "__main__":
    main()
