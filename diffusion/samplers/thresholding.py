"""Dynamic thresholding of the predicted x_0, done between the model and an ordinary reverse step."""

import math

import torch

from ..kernels import Row
from ..utils.validation import number


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
    row: Row,
    x: torch.Tensor,
    out: torch.Tensor,
    x0_prev: torch.Tensor | None = None,
    *,
    ratio: float = 0.995,
    max_value: float = 1.0,
) -> tuple[Row, torch.Tensor, torch.Tensor]:
    """(row', x0_prev', x0): the step `row` with a dynamically thresholded x_0 as arguments for reverse_step.

    x: x_t; out: the guided model output without variance channels, like x; x0_prev: the x0 that the previous
    step's call returned here, needed where row.d is not 0. The step's x_0 goes in through row's term
    d * x0_prev, as x0_prev' = b x_0 + d x0_prev; reverse_step(x, model_output, row', x0_prev=x0_prev', ...)
    then gives the right x_next, and 0 for its own x_0. The noise prediction in the step (DDIM) is that from
    before the thresholding.
    """
    x0 = dynamic_threshold(row.p_x * x + row.p_o * out, ratio, max_value)
    carried = row.b * x0
    if row.d != 0:
        if x0_prev is None:
            raise ValueError("this step needs x0_prev, the thresholded x0 of the step before")
        carried = carried + row.d * x0_prev
    return row._replace(p_x=0.0, p_o=0.0, b=0.0, d=1.0), carried, x0
