"""`diffusion export`: the files it writes, and one line and status 2 for what it cannot do."""

import json
import os
import signal

import pytest
import torch

from diffusion import load
from diffusion.cli import main
from diffusion.exporters import diffusers
from helpers.architectures import batch_of, other
from helpers.models import make_model


def test_a_program(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = other("context_unet")
    model.save("digits")
    main(["export", "--model", "digits", "--program", "digits.pt2"])
    assert capsys.readouterr().out == "digits.pt2: the network as a program of torch.export\n"
    program = torch.export.load("digits.pt2").module()
    x, *others = batch_of(model, 3)
    assert program(x, *others).shape == x.shape


def test_a_folder_of_diffusers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model(T=40, sampler={"name": "ddim", "steps": 8}).save("model")
    main(["export", "--model", "model", "--out", "pipeline"])
    call = "num_inference_steps=8, eta=0.0, use_clipped_model_output=False"
    assert capsys.readouterr().out == f"pipeline: a pipeline of diffusers; call it with {call}\n"
    main(["import", "pipeline", "--out", "again"])
    assert load("again").sampler == {"name": "ddim", "steps": 8}


def test_another_sampler_than_the_models(tmp_path, monkeypatch, capsys):
    """No pipeline of diffusers calls UniPC. A folder of DDIM is read as the model that it was."""
    monkeypatch.chdir(tmp_path)
    make_model(T=40, sampler={"name": "unipc", "steps": 8}).save("model")
    with pytest.raises(SystemExit):
        main(["export", "--model", "model", "--out", "pipeline"])
    assert "export another one by sampler and steps: ddpm, ddim, dpm++" in capsys.readouterr().err
    main(["export", "--model", "model", "--out", "pipeline", "--sampler", "ddim", "--steps", "10"])
    assert "call it with num_inference_steps=10, eta=0.0" in capsys.readouterr().out
    names = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert names["_class_name"] == "DDIMPipeline"
    assert load("pipeline").sampler == {"name": "unipc", "steps": 8}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "export needs "),
        (["--sampler", "ddim", "--onnx", "a.onnx"], "--sampler needs --out"),
        (["--out", "a", "--model", "quad"], "spacing 'quad' cannot be exported"),
        (["--onnx", "."], "cannot write .: it is a folder"),
        (["--out", "a", "--program", "."], "cannot write .: it is a folder"),
        (["--model", "nowhere", "--onnx", "a.onnx"], "unknown model 'nowhere'"),
    ],
)
def test_what_cannot_be_exported(words, message, tmp_path, monkeypatch, capsys):
    make_model(T=40, sampler={"name": "ddim", "steps": 8, "spacing": "quad"}).save(tmp_path / "quad")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(["export", *words])
    assert error.value.code == 2
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["quad"]


def test_a_terminated_export_leaves_no_file(tmp_path, monkeypatch):
    make_model().save(tmp_path / "model")
    former = signal.getsignal(signal.SIGTERM)

    def terminate(*_):
        assert signal.getsignal(signal.SIGTERM) != former  # which would end the tests
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(diffusers, "save_file", terminate)
    with pytest.raises(SystemExit) as ended:
        main(["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "pipeline")])
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == former
    assert not [path for path in (tmp_path / "pipeline").rglob("*") if path.is_file()]
