"""Exports the network of a model to ONNX."""

import importlib
import os
import tempfile
import warnings
from pathlib import Path

import torch

from ..ddpm import DDPM
from ..storage.atomic import check_writable, replacing
from ..utils.errors import first_line
from .program import to_exported_program

# Bytes of a tensor that goes into the second file. ONNX Runtime reads the sizes of a Split in the first.
MIN_WEIGHT = 2**14
MAX_FILE = 2**31 - 2**24  # bytes; a protocol buffer holds less than 2 GiB, here with room for the graph


def check_onnx(*targets: str | os.PathLike) -> None:
    """ValueError if ONNX files cannot be written to these paths, or what writes them is not installed."""
    check_writable(*targets)
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            'ONNX files need onnx and onnxscript: pip install "fused-diffusion[onnx]"'
        ) from error


def to_onnx(model: DDPM, path: str | os.PathLike) -> None:
    """Writes the network of a model to an ONNX file, in float32.

    Its inputs are `x` float32 [B, in_channels, H, W], `timesteps` int64 [B] or noise levels float32 [B], and,
    for a conditional model only, `labels` int64 [B], of which the number of classes stands for no label where
    the model has a null label. Its output is `output` float32 [B, out_channels, H, W]. B is free; H and W are
    those of the model's images. The sampler is not part of the file. Weights of 2 GiB or more go into a
    second file, `path` with ".data" after it. Both files are complete or not written at all.

    ValueError if a file cannot be written, the network cannot be traced, or `onnx` and `onnxscript` are not
    installed.
    """
    path = Path(path)
    size = sum(4 * tensor.numel() for tensor in model.unet.state_dict().values())
    targets = [path] if size < MAX_FILE else [path, path.with_name(f"{path.name}.data")]
    check_onnx(*targets)
    import onnx_ir  # which onnxscript needs

    program = to_exported_program(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the inputs share one batch size is meant
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                dynamic_shapes=({0: "batch"},) * len(program.graph_signature.user_inputs),
                output_names=["output"],
            )
        except Exception as error:  # its errors are of many kinds
            raise ValueError(f"the network cannot be written as ONNX: {first_line(error)}") from error
    assert exported is not None
    with replacing(*targets) as temporary, tempfile.TemporaryDirectory(dir=temporary[0].parent) as folder:
        # The file of the graph holds the name of the file of weights, so both are written by their own names.
        data = f"{path.name}.data" if len(targets) > 1 else None
        onnx_ir.save(
            exported.model, Path(folder, path.name), external_data=data, size_threshold_bytes=MIN_WEIGHT
        )
        for target, file in zip(targets, temporary, strict=True):
            os.replace(Path(folder, target.name), file)
