"""The plan for GPUs equals the network, and calls this package's kernels. It runs on the CPU here."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion
from diffusion import kernels
from diffusion.planner.accelerated_forward import AcceleratedForward
from diffusion.planner.eager_plan import EagerPlan
from diffusion.planner.trace import trace
from helpers.diffusers_unets import conditional, of_conditional, of_unet2d, unet2d

diffusers = pytest.importorskip("diffusers")


NETWORKS = {
    "unet2d": (unet2d, of_unet2d),
    "scale_shift": (lambda: unet2d(resnet_time_scale_shift="scale_shift"), of_unet2d),
    "heads": (lambda: unet2d(attention_head_dim=4), of_unet2d),
    "conditional": (conditional, of_conditional),
}


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Lets `accelerate` plan for the CPU as it does for a GPU."""
    monkeypatch.setattr("diffusion.planner.accelerated_forward._native.CPP_MISSING", "")

    def made(self, graph, dtype, device):
        return EagerPlan(graph, device, autocast=self.precision == "fast")

    monkeypatch.setattr(AcceleratedForward, "_made", made)


@torch.no_grad()
@pytest.mark.thinned
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_networks(name, dtype, batch, on_the_cpu):
    make, inputs = NETWORKS[name]
    network = make()
    given = inputs(batch)
    in_double = {n: v.double() if v.is_floating_point() else v for n, v in given.items()}
    expected = make().double()(**in_double).sample
    given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in given.items()}
    network = network.to(dtype)
    peer = network(**given).sample
    actual = diffusion.accelerate(network)(**given).sample
    assert "calls of group_norm_silu" in network.report()
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    if dtype == torch.float32:
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    else:
        error, allowed = ((y - expected).square().mean().sqrt() for y in (actual, peer))
        assert error <= 2 * allowed


@torch.no_grad()
def test_fast_is_autocast(on_the_cpu):
    network, given = unet2d(), of_unet2d(2)
    in_double = {n: v.double() if v.is_floating_point() else v for n, v in given.items()}
    expected = unet2d().double()(**in_double).sample
    with torch.autocast("cpu", torch.bfloat16):
        peer = network(**given).sample
    actual = diffusion.accelerate(network, precision="fast")(**given).sample
    assert actual.dtype == torch.float32
    error, allowed = ((y - expected).square().mean().sqrt() for y in (actual, peer))
    assert 0 < error <= 2 * allowed


@torch.no_grad()
def test_changed_weights_count_without_a_new_plan(on_the_cpu):
    network, given = unet2d(), of_unet2d(1)
    diffusion.accelerate(network)(**given)
    network.conv_in.weight.data.mul_(2)  # the plan reads the weights themselves
    actual = network(**given).sample
    expected = diffusion.restore(network)(**given).sample
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def fake_cuda_plan(network: nn.Module, given: dict[str, Tensor], fake: FakeTensorMode) -> EagerPlan:
    held = {**dict(network.named_parameters()), **dict(network.named_buffers())}

    def run(**arguments: Tensor) -> Tensor:
        return network(**arguments, return_dict=False)[0]

    with fake:
        graph, _ = trace(run, given, {name: (tensor, tensor) for name, tensor in held.items()})
    return EagerPlan(graph, torch.device("cuda", 0), autocast=False)


class CopiesFromTheHost(TorchDispatchMode):
    """found: the functions that make a tensor on a CUDA device from one on the CPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs, outputs = (
            [leaf.device.type for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
            for tree in ((args, kwargs), result)
        )
        if outputs and set(outputs) == {"cuda"} and inputs and set(inputs) == {"cpu"}:
            self.found.append(str(function))
        return result


@torch.no_grad()
def test_a_gpu_runs_this_packages_kernels(monkeypatch):
    """Fake tensors on CUDA need no device; the ops' reference stands in for their kernels."""
    calls: Counter[str] = Counter()

    def counted(op):
        def run(*args, **kwargs):
            calls[op.__name__] += 1
            return op(*args, **kwargs, backend="reference")

        return run

    for op in (kernels.group_norm_silu, kernels.attention):
        monkeypatch.setattr(f"diffusion.planner.eager_plan.{op.__name__}", counted(op))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.device("cuda"):
        network = unet2d(attention_head_dim=16)
        given = {"sample": torch.empty(2, 3, 16, 16), "timestep": torch.empty(2, dtype=torch.int64)}
    plan = fake_cuda_plan(network, given, fake)
    norms = sum(isinstance(module, nn.GroupNorm) for module in network.modules())
    attentions = sum(type(module).__name__ == "Attention" for module in network.modules())
    assert plan.report()[0].startswith(f"  {norms} calls of group_norm_silu, {attentions} of attention")
    with fake, CopiesFromTheHost() as copies:
        (output,) = plan.evaluate(list(given.values()))
    assert not copies.found  # a CUDA graph could not capture them
    assert output.shape == (2, 3, 16, 16)
    assert output.device.type == "cuda"
    assert calls == {"group_norm_silu": norms, "attention": attentions}
