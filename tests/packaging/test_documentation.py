"""Every public name has a docstring and a place in the reference; every link of the pages leads somewhere.

`mkdocs build --strict` (.ci/run) checks the site itself.
"""

import inspect
import re
import runpy
from operator import attrgetter

import pytest
from PIL import Image

import diffusion
import diffusion.training.loop
from helpers.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/results/*.md")])
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")
FILE = re.compile(r"`((?:\.ci|benchmarks|csrc|diffusion|docs|kernels|notebooks|tests)/[\w<>./-]*)`")
SAMPLERS = [function.__name__ for function in diffusion.steps.SAMPLERS.values()]
PUBLIC = {
    "diffusion": [name for name in diffusion.__all__ if name not in ("kernels", "steps")],
    "diffusion.kernels": diffusion.kernels.__all__,
    "diffusion.steps": [*SAMPLERS, "SpacingWarning"],
    "diffusion.training.loop": ["train"],
}
NAMES = [f"{module}.{name}" for module, names in PUBLIC.items() for name in names]


def members(cls: type) -> list:
    """The public methods and properties that a class and its bases of this package define."""
    kinds = (property, classmethod, staticmethod)
    return [
        member
        for base in cls.__mro__
        if base.__module__.startswith("diffusion.")
        for name, member in vars(base).items()
        if not name.startswith("_") and (isinstance(member, kinds) or inspect.isfunction(member))
    ]


@pytest.mark.parametrize("path", NAMES)
def test_a_public_name_is_documented(path):
    value = attrgetter(path.removeprefix("diffusion."))(diffusion)
    assert value.__doc__, f"{path} has no docstring"
    if inspect.isclass(value):
        assert not value.__doc__.startswith(f"{value.__name__}("), f"{path} has only Python's own docstring"
        for member in members(value):
            assert member.__doc__, f"a member of {path} has no docstring: {member}"
    entries = runpy.run_path(str(ROOT / "docs" / "_site" / "public_names.py"))["entries"]
    pages = [*(ROOT / "docs" / "reference").glob("*.md")]
    reference = "".join(page.read_text() + entries(f"reference/{page.name}", ROOT) for page in pages)
    assert re.search(rf"^::: {re.escape(path)}$", reference, re.MULTILINE), f"{path} is not in docs/reference"


def test_every_op_has_a_row():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "ops.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    internal = {op.name for op in diffusion.kernels.INTERNAL}
    assert diffusion.kernels.OPS.keys() | internal <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    exec(compile(example, "README.md", "exec"), {})
    with Image.open("pi.png") as picture:
        assert picture.width > picture.height  # three digits in a row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names(page):
    if page.name == "CHANGELOG.md":  # the change log names older versions, too
        return
    for name in FILE.findall(page.read_text()):
        built = name.endswith((".so", "_build.json"))
        assert built or list(ROOT.glob(name.replace("<op>", "*"))), (
            f"{page.name} names {name}, which does not exist"
        )
