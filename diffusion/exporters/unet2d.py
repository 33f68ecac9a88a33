"""The UNet of this package as diffusers' UNet2DModel: its configuration and its weights."""

from typing import Any, NoReturn

import torch

from ..importers.diffusers_unet import RESIDUAL_NAMES, parts_of
from ..models.config import UNetConfig

_TIME_EMBEDDINGS = {"sinusoidal": "positional", "fourier": "fourier", "learned": "learned"}
_LABEL_EMBEDDINGS = {"table": None, "timestep": "timestep", "identity": "identity"}


def unet2d_config(config: UNetConfig) -> dict[str, Any]:
    """The options of a UNet2DModel that computes what this UNet does.

    A null label is one more row of its table of labels. Average pooling and nearest-neighbour interpolation
    without a convolution, which a UNet2DModel lacks, become convolutions that leave their input as it is; see
    `unet2d_weights`. ValueError naming the option that a UNet2DModel does not have.
    """
    widths = config.level_channels
    if config.patch_size != 1:
        _refuse("patch_size", config.patch_size, "no patches")
    if config.timestep_scale != 1:
        _refuse("timestep_scale", config.timestep_scale, "no factor of its timesteps")
    if config.input_width not in (None, widths[0]):
        _refuse("input_width", config.input_width, "a first convolution as wide as its first level")
    if widths[0] != config.channels:
        reason = "a time embedding that is as wide as its first level"
        _refuse("channel_mult", list(config.channel_mult), reason)
    if len(set(config.level_blocks)) > 1:
        reason = "the same number of residual blocks at each level"
        _refuse("num_res_blocks", list(config.level_blocks), reason)
    classes = config.num_classes
    if classes is not None and config.label_embedding == "table":
        classes += config.has_null_label
    return {
        "_class_name": "UNet2DModel",
        "sample_size": config.sample_size if isinstance(config.sample_size, int) else [*config.sample_size],
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "center_input_sample": config.center_input,
        "time_embedding_type": _TIME_EMBEDDINGS[config.time_embedding],
        "time_embedding_dim": config.time_embed_dim,
        "freq_shift": config.freq_shift,
        "flip_sin_to_cos": config.flip_sin_to_cos,
        **_blocks(config),
        "mid_block_type": "UNetMidBlock2D" if config.has_middle else None,
        "block_out_channels": [*widths],
        "layers_per_block": config.level_blocks[0],
        "mid_block_scale_factor": config.mid_divisor,
        "downsample_padding": int(config.downsample_padding == "symmetric"),
        "dropout": config.dropout,
        "act_fn": config.activation,
        "attention_head_dim": _head_width(config),
        "norm_num_groups": config.norm_groups,
        "attn_norm_num_groups": _mid_attention_groups(config),
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "add_attention": config.mid_attention,
        "class_embed_type": _LABEL_EMBEDDINGS[config.label_embedding],
        "num_class_embeds": classes,
        "num_train_timesteps": config.learned_timesteps,
    }


def unet2d_weights(config: UNetConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the UNet2DModel of `unet2d_config(config)`, from the state dict of the UNet."""
    theirs: dict[str, torch.Tensor] = {}
    parts = parts_of(config)

    def copy(name: str, foreign: str) -> None:
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in state:
                theirs[f"{foreign}.{kind}"] = state[f"{name}.{kind}"]

    for name, foreign in parts.tensors:
        theirs[foreign] = state[name]
    for name, foreign in parts.plain:
        copy(name, foreign)
    for name, foreign in parts.residual:
        for inner, foreign_inner in RESIDUAL_NAMES.items():
            copy(f"{name}.{inner}", f"{foreign}.{foreign_inner}")
    modulations = 2 if config.scale_shift else 1
    sizes = [modulations * len(state[f"{name}.conv1.weight"]) for name, _ in parts.residual]
    for kind in ("weight", "bias"):
        rows = state[f"embedding_projection.{kind}"].split(sizes)
        for (_, foreign), part in zip(parts.residual, rows, strict=True):
            theirs[f"{foreign}.time_emb_proj.{kind}"] = part
        for name, foreign in parts.attention:
            qkv = state[f"{name}.qkv.{kind}"].chunk(3)
            for inner, part in zip(("to_q", "to_k", "to_v"), qkv, strict=True):
                theirs[f"{foreign}.{inner}.{kind}"] = part
            theirs[f"{foreign}.to_out.0.{kind}"] = state[f"{name}.proj.{kind}"]
            if f"{name}.norm.{kind}" in state:
                theirs[f"{foreign}.group_norm.{kind}"] = state[f"{name}.norm.{kind}"]
    return theirs | _plain_resampling(config, state["input_conv.weight"].dtype)


def _refuse(name: str, value: Any, has: str) -> NoReturn:
    raise ValueError(f"{name}={value} cannot be exported: diffusers' UNet2DModel has {has}")


def _blocks(config: UNetConfig) -> dict[str, Any]:
    """The types of the blocks of each level, and how those with attention change the resolution."""
    found: dict[str, Any] = {}
    ways = {"down": config.level_downsample, "up": config.level_upsample}
    for index, (way, kinds) in enumerate(ways.items()):
        attends = [levels[index] for levels in config.level_attention]
        names = []
        for attention, kind in zip(attends, kinds, strict=True):
            if attention:
                names.append(f"Attn{way.capitalize()}Block2D")
            elif kind == "resblock":
                names.append(f"Resnet{way.capitalize()}sampleBlock2D")
            else:
                names.append(f"{way.capitalize()}Block2D")
        found[f"{way}_block_types"] = names if way == "down" else names[::-1]
        by_block = {
            kind == "resblock" for attention, kind in zip(attends, kinds, strict=True) if attention and kind
        }
        if len(by_block) > 1:
            reason = f"one kind of {way}sampling for all levels with attention"
            _refuse(f"{way}sample", [kind for kind in kinds if kind], reason)
        found[f"{way}sample_type"] = "resnet" if True in by_block else "conv"
    return found


def _head_width(config: UNetConfig) -> int | None:
    """The width of the attention heads; None for one head in each attention."""
    if config.head_channels is not None or config.num_heads == 1:
        return config.head_channels
    widths = {
        width
        for width, attends in zip(config.level_channels, config.level_attention, strict=True)
        if any(attends)
    }
    if config.has_middle and config.mid_attention:
        widths.add(config.level_channels[-1])
    if len(widths) > 1:
        reason = "heads of one width, and these attentions have widths of " + ", ".join(
            map(str, sorted(widths))
        )
        _refuse("num_heads", config.num_heads, reason)
    return widths.pop() // config.num_heads if widths else None


def _mid_attention_groups(config: UNetConfig) -> int | None:
    """The groups of the middle attention's normalisation; None is none with scale_shift, else norm_groups."""
    groups = config.mid_attention_groups
    if not (config.has_middle and config.mid_attention):
        return None
    if groups == 0 and not config.scale_shift:
        _refuse("mid_attention_groups", 0, "a normalisation before this attention unless scale_shift is true")
    return config.norm_groups if groups is None else groups or None


def _plain_resampling(config: UNetConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of the convolutions that stand for changes of resolution without one.

    After nearest-neighbour interpolation each output is its own pixel. With a stride of 2, each is the mean
    of the two by two pixels at its place, of the three by three that the convolution sees.
    """
    made: dict[str, torch.Tensor] = {}
    last, first = len(config.channel_mult) - 1, int(config.downsample_padding == "symmetric")
    for level, width in enumerate(config.level_channels):
        if config.level_upsample[level] == "plain":
            kernel = torch.zeros(3, 3, dtype=dtype, device="cpu")
            kernel[1, 1] = 1
            made |= _of_each_channel(kernel, width, f"up_blocks.{last - level}.upsamplers.0.conv")
        if config.level_downsample[level] == "plain":
            kernel = torch.zeros(3, 3, dtype=dtype, device="cpu")
            kernel[first : first + 2, first : first + 2] = 0.25
            made |= _of_each_channel(kernel, width, f"down_blocks.{level}.downsamplers.0.conv")
    return made


def _of_each_channel(kernel: torch.Tensor, width: int, name: str) -> dict[str, torch.Tensor]:
    weight = torch.eye(width, dtype=kernel.dtype, device="cpu")[:, :, None, None] * kernel
    return {
        f"{name}.weight": weight.contiguous(),
        f"{name}.bias": torch.zeros(width, dtype=kernel.dtype, device="cpu"),
    }
