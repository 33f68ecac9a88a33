"""The forward process and what a model is trained to predict of it.

Everywhere x_t = alpha x_0 + sigma eps with alpha = sqrt(alphas_cumprod[t]) and sigma = sqrt(1 -
alphas_cumprod[t]). The coefficients are computed in float64 and cast last, to float32 or to the images'
dtype where that is wider; so bfloat16 images give float32 results.
"""

import torch

from ..utils.validation import choice, number, readable
from .schedule import NoiseSchedule

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def check_prediction_type(prediction_type: str) -> None:
    """ValueError unless it is "epsilon" (the noise), "sample" (x_0) or "v_prediction"."""
    choice("prediction type", prediction_type, PREDICTION_TYPES)


def check_x0_determined(prediction_type: str, alphas_cumprod: torch.Tensor) -> None:
    """ValueError for epsilon prediction where alphas_cumprod is 0: x_t and the prediction are both noise."""
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon" and (alphas_cumprod == 0).any():
        raise ValueError(
            "epsilon prediction cannot give x0 where the schedule's SNR is zero; "
            "use v_prediction or sample, or a schedule without zero terminal SNR"
        )


def x0_coefficients(prediction_type: str, alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(p_x, p_o) such that x_0 = p_x * x_t + p_o * model_output, in the shape and dtype of alphas_cumprod.

    "epsilon": Ho et al. 2020, arXiv 2006.11239, eq. 15; "v_prediction": Salimans & Ho 2022, arXiv 2202.00512,
    appendix D. ValueError for epsilon where alphas_cumprod is 0.
    """
    check_prediction_type(prediction_type)
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    if prediction_type == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "v_prediction":
        return alpha, -sigma
    check_x0_determined(prediction_type, alphas_cumprod)
    return 1 / alpha, -sigma / alpha


def epsilon_coefficients(
    prediction_type: str, alphas_cumprod: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q_x, q_o) such that eps = q_x * x_t + q_o * model_output, in the shape and dtype of alphas_cumprod."""
    check_prediction_type(prediction_type)
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    if prediction_type == "epsilon":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "v_prediction":
        return sigma, alpha
    return 1 / sigma, -alpha / sigma


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


def at_timesteps(table: torch.Tensor, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """table[t] for t [B], cast for arithmetic with `like` [B, ...] and shaped [B, 1, ...]."""
    if t.dtype != torch.int64 or t.shape != like.shape[:1]:
        raise ValueError(
            f"t must be int64 of shape [{len(like)}], one timestep an image, not {t.dtype} {list(t.shape)}"
        )
    if t.device.type == "cpu" and len(t) and readable(t) and not 0 <= t.min() <= t.max() < len(table):
        raise ValueError(f"timesteps must be in 0..{len(table) - 1}; got {t.min()} to {t.max()}")
    table = table.to(torch.promote_types(like.dtype, torch.float32)).to(like.device)
    return table.index_select(0, t).reshape(-1, *[1] * (like.ndim - 1))


def _check_shapes(x: torch.Tensor, other: torch.Tensor, name: str) -> None:
    if x.shape != other.shape:
        raise ValueError(f"{name} must have the images' shape {list(x.shape)}, not {list(other.shape)}")


def q_sample(schedule: NoiseSchedule, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x_t ~ q(x_t | x_0) = alpha x_0 + sigma noise (Ho et al. 2020, arXiv 2006.11239, eq. 4).

    x0: images [B, ...] in [-1, 1]; t: int64 [B] in 0..T-1; noise: standard normal, like x0. Returns x_t like
    x0. ValueError for other shapes or timesteps (the range is checked where t is on the CPU).
    """
    _check_shapes(x0, noise, "noise")
    alpha = at_timesteps(schedule.alphas_cumprod.sqrt(), t, x0)
    sigma = at_timesteps((1 - schedule.alphas_cumprod).sqrt(), t, x0)
    return alpha * x0 + sigma * noise


def target(
    schedule: NoiseSchedule, prediction_type: str, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """What the model should put out for x_t = q_sample(schedule, x0, t, noise): noise, x0 or
    v = alpha noise - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512, section 4). Shapes as in `q_sample`.
    """
    check_prediction_type(prediction_type)
    _check_shapes(x0, noise, "noise")
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    alpha = at_timesteps(schedule.alphas_cumprod.sqrt(), t, x0)
    sigma = at_timesteps((1 - schedule.alphas_cumprod).sqrt(), t, x0)
    return alpha * noise - sigma * x0


def predict_x0(
    schedule: NoiseSchedule,
    prediction_type: str,
    x: torch.Tensor,
    t: torch.Tensor,
    model_output: torch.Tensor,
) -> torch.Tensor:
    """x_0 as the model sees it, from x_t and its output there, both [B, ...]; t int64 [B]. Not clipped.

    ValueError for epsilon prediction with a schedule of zero terminal SNR, whatever t.
    """
    _check_shapes(x, model_output, "model_output")
    p_x, p_o = x0_coefficients(prediction_type, schedule.alphas_cumprod)
    return at_timesteps(p_x, t, x) * x + at_timesteps(p_o, t, x) * model_output


def predict_epsilon(
    schedule: NoiseSchedule,
    prediction_type: str,
    x: torch.Tensor,
    t: torch.Tensor,
    model_output: torch.Tensor,
) -> torch.Tensor:
    """The noise in x_t as the model sees it; shapes as in `predict_x0`."""
    _check_shapes(x, model_output, "model_output")
    q_x, q_o = epsilon_coefficients(prediction_type, schedule.alphas_cumprod)
    return at_timesteps(q_x, t, x) * x + at_timesteps(q_o, t, x) * model_output


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
