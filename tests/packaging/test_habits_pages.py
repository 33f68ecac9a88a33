"""The pages for people who come from diffusers and from the notebooks: their examples and tables hold."""

import json
import re
from operator import attrgetter

import diffusers
import pytest
import torch

import diffusion
from diffusion.cli import recorded_help
from diffusion.importers.diffusers_scheduler import EXACT
from diffusion.importers.diffusers_words import KEYWORDS
from diffusion.samplers import SAMPLERS, options_of
from helpers.models import make_model
from helpers.paths import ROOT
from helpers.unet2d import SMALL, original

PAGES = ("from-diffusers.md", "from-the-notebooks.md")


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def examples(page: str) -> str:
    """The blocks of Python of a page as one program."""
    return "\n".join(re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL))


def test_the_examples_for_people_who_come_from_diffusers(tmp_path, monkeypatch):
    """They run with a small network, whose output is small: rounding then does not grow over the 50 steps."""
    unet = original(SMALL | {"sample_size": 32, "block_out_channels": [8, 8]})
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.01)
    pipeline = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(diffusers.DDIMPipeline, "from_pretrained", lambda name: pipeline)
    monkeypatch.chdir(tmp_path)
    exec(compile(examples(PAGES[0]), PAGES[0], "exec"), {})
    assert (tmp_path / "samples.png").exists()


def test_the_example_for_people_who_come_from_the_notebooks(tmp_path, monkeypatch):
    model = make_model(10, T=20, channels=1)
    monkeypatch.setattr(diffusion, "load", lambda name: {"model.pth": model}[name])
    monkeypatch.chdir(tmp_path)
    exec(compile(examples(PAGES[1]), PAGES[1], "exec"), {})
    assert (tmp_path / "sample.png").exists()


def test_the_arguments_of_diffusers_have_their_row():
    """The left column holds keywords that are refused with advice, or are this package's, too."""
    table = text_of(PAGES[0]).partition("## Arguments")[2].partition("## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", table, re.MULTILINE)
    assert len(rows) > 10
    known = {"batch_size", "guidance_scale", *(o for s in SAMPLERS for o in options_of(s))}
    for left, _ in rows:
        for word in re.findall(r"`(\w+)`", left):
            assert word in KEYWORDS or word in known


def test_the_schedulers_of_diffusers_have_their_row():
    """All that are read as a sampler of this package, with that sampler."""
    table = text_of(PAGES[0]).partition("## Schedulers")[2].partition("## ")[0]
    rows = re.findall(r"^\| (`.*?) \| `\"(.*?)\"`", table, re.MULTILINE)
    found = {name: sampler for left, sampler in rows for name in re.findall(r"`(\w+)`", left)}
    assert found == {name: read({})["name"] for name, read in EXACT.items()}


@pytest.mark.parametrize("page", PAGES)
def test_the_options_of_the_command_line_exist(page):
    """Every option in the column of this package."""
    commands = json.loads(recorded_help.FILE.read_text(encoding="utf-8"))
    options = {name for command in commands.values() for name in command["arguments"]}
    ours = [line.split(" | ", 1)[1] for line in text_of(page).splitlines() if line.startswith("| `")]
    found = {name for cell in ours for name in re.findall(r"(?<![\w-])--[\w-]+", cell)}
    assert found
    assert found <= options


@pytest.mark.parametrize("page", PAGES)
def test_the_names_of_the_package_exist(page):
    for path in re.findall(r"`diffusion\.([\w.]+)\(", text_of(page)):
        assert callable(attrgetter(path)(diffusion))
    for name in re.findall(r"`model\.(\w+)\(", text_of(page)):
        assert hasattr(diffusion.DDPM, name) or name in ("unet", "schedule")
