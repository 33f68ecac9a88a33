"""Exports the network of a model as a graph of PyTorch's operators (`torch.export`)."""

import copy
import os

import torch
from torch import nn

from ..ddpm import DDPM
from ..models.structure import config_of
from ..process.noise_levels import NoiseLevels
from ..storage.atomic import check_writable, replacing
from ..utils.errors import first_line

_BATCH = 2  # images of the example: a batch of one would be taken for a constant


class _Graph(nn.Module):
    """The network in plain PyTorch: a graph must hold no operator that only this package has."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.network(x, timesteps, labels, backend="reference")


def to_exported_program(model: DDPM) -> torch.export.ExportedProgram:
    """The network of a model in eval mode, float32 on the CPU, as a graph that runs without this package.

    `program.module()(x, timesteps, labels)` gives the network's output [B, out_channels, H, W] for x float32
    [B, in_channels, H, W], timesteps int64 [B], or noise levels float32 [B], and, for a conditional model
    only, labels int64 [B], of which the number of classes stands for no label where the model has a null
    label, or the vectors that are its labels, float32 [B, E]. B is free; H and W are those of the model's
    images. ValueError if the network cannot be traced, or has self-conditioning.
    """
    config = config_of(model.unet)
    if config.self_condition:
        raise ValueError(
            "the network cannot be exported: it has self-conditioning, and a graph has no input for the "
            "image predicted in the step before"
        )
    kind = torch.float32 if isinstance(model.schedule, NoiseLevels) else torch.int64
    timesteps = torch.arange(1, _BATCH + 1, dtype=kind, device="cpu")
    network = copy.deepcopy(model.unet).to("cpu", torch.float32).eval().requires_grad_(False)
    inputs = [torch.zeros(_BATCH, config.in_channels, *config.image_shape, device="cpu"), timesteps]
    if config.label_size is not None:
        inputs.append(torch.zeros(_BATCH, config.label_size, device="cpu"))
    elif config.num_classes is not None:
        inputs.append(torch.zeros(_BATCH, dtype=torch.int64, device="cpu"))
    batch = {0: torch.export.Dim("batch", min=1)}
    try:
        with torch.no_grad():
            shapes = (batch,) * len(inputs)
            return torch.export.export(_Graph(network), tuple(inputs), dynamic_shapes=shapes)
    except Exception as error:  # its errors are of many kinds
        raise ValueError(f"the network cannot be exported: {first_line(error)}") from error


def save_program(model: DDPM, path: str | os.PathLike) -> None:
    """Writes `to_exported_program(model)` to a file, for `torch.export.load`.

    The file is complete or not written at all. ValueError if it cannot be written or the network cannot be
    traced.
    """
    check_writable(path)
    program = to_exported_program(model)
    with replacing(path) as (temporary,):
        torch.export.save(program, temporary)
