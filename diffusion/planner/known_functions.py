"""The functions of PyTorch that the planner knows: the op of a call, and its options (see `lowering`)."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .graph import FLOATS

# The result of each function here: the op and its options, or None for a call that stays a plain one.
Known = tuple[str, dict[str, Any]] | None


def uniform(number: int | tuple[int, ...]) -> int | None:
    """The number that a size stands for in every dimension, or None for several."""
    numbers = {number} if isinstance(number, int) else set(number)
    return numbers.pop() if len(numbers) == 1 else None


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Known:
    if isinstance(padding, str):
        return None
    kernel, strides, pads = uniform(tuple(weight.shape[2:])), uniform(stride), uniform(padding)
    plain = input.ndim == weight.ndim == 4 and uniform(dilation) == 1 and groups == 1
    if not plain or kernel not in (1, 3) or strides not in (1, 2) or pads is None or pads > kernel // 2:
        return None
    return "conv", {"stride": strides, "padding": pads}


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Known:
    return "linear", {}


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Known:
    ordered = not (weight is None and bias is not None)
    fits = ordered and input.ndim > 2 and input.dtype in FLOATS
    return ("group_norm", {"groups": num_groups, "eps": eps}) if fits else None


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Known:
    ordered = not (weight is None and bias is not None)
    if len(tuple(normalized_shape)) != 1 or not ordered or input.ndim < 2:
        return None
    return "layer_norm", {"eps": eps, "rms": False}


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Known:
    if len(tuple(normalized_shape)) != 1 or input.ndim < 2 or input.dtype not in FLOATS:
        return None
    if eps is None:  # that of the dtype in which PyTorch computes, which in 16 bits is its own choice
        if input.dtype != torch.float32:
            return None
        eps = torch.finfo(torch.float32).eps
    return "layer_norm", {"eps": eps, "rms": True}


def _conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Known:
    one = not isinstance(padding, str) and (uniform(stride), uniform(padding), groups) == (1, 0, 1)
    return ("conv1d", {}) if one and input.ndim == 3 and weight.shape[2] == 1 else None


def _product(equation: str, scale: float = 1) -> Known:
    return "product", {"equation": equation, "scale": scale}


def _einsum(equation: Any, *operands: Any) -> Known:
    written = equation.replace(" ", "") if isinstance(equation, str) else ""
    given = list(operands[0]) if operands and isinstance(operands[0], list | tuple) else list(operands)
    plain = "->" in written and "." not in written and written.count(",") == 1
    twice = any(len(set(letters)) < len(letters) for letters in written.replace("->", ",").split(","))
    return _product(written) if plain and not twice and len(given) == 2 else None


def _matmul(input: Tensor, other: Tensor) -> Known:
    """Of as many dimensions each, or of rows by a matrix."""
    batch = "abcdefgh"[: input.ndim - 2]
    if other.ndim == 2 <= input.ndim <= 10:
        return _product(f"{batch}ik,kj->{batch}ij")
    if input.ndim != other.ndim or not 2 < input.ndim <= 10 or input.shape[:-2] != other.shape[:-2]:
        return None
    return _product(f"{batch}ik,{batch}kj->{batch}ij")


def _bmm(input: Tensor, mat2: Tensor) -> Known:
    return _matmul(input, mat2)


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Known:
    return _product("aik,akj->aij", alpha) if beta == 0 else None


def _softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Known:
    if dim is None or dtype not in (None, *FLOATS):
        return None
    return "softmax", {"dim": dim % input.ndim}


def _average(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Known:
    squares = (uniform(kernel_size), uniform(kernel_size if stride in (None, (), []) else stride)) == (2, 2)
    plain = squares and uniform(padding) == 0 and not ceil_mode and divisor_override is None
    return ("average", {}) if plain and input.ndim == 4 and input.dtype in FLOATS else None


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Known:
    return ("normalize", {"dim": dim % input.ndim, "eps": eps}) if p == 2 and isinstance(dim, int) else None


def _reduction(op: str, input: Tensor, dim: Any, keepdim: bool) -> Known:
    dims = (dim,) if isinstance(dim, int) else tuple(dim or range(input.ndim))
    return op, {"dims": tuple(sorted(d % input.ndim for d in dims)), "keepdim": keepdim}


def _mean(input: Tensor, dim: Any = None, keepdim: bool = False, dtype: None = None) -> Known:
    return _reduction("mean", input, dim, keepdim) if dtype is None else None


def _variance(
    input: Tensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    correction: float | None = None,
) -> Known:
    biased = unbiased is False if correction is None else correction == 0
    return _reduction("variance", input, dim, keepdim) if biased else None


def _length(x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: None = None) -> Known:
    return _reduction("length", x, dim, keepdim) if ord in (2, "fro", None) and dtype is None else None


def _norm(input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False) -> Known:
    return _length(input, p, dim, keepdim)


def _power(exponent: float) -> Callable[..., Known]:
    def known(input: Tensor) -> Known:
        return "power", {"exponent": exponent}

    return known


def _pow(input: Any, exponent: Any) -> Known:
    numbers = isinstance(input, Tensor) and isinstance(exponent, int | float)
    return ("power", {"exponent": exponent}) if numbers else None


def _clamp(input: Tensor, min: Any = None, max: Any = None) -> Known:
    return ("at_least", {"least": min}) if isinstance(min, int | float) and max is None else None


def _binary(op: str, turned: bool = False) -> Callable[..., Known]:
    def known(input: Any, other: Any, alpha: float = 1, rounding_mode: None = None) -> Known:
        if alpha != 1 or rounding_mode is not None:
            return None
        if isinstance(input, Tensor) and isinstance(other, Tensor):
            return None if turned else (op, {"scalar": None})
        number = other if isinstance(input, Tensor) else input
        turns = turned != (not isinstance(input, Tensor))
        if not isinstance(number, int | float) or (turns and op in ("sub", "div")):
            return None
        return op, {"scalar": number}

    return known


def _silu(input: Tensor, inplace: bool = False) -> Known:
    return "silu", {}


def _gelu(input: Tensor, approximate: str = "none") -> Known:
    return "gelu", {"approximate": approximate}


def _cat(tensors: Any, dim: int = 0) -> Known:
    ndim = tensors[0].ndim
    if ndim == 4 and dim in (1, -3):
        return "cat", {}
    whole = all(tensor.ndim == ndim > 2 and tensor.dtype == tensors[0].dtype for tensor in tensors)
    return ("join", {"dim": dim % ndim}) if whole else None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Known:
    alike = query.ndim == key.ndim == value.ndim == 4 and query.shape[-1] == value.shape[-1]
    alike = alike and query.shape[:2] == key.shape[:2] == value.shape[:2]
    if attn_mask is not None or dropout_p or is_causal or enable_gqa or not alike:
        return None
    return "attention", {"scale": query.shape[-1] ** -0.5 if scale is None else scale}


def _interpolate(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: None = None,
    recompute_scale_factor: None = None,
    antialias: bool = False,
) -> Known:
    if input.ndim != 4 or mode != "nearest" or input.dtype not in FLOATS:
        return None
    if size is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        twice = sides == tuple(2 * side for side in input.shape[2:])
    else:
        factors = scale_factor if isinstance(scale_factor, list | tuple) else (scale_factor,)
        twice = all(factor == 2 for factor in factors)
    return ("double", {}) if twice else None


def _pad(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Known:
    pads = tuple(pad)
    zeros = mode == "constant" and not value and input.ndim == 4
    return ("pad", {"pads": pads}) if zeros and pads == (0, 1, 0, 1) else None


KNOWN: dict[str, Callable[..., Known]] = {
    "conv1d": _conv1d,
    "conv2d": _conv,
    "einsum": _einsum,
    "matmul": _matmul,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "softmax": _softmax,
    "avg_pool2d": _average,
    "linear": _linear,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "normalize": _normalize,
    "mean": _mean,
    "var": _variance,
    "vector_norm": _length,
    "linalg_vector_norm": _length,
    "norm": _norm,
    "sqrt": _power(0.5),
    "rsqrt": _power(-0.5),
    "square": _power(2),
    "reciprocal": _power(-1),
    "pow": _pow,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "silu": _silu,
    "gelu": _gelu,
    "cat": _cat,
    "concat": _cat,
    "scaled_dot_product_attention": _attention,
    "interpolate": _interpolate,
    "pad": _pad,
    "add": _binary("add"),
    "radd": _binary("add"),
    "mul": _binary("mul"),
    "rmul": _binary("mul"),
    "sub": _binary("sub"),
    "rsub": _binary("sub", turned=True),
    "div": _binary("div"),
    "truediv": _binary("div"),
}


def in_order(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by keyword in the order in which a function that the planner knows takes them."""
    known = KNOWN.get(name)
    if known is None or len(options) < 2:
        return dict(options)
    order = {parameter: i for i, parameter in enumerate(inspect.signature(known).parameters)}
    return dict(sorted(options.items(), key=lambda item: order.get(item[0], len(order))))
