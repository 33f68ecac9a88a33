"""Fixtures of all tests: small models, and each instruction set in turn."""

import functools
import gc
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from diffusion import DDPM
from diffusion.kernels import _native
from diffusion.planner.state import ModuleState
from helpers.models import make_model
from helpers.native import TESTED
from helpers.thinning import in_eighth, mark_exhaustive

# The models here are too small for more: on a busy machine, threads would only wait for each other.
torch.set_num_threads(1)


settings.register_profile("default", deadline=None, max_examples=10)
settings.register_profile("exhaustive", deadline=None, max_examples=60)


def pytest_addoption(parser):
    parser.addoption("--eighth", metavar="SEED", help="of the exhaustive tests, run an eighth")


def pytest_configure(config):
    """Hypothesis tries more examples where the exhaustive tests are not left out.

    A shell lets what it starts in the background ignore Ctrl-C; tests send this signal to themselves.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.load_profile("default" if "not exhaustive" in config.option.markexpr else "exhaustive")


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(config, items):
    mark_exhaustive(items)
    seed = config.getoption("eighth")
    if seed is not None:
        exhaustive = [item for item in items if item.get_closest_marker("exhaustive")]
        left_out = {item for item in exhaustive if not in_eighth(item.nodeid, seed)}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish():
    """Modules and collected tests stay to the end, so that the garbage collector need not look at them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=TESTED)
def simd(request):
    """Each instruction set that is tested, in use."""
    _native.use_simd(request.param)
    yield request.param
    _native.use_simd("best")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """The warning about spacings is not given: most tests take few steps, wherever those start."""
    monkeypatch.setattr("diffusion.samplers.timesteps._warned", True)


@functools.cache
def _made(num_classes: int | None) -> tuple[DDPM, ModuleState]:
    model = make_model(num_classes)
    return model, ModuleState(model)


def _shared(num_classes: int | None) -> Iterator[DDPM]:
    """The model of the tests before, with the plans made for it; a new one after a test that altered it."""
    model, state = _made(num_classes)
    yield model
    if not state.holds(whole=True):
        _made.cache_clear()


@pytest.fixture
def model():
    """An unconditional model."""
    yield from _shared(None)


@pytest.fixture
def conditional():
    """A model of ten classes."""
    yield from _shared(10)
