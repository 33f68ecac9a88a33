"""Reads the network of denoising-diffusion-pytorch off the names and shapes of its tensors.

The layout of its UNet has changed between releases, and a few changes left no trace in the tensors: those are
decided by the release that trained the network.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..models.lucidrains_config import LucidrainsConfig
from ..utils.words import counted
from .flags import Flags

Tensors = dict[str, torch.Tensor]
Version = tuple[int, ...]

# The release, where neither the file nor a flag tells: the newest with the layout that was found.
NEWEST = "2.3.4"

_OLD = r"downs\.0\.0\.(block1\.block\.|ds_conv\.|net\.)|^(time_pos_emb|final_conv\.0)"
_NAMES: tuple[tuple[str, str], ...] = (
    (r"^init_conv\.", "input_conv."),
    (r"^time_mlp\.0\.weights$", "frequencies"),
    (r"^time_mlp\.1\.", "time_mlp.0."),
    (r"^time_mlp\.3\.", "time_mlp.2."),
    (r"^classes_mlp\.", "label_mlp."),
    (r"^(downs|ups)\.(\d+)\.0\.", r"\1.\2.block1."),
    (r"^(downs|ups)\.(\d+)\.1\.", r"\1.\2.block2."),
    (r"^(downs|ups)\.(\d+)\.2\.", r"\1.\2.attention."),
    (r"^(downs|ups)\.(\d+)\.3\.(1\.)?(weight|bias)$", r"\1.\2.resample.conv.\4"),
    (r"^downs\.", "down."),
    (r"^mid_block(\d)\.", r"mid.block\1."),
    (r"^mid_attn\.", "mid.attention."),
    (r"^final_res_block\.", "output_block."),
    (r"^final_conv\.", "output_conv."),
    (r"\.block(\d)\.proj\.", r".conv\1."),
    (r"\.block(\d)\.norm\.", r".norm\1."),
    (r"\.mlp\.1\.", ".projection."),
    (r"\.res_conv\.", ".skip."),
    (r"\.attention\.(fn\.)+", ".attention."),
    (r"\.to_qkv\.", ".qkv."),
    (r"\.to_out\.1\.", ".proj_norm."),
    (r"\.to_out\.(0\.)?", ".proj."),
    (r"\.mem_kv$", ".memory"),
    (r"\.g$", ".weight"),
    (r"\.b$", ".bias"),
)


class Release(NamedTuple):
    """The choices of a release that its tensors do not tell.

    standardised: the convolutions of blocks are divided by the deviation of their weights (Qiao et al. 2019,
    arXiv 1903.10520).
    """

    attention_norm: str
    qk_norm_scale: float | None
    mean_values: bool
    standardised: bool


def release(version: Version, groups: bool) -> Release:
    """The behaviour of a release. groups: its blocks have group normalisation, as up to release 1."""
    normalised = groups and (0, 26) <= version < (0, 28)
    return Release(
        attention_norm="layer" if groups and version < (1, 7) else "rms",
        qk_norm_scale=None if not normalised else 16.0 if version < (0, 27, 3) else 10.0,
        mean_values=groups and (0, 26, 4) <= version < (1, 7, 4),
        standardised=groups and (0, 27, 3) <= version < (1, 7, 2),
    )


def likely_version(tensors: Tensors, buffers: Tensors, milestone: bool) -> str:
    """The newest release of the layout of these tensors. milestone: the file is one of a Trainer, which tells
    its release from 1.0 on."""
    if "downs.0.0.block1.norm.g" in tensors:
        return NEWEST
    if any(name.endswith(".norm.b") for name in tensors):
        return "0.25.3"
    if "mid_attn.fn.norm.g" not in tensors:  # the attention has its own normalisation
        return "1.11.1" if "mid_attn.mem_kv" in tensors else "1.8.15"
    labels = "classes_emb.weight" in tensors
    if not labels and "downs.0.3.weight" in tensors and "downs.1.0.mlp.1.weight" in tensors:
        return "0.31.1"
    if milestone:
        return "0.32.0"
    if "p2_loss_weight" in buffers:
        return "1.4.6"
    return "1.11.1" if labels else "1.6.4"


def check_kind(tensors: Tensors, origin: str) -> None:
    """ValueError for a network of this project that is of another kind, with its name."""
    if any(re.search(_OLD, name) for name in tensors):
        raise ValueError(f"{origin} is of denoising-diffusion-pytorch before release 0.21, which is not read")
    first = tensors["init_conv.weight"]
    if first.ndim != 4:
        raise ValueError(
            f"{origin} holds a network for data of {counted(first.ndim - 2, 'dimension')}, not for images"
        )


def network_config(
    tensors: Tensors, flags: Flags, known: Release, sample_size: int | tuple[int, int], origin: str
) -> LucidrainsConfig:
    """The configuration of the UNet with these tensors, named as in the original.

    flags: for what the tensors do not tell. ValueError: tensors that belong to no such UNet.
    """

    def shape(name: str, dimensions: int) -> torch.Size:
        found = tensors.get(name)
        if found is None or found.ndim != dimensions:
            held = "no tensor" if found is None else f"a tensor {list(found.shape)}"
            raise ValueError(f"{origin} has {held} {name}, so it is no UNet of denoising-diffusion-pytorch")
        return found.shape

    levels = 0
    while f"downs.{levels}.0.block1.proj.weight" in tensors:
        levels += 1
    changes = [
        f"downs.{i}.3.{'1.' if f'downs.{i}.3.1.weight' in tensors else ''}weight" for i in range(levels)
    ]
    channels, rest = divmod(shape("time_mlp.3.weight", 2)[0], 4)
    widths = [shape(name, 4)[0] for name in changes]
    if rest or channels == 0 or any(width % channels for width in widths):
        raise ValueError(
            f"{origin}: levels of {widths} channels are no multiples of its base width {channels}"
        )
    inputs, outputs = shape("init_conv.weight", 4)[1], shape("final_conv.weight", 4)[0]
    self_condition = inputs == 2 * outputs
    images = outputs if self_condition else inputs
    if outputs not in (images, 2 * images):
        hint = " (WeightedObjectiveGaussianDiffusion)" if outputs == 2 * images + 2 else ""
        raise ValueError(
            f"{origin} makes {counted(outputs, 'channel')} of {inputs}{hint}, which cannot be sampled"
        )
    places = [f"downs.{i}.2" for i in range(levels)] + ["mid_attn"]
    full = [
        any(name.startswith(f"{place}.") and name.endswith("to_out.weight") for name in tensors)
        for place in places
    ]
    heads, memory = _heads(tensors, flags, places, full, shape)
    groups = None
    if "downs.0.0.block1.norm.weight" in tensors:
        groups = flags.get("resnet_block_groups", 8, int)
    fourier = 2 * shape("time_mlp.0.weights", 1)[0] if "time_mlp.0.weights" in tensors else None
    labels = "classes_emb.weight" in tensors
    unshuffles = levels < 2 or changes[0].endswith(".1.weight")
    return LucidrainsConfig(
        sample_size=sample_size,
        in_channels=images,
        out_channels=outputs,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        init_channels=shape("init_conv.weight", 4)[0],
        self_condition=self_condition,
        full_attention=tuple(full[:-1]),
        num_heads=tuple(count for count, _ in heads),
        head_channels=tuple(width for _, width in heads),
        memory_tokens=memory,
        attention_norm=known.attention_norm,
        qk_norm_scale=known.qk_norm_scale,
        mean_values=known.mean_values,
        norm_groups=groups,
        downsample="unshuffle" if unshuffles else "conv",
        fourier_channels=fourier,
        theta=10000.0 if fourier or labels else flags.get("sinusoidal_pos_emb_theta", 10000.0, float),
        dropout=flags.get("dropout", 0.0, float),
        num_classes=shape("classes_emb.weight", 2)[0] if labels else None,
    )


def _heads(
    tensors: Tensors,
    flags: Flags,
    places: list[str],
    full: list[bool],
    shape: Callable[[str, int], torch.Size],
) -> tuple[list[tuple[int, int]], int]:
    """Number and width of the heads of each attention, and the number of its memory tokens."""
    if "mid_attn.mem_kv" in tensors:
        shapes = [shape(f"{place}.mem_kv", 4) for place in places]
        found = [(s[1], s[3] if is_full else s[2]) for s, is_full in zip(shapes, full, strict=True)]
        flags.agree("attn_heads", tuple(count for count, _ in found[:-1]), int | tuple[int, ...])
        return found, shapes[-1][2]
    wanted: Any = flags.get("attn_heads", 4, int | tuple[int, ...])
    counts = list(wanted) if isinstance(wanted, tuple) else [wanted] * (len(places) - 1)
    counts.append(counts[-1])
    if len(counts) != len(places):
        raise ValueError(f"flag attn_heads must be a number, or {len(places) - 1} of them, not {wanted}")
    if "classes_emb.weight" in tensors:  # its linear attention always has 4 heads
        counts[:-1] = [4] * (len(counts) - 1)
    heads = []
    for place, count in zip(places, counts, strict=True):
        name = next((n for n in tensors if n.startswith(f"{place}.") and n.endswith("to_qkv.weight")), place)
        width = shape(name, 4)[0] // 3
        if count < 1 or width % count:
            raise ValueError(
                f"flag attn_heads: {counted(width, 'channel')} of {name} cannot be divided "
                f"into {counted(count, 'head')}"
            )
        heads.append((count, width // count))
    return heads, 0


def network_weights(config: LucidrainsConfig, tensors: Tensors, standardised: bool) -> Tensors:
    """The state dict of `LucidrainsUNet` from that of the original."""
    tensors = dict(tensors)
    levels, weights = len(config.channel_mult), {}
    if config.num_classes is not None:
        null = tensors.pop("null_classes_emb", torch.empty(0, device="cpu"))
        weights["label_embedding.weight"] = torch.cat(
            [tensors.pop("classes_emb.weight"), null.reshape(-1, config.channels)]
        )
    for name, tensor in tensors.items():
        ours = name
        for pattern, replacement in _NAMES:
            ours = re.sub(pattern, replacement, ours)
        ours = re.sub(r"^ups\.(\d+)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", ours)
        if name.endswith((".g", ".b")):
            tensor = tensor.flatten()
        if standardised and re.search(r"\.conv[12]\.weight$", ours):
            tensor = _standardise(tensor)
        weights[ours] = tensor
    if config.attention_norm == "layer":  # later releases have no shift
        for name in [n for n in weights if re.search(r"\.attention\.(proj_)?norm\.weight$", n)]:
            weights.setdefault(name.replace("weight", "bias"), torch.zeros_like(weights[name]))
    return weights


def _standardise(weight: torch.Tensor) -> torch.Tensor:
    """Each filter with mean 0 and variance 1, as the original does before every convolution."""
    variance, mean = torch.var_mean(weight.float(), dim=(1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) * (variance + 1e-5).rsqrt()
