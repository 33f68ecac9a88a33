"""Runs a StepTable over a network: one evaluation and one reverse step for each row."""

from collections.abc import Callable

import torch

from ..samplers import StepTable
from .buffers import Batch, Network, Noise, Threshold, injected

__all__ = ["Batch", "Callback", "Network", "Noise", "run"]

Callback = Callable[[int, torch.Tensor, torch.Tensor], None]


def run(
    network: Network,
    table: StepTable,
    batch: Batch,
    shape: tuple[int, int, int],
    *,
    guidance_rescale: float = 0.0,
    threshold: Threshold | None = None,
    callback: Callback | None = None,
    progress: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Samples one batch: float32 [B, C, H, W] on the network's device.

    The latent stays in float32. Where a step's guidance scale is 1, or the batch has no labels, the network
    is evaluated once for each image, elsewhere on the conditional and the unconditional half together. What
    depends on timestep and label alone is computed once for all steps and images. callback(i, x, x0) follows
    step i; its tensors are its own. progress() follows each step. On a CUDA device the host runs ahead of it.
    """
    guided = [batch.labels is not None and scale != 1 for scale in table.column("guidance_scale")]
    noisy = [batch.noise is not None and deviation != 0 for deviation in table.column("sigma")]
    labels = 1 if batch.labels is None else len(batch.labels.unique()) + any(guided)
    keeps_x0 = table.needs_x0_prev or callback is not None or threshold is not None
    count = len(batch.sample_ids)
    key = (tuple(shape), count, labels, len(table), table.learned_variance, keeps_x0, batch.noise is not None)
    plain = torch.autocast(network.device.type, enabled=False)  # the network's dtype is chosen by the caller
    with network.chain(*key) as chain, plain:
        chain.begin(table, batch, any(guided))
        for i in range(len(table)):
            following = guided[i + 1] if i + 1 < len(table) else None
            chain.embed(i)
            if noisy[i]:
                chain.noise.copy_(injected(batch.noise, i + 1, chain.x.shape))
            if threshold is not None or (guidance_rescale and guided[i]):
                chain.advance_modified(
                    table.row(i),
                    guided[i],
                    following,
                    noisy[i],
                    guidance_rescale,
                    threshold,
                    seed=batch.seed,
                    stream=i + 1,
                )
            else:
                chain.advance(guided[i], following, noisy[i])
            if callback is not None:
                callback(i, chain.x.clone(), chain.x0.clone())
            if progress is not None:
                progress()
        return chain.x.clone()
