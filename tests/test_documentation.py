"""Every public name has a docstring and a place in the reference; every link of the pages leads somewhere.

`mkdocs build --strict` (.ci/run) checks the site itself.
"""

import inspect
import re
from pathlib import Path

import pytest

import diffusion
from diffusion import kernels, recipe, steps, train, trainer

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/results/*.md")])
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")
SAMPLERS = [function.__name__ for function in steps.SAMPLERS.values()]
PUBLIC = {
    diffusion: [name for name in diffusion.__all__ if name not in ("kernels", "steps")],
    kernels: kernels.__all__,
    steps: [*SAMPLERS, "SpacingWarning"],
    recipe: ["Recipe"],
    trainer: ["Trainer"],
    train: ["train"],
}
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names]


def members(cls: type) -> list:
    """The public methods and properties that a class defines itself."""
    kinds = (property, classmethod, staticmethod)
    return [
        member
        for name, member in vars(cls).items()
        if not name.startswith("_") and (isinstance(member, kinds) or inspect.isfunction(member))
    ]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda value: getattr(value, "__name__", value))
def test_a_public_name_is_documented(module, name):
    value = getattr(module, name)
    assert value.__doc__, f"{name} has no docstring"
    assert not value.__doc__.startswith(f"{name}("), f"{name} has only the docstring that Python made"
    if inspect.isclass(value):
        for member in members(value):
            assert member.__doc__, f"a member of {name} has no docstring: {member}"
    path = f"{module.__name__}.{name}"
    reference = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    assert re.search(rf"^::: {re.escape(path)}$", reference, re.MULTILINE), f"{path} is not in docs/reference"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
