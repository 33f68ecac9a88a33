"""Dynamic thresholding of the predicted x_0, done between the model and an ordinary reverse step."""

import math
from collections.abc import Callable

import torch

from ..kernels import StepCoefficients
from ..utils.validation import number

# The coefficients of a step whose x0_prev holds all that its own x_0 and the one before add up to.
THRESHOLDED = {"x0_from_x": 0.0, "x0_from_output": 0.0, "coef_x0": 0.0, "coef_x0_prev": 1.0}
Threshold = Callable[..., tuple[StepCoefficients, torch.Tensor, torch.Tensor]]  # as `thresholded_step`


def dynamic_threshold(x0: torch.Tensor, ratio: float = 0.995, max_value: float = 1.0) -> torch.Tensor:
    """x0 [B, ...] clipped, image by image, to [-s, s] and divided by s.

    s is the quantile `ratio` of the image's absolute values, but at least 1 and at most max_value (Saharia et
    al. 2022, arXiv 2205.11487, section 2.3). ratio in [0, 1]; max_value at least 1, where 1 is static
    clipping to [-1, 1]. ValueError otherwise.
    """
    ratio = number("ratio", ratio, 0, 1)
    max_value = number("max_value", max_value, 1, infinite=True)
    magnitudes = x0.abs().flatten(1)
    position = ratio * (magnitudes.shape[1] - 1)
    below = math.floor(position)
    # topk, because torch.quantile refuses more than 2^24 elements up to torch 2.13 at least.
    largest = magnitudes.topk(magnitudes.shape[1] - below, dim=1).values
    lower, upper = largest[:, -1], largest[:, max(largest.shape[1] - 2, 0)]
    s = torch.lerp(lower, upper, position - below).clamp(1, max_value)
    s = s.reshape(-1, *[1] * (x0.ndim - 1))
    return torch.clamp(x0, -s, s) / s


def thresholded_step(
    row: StepCoefficients,
    x: torch.Tensor,
    out: torch.Tensor,
    x0_prev: torch.Tensor | None = None,
    *,
    ratio: float = 0.995,
    max_value: float = 1.0,
) -> tuple[StepCoefficients, torch.Tensor, torch.Tensor]:
    """(row', x0_prev', x0): the step `row` with a dynamically thresholded x_0 as arguments for reverse_step.

    row: of numbers, or of tensors without dimensions. x: x_t; out: the guided model output without variance
    channels, like x; x0_prev: the x0 that the previous step's call returned here, needed where
    row.coef_x0_prev is not 0.

    The thresholded x_0 takes the place of the previous one: x0_prev' = coef_x0 x_0 + coef_x0_prev x0_prev,
    and row' has coef_x0 = 0 and coef_x0_prev = 1. reverse_step(x, model_output, row', x0_prev=x0_prev', ...)
    then gives the right x_next, and 0 for its own x_0. DDIM's noise prediction is that from before the
    thresholding.
    """
    x0 = dynamic_threshold(row.x0_from_x * x + row.x0_from_output * out, ratio, max_value)
    carried = row.coef_x0 * x0
    if x0_prev is not None:
        carried = carried + row.coef_x0_prev * x0_prev
    elif row.coef_x0_prev != 0:
        raise ValueError("this step needs x0_prev, the thresholded x0 of the step before")
    return row._replace(**THRESHOLDED), carried, x0
