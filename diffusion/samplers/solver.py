"""Noise levels for the multistep solvers, which run in lambda = log(alpha / sigma)."""

import torch

from ..process.prediction import check_x0_determined
from ..process.schedule import NoiseSchedule
from .sigmas import ZERO_SNR
from .table import next_alphas_cumprod


def log_snr_half(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """lambda = log(alpha / sigma) of noise levels."""
    return 0.5 * torch.log(alphas_cumprod / (1 - alphas_cumprod))


def finite_levels(
    schedule: NoiseSchedule,
    timesteps: torch.Tensor,
    prediction_type: str,
    start: int,
    epsilon_at_zero_snr: bool,
) -> torch.Tensor:
    """alphas_cumprod of timesteps; in place of zero SNR, less SNR than any other.

    ValueError for epsilon prediction at zero SNR from step `start` on, unless epsilon_at_zero_snr.
    """
    current = schedule.alphas_cumprod[timesteps]
    if not epsilon_at_zero_snr:
        check_x0_determined(prediction_type, current[start:])
    return torch.where(current > 0, current, (next_alphas_cumprod(current) / 2).clamp(max=ZERO_SNR))
