"""The names of the package, by `dir`, a star import and attribute access."""

import importlib
import inspect

import pytest

import diffusion
from helpers.processes import start_python


def test_the_package_shows_its_public_names_only():
    shown = [name for name in dir(diffusion) if not name.startswith("_")]
    assert sorted(shown) == sorted(diffusion.__all__) == sorted(set(diffusion.__all__))
    for name in diffusion.__all__:
        assert not inspect.ismodule(getattr(diffusion, name)) or name in ("kernels", "steps")


def test_a_public_name_comes_from_its_module():
    for name, module in diffusion._MODULES.items():
        assert getattr(diffusion, name) is getattr(importlib.import_module(f"diffusion.{module}"), name)
    assert set(diffusion._MODULES) | {"kernels", "steps"} == set(diffusion.__all__)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'diffusion' has no attribute 'nonsense'"):
        diffusion.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        from diffusion import nonsense  # noqa: F401


@pytest.mark.parametrize(
    "code",
    [
        "from diffusion.steps import ddim; import diffusion.samplers as s; assert ddim is s.ddim",
        "import diffusion.steps, diffusion.samplers; assert diffusion.steps is diffusion.samplers",
        "import diffusion; assert diffusion.steps is __import__('sys').modules['diffusion.samplers']",
        "import diffusion.kernels as k; import diffusion; assert diffusion.kernels is k and k.attention",
        "import diffusion; assert diffusion.samplers.ddim and diffusion.data.load_dataset",
        "from diffusion import *; assert load and steps.ddim and kernels.attention",
    ],
)
def test_names_that_are_modules(code):
    process = start_python(code)  # has imported PyTorch alone
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
