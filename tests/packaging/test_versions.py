"""A version that several files state is the same in all of them."""

import re

import pytest

from diffusion import __version__
from helpers.paths import ROOT

TEXTS = {
    name: (ROOT / name).read_text() for name in ("pyproject.toml", ".pre-commit-config.yaml", "CITATION.cff")
}


def test_the_version_of_the_citation():
    assert re.findall(r"^version: (.+)$", TEXTS["CITATION.cff"], re.MULTILINE) == [__version__]


@pytest.mark.parametrize(
    ("tool", "hooks"), [("ruff", "ruff-pre-commit"), ("clang-format", "mirrors-clang-format")]
)
def test_the_versions_of_the_linters(tool, hooks):
    """Each extra asks for the version that runs before a commit."""
    (pinned,) = re.findall(rf"/{hooks}\n +rev: v(\S+)", TEXTS[".pre-commit-config.yaml"])
    asked = re.findall(rf'"({tool}[^"]*)"', TEXTS["pyproject.toml"])
    assert asked
    assert set(asked) == {f"{tool}=={pinned}"}
