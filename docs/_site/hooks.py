"""MkDocs hooks: the package as it is installed, and pages from files that lie outside docs/."""

import re
import shutil
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from public_names import entries

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md"}
PAGES |= {name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "NOTICE.md", "SECURITY.md")}
RESULTS = "benchmarks/results/"  # reports and plots, under the same path in the site
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)([^)]*)\)")
_sources = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings reads its configuration
def on_config(config):
    """Lets mkdocstrings read the sources with kernels/ inside diffusion/, where an installation has it."""
    package = Path(_sources.name, "diffusion")
    python_only = shutil.ignore_patterns("__pycache__", "weights", "recipes", "*.so")
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "diffusion", package, ignore=python_only)
    (package / "steps.py").unlink()  # for Griffe, it would hide the package of samplers
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=python_only)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_sources.name]
    return config


def on_files(files, config):
    """Adds the pages of the repository's root, and the reports of the benchmarks."""
    for name, page in PAGES.items():
        text = _LINK.sub(_from_root, (ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.suffix in (".md", ".png", ".svg"):
            files.append(File.generated(config, RESULTS + path.name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of docs/ to the repository's root lead to the site's copies of those files.

    Pages of the reference get the entries of ops and samplers.
    """
    return _LINK.sub(_from_docs, markdown + entries(page.file.src_uri, ROOT))


def _from_root(link):
    """A link of a page of the repository's root. Files that are no page of the site become plain text."""
    picture, text, target, anchor = link.groups()
    if (ROOT / target).exists() and target not in PAGES and not target.startswith(("docs/", RESULTS)):
        return text
    return f"{picture}[{text}]({PAGES.get(target, target.removeprefix('docs/'))}{anchor})"


def _from_docs(link):
    picture, text, target, anchor = link.groups()
    name = target.removeprefix("../")
    if target == name or not (name in PAGES or name.startswith(RESULTS)):
        return link[0]
    return f"{picture}[{text}]({PAGES.get(name, name)}{anchor})"
