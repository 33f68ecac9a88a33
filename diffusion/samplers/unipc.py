"""UniPC: a predictor and a corrector of any order, with one evaluation of the network in a step."""

import math
from typing import Annotated

import numpy as np
import torch

from ..process.schedule import NoiseSchedule
from ..utils.validation import choice, switch, whole_number
from .options import (
    EPSILON_AT_ZERO_SNR,
    FINAL_SIGMAS,
    FINAL_SIGMAS_TYPE,
    SOLVER_ORDER,
    SOLVER_TYPE,
    STEPS_OFFSET,
)
from .solver import finite_levels, log_snr_half
from .table import History, StepTable, first_step, make_table, next_alphas_cumprod
from .timesteps import visited_timesteps

UNIPC_TYPES = ("bh1", "bh2")


def unipc(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = 1.0,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    strength: float = 1.0,
    solver_order: Annotated[int, SOLVER_ORDER] = 2,
    solver_type: Annotated[str, SOLVER_TYPE] = "bh2",
    predict_x0: Annotated[bool, "integrate the image, not the noise"] = True,
    final_sigmas_type: Annotated[str, FINAL_SIGMAS_TYPE] = "zero",
    lower_order_final: Annotated[bool, "lower the order of the last steps"] = True,
    steps_offset: Annotated[int, STEPS_OFFSET] = 0,
    epsilon_at_zero_snr: Annotated[bool, EPSILON_AT_ZERO_SNR] = False,
) -> StepTable:
    """UniPC (Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2), multistep.

    Each step first corrects the x that the step before has predicted, by the m that the network gives there,
    and then predicts the next x. Both are linear in x and in the m of this step and of the steps before, so
    that one row does both:

        x_next = sigma' / sigma (x + alpha B(h) sum_k c_k m_{i-k}) - alpha' sum_k p_k m_{i-k}

    The options have the names and the meanings that they have in diffusers.

    solver_order: of predictor and corrector, 1 to 3. The first steps, and with lower_order_final the last,
        have a lower one, as have steps to x_0 without noise, which are of order 1.
    solver_type: "bh1" has B(h) = h, and "bh2" B(h) = e^h - 1.
    predict_x0: m is the predicted image; if not, the predicted noise, which needs final_sigmas_type
        "sigma_min" as `dpmpp_2m` does.
    final_sigmas_type, epsilon_at_zero_snr: see `dpmpp_2m`.

    The package's docstring has the other arguments, and `dpmpp_2m` says which timesteps are visited.
    """
    order = whole_number("solver_order", solver_order, 1, 3)
    choice("solver_type", solver_type, UNIPC_TYPES)
    choice("final_sigmas_type", final_sigmas_type, FINAL_SIGMAS)
    ends_in_noise = final_sigmas_type == "sigma_min"
    for name, value in (("lower_order_final", lower_order_final), ("predict_x0", predict_x0)):
        switch(name, value)
    if not predict_x0 and not ends_in_noise:
        raise ValueError(
            "predict_x0=False cannot lead to an image without noise; set final_sigmas_type='sigma_min'"
        )
    timesteps = visited_timesteps(
        schedule, steps, spacing, strength, skip_zero=True, steps_offset=steps_offset
    )
    start = first_step(len(timesteps), strength)
    current = finite_levels(schedule, timesteps, prediction_type, start, epsilon_at_zero_snr)
    following = next_alphas_cumprod(current, schedule.alphas_cumprod[0].item() if ends_in_noise else 1.0)
    orders = torch.arange(1 - start, len(current) + 1 - start, device="cpu").clamp(1, order)
    if lower_order_final:
        orders = torch.minimum(orders, torch.arange(len(current), 0, -1, device="cpu"))
    if not ends_in_noise:
        orders[-1] = 1
    coef_x, weights = _weights(current, following, orders, start, solver_type, predict_x0)
    if predict_x0:
        from_x, from_x0 = torch.zeros_like(current), torch.ones_like(current)
    else:  # m = (x - alpha x_0) / sigma
        from_x, from_x0 = 1 / (1 - current).sqrt(), -(current / (1 - current)).sqrt()
    recalls = (weights[:, 2:] != 0).any() or not predict_x0
    return make_table(
        timesteps,
        current,
        prediction_type,
        clip,
        guidance_scale,
        guidance_interval,
        {
            "coef_x": coef_x + weights[:, 0] * from_x,
            "coef_x0": weights[:, 0] * from_x0,
            "coef_x0_prev": (weights[:, 1:] != 0).any(dim=1).double() if recalls else weights[:, 1],
        },
        history=History(from_x, from_x0, weights[:, 1:]) if recalls else None,
        start=start,
    )


def _weights(
    current: torch.Tensor,
    following: torch.Tensor,
    orders: torch.Tensor,
    start: int,
    solver_type: str,
    predict_x0: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(coef_x [n], weights [n, 4] of m_i, m_{i-1}, m_{i-2} and m_{i-3}) of the steps from `start` on."""
    log_snr = log_snr_half(torch.cat([current, following[-1:]])).tolist()
    if predict_x0:
        ratios, scales = ((1 - following) / (1 - current)).sqrt(), following.sqrt()
    else:
        ratios, scales = (following / current).sqrt(), (1 - following).sqrt()
    weights = np.zeros((len(current), 4))
    correction = np.zeros(4)  # of x, by the m of this step and of those before it
    for i, (ratio, scale) in enumerate(zip(ratios.tolist(), scales.tolist(), strict=True)):
        if i < start:
            continue
        h = log_snr[i + 1] - log_snr[i]
        predicted, corrected = _residuals(log_snr, i, int(orders[i]), solver_type, predict_x0)
        weights[i] = ratio * correction - scale * predicted
        weights[i, 0] -= scale * math.expm1(-h if predict_x0 else h)
        correction = scale * (np.append(0, predicted[:3]) - corrected)
    return ratios, torch.from_numpy(weights)


def _residuals(
    log_snr: list[float], i: int, order: int, solver_type: str, predict_x0: bool
) -> tuple[np.ndarray, np.ndarray]:
    """B(h) times the residual of step i: the predictor's, by m_i, m_{i-1}, ..., and the corrector's, by
    m_{i+1}, m_i, ...: weights [4] each.

    The coefficients solve R rho = b (eq. 9 and 10), but for the predictor's of order 2 and the corrector's of
    order 1, which are 1 / 2.
    """
    predicted, corrected = np.zeros(4), np.zeros(4)
    h = log_snr[i + 1] - log_snr[i]
    if h in (0, math.inf):  # only the last step, which nothing corrects: to its own noise, or to none
        return predicted, corrected
    signed = -h if predict_x0 else h
    b_h = math.expm1(signed) if solver_type == "bh2" else signed
    nodes = np.array([(log_snr[i - k] - log_snr[i]) / h for k in range(1, order)] + [1.0])
    matrix = nodes ** np.arange(order)[:, None]
    phi, factorial, right = math.expm1(signed) / signed - 1, 1, np.zeros(order)
    for k in range(order):
        right[k] = phi * factorial / b_h
        factorial *= k + 2
        phi = phi / signed - 1 / factorial
    of_predictor = [0.5] if order == 2 else np.linalg.solve(matrix[:-1, :-1], right[:-1])
    of_corrector = [0.5] if order == 1 else np.linalg.solve(matrix, right)
    for k in range(1, order):
        slope = b_h / nodes[k - 1]
        predicted[[k, 0]] += of_predictor[k - 1] * slope * np.array([1, -1])
        corrected[[k + 1, 1]] += of_corrector[k - 1] * slope * np.array([1, -1])
    corrected[:2] += of_corrector[-1] * b_h * np.array([1, -1])
    return predicted, corrected
