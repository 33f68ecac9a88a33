"""Reads the ckpt.pt of w86763777/pytorch-ddpm: {"net_model": ..., "ema_model": ..., "step": ..., ...}."""

import re
from typing import Any

import torch

from ..models.unet import UNetConfig
from ..process.schedule import MAX_TIMESTEPS, NoiseSchedule
from ..storage.checkpoint import load_network
from ..utils.validation import choice, known_names, number, typed, whole_number
from ..utils.words import counted
from .checkpoint_file import Checkpoint, state_dict
from .imported import Imported
from .naming import Parts, Source, convert, separate_attention

NAME = "pytorch-ddpm"
HUB_FILES: tuple[str, ...] = ()  # read from a local file only
FLAGS = {
    "ema": "False takes the weights that were trained instead of their moving average",
    "img_size": "height and width of the images",
    "beta_1": "first beta of the schedule",
    "beta_T": "last beta of the schedule",
    "T": "number of timesteps; the checkpoint tells it",
    "mean_type": "prediction of the network: epsilon or xstart",
    "var_type": "variance of a step: fixedlarge or fixedsmall",
    "dropout": "probability of dropout in training",
}
_DEFAULTS = {
    "img_size": 32,
    "beta_1": 1e-4,
    "beta_T": 0.02,
    "mean_type": "epsilon",
    "var_type": "fixedlarge",
    "dropout": 0.1,
}
_PREDICTIONS = {"epsilon": "epsilon", "xstart": "sample"}
_VARIANCES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}
_TABLE = "time_embedding.timembedding.0.weight"
_RESIDUAL = {
    "norm1": "block1.0",
    "conv1": "block1.2",
    "norm2": "block2.0",
    "conv2": "block2.3",
    "skip": "shortcut",
}

_ATTENTION = separate_attention("group_norm", "proj_q", "proj_k", "proj_v", "proj")


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the file holds a UNet with the names of pytorch-ddpm, or a checkpoint with such UNets."""
    return not checkpoint.is_folder and bool(_unets(checkpoint))


def load(checkpoint: Checkpoint, /, **flags: Any) -> Imported:
    """The UNet of a checkpoint, and the process of its `GaussianDiffusionSampler`: all T steps of ancestral
    sampling in which predicted images are not clipped, but the returned ones are.

    flags: see `FLAGS`. ValueError, in one line: another file, a flag that contradicts the tensors, or
    mean_type "xprev", a prediction of x_{t-1}.
    """
    known_names("flag", flags, FLAGS)
    unets = _unets(checkpoint)
    has_average = isinstance(checkpoint.contents, dict) and "ema_model" in checkpoint.contents
    ema = typed("flag ema", flags.get("ema", has_average or not unets), bool)
    which = "ema" if ema else "net"
    if which not in unets:
        hint = "; the flag ema=False takes net_model" if ema and unets else ""
        raise ValueError(
            f"{checkpoint} holds no checkpoint of pytorch-ddpm: no {which}_model with its UNet{hint}"
        )
    tensors, options = unets[which], _DEFAULTS | _image_size(checkpoint) | flags
    config = _config(tensors, options, str(checkpoint))
    T = tensors[_TABLE].shape[0]
    if whole_number("flag T", flags.get("T", T), 1, MAX_TIMESTEPS) != T:
        raise ValueError(f"{checkpoint} has {counted(T, 'timestep')}, and flag T is {flags['T']}")
    if options["mean_type"] == "xprev":
        raise ValueError("mean_type 'xprev' cannot be imported: the network must predict epsilon or xstart")
    unet = load_network(config, _convert(config, tensors, str(checkpoint)), checkpoint.path)
    beta_1, beta_T = (
        number(f"flag {name}", options[name], above=0, below=1) for name in ("beta_1", "beta_T")
    )
    conventions = {
        "prediction_type": _PREDICTIONS[choice("mean_type", options["mean_type"], _PREDICTIONS)],
        "variance": _VARIANCES[choice("var_type", options["var_type"], _VARIANCES)],
        "clip": None,
        "clip_output": True,
        "sampler": {"name": "ddpm", "steps": T},
    }
    told = _image_size(checkpoint).keys() | flags.keys()
    assumed = {name: value for name, value in _DEFAULTS.items() if name not in told}
    return Imported(unet, NoiseSchedule.linear(T, beta_1, beta_T), conventions, assumed)


def _unets(checkpoint: Checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts "net" and "ema", as far as the file holds them; a bare state dict is "net"."""
    contents, found = checkpoint.contents, {"net": checkpoint.tensors}
    if isinstance(contents, dict):
        found |= {
            key: state_dict(contents.get(f"{key}_model"))
            for key in ("net", "ema")
            if f"{key}_model" in contents
        }
    return {
        key: tensors
        for key, tensors in found.items()
        if {_TABLE, "head.weight", "tail.2.weight"} <= tensors.keys()
    }


def _image_size(checkpoint: Checkpoint) -> dict[str, int]:
    """{"img_size": N} where the checkpoint has the initial noise [B, C, N, N] of its sample images."""
    x_T = checkpoint.contents.get("x_T") if isinstance(checkpoint.contents, dict) else None
    if isinstance(x_T, torch.Tensor) and x_T.ndim == 4 and x_T.shape[2] == x_T.shape[3]:
        return {"img_size": x_T.shape[3]}
    return {}


def _config(tensors: dict[str, torch.Tensor], options: dict[str, Any], origin: str) -> UNetConfig:
    """The configuration, from the names and shapes of the tensors."""
    head, tail, table = (tensors[name] for name in ("head.weight", "tail.2.weight", _TABLE))
    blocks: list[int] = [0]
    widths: list[int] = []
    attention: set[int] = set()
    for n in range(1 + max((int(m[1]) for m in map(_down, tensors) if m), default=-1)):
        conv, level = tensors.get(f"downblocks.{n}.block1.2.weight"), len(blocks) - 1
        if conv is None:
            blocks.append(0)  # a change of resolution
            continue
        blocks[-1] += 1
        widths[level:] = [conv.shape[0]] if conv.ndim == 4 else []
        if f"downblocks.{n}.attn.group_norm.weight" in tensors:
            attention.add(level)
    if head.ndim != 4 or tail.ndim != 4 or table.ndim != 2 or len(widths) != len(blocks):
        raise ValueError(f"{origin} holds no whole UNet of pytorch-ddpm")
    if tail.shape[0] != head.shape[1]:
        raise ValueError(
            f"{origin} cannot be sampled: it takes {counted(head.shape[1], 'channel')} and "
            f"predicts {tail.shape[0]}"
        )
    channels = head.shape[0]
    return UNetConfig(
        sample_size=whole_number("flag img_size", options["img_size"], 1),
        in_channels=head.shape[1],
        out_channels=head.shape[1],
        channels=channels,
        channel_mult=tuple(w // channels if w % channels == 0 else w / channels for w in widths),
        input_width=None if widths[0] == channels else channels,
        num_res_blocks=tuple(blocks),
        attention_levels=tuple(sorted(attention)),
        time_embedding="learned",  # a table that the checkpoint stores, of interleaved sines and cosines
        learned_timesteps=table.shape[0],
        downsample_padding="symmetric",
        norm_groups=32,
        norm_eps=1e-5,
        dropout=number("flag dropout", options["dropout"], 0, below=1),
    )


def _down(name: str) -> re.Match | None:
    return re.match(r"downblocks\.(\d{1,4})\.", name)


def _convert(config: UNetConfig, tensors: dict[str, torch.Tensor], origin: str) -> dict[str, torch.Tensor]:
    """The state dict of the package's UNet."""
    parts = Parts(
        [
            ("time_table", "time_embedding.timembedding.0"),
            ("time_mlp.0", "time_embedding.timembedding.1"),
            ("time_mlp.2", "time_embedding.timembedding.3"),
            ("input_conv", "head"),
            ("output_norm", "tail.0"),
            ("output_conv", "tail.2"),
        ],
        [],
        [],
    )

    def level(ours: str, foreign: str, first: int, count: int, attends: bool, resamples: bool) -> int:
        """Names the blocks of one level, from block `first` on; returns the block after them."""
        for i in range(count):
            parts.residual.append((f"{ours}.blocks.{i}", f"{foreign}.{first + i}"))
            if attends:
                parts.attention.append((f"{ours}.attentions.{i}", f"{foreign}.{first + i}.attn"))
        if resamples:
            parts.plain.append((f"{ours}.resample.conv", f"{foreign}.{first + count}.main"))
        return first + count + resamples

    n, last = 0, len(config.channel_mult) - 1
    for i, blocks in enumerate(config.level_blocks):
        n = level(f"down.{i}", "downblocks", n, blocks, i in config.attention_levels, i < last)
    parts.residual.extend([("mid.blocks.0", "middleblocks.0"), ("mid.blocks.1", "middleblocks.1")])
    parts.attention.append(("mid.attention", "middleblocks.0.attn"))
    n = 0
    for i, blocks in reversed(list(enumerate(config.level_blocks))):
        n = level(f"up.{i}", "upblocks", n, blocks + 1, i in config.attention_levels, i > 0)
    return convert(Source(tensors, origin), parts, _RESIDUAL, "temb_proj.1", _ATTENTION)
