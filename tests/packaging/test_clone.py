"""A clone that is run as it is: with the libraries of an installation, if they are of the same sources."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from diffusion import __version__
from diffusion.kernels import _native
from diffusion.kernels._sources import digest_of_sources
from helpers.native import requires_native
from helpers.paths import ROOT

pytestmark = requires_native


@pytest.fixture
def clone(tmp_path):
    """The package's sources, without libraries, and an installation's folder that has them."""
    clone, site = tmp_path / "clone", tmp_path / "site"
    for name in ("diffusion", "kernels", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "weights")
        shutil.copytree(ROOT / name, clone / name, ignore=ignored)
    installed = site / "diffusion" / "kernels"
    installed.mkdir(parents=True)
    shutil.copy(_native.FOLDER / _native.CPP_FILE, installed)
    record = {"sources": digest_of_sources(ROOT / "csrc"), "cpp": {}}
    (installed / "_build.json").write_text(json.dumps(record))
    information = site / f"fused_diffusion-{__version__}.dist-info"
    information.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: fused-diffusion\nVersion: {__version__}\n"
    (information / "METADATA").write_text(metadata)
    return clone, site


def info(clone, site, before="") -> str:
    """The clone's report on its kernels; `before` is run first."""
    script = "from diffusion import kernels; print(kernels.build_info())"
    words = [sys.executable, "-S", "-c", before + script]
    path = os.pathsep.join([str(site), *(entry for entry in sys.path if entry.endswith("site-packages"))])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        words, cwd=clone, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_the_installation_serves(clone):
    found = info(*clone)
    assert "'cpp': 'loaded'" in found
    assert str(clone[1] / "diffusion" / "kernels") in found


@pytest.mark.exhaustive
def test_other_sources(clone):
    (clone[0] / "csrc" / "convolution" / "args.h").write_text("// changed\n")
    assert "are not of this clone's sources; run: pip install ." in info(*clone)


@pytest.mark.exhaustive
def test_no_installation(clone):
    none = "import importlib.metadata; importlib.metadata.distributions = lambda **_: []; "
    assert "this clone is not installed; run: pip install ." in info(*clone, before=none)


@pytest.mark.exhaustive
def test_an_installation_without_libraries(clone):
    record = clone[1] / "diffusion" / "kernels" / "_build.json"
    reason = {"cpp": {"reason": "there is no C++ compiler g++ or clang++"}}
    record.write_text(json.dumps(json.loads(record.read_text()) | reason))
    (record.parent / _native.CPP_FILE).unlink()
    assert "the cpp library was not built: there is no C++ compiler" in info(*clone)
