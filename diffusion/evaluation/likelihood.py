"""The variational bound on the negative log-likelihood, in bits per dimension.

Ho et al. 2020, arXiv 2006.11239, eq. 5, and Nichol & Dhariwal 2021, arXiv 2102.09672, section 2: the KL
divergence between q(x_{t-1} | x_t, x_0) and the model's p(x_{t-1} | x_t) for each t > 0, the negative
log-likelihood of the 8-bit image under p(x_0 | x_1) at t = 0, and the KL divergence of q(x_T | x_0) from the
standard normal distribution. All are means over an image's numbers, divided by log 2, as improved-diffusion
reports them.
"""

import math
from typing import Any

import torch
from tqdm import tqdm

from ..inference.backbone import make_network
from ..kernels import philox_normal
from ..models.structure import config_of
from ..process.forward import at_timesteps, q_sample
from ..process.prediction import predict_x0
from ..process.schedule import NoiseSchedule
from ..samplers.table import VARIANCES
from ..utils.validation import choice, whole_number

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
    "fixed_large" beta_t, and the posterior's of t = 1 at t = 0. clip: predicted images are held to
    [-clip, clip], or not for None. ValueError for another variance or number of channels.
    """
    learned = choice("variance", variance, VARIANCES) == "learned_range"
    if model_output.shape[1] != x0.shape[1] * (2 if learned else 1):
        raise ValueError(f"variance {variance!r} does not go with an output of {list(model_output.shape)}")
    prediction, share = model_output.chunk(2, dim=1) if learned else (model_output, None)
    predicted = predict_x0(schedule, prediction_type, x_t, t, prediction)
    if clip is not None:
        predicted = predicted.clamp(-clip, clip)

    betas, bar = schedule.betas, schedule.alphas_cumprod
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    # q(x_{t-1} | x_t, x_0) is normal with this mean and variance (Ho et al. 2020, eq. 6 and 7).
    of_x0 = at_timesteps(before.sqrt() * betas / (1 - bar), t, x0)
    of_x_t = at_timesteps((1 - betas).sqrt() * (1 - before) / (1 - bar), t, x0)
    posterior = betas * (1 - before) / (1 - bar)
    posterior = torch.cat([posterior[1:2], posterior[1:]])  # it is 0 at t = 0
    small, large = (at_timesteps(table.log(), t, x0) for table in (posterior, betas))
    if learned:
        fraction = (share + 1) / 2
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
    """Of 8-bit images: the normal distribution's mass around each of 256 values (Ho et al. 2020, eq. 13).

    A mass below 1e-12 counts as that, as in improved-diffusion, which approximates the distribution by tanh.
    """
    deviation = (log_variance / 2).exp()
    above, below = (x0 - mean + 1 / 255) / deviation, (x0 - mean - 1 / 255) / deviation
    # The mass between is that between the mirrored bounds; on the left of 0 it has all its digits.
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


@torch.no_grad()
def bits_per_dimension(
    model: Any,
    images: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, Any]:
    """The variational bound of a DDPM on images uint8 [N, C, H, W], with labels int64 [N] or None.

    Evaluates the network at every timestep for every image; the noise of image i at timestep t is a function
    of (seed, i, t). Returns a JSON-able dict: `bits_per_dim`, the mean over the images; `standard_error` of
    that; `prior`; `terms`, [T], the mean of each timestep's; and `images`. ValueError for images that do not
    fit the model, or none.
    """
    config, schedule = config_of(model.unet), model.schedule
    shape = (config.in_channels, *config.image_shape)
    if images.dtype != torch.uint8 or images.shape[1:] != shape or len(images) == 0:
        raise ValueError(
            f"images must be uint8 {['N', *shape]} for this model, not {images.dtype} {list(images.shape)}"
        )
    seed = whole_number("seed", seed, 0, 2**64 - 1)
    batch_size = whole_number("batch_size", batch_size, 1, 2**31 - 1)
    own = next(model.unet.parameters())
    network = make_network(model.unet, own.device, torch.float32, "auto")
    bar = tqdm(total=len(images) * schedule.T, unit=" evaluations", unit_scale=True, disable=not progress)
    terms = torch.zeros(schedule.T, dtype=torch.float64, device="cpu")
    totals, priors = [], []
    with bar:
        for start in range(0, len(images), batch_size):
            x0 = images[start : start + batch_size].to(own.device).float() / 127.5 - 1
            y = None if labels is None else labels[start : start + batch_size].to(own.device)
            ids = torch.arange(start, start + len(x0), device=own.device)
            total = prior_term(schedule, x0).double()
            priors.append(total.cpu())
            for step in range(schedule.T):
                t = torch.full((len(x0),), step, device=own.device)
                noise = philox_normal(x0.shape, seed=seed, sample_ids=ids, stream=step, device=own.device)
                x_t = q_sample(schedule, x0, t, noise)
                output = network(x_t, t, y).float()
                bound = variational_bound_terms(
                    schedule, model.prediction_type, model.variance, x0, x_t, t, output, model.clip
                ).double()
                terms[step] += bound.sum().cpu()
                total = total + bound
                bar.update(len(x0))
            totals.append(total.cpu())
    every = torch.cat(totals)
    return {
        "bits_per_dim": every.mean().item(),
        "standard_error": (every.std() / len(every) ** 0.5).item() if len(every) > 1 else 0.0,
        "prior": torch.cat(priors).mean().item(),
        "terms": (terms / len(every)).tolist(),
        "images": len(every),
    }
