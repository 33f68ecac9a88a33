"""group_norm_silu and its gradient against the formula in float64, on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from diffusion.kernels import explain, group_norm_silu
from diffusion.kernels.ops.group_norm_silu import op
from diffusion.kernels.ops.group_norm_silu.arguments import Arguments
from diffusion.kernels.ops.group_norm_silu.cases import CASES, Case
from helpers.group_norm_silu import (
    DTYPES,
    SMALL,
    assert_all_close,
    assert_together_close,
    formula,
    torch_ops,
    upstream,
    with_gradients,
)
from helpers.native import every_variant, requires_native
from helpers.tolerance import assert_close

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def serving(device):
    args, kwargs = CASES["mnist"].inputs(device=device)
    return op.serving(Arguments(*args, **kwargs))


BACKENDS = [(backend, device) for device in DEVICES for backend in serving(device)]
ON_CPU = serving("cpu")


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_value_and_gradient(backend, device, case, dtype):
    args, kwargs = CASES[case].inputs(dtype, device)
    actual = with_gradients(group_norm_silu, args, kwargs, backend=backend)
    assert_all_close(actual, args, kwargs)
    out = group_norm_silu(*args, **kwargs, backend=backend)
    assert torch.equal(out, actual[0])
    assert (out.shape, out.stride(), out.dtype) == (args[0].shape, args[0].stride(), dtype)
    if backend != "reference":
        assert actual[1].stride() == args[0].stride()


@pytest.mark.parametrize("case", CASES)
def test_reference_in_float64(case):
    args, kwargs = CASES[case].inputs(torch.float64)
    assert_close(group_norm_silu(*args, **kwargs), None, formula(*args, **kwargs))


@pytest.mark.parametrize("case", SMALL)
def test_reference_gradient(case):
    args, kwargs = CASES[case].inputs(torch.float64)
    names = [name for name, t in kwargs.items() if isinstance(t, torch.Tensor)]
    fixed = {name: value for name, value in kwargs.items() if name not in names}
    tensors = [t for t in args if isinstance(t, torch.Tensor)] + [kwargs[name] for name in names]

    def function(*tensors):
        tensors = list(tensors)
        called = [tensors.pop(0) if isinstance(t, torch.Tensor) else t for t in args]
        return group_norm_silu(*called, **fixed, **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors], fast_mode=True)


SETS = [
    "mnist",
    "improved_channels_last",
    "odd_channels_last",
    "no_affine",
    "off_centre",
    "off_centre_channels_last",
]


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SETS)
def test_instruction_sets_and_threads(case, dtype):
    """The same bits from any number of threads; in channels_last from all sets with fused multiply-adds."""
    args, kwargs = CASES[case].inputs(dtype)
    seen = {}
    for variant in every_variant():
        actual = with_gradients(group_norm_silu, args, kwargs, backend="cpp")
        same = variant.split(",")[0]
        if CASES[case].channels_last and same != "baseline":
            same = "fused"
        assert all(map(torch.equal, actual, seen.setdefault(same, actual))), variant
        if seen[same] is actual:
            assert_all_close(actual, args, kwargs)


@pytest.mark.parametrize("backend", ON_CPU)
class TestMeaning:
    @pytest.mark.thinned
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", ["cifar10_coarse", "odd_channels_last"])
    def test_strided_and_misaligned_inputs(self, backend, case, dtype):
        """Slices with gaps, and storage that begins at any element."""
        args, kwargs = CASES[case].inputs(dtype)
        x = args[0]
        expected = with_gradients(group_norm_silu, args, kwargs, backend=backend)
        gapped = torch.stack([x, -x], dim=-1)[..., 0]
        for offset in (1, 3):
            memory = torch.empty(x.numel() + offset, dtype=dtype)
            shifted = memory[offset:].as_strided(x.shape, x.stride()).copy_(x)
            actual = with_gradients(group_norm_silu, (shifted, *args[1:]), kwargs, backend=backend)
            assert all(map(torch.equal, actual, expected))
        actual = with_gradients(group_norm_silu, (gapped, *args[1:]), kwargs, backend=backend)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)

    def test_parameters_of_another_dtype_and_with_gaps(self, backend):
        """The dtypes of autocast, bfloat16 images and float32 parameters; scale and shift share a tensor."""
        (x, groups, weight, bias), kwargs = CASES["adm"].inputs(torch.bfloat16)
        modulation = torch.cat([kwargs["scale"], kwargs["shift"]], 1).float().requires_grad_()
        weight, bias = weight.float().requires_grad_(), bias.float().requires_grad_()

        def results(function, dtype, **options):
            scale, shift = modulation.to(dtype).chunk(2, dim=1)
            args = x.to(dtype), groups, weight.to(dtype), bias.to(dtype)
            out = function(*args, scale=scale, shift=shift, **options)
            return out, *torch.autograd.grad(out, [weight, bias, modulation], upstream(out).to(out.dtype))

        expected, peer = results(formula, torch.float64), results(torch_ops, torch.bfloat16)
        scale, shift = modulation.chunk(2, dim=1)
        out = group_norm_silu(x, groups, weight, bias, scale=scale, shift=shift, backend=backend)
        actual = out, *torch.autograd.grad(out, [weight, bias, modulation], upstream(out))
        assert out.dtype == torch.bfloat16
        for one, other, truth in zip(actual, peer, expected, strict=True):
            assert_close(one, other, truth)

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_outliers_and_jumps_cost_no_digits(self, backend, channels_last):
        """Statistics about a shift are only as good as the shift."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.randn(2, 32, 40, 40, generator=torch.Generator().manual_seed(0))
        x[:, :, 0, :16] += 3000
        x[1, :, 20:] += 1000
        x = x.contiguous(memory_format=layout)
        args = x, 8, None, None
        out = group_norm_silu(*args, activation="none", backend=backend)
        truth = formula(x.double(), *args[1:], activation="none")
        assert_close(out, torch_ops(*args, activation="none"), truth)

    def test_an_image_does_not_depend_on_its_batch(self, backend):
        if backend == "reference":
            pytest.skip("PyTorch's own op divides its work by the size of the batch")
        (x, *rest), _ = CASES["odd_channels_last"].inputs()
        batch = group_norm_silu(x, *rest, backend=backend)
        for i in range(len(x)):
            alone = x[i : i + 1].contiguous(memory_format=torch.channels_last)
            assert torch.equal(group_norm_silu(alone, *rest, backend=backend)[0], batch[i])

    def test_inputs_are_left_alone(self, backend):
        args, kwargs = CASES["no_affine"].inputs()
        before = args[0].clone()
        with_gradients(group_norm_silu, args, kwargs, backend=backend)
        assert torch.equal(args[0], before)

    def test_nan_stays_with_its_group(self, backend):
        (x, groups, *_), _ = CASES["odd_channels_last"].inputs()
        x[1, 12, 3, 2] = math.nan  # in the third group of five channels
        out = group_norm_silu(x, groups, backend=backend)
        assert out.isnan().flatten(2).all(-1).nonzero().tolist() == [[1, c] for c in range(10, 15)]
        assert not out[0].isnan().any()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_silu_far_out(self, backend, dtype):
        """z runs from values where the exponential would overflow to values where it vanishes."""
        shift = torch.tensor([[-3e4, -200, -100, -88, -87, -20, -3, -0.0, 0.5, 3, 20, 88, 100, 200, 3e4]]).to(
            dtype
        )
        x = torch.zeros(1, 15, 4, dtype=dtype)
        out = group_norm_silu(x, 1, shift=shift, backend=backend)
        expected = F.silu(shift.double()).to(dtype)[..., None].expand_as(x)
        torch.testing.assert_close(out, expected, rtol=3 * torch.finfo(dtype).eps, atol=1e-30)

    def test_eps(self, backend):
        x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        out = group_norm_silu(x, 1, eps=0.75, activation="none", backend=backend)  # 1.25 + 0.75 = sqrt(2)**2
        torch.testing.assert_close(out, torch.tensor([[-1.5, -0.5, 0.5, 1.5]]) / 2**0.5)

    @pytest.mark.thinned
    @pytest.mark.parametrize("case", ["adm_channels_last", "no_affine"])
    def test_compiles_into_one_graph(self, backend, case):
        args, kwargs = CASES[case].inputs()
        activation = kwargs.pop("activation")

        def function(*args, **kwargs):
            return group_norm_silu(*args, **kwargs, activation=activation, backend=backend)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            with_gradients(compiled, args, kwargs), with_gradients(function, args, kwargs)
        )


@pytest.mark.parametrize("seed", range(8))
def test_gradients_of_small_groups_off_centre(seed):
    """Two numbers around 10, 0.1 apart: a mean rounded to float32 would be off by 3e-6 of the gradient."""
    x = torch.randn(1, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.1 + 10
    gradients = {}
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpp")):
        leaf = x.float().to(dtype).requires_grad_()
        group_norm_silu(leaf, 1, eps=1e-2, backend=backend)[0, 0].backward()
        gradients[dtype] = leaf.grad.double()
    expected = gradients[torch.float64]
    assert (gradients[torch.float32] - expected).abs().max() <= 5e-7 * expected.abs().max()


@pytest.mark.parametrize("backend", ON_CPU)
@given(data=st.data())
def test_properties(backend, data):
    """Any shape, layout, dtype and modulation: close to the formula, in value and in every gradient.

    PyTorch's own op may get a few numbers right by chance, so that twice its error says nothing: of few
    channels, numbers are drawn several times and compared together.
    """
    channels_per_group, groups = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 8))
    batch, channels = data.draw(st.integers(1, 3)), channels_per_group * groups
    space = data.draw(st.lists(st.integers(1, 12), max_size=3))
    assume(
        channels_per_group * math.prod(space) > 1
    )  # of one number the gradient is 0, with nothing to compare
    dtype, first_seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 1000))
    std, mean = data.draw(st.sampled_from([0.1, 1, 10])), data.draw(st.sampled_from([0, 1, 10]))
    channels_last = data.draw(st.booleans()) and len(space) > 1
    affine, activation = data.draw(st.booleans()), data.draw(st.sampled_from(["silu", "none"]))
    # Of a channel alone in its group the gradient of `add` is 0: the next test.
    add, scale_shift = channels_per_group > 1 and data.draw(st.booleans()), data.draw(st.booleans())
    case = Case(
        (batch, channels, *space), groups, add, scale_shift, affine, activation, channels_last, mean, std
    )
    calls = []
    for seed in range(first_seed, first_seed + math.ceil(64 / channels)):
        args, kwargs = case.inputs(dtype, seed=seed)
        kwargs["eps"] = 1e-2
        calls.append((with_gradients(group_norm_silu, args, kwargs, backend=backend), args, kwargs))
        assert calls[-1][0][0].stride() == args[0].stride()
    assert_together_close(calls)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "device"), [(backend, device) for backend, device in BACKENDS if backend in ("cpp", "cuda")]
)
def test_what_is_added_to_a_channel_alone_in_its_group_has_no_gradient(backend, device, dtype, channels_last):
    """The gradient is zero but for rounding."""
    for space in ((1, 2), (3, 4), (19, 37)):
        case = Case((2, 6, *space), 6, add=True, scale_shift=True, channels_last=channels_last, mean=3.0)
        args, kwargs = case.inputs(dtype, device)
        *_, add, _, _ = with_gradients(group_norm_silu, args, kwargs, backend=backend)
        assert not add.any()


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["no_affine", "odd_channels_last", "one_dimension", "empty_batch"])
def test_opcheck(case, dtype):
    (x, groups, weight, bias), kwargs = CASES[case].inputs(dtype)
    add, scale, shift = (kwargs.get(name) for name in ("add", "scale", "shift"))
    operators = torch.ops.fused_diffusion
    tensors = [None if t is None else t.requires_grad_() for t in (x, weight, bias, add, scale, shift)]
    x, weight, bias, add, scale, shift = tensors
    torch.library.opcheck(
        operators.group_norm_silu.default, (x, groups, weight, bias, 1e-5, add, scale, shift, True)
    )
    tensors = [None if t is None else t.detach() for t in tensors]
    x, weight, bias, add, scale, shift = tensors
    y, mean, rstd = operators.group_norm_silu(x, groups, weight, bias, 1e-5, add, scale, shift, True)
    torch.library.opcheck(
        operators.group_norm_silu_backward.default,
        (upstream(y), x, groups, weight, bias, add, scale, shift, True, mean, rstd),
    )


@requires_native
def test_there_is_no_second_derivative():
    x = torch.randn(2, 8, 3, 3).requires_grad_()
    (dx,) = torch.autograd.grad(group_norm_silu(x, 2, backend="cpp").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        dx.sum().backward()


@requires_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6, 4, 4).double()}, "x must be float32, bfloat16 or float16"),
        ({"x": torch.zeros(2, 6, 4, 8)[..., ::2]}, "x must be contiguous or channels_last"),
        ({"num_groups": 4}, "6 channels cannot be divided into 4 groups"),
        ({"weight": torch.zeros(5)}, "weight must be"),
        ({"scale": torch.zeros(6)}, "scale must be"),
        ({"add": torch.zeros(2, 6).double()}, "add must be"),
    ],
)
def test_the_operator_checks_what_it_is_given(change, message):
    names = ("x", "num_groups", "weight", "bias", "eps", "add", "scale", "shift", "silu")
    arguments = dict.fromkeys(names) | {"x": X, "num_groups": 2, "eps": 1e-5, "silu": True} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_diffusion.group_norm_silu(*arguments.values())


@requires_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(2, 6, 4, 4).half()}, "grad must have x's shape, dtype and strides"),
        (
            {"grad": torch.zeros(2, 4, 4, 6).permute(0, 3, 1, 2)},
            "grad must have x's shape, dtype and strides",
        ),
        ({"mean": torch.zeros(2, 3).double()}, "mean must be"),
        ({"mean": torch.zeros(2, 2)}, "mean must be contiguous float64"),
        ({"rstd": torch.zeros(2, 2).double()}, "rstd must be"),
    ],
)
def test_the_gradient_checks_what_it_is_given(change, message):
    names = ("grad", "x", "num_groups", "weight", "bias", "add", "scale", "shift", "silu", "mean", "rstd")
    given = {
        "grad": X,
        "x": X,
        "num_groups": 2,
        "silu": True,
        "mean": torch.zeros(2, 2).double(),
        "rstd": torch.ones(2, 2),
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_diffusion.group_norm_silu_backward(*(dict.fromkeys(names) | given | change).values())


@requires_native
def test_the_cpp_backend_declines_with_a_reason():
    for args, reason in (
        ((X.double(), 2), "x is torch.float64, not float32, bfloat16 or float16"),
        ((X, 2, torch.ones(6).double()), "weight is torch.float64"),
    ):
        with pytest.raises(ValueError, match=reason):
            group_norm_silu(*args, backend="cpp")
        assert group_norm_silu(*args).shape == X.shape


X = torch.zeros(2, 6, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_norm_silu(X, 4), "6 channels cannot be divided into 4 groups"),
        (lambda: group_norm_silu(X, 0), "cannot be divided into 0 groups"),
        (lambda: group_norm_silu(X[0, 0, 0], 1), r"\[N, C, \.\.\.\]"),
        (lambda: group_norm_silu(X.long(), 2), "floating-point"),
        (lambda: group_norm_silu(X, 2, torch.zeros(5)), r"weight must have shape \[6\]"),
        (lambda: group_norm_silu(X, 2, bias=torch.zeros(2, 6)), r"bias must have shape \[6\]"),
        (lambda: group_norm_silu(X, 2, add=torch.zeros(6)), r"add must have shape \[2, 6\]"),
        (lambda: group_norm_silu(X, 2, scale=torch.zeros(1, 6)), r"scale must have shape \[2, 6\]"),
        (lambda: group_norm_silu(X, 2, shift=torch.zeros(2, 6, 1, 1)), "shift must have shape"),
        (lambda: group_norm_silu(X, 2, activation="relu"), "'silu' or 'none'"),
        (lambda: group_norm_silu(X, 2, backend="quantum"), "no backend 'quantum'"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_explain():
    assert explain(group_norm_silu, X, 2, backend="reference").startswith("group_norm_silu: reference")
