"""A network that someone altered: images are those of a plain loop over its modules as they then are."""

import contextlib
import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import load
from diffusion.evaluation.likelihood import bits_per_dimension
from diffusion.inference import captured_steps
from diffusion.inference.denoiser import explain
from diffusion.models.blocks import Conv2d, Norm, ResBlock
from helpers.alterations import (
    CHANGES,
    LABELS,
    altered,
    circular_padding_of_one,
    halve,
    hook_on_a_level,
    loop,
    make,
    sample,
    seamless_from_left_to_right,
    set_everywhere,
    unaltered,
)
from helpers.models import make_model
from helpers.native import requires_native
from helpers.thinning import exhaustive_but

pytestmark = requires_native


# Changes that are noticed by the same means as another one.
SIBLINGS = {
    "hook_on_a_level_above",
    "pre_hook_on_a_level",
    "hook_on_the_middle",
    "parametrization_of_a_linear_map",
    "old_weight_norm",
    "spectral_norm",
    "lora_on_the_embedding",
    "sequential_in_place_of_the_input",
    "identity_in_place_of_a_norm",
    "identity_in_place_of_attention",
    "no_norm_before_attention",
    "tied_modules",
    "weight_flipped_through_data",
    "assigned_state_dict",
    "embed_of_a_subclass",
}


@pytest.mark.thinned
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", exhaustive_but(CHANGES, default=CHANGES.keys() - SIBLINGS))
def test_samples_are_those_of_the_modules(name, after):
    model, before = altered(name, after, "exact")
    expected = loop(model)
    assert (expected - before).abs().max() > 0.01, "this change changes nothing"
    for _ in range(1 + after):
        assert (sample(model) - expected).abs().max() <= 5e-4


@pytest.mark.thinned
@pytest.mark.parametrize(
    "after", [pytest.param(False, marks=pytest.mark.slow), True], ids=["before", "after"]
)
@pytest.mark.parametrize("name", exhaustive_but(CHANGES, default=list(CHANGES)[::12]))
def test_in_the_fast_precision(name, after):
    """Nearer to the altered network's images, in float32, than those in bfloat16 from before it was."""
    model, before = altered(name, after, "fast")
    expected = loop(model)
    difference = (sample(model, precision="fast") - expected).abs().mean()
    assert difference <= 0.75 * (expected - before).abs().mean()


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("pre", [False, True], ids=["hook", "pre-hook"])
def test_global_hooks(pre, precision):
    """On every module of the process: seen while they are there, and no longer."""
    model = make_model(10)
    before = sample(model, precision=precision)
    register = torch_module.register_module_forward_hook
    function = halve
    if pre:
        register = torch_module.register_module_forward_pre_hook

        def function(module, args):
            return tuple(
                0.5 * a if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
            )

    with contextlib.closing(_closing(register(function))):
        expected, found = loop(model), sample(model, precision=precision)
        reason = model.explain(precision=precision)
    assert (found - expected).abs().mean() <= (1e-5 if precision == "exact" else 0.02)
    assert (found - before).abs().mean() > 0.05
    assert "a forward hook is registered for all modules" in reason
    assert torch.equal(sample(model, precision=precision), before)


def _closing(handle):
    handle.close = handle.remove
    return handle


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "name", ["circular_padding", "hook_on_a_level", "denoise_of_a_subclass", "sequential"]
)
def test_by_an_explicit_backend(name, backend):
    model, _ = altered(name, False, "exact")
    assert (sample(model, backend=backend) - loop(model)).abs().max() <= 5e-4


def test_a_forward_without_a_backend():
    model, _ = altered("forward_of_the_network", False, "exact")
    with pytest.raises(ValueError, match="backend 'reference' cannot be chosen: the UNet's `forward` takes"):
        sample(model, backend="reference")


@pytest.mark.parametrize(
    ("own", "dtype"),
    [(torch.float32, "float16"), (torch.bfloat16, "float32"), (torch.float16, None)],
    ids=str,
)
def test_in_another_dtype(own, dtype):
    model, before = altered("hook_on_a_level", False, "exact")
    model.to(own)
    expected = loop(copy.deepcopy(model).float())
    found = sample(model, dtype=dtype)
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() <= 0.2 * (before - expected).abs().mean()
    assert next(model.parameters()).dtype == own


@pytest.mark.parametrize("name", ["circular_padding", "hook_on_a_level", "lora_on_attention", "dilation"])
def test_of_a_model_that_trains(name):
    """Samples are those of eval mode, without dropout, even if a part is in training mode; the modes stay."""
    model, _ = altered(name, False, "exact")
    expected = loop(model)
    set_everywhere(model.unet, ResBlock, dropout=0.5)
    for train in (model.train, model.unet.mid.train):
        model.eval()
        train()
        modes = [module.training for module in model.modules()]
        assert (sample(model) - expected).abs().max() <= 5e-4
        assert [module.training for module in model.modules()] == modes


def test_a_part_that_trains_has_no_dropout():
    model = make()
    set_everywhere(model.unet, ResBlock, dropout=0.5)
    model.unet.config = replace(model.unet.config, dropout=0.5)
    expected = loop(model)
    model.unet.mid.train()
    assert model.explain() == "unet: fused"
    for backend in ("auto", "reference"):
        assert (sample(model, backend=backend) - expected).abs().max() <= 5e-4


@pytest.mark.parametrize("name", ["mid.blocks.0.conv1", "input_conv", "up.1.resample", "time_mlp"])
def test_a_module_that_is_none(name):
    model = make()
    parent, _, last = name.rpartition(".")
    setattr(model.unet.get_submodule(parent), last, None)
    with pytest.raises(ValueError, match=f"unet.{name} is None; "):
        sample(model)


def test_methods_replaced_on_a_class(monkeypatch):
    model = make()
    before = sample(model)
    own = Norm.forward
    monkeypatch.setattr(Norm, "forward", lambda self, *args, **options: own(self, *args, **options) * 0.7)
    expected = loop(model)
    assert (sample(model) - expected).abs().max() <= 5e-4
    assert "Norm.forward was replaced" in model.explain()
    monkeypatch.undo()
    assert torch.equal(sample(model), before)


def plain_loop(model) -> torch.Tensor:
    """The samples of the same network with convolutions of torch.nn."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Conv2d):
            module.__class__ = nn.Conv2d
    return loop(model)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "name", ["seamless_convolutions", "seamless_convolution_in_a_block", "padding_from_the_left"]
)
def test_convolutions_as_those_of_torch(name, after):
    model, before = altered(name, after, "exact")
    expected = plain_loop(model)
    assert (expected - before).abs().max() > 0.01
    for options in ({}, {}, {"backend": "reference"}):
        assert (sample(model, **options) - expected).abs().max() <= 5e-4
    assert model.explain().startswith("unet: modules, called whole")


@pytest.mark.parametrize(
    ("owner", "name"),
    [(nn.Conv2d, "_conv_forward"), (nn.Conv2d, "forward"), (Conv2d, "_conv_forward"), (nn.Linear, "forward")],
    ids=["_conv_forward", "forward", "own _conv_forward", "linear"],
)
def test_methods_of_torch_replaced_on_a_class(owner, name, monkeypatch):
    model = make()
    before, own = sample(model), getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *args: own(self, *args) * 0.9, raising=False)
    expected = loop(model) if owner is Conv2d else plain_loop(model)
    assert (expected - before).abs().max() > 0.01
    for backend in ("auto", "reference"):
        assert (sample(model, backend=backend) - expected).abs().max() <= 5e-4
    assert f"{owner.__name__}.{name} was replaced" in model.explain()
    monkeypatch.undo()
    assert torch.equal(sample(model), before)


def test_a_seamless_convolution_in_training():
    """Forward and gradients are those of torch.nn.Conv2d, also as a compiled module."""
    conv, right = Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    right.load_state_dict(conv.state_dict())
    for module in (conv, right):
        module._conv_forward = functools.partial(seamless_from_left_to_right, module)
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = right(x)
    right_gradients = torch.autograd.grad(expected.square().sum(), list(right.parameters()))
    assert (expected - nn.Conv2d.forward(Conv2d(8, 8, 3, padding=1), x)).abs().max() > 0.01
    for call in (conv, torch.compile(conv, backend="eager")):
        found = call(x)
        gradients = torch.autograd.grad(found.square().sum(), list(conv.parameters()))
        torch.testing.assert_close(found, expected)
        assert all(map(torch.allclose, gradients, right_gradients))


class Softened(TorchFunctionMode):
    """Every convolution, linear map, normalisation and activation gives 0.9 times its result."""

    CHANGED = (F.silu, F.linear, F.conv2d, torch.group_norm)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        return output * 0.9 if function in self.CHANGED else output


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_function_mode(after):
    model = make()
    before = sample(model) if after else None
    with Softened():
        expected, found, reason = plain_loop(model), sample(model), model.explain()
        by_reference = sample(model, backend="reference")
    assert "Softened is active, a TorchFunctionMode" in reason
    assert (expected - loop(model)).abs().max() > 0.1
    assert (found - expected).abs().max() <= 5e-4
    assert (by_reference - expected).abs().max() <= 5e-4
    if after:
        assert torch.equal(sample(model), before)


def test_the_mode_of_a_device_changes_nothing():
    model = make()
    before = sample(model)
    with torch.device("cpu"):
        assert model.explain() == "unet: fused"
        assert torch.equal(sample(model), before)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (F, "silu"),
        (F, "conv2d"),
        (torch, "group_norm"),
        (F, "scaled_dot_product_attention"),
        (F, "interpolate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_function_of_torch_is_replaced(owner, name, monkeypatch):
    model = make()
    before, own = sample(model), getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: own(*args, **options) * 0.9)
    expected = plain_loop(model)
    assert (expected - before).abs().max() > 0.01
    for backend in ("auto", "reference"):
        assert (sample(model, backend=backend) - expected).abs().max() <= 5e-4
    assert f"{name} was replaced" in model.explain()


def test_steps_are_not_captured(monkeypatch):
    """Steps would be captured on a CUDA device, but a graph would skip the hooks."""
    model = make()
    captured = []
    monkeypatch.setattr(captured_steps, "runs_cuda_kernels", lambda *args: True)
    monkeypatch.setattr(
        captured_steps,
        "capture_cuda_graph",
        lambda function, *_: captured.append(function) or (lambda count: [function() for _ in range(count)]),
    )
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    sample(model)
    assert captured
    captured.clear()
    with contextlib.closing(_closing(torch_module.register_module_forward_hook(halve))):
        assert (sample(model) - loop(model)).abs().max() <= 5e-4
    assert not captured
    hook_on_a_level(model.unet)
    assert (sample(model) - loop(model)).abs().max() <= 5e-4
    assert not captured


def test_explanations():
    model = make()
    assert model.explain() == model.explain(precision="fast") == "unet: fused"
    assert model.explain(backend="reference") == "unet: modules\n  not fused: the backend is 'reference'"
    circular_padding_of_one(model.unet)
    reason = "output_conv.padding_mode is 'circular', not 'zeros'"
    assert model.explain() == f"unet: modules, called whole\n  not fused: {reason}"
    assert "CUDA graph" in explain(model.unet, torch.device("cuda"), torch.float32, "auto")
    with pytest.raises(ValueError, match="unknown precision"):
        model.explain(precision="slow")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_hooks_see_every_evaluation(backend):
    """Hooks see the shapes and timesteps of a plain loop, and tensors that do not change later."""
    model, seen = make_model(10), []
    handle = model.unet.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    sample(model, backend=backend)
    handle.remove()
    found = [t.clone() for call in seen for t in call]
    seen.clear()
    handle = model.unet.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    loop(model)
    expected = [t.clone() for call in seen for t in call]
    assert len(found) == len(expected) == 5 * 4
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


def compiled(model):
    model.unet = torch.compile(model.unet, backend="eager")


def compiled_in_place(model):
    model.unet.compile(backend="eager")


class Wrapper(nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.inner, self.config = unet, unet.config

    def forward(self, x, timesteps, labels=None):
        return self.inner(x, timesteps, labels) * 0.5


def wrapped(model):
    model.unet = Wrapper(model.unet)


def another_unet(model):
    model.unet = make_model(10, seed=7).unet


def half(model):
    model.half()


@pytest.mark.thinned
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("alter", [compiled, compiled_in_place, wrapped, another_unet, half])
def test_another_network_after_samples(alter, precision):
    model = make()
    before = sample(model, precision=precision)
    alter(model)
    expected = loop(copy.deepcopy(model).float() if alter is half else model)
    difference = (sample(model, precision=precision) - expected).abs().mean()
    if alter in (wrapped, another_unet):
        assert difference <= 0.5 * (before - expected).abs().mean()
    assert difference <= (1e-5 if precision == "exact" and alter is not half else 0.05)
    assert (model.explain().split()[-1] == "fused") == (alter in (another_unet, half))


def test_operators_are_seen_by_a_dispatch_mode():
    """A mode that counts operations sees all convolutions of a loop over the modules."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten.convolution.default
            return function(*args, **(kwargs or {}))

    def counted(function, model):
        with Count() as mode:
            mode.count = 0
            return function(model), mode.count

    model = make()
    sample(model)
    (found, count), (expected, right) = counted(sample, model), counted(loop, model)
    assert count >= right > 0
    assert (found - expected).abs().max() <= 5e-4


def test_the_bound_of_an_altered_network():
    """A hook that halves the output is as good as half of the last weights."""
    hooked, equal = make_model(10, T=3), make_model(10, T=3)
    images = torch.randint(
        0, 256, (2, 2, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.tensor(LABELS)
    before = bits_per_dimension(hooked, images, labels)["bits_per_dim"]
    hooked.unet.register_forward_hook(halve)
    with torch.no_grad():
        equal.unet.output_conv.weight.mul_(0.5)
        equal.unet.output_conv.bias.mul_(0.5)
    found = bits_per_dimension(hooked, images, labels)["bits_per_dim"]
    assert found == pytest.approx(bits_per_dimension(equal, images, labels)["bits_per_dim"], rel=1e-4)
    assert abs(found - before) > 1e-2 * before


@pytest.mark.parametrize("name", ["lora_on_attention", "wide_convolution", "parametrization", "no_attention"])
def test_saving_what_could_not_be_loaded(name, tmp_path):
    """Saving is refused, and the former model is kept."""
    make().save(tmp_path)
    model, _ = altered(name, False, "exact")
    with pytest.raises(ValueError, match="the UNet is of another architecture than its configuration"):
        model.save(tmp_path)
    assert torch.equal(sample(load(tmp_path)), unaltered("exact"))


@pytest.mark.parametrize("alter", [compiled, compiled_in_place])
def test_saving_a_compiled_network(alter, tmp_path):
    model = make()
    alter(model)
    model.save(tmp_path)
    assert torch.equal(sample(load(tmp_path)), unaltered("exact"))


@pytest.mark.parametrize("name", ["tied_weights", "tied_modules", "hook_on_a_level", "swapped_modules"])
def test_saving_weights_that_fit(name, tmp_path):
    model, _ = altered(name, False, "exact")
    model.save(tmp_path)
    for found, expected in zip(
        load(tmp_path).unet.state_dict().items(), model.unet.state_dict().items(), strict=True
    ):
        assert found[0] == expected[0]
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("padding_mode", ["circular", "reflect", "replicate"])
def test_padding_modes_in_training(padding_mode):
    """Forward and gradients of a block's convolution are those of torch.nn.Conv2d."""
    conv = Conv2d(16, 16, 3, padding=1, padding_mode=padding_mode, dilation=1, groups=2)
    right = nn.Conv2d(16, 16, 3, padding=1, padding_mode=padding_mode, groups=2)
    right.load_state_dict(conv.state_dict())
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = [conv(x), right(x)]
        assert torch.equal(*outputs)
        gradients = [
            torch.autograd.grad(output.float().square().sum(), list(module.parameters()))
            for output, module in zip(outputs, (conv, right), strict=True)
        ]
        assert all(map(torch.equal, *gradients))
