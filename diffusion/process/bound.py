"""The variational bound on the negative log-likelihood, in bits per dimension: its terms.

Ho et al. 2020, arXiv 2006.11239, eq. 5, and Nichol & Dhariwal 2021, arXiv 2102.09672, section 2: the KL
divergence between q(x_{t-1} | x_t, x_0) and the model's p(x_{t-1} | x_t) for each t > 0, the negative
log-likelihood of the 8-bit image under p(x_0 | x_1) at t = 0, and the KL divergence of q(x_T | x_0) from the
standard normal distribution. All are means over an image's numbers, divided by log 2, as improved-diffusion
reports them.
"""

import math

import torch

from ..utils.validation import choice
from .forward import at_timesteps
from .prediction import predict_x0
from .schedule import NoiseSchedule

VARIANCES = ("fixed_small", "fixed_large", "learned_range")
BITS = 1 / math.log(2)
LEAST = 1e-12  # mass of an 8-bit value


def variational_bound_terms(
    schedule: NoiseSchedule,
    prediction_type: str,
    variance: str,
    x0: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    model_output: torch.Tensor,
    clip: float | None = 1.0,
) -> torch.Tensor:
    """The bound's term of each image at its timestep t, float [B], in bits per dimension; differentiable.

    x0, x_t: [B, C, H, W], x0 in [-1, 1]; t: int64 [B]; model_output: [B, C, H, W], or [B, 2 C, H, W] for
    variance "learned_range" (Nichol & Dhariwal 2021, eq. 15); "fixed_small" is the posterior's variance,
    "fixed_large" beta_t, but at t = 0 the posterior variance of t = 1. clip: predicted images are held to
    [-clip, clip], or not for None. ValueError for another variance or number of channels.
    """
    learned = choice("variance", variance, VARIANCES) == "learned_range"
    if model_output.shape[1] != x0.shape[1] * (2 if learned else 1):
        raise ValueError(f"variance {variance!r} does not go with an output of {list(model_output.shape)}")
    prediction, *share = model_output.chunk(2 if learned else 1, dim=1)
    predicted = predict_x0(schedule, prediction_type, x_t, t, prediction)
    if clip is not None:
        predicted = predicted.clamp(-clip, clip)

    betas, bar = schedule.betas, schedule.alphas_cumprod
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    # q(x_{t-1} | x_t, x_0) is normal with this mean and variance (Ho et al. 2020, eq. 6 and 7).
    of_x0 = at_timesteps(before.sqrt() * betas / (1 - bar), t, x0)
    of_x_t = at_timesteps((1 - betas).sqrt() * (1 - before) / (1 - bar), t, x0)
    posterior = betas * (1 - before) / (1 - bar)
    posterior = torch.cat([posterior[1:2], posterior[1:]])  # at t = 0 the posterior variance is 0
    small, large = (at_timesteps(table.log(), t, x0) for table in (posterior, betas))
    if learned:
        fraction = (share[0] + 1) / 2
        log_variance = fraction * large + (1 - fraction) * small
    elif variance == "fixed_small":
        log_variance = small
    else:
        log_variance = at_timesteps(torch.cat([posterior[1:2], betas[1:]]).log(), t, x0)

    mean = of_x0 * predicted + of_x_t * x_t
    true_mean = of_x0 * x0 + of_x_t * x_t
    divergence = (
        log_variance
        - small
        + (small - log_variance).exp()
        - 1
        + (true_mean - mean).square() * (-log_variance).exp()
    ) / 2
    first = -_log_likelihood(x0, mean, log_variance)
    terms = torch.where(t.reshape(-1, 1, 1, 1) == 0, first, divergence)
    return terms.flatten(1).mean(1) * BITS


def _log_likelihood(x0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Log-likelihood of 8-bit images: the normal mass around each of 256 values (Ho et al. 2020, eq. 13).

    A mass below 1e-12 counts as 1e-12, as in improved-diffusion, which approximates the distribution by tanh.
    """
    deviation = (log_variance / 2).exp()
    above, below = (x0 - mean + 1 / 255) / deviation, (x0 - mean - 1 / 255) / deviation
    # The lower tail avoids cancellation: Phi(b) - Phi(a) = Phi(-a) - Phi(-b).
    above, below = torch.where(below > 0, -below, above), torch.where(below > 0, -above, below)
    mass = torch.special.ndtr(above) - torch.special.ndtr(below)
    inside = mass.clamp(min=LEAST).log()
    lowest = torch.special.log_ndtr((x0 - mean + 1 / 255) / deviation)
    highest = torch.special.log_ndtr(-(x0 - mean - 1 / 255) / deviation)
    edges = torch.where(x0 < 0, lowest, highest).clamp(min=math.log(LEAST))
    return torch.where(x0.abs() > 0.999, edges, inside)


def prior_term(schedule: NoiseSchedule, x0: torch.Tensor) -> torch.Tensor:
    """KL(q(x_T | x_0) || N(0, 1)) of images [B, C, H, W], float [B], in bits per dimension."""
    last = float(schedule.alphas_cumprod[-1])
    divergence = ((1 - last) + last * x0.square() - 1 - math.log1p(-last)) / 2
    return divergence.flatten(1).mean(1) * BITS
