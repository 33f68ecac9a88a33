"""The UNet of OpenAI's improved-diffusion and guided-diffusion: its architecture, read off its tensors, and
its weights in the package's UNet."""

import re
from typing import NamedTuple

import torch

from ..models.unet import UNetConfig
from ..utils.words import counted
from .naming import Parts, Source, convert

# Tensors of every such UNet; the classifiers of guided-diffusion have no output_blocks.
MARKS = ("input_blocks.0.0.weight", "time_embed.0.weight", "middle_block.0.in_layers.0.weight")


class Architecture(NamedTuple):
    """Facts about a UNet that its tensors tell, most of them under the names of the flags."""

    in_channels: int
    num_channels: int
    channel_mult: tuple[int | float, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    use_scale_shift_norm: bool
    resblock_updown: bool
    conv_resample: bool
    learn_sigma: bool
    num_classes: int | None


def read_architecture(tensors: dict[str, torch.Tensor], origin: str) -> Architecture:
    """The architecture of an improved- or guided-diffusion UNetModel.

    origin: the name of the state dict in messages. ValueError, in one line, if the tensors are not those of
    such a UNet, or those of a classifier or a super-resolution model.
    """
    if missing := [name for name in MARKS if name not in tensors]:
        raise ValueError(f"{origin} holds no UNet of guided-diffusion: no {missing[0]}")

    def size(name: str, dim: int) -> int:
        if name not in tensors or tensors[name].ndim <= dim:
            raise ValueError(
                f"{origin} holds no whole UNet of guided-diffusion: no {name} of "
                f"{counted(dim + 1, 'dimension')}"
            )
        return tensors[name].shape[dim]

    inputs, outputs = _indices(tensors, "input_blocks"), _indices(tensors, "output_blocks")
    if not outputs:
        raise ValueError(
            f"{origin} holds a classifier of guided-diffusion, which cannot be sampled: no output_blocks"
        )
    # Each change of resolution has a block of its own on the way down; one without weights leaves a gap.
    gaps = max(inputs) + 1 - len(inputs)
    convolutions = sum(f"input_blocks.{n}.0.op.weight" in tensors for n in inputs)
    in_blocks = sum(f"output_blocks.{n}.{k}.in_layers.0.weight" in tensors for n in outputs for k in (1, 2))
    levels, count = 1 + gaps + convolutions + in_blocks, max(outputs) + 1
    blocks = count // levels - 1
    if blocks < 1 or count != levels * (blocks + 1) or max(inputs) != levels * (blocks + 1) - 1:
        raise ValueError(
            f"{origin} holds no whole UNet of guided-diffusion: {len(inputs)} input_blocks and "
            f"{len(outputs)} output_blocks do not make {counted(levels, 'level')}"
        )
    first = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]  # block of each level
    channels, widths = (
        size("time_embed.0.weight", 1),
        [size(f"{name}.0.in_layers.2.weight", 0) for name in first],
    )
    in_channels, out_channels = size("input_blocks.0.0.weight", 1), size("out.2.weight", 0)
    if in_channels == 6 and out_channels in (3, 6):
        raise ValueError(
            f"{origin} holds a super-resolution model, which cannot be sampled without a small image"
        )
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"{origin} cannot be sampled: it takes {counted(in_channels, 'channel')} and "
            f"predicts {out_channels}"
        )
    return Architecture(
        in_channels=in_channels,
        num_channels=channels,
        channel_mult=tuple(w // channels if w % channels == 0 else w / channels for w in widths),
        num_res_blocks=blocks,
        attention_levels=tuple(i for i, name in enumerate(first) if f"{name}.1.qkv.weight" in tensors),
        use_scale_shift_norm=size(f"{first[0]}.0.emb_layers.1.weight", 0) == 2 * widths[0],
        resblock_updown=in_blocks > 0,
        conv_resample=gaps == 0,
        learn_sigma=out_channels == 2 * in_channels,
        num_classes=size("label_emb.weight", 0) if "label_emb.weight" in tensors else None,
    )


def _indices(tensors: dict[str, torch.Tensor], prefix: str) -> set[int]:
    found = (re.match(rf"{prefix}\.(\d{{1,4}})\.", name) for name in tensors)
    return {int(match[1]) for match in found if match}


def convert_weights(
    config: UNetConfig,
    tensors: dict[str, torch.Tensor],
    new_attention_order: bool = False,
    origin: str = "the state dict",
) -> dict[str, torch.Tensor]:
    """The state dict of the package's UNet from that of an improved- or guided-diffusion UNetModel.

    new_attention_order: the flag use_new_attention_order. origin: the name of the state dict in messages.
    """
    parts = Parts(
        [
            ("time_mlp.0", "time_embed.0"),
            ("time_mlp.2", "time_embed.2"),
            ("input_conv", "input_blocks.0.0"),
            ("output_norm", "out.0"),
            ("output_conv", "out.2"),
        ],
        [],
        [],
    )
    if config.num_classes is not None:
        parts.plain.append(("label_embedding", "label_emb"))

    def block(level: str, i: int, attends: bool, foreign: str) -> None:
        parts.residual.append((f"{level}.blocks.{i}", f"{foreign}.0"))
        if attends:
            parts.attention.append((f"{level}.attentions.{i}", f"{foreign}.1"))

    def resample(level: str, how: str, foreign: str, conv: str) -> None:
        if how == "resblock":
            parts.residual.append((f"{level}.resample", foreign))
        elif how == "conv":
            parts.plain.append((f"{level}.resample.conv", f"{foreign}.{conv}"))

    n = 1
    for level, how in enumerate(config.level_downsample):
        for i in range(config.level_blocks[level]):
            block(f"down.{level}", i, level in config.attention_levels, f"input_blocks.{n}")
            n += 1
        if how is not None:
            resample(f"down.{level}", how, f"input_blocks.{n}.0", "op")
            n += 1
    parts.residual.append(("mid.blocks.0", "middle_block.0"))
    parts.residual.append(("mid.blocks.1", "middle_block.2"))
    parts.attention.append(("mid.attention", "middle_block.1"))
    n = 0
    for level, how in reversed(list(enumerate(config.level_upsample))):
        attends = level in config.attention_levels
        for i in range(config.level_blocks[level] + 1):
            block(f"up.{level}", i, attends, f"output_blocks.{n}")
            n += 1
        if how is not None:
            resample(f"up.{level}", how, f"output_blocks.{n - 1}.{2 if attends else 1}", "conv")
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    }

    def take_attention(source: Source, foreign: str) -> dict[str, torch.Tensor]:
        ours = {}
        for kind in ("weight", "bias"):
            qkv = source.take(f"{foreign}.qkv.{kind}").flatten(1 if kind == "weight" else 0)
            if not new_attention_order:  # rows by head, then q, k, v; the package has q, k, v first
                heads = config.num_heads
                if config.head_channels is not None:
                    heads = len(qkv) // (3 * config.head_channels)
                if heads == 0 or len(qkv) % (3 * heads):
                    raise ValueError(f"{origin}: {foreign}.qkv cannot be divided into {heads} heads")
                qkv = qkv.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            ours[f"qkv.{kind}"] = qkv
            proj = source.take(f"{foreign}.proj_out.{kind}")
            ours[f"proj.{kind}"] = proj.flatten(1) if kind == "weight" else proj
            ours[f"norm.{kind}"] = source.take(f"{foreign}.norm.{kind}")
        return ours

    return convert(Source(tensors, origin), parts, names, "emb_layers.1", take_attention)
