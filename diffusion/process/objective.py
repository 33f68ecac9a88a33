"""The training objective: the target of a prediction, the timesteps drawn, and the weight of each.

Notation and precision are those of `forward`.
"""

import torch

from ..utils.validation import choice, number
from .forward import at_timesteps, check_same_shape
from .prediction import check_prediction_type
from .schedule import NoiseSchedule


def random_timesteps(
    count: int, T: int, device: torch.device | str = "cpu", cumulative: torch.Tensor | None = None
) -> torch.Tensor:
    """Timesteps int64 [count], spread evenly over 0..T-1 from one uniform draw, which lowers the loss's
    variance (Kingma et al. 2021, arXiv 2107.00630, appendix I.1). From PyTorch's global generators.

    cumulative: float64 [T], the probability of each timestep or a smaller one; None for a uniform one.
    """
    u = (torch.rand((), device=device) + torch.arange(count, device=device) / count) % 1
    if cumulative is None:
        return (u * T).long().clamp(max=T - 1)
    return torch.searchsorted(cumulative.to(device), u.double(), right=True).clamp(max=T - 1)


def lognormal_timesteps(schedule: NoiseSchedule, mean: float, std: float) -> torch.Tensor:
    """The cumulative distribution of timesteps, float64 [T], whose noise level sigma / alpha is log-normal.

    ln(sigma / alpha) is drawn from N(mean, std^2) as in Karras et al. 2022 (arXiv 2206.00364, table 1:
    -1.2 and 1.2), and a timestep takes what is nearer to its own noise level than to its neighbours'.
    """
    level = 0.5 * torch.log((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    between = ((level[1:] + level[:-1]) / 2 - mean) / std
    last = torch.ones(1, dtype=torch.float64, device="cpu")
    return torch.cat([torch.special.ndtr(between), last])


def target(
    schedule: NoiseSchedule, prediction_type: str, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """What the model should put out for x_t = q_sample(schedule, x0, t, noise): noise, x0 or
    v = alpha noise - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512, section 4). Shapes as in `q_sample`.
    """
    check_prediction_type(prediction_type)
    check_same_shape(x0, noise, "noise")
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    alpha = at_timesteps(schedule.alphas_cumprod.sqrt(), t, x0)
    sigma = at_timesteps((1 - schedule.alphas_cumprod).sqrt(), t, x0)
    return alpha * noise - sigma * x0


LOSS_WEIGHTINGS = ("uniform", "min_snr", "truncated_snr", "snr_plus_one", "p2")


def check_loss_weighting(weighting: str) -> None:
    """ValueError unless `loss_weight` knows it."""
    choice("loss weighting", weighting, LOSS_WEIGHTINGS)


def loss_weight(
    schedule: NoiseSchedule,
    prediction_type: str,
    t: torch.Tensor,
    weighting: str = "uniform",
    gamma: float = 5.0,
) -> torch.Tensor:
    """Weight of each image's mean squared error in model_output, float32 [B], for t int64 [B].

    "uniform" is 1: Ho et al.'s L_simple when the model predicts epsilon. The others are published as the
    weight of the error in x_0, with SNR = alphas_cumprod / (1 - alphas_cumprod), and mean the same for every
    prediction type (the weight in x_0 is divided by SNR for epsilon, by SNR + 1 for v):
    "min_snr" min(SNR, gamma) (Hang et al. 2023, arXiv 2303.09556, section 3.4); "truncated_snr" max(SNR, 1)
    and "snr_plus_one" SNR + 1 (Salimans & Ho 2022, arXiv 2202.00512, section 4); "p2" SNR / (1 + SNR)
    (Choi et al. 2022, arXiv 2204.00227, eq. 8 with gamma = k = 1).

    ValueError for another weighting, gamma <= 0, or a weight that is infinite: epsilon prediction under
    truncated_snr or snr_plus_one where SNR is 0.
    """
    check_prediction_type(prediction_type)
    check_loss_weighting(weighting)
    gamma = number("min-SNR's gamma", gamma, above=0)
    # With alpha^2 = SNR / (SNR + 1) and sigma^2 = 1 / (SNR + 1) the weight in v is that in x_0 times sigma^2.
    signal = schedule.alphas_cumprod
    noise = 1 - signal
    divisor = {"epsilon": signal, "sample": noise, "v_prediction": torch.ones_like(signal)}[prediction_type]
    if weighting == "uniform":
        weights = torch.ones_like(signal)
    elif prediction_type == "epsilon" and weighting == "min_snr":  # not 0 / 0 where SNR is 0
        weights = (gamma * noise / signal).clamp(max=1)
    elif prediction_type == "epsilon" and weighting == "p2":
        weights = noise
    else:
        in_v = {
            "min_snr": torch.minimum(signal, gamma * noise),
            "truncated_snr": torch.maximum(signal, noise),
            "snr_plus_one": torch.ones_like(signal),
            "p2": signal * noise,
        }[weighting]
        weights = in_v / divisor
    if not weights.isfinite().all():
        raise ValueError(f"{weighting} weighs epsilon prediction infinitely where the schedule's SNR is zero")
    return at_timesteps(weights, t, t.float())
