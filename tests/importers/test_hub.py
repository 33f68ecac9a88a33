"""Models of the hub from huggingface_hub's own cache, which the tests lay out, without a network."""

import hashlib
import json
import os
from pathlib import Path

import diffusers
import pytest
import torch

from helpers.processes import start_python
from helpers.unet2d import SMALL, original

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OUTPUTS = """
import json, sys, torch, diffusion
for name, flags in json.loads(sys.argv[1]).items():
    model = diffusion.load(f"hf:{name}", flags=flags)
    x = torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)
    with torch.no_grad():
        print(json.dumps(model.unet(x, torch.tensor([7])).flatten().tolist()))
"""


def outputs(model: diffusers.UNet2DModel) -> torch.Tensor:
    x = torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)
    with torch.no_grad():
        return model(x, torch.tensor([7])).sample.flatten()


def cache(home: Path, name: str, folder: Path) -> None:
    """Lays out a repository in the cache: blobs by their hash, a snapshot of links to them, and its name."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.write_bytes(path.read_bytes())
            link = repository / "snapshots" / COMMIT / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))


def run(home: Path, code: str, *arguments: str, offline: bool = True) -> tuple[int, str, str]:
    """The exit status, standard output and standard error of a process with this cache."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
    }
    # Nothing listens on port 9, in case that the cache does not suffice.
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    process = start_python(code, *arguments, environment=environment)
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def test_repositories_in_the_cache(tmp_path):
    """A pipeline, one with a variant alone, one in shards, one without folders, and a UNet alone."""
    model, home = original(SMALL), tmp_path / "home"
    pipeline = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "whole")
    pipeline.save_pretrained(tmp_path / "variant", variant="fp16")
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="40KB", variant="fp16")
    model.save_pretrained(tmp_path / "flat", safe_serialization=False)
    pipeline.scheduler.save_pretrained(tmp_path / "flat")
    model.save_pretrained(tmp_path / "bare")
    flags = {f"owner/{name}": {} for name in ("whole", "variant", "shards", "flat")}
    flags["owner/bare"] = {"schedule": "linear"}
    for name in flags:
        cache(home, name, tmp_path / name.removeprefix("owner/"))
    status, output, errors = run(home, OUTPUTS, json.dumps(flags))
    assert status == 0, errors
    expected = outputs(model)
    lines = output.splitlines()
    assert len(lines) == len(flags)
    for line in lines:
        assert (torch.tensor(json.loads(line)) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "offline", [pytest.param(True, marks=pytest.mark.exhaustive), False], ids=["offline", "no network"]
)
def test_repositories_that_are_not_there(offline, tmp_path):
    """One line, exit status 2, and nothing is written."""
    out = tmp_path / "out"
    code = "import sys; from diffusion.cli import main; main(sys.argv[1:])"
    arguments = ("import", "hf:owner/name", "--out", str(out))
    status, output, errors = run(tmp_path / "home", code, *arguments, offline=offline)
    assert status == 2
    assert errors.startswith("diffusion: cannot fetch hf:owner/name: ")
    assert errors.count("\n") == 1
    assert output == ""
    assert not out.exists()
