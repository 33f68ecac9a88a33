"""Reads checkpoints of juraam/stable-diffusion-from-scratch, which this package grew from.

The file is the state dict of its DDPM, of `src/condition_diffusion` or `src/diffusion`, or of its UNet alone.
All of the architecture can be read from it but `has_residuals`.
"""

import re
from typing import Any

import torch

from ..models.diagonal_unet import DiagonalUNetConfig
from ..storage.checkpoint import load_network
from ..utils.validation import known_names, number, numbers, refuse, switch
from . import buffers
from .checkpoint_file import Checkpoint
from .flags import image_size
from .imported import Imported
from .naming import Source

NAME = "stable-diffusion-from-scratch"
HUB_FILES: tuple[str, ...] = ()
FLAGS = buffers.FLAGS | {
    "value_range": "values of the images, 0,1 (MNIST) or -1,1 (CIFAR-10)",
    "has_residuals": "whether the blocks add their input",
    "w": "guidance that the model samples with, guidance_scale - 1",
}
_MARKER, _LABELS = "time_embedding.0.pe", "cond_embedding.0.weight"


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the file holds the UNet's table of the time."""
    return "first_conv.weight" in buffers.network_part(checkpoint.tensors, _MARKER)


def load(checkpoint: Checkpoint, /, **flags: Any) -> Imported:
    """A checkpoint's UNet in float32 on the CPU, its schedule, and its sampler.

    flags: see FLAGS. The size and the range of values are assumed by the number of channels: 1 is MNIST, of
    28x28 in [0, 1], and others are CIFAR-10, of 32x32 in [-1, 1]. ValueError, in one line: a file that is
    missing, damaged or of another architecture; a flag that is unknown or wrong.
    """
    known_names("flag", flags, sorted(FLAGS))
    given, origin = dict(flags), str(checkpoint)
    source = Source(buffers.network_part(checkpoint.tensors, _MARKER), origin)
    grey = source.peek("first_conv.weight", 4).shape[1] == 1
    size, value_range = (28, "0,1") if grey else (32, "-1,1")
    defaults: dict[str, Any] = {"size": size, "value_range": value_range, "has_residuals": True}
    if _LABELS in source:
        defaults["w"] = 0.2  # of the project's notebook
    elif "w" in flags:
        raise ValueError(f"{origin} has no labels to guide towards; leave out the flag w")
    last = len(source.peek(_MARKER, 2)) - 1  # timestep that the network knows
    schedule, assumed = buffers.read_schedule(checkpoint.tensors, flags, max(last, 1), origin)
    if not 0 < schedule.T - 1 <= last:
        raise ValueError(f"{origin} has a schedule of {schedule.T - 1} steps, but knows the times 0..{last}")
    values = defaults | given
    assumed |= {name: value for name, value in defaults.items() if name not in given}
    config = _config(source, values, last)
    unet = load_network(config, convert_weights(config, source), origin)
    conventions = buffers.conventions(schedule, _value_range(values["value_range"]), noise_in_last_step=True)
    conventions["guidance_scale"] = 1 + number("flag w", values.get("w", 0))
    return Imported(unet, schedule, conventions, assumed)


def _value_range(value: Any) -> tuple[float, float]:
    try:
        ends = [float(end) for end in value.split(",")] if isinstance(value, str) else value
        low, high = numbers("value_range", ends).tolist()
    except ValueError:
        refuse("flag value_range", "two numbers, such as 0,1", value)
    return low, high


def _config(source: Source, values: dict[str, Any], num_timesteps: int) -> DiagonalUNetConfig:
    """The configuration that the names and shapes of the UNet's tensors have."""

    def attends(way: str, i: int) -> bool:
        return any(re.fullmatch(rf"{way}_blocks\.{i}\.models\.\d+\.K_W", name) for name in source.tensors)

    blocks = [
        (int(match[1]), int(match[2]))
        for name in source.tensors
        if (match := re.fullmatch(r"down_blocks\.(\d+)\.models\.(\d+)\.conv_1\.2\.weight", name))
    ]
    channels = source.peek(_MARKER, 2).shape[1]
    levels = max((i for i, _ in blocks), default=0) // 2 + 1  # the pooling between levels has a number, too
    widths = [len(source.peek(f"down_blocks.{2 * i}.models.0.conv_1.2.weight", 4)) for i in range(levels)]
    if not channels or any(width % channels for width in widths):
        raise ValueError(f"{source.origin}: its widths {widths} are no multiples of the time's {channels}")
    heads = [len(tensor) for name, tensor in source.tensors.items() if name.endswith(".K_W")]
    labels = source.peek(_LABELS, 2) if _LABELS in source else None
    return DiagonalUNetConfig(
        sample_size=image_size("flag size", values["size"]),
        in_channels=source.peek("first_conv.weight", 4).shape[1],
        out_channels=len(source.peek("out.2.weight", 4)),
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=sum(i == 0 for i, _ in blocks),
        down_attention=tuple(i for i in range(levels) if attends("down", 2 * i)),
        # The way up begins with the coarsest level.
        up_attention=tuple(i for i in range(levels) if attends("up", 2 * (levels - 1 - i))),
        mid_attention="backbone.models.1.K_W" in source,
        num_heads=heads[0] if heads else 4,
        residual=switch("flag has_residuals", values["has_residuals"]),
        num_timesteps=num_timesteps,
        num_classes=None if labels is None else len(labels),
    )


def convert_weights(config: DiagonalUNetConfig, source: Source) -> dict[str, torch.Tensor]:
    """The state dict of DiagonalUNet from that of the project's UNet.

    Weights that the project's code never uses are left out: the label's in blocks without residual, and the
    convolution that would fit their input. ValueError if tensors are missing or left over.
    """
    ours = {"time_table": source.take(_MARKER)}

    def copy(name: str, foreign: str) -> None:
        ours.update(source.layer(name, foreign))

    def block(name: str, foreign: str, residual: bool) -> None:
        parts = {"norm1": "conv_1.0", "conv1": "conv_1.2", "norm2": "conv_2.0", "conv2": "conv_2.2"}
        for inner, other in (parts | {"time_projection": "time_emb.ln.1"}).items():
            copy(f"{name}.{inner}", f"{foreign}.{other}")
        unused = {"label_projection": "condition_emb.ln.1", "skip": "conv_3"}
        for inner, other in unused.items():
            if f"{foreign}.{other}.weight" in source:
                layer = source.layer(f"{name}.{inner}", f"{foreign}.{other}")
                ours.update(layer if residual else {})

    def attention(name: str, foreign: str) -> None:
        copy(f"{name}.norm", f"{foreign}.norm")
        for inner in ("mlp.0", "mlp.1", "mlp.3"):
            copy(f"{name}.{inner}", f"{foreign}.{inner}")
        letters = [(source.take(f"{foreign}.{x}_W"), source.take(f"{foreign}.{x}_b")) for x in "QKV"]
        # [heads, C, C / heads] to rows by head.
        ours[f"{name}.qkv.weight"] = torch.cat(
            [weight.transpose(-1, -2).flatten(0, 1) for weight, _ in letters]
        )
        ours[f"{name}.qkv.bias"] = torch.cat([bias.flatten() for _, bias in letters])
        ours[f"{name}.proj.weight"] = source.take(f"{foreign}.O_W").flatten(0, 1).T.contiguous()
        ours[f"{name}.proj.bias"] = source.take(f"{foreign}.O_b")

    def level(name: str, foreign: str, attend: bool) -> None:
        for i in range(config.num_res_blocks):
            block(f"{name}.blocks.{i}", f"{foreign}.models.{2 * i if attend else i}", config.residual)
            if attend:
                attention(f"{name}.attentions.{i}", f"{foreign}.models.{2 * i + 1}")

    for mlp, other in (("time_mlp", "time_embedding"), ("label_mlp", "cond_embedding")):
        if other == "time_embedding" or config.num_classes is not None:
            copy(f"{mlp}.0", f"{other}.1")
            copy(f"{mlp}.2", f"{other}.3")
    if config.num_classes is not None:
        ours["label_embedding.weight"] = source.take(_LABELS)
    copy("input_conv", "first_conv")
    levels = len(config.channel_mult)
    for i in range(levels):
        level(f"down.{i}", f"down_blocks.{2 * i}", i in config.down_attention)
        up = 2 * (levels - 1 - i)
        level(f"up.{i}", f"up_blocks.{up}", i in config.up_attention)
        if i > 0:
            copy(f"upsample.{i - 1}", f"up_blocks.{up + 1}.upscale")
    block("mid_blocks.0", "backbone.models.0", False)
    block("mid_blocks.1", f"backbone.models.{2 if config.mid_attention else 1}", False)
    if config.mid_attention:
        attention("mid_attention", "backbone.models.1")
    copy("output_norm", "out.0")
    copy("output_conv", "out.2")
    source.finish()
    return ours
