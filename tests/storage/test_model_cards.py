"""Model cards and uploads, with a hub that only remembers what it is asked."""

import json
import sys
from pathlib import Path

import pytest
import torch

import diffusion
from helpers.models import make_model

huggingface_hub = pytest.importorskip("huggingface_hub")

RESULT = {
    "metrics": {"fid": 3.25, "kid": 0.0125},
    "protocol": {"reference": "cifar10, train split", "number of samples": 50000, "rounding": "8 | bits"},
}
ACCURACY = {
    "classifier": {"path": "/home/me/weights/mnist-classifier", "test_accuracy": 0.9971},
    "protocol": {"sampler": "dpm++", "steps": 10},
    "class_accuracy": {"accuracy": 0.875, "by_class": [{"asked": 0, "accuracy": 1.0}]},
    "frechet": {"distance": 0.5, "reference": "MNIST: 60,000 digits"},
}


class Hub:
    """In place of huggingface_hub.HfApi."""

    calls: list

    def __init__(self, token=None):
        type(self).calls = [("token", token)]

    def create_repo(self, name, **options):
        if "/" not in name:
            raise RuntimeError(f"no repository {name}\nRequest ID: 1")
        self.calls.append(("create", name, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, *, folder_path, **options):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload", options, files))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


@pytest.fixture(scope="module")
def model():
    return make_model(3, T=20, channels=1)


def test_a_card_holds_the_facts_the_results_and_their_protocol(model, tmp_path):
    path = tmp_path / "accuracy.json"
    path.write_text(json.dumps(ACCURACY))
    text = model.card("me/shapes", results=[RESULT, path], license="mit")
    card = huggingface_hub.ModelCard(text)
    assert (card.data.library_name, card.data.license) == ("fused-diffusion", "mit")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found[("cifar10, train split", "fid")] == 3.25
    assert found[("MNIST", "class accuracy")] == 0.875
    assert sorted(found.values()) == [0.0125, 0.5, 0.875, 3.25]
    for line in (
        "# shapes",
        f"`{model!r}`",
        'model = diffusion.load("hf:me/shapes")',
        "| images | 8 x 8, 1 channel, values [-1.0, 1.0] |",
        "| fid | 3.25 |",
        "| number of samples | 50000 |",
        "| rounding | 8 \\| bits |",
        "| steps | 10 |",
        "| classifier.path | mnist-classifier |",
        "| noise schedule | NoiseSchedule.linear(T=20, beta_start=0.0001, beta_end=0.5) |",
    ):
        assert line in card.text.splitlines()
    assert "/home/me" not in text


def test_a_single_result(model, tmp_path):
    path = tmp_path / "accuracy.json"
    path.write_text(json.dumps(ACCURACY))
    for results in (path, str(path), ACCURACY):
        assert model.card(results=results) == model.card(results=[ACCURACY])


def test_no_folder_of_this_machine_is_in_a_card(tmp_path, monkeypatch):
    """Paths from a root, also within a text, and those that exist; other texts with strokes stay."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hidden" / "runs").mkdir(parents=True)
    model = make_model(3, T=20, channels=1)
    model.metadata = {"origin": "/srv/hidden/a model.pt", "training": {"data": "C:\\hidden\\faces"}}
    protocol = {
        "reference": "/srv/hidden/faces.npz, train split: 100 images",
        "model": "hidden/runs/",
        "command": "evaluate ~/hidden/a --data /srv/hidden/b.npz",
        "code": "https://example.org/owner/name",
        "split": "9/10 and 1/2/3",
    }
    card = huggingface_hub.ModelCard(model.card(results={"metrics": {"fid": 3.25}, "protocol": protocol}))
    assert "hidden" not in card.content
    assert card.data.eval_results[0].dataset_name == "faces.npz, train split"
    for line in (
        "| origin | a model.pt |",
        "| training: data | faces |",
        "| reference | faces.npz, train split: 100 images |",
        "| model | runs |",
        "| command | evaluate a --data b.npz |",
        "| code | https://example.org/owner/name |",
        "| split | 9/10 and 1/2/3 |",
    ):
        assert line in card.text.splitlines()


def test_the_card_of_the_bundled_model_tells_its_training():
    text = diffusion.load("mnist").card("me/digits")
    assert "| training: batch_size | 64 |" in text
    assert "| sampler | name dpm++, steps 10 |" in text
    assert "## Evaluation" not in text


def test_the_example_of_a_card_runs(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labelled = model.card().partition("```python\n")[2].partition("```")[0]
    plain = make_model(T=20, channels=3)
    unlabelled = plain.card().partition("```python\n")[2].partition("```")[0]
    for code, found in ((labelled, model), (unlabelled, plain)):
        monkeypatch.setattr(diffusion, "load", lambda name, found=found: found)
        exec(compile(code, "card", "exec"), {})
        assert Path("samples.png").exists()


def test_a_push_uploads_a_folder_that_loads(model, api, tmp_path):
    url = model.push_to_hub("me/shapes", private=True, token="t", results=[RESULT])
    assert url == "https://huggingface.co/me/shapes"
    token, create, upload = api.calls
    assert token == ("token", "t")
    assert create == ("create", "me/shapes", {"private": True, "exist_ok": True})
    _, options, files = upload
    assert options == {"repo_id": "me/shapes", "commit_message": "Upload model"}
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    again = diffusion.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert files["README.md"].decode() == model.card("me/shapes", results=[RESULT])


def test_an_own_card(model, api):
    model.push_to_hub("me/shapes", card="# mine\n", dtype=torch.float16)
    assert api.calls[-1][2]["README.md"] == b"# mine\n"


def test_what_the_hub_refuses_is_one_line(model, api):
    with pytest.raises(ValueError, match=r"^cannot push to hf:shapes: no repository shapes$"):
        model.push_to_hub("shapes")


def test_a_file_that_is_no_result(model, tmp_path):
    (tmp_path / "a.json").write_text('{"steps": 3}')
    with pytest.raises(ValueError, match=r"a\.json is no result of diffusion evaluate"):
        model.card(results=[tmp_path / "a.json"])
    with pytest.raises(ValueError, match="is no result of diffusion evaluate"):
        model.card(results=[{"protocol": {}}])


def test_without_huggingface_hub(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (model.card, lambda: model.push_to_hub("me/shapes", card="x")):
        with pytest.raises(ValueError, match=r'pip install "fused-diffusion\[hub\]"'):
            call()
