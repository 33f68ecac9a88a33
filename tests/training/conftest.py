"""A run of training that others are compared with."""

import pytest

from helpers.training import run


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("unbroken")
    run(out)
    return out
