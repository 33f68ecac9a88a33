"""group_norm_silu and attention against their formulas in float64, in every dtype and layout."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusion.kernels.attention.cases import CASES as ATTENTION_CASES
from diffusion.kernels.group_norm_silu.cases import CASES as NORM_CASES
from tolerance import assert_close, largest

from diffusion import kernels

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def norm_formula(
    x, num_groups, weight, bias, eps=1e-5, *, add=None, scale=None, shift=None, activation="silu"
):
    """Wu & He 2018, equation 2, as written, then modulation and x * sigmoid(x)."""

    def spread(t):
        return t.reshape(*t.shape, *(1,) * (x.ndim - 2))

    if add is not None:
        x = x + spread(add)
    h = x.reshape(len(x), num_groups, math.prod(x.shape[1:]) // num_groups)
    mean = h.mean(-1, keepdim=True)
    variance = ((h - mean) ** 2).mean(-1, keepdim=True)
    y = ((h - mean) / torch.sqrt(variance + eps)).reshape(x.shape)
    if weight is not None:
        y = y * spread(weight) + spread(bias)
    if scale is not None:
        y = y * (1 + spread(scale)) + spread(shift)
    return y / (1 + torch.exp(-y)) if activation == "silu" else y


def norm_torch(x, num_groups, weight, bias, eps=1e-5, *, add=None, scale=None, shift=None, activation="silu"):
    """What a user of PyTorch's own op would write, in x's dtype and contiguous."""

    def spread(t):
        return t.reshape(*t.shape, *(1,) * (x.ndim - 2))

    h = x.contiguous() if add is None else (x + spread(add)).contiguous()
    h = torch.group_norm(h, num_groups, weight, bias, eps)
    if scale is not None:
        h = h * (1 + spread(scale)) + spread(shift)
    return F.silu(h) if activation == "silu" else h


def attention_formula(q, k, v, *, scale=None):
    """Vaswani et al. 2017, equation 1."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bhsd,bhtd->bhst", q, k) * scale
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return torch.einsum("bhst,bhtd->bhsd", weights / weights.sum(-1, keepdim=True), v)


def attention_torch(q, k, v, *, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ((q @ k.transpose(-1, -2)) * scale).softmax(-1) @ v


OPS = {
    "group_norm_silu": (kernels.group_norm_silu, norm_formula, norm_torch, NORM_CASES),
    "attention": (kernels.attention, attention_formula, attention_torch, ATTENTION_CASES),
}
ALL = [(op, case) for op, (*_, cases) in OPS.items() for case in cases]
SMALL = {
    "group_norm_silu": [c for c, case in NORM_CASES.items() if torch.Size(case.shape).numel() <= 4096],
    "attention": ["one_position", "odd"],
}


def to(dtype, args, kwargs):
    def cast(t):
        return t.to(dtype) if isinstance(t, torch.Tensor) else t

    return tuple(map(cast, args)), {k: cast(t) for k, t in kwargs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), ALL)
def test_value(op, case, dtype):
    function, formula, peer, cases = OPS[op]
    args, kwargs = cases[case].inputs(dtype)
    out = function(*args, backend="reference", **kwargs)
    expected_args, expected_kwargs = to(torch.float64, args, kwargs)
    expected = formula(*expected_args, **expected_kwargs)
    assert (out.dtype, out.shape) == (dtype, args[0].shape)
    if op == "group_norm_silu":
        assert out.stride() == args[0].stride()
    assert_close(out, peer(*args, **kwargs), expected)


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in SMALL.items() for case in cases])
def test_gradient(op, case):
    """Float64 gradients against finite differences, in every tensor."""
    args, kwargs = OPS[op][3][case].inputs(torch.float64)
    names = [name for name, t in kwargs.items() if isinstance(t, torch.Tensor)]
    fixed = {name: value for name, value in kwargs.items() if name not in names}
    tensors = [t for t in args if isinstance(t, torch.Tensor)] + [kwargs[name] for name in names]

    def function(*tensors):
        tensors = list(tensors)
        called = [tensors.pop(0) if isinstance(t, torch.Tensor) else t for t in args]
        return OPS[op][0](*called, **fixed, **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors], fast_mode=True)


@pytest.mark.parametrize(("op", "case"), [("group_norm_silu", "mnist_channels_last"), ("attention", "mnist")])
def test_gradient_in_float32(op, case):
    function, formula, _, cases = OPS[op]
    args, kwargs = cases[case].inputs()

    def gradient(function, dtype):
        cast, options = to(dtype, args, kwargs)
        x = cast[0].detach().requires_grad_()
        out = function(x, *cast[1:], **options)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).reshape(out.shape))
        return x.grad.double()

    expected = gradient(formula, torch.float64)
    assert largest(gradient(function, torch.float32) - expected) <= 1e-5 * largest(expected)


@pytest.mark.parametrize(("op", "case"), [("group_norm_silu", "adm"), ("attention", "mnist_coarse")])
def test_compiles_whole(op, case):
    args, kwargs = OPS[op][3][case].inputs()
    compiled = torch.compile(OPS[op][0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args, **kwargs), OPS[op][0](*args, **kwargs))


def test_input_is_left_alone():
    for op, case in (("group_norm_silu", "three_dimensions"), ("attention", "odd")):
        args, kwargs = OPS[op][3][case].inputs()
        before = args[0].clone()
        OPS[op][0](*args, **kwargs)
        assert torch.equal(args[0], before)


def test_strided_input():
    """Views with gaps, as slices of a larger tensor are."""
    (x, groups, weight, bias), _ = NORM_CASES["cifar10_coarse"].inputs()
    view = torch.stack([x, -x], dim=-1)[..., 0]
    torch.testing.assert_close(
        kernels.group_norm_silu(view, groups, weight, bias),
        kernels.group_norm_silu(x, groups, weight, bias),
    )


def test_eps():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    out = kernels.group_norm_silu(
        x, 1, eps=0.75, activation="none"
    )  # variance 1.25, so the divisor is sqrt 2
    expected = torch.tensor([[-1.5, -0.5, 0.5, 1.5]], dtype=torch.float64) / 2**0.5
    torch.testing.assert_close(out, expected)


X = torch.zeros(2, 6, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.group_norm_silu(X, 4), "6 channels cannot be divided into 4 groups"),
        (lambda: kernels.group_norm_silu(X, 0), "cannot be divided into 0 groups"),
        (lambda: kernels.group_norm_silu(X[0, 0, 0], 1), r"\[N, C, \.\.\.\]"),
        (lambda: kernels.group_norm_silu(X.long(), 2), "floating-point"),
        (lambda: kernels.group_norm_silu(X, 2, torch.zeros(5)), r"weight must have shape \[6\]"),
        (lambda: kernels.group_norm_silu(X, 2, bias=torch.zeros(2, 6)), r"bias must have shape \[6\]"),
        (lambda: kernels.group_norm_silu(X, 2, add=torch.zeros(6)), r"add must have shape \[2, 6\]"),
        (lambda: kernels.group_norm_silu(X, 2, scale=torch.zeros(1, 6)), r"scale must have shape \[2, 6\]"),
        (lambda: kernels.group_norm_silu(X, 2, shift=torch.zeros(2, 6, 1, 1)), "shift must have shape"),
        (lambda: kernels.group_norm_silu(X, 2, activation="relu"), "'silu' or 'none'"),
        (lambda: kernels.group_norm_silu(X, 2, backend="quantum"), "no backend 'quantum'"),
        (lambda: kernels.attention(X, X, X[:, :3]), "one shape"),
        (lambda: kernels.attention(X[0], X[0], X[0]), "one shape"),
        (lambda: kernels.attention(X, X.half(), X), "one floating-point dtype"),
        (lambda: kernels.attention(X.long(), X.long(), X.long()), "one floating-point dtype"),
        (lambda: kernels.attention(X, X, X, backend="quantum"), "no backend 'quantum'"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_explain():
    (x, groups, *_), _ = NORM_CASES["mnist"].inputs()
    assert kernels.explain("group_norm_silu", x, groups, backend="reference").startswith(
        "group_norm_silu: reference"
    )
    q = torch.zeros(1, 1, 2, 4)
    assert kernels.explain(kernels.attention, q, q, q, scale=1.0, backend="reference").startswith(
        "attention: reference"
    )
