"""Noise levels that DPM-Solver spaces by themselves, instead of taking those of evenly spaced timesteps.

A noise level is sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod).
"""

import math

import numpy as np
import torch

from ..process.schedule import NoiseSchedule
from ..utils.validation import whole_number

SIGMAS = ("timesteps", "karras", "lu", "exponential", "beta")
RHO = 7.0  # of Karras et al. 2022
ZERO_SNR = 2**-24  # stands for alphas_cumprod of 0 in a solver that runs in log SNR, as in diffusers


def spaced_sigmas(
    schedule: NoiseSchedule, steps: int | None, sigmas: str
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(timesteps, alphas_cumprod, last) of `steps` noise levels from that of T - 1 to that of 0.

    timesteps: int64 [steps]. alphas_cumprod: float64 [steps]. last: alphas_cumprod of timestep 0.

    sigmas: "karras": evenly spaced in sigma^(1/7) (Karras et al. 2022, arXiv 2206.00364, eq. 5); "lu" and
    "exponential": in log sigma (Lu et al. 2022, arXiv 2206.00927, section 3.4); "beta": by the quantiles of
    the distribution Beta(0.6, 0.6) (Lee et al. 2024, arXiv 2407.12173), for which SciPy must be installed.

    The network gets the timestep that has this noise, by interpolation of log sigma. As in diffusers, the
    levels are those of float32, and timesteps are rounded down for exponential, beta and the cosine schedule,
    to the nearest otherwise. Neighbours may share a timestep. ValueError for steps outside 1..T.
    """
    steps = schedule.T if steps is None else whole_number("steps", steps, 1, schedule.T)
    signal = schedule.alphas_cumprod.float()
    if signal[-1] == 0:
        signal[-1] = ZERO_SNR
    known = (((1 - signal) / signal) ** 0.5).numpy()
    smallest, largest = known[0].item(), known[-1].item()
    if sigmas == "karras":
        levels = np.linspace(largest ** (1 / RHO), smallest ** (1 / RHO), steps) ** RHO
    elif sigmas == "beta":
        levels = smallest + _beta_quantiles(1 - np.linspace(0, 1, steps)) * (largest - smallest)
    elif sigmas == "lu":  # unlike exponential, diffusers takes these logarithms in float32
        highest, lowest = np.log(known[[-1, 0]]).tolist()
        levels = np.exp(np.linspace(highest, lowest, steps))
    else:
        levels = np.exp(np.linspace(math.log(largest), math.log(smallest), steps))
    timesteps = np.interp(np.log(levels), np.log(known), np.arange(schedule.T))
    if sigmas in ("karras", "lu") and schedule.to_config()["kind"] != "cosine":
        timesteps = timesteps.round()
    levels = np.append(levels, smallest).astype(np.float32).astype(np.float64)
    signal = torch.from_numpy(1 / (levels**2 + 1))
    return torch.from_numpy(timesteps.astype(np.int64)), signal[:-1], signal[-1].item()


def _beta_quantiles(shares: np.ndarray) -> np.ndarray:
    try:
        from scipy.stats import beta
    except ImportError:
        raise ValueError("sigmas 'beta' needs SciPy: pip install scipy") from None
    return beta.ppf(shares, 0.6, 0.6)
