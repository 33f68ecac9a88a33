"""Without the compiled library, sampling and training tell once that plain PyTorch computes."""

import os
import shutil
import warnings

import pytest
import torch

from diffusion.kernels import _native
from diffusion.utils import plain_pytorch
from helpers.models import make_model
from helpers.paths import ROOT
from helpers.processes import start_python


@pytest.fixture
def told(monkeypatch):
    """The warnings of two calls, in a process that has told nothing, without the library for a reason."""

    def call(function, reason: str | None) -> list[str]:
        monkeypatch.setattr(_native, "CPP_MISSING", reason)
        plain_pytorch._tell.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
            function()
        return [str(warning.message) for warning in caught if "plain PyTorch" in str(warning.message)]

    yield call
    plain_pytorch._tell.cache_clear()


def tell() -> None:
    plain_pytorch.tell_of_plain_pytorch(torch.device("cpu"))


def test_the_reason_and_the_remedy(told):
    assert told(tell, "g++ is missing") == [
        "plain PyTorch computes here, which is slower: g++ is missing; install a C++17 compiler and Python's "
        "headers, and then fused-diffusion again"
    ]
    assert told(tell, "it is not installed; run: pip install .") == [
        "plain PyTorch computes here, which is slower: it is not installed; run: pip install ."
    ]
    assert told(tell, None) == []
    assert told(lambda: plain_pytorch.tell_of_plain_pytorch(torch.device("meta")), "g++ is missing") == []


@pytest.mark.parametrize(("backend", "times"), [("auto", 1), ("reference", 0)])
def test_sampling_tells(told, backend, times):
    model = make_model()
    model.sample(steps=1, backend="reference")  # keeps the network that samples
    assert len(told(lambda: model.sample(steps=1, backend=backend), "g++ is missing")) == times


def test_commands_without_the_library(tmp_path, monkeypatch):
    """One line on stderr for both, and "fast" computes in float32, so that it is as fast as "exact"."""
    for name in ("diffusion", "kernels"):
        ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    code = """if True:
        import sys
        sys.path.insert(0, ".")
        import torch, diffusion
        from diffusion.cli import main
        from diffusion.inference.arguments import where_to_sample
        main(["sample", "--steps", "1", "--num", "1", "--precision", "fast", "--out", "a.png"])
        model = diffusion.load("mnist")
        where = [where_to_sample(model.unet, None, None, precision) for precision in ("fast", "exact")]
        assert where[0] == where[1] == (torch.device("cpu"), torch.float32)
        images = [model.sample(3, steps=2, precision=precision) for precision in ("fast", "exact")]
        assert torch.equal(*images)
        net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.SiLU())
        x = torch.randn(1, 1, 8, 8)
        expected = net(x)
        with torch.no_grad():
            assert torch.equal(diffusion.accelerate(net, precision="fast")(x), expected)
    """
    monkeypatch.chdir(tmp_path)
    process = start_python(code, environment=os.environ | {"OMP_NUM_THREADS": "1"})
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    lines = [line for line in errors.splitlines() if "plain PyTorch" in line]
    assert len(lines) == 1
    assert lines[0].startswith("diffusion: warning: plain PyTorch computes here, which is slower: ")
