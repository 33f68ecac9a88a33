"""The types of prediction: the noise, the image or v, and how the image and the noise follow from each.

Notation and precision are those of `forward`.
"""

import torch

from ..utils.validation import choice
from .forward import at_timesteps, check_same_shape
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
    """(x0_from_x, x0_from_output), such that x_0 = x0_from_x * x_t + x0_from_output * model_output.

    Both have the shape and dtype of alphas_cumprod. "epsilon": Ho et al. 2020, arXiv 2006.11239, eq. 15;
    "v_prediction": Salimans & Ho 2022, arXiv 2202.00512, appendix D. ValueError for epsilon where
    alphas_cumprod is 0.
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
    """(eps_from_x, eps_from_output), such that eps = eps_from_x * x_t + eps_from_output * model_output.

    Both have the shape and dtype of alphas_cumprod.
    """
    check_prediction_type(prediction_type)
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    if prediction_type == "epsilon":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "v_prediction":
        return sigma, alpha
    return 1 / sigma, -alpha / sigma


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
    check_same_shape(x, model_output, "model_output")
    x0_from_x, x0_from_output = x0_coefficients(prediction_type, schedule.alphas_cumprod)
    return at_timesteps(x0_from_x, t, x) * x + at_timesteps(x0_from_output, t, x) * model_output


def predict_epsilon(
    schedule: NoiseSchedule,
    prediction_type: str,
    x: torch.Tensor,
    t: torch.Tensor,
    model_output: torch.Tensor,
) -> torch.Tensor:
    """The noise in x_t as the model sees it; shapes as in `predict_x0`."""
    check_same_shape(x, model_output, "model_output")
    eps_from_x, eps_from_output = epsilon_coefficients(prediction_type, schedule.alphas_cumprod)
    return at_timesteps(eps_from_x, t, x) * x + at_timesteps(eps_from_output, t, x) * model_output
