"""conv2d against PyTorch in float64: the gradients that csrc/convolution/weight_gradient.cpp computes."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad as gradient_of
from torch.utils.checkpoint import checkpoint

from diffusion.kernels import conv2d, explain
from diffusion.kernels.ops.convolution.cases import CONV2D_CASES as CASES
from diffusion.kernels.ops.convolution.library import convolution_weight_gradient
from helpers.native import requires_amx
from helpers.tolerance import assert_close


def leaves(tensors, dtype=None):
    return [None if t is None else t.to(dtype or t.dtype).detach().requires_grad_() for t in tensors]


def gradients(function, tensors, upstream, **options):
    out = function(*tensors, **options)
    wanted = [t for t in tensors if t is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]


def freed():
    """A tensor whose memory was given back."""
    t = torch.zeros(2, 4, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    t.untyped_storage().resize_(0)
    return t


@requires_amx
@pytest.mark.parametrize("case", CASES)
def test_gradients_in_bfloat16(case):
    arguments, options = CASES[case].inputs(torch.bfloat16)
    upstream = torch.randn_like(F.conv2d(*arguments, **options))
    actual = gradients(conv2d, leaves(arguments), upstream, backend="cpp", **options)
    peer = gradients(F.conv2d, leaves(arguments), upstream, **options)
    expected = gradients(F.conv2d, leaves(arguments, torch.double), upstream, **options)
    for three in zip(actual, peer, expected, strict=True):
        assert_close(*three)
        assert three[0].dtype == torch.bfloat16


@requires_amx
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_float32_weights_under_autocast_are_not_rounded(case):
    (x, weight, bias), options = CASES[case].inputs(torch.float32)
    x, weight = (t.bfloat16().float() for t in (x, weight))  # the op multiplies bfloat16
    upstream = torch.randn_like(F.conv2d(x, weight, bias, **options)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(conv2d, leaves((x, weight, bias)), upstream, backend="cpp", **options)
    expected = gradients(F.conv2d, leaves((x, weight, bias), torch.double), upstream, **options)
    assert actual[0].dtype == torch.bfloat16
    # Products of two bfloat16 are exact in float32: the peer is their sum in another order.
    peer = gradients(F.conv2d, leaves((x, weight, bias)), upstream, **options)
    for mine, theirs, right in list(zip(actual, peer, expected, strict=True))[2:]:
        assert mine.dtype == torch.float32
        assert_close(mine, theirs, right, ulps=16)


@requires_amx
@pytest.mark.parametrize("images", [6, 40])
@pytest.mark.parametrize("side", [1, 3])
def test_the_number_of_threads_does_not_matter(side, images):
    grad = torch.randn(images, 96, 33, 20).bfloat16().contiguous(memory_format=torch.channels_last)
    x = torch.randn(images, 160, 33, 20).bfloat16().contiguous(memory_format=torch.channels_last)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(convolution_weight_gradient(grad, x, side, 1, side // 2))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@requires_amx
def test_a_nan_stays_in_its_channel():
    (x, weight, bias), options = CASES["odd"].inputs(torch.bfloat16)
    x[1, 5, 3, 3] = float("nan")
    _, _, d_weight, d_bias = gradients(
        conv2d, leaves((x, weight, bias)), torch.ones(3, 70, 7, 9), backend="cpp", **options
    )
    assert d_weight[:, 5].isnan().all()
    assert d_weight[:, :5].isfinite().all()
    assert d_weight[:, 6:].isfinite().all()
    assert d_bias.isfinite().all()


@requires_amx
def test_unwanted_gradients():
    (x, weight, bias), options = CASES["plain"].inputs(torch.bfloat16)
    conv2d(x, weight.requires_grad_(), bias, backend="cpp", **options).sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    whole = weight.grad
    conv2d(x.requires_grad_(), weight.detach(), bias, backend="cpp", **options).sum().backward()
    assert x.grad is not None
    both = weight.detach().clone().requires_grad_()
    conv2d(x, both, bias.requires_grad_(), backend="cpp", **options).sum().backward()
    assert torch.equal(both.grad, whole)
    assert torch.equal(bias.grad, torch.full((16,), 128.0).bfloat16())


@requires_amx
def test_checkpointing_and_compilation_change_nothing():
    (x, weight, bias), options = CASES["odd"].inputs(torch.float32)
    upstream = torch.randn(3, 70, 7, 9).bfloat16()

    def function(x, weight, bias):
        return conv2d(x, weight, bias, **options)

    def twice(*tensors):
        return checkpoint(function, *tensors, use_reentrant=False)

    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(function, leaves((x, weight, bias)), upstream)
        again = gradients(twice, leaves((x, weight, bias)), upstream)
        compiled = gradients(torch.compile(function, fullgraph=True), leaves((x, weight, bias)), upstream)
    assert all(map(torch.equal, plain, again))
    assert all(map(torch.equal, plain, compiled))


@requires_amx
def test_opcheck():
    grad = torch.randn(2, 24, 6, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 40, 6, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    for side in (1, 3):
        torch.library.opcheck(convolution_weight_gradient.default, (grad, x, side, 1, side // 2))
    grad = grad[:, :, :3, :3].contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(convolution_weight_gradient.default, (grad, x, 3, 2, 1))


@requires_amx
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(2, 4, 3, 3)}, "must be bfloat16"),
        ({"grad": torch.zeros(1, 4, 3, 3).bfloat16()}, "grad must be"),
        ({"grad": torch.zeros(2, 4, 3, 4).bfloat16()}, "grad must have the size"),
        ({"grad": torch.zeros(2, 4, 3).bfloat16()}, "grad must be"),
        ({"x": torch.zeros(2, 4, 3, 3).bfloat16()}, "x must be channels_last"),
        ({"x": freed()}, "must have memory"),
        ({"side": 2}, "the kernel must be"),
        ({"stride": 3}, "the stride must be"),
        ({"padding": 3}, "the stride must be"),
        ({"padding": -1}, "the stride must be"),
        ({"stride": 2}, "grad must have the size"),
        ({"padding": 0}, "grad must have the size"),
    ],
)
def test_the_operator_refuses(change, message):
    images = torch.zeros(2, 4, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    whole = {"grad": images, "x": images, "side": 3, "stride": 1, "padding": 1}
    with pytest.raises(RuntimeError, match=message):
        convolution_weight_gradient(**whole | change)


@requires_amx
@pytest.mark.parametrize("shapes", [((0, 4, 3, 3), (0, 6, 3, 3)), ((2, 4, 0, 3), (2, 6, 0, 3))])
def test_nothing_has_a_gradient_of_zero(shapes):
    grad, x = (
        torch.zeros(shape).bfloat16().contiguous(memory_format=torch.channels_last) for shape in shapes
    )
    weight, bias = convolution_weight_gradient(grad, x, 3, 1, 1)
    assert torch.equal(weight, torch.zeros(4, 3, 3, 6))
    assert torch.equal(bias, torch.zeros(4))


@requires_amx
@pytest.mark.parametrize("first", ["x", "weight", "bias"])
@pytest.mark.parametrize("second", ["x", "weight", "bias"])
def test_no_second_derivative(first, second):
    """A second derivative is refused, not left out, also if there is another path."""
    arguments, options = CASES["plain"].inputs(torch.float32)
    inputs = dict(zip(("x", "weight", "bias"), leaves(arguments), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d(**inputs, backend="cpp", **options).square().sum()
    y = y + sum(t.pow(3).sum() for t in inputs.values())
    (gradient,) = torch.autograd.grad(y, inputs[first], create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        torch.autograd.grad(gradient.sum(), inputs[second])


@requires_amx
@pytest.mark.parametrize("double", ["x", "weight", "bias"])
def test_autocast_leaves_float64_as_it_is(double):
    arguments, options = CASES["plain"].inputs(torch.float32)
    inputs = dict(zip(("x", "weight", "bias"), leaves(arguments), strict=True))
    inputs[double] = inputs[double].double()
    with torch.autocast("cpu", torch.bfloat16):
        assert "float64" in explain(conv2d, **inputs, **options)
        with pytest.raises(ValueError, match="leaves float64"):
            conv2d(**inputs, backend="cpp", **options)


@requires_amx
def test_without_autocast_all_is_bfloat16():
    (x, weight, bias), options = CASES["plain"].inputs(torch.bfloat16)
    with pytest.raises(ValueError, match="it multiplies in bfloat16"):
        conv2d(x, weight, bias.float(), backend="cpp", **options)


def test_torch_func_is_served_by_the_reference():
    (x, weight, bias), options = CASES["plain"].inputs(torch.bfloat16)
    actual = gradient_of(lambda w: conv2d(x, w, bias, **options).float().square().sum())(weight)
    expected = gradient_of(lambda w: F.conv2d(x, w, bias, **options).float().square().sum())(weight)
    assert torch.equal(actual, expected)


def test_what_runs_where(simd):
    (x, weight, bias), options = CASES["plain"].inputs(torch.float32)
    weight.requires_grad_()
    assert explain(conv2d, x, weight, bias, **options).startswith("conv2d: reference")
    with torch.autocast("cpu", torch.bfloat16):
        serving = explain(conv2d, x, weight, bias, **options).splitlines()
        by_amx = "conv2d: cpp, the gradient of the weight by AMX"
        assert serving[0] == (by_amx if simd == "amx" else "conv2d: reference")
        for change in ({"stride": 3, "padding": 1}, {"padding": 3}):
            assert explain(conv2d, x, weight, bias, **change).startswith("conv2d: reference")
    with torch.autocast("cpu", torch.float16):
        assert explain(conv2d, x, weight, bias, **options).startswith("conv2d: reference")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert explain(conv2d, x, weight, bias, **options).startswith("conv2d: reference")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 3}, TypeError, "x must be a tensor"),
        ({"weight": None}, TypeError, "weight must be a tensor"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor or None"),
        ({"stride": 1.5}, TypeError, "stride must be an integer"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"padding": -1}, ValueError, "padding 0"),
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "floating-point x"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, ValueError, "floating-point x"),
        ({"weight": torch.zeros(5, 4, 3, 3)}, ValueError, "weight must be"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must have shape"),
    ],
)
def test_arguments(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(5, 3, 3, 3), "bias": torch.zeros(5)}
    with pytest.raises(error, match=message):
        conv2d(**arguments | change)
