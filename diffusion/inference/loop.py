"""The sampling loop: for each row of a step table, one evaluation of the UNet and one reverse step.

    for step in steps:
        output, uncond = evaluate(denoiser, buffers, step)
        x = reverse_step(x, output, uncond)

x, the input of the UNet and all other tensors of a step are in `SamplerBuffers`, so that `take_step`, the two
lines above, can be captured: in a CUDA graph, or in recorded calls of compiled operators, of which many steps
run without returning to Python.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import kernels
from ..kernels import _native
from ..samplers.guidance import project_guidance, rescale_guidance
from ..samplers.table import StepTable
from ..samplers.thresholding import Threshold
from ..utils.validation import check_dense, check_finite
from .buffers import Batch, BufferSpec, SamplerBuffers, Step
from .captured_steps import Capture, choose_capture
from .denoiser import Denoiser, SplitUNet
from .recall import Recall
from .repaint import Repaint

Callback = Callable[[int, Tensor, Tensor], Tensor | None]


def run(
    denoiser: Denoiser,
    table: StepTable,
    batch: Batch,
    image_shape: tuple[int, int, int],
    *,
    guidance_rescale: float = 0.0,
    guidance_parallel: float = 1.0,
    threshold: Threshold | None = None,
    callback: Callback | None = None,
    progress: Callable[[], None] | None = None,
    rows: list[int] | None = None,
) -> Tensor:
    """Samples one batch: float32 [B, C, H, W] on the denoiser's device, for image_shape (C, H, W).

    x stays in float32. Steps whose guidance scale is 1, and batches without labels, evaluate the UNet once
    for each image; guided steps evaluate the conditional and the unconditional half together.

    guidance_rescale: phi of `rescale_guidance`; 0 for none.
    guidance_parallel: share of `project_guidance`; 1 for all.
    threshold: takes the place of a step's clipping, as `thresholding.thresholded_step`.
    callback: callback(i, x, x0) follows step i, with copies of x_{t-1} and of the predicted x_0. A tensor
        that it returns takes the place of x_{t-1}.
    progress: progress() follows each step. On a CUDA device the host runs ahead of it.
    rows: for a batch with a mask, those of the table that run, by `repaint.repaint_rows`.
    """
    steps = plan_steps(table, batch, guidance_rescale, guidance_parallel, threshold)
    guided = any(step.guided for step in steps)
    spec = BufferSpec(
        image_shape=tuple(image_shape),
        batch_size=len(batch.sample_ids),
        num_labels=1 if batch.labels is None else len(batch.labels.cpu().unique()) + guided,
        num_steps=len(table),
        store_x0=table.needs_x0_prev
        or table.history is not None
        or callback is not None
        or threshold is not None
        or denoiser.self_condition,
        injects_noise=batch.noise is not None,
        thresholds=threshold is not None,
    )
    # Autocast is off, because the caller chose the dtype of the UNet.
    with denoiser.buffers(spec) as buffers, torch.autocast(denoiser.device.type, enabled=False):
        buffers.load(batch, table, guided, denoiser.null_label, denoiser.backend)
        capture = choose_capture(denoiser, buffers)
        recall = None if table.history is None else Recall(table.history, buffers)
        if recall is not None and denoiser.self_condition:
            raise ValueError(
                "a network that gets its last x_0 cannot be sampled by a solver that keeps more than one; "
                "choose solver_order 1 or 2 and algorithm 'dpmsolver++'"
            )
        repaint = None if rows is None else Repaint(table, batch, rows, buffers, recall)
        rows = list(range(len(steps))) if rows is None else rows
        alone = not (recall is callback is progress is repaint is None)  # Python code follows each step
        k = 0
        while k < len(rows):
            i = rows[k]
            step = steps[i]
            embed_timesteps(denoiser, buffers, i)
            if repaint is not None:
                repaint.before(k)
            if recall is not None:
                recall.before(i)
            if step.injects_noise:
                assert buffers.noise is not None
                buffers.noise.copy_(buffers.draw(batch, k + 1, denoiser.backend))
            count = 1 if alone or step.injects_noise else equal_steps(steps, i, buffers.steps_embedded)
            take_steps(denoiser, buffers, step, count, capture)
            k += count
            if recall is not None:
                recall.after(i)
            if repaint is not None:
                repaint.after(k - 1, denoiser.backend)
            if callback is not None:
                assert buffers.x0 is not None
                changed = callback(i, buffers.x.clone(), buffers.x0.clone())
                if changed is not None:
                    buffers.set_x(_returned_x(changed, buffers.x))
            if progress is not None:
                progress()
        return buffers.x.clone()


def _returned_x(changed: Tensor, x: Tensor) -> Tensor:
    """The tensor that a callback returns. ValueError unless it is like x, and, on the CPU, finite if x is."""
    name = "x that the callback returns"
    changed = check_dense(name, changed, x.shape)
    if x.device.type == "cpu" and x.isfinite().all():  # else the network is the cause
        check_finite(name, changed)
    return changed


def plan_steps(
    table: StepTable,
    batch: Batch,
    rescale: float = 0.0,
    parallel: float = 1.0,
    threshold: Threshold | None = None,
) -> list[Step]:
    """How each step of the table runs for this batch. rescale, parallel, threshold: see `Step`."""
    guided = [batch.labels is not None and scale != 1 for scale in table.column("guidance_scale")]
    injects_noise = [batch.noise is not None and sigma != 0 for sigma in table.column("sigma")]
    next_guided = [*guided[1:], guided[-1]]
    return [
        Step(
            now,
            then,
            injects,
            table.learned_variance,
            *((rescale, parallel) if now else (0.0, 1.0)),
            threshold,
        )
        for now, then, injects in zip(guided, next_guided, injects_noise, strict=True)
    ]


def equal_steps(steps: list[Step], first: int, together: int) -> int:
    """How many steps from `first` on are equal, up to the next multiple of `together`."""
    last = min(len(steps), (first // together + 1) * together)
    return next((i for i in range(first, last) if steps[i] != steps[first]), last) - first


def take_steps(
    denoiser: Denoiser, buffers: SamplerBuffers, step: Step, count: int, capture: Capture | None
) -> None:
    """`count` equal steps, one after another: by a capture, made the first time and replayed from then on."""
    if capture is not None and step not in buffers.captured:
        buffers.captured[step] = capture(partial(take_step, denoiser, buffers, step), step)
    replay = None if capture is None else buffers.captured[step]
    if replay is not None:
        return replay(count)
    for _ in range(count):
        take_step(denoiser, buffers, step)
    return None


def take_step(denoiser: Denoiser, buffers: SamplerBuffers, step: Step) -> None:
    """x_t to x_{t-1}, in the buffers: one evaluation of the UNet and one reverse step."""
    output, uncond = evaluate(denoiser, buffers, step)
    if step.corrected:
        corrected_step(denoiser, buffers, step, output, uncond)
    else:
        reverse_step(denoiser, buffers, step, output, uncond, buffers.table)


def evaluate(denoiser: Denoiser, buffers: SamplerBuffers, step: Step) -> tuple[Tensor, Tensor | None]:
    """The UNet's output at x_t, and in a guided step the unconditional output: each [B, C, H, W], or
    [B, 2 C, H, W] with learned variance."""
    inputs = buffers.inputs(step.guided)  # [B or 2 B, C, H, W]
    images = 2 * buffers.batch_size if step.guided else buffers.batch_size
    if isinstance(denoiser.unet, SplitUNet):
        library = {"cpu": ("cpp", _native.CPP_MISSING), "cuda": ("cuda", _native.CUDA_MISSING)}
        backend, missing = library.get(denoiser.device.type, (None, None))
        compiled = denoiser.backend in ("auto", backend) and not missing and backend is not None
        output = denoiser.unet.denoise(inputs, buffers.step_embedding(images, compiled))
    else:  # user code may keep or change its arguments, so it gets copies
        output = denoiser.unet(
            inputs.clone(), *buffers.timesteps_and_labels(images), *_self_condition(denoiser, buffers, images)
        )
    if not step.learned_variance:  # drops the variance channels of a UNet that has them
        output = output[:, : buffers.x.shape[1]]
    if not step.guided:
        return output, None
    cond, uncond = output.chunk(2)
    return cond, uncond


def _self_condition(denoiser: Denoiser, buffers: SamplerBuffers, images: int) -> tuple[Tensor, ...]:
    """For a network with self-conditioning, a copy of the x_0 of the step before, [images, C, H, W]."""
    if not denoiser.self_condition:
        return ()
    assert buffers.x0 is not None
    return (buffers.x0.repeat(images // buffers.batch_size, 1, 1, 1),)


def reverse_step(
    denoiser: Denoiser,
    buffers: SamplerBuffers,
    step: Step,
    output: Tensor,
    uncond: Tensor | None,
    table: Tensor,
) -> None:
    """x_t to x_{t-1} by row `counter` of a table; writes the UNet's next input, too."""
    kernels.reverse_step_(
        buffers.x,
        output,
        table,
        buffers.counter,
        sample_ids=buffers.sample_ids,
        model_output_uncond=uncond,
        x0=buffers.x0,
        noise=buffers.noise if step.injects_noise else None,
        unet_input=buffers.inputs(step.next_guided),
        backend=denoiser.backend,
    )


def corrected_step(
    denoiser: Denoiser, buffers: SamplerBuffers, step: Step, output: Tensor, uncond: Tensor | None
) -> None:
    """`reverse_step` with what StepCoefficients cannot express: `guide`, or dynamic thresholding.

    The row is read on the device, so that a CUDA graph can hold the step.
    """
    row, channels = buffers.row(), buffers.x.shape[1]
    if uncond is not None:
        output = guide(output, uncond, row.guidance_scale, step.rescale, step.parallel, channels)
    if step.threshold is None:
        return reverse_step(denoiser, buffers, step, output, None, buffers.table)
    assert buffers.x0 is not None
    assert buffers.thresholded is not None
    _, carried, x0 = step.threshold(row, buffers.x, output[:, :channels].float(), buffers.x0)
    buffers.x0.copy_(carried)
    reverse_step(denoiser, buffers, step, output, None, buffers.thresholded)
    buffers.x0.copy_(x0)
    return None


def guide(
    output: Tensor, uncond: Tensor, scale: float | Tensor, phi: float, parallel: float, channels: int
) -> Tensor:
    """The guided output, float32 [B, C, H, W], with `project_guidance` and `rescale_guidance`.

    scale: a number, or a tensor without dimensions. The channels beyond `channels`, a learned variance, are
    those of the conditional output.
    """
    cond, variance = output[:, :channels].float(), output[:, channels:].float()
    uncond = uncond[:, :channels].float()
    if parallel == 1:
        guided = uncond + scale * (cond - uncond)
    else:
        guided = cond + (scale - 1) * project_guidance(cond - uncond, cond, parallel)
    return torch.cat([rescale_guidance(guided, cond, phi), variance], dim=1)


def embed_timesteps(denoiser: Denoiser, buffers: SamplerBuffers, i: int) -> None:
    """Before step i: the embeddings of its timestep and the next ones', as many as the buffer holds.

    Each label is embedded on its own, so that no image depends on the others of its batch.
    """
    together = buffers.steps_embedded
    first = i - i % together
    if buffers.embedded != first and isinstance(denoiser.unet, SplitUNet):
        buffers.embedded = first
        timesteps = buffers.timesteps[first : first + together].to(denoiser.device)
        for position, label in enumerate(buffers.distinct_labels):
            labels = None if label is None else torch.full_like(timesteps, label, dtype=torch.int64)
            embedding = denoiser.unet.embed(timesteps, labels)  # [steps, E]
            buffers.embeddings[: len(timesteps), position].copy_(embedding)
