"""Checks of arguments of `DDPM.sample`, with errors that say what usual mistakes should be."""

from functools import cache, partial
from typing import Any

import numpy as np
import torch

from .. import kernels
from ..samplers.thresholding import thresholded_step
from ..utils.validation import number, refuse, shown, whole_number
from .denoiser import Denoiser
from .loop import Threshold


def check_functions(noise: Any, callback: Any) -> None:
    """ValueError unless each is a function or None, or the noise is a tensor."""
    if isinstance(noise, np.ndarray):
        raise ValueError(f"noise must be a tensor, not {shown(noise)}; take torch.from_numpy(noise).float()")
    if noise is not None and not isinstance(noise, torch.Tensor) and not callable(noise):
        refuse("noise", "a function, a tensor [N, C, H, W], or None", noise)
    if callback is not None and not callable(callback):
        refuse("callback", "a function, or None", callback)


def check_batch_size(batch_size: Any, labels: Any, *others: Any) -> int | None:
    """`batch_size` as an int, or None; ValueError where it is given instead of a number of images.

    others: the further arguments that give a number of images.
    """
    if batch_size is None:
        return None
    batch_size = whole_number("batch_size", batch_size, 1, 2**31 - 1)
    one = labels is None or isinstance(labels, int) or getattr(labels, "ndim", 1) == 0
    if batch_size > 1 and one and all(other is None for other in others):
        raise ValueError(
            f"batch_size is the number of images made at a time; for {batch_size} images "
            f"give num_samples={batch_size}"
        )
    return batch_size


def check_one_hot(labels: Any, num_classes: int) -> None:
    """ValueError for rows of numbers where labels are whole numbers."""
    if isinstance(labels, torch.Tensor | np.ndarray) and labels.ndim == 2:
        rows = "; of one-hot rows, take labels.argmax(1)" if labels.shape[1] == num_classes else ""
        raise ValueError(f"labels must be [N], a whole number for each image, not {shown(labels)}{rows}")


def check_draws(denoiser: Denoiser) -> None:
    """ValueError with the reason where the backend cannot draw noise, before the first step."""
    kernels.philox_normal((0, 1), seed=0, device=denoiser.device, backend=denoiser.backend)


@cache
def _thresholding(ratio: float, max_value: float) -> Threshold:
    """The same function each time, since captured steps are known by it."""
    return partial(thresholded_step, ratio=ratio, max_value=max_value)


def threshold_of(ratio: float | None, max_value: float) -> Threshold | None:
    """`thresholded_step` with these arguments of `DDPM.sample`, or None without a ratio."""
    max_value = number("dynamic_threshold_max", max_value, 1, infinite=True)
    if ratio is None:
        return None
    return _thresholding(number("dynamic_threshold", ratio, 0, 1), max_value)
