"""Checks of user input: numbers, names, switches and labels, from Python, JSON or the command line.

Each check returns the value as plain Python (labels: as a tensor), or raises a ValueError of one line that
names the argument, the expected value and the given one. Numbers may be Python's or NumPy's, or
tensors and arrays without dimensions; neither a bool nor a string is a number.
"""

import math
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

LARGEST_INTEGER = 2**63 - 1  # int64's
LARGEST_NUMBER = torch.finfo(torch.float32).max  # networks and samplers compute in float32
INTERVAL = "two numbers (low, high) with low <= high"
MAX_SHOWN = 60  # characters of a wrong value in a message
FEW = 4  # numbers of a tensor that a message shows


def refuse(name: str, expected: str, value: object) -> NoReturn:
    """Raises the ValueError of all checks."""
    raise ValueError(f"{name} must be {expected}, not {shown(value)}")


def shown(value: object) -> str:
    """A value as a message shows it: in one line, shortened to MAX_SHOWN characters.

    A module is shown by its class, and a tensor or an array of more than a few numbers by dtype and shape.
    """
    try:
        if isinstance(value, torch.nn.Module):
            return f"a {type(value).__name__}"
        if isinstance(value, np.ndarray) and value.size > FEW:
            return f"an array {value.dtype} {list(value.shape)}"
        if isinstance(value, torch.Tensor) and math.prod(value.shape) > FEW:
            place = "" if value.device.type == "cpu" else f" on {value.device}"
            layout = "" if value.layout == torch.strided else f", {value.layout}"
            return f"a tensor {str(value.dtype)[6:]} {list(value.shape)}{place}{layout}"
        text = " ".join(repr(value).split())
    except Exception:  # Python refuses to print an integer of 4301 digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def whole_number(name: str, value: object, least: int = -LARGEST_INTEGER, most: int = LARGEST_INTEGER) -> int:
    """The value as an int in least..most."""
    found = _as_python(value)
    if not isinstance(found, int) or not least <= found <= most:
        refuse(name, f"a whole number{_whole_range(least, most)}", value)
    return found


def number(
    name: str,
    value: object,
    least: float = -LARGEST_NUMBER,
    most: float = LARGEST_NUMBER,
    *,
    above: float | None = None,
    below: float | None = None,
    infinite: bool = False,
) -> float:
    """The value as a float in [least, most].

    above, below: exclusive bounds, instead of least and most. infinite: inf is allowed, too.
    """
    found = _as_python(value)
    if infinite and found == math.inf:
        return math.inf
    if found is None or not _inside(found, least, most, above, below):
        expected = f"a {_range(least, most, above, below)}{', or inf' if infinite else ''}"
        refuse(name, expected, value)
    return float(found)


def switch(name: str, value: object) -> bool:
    """The value as a bool; ValueError for anything else, 0 and 1 included."""
    if not isinstance(value, bool | np.bool_):
        refuse(name, "true or false", value)
    return bool(value)


def choice(what: str, value: object, choices: Iterable[str], hint: str = "") -> str:
    """The value if it is one of the choices. what: their kind, such as "sampler"; hint: ends the error."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"unknown {what} {shown(value)}; choose from: {', '.join(known)}{hint}")
    return value


def known_names(what: str, names: Iterable[object], choices: Iterable[str]) -> None:
    """ValueError for the first name that is not among the choices. what: their kind, as for `choice`."""
    known = list(choices)
    for name in sorted(names, key=str):
        choice(what, name, known)


def whole_numbers(
    name: str, values: Any, least: int = -LARGEST_INTEGER, most: int = LARGEST_INTEGER
) -> torch.Tensor:
    """Whole numbers in least..most as int64 [N] on the CPU, from a sequence, or an array or tensor [N].

    One number alone gives [1].
    """
    expected = f"whole numbers{_whole_range(least, most)}"
    if _as_python(values) is not None:
        values = [values]
    if isinstance(values, torch.Tensor):
        if not is_dense(values) or values.ndim != 1 or (len(values) and not _is_integer(values.dtype)):
            refuse(name, expected, values)
        values = values.detach().cpu().long() if not len(values) else values.cpu().numpy()
    elif hasattr(values, "__array__"):
        values = np.asarray(values)
    if isinstance(values, np.ndarray):
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            refuse(name, expected, values)
        outside = values[(values < least) | (values > most)] if values.size else values
        if outside.size:
            refuse(name, expected, outside[0].item())
        return torch.from_numpy(values.astype(np.int64))
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | torch.Tensor):
        refuse(name, expected, values)
    found = [_as_python(value) for value in values]
    for value, given in zip(found, values, strict=True):
        if not isinstance(value, int) or not least <= value <= most:
            refuse(name, expected, given)
    return torch.tensor(found, dtype=torch.int64, device="cpu")


def numbers(name: str, values: Any) -> torch.Tensor:
    """Finite numbers as float64 [N] on the CPU, from a sequence, or an array or tensor [N]."""
    if isinstance(values, torch.Tensor | np.ndarray) and values.ndim == 1 and is_dense(values):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        refuse(name, "a list of numbers", values)
    finite = []
    for value in values:
        found = _as_python(value)
        if found is None or not abs(found) <= LARGEST_NUMBER:
            refuse(name, "a list of finite numbers", value)
        finite.append(float(found))
    return torch.tensor(finite, dtype=torch.float64, device="cpu")


def interval(name: str, value: Any) -> tuple[float, float]:
    """Two numbers (low, high) with low <= high; high may be inf."""
    ends = value
    if isinstance(value, torch.Tensor | np.ndarray):
        ends = list(value) if value.ndim == 1 and is_dense(value) else None
    if isinstance(ends, list | tuple) and len(ends) == 2:
        low, high = (_as_python(end) for end in ends)
        if low is None or high is None:
            refuse(name, INTERVAL, value)
        if abs(low) <= LARGEST_NUMBER and (low <= high <= LARGEST_NUMBER or high == math.inf):
            return float(low), float(high)
    refuse(name, INTERVAL, value)


def plain_number(value: object) -> object:
    """A number of NumPy, or an array or tensor without dimensions, as Python's; TypeError for anything else.

    For `json.dumps(..., default=plain_number)`.
    """
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a number")


def readable(tensor: torch.Tensor) -> bool:
    """Whether Python can read a tensor's values: not under torch.compile or torch.func, nor on "meta".

    A FakeTensor, by which a network is traced, has no values either.
    """
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def typed(name: str, value: object, hint: Any, **bounds: float) -> Any:
    """The value in an annotated type: int, float, bool, str, dict, None, tuples and unions of these.

    A list is taken for a tuple, and a whole number for a float. bounds: of numbers, as for `number`.
    ValueError for a value of another type, or beyond the bounds.
    """
    found = _converted(value, hint, bounds)
    if found is _NO:
        refuse(name, _expected(hint, bounds), value)
    return found


_NO = object()  # marks a value of another type


def _converted(value: object, hint: Any, bounds: dict[str, float]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        tried = (_converted(value, option, bounds) for option in args)
        return next((found for found in tried if found is not _NO), _NO)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return _NO
        options = args[:1] * len(value) if args[-1] is ... else args
        if len(options) != len(value):
            return _NO
        items = tuple(_converted(item, option, bounds) for item, option in zip(value, options, strict=True))
        return _NO if any(item is _NO for item in items) else items
    if hint in (int, float):
        found = _as_python(value)
        if found is None or (hint is int and not isinstance(found, int)):
            return _NO
        return hint(found) if _inside(found, **_bounds(hint, bounds)) else _NO
    if hint is bool:
        return bool(value) if isinstance(value, bool | np.bool_) else _NO
    return value if isinstance(value, hint) else _NO


def _expected(hint: Any, bounds: dict[str, float]) -> str:
    """A type, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        options = [option for option in args if not (option is int and float in args)]
        return ", or ".join(_expected(option, bounds) for option in options)
    if origin is tuple:
        kind = args[0] if isinstance(args[0], type) else float
        words = _expected(kind, bounds).removeprefix("a ")
        words = words.replace("number", "numbers", 1).replace("name", "names", 1)
        return f"a list of {'' if args[-1] is ... else f'{len(args)} '}{words}"
    if hint in (int, float):
        ends = _bounds(hint, bounds)
        if hint is int and "above" not in bounds and "below" not in bounds:
            return f"a whole number{_whole_range(ends['least'], ends['most'])}"
        return f"a {'whole ' if hint is int else ''}{_range(**ends)}"
    return {bool: "true or false", str: "a name", dict: "a dictionary", types.NoneType: "None"}[hint]


def _bounds(hint: type, given: dict[str, float]) -> dict[str, Any]:
    largest = LARGEST_INTEGER if hint is int else LARGEST_NUMBER
    return {"least": -largest, "most": largest, "above": None, "below": None} | given


def _inside(found: float, least: float, most: float, above: float | None, below: float | None) -> bool:
    """Whether a number keeps all bounds; NaN keeps none."""
    return least <= found <= most and (above is None or found > above) and (below is None or found < below)


def _as_python(value: object) -> int | float | None:
    """A number of Python, NumPy or torch as an int or a float; None for all else, such as a bool."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, torch.Tensor):
        real = value.ndim == 0 and is_dense(value)
        real = real and (_is_integer(value.dtype) or value.dtype.is_floating_point)
        return value.item() if real else None
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        kinds = {"i": int, "u": int, "f": float}
        return kinds[value.dtype.kind](value) if value.dtype.kind in kinds else None
    return None


def is_dense(array: torch.Tensor | np.ndarray) -> bool:
    """Whether an array holds each of its elements: a sparse or nested tensor, or one on "meta", does not."""
    if isinstance(array, np.ndarray):
        return True
    return array.layout == torch.strided and not (array.is_meta or array.is_nested)


def check_dense(name: str, value: object, shape: Sequence[int]) -> torch.Tensor:
    """The value if it is a dense tensor of real numbers in this shape; ValueError otherwise."""
    expected = f"a dense tensor {list(shape)} of real numbers"
    if not isinstance(value, torch.Tensor) or not is_dense(value):
        refuse(name, expected, value)
    if value.dtype.is_complex or value.shape != tuple(shape):
        raise ValueError(f"{name} must be {expected}, not {str(value.dtype)[6:]} {list(value.shape)}")
    return value


def check_finite(name: str, value: torch.Tensor) -> torch.Tensor:
    """The value; ValueError where it is not finite in float32.

    Only values on the CPU are read: on other devices reading would synchronise.
    """
    if value.device.type == "cpu" and readable(value) and not value.float().isfinite().all():
        raise ValueError(f"{name} has NaN or infinite values")
    return value


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _whole_range(least: int, most: int) -> str:
    if least <= -LARGEST_INTEGER and most >= LARGEST_INTEGER:
        return " of at most 64 bits"
    return f" in {_power(least)}..{_power(most)}"


def _range(least: float, most: float, above: float | None, below: float | None) -> str:
    low, high = least if above is None else above, most if below is None else below
    if low <= -LARGEST_NUMBER and high >= LARGEST_NUMBER:
        return "finite number"
    opening, closing = "[" if above is None else "(", "]" if below is None else ")"
    ends = ("3.4e38" if end >= LARGEST_NUMBER else f"{end:.6g}" for end in (low, high))
    return f"number in {opening}{', '.join(ends)}{closing}"


def _power(bound: int) -> str:
    """A bound in short form: 2^63-1 rather than 9223372036854775807."""
    exponent = (bound + 1).bit_length() - 1
    return f"2^{exponent}-1" if exponent >= 31 and bound + 1 == 1 << exponent else str(bound)
