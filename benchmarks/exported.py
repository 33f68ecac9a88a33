"""A network in the inference engines of others: exported as ONNX, run by OpenVINO or ONNX Runtime."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.exporters.onnx import MIN_WEIGHT

Evaluate = Callable[..., Tensor]  # the network's inputs -> its output


def export(network: nn.Module, inputs: Sequence[Tensor], path: Path) -> None:
    """Writes a network, whose output is one tensor, for inputs of these shapes; its weights go into a second
    file, `path` with ".data" after it."""
    import onnx_ir

    with torch.no_grad():
        program = torch.onnx.export(network.eval(), tuple(inputs), dynamo=True, verbose=False)
    assert program is not None
    onnx_ir.save(program.model, path, external_data=f"{path.name}.data", size_threshold_bytes=MIN_WEIGHT)


def openvino(path: Path, precision: str) -> Evaluate:
    """The exported network by OpenVINO with PyTorch's number of threads; precision: "f32" or "bf16"."""
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(str(path), "CPU", hints)
    return lambda *inputs: torch.from_numpy(compiled([value.numpy() for value in inputs])[0])


def onnxruntime(path: Path) -> Evaluate:
    """The exported network by ONNX Runtime in float32 with PyTorch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def evaluate(*inputs: Tensor) -> Tensor:
        values = (value.numpy() for value in inputs)
        return torch.from_numpy(session.run(None, dict(zip(names, values, strict=True)))[0])

    return evaluate
