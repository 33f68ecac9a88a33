"""The training objective: targets, the timesteps drawn, the weight of each, and the labels dropped.

Notation and precision are those of `forward`.
"""

from collections.abc import Callable

import torch

from ..utils.validation import choice, number
from .forward import at_timesteps, check_same_shape
from .prediction import check_prediction_type, predict_x0
from .schedule import NoiseSchedule


def random_timesteps(
    count: int, T: int, device: torch.device | str = "cpu", cumulative: torch.Tensor | None = None
) -> torch.Tensor:
    """Random timesteps, int64 [count] in 0..T-1, by PyTorch's global generators.

    They are spread evenly from one uniform draw, which lowers the variance of the loss (Kingma et al. 2021,
    arXiv 2107.00630, appendix I.1). cumulative: their cumulative distribution, float64 [T]; None for uniform.
    """
    u = (torch.rand((), device=device) + torch.arange(count, device=device) / count) % 1
    if cumulative is None:
        return (u * T).long().clamp(max=T - 1)
    return torch.searchsorted(cumulative.to(device), u.double(), right=True).clamp(max=T - 1)


def lognormal_timesteps(schedule: NoiseSchedule, mean: float, std: float) -> torch.Tensor:
    """The cumulative distribution of timesteps, float64 [T], whose noise level sigma / alpha is log-normal.

    ln(sigma / alpha) is from N(mean, std^2), as in Karras et al. 2022 (arXiv 2206.00364, table 1: -1.2 and
    1.2). Each timestep has the probability of the levels that are nearer to its own than to another's.
    """
    level = 0.5 * torch.log((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    between = ((level[1:] + level[:-1]) / 2 - mean) / std
    last = torch.ones(1, dtype=torch.float64, device="cpu")
    return torch.cat([torch.special.ndtr(between), last])


def self_conditioned(
    network: Callable[..., torch.Tensor], schedule: NoiseSchedule, prediction_type: str
) -> Callable[..., torch.Tensor]:
    """A network with self-conditioning, called as in its training: network(x_t, t, labels).

    In half of the calls, by PyTorch's global generator, it also gets the x_0 that it predicts without one, as
    `x0_prev` (Chen et al. 2022, arXiv 2208.04202, algorithm 1). That prediction gets no gradient.
    """

    def call(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        if torch.rand((), device="cpu") < 0.5:
            return network(x_t, t, labels)
        with torch.no_grad():
            output = network(x_t, t, labels)[:, : x_t.shape[1]]
            x0 = predict_x0(schedule, prediction_type, x_t, t, output.to(x_t.dtype))
        return network(x_t, t, labels, x0_prev=x0)

    return call


def target(
    schedule: NoiseSchedule, prediction_type: str, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """The target of the model's output at x_t = q_sample(schedule, x0, t, noise), like x0.

    It is noise for "epsilon", x0 for "sample", and v = alpha noise - sigma x_0 for "v_prediction" (Salimans &
    Ho 2022, arXiv 2202.00512, section 4). Arguments and errors as in `q_sample`.
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


# The weight of the error in x_0, as a function of the SNR and of min_snr_gamma. "uniform" is not among them:
# it is a weight of the error in the model output, 1 whatever the prediction type.
LOSS_WEIGHTINGS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "min_snr": lambda snr, gamma: snr.clamp(max=gamma),  # Hang et al. 2023, arXiv 2303.09556, section 3.4
    "truncated_snr": lambda snr, gamma: snr.clamp(min=1),  # Salimans & Ho 2022, arXiv 2202.00512, section 4
    "snr_plus_one": lambda snr, gamma: snr + 1,  # Salimans & Ho 2022, section 4
    "p2": lambda snr, gamma: snr / (1 + snr),  # Choi et al. 2022, arXiv 2204.00227, eq. 8 with gamma = k = 1
}
TINY_SNR = 1e-300  # stands for 0, so that a weight divided by the SNR has its limit


def check_loss_weighting(weighting: str) -> None:
    """ValueError unless `loss_weight` has this weighting."""
    choice("loss weighting", weighting, ("uniform", *LOSS_WEIGHTINGS))


def loss_weight(
    schedule: NoiseSchedule,
    prediction_type: str,
    t: torch.Tensor,
    weighting: str = "uniform",
    gamma: float = 5.0,
) -> torch.Tensor:
    """Weight of each image's mean squared error in model_output, float32 [B], for t int64 [B].

    weighting: "uniform" is 1, Ho et al.'s L_simple when the model predicts epsilon. The others,
    `LOSS_WEIGHTINGS`, are published as the weight of the error in x_0, with SNR = alphas_cumprod /
    (1 - alphas_cumprod): min(SNR, gamma) for "min_snr", max(SNR, 1) for "truncated_snr", SNR + 1 for
    "snr_plus_one", and SNR / (1 + SNR) for "p2". They mean the same for every prediction type, because
    |error in epsilon|^2 = SNR |error in x_0|^2, and |error in v|^2 = (SNR + 1) |error in x_0|^2.

    ValueError for another weighting, gamma <= 0, or a weight that is infinite: epsilon prediction under
    truncated_snr or snr_plus_one where SNR is 0.
    """
    check_prediction_type(prediction_type)
    check_loss_weighting(weighting)
    gamma = number("min-SNR's gamma", gamma, above=0)
    signal = schedule.alphas_cumprod
    if weighting == "uniform":
        return at_timesteps(torch.ones_like(signal), t, t.float())
    snr = (signal / (1 - signal)).clamp(min=TINY_SNR)
    divisor = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction_type]
    weights = (LOSS_WEIGHTINGS[weighting](snr, gamma) / divisor).float()
    if not weights.isfinite().all():
        raise ValueError(f"{weighting} weighs epsilon prediction infinitely where the schedule's SNR is zero")
    return at_timesteps(weights, t, t.float())


def drop_labels(
    labels: torch.Tensor, p: float, null_label: int | None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """labels, int64 [B], each replaced by null_label with probability p (Ho & Salimans 2022, algorithm 1).

    generator: of the random numbers; None for PyTorch's generator of the labels' device. ValueError for p
    outside [0, 1], or a model without a null label.
    """
    p = number("the probability of dropping a label", p, 0, 1)
    if null_label is None:
        raise ValueError("this model has no null label, so it cannot be trained with dropped labels")
    device = labels.device if generator is None else generator.device
    dropped = torch.rand(labels.shape, generator=generator, device=device) < p
    return labels.masked_fill(dropped.to(labels.device), null_label)
