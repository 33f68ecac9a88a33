"""Exported networks run elsewhere: ONNX Runtime and `torch.export` give what the network gives."""

import sys
from dataclasses import replace

import pytest
import torch

from diffusion import DDPM, NoiseSchedule
from diffusion.exporters import onnx as onnx_format
from diffusion.exporters.onnx import to_onnx
from diffusion.exporters.program import save_program, to_exported_program
from diffusion.models.registry import build
from helpers.architectures import MODELS, OTHERS, batch_of, expected_of, other
from helpers.models import make_model
from helpers.thinning import exhaustive_but
from helpers.unets import VARIANTS, randomized

BATCHES = (1, 3, 8)
TOLERANCE = 2e-5  # of the largest number in the output


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.01
    assert (found - expected).abs().max() <= TOLERANCE * max(1, expected.abs().max())


@pytest.mark.parametrize("name", exhaustive_but(MODELS, default=["conv_stack"]))
def test_onnx_runtime_gives_the_same(name, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = MODELS[name](), tmp_path / "network.onnx"
    to_onnx(model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}  # operators of ONNX alone
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    assert names == ["x", "timesteps", "labels"][: len(names)]
    for size in BATCHES:
        inputs = batch_of(model, size)
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        (found,) = session.run(["output"], feed)
        assert_close(torch.from_numpy(found), expected_of(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", exhaustive_but(MODELS, default=["conditional"]))
def test_a_saved_program_gives_the_same(name, tmp_path):
    model, path = MODELS[name](), tmp_path / "network.pt2"
    save_program(model, path)
    program = torch.export.load(path)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {name for name in called if "diffusion" in name}
    module = program.module()
    for size in BATCHES:
        inputs = batch_of(model, size)
        assert_close(module(*inputs), expected_of(model, inputs))


@pytest.mark.slow
def test_vectors_as_labels():
    config = replace(VARIANTS["tiny"], label_embedding="identity")
    model = DDPM(randomized(config), NoiseSchedule.linear())
    module = to_exported_program(model).module()
    inputs = [*batch_of(model, 3), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))]
    assert_close(module(*inputs), expected_of(model, inputs))


def test_a_program_leaves_the_model_as_it_is():
    model = other("conv_stack").double().train()
    program = to_exported_program(model)
    assert model.unet.training
    assert next(model.unet.parameters()).dtype == torch.float64
    assert all(p.requires_grad for p in model.unet.parameters())
    x, t = batch_of(model, 1)
    assert program.module()(x, t).dtype == torch.float32


def test_weights_that_a_file_cannot_hold_are_beside_it(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(onnx_format, "MAX_FILE", 1000)
    monkeypatch.setattr(onnx_format, "MIN_WEIGHT", 100)
    model = other("conv_stack")
    to_onnx(model, tmp_path / "large.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"large.onnx", "large.onnx.data"}
    session = onnxruntime.InferenceSession(tmp_path / "large.onnx", providers=["CPUExecutionProvider"])
    x, t = batch_of(model, 2)
    (found,) = session.run(None, {"x": x.numpy(), "timesteps": t.numpy()})
    assert_close(torch.from_numpy(found), expected_of(model, [x, t]))


class Untraceable(torch.nn.Conv2d):
    def forward(self, x):
        return super().forward(x) if float(x.sum()) > 0 else x


@pytest.mark.parametrize("write", [to_onnx, save_program])
def test_a_network_that_cannot_be_traced(write, tmp_path):
    if write is to_onnx:
        pytest.importorskip("onnxscript")
    model = other("conv_stack")
    model.unet.layers[-1].__class__ = Untraceable
    with pytest.raises(ValueError, match="the network cannot be exported: ") as error:
        write(model, tmp_path / "network")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_libraries(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r'pip install "fused-diffusion\[onnx\]"'):
        to_onnx(make_model(), tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [to_onnx, save_program])
def test_a_target_that_is_a_folder(write, tmp_path):
    with pytest.raises(ValueError, match="it is a folder, not a file"):
        write(make_model(), tmp_path)


def test_self_conditioning_has_no_input_in_a_graph():
    config = replace(OTHERS["lucidrains"], self_condition=True)
    with pytest.raises(ValueError, match="no input for the image predicted in the step before"):
        to_exported_program(DDPM(build(config), NoiseSchedule.linear()))
