"""DPM-Solver and DPM-Solver++, multistep, of orders 1 to 3."""

import math
from typing import Annotated

import torch

from ..process.schedule import NoiseSchedule
from ..utils.validation import choice, refuse, switch, whole_number
from .options import (
    EPSILON_AT_ZERO_SNR,
    FINAL_SIGMAS,
    FINAL_SIGMAS_TYPE,
    NOISE_IN_LAST_STEP,
    SOLVER_ORDER,
    SOLVER_TYPE,
    STEPS_OFFSET,
)
from .sigmas import SIGMAS, spaced_sigmas
from .solver import finite_levels, log_snr_half
from .table import History, StepTable, first_step, make_table, next_alphas_cumprod
from .timesteps import visited_timesteps

ALGORITHMS = ("dpmsolver++", "dpmsolver")
SOLVER_TYPES = ("midpoint", "heun")
FEW_STEPS = 15  # lower_order_final applies to fewer


def dpmpp_2m(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = 1.0,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    strength: float = 1.0,
    sde: Annotated[bool, "use the stochastic form"] = False,
    algorithm: Annotated[str, f"{', '.join(ALGORITHMS)}: integrates the image, or the noise"] = "dpmsolver++",
    solver_order: Annotated[int, SOLVER_ORDER] = 2,
    solver_type: Annotated[str, SOLVER_TYPE] = "midpoint",
    sigmas: Annotated[str, f"spacing of the noise levels: {', '.join(SIGMAS)}"] = "timesteps",
    final_sigmas_type: Annotated[str, FINAL_SIGMAS_TYPE] = "zero",
    lower_order_final: Annotated[bool, "lower the order of the last steps, where there are under 15"] = True,
    euler_at_final: Annotated[bool, "take a last step of first order"] = False,
    lambda_min_clipped: Annotated[float, "start where log(alpha / sigma) is at least this"] = -math.inf,
    steps_offset: Annotated[int, STEPS_OFFSET] = 0,
    noise_in_last_step: Annotated[bool, NOISE_IN_LAST_STEP] = False,
    epsilon_at_zero_snr: Annotated[bool, EPSILON_AT_ZERO_SNR] = False,
) -> StepTable:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), or another multistep DPM-Solver.

    With the options' defaults, the first step and the last, which goes to x_0 without noise, are of first
    order. The options have the names and the meanings that they have in diffusers, but for those in brackets.

    sde: the stochastic form (eq. 19).
    algorithm (algorithm_type): "dpmsolver" integrates the predicted noise instead of the image (Lu et al.
        2022, arXiv 2206.00927). It needs final_sigmas_type "sigma_min".
    solver_order: 1, 2 or 3. solver_type: of second order, "midpoint" or "heun".
    sigmas (use_karras_sigmas and so on): "timesteps" takes the noise of the timesteps of `spacing`; the
        others space the noise levels, see `sigmas.spaced_sigmas`, and ignore spacing, steps_offset and
        lambda_min_clipped.
    final_sigmas_type: "sigma_min" leads the last step to the noise of timestep 0.
    lower_order_final: with fewer than 15 steps, the last step is of first order, the one before at most of
        second. euler_at_final: the last step is of first order. Both matter where the last step does not lead
        to x_0, and for order 3.
    lambda_min_clipped: leaves out the timesteps where log(alpha / sigma) is less.
    noise_in_last_step: whether the last step of the stochastic form adds noise, too.
    epsilon_at_zero_snr: whether epsilon prediction may start at zero SNR, where alphas_cumprod of 2^-24
        stands for 0.

    The package's docstring has the other arguments. Timesteps: leading and linspace leave out 0 (see
    `timesteps.spaced_timesteps`), but for the full chain, which visits every timestep; there the grids of
    diffusers would repeat one. ValueError for a third order of the stochastic form of "dpmsolver".
    """
    for name, value in (
        ("sde", sde),
        ("lower_order_final", lower_order_final),
        ("euler_at_final", euler_at_final),
        ("noise_in_last_step", noise_in_last_step),
        ("epsilon_at_zero_snr", epsilon_at_zero_snr),
    ):
        switch(name, value)
    order = whole_number("solver_order", solver_order, 1, 3)
    choice("algorithm", algorithm, ALGORITHMS)
    choice("solver_type", solver_type, SOLVER_TYPES)
    choice("sigmas", sigmas, SIGMAS)
    choice("final_sigmas_type", final_sigmas_type, FINAL_SIGMAS)
    of_noise, ends_in_noise = algorithm == "dpmsolver", final_sigmas_type == "sigma_min"
    if of_noise and not ends_in_noise:
        raise ValueError(
            "algorithm 'dpmsolver' cannot lead to an image without noise; set final_sigmas_type='sigma_min'"
        )
    if of_noise and sde and order == 3:
        raise ValueError(
            "the stochastic form of 'dpmsolver' has no solver_order 3; take 1 or 2, or 'dpmsolver++'"
        )
    if sigmas == "timesteps":
        noisiest = _noisiest(schedule, lambda_min_clipped)
        timesteps = visited_timesteps(
            schedule, steps, spacing, strength, skip_zero=True, steps_offset=steps_offset, noisiest=noisiest
        )
        start = first_step(len(timesteps), strength)
        current = finite_levels(schedule, timesteps, prediction_type, start, epsilon_at_zero_snr)
        least_noisy = schedule.alphas_cumprod[0].item()
    else:
        timesteps, current, least_noisy = spaced_sigmas(schedule, steps, sigmas)
        start = first_step(len(timesteps), strength)
    following = next_alphas_cumprod(current, least_noisy if ends_in_noise else 1.0)
    h = log_snr_half(following) - log_snr_half(current)
    # e^-h, from the signals, because h is inf where the last step leads to an image without noise
    decay = ((1 - following) / following * current / (1 - current)).sqrt()
    lowered = lower_order_final and len(timesteps) < FEW_STEPS
    orders = _orders(order, len(timesteps), start, lowered, lowered or euler_at_final or not ends_in_noise)
    terms, sigma = _terms(h, decay, orders, of_noise, sde, solver_type)
    scale = -(1 - following).sqrt() if of_noise else following.sqrt()
    weights = scale[:, None] * _multistep(h, orders, terms)
    if of_noise:
        coef_x = (following / current).sqrt()
    else:
        coef_x = ((1 - following) / (1 - current)).sqrt() * (decay if sde else 1)
    coef_x0, coef_x0_prev, history = weights[:, 0], weights[:, 1], None
    if of_noise:  # m = (x - alpha x_0) / sigma
        from_x, from_x0 = 1 / (1 - current).sqrt(), -(current / (1 - current)).sqrt()
        coef_x, coef_x0 = coef_x + coef_x0 * from_x, coef_x0 * from_x0
    else:
        from_x, from_x0 = torch.zeros_like(h), torch.ones_like(h)
    if (weights[:, 2] != 0).any() or (of_noise and (coef_x0_prev != 0).any()):
        history = History(from_x, from_x0, weights[:, 1:])
        coef_x0_prev = (weights[:, 1:] != 0).any(dim=1).double()
    return make_table(
        timesteps,
        current,
        prediction_type,
        clip,
        guidance_scale,
        guidance_interval,
        {
            "coef_x": coef_x,
            "coef_x0": coef_x0,
            "coef_x0_prev": coef_x0_prev,
            "sigma": (1 - following).sqrt() * sigma,
        },
        noise_in_last_step=noise_in_last_step,
        history=history,
        start=start,
    )


def _orders(order: int, steps: int, start: int, lowered: bool, euler_at_final: bool) -> torch.Tensor:
    """The order of each step, int64 [steps]: those from `start` on have no earlier steps than that to use."""
    orders = torch.arange(1 - start, steps + 1 - start, device="cpu").clamp(1, order)
    if lowered:
        orders[-2:] = orders[-2:].clamp(max=2)
    if euler_at_final:
        orders[-1] = 1
    return orders


def _noisiest(schedule: NoiseSchedule, lambda_min: float) -> int | None:
    """The last timestep whose log(alpha / sigma) is at least lambda_min; None without a bound."""
    if lambda_min == -math.inf:
        return None
    if not isinstance(lambda_min, int | float) or math.isnan(lambda_min):
        refuse("lambda_min_clipped", "a number, or -inf", lambda_min)
    inside = (log_snr_half(schedule.alphas_cumprod) >= lambda_min).sum().item()
    if inside == 0:
        raise ValueError(f"lambda_min_clipped {lambda_min} leaves no timestep; choose a smaller number")
    return int(inside) - 1


def _terms(
    h: torch.Tensor, decay: torch.Tensor, orders: torch.Tensor, of_noise: bool, sde: bool, solver_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(terms, sigma): the factors [n, 3] of D0, D1 and D2 in an exponential integrator, and of the noise [n].

    The factors come from the integrals of the Taylor polynomial of m in lambda over a step h: Lu et al. 2022,
    arXiv 2206.00927, appendix B, and arXiv 2211.01095, appendix B.
    """
    d0, d1, d2, sigma = torch.zeros(4, len(h), dtype=torch.float64, device="cpu")
    if of_noise:
        k, grown = (2 if sde else 1), 1 / decay - 1  # e^h - 1
        d0 = k * grown
        heun, cubic = k * (grown / h - 1), (grown - h) / h**2 - 0.5
        sigma = torch.expm1(2 * h).clamp(min=0).sqrt() if sde else sigma
    else:
        k = 2 if sde else 1
        d0 = 1 - decay**k
        heun, cubic = 1 - d0 / (k * h), 0.5 - (k * h - d0) / (k * h) ** 2
        if sde:
            cubic = (d0 - 2 * h) / (2 * h) ** 2 - 0.5
            sigma = d0.clamp(min=0).sqrt()
    midpoint = d0 / 2
    d1 = torch.where(orders == 3, heun, midpoint if solver_type == "midpoint" else heun)
    d1 = torch.where((orders == 1) | (h == 0), 0, d1)
    d2 = torch.where((orders < 3) | (h == 0), 0, cubic)
    return torch.stack([d0, d1, d2], dim=1), sigma


def _multistep(h: torch.Tensor, orders: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """The weights [n, 3] of m_i, m_{i-1} and m_{i-2}, from the factors of D0, D1 and D2.

    D1 and D2 are divided differences of the m over lambda, times h and h^2.
    """
    weights = torch.zeros_like(terms)
    weights[:, 0] = terms[:, 0]
    for i, order in enumerate(orders.tolist()):
        if order == 1:
            continue
        step, before = h[i].item(), h[i - 1].item()
        slope = torch.tensor([step, -step, 0], dtype=torch.float64, device="cpu") / before
        curvature = torch.zeros(3, dtype=torch.float64, device="cpu")
        if order == 3:
            earlier = h[i - 2].item()
            bend = slope - torch.tensor([0, step, -step], dtype=torch.float64, device="cpu") / earlier
            slope = slope + before / (before + earlier) * bend
            curvature = step / (before + earlier) * bend
        weights[i] += terms[i, 1] * slope + terms[i, 2] * curvature
    return weights
