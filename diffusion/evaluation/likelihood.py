"""The variational bound of a model on images, in bits per dimension: the sum of `process.bound`'s terms."""

from typing import Any

import torch
from tqdm import tqdm

from ..inference.denoiser import make_denoiser
from ..kernels import philox_normal
from ..models.structure import config_of
from ..process.bound import prior_term, variational_bound_terms
from ..process.forward import q_sample
from ..process.value_range import SIGNED
from ..storage.images import to_float
from ..utils.validation import whole_number


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
    """The variational bound of a DDPM on images, in bits per dimension.

    images: uint8 [N, C, H, W]. labels: int64 [N], or None. The network is evaluated at every timestep for
    every image, `batch_size` images at a time; the noise of image i at timestep t is a function of (seed, i,
    t). progress: show a bar with evaluations/s.

    Returns a dict that JSON can hold: `bits_per_dim`, the mean over the images; its `standard_error`;
    `prior`, the mean prior term; `terms` [T], the mean term of each timestep; and `images`, their number.
    ValueError for images that do not fit the model, or none.
    """
    config, schedule = config_of(model.unet), model.schedule
    shape = (config.in_channels, *config.image_shape)
    if images.dtype != torch.uint8 or images.shape[1:] != shape or len(images) == 0:
        raise ValueError(
            f"images must be uint8 {['N', *shape]} for this model, not {images.dtype} {list(images.shape)}"
        )
    if model.diffused_range != SIGNED:
        low, high = model.diffused_range
        raise ValueError(
            f"bits per dimension are of images in [-1, 1]; this model's are in [{low:g}, {high:g}]"
        )
    seed = whole_number("seed", seed, 0, 2**64 - 1)
    batch_size = whole_number("batch_size", batch_size, 1, 2**31 - 1)
    own = next(model.unet.parameters())
    network = make_denoiser(model.unet, own.device, torch.float32, "auto")
    bar = tqdm(total=len(images) * schedule.T, unit=" evaluations", unit_scale=True, disable=not progress)
    terms = torch.zeros(schedule.T, dtype=torch.float64, device="cpu")
    totals, priors = [], []
    with bar:
        for start in range(0, len(images), batch_size):
            x0 = to_float(images[start : start + batch_size].to(own.device))
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
