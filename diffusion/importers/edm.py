"""Reads state dicts of NVlabs/edm: the networks of Karras et al. 2022, arXiv 2206.00364.

The project's own files are pickles that hold code, so they are refused; `net.state_dict()`, saved by
`torch.save`, is read. Names and shapes of the tensors tell the whole architecture.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.edm import EDMConfig, EDMUNet
from ..models.edm_preconditioning import PRECONDITIONINGS, to_fixed
from ..process.noise_levels import NoiseLevels
from ..storage.checkpoint import load_network
from ..storage.reading import check_finite, check_weights, open_regular
from ..utils.validation import choice, known_names, number
from ..utils.words import counted
from .checkpoint_file import Checkpoint, state_dict
from .imported import Imported

NAME = "edm"
HUB_FILES: tuple[str, ...] = ()  # read from a local file only
FLAGS = {
    "precond": "preconditioning of the network, edm, vp or ve (as train.py --precond); edm is assumed",
    "sigma_data": "standard deviation of the training images, of --flag precond=edm; 0.5 is assumed",
}
BLOCK = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "embedding",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "skip",
    "norm2": "attention.norm",
    "qkv": "attention.qkv",
    "proj": "attention.proj",
}
OUTSIDE = {
    "map_layer0": "embed_0",
    "map_layer1": "embed_1",
    "map_label": "embed_label",
    "out_norm": "up.0.output_norm",
    "out_conv": "up.0.output_conv",
}
IN_LEVEL = re.compile(r"(enc|dec)\.(\d+)x\2_([a-z]+_?[a-z]*?)(\d*)\.(.+)")
PICKLE_MARK = b"torch_utils.persistence"


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether a file holds tensors named as in NVlabs/edm, or is one of that project's pickles."""
    if checkpoint.is_folder:
        return False
    if _is_pickle_of_code(checkpoint):
        return True
    try:
        tensors = _tensors(checkpoint)
    except ValueError:
        return False
    names = tensors.keys()
    return "map_layer0.weight" in names and any(re.match(r"enc\.(\d+)x\1_conv\.weight", n) for n in names)


def load(checkpoint: Checkpoint, /, **flags: Any) -> Imported:
    """The network of a state dict, and the process of its preconditioning.

    flags: see `FLAGS`. The model samples by `samplers.heun` in 18 steps, as the project's generate.py.
    ValueError, in one line: a file that is missing, damaged, holds code, or has another architecture.
    """
    known_names("flag", flags, FLAGS)
    if _is_pickle_of_code(checkpoint):
        raise ValueError(
            f"{checkpoint.path} is a pickle that holds code, which is not run here; if you trust the file, "
            'save its weights in a clone of its project by: python -c "import pickle, torch; '
            f"net = pickle.load(open('{checkpoint.path.name}', 'rb'))['ema']; "
            "torch.save(net.state_dict(), 'weights.pt')\""
        )
    origin, tensors = str(checkpoint.path), _tensors(checkpoint)
    check_weights(tensors, origin)
    check_finite(tensors, origin)
    precond = choice("flag precond", flags.get("precond", _told(tensors)), PRECONDITIONINGS)
    if precond != "iddpm" and "u" in tensors:
        raise ValueError(f"{origin} has the noise levels of improved DDPM, but precond is {precond}")
    sigma_data = number("flag sigma_data", flags.get("sigma_data", 0.5), above=0)
    config = read_config(tensors, precond, sigma_data, origin)
    network = load_network(config, convert_weights(config, tensors), origin)
    assert isinstance(network, EDMUNet)
    assumed: dict[str, Any] = {"precond": precond} if "u" not in tensors else {}
    if precond == "edm":
        assumed["sigma_data"] = sigma_data
    conventions = {"prediction_type": "sample", "clip": None, "sampler": {"name": "heun", "steps": 18}}
    levels = network.discrete_levels()
    process = NoiseLevels.of(precond, None if levels is None else levels.tolist())
    return Imported(network, process, conventions, {k: v for k, v in assumed.items() if k not in flags})


def _is_pickle_of_code(checkpoint: Checkpoint) -> bool:
    if checkpoint.is_folder or checkpoint.path.suffix not in (".pkl", ".pickle"):
        return False
    try:
        with open_regular(checkpoint.path) as file:
            return PICKLE_MARK in file.read(2**16)
    except ValueError:
        return False


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a file by the names of the network within, without "model."; empty for another file."""
    contents, tensors = checkpoint.contents, checkpoint.tensors
    for key in ("ema", "net"):  # as the project's own files name the averaged network, and that in training
        if not tensors and isinstance(contents, Mapping):
            tensors = state_dict(contents.get(key))
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _told(tensors: Mapping[str, Tensor]) -> str:
    """The preconditioning, as far as it can be told: that of improved DDPM has a table of noise levels."""
    return "iddpm" if "u" in tensors else "edm"


def read_config(tensors: Mapping[str, Tensor], precond: str, sigma_data: float, origin: str) -> EDMConfig:
    """The architecture, from the names and shapes of a state dict; ValueError for another project's."""

    def shape(name: str) -> torch.Size:
        if name not in tensors or tensors[name].ndim < 2 or not tensors[name].numel():
            raise ValueError(f"{origin} holds no network of NVlabs/edm: no {name}, or one of another shape")
        return tensors[name].shape

    sizes = _sizes(tensors, origin)
    adm = "out_conv.weight" in tensors
    first, (embedding, noise) = shape(f"enc.{sizes[0]}_conv.weight"), shape("map_layer0.weight")[:2]
    channels = noise if adm else first[0]
    widths = [shape(f"enc.{size}_block0.conv0.weight")[0] for size in sizes]
    for name, width in (
        ("embedding", embedding),
        ("noise embedding", noise),
        *(("level", w) for w in widths),
    ):
        if width % channels:
            raise ValueError(
                f"{origin}: a {name} of {counted(width, 'channel')} is no multiple of the "
                f"base width {channels}"
            )
    outputs = shape("out_conv.weight" if adm else f"dec.{sizes[0]}_aux_conv.weight")[0]
    if outputs != first[1] * (2 if precond == "iddpm" else 1):
        hint = "; the flag precond=iddpm takes two" if outputs == 2 * first[1] else ""
        raise ValueError(
            f"{origin} has {counted(outputs, 'output channel')} for {first[1]} of the images{hint}"
        )
    options: dict[str, Any] = {}
    if not adm:
        auxiliary = [name for name in ("skip", "residual") if _has(tensors, f"enc.{{}}_aux_{name}.", sizes)]
        options = {
            "embedding": "fourier" if "map_noise.freqs" in tensors else "positional",
            "noise_mult": noise // channels,
            "encoder": auxiliary[0] if auxiliary else "standard",
            "decoder": "skip" if _has(tensors, "dec.{}_aux_conv.", sizes[1:]) else "standard",
        }
    for size in sizes[1:]:
        if f"enc.{size}_down.conv0.resample_filter" not in tensors:
            raise ValueError(
                f"{origin} lacks buffers, such as enc.{size}_down.conv0.resample_filter, without which the "
                "network is unknown; save net.state_dict()"
            )
    taps = _taps(tensors, origin)
    if taps is not None:
        options["resample_filter"] = taps
    if "u" in tensors:
        if tensors["u"].ndim != 1 or len(tensors["u"]) < 3:
            raise ValueError(f"{origin}: u must be a list of noise levels, not {list(tensors['u'].shape)}")
        options["num_levels"] = len(tensors["u"]) - 1
    return EDMConfig(
        sample_size=int(sizes[0].split("x")[0]),
        in_channels=first[1],
        kind="adm" if adm else "song",
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        embedding_mult=embedding // channels,
        num_res_blocks=sum(f"enc.{sizes[0]}_block{i}.conv0.weight" in tensors for i in range(65)),
        attention_levels=tuple(
            level for level, size in enumerate(sizes) if f"enc.{size}_block0.qkv.weight" in tensors
        ),
        num_classes=shape("map_label.weight")[1] if "map_label.weight" in tensors else None,
        preconditioning=precond,
        sigma_data=sigma_data,
        **options,
    )


def _sizes(tensors: Mapping[str, Tensor], origin: str) -> list[str]:
    """The resolutions of the levels as names have them, such as "32x32", from the finest on."""
    matches = (re.match(r"enc\.(\d+)x\1_", name) for name in tensors)
    found = sorted({int(match[1]) for match in matches if match}, reverse=True)
    if not found or found != [found[0] >> level for level in range(len(found))]:
        raise ValueError(f"{origin} holds no network of NVlabs/edm: its resolutions are {found}")
    return [f"{size}x{size}" for size in found]


def _has(tensors: Mapping[str, Tensor], pattern: str, sizes: list[str]) -> bool:
    """Whether a level has a tensor whose name begins so."""
    return any(name.startswith(pattern.format(size)) for size in sizes for name in tensors)


def _taps(tensors: Mapping[str, Tensor], origin: str) -> tuple[float, ...] | None:
    """The taps along one axis of the filters that change the resolution; None where none does."""
    filters = [tensor.double() for name, tensor in tensors.items() if name.endswith(".resample_filter")]
    if not filters:
        return None
    taps = filters[0].flatten(0, -2).sum(0) if filters[0].ndim == 4 else filters[0].flatten()
    for kernel in filters:
        square = kernel.shape == (1, 1, len(taps), len(taps))
        if not square or not torch.allclose(kernel[0, 0], torch.outer(taps, taps), rtol=1e-3, atol=1e-6):
            raise ValueError(f"{origin}: the resample_filters are not one separable, symmetric filter")
    return tuple(taps.float().tolist())


def convert_weights(config: EDMConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `EDMUNet` from that of a network of NVlabs/edm, without "model.".

    Left out are the embedding of augmentations, which is not used in sampling, and the variance of improved
    DDPM, which the sampler does not use either.
    """
    size, weights = config.image_shape[0], {}
    levels = {size >> level: level for level in range(len(config.channel_mult))}
    for name, tensor in tensors.items():
        if name == "map_augment.weight" or name.endswith(".resample_filter"):
            continue
        if name == "u":
            weights["precondition.fixed_levels"] = to_fixed(tensor)
        elif name == "map_noise.freqs":
            weights["fourier.fixed_frequencies"] = to_fixed(tensor)
        elif match := IN_LEVEL.fullmatch(name):
            way, resolution, part, index, rest = match.groups()
            level = levels.get(int(resolution), -1)
            prefix = _part(way, level, part, index)
            if part in ("block", "in", "up", "down"):
                inner, _, kind = rest.partition(".")
                if inner == "qkv":
                    tensor = _ordered(tensor, config.level_heads(level))
                rest = f"{BLOCK.get(inner, inner)}.{kind}"
            weights[f"{prefix}.{rest}"] = tensor
        else:
            head, _, kind = name.partition(".")
            weights[f"{OUTSIDE.get(head, head)}.{kind}"] = tensor
    if config.preconditioning == "iddpm":
        for name in weights:
            if ".output_conv." in name and weights[name].shape[:1] == (2 * config.in_channels,):
                weights[name] = weights[name][: config.in_channels]
    return weights


def _part(way: str, level: int, part: str, index: str) -> str:
    """The name, in `EDMUNet`, of a part of a level."""
    if way == "enc" and part == "conv":
        return "input_conv"
    if part == "in":
        return f"middle.{index}"
    ours = {"enc": "down", "dec": "up"}[way] + f".{level}"
    if part == "block":
        return f"{ours}.blocks.{index}"
    inner = {
        "down": "resample",
        "up": "resample",
        "aux_skip": "auxiliary",
        "aux_residual": "auxiliary",
        "aux_norm": "output_norm",
        "aux_conv": "output_conv",
    }
    return f"{ours}.{inner.get(part, part)}"


def _ordered(qkv: Tensor, heads: int) -> Tensor:
    """The rows of qkv by (q, k, v), head and channel, from rows by head, channel and (q, k, v)."""
    if not heads or not qkv.ndim or len(qkv) % (3 * heads):
        return qkv  # of a shape that `load_weights` refuses
    return qkv.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)
