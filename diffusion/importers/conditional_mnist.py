"""Reads checkpoints of TeaPearce/Conditional_Diffusion_MNIST: the state dict of its DDPM or ContextUnet."""

from typing import Any

import torch

from ..models.context_unet import ContextUNetConfig
from ..storage.checkpoint import load_network
from ..utils.validation import known_names
from . import buffers
from .checkpoint_file import Checkpoint
from .flags import image_size
from .imported import Imported
from .naming import Source

NAME = "Conditional_Diffusion_MNIST"
HUB_FILES: tuple[str, ...] = ()
FLAGS = buffers.FLAGS
_MARKER = "contextembed1.model.0.weight"
_T = 400  # of the project's script


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the file holds the embedding of the label."""
    return bool(buffers.network_part(checkpoint.tensors, _MARKER))


def load(checkpoint: Checkpoint, /, **flags: Any) -> Imported:
    """A checkpoint's UNet in float32 on the CPU, its schedule, and its sampler, for images in [0, 1].

    flags: see FLAGS. The size is assumed to be four times the window that the coarsest features are pooled
    over. ValueError, in one line: a file that is missing, damaged or of another architecture; a flag that is
    unknown or wrong.
    """
    known_names("flag", flags, sorted(FLAGS))
    tensors, origin = checkpoint.tensors, str(checkpoint)
    source = Source(buffers.network_part(tensors, _MARKER), origin)
    schedule, assumed = buffers.read_schedule(tensors, flags, _T, origin)
    first = source.peek("init_conv.conv1.0.weight", 4)
    window, labels = source.peek("up0.0.weight", 4), source.peek(_MARKER, 2)
    if "size" not in flags:
        assumed["size"] = 4 * window.shape[2]
    width = first.shape[0]
    config = ContextUNetConfig(
        sample_size=image_size("flag size", flags.get("size", 4 * window.shape[2])),
        in_channels=first.shape[1],
        channels=width,
        pool=window.shape[2],
        num_timesteps=schedule.T - 1,
        num_classes=labels.shape[1],
        concatenate=len(window) == 6 * width,
    )
    unet = load_network(config, convert_weights(source), origin)
    return Imported(unet, schedule, buffers.conventions(schedule, (0.0, 1.0)), assumed)


def convert_weights(source: Source) -> dict[str, torch.Tensor]:
    """The state dict of ContextUNet from a ContextUnet's; ValueError for missing or further tensors."""
    ours: dict[str, torch.Tensor] = {}

    def copy(name: str, foreign: str, statistics: bool = False) -> None:
        ours.update(buffers.batch_norm(source, name, foreign) if statistics else source.layer(name, foreign))

    def pair(name: str, foreign: str) -> None:
        for conv in ("conv1", "conv2"):
            copy(f"{name}.{conv}.0", f"{foreign}.{conv}.0")
            copy(f"{name}.{conv}.1", f"{foreign}.{conv}.1", statistics=True)

    pair("input", "init_conv")
    for i in (1, 2):
        pair(f"down{i}", f"down{i}.model.0")
        copy(f"up{i}.upsample", f"up{i}.model.0")
        for block in (0, 1):
            pair(f"up{i}.blocks.{block}", f"up{i}.model.{block + 1}")
        for ours_embedding, foreign in (("time", "timeembed"), ("label", "contextembed")):
            for layer in (0, 2):
                copy(f"{ours_embedding}{i}.{layer}", f"{foreign}{i}.model.{layer}")
    copy("unpool", "up0.0")
    copy("unpool_norm", "up0.1")
    for layer in (0, 1, 3):
        copy(f"output.{layer}", f"out.{layer}")
    source.finish()
    return ours
