"""One step of the reverse process in place, in the buffers of a sampler that runs a whole table."""

import torch
from torch import Tensor

from ..._dispatch import Backend, Op, always
from ..philox.arguments import validate_counters
from . import library, native, reference, triton_launch
from .arguments import InPlaceArguments, validate_in_place


def step_counter(seed: int, *, stream: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """The state of `reverse_step_` before its first step: int64 [4] on `device`.

    It holds the step, the seed, the noise stream of step 0, and one reserved slot, 0. seed: in [0, 2**64).
    stream: in [0, 2**32). ValueError: a value out of range. TypeError: not an integer.
    """
    validate_counters((0,), seed=seed, sample_ids=None, stream=stream)
    return library.step_counter(seed, stream, device)


op = Op(
    "reverse_step_",
    {
        "cuda": Backend(native.reverse_step_, native.supports_cuda_in_place),
        "cpp": Backend(native.reverse_step_, native.supports_cpp_in_place),
        "triton": Backend(triton_launch.reverse_step_, triton_launch.supports_in_place),
        "reference": Backend(reference.reverse_step_, always),
    },
    validate_in_place,
)


def reverse_step_(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    counter: Tensor,
    *,
    sample_ids: Tensor,
    model_output_uncond: Tensor | None = None,
    x0: Tensor | None = None,
    noise: Tensor | None = None,
    unet_input: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """`reverse_step` by row counter[0] of a table, in place, and the next input of the UNet with it.

    The kernel reads the row and the counter from the device and adds 1 to counter[0], so a captured CUDA
    graph of a UNet and this call is a whole sampler.

    x: x_t on entry, x_{t-1} on return; contiguous float32 [B, C, ...] (the reference: or float64).
    model_output, model_output_uncond: as in `reverse_step`; contiguous or channels_last, and alike.
    table: float64 [rows, 12], StepCoefficients in each row.
    counter: see `step_counter`. Step i draws from the noise stream of step 0 plus i.
    sample_ids: int64 [B].
    x0: the previous step's x0 on entry, which matters where row.coef_x0_prev is not 0; this step's on return.
    noise: z of this step, instead of the counter-based noise.
    unet_input: overwritten with x_{t-1} in unet_input's dtype and layout: [B, C, ...], or for guidance
        [2B, C, ...] with x_{t-1} twice.
    backend: "auto", "cuda", "cpp", "triton" or "reference".

    ValueError: shapes, dtypes or devices do not fit, or the backend cannot serve this call.
    RuntimeError: counter[0] is not a row of the table, or the row needs an x0 that is None. On a CUDA
        device, where nothing can raise, such a step gives NaN.
    """
    op(
        InPlaceArguments(
            x, model_output, table, counter, sample_ids, model_output_uncond, x0, noise, unet_input
        ),
        backend,
    )
