"""conv2d in float32 against PyTorch in float64: csrc/convolution/winograd_training.cpp."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from diffusion.kernels import _native, conv2d, explain
from diffusion.kernels._tolerance import wrong
from diffusion.kernels.ops.convolution.cases import CONV2D_CASES, Conv2dCase
from diffusion.kernels.ops.convolution.library import pack_winograd, winograd_weight_gradient
from diffusion.kernels.ops.convolution.packing import Packing, pack
from diffusion.kernels.ops.convolution.winograd import ACCURACY
from diffusion.models.blocks import Conv2d
from helpers.native import every_variant, requires_native

pytestmark = requires_native

# Odd sides; fewer and more channels than the 16, 48 and 64 that are multiplied or packed together.
CASES = {
    name: case
    for name, case in CONV2D_CASES.items()
    if case.side == 3 and case.stride == 1 and case.padding in (None, 1)
} | {
    "batch_of_1": Conv2dCase((1, 64, 33, 17), 64),
    "batch_of_2": Conv2dCase((2, 49, 16, 16), 97, layout="contiguous"),
    "batch_of_3": Conv2dCase((3, 100, 21, 5), 47, bias=False),
    "batch_of_4": Conv2dCase((4, 64, 15, 15), 33, layout="slice"),
    "batch_of_5": Conv2dCase((5, 15, 14, 13), 130),
    "several_blocks": Conv2dCase((9, 96, 18, 31), 96),
    "large_weight": Conv2dCase((5, 160, 17, 16), 192),  # two blocks, as large as the sums
}


def leaves(tensors, dtype=torch.float32):
    return [None if t is None else t.to(dtype).detach().requires_grad_() for t in tensors]


def results(function, tensors, upstream, **options):
    """The output, and the gradients by all tensors."""
    out = function(*tensors, **options)
    wanted = [t for t in tensors if t is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]


def example(case="batch_of_4"):
    arguments, options = CASES[case].inputs(torch.float32)
    shape = len(arguments[0]), len(arguments[1]), *arguments[0].shape[2:]
    return arguments, options, torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case, simd):
    arguments, options, upstream = example(case)
    actual = results(conv2d, leaves(arguments), upstream, backend="cpp", **options)
    peer = results(F.conv2d, leaves(arguments), upstream, **options)
    expected = results(F.conv2d, leaves(arguments, torch.double), upstream, **options)
    for three in zip(actual, peer, expected, strict=True):
        assert three[0].dtype == torch.float32
        assert wrong(*three, accuracy=ACCURACY) is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("outputs", "channels"), [(16, 16), (70, 20), (131, 33), (3, 64)])
def test_the_packed_weight_is_that_of_planned_networks(outputs, channels, memory_format, simd):
    """`pack` transforms in float64. The gradient of the input is a convolution by the transposed weight."""
    weight = torch.randn(outputs, channels, 3, 3).contiguous(memory_format=memory_format)
    for transposed, plain in ((False, weight), (True, weight.transpose(0, 1).flip(2, 3))):
        for panel in (16, 64):
            expected = pack(plain, Packing(4, panel=panel)).data.flatten()
            actual = pack_winograd(weight, transposed, panel)
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_gradients_of_some_inputs_are_those_of_all(wanted):
    arguments, options, upstream = example()
    expected = results(conv2d, leaves(arguments), upstream, backend="cpp", **options)[1:]
    tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(arguments)]
    conv2d(*tensors, backend="cpp", **options).backward(upstream)
    for i, tensor in enumerate(tensors):
        assert (tensor.grad is None) if i not in wanted else torch.equal(tensor.grad, expected[i])


def test_neither_threads_nor_wide_vectors_matter():
    arguments, options, upstream = example("several_blocks")
    found = {}
    for variant in every_variant():
        narrow = variant.startswith("baseline")  # rounds products before it adds them
        actual = results(conv2d, leaves(arguments), upstream, backend="cpp", **options)
        assert all(map(torch.equal, actual, found.setdefault(narrow, actual)))


def test_an_upstream_gradient_of_any_strides():
    arguments, options, upstream = example()
    expected = results(conv2d, leaves(arguments), torch.ones_like(upstream), backend="cpp", **options)
    one = torch.ones(()).expand(upstream.shape)
    assert all(map(torch.equal, results(conv2d, leaves(arguments), one, backend="cpp", **options), expected))


def test_a_batch_of_upstream_gradients():
    arguments, options, upstream = example()
    several = torch.stack([upstream, upstream.flip(0), -upstream])
    tensors = leaves(arguments)
    actual = torch.autograd.grad(
        conv2d(*tensors, backend="cpp", **options), tensors, several, is_grads_batched=True
    )
    peer, expected = (
        [torch.stack(three) for three in zip(*(results(F.conv2d, leaves(arguments, dtype), one, **options)[1:]
                                               for one in several), strict=True)]
        for dtype in (torch.float32, torch.double)
    )  # fmt: skip
    for three in zip(actual, peer, expected, strict=True):
        assert wrong(*three, accuracy=ACCURACY) is None


@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
def test_the_output_is_stored_as_pytorchs(x_format, weight_format):
    """So that a caller can view the output of a contiguous network, as when it is not trained."""
    weight = torch.randn(64, 64, 3, 3).contiguous(memory_format=weight_format).requires_grad_()
    for channels in (64, 128):  # the latter a range of the channels
        wide = torch.randn(2, channels, 16, 16).contiguous(memory_format=x_format)
        x = wide[:, :64]
        expected = F.conv2d(x, weight, padding=1)
        assert conv2d(x, weight, padding=1, backend="cpp").stride() == expected.stride()


def test_a_bias_may_change_before_the_backward_pass():
    arguments, options, upstream = example()
    expected = results(conv2d, leaves(arguments), upstream, backend="cpp", **options)[1:]
    tensors = leaves(arguments)
    out = conv2d(*tensors, backend="cpp", **options)
    with torch.no_grad():
        tensors[2].add_(1)
    assert all(map(torch.equal, torch.autograd.grad(out, tensors, upstream), expected))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*is deprecated:FutureWarning")
@pytest.mark.skipif(_native.simd_in_use() == "baseline", reason="the baseline convolves by PyTorch")
def test_traced_and_exported_networks_are_of_pytorchs_ops():
    module, x = Conv2d(64, 64, 3, padding=1), torch.randn(16, 64, 8, 8)
    assert "Winograd" in explain(conv2d, x, module.weight, padding=1)
    exported = torch.export.export(module, (x,))
    assert [node.target for node in exported.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.conv2d.default
    ]
    traced = torch.jit.trace(module, x)
    assert {node.kind() for node in traced.inlined_graph.nodes()} >= {"aten::_convolution"}


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("second", [0, 1, 2])
def test_second_derivatives_are_those_of_pytorch(first, second):
    arguments, options, _ = example("odd")

    def second_derivative(function, dtype, **more):
        tensors = leaves(arguments, dtype)
        y = function(*tensors, **options, **more).square().sum() + sum(t.pow(3).sum() for t in tensors)
        (gradient,) = torch.autograd.grad(y, tensors[first], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), tensors[second])[0]

    actual = second_derivative(conv2d, torch.float32, backend="cpp")
    peer, expected = (second_derivative(F.conv2d, dtype) for dtype in (torch.float32, torch.double))
    assert wrong(actual, peer, expected, accuracy=5 * ACCURACY) is None


def test_checkpointing_and_compilation_change_nothing():
    arguments, options, upstream = example()

    def function(x, weight, bias):
        return conv2d(x, weight, bias, backend="cpp", **options)

    def twice(*tensors):
        return checkpoint(function, *tensors, use_reentrant=False)

    plain = results(function, leaves(arguments), upstream)
    assert all(map(torch.equal, plain, results(twice, leaves(arguments), upstream)))
    compiled = torch.compile(function, fullgraph=True)
    assert all(map(torch.equal, plain, results(compiled, leaves(arguments), upstream)))


def test_opcheck():
    weight = torch.randn(24, 40, 3, 3)
    for transposed in (False, True):
        torch.library.opcheck(pack_winograd.default, (weight, transposed, 16))
    grad = torch.randn(2, 24, 6, 5).contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 40, 6, 5).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(winograd_weight_gradient.default, (grad, x))


@pytest.mark.parametrize(
    ("of_x", "of_weight", "upstream"), [(1e36, 1, 1), (1e20, 1e17, 1), (1, 1e36, 1e-3), (1e15, 1, 1e15)]
)
def test_large_numbers_whose_sums_are_finite(of_x, of_weight, upstream, simd):
    """The transforms of output and gradient of the input overflow; those are then summed directly."""
    (x, weight, bias), options, grad = example()
    tensors, grad = (x * of_x, weight * of_weight, bias), grad * upstream
    actual = results(conv2d, leaves(tensors), grad, backend="cpp", **options)
    peer = results(F.conv2d, leaves(tensors), grad, **options)
    expected = results(F.conv2d, leaves(tensors, torch.double), grad, **options)
    for name, *three in zip(("out", "x", "weight", "bias"), actual, peer, expected, strict=True):
        if name != "weight" or expected[2].abs().max() < 1e33:
            assert wrong(*three, accuracy=ACCURACY) is None, name


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_inputs_reach_every_gradient_that_depends_on_them(value):
    arguments, options, upstream = example()
    for which in range(2):
        tensors, grad = [t.clone() for t in arguments], upstream.clone()
        (tensors[0], grad)[which][1, 5, 7, 7] = value
        actual = results(conv2d, leaves(tensors), grad, backend="cpp", **options)
        expected = results(F.conv2d, leaves(tensors), grad, **options)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one.isfinite(), other.isfinite())


def test_a_nan_stays_in_its_pixels_and_channel():
    (x, weight, bias), options, upstream = example()
    x = x.clone()
    x[1, 5, 7, 7] = float("nan")
    out, d_x, d_weight, d_bias = results(
        conv2d, leaves((x, weight, bias)), upstream, backend="cpp", **options
    )
    assert out[1, :, 6:9, 6:9].isnan().all()
    assert out.isnan().sum() == 9 * out.shape[1]
    assert d_x.isfinite().all()
    assert d_weight[:, 5].isnan().all()
    assert d_weight[:, :5].isfinite().all()
    assert d_weight[:, 6:].isfinite().all()
    assert d_bias.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(2, 4, 5, 5).double()}, "must be float32"),
        ({"grad": torch.zeros(1, 4, 5, 5)}, "grad must be"),
        ({"grad": torch.zeros(2, 4, 5, 6)}, "grad must be"),
        ({"grad": torch.zeros(2, 4, 5)}, "grad must be"),
        ({"x": torch.zeros(2, 4, 5, 5)}, "x must be channels_last"),
    ],
)
def test_the_gradient_refuses(change, message):
    images = torch.zeros(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=message):
        winograd_weight_gradient(**{"grad": images, "x": images} | change)


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 4, 3, 3).bfloat16(), torch.zeros(4, 4, 3, 1), torch.zeros(0, 4, 3, 3)]
)
def test_packing_refuses(weight):
    with pytest.raises(RuntimeError, match="weight must be float32"):
        pack_winograd(weight, False, 64)


@pytest.mark.parametrize("shapes", [((0, 4, 3, 3), (0, 6, 3, 3)), ((2, 4, 0, 3), (2, 6, 0, 3))])
def test_nothing_has_a_gradient_of_zero(shapes):
    grad, x = (torch.zeros(shape).contiguous(memory_format=torch.channels_last) for shape in shapes)
    weight, bias = winograd_weight_gradient(grad, x)
    assert torch.equal(weight, torch.zeros(4, 3, 3, 6))
    assert torch.equal(bias, torch.zeros(4))


def test_what_runs_where(simd):
    (x, weight, bias), options = Conv2dCase((4, 64, 16, 16), 64).inputs(torch.float32)
    served = "conv2d: reference" if simd == "baseline" else "conv2d: cpp, by Winograd's algorithm"

    def chosen(x, weight, bias, **options):
        return explain(conv2d, x, weight, bias, **options).splitlines()[0]

    assert chosen(x, weight, bias, **options) == "conv2d: reference"  # nothing requires a gradient
    weight.requires_grad_()
    assert chosen(x, weight, bias, **options) == served
    assert chosen(x, weight.detach(), bias.clone().requires_grad_(), **options) == served
    assert chosen(x[:1], weight, bias, **options) == "conv2d: reference"
    assert chosen(x[:, :8], weight[:, :8], bias, **options) == "conv2d: reference"
    assert chosen(x[..., :5, :5], weight, bias, **options) == "conv2d: reference"
    for other in ({"padding": 0}, {"padding": 1, "stride": 2}):
        assert chosen(x, weight, bias, **other) == "conv2d: reference"
    with torch.no_grad():
        assert chosen(x, weight, bias, **options) == "conv2d: reference"
    with torch.inference_mode():
        assert chosen(x, weight, bias, **options) == "conv2d: reference"
    with torch.autocast("cpu", torch.float16):
        assert chosen(x, weight, bias, **options) == "conv2d: reference"
    double = x.double(), weight.double(), bias.double()
    assert chosen(*double, **options) == "conv2d: reference"
