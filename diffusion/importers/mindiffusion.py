"""Reads checkpoints of cloneofsimo/minDiffusion: the state dict of its DDPM or network.

The network is the NaiveUnet, or the DummyEpsModel of superminddpm.py.
"""

import re
from typing import Any

import torch

from ..models.conv_stack import ConvStackConfig
from ..models.naive_unet import NaiveUNetConfig
from ..models.network import NetworkConfig
from ..storage.checkpoint import load_network
from ..utils.validation import known_names
from . import buffers
from .checkpoint_file import Checkpoint
from .flags import image_size
from .imported import Imported
from .naming import Source

NAME = "minDiffusion"
HUB_FILES: tuple[str, ...] = ()
FLAGS = buffers.FLAGS
_UNET, _STACK = "timeembed.lin1.weight", "conv.0.0.weight"
_T = 1000  # of the project's scripts


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the file holds a NaiveUnet, or the convolutions of a DummyEpsModel and nothing else."""
    unet, stack = (buffers.network_part(checkpoint.tensors, marker) for marker in (_UNET, _STACK))
    only_convolutions = bool(stack) and all(name.startswith("conv.") for name in stack)
    return "init_conv.main.0.weight" in unet or (only_convolutions and "conv.0.1.running_mean" in stack)


def load(checkpoint: Checkpoint, /, **flags: Any) -> Imported:
    """A checkpoint's network in float32 on the CPU, its schedule, and its sampler.

    flags: see FLAGS. A NaiveUnet is assumed to make CIFAR-10's images, in [-1, 1], and a DummyEpsModel those
    that superminddpm.py trains on, MNIST's in [-0.5, 0.5]. ValueError, in one line: a file that is missing,
    damaged or of another architecture; a flag that is unknown or wrong.
    """
    known_names("flag", flags, sorted(FLAGS))
    tensors, origin = checkpoint.tensors, str(checkpoint)
    schedule, assumed = buffers.read_schedule(tensors, flags, _T, origin)
    part = buffers.network_part(tensors, _UNET)
    if part:
        source, limit = Source(part, origin), 1.0
        side = 8 * source.peek("up0.0.weight", 4).shape[2]
    else:
        source, limit, side = Source(buffers.network_part(tensors, _STACK), origin), 0.5, 28
    if "size" not in flags:
        assumed["size"] = side
    size = image_size("flag size", flags.get("size", side))
    config: NetworkConfig
    if part:
        config = _unet_config(source, size, schedule.T - 1)
        weights = convert_unet(source)
    else:
        config = _stack_config(source, size)
        weights = convert_stack(config, source)
    network = load_network(config, weights, origin)
    return Imported(network, schedule, buffers.conventions(schedule, (-limit, limit)), assumed)


def _unet_config(source: Source, size: int | tuple[int, int], num_timesteps: int) -> NaiveUNetConfig:
    if "init_conv.main.0.weight" not in source or "init_conv.main.1.running_mean" in source:
        raise ValueError(
            f"{source.origin} is of a NaiveUnet before 16 April 2022, with batch normalisation or without "
            "init_conv, which cannot be imported"
        )
    first = source.peek("init_conv.main.0.weight", 4)
    wide = len(source.peek("init_conv.conv.0.weight", 4)) == 2 * len(first)
    return NaiveUNetConfig(
        sample_size=size,
        in_channels=first.shape[1],
        out_channels=len(source.peek("out.weight", 4)),
        channels=len(first),
        pool=source.peek("up0.0.weight", 4).shape[2],
        num_timesteps=num_timesteps,
        wide=wide,
    )


def _stack_config(source: Source, size: int | tuple[int, int]) -> ConvStackConfig:
    layers = sum(re.fullmatch(r"conv\.\d+\.0\.weight", name) is not None for name in source.tensors)
    first = source.peek("conv.0.0.weight", 4)
    return ConvStackConfig(
        sample_size=size,
        in_channels=first.shape[1],
        widths=tuple(len(source.peek(f"conv.{i}.0.weight", 4)) for i in range(layers)),
    )


def convert_unet(source: Source) -> dict[str, torch.Tensor]:
    """The state dict of NaiveUNet from a NaiveUnet's; ValueError for missing or further tensors."""
    ours: dict[str, torch.Tensor] = {}

    def copy(name: str, foreign: str) -> None:
        ours.update(source.layer(name, foreign))

    def conv3(name: str, foreign: str) -> None:
        for layer in (0, 1):
            copy(f"{name}.first.{layer}", f"{foreign}.main.{layer}")
        for layer in (0, 1, 3, 4):
            copy(f"{name}.others.{layer}", f"{foreign}.conv.{layer}")

    conv3("input", "init_conv")
    for i in (1, 2, 3):
        conv3(f"down{i}", f"down{i}.model.0")
        copy(f"up{i}.upsample", f"up{i}.model.0")
        conv3(f"up{i}.blocks.0", f"up{i}.model.1")
        conv3(f"up{i}.blocks.1", f"up{i}.model.2")
    ours["time_frequencies.weight"] = source.take(_UNET)
    copy("time_projection", "timeembed.lin2")
    copy("unpool", "up0.0")
    copy("unpool_norm", "up0.1")
    copy("output", "out")
    source.finish()
    return ours


def convert_stack(config: ConvStackConfig, source: Source) -> dict[str, torch.Tensor]:
    """The state dict of ConvStack from a DummyEpsModel's; ValueError for missing or further tensors."""
    ours: dict[str, torch.Tensor] = {}
    for i in range(len(config.widths)):
        ours |= source.layer(f"layers.{i}.0", f"conv.{i}.0")
        ours |= buffers.batch_norm(source, f"layers.{i}.1", f"conv.{i}.1")
    last = len(config.widths)
    ours |= source.layer(f"layers.{last}", f"conv.{last}")
    source.finish()
    return ours
