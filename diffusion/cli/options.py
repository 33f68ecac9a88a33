"""Options that several commands share, and their values."""

import argparse
from typing import Any, get_args

import torch

from ..ddpm import DDPM
from ..samplers import FULL_CHAIN, own_options
from ..utils.device import resolve_device
from ..utils.errors import printable
from ..utils.ranks import Ranks
from ..utils.validation import whole_number

DEFAULT_SAMPLER: dict[str, Any] = {"sampler": "ddim", "steps": 50}  # of models without one of their own
GUIDANCE_SCALE = 2.0


def add_computation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that decide how a model is evaluated: device, precision, backend and batch size."""
    add = parser.add_argument
    add("--batch-size", type=int, help="number of images made at a time (default: chosen by memory)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add(
        "--precision",
        default="exact",
        help="exact; tf32, which rounds float32 products on a GPU; or fast, which computes in bfloat16 "
        "(default: exact)",
    )
    add("--dtype", help="dtype of the UNet: float32, bfloat16, float16 or float64 (default: by --precision)")
    add(
        "--backend",
        default="auto",
        help="backend of the kernels: auto, reference, cpp, cuda, triton (default: auto)",
    )


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of single samplers; an option that is not given is None.

    Type and help come from the `Annotated` type of the sampler's argument.
    """
    for name, samplers in own_options().items():
        annotation = next(iter(samplers.values()))
        kind, words = get_args(annotation) or (annotation, name.replace("_", " "))
        form: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        option, only = f"--{name.replace('_', '-')}", ", ".join(samplers)
        parser.add_argument(option, default=None, help=f"{only}: {words} (default: the model's)", **form)


def default_device() -> str:
    """ "cuda" where PyTorch sees a GPU, otherwise "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_device(name: str | None, ranks: Ranks) -> torch.device:
    """The device of this name or by default; each of several ranks on one machine has its own GPU."""
    device = resolve_device(name or default_device())
    if device.type == "cuda" and ranks.world_size > 1:
        device = resolve_device(f"cuda:{ranks.local_rank}")
        torch.cuda.set_device(device)
    return device


def choose_sampler(model: DDPM, sampler: str | None, steps: int | None) -> tuple[str, int | None]:
    """The name of the sampler and its number of steps, None for all T, from the command line.

    What is left out is the model's own, or else that of DEFAULT_SAMPLER.
    """
    if steps is not None:
        whole_number("--steps", steps, 1, model.schedule.max_steps)
    if sampler is None and model.sampler is None:
        sampler = DEFAULT_SAMPLER["sampler"]
    name, steps, _ = model.chosen_sampler(sampler, steps)
    if steps is None and name not in FULL_CHAIN and (model.sampler or {}).get("name") != name:
        steps = min(DEFAULT_SAMPLER["steps"], model.schedule.max_steps)
    return name, steps


def choose_guidance(model: DDPM, scale: float | None, conditional: bool) -> float:
    """The guidance scale from the command line; by default the model's own.

    conditional: whether there are labels. GUIDANCE_SCALE is that of a model that does not say how it is
    sampled.
    """
    if scale is not None or not conditional:
        return 1.0 if scale is None else scale
    if model.guidance_scale == 1 and model.sampler is None and model.null_label is not None:
        return GUIDANCE_SCALE
    return model.guidance_scale


def choose_labels(model: DDPM, words: list[str] | None, num: int | None) -> tuple[list[int] | None, int]:
    """A label for each image (None: unconditional) and the number of images, from the command line."""
    if num is not None:
        num = model.check_count(num, "--num")
    labels: list[int] | None
    if words is None:
        labels = None if model.num_classes is None else list(range(model.num_classes))
    else:
        labels = None if words == ["none"] else parse_labels(words, model.class_names)
    if labels is None:
        return None, num or 20
    num = num or len(labels) * (4 if words is None else 1)
    return [labels[i % len(labels)] for i in range(num)], num


def parse_labels(words: list[str], names: tuple[str, ...] | None = None) -> list[int]:
    """["0-3", "7"] or ["0-3,7"] to [0, 1, 2, 3, 7], and a name of a class to its number.

    names: those of the model's classes, before which a number or a range is not looked for. ValueError for
    anything else.
    """
    numbers = {name: label for label, name in enumerate(names or ())}
    labels: list[int] = []
    parts = [[word] if word in numbers else word.replace(",", " ").split() for word in words]
    for word in (word for part in parts for word in part):
        if word in numbers:
            labels.append(numbers[word])
            continue
        first, dash, last = word.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            known = "" if names is None else f", or names: {printable(', '.join(names))}"
            raise ValueError(f"unknown label {word!r}; write numbers and ranges, such as 0-9 or 3 1 4{known}")
        low, high = int(first), int(last or first)
        if high < low or high - low > 100_000:
            raise ValueError(f"the range of labels {word!r} goes backwards or is too long")
        labels.extend(range(low, high + 1))
    if not labels:
        raise ValueError("--labels needs at least one label")
    return labels
