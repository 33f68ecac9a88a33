"""Options that several commands share, and their values."""

import argparse
import inspect

import torch

from ..ddpm import DDPM
from ..samplers import SAMPLERS
from ..utils.device import resolve_device
from ..utils.ranks import Ranks

_SAMPLER_HELP = {
    "eta": "noise, from 0 (deterministic) to 1 (as much as ddpm)",
    "variance": "fixed_small, fixed_large or learned_range (default: the model's)",
    "sde": "use its stochastic form",
    "use_clipped_model_output": "derive the noise from the clipped image (default: the model's)",
}


def add_computation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that decide how a model is evaluated: device, precision, backend and batch size."""
    add = parser.add_argument
    add("--batch-size", type=int, help="number of images made at a time (default: chosen by memory)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add(
        "--precision",
        default="exact",
        help="exact or fast, which computes in bfloat16 (default: %(default)s)",
    )
    add("--dtype", help="of the UNet: float32, bfloat16, float16 or float64 (default: that of --precision)")
    add(
        "--backend", default="auto", help="of the kernels: auto, reference, cpp, cuda, triton (default: auto)"
    )


def own_sampler_options() -> dict[str, tuple[str, inspect.Parameter]]:
    """The options that not all samplers have, by name: the first sampler that has it, and its parameter."""
    signatures = {name: inspect.signature(sampler).parameters for name, sampler in SAMPLERS.items()}
    shared = set.intersection(*(set(parameters) for parameters in signatures.values()))
    found: dict[str, tuple[str, inspect.Parameter]] = {}
    for sampler, parameters in signatures.items():
        for option in parameters.keys() - shared - found.keys():
            found[option] = sampler, parameters[option]
    return dict(sorted(found.items()))


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each parameter of `own_sampler_options`; None where it is not given."""
    for name, (sampler, parameter) in own_sampler_options().items():
        kind = parameter.annotation if isinstance(parameter.annotation, type) else float
        words = f"{sampler}: {_SAMPLER_HELP.get(name, f'its option {name}')}"
        option = f"--{name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(option, action="store_true", default=None, help=words)
        else:
            parser.add_argument(option, type=kind, help=words)


def default_device() -> str:
    """ "cuda" where PyTorch sees a GPU, otherwise "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_device(name: str | None, ranks: Ranks) -> torch.device:
    """The device asked for; of several ranks on one machine each has a GPU of its own."""
    device = resolve_device(name or default_device())
    if device.type == "cuda" and ranks.world_size > 1:
        device = resolve_device(f"cuda:{ranks.local_rank}")
        torch.cuda.set_device(device)
    return device


def choose_labels(model: DDPM, words: list[str] | None, num: int | None) -> tuple[list[int] | None, int]:
    """A label for each image (None: unconditional) and the number of images, from the command line."""
    if num is not None:
        num = model.check_count(num, "--num")
    if words == ["none"] or (words is None and model.num_classes is None):
        return None, num or 20
    labels = list(range(model.num_classes)) if words is None else parse_labels(words)
    num = num or len(labels) * (4 if words is None else 1)
    return [labels[i % len(labels)] for i in range(num)], num


def parse_labels(words: list[str]) -> list[int]:
    """["0-3", "7"] or ["0-3,7"] to [0, 1, 2, 3, 7]; ValueError for anything else."""
    labels = []
    for word in " ".join(words).replace(",", " ").split():
        first, dash, last = word.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"unknown label {word!r}; write numbers and ranges, such as 0-9 or 3 1 4")
        low, high = int(first), int(last or first)
        if high < low or high - low > 100_000:
            raise ValueError(f"the range of labels {word!r} goes backwards or is too long")
        labels.extend(range(low, high + 1))
    if not labels:
        raise ValueError("--labels needs at least one label")
    return labels
