"""The deviation of samples of N(0, DEVIATION^2), by the formulas of the samplers' papers, in float64.

The model is the exact denoiser. It is linear, so the deviation follows without sampling any.
"""

import math
from itertools import pairwise
from typing import Any

import torch

from diffusion.process.schedule import NoiseSchedule

DEVIATION = 0.5
SCHEDULE = NoiseSchedule.linear()
SIGNAL = SCHEDULE.alphas_cumprod.tolist()


def levels(timesteps: list[int]) -> list[float]:
    """alphas_cumprod at the timesteps visited, and 1 for x_0 after the last."""
    return [SIGNAL[t] for t in timesteps] + [1.0]


def optimum(signal: float, deviation: float = DEVIATION) -> tuple[float, float]:
    """E[x_0 | x] / x and E[eps | x] / x."""
    variance = signal * deviation**2 + 1 - signal
    return math.sqrt(signal) * deviation**2 / variance, math.sqrt(1 - signal) / variance


def ddim_deviation(timesteps: list[int], options: dict[str, Any]) -> float:
    """DDIM's and DDPM's deviation, by Song et al. 2021, arXiv 2010.02502, for one timestep after another."""
    variance = 1.0
    for here, there in pairwise(levels(timesteps)):
        x0, epsilon = optimum(here)
        # Song et al. 2021, eq. 12 and 16. Ancestral sampling has eta 1 (section 4.1).
        s2 = options.get("eta", 1.0) ** 2 * (1 - there) / (1 - here) * (1 - here / there)
        x = math.sqrt(there) * x0 + math.sqrt(max(1 - there - s2, 0.0)) * epsilon
        if options.get("variance") == "fixed_large":  # Ho et al. 2020, section 3.2, but for the last step
            s2 = 1 - here / there if there < 1 else 0.0
        variance = x**2 * variance + s2
    return math.sqrt(variance)


def solver_deviation(timesteps: list[int], options: dict[str, Any]) -> float:
    """DPM-Solver++(2M)'s deviation, by Lu et al. 2022, algorithm 2 and eq. 19; x has one entry per noise."""
    x, before, h_before = torch.zeros(len(timesteps) + 1, dtype=torch.float64), None, None
    x[0] = 1.0
    for i, (here, there) in enumerate(pairwise(levels(timesteps))):
        x0 = optimum(here)[0] * x
        if there == 1:  # h is infinite
            return (x0 @ x0).sqrt().item()
        h = 0.5 * (math.log(there / (1 - there)) - math.log(here / (1 - here)))
        mixed = x0 if before is None else x0 + (x0 - before) * h / (2 * h_before)
        fading, growth = math.sqrt((1 - there) / (1 - here)), math.sqrt(there)
        if options["sde"]:
            x = fading * math.exp(-h) * x + growth * (1 - math.exp(-2 * h)) * mixed
            x[i + 1] += math.sqrt((1 - there) * (1 - math.exp(-2 * h)))
        else:
            x = fading * x - growth * (math.exp(-h) - 1) * mixed
        before, h_before = x0, h
    raise AssertionError("a chain ends at x_0")
