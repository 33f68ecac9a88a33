"""The names of the package, by `dir`, a star import and attribute access."""

import importlib
import inspect

import pytest

import diffusion
from helpers.processes import start_python
from helpers.thinning import exhaustive_but


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


MODULES_AS_NAMES = [
    "from diffusion.steps import ddim; import diffusion.samplers as s; assert ddim is s.ddim",
    "import diffusion.steps, diffusion.samplers; assert diffusion.steps is diffusion.samplers",
    "import diffusion; assert diffusion.steps is __import__('sys').modules['diffusion.samplers']",
    "import diffusion.kernels as k; import diffusion; assert diffusion.kernels is k and k.attention",
    "import diffusion; assert diffusion.samplers.ddim and diffusion.data.load_dataset",
    "from diffusion import *; assert load and steps.ddim and kernels.attention",
]


@pytest.mark.parametrize("code", exhaustive_but(MODULES_AS_NAMES, default=MODULES_AS_NAMES[::5]))
def test_names_that_are_modules(code):
    process = start_python(code)  # has imported PyTorch alone
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_every_module_is_an_attribute():
    """`diffusion.process.forward` and its like work after `import diffusion` alone, and nonsense does not."""
    code = """if True:
        import functools, pkgutil, types
        import diffusion
        paths, packages = [], [("diffusion", path) for path in diffusion.__path__[:1]]
        for package, path in packages:
            for found in pkgutil.iter_modules([path], f"{package}."):
                if found.name.startswith("diffusion.kernels") or found.name.endswith("__main__"):
                    continue
                paths.append(found.name)
                if found.ispkg:
                    packages.append((found.name, f"{path}/{found.name.rpartition('.')[2]}"))
        assert len(paths) > 100
        for name in paths:
            value = functools.reduce(getattr, name.split(".")[1:], diffusion)
            # Some packages import a function of its module's name, such as `samplers.ddim`.
            assert isinstance(value, types.ModuleType) or value.__module__ == name, name
            if hasattr(value, "__path__"):
                assert not hasattr(value, "nonsense"), name
    """
    process = start_python(code)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
