"""The types of the public names: the client that .ci/run hands to `mypy --strict` also runs."""

import importlib.util
from pathlib import Path
from types import UnionType
from typing import get_origin

import pytest

from helpers.paths import ROOT

CLIENT = Path(__file__).with_name("typed_client.py")


def assert_value(value, kind):
    """Replaces typing.assert_type, which does nothing when it is called."""
    generic = get_origin(kind) not in (None, UnionType)
    assert isinstance(value, get_origin(kind) if generic else kind)
    return value


@pytest.fixture(scope="module")
def client():
    spec = importlib.util.spec_from_file_location("typed_client", CLIENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.assert_type = assert_value
    return module


@pytest.mark.parametrize("name", ["sample", "fit"])
def test_typed_client_reads_and_writes_files(client, name, tmp_path):
    getattr(client, name)(tmp_path)
    assert list(tmp_path.rglob("model.safetensors"))


@pytest.mark.parametrize("name", ["compose", "operate"])
def test_typed_client_computes(client, name):
    getattr(client, name)()


def test_package_declares_its_types():
    assert (ROOT / "diffusion" / "py.typed").exists()
