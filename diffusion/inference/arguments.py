"""Checks of arguments of `DDPM.sample`, with errors that say what usual mistakes should be."""

from functools import cache, partial
from typing import Any

import numpy as np
import torch

from .. import kernels
from ..models.class_names import numbered
from ..models.network import NetworkConfig
from ..models.structure import config_of
from ..samplers.thresholding import thresholded_step
from ..utils.device import check_dtype, multiplies_bfloat16, resolve_device, resolve_dtype
from ..utils.validation import choice, number, refuse, shown, whole_number, whole_numbers
from ..utils.words import counted
from .denoiser import Denoiser, own_dtype
from .loop import Threshold

PRECISIONS = ("exact", "tf32", "fast")


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
            f"batch_size is the number of images made at a time; for {counted(batch_size, 'image')} "
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


def labels_and_ids(
    labels: Any,
    num_samples: int | None,
    sample_ids: Any,
    config: NetworkConfig,
    class_names: tuple[str, ...] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Labels int64 [N] or None, and sample ids int64 [N], both on the CPU, from arguments of `DDPM.sample`.

    num_samples: a valid number of images, or None. config: of the network. ValueError where the arguments do
    not fit the network or each other.
    """
    if labels is not None and config.label_size is None:
        if config.num_classes is None:
            raise ValueError("labels are given, but this model is unconditional")
        check_one_hot(labels, config.num_classes)
        labels = numbered(labels, class_names, config.num_classes)
        labels = whole_numbers("labels", labels, 0, config.num_classes - 1)
    if labels is None and config.null_label is None and config.num_classes is not None:
        raise ValueError("this model was trained without a null label, so it needs labels")
    count = len(labels) if labels is not None else 1
    if sample_ids is not None:
        sample_ids = whole_numbers("sample_ids", sample_ids, 0)
        count = len(sample_ids) if count == 1 else count
    if num_samples is not None:
        count = num_samples
    if count == 0:
        raise ValueError(f"{'sample_ids' if labels is None else 'labels'} are empty; give at least one")
    if labels is not None and len(labels) == 1:
        labels = labels.expand(count).clone()
    if labels is not None and len(labels) != count:
        raise ValueError(f"there are {counted(len(labels), 'label')} for {counted(count, 'image')}")
    if sample_ids is None:
        sample_ids = torch.arange(count, device="cpu")
    if len(sample_ids) != count:
        raise ValueError(f"sample_ids must be {count}, one for each image, not {len(sample_ids)}")
    return labels, sample_ids


def vectors_of(labels: Any, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct vectors [K, size] among labels [N, size], and the row of each label, int64 [N]."""
    found = isinstance(labels, torch.Tensor) and labels.ndim == 2 and labels.shape[1] == size
    if not found or not labels.is_floating_point():
        refuse("labels", f"vectors [N, {size}], a tensor of floats", labels)
    return labels.detach().float().cpu().unique(dim=0, return_inverse=True)


def guidance_of(
    guidance_scale: float | None, own: float, labels: torch.Tensor | None, null_label: int | None
) -> float:
    """The guidance scale; ValueError unless it is 1, or there are labels and a null label.

    own: the model's, which takes the place of None for images that can be guided.
    """
    if guidance_scale is None:
        return 1.0 if labels is None or null_label is None else own
    guidance = number("guidance_scale", guidance_scale)
    if labels is None and guidance != 1:
        raise ValueError("guidance_scale needs labels to guide towards; without labels it must be 1")
    if labels is not None and null_label is None and guidance != 1:
        raise ValueError("this model has no null label, so guidance_scale must be 1")
    return guidance


def where_to_sample(
    unet: torch.nn.Module,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    precision: str,
) -> tuple[torch.device, torch.dtype]:
    """The device that samples, and the dtype that the network has there, for arguments of `DDPM.sample`."""
    config_of(unet)
    device = resolve_device(next(unet.parameters()).device if device is None else device)
    choice("precision", precision, PRECISIONS)
    if dtype is None and precision == "fast" and multiplies_bfloat16(device):
        dtype = torch.bfloat16
    dtype = own_dtype(unet) if dtype is None else resolve_dtype(dtype)
    check_dtype(device, dtype)
    return device, dtype
