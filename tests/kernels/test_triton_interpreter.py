"""Runs the Triton kernels on the CPU, in Triton's interpreter, which has to be chosen before Triton loads."""

import importlib.util
import os
import subprocess
import sys

import pytest

from diffusion.kernels import _triton
from helpers.paths import ROOT

OPS = ROOT / "tests" / "kernels" / "ops"
FILES = ("triton", "philox", "reverse_step", "reverse_step_in_place")
# Without the largest cases: they would take minutes each. Without logits in the thousands in float32: the
# gradient takes them from products of keys and queries, which NumPy may round otherwise than those of queries
# and keys.
SELECTION = "triton and not millions and not Distribution and not imagenet64 and not (reverse_step and many)"
SELECTION += " and not (extreme and torch.float32)"
pytestmark = pytest.mark.skipif(
    _triton.MISSING is not None or _triton.INTERPRETED, reason="no Triton, or already in its interpreter"
)


# A case of each kernel.
REPRESENTATIVES = "(test_norm and odd_channels_last and float32 or test_attention and packed and float32"
REPRESENTATIVES += " or test_value and multistep and float32 or test_channels_of_a_wider or box_muller)"


@pytest.mark.parametrize(
    ("marks", "selection"),
    [
        (None, f"{SELECTION} and {REPRESENTATIVES}"),
        pytest.param(None, f"{SELECTION} and not ({REPRESENTATIVES})", marks=pytest.mark.slow),
        pytest.param("exhaustive", SELECTION, marks=pytest.mark.exhaustive),
    ],
    ids=["representatives", "others", "exhaustive"],
)
def test_in_the_interpreter(marks, selection):
    """The parametrisations that run by default, or those that are left for .ci/run."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    command += [] if marks is None else ["-m", marks]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [*command, "-k", selection, *(str(OPS / f"test_{name}.py") for name in FILES)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


def test_the_package_works_without_triton(tmp_path):
    """macOS and Windows have no Triton: the reason is given, and nothing tries to import it."""
    assert importlib.util.find_spec("triton")
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
sys.modules["triton"] = None
from diffusion import kernels
x = torch.randn(2, 4, 3)
kernels.group_norm_silu(x, 2)
kernels.philox_normal((2, 3), seed=1)
print(kernels.explain("group_norm_silu", x, 2))
print(kernels.explain("philox_normal", (2, 3), seed=1))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("not triton: the package triton is not installed") == 2


def test_importing_the_package_does_not_import_triton():
    program = "import sys, torch; before = 'triton.language' in sys.modules; import diffusion; "
    program += "print(before, 'triton.language' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True
    )
    if result.stdout == "True True\n":
        pytest.skip("torch imports triton itself")
    assert result.stdout == "False False\n"
