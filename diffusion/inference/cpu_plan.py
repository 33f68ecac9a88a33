"""A UNet planned for sampling on a CPU: see `diffusion.planner`."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels.ops.convolution import native as convolution
from ..kernels.ops.convolution.arguments import Conv3x3Arguments
from ..kernels.ops.convolution.packing import PackedWeight, Packing
from ..kernels.ops.reverse_step.library import copy_dense_
from ..models.structure import configured
from ..models.unet import UNet
from ..planner.buffers import Pool
from ..planner.plan import Plan
from ..planner.state import TensorState
from ..planner.trace import trace
from ..planner.weights import Weights
from ..utils.device import DTYPES


class PlannedUNet:
    """`UNet.denoise` on the CPU, by a plan for each size of input, with a copy of the UNet's present weights.

    dtype: of the feature maps, float32, bfloat16 or float16. In bfloat16, processors that multiply in it do
    so; elsewhere the arithmetic is in float32. The result of an image does not depend on its batch.
    ValueError: `unsupported` gives a reason. RuntimeError: `denoise` plans for a new size, and the weights of
    the UNet changed meanwhile.

    The UNet must not be altered (`models.structure.altered`), since the plan follows its configuration.
    """

    def __init__(self, unet: UNet, dtype: torch.dtype):
        reason = unsupported(unet, dtype)
        if reason is not None:
            raise ValueError(f"this UNet cannot be planned for the CPU: {reason}")
        self.unet = unet
        parameters: list[Tensor] = list(unet.parameters())
        self._state = TensorState(parameters, compares_numbers=True)
        self.weights = Weights(parameters, dtype)
        self._thread_local = threading.local()  # the plans of each thread, with their buffers

    def denoise(self, x: Tensor, embedding: Tensor) -> Tensor:
        """As `UNet.denoise`. The result is a buffer, which the thread's next call overwrites.

        Its calls can be recorded where `recordable` says so.
        """
        plan = self._planned(x.shape)
        for buffer, value in zip(plan.inputs, (x, embedding), strict=True):
            if _alike(value, buffer):
                copy_dense_(value, buffer)
            else:
                buffer.copy_(value)
        plan.run()
        return plan.outputs[0].to(self.weights.dtype)  # a plan may end in PyTorch's calls, in float32

    def recordable(self, x: Tensor, embedding: Tensor) -> bool:
        """Whether `denoise` of these consists of calls that can be recorded (`kernels._recorded_calls`)."""
        plan = self._planned(x.shape)
        return plan.recordable and all(map(_alike, (x, embedding), plan.inputs))

    def _planned(self, shape: torch.Size) -> Plan:
        """This thread's plan for x of a shape.

        Steps with and without guidance take turns, so that there are two plans, in the same memory. Recorded
        calls keep their plan's memory, too.
        """
        plans: dict[torch.Size, Plan] = vars(self._thread_local).setdefault("plans", {})
        if shape not in plans:
            if not all(_takes_turns(shape, other) for other in plans):
                self.release()  # frees the buffers of other sizes first
                plans = vars(self._thread_local).setdefault("plans", {})
            with torch.inference_mode(False), torch.no_grad():  # later calls may be in any mode
                plans[shape] = self._plan(shape, vars(self._thread_local).setdefault("pool", Pool()))
        self._thread_local.last = plans[shape]
        return plans[shape]

    def release(self) -> None:
        """Frees the buffers of this thread's plans; the packed weights stay."""
        vars(self._thread_local).clear()

    def buffer_bytes(self) -> int:
        """Bytes of the buffers that this thread's plans share."""
        pool: Pool | None = getattr(self._thread_local, "pool", None)
        return 0 if pool is None else pool.bytes

    def calls(self) -> list[tuple[str, Callable[[], None]]]:
        """The calls of the last evaluation, in order: see `planner.plan.Plan.calls`."""
        return self._thread_local.last.calls()

    def _plan(self, shape: torch.Size, pool: Pool) -> Plan:
        unet = configured(self.unet.config)  # without data, since tracing needs none
        assert isinstance(unet, UNet)
        own = dict(self.unet.named_parameters(remove_duplicate=False))
        constants = {name: (seen, own[name]) for name, seen in unet.named_parameters()}
        sizes = {"x": shape, "embedding": (shape[0], sum(unet.embedding_sizes))}
        arguments = {
            name: torch.empty(size, dtype=torch.float32, device="meta") for name, size in sizes.items()
        }
        graph, _ = trace(unet.denoise, arguments, constants)
        plan = Plan(graph, self.weights, pool)
        if not self._state.holds(None):  # another plan may have the weights of before
            raise RuntimeError("the UNet's weights changed while images were sampled; sample them again")
        return plan


def _takes_turns(a: torch.Size, b: torch.Size) -> bool:
    """Whether these are the sizes of a batch's steps with and without guidance, or the other way round."""
    return a[1:] == b[1:] and (a[0] == 2 * b[0] or b[0] == 2 * a[0])


def _alike(value: Tensor, buffer: Tensor) -> bool:
    same = value.dtype == buffer.dtype and value.device == buffer.device
    return same and value.shape == buffer.shape and value.stride() == buffer.stride()


def unsupported(unet: nn.Module, dtype: torch.dtype) -> str | None:
    """The reason why an unaltered UNet cannot be planned, or None."""
    if not isinstance(unet, UNet):
        return f"it is {type(unet).__name__}, not UNet"
    first = next(unet.parameters())
    if first.device.type != "cpu":
        return f"it is on {first.device}, not on the CPU"
    for name, parameter in unet.named_parameters():
        if (parameter.device, parameter.dtype) != (first.device, first.dtype):
            kind = f"{parameter.dtype} on {parameter.device}"
            return f"{name} is {kind}, not {first.dtype} on {first.device} as others are"
    if first.dtype not in DTYPES.values():
        return f"its weights are {first.dtype}, in which nothing can be embedded"
    config = unet.config
    if config.activation != "silu":
        return f"its activation is {config.activation}, and the compiled convolution has SiLU"
    if config.mid_divisor != 1:
        return f"the outputs of its middle blocks are divided by {config.mid_divisor:g}"
    if dtype not in convolution.DTYPES:
        return f"the dtype is {dtype}, not float32, bfloat16 or float16"
    x = torch.empty(0, 1, 4, 4, dtype=dtype, device="cpu")
    packed = PackedWeight(x.new_empty(1, 1, 3, 3), x.new_empty(0, dtype=torch.float32), Packing())
    return convolution.supports(Conv3x3Arguments(x, packed))
