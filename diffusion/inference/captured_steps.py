"""Captured steps: a step over a sampler's buffers, captured once and replayed many times.

On a CUDA device a capture is a CUDA graph. On the CPU it is a recording of compiled operators, which run many
steps without returning to Python.
"""

from collections.abc import Callable
from functools import partial

import torch

from ..kernels._recorded_calls import recording
from ..kernels.ops.reverse_step.arguments import InPlaceArguments
from ..kernels.ops.reverse_step.in_place import op as reverse_step_op
from .buffers import SamplerBuffers, Step
from .cuda_graph import capture_cuda_graph
from .denoiser import Denoiser, SplitUNet

Replay = Callable[[int], None]  # takes the step so many times
Capture = Callable[[Callable[[], None], Step], Replay | None]  # None: this step cannot be captured


def choose_capture(denoiser: Denoiser, buffers: SamplerBuffers) -> Capture | None:
    """The function that captures steps over these buffers, or None where none can be captured.

    It takes the function of a step and its Step. A capture would not run the hooks and methods of an altered
    UNet.
    """
    if not isinstance(denoiser.unet, SplitUNet):
        return None
    if runs_cuda_kernels(denoiser, buffers):
        return partial(_graph, buffers)
    if denoiser.device.type == "cpu" and _reverse_step_backend(denoiser, buffers) == "cpp":
        return partial(_calls, denoiser, buffers)
    return None


def runs_cuda_kernels(denoiser: Denoiser, buffers: SamplerBuffers) -> bool:
    """Whether the reverse step runs as a CUDA or Triton kernel, which reads its row on the device."""
    return denoiser.device.type == "cuda" and _reverse_step_backend(denoiser, buffers) != "reference"


def _reverse_step_backend(denoiser: Denoiser, buffers: SamplerBuffers) -> str:
    arguments = InPlaceArguments(
        buffers.x,
        buffers.inputs(False),
        buffers.table,
        buffers.counter,
        buffers.sample_ids,
        x0=buffers.x0,
        noise=buffers.noise,
        unet_input=buffers.unet_input,
    )
    return reverse_step_op.choose(arguments, denoiser.backend)


def _graph(buffers: SamplerBuffers, take: Callable[[], None], step: Step) -> Replay:
    if buffers.graph_pool is None:
        buffers.graph_pool = torch.cuda.graph_pool_handle()
    return capture_cuda_graph(take, buffers.changed_by_a_step(), buffers.graph_pool)


def _calls(
    denoiser: Denoiser, buffers: SamplerBuffers, take: Callable[[], None], step: Step
) -> Replay | None:
    assert isinstance(denoiser.unet, SplitUNet)
    inputs = buffers.inputs(step.guided)
    embedding = buffers.step_embedding(len(inputs), compiled=True)
    if step.corrected or not denoiser.unet.recordable(inputs, embedding):
        return None
    with recording() as calls:
        take()
    return calls.run
