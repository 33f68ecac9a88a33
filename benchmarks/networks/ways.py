"""The ways of evaluating a network that are compared, and the loop around them that a pipeline has."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import exported
from ..exported import Evaluate
from .models import Model, Wrapped

T = 1000
MAX_SIGMA = 80.0  # of EDM's sampler


class Task(NamedTuple):
    """A network to evaluate: a tiny one if `small`, of images of size x size, None for its own. folder: of
    its export, which is there before an engine is made."""

    model: Model
    small: bool
    batch: int
    size: int | None
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "network.onnx"

    def inputs(self) -> tuple[Tensor, ...]:
        return self.model.inputs(self.small, self.batch, self.size)

    def network(self) -> nn.Module:
        return self.model.network(self.small, self.size)


Network = Callable[[], nn.Module]  # the task's module, built at the first call


def export(task: Task) -> None:
    """Writes the network, in float32, to the task's path."""
    exported.export(Wrapped(task.network(), task.model.evaluate), task.inputs(), task.path)


def sharing(network: nn.Module) -> nn.Module:
    """A copy of the module that has the same weights, not copies of them."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def _module(task: Task, network: Network) -> Evaluate:
    module, evaluate = network(), task.model.evaluate
    return lambda *inputs: evaluate(module, *inputs)


def _module_in_bfloat16(task: Task, network: Network) -> Evaluate:
    evaluate, dtype = task.model.evaluate, torch.bfloat16
    if task.model.module_in_bf16 == "autocast":
        module = network()

        def autocast(*inputs: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype):
                return evaluate(module, *inputs).float()

        return autocast
    rounded = copy.deepcopy(network()).to(dtype)

    def in_bfloat16(x: Tensor, t: Tensor, *more: Tensor) -> Tensor:
        others = (value.to(dtype) if value.is_floating_point() else value for value in more)
        return evaluate(rounded, x.to(dtype), t, *others).float()

    return in_bfloat16


def _accelerated(task: Task, network: Network, precision: str) -> Evaluate:
    try:
        from diffusion import accelerate
    except ImportError:
        raise ImportError("this version of diffusion has no accelerate") from None
    module, evaluate = accelerate(sharing(network()), precision=precision), task.model.evaluate
    with torch.no_grad():
        evaluate(module, *task.inputs())
    report = module.report()
    if "not planned" in report:
        raise RuntimeError(report.splitlines()[-1].strip())
    return lambda *inputs: evaluate(module, *inputs).float()


class Way(NamedTuple):
    """make(task, network): how to evaluate. single: whether it computes in float32."""

    make: Callable[[Task, Network], Evaluate]
    single: bool


EXACT, FAST, MODULE = "exact", "fast", "module"
WAYS: dict[str, Way] = {
    MODULE: Way(_module, True),
    "module, bf16": Way(_module_in_bfloat16, False),
    EXACT: Way(lambda task, network: _accelerated(task, network, "exact"), True),
    FAST: Way(lambda task, network: _accelerated(task, network, "fast"), False),
    "OpenVINO": Way(lambda task, network: exported.openvino(task.path, "f32"), True),
    "OpenVINO, bf16": Way(lambda task, network: exported.openvino(task.path, "bf16"), False),
    "ONNX Runtime": Way(lambda task, network: exported.onnxruntime(task.path), True),
}
EXPORTED = ("OpenVINO", "OpenVINO, bf16", "ONNX Runtime")  # these need no module in memory


@torch.no_grad()
def sample(task: Task, evaluate: Evaluate, inputs: tuple[Tensor, ...], steps: int) -> Tensor:
    """DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12, eta = 0) from x, with `steps` evaluations.

    In sigma = sqrt(1 / alpha_bar - 1) it is Euler's method (section 4.3), which serves EDM's denoiser, too.
    """
    x, _, *more = inputs
    if task.model.denoises:
        sigmas = [MAX_SIGMA ** (1 - i / steps) for i in range(steps)] + [0.0]
        timesteps = [torch.full((len(x),), sigma) for sigma in sigmas]
    else:
        alphas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64).neg().log1p().cumsum(0).exp()
        chosen = [T - 1 - i * T // steps for i in range(steps)]
        sigmas = [math.sqrt(1 / alphas[t].item() - 1) for t in chosen] + [0.0]
        timesteps = [torch.full((len(x),), t) for t in chosen]
    z = x * sigmas[0]  # the image and its noise, without the scale of alpha_bar
    for i in range(steps):
        sigma, following = sigmas[i], sigmas[i + 1]
        scaled = z if task.model.denoises else z / math.sqrt(1 + sigma**2)
        output = evaluate(scaled, timesteps[i], *more)[:, : x.shape[1]]
        noise = (z - output) / sigma if task.model.denoises else output
        z = z + (following - sigma) * noise
    return z
