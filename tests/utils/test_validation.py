"""The one validator of numbers, names and labels."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from diffusion.utils import validation as v

NO_NUMBERS = {
    "True": True,
    "False": False,
    "numpy's True": np.True_,
    "None": None,
    "text": "3",
    "bytes": b"3",
    "a list": [3],
    "a tensor of one number": torch.tensor([3]),
    "an array of one number": np.array([3]),
    "a tensor of True": torch.tensor(True),
    "an array of True": np.array(True),
    "a complex number": 3j,
    "a complex tensor": torch.tensor(3j),
    "an array of text": np.array("3"),
    "a date": np.datetime64(3, "s"),
    "a tensor without data": torch.tensor(3, device="meta"),
    "a sparse tensor": torch.tensor(3).to_sparse(),
    "Decimal": Decimal(3),
    "Fraction": Fraction(3),
    "NaN": math.nan,
    "numpy's NaN": np.float32("nan"),
    "a tensor of NaN": torch.tensor(math.nan),
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "an infinite tensor": torch.tensor(math.inf),
    "10**400": 10**400,
    "10**5000": 10**5000,
    "-10**400": -(10**400),
    "a long double": np.longdouble("1e400") if np.finfo(np.longdouble).max > 1e400 else math.inf,
}
NO_WHOLE_NUMBERS = {
    "a float": 3.0,
    "numpy's float": np.float64(3),
    "a tensor of a float": torch.tensor(3.0),
    "2**63": 2**63,
    "numpy's 2**63": np.uint64(2**63),
    "an unsigned tensor": torch.tensor(2**63, dtype=torch.uint64),
}
WHOLE_THREE = {
    "int": 3,
    "int64": np.int64(3),
    "uint8": np.uint8(3),
    "uint64": np.uint64(3),
    "array": np.array(3),
    "tensor": torch.tensor(3),
    "uint8 tensor": torch.tensor(3, dtype=torch.uint8),
    "uint64 tensor": torch.tensor(3, dtype=torch.uint64),
}
THREE = {
    **WHOLE_THREE,
    "bfloat16": torch.tensor(3, dtype=torch.bfloat16),
    "half": np.float16(3),
    "float": 3.0,
    "float64": np.float64(3),
    "array of float": np.array(3.0),
    "needs a gradient": torch.tensor(3.0, requires_grad=True),
}


@pytest.mark.parametrize("value", [*NO_NUMBERS.values(), *NO_WHOLE_NUMBERS.values()],
                         ids=[*NO_NUMBERS, *NO_WHOLE_NUMBERS])  # fmt: skip
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match=r"^steps must be a whole number in 1\.\.10, not ") as error:
        v.whole_number("steps", value, 1, 10)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 120
    with pytest.raises(ValueError, match=r"^steps must be a whole number of at most 64 bits, not "):
        v.whole_number("steps", value)


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"^eta must be a number in \[0, 10\], not ") as error:
        v.number("eta", value, 0, 10)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 120
    with pytest.raises(ValueError, match=r"^eta must be a finite number, not "):
        v.number("eta", value)


@pytest.mark.parametrize("value", THREE.values(), ids=THREE)
def test_numbers_of_all_kinds(value):
    found = v.number("eta", value, 0, 3)
    assert found == 3
    assert type(found) is float


@pytest.mark.parametrize("value", WHOLE_THREE.values(), ids=WHOLE_THREE)
def test_whole_numbers_of_all_kinds(value):
    found = v.whole_number("steps", value, 3, 3)
    assert found == 3
    assert type(found) is int
    assert v.whole_numbers("labels", value).tolist() == [3]


def test_bounds():
    assert v.whole_number("seed", 2**64 - 1, 0, 2**64 - 1) == 2**64 - 1
    with pytest.raises(ValueError, match=r"seed must be a whole number in 0\.\.2\^64-1, not -1"):
        v.whole_number("seed", -1, 0, 2**64 - 1)
    assert v.number("eps", 1e-9, above=0, below=1) == 1e-9
    for value in (0, 1):
        with pytest.raises(ValueError, match=r"eps must be a number in \(0, 1\), not"):
            v.number("eps", value, above=0, below=1)
    assert v.number("clip", torch.tensor(math.inf), above=0, infinite=True) == math.inf
    for value in (-math.inf, math.nan, 0, 1e39):
        with pytest.raises(ValueError, match=r"clip must be a number in \(0, 3.4e38\], or inf, not"):
            v.number("clip", value, above=0, infinite=True)
    assert v.number("x", 1e38) == 1e38
    with pytest.raises(ValueError, match="x must be a finite number, not 1e"):
        v.number("x", 1e39)


def test_switches():
    assert v.switch("sde", True) is True
    assert v.switch("sde", np.False_) is False
    for value in (0, 1, "true", None, torch.tensor(True), []):
        with pytest.raises(ValueError, match="sde must be true or false, not"):
            v.switch("sde", value)


def test_choices():
    assert v.choice("sampler", "ddim", ("ddpm", "ddim")) == "ddim"
    for value in ("", "x", None, 3, [], {}, ["ddim"], math.nan):
        with pytest.raises(ValueError, match=r"unknown sampler .*; choose from: ddpm, ddim or a file"):
            v.choice("sampler", value, {"ddpm": 1, "ddim": 2}, " or a file")
    v.known_names("option", {"a": 1}, ("a", "b"))
    with pytest.raises(ValueError, match="unknown option 3; choose from: a, b"):
        v.known_names("option", {"a": 1, 3: 2}, ("a", "b"))


@pytest.mark.parametrize(
    "values",
    [
        [1, np.int8(2), torch.tensor(3)],
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3]),
        np.array([1, 2, 3], np.uint64)[::1],
        np.array([3, 2, 1])[::-1],
        torch.tensor([1, 2, 3]),
        torch.tensor([1, 2, 3], dtype=torch.uint8),
        torch.tensor([1, 2, 3], dtype=torch.uint64),
    ],
    ids=repr,
)
def test_lists_of_whole_numbers(values):
    found = v.whole_numbers("labels", values, 1, 3)
    assert found.dtype == torch.int64
    assert found.device.type == "cpu"
    assert found.tolist() == [1, 2, 3]


@pytest.mark.parametrize("values", [[], (), np.array([]), torch.tensor([])], ids=repr)
def test_empty_lists(values):
    found = v.whole_numbers("labels", values, 1, 3)
    assert found.dtype == torch.int64
    assert found.shape == (0,)


@pytest.mark.parametrize(
    "values",
    [
        None, True, "3", b"123", {1: 2}, {1}, 3.0, 0, 4, 10**400, [True, 2], [1, None], [1, "2"], [1, 2.0],
        [1, 10**400], [1, 4], [[1, 2]], [torch.tensor([1, 2])], np.array([1.0]), np.array([True]),
        np.array([[1, 2]]), np.array([1, 4], np.int8), np.array([2**64 - 1], np.uint64), np.array(["1"]),
        np.array([1, None]), torch.tensor([1.0]), torch.tensor([True]), torch.tensor([[1, 2]]),
        torch.tensor([2**64 - 1], dtype=torch.uint64), torch.tensor([1], device="meta"),
        torch.tensor([1]).to_sparse(), torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged),
        torch.tensor([1j]), torch.tensor([1.0]).to(torch.float8_e4m3fn), iter([1, 2]),
    ],
)  # fmt: skip
def test_what_is_no_list_of_whole_numbers(values):
    with pytest.raises(ValueError, match=r"^labels must be whole numbers in 1\.\.3, not ") as error:
        v.whole_numbers("labels", values, 1, 3)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 120


@pytest.mark.parametrize("value", [(1, 3), [1, 3.0], np.array([1, 3]), torch.tensor([1.0, 3.0])], ids=repr)
def test_intervals(value):
    assert v.interval("guidance_interval", value) == (1.0, 3.0)
    assert v.interval("guidance_interval", (0, math.inf)) == (0, math.inf)


@pytest.mark.parametrize(
    "value",
    [
        None, 3, "13", (1,), (1, 2, 3), (3, 1), (math.nan, 1), (1, math.nan), (True, 3), (1, None),
        ("1", "3"), (math.inf, math.inf), (-math.inf, 1), (10**400, 10**401), (0, 10**400), np.zeros(3),
        torch.zeros(2, 2), torch.zeros(2, device="meta"),
        torch.ones(2).to_sparse(),
    ],
)  # fmt: skip
def test_what_is_no_interval(value):
    with pytest.raises(ValueError, match=r"^guidance_interval must be two numbers \(low, high\)"):
        v.interval("guidance_interval", value)


def test_annotated_types():
    assert v.typed("a", 3, int | tuple[int, int], least=1) == 3
    assert v.typed("a", [3, np.int64(4)], int | tuple[int, int], least=1) == (3, 4)
    assert v.typed("a", None, int | None) is None
    found = v.typed("a", [1, 0.5], tuple[int | float, ...], above=0)
    assert found == (1, 0.5)
    assert list(map(type, found)) == [int, float]
    assert type(v.typed("a", 3, float)) is float
    assert v.typed("a", "word", str | tuple[str, ...]) == "word"
    assert v.typed("a", {}, dict) == {}
    assert v.typed("a", True, bool) is True


@pytest.mark.parametrize(
    ("value", "hint", "bounds", "expected"),
    [
        (0, int, {"least": 1, "most": 9}, r"a whole number in 1\.\.9, not 0"),
        (10**400, int, {}, "a whole number of at most 64 bits, not 1000"),
        (True, int | None, {"least": 1, "most": 9}, r"a whole number in 1\.\.9, or None, not True"),
        (10**400, float, {}, "a finite number, not 1000"),
        (math.nan, float, {"least": 0, "below": 1}, r"a number in \[0, 1\), not nan"),
        (0, int | float, {"above": 0, "most": 9}, r"a number in \(0, 9\], not 0"),
        ([1, 0], tuple[int | float, ...], {"above": 0, "most": 9}, r"a list of numbers in \(0, 9\], not"),
        ([1], int | tuple[int, int], {}, "a whole number of at most 64 bits, or a list of 2 whole numbers"),
        (3, str | tuple[str, ...], {}, "a name, or a list of names, not 3"),
        (1, bool, {}, "true or false, not 1"),
        ([], dict, {}, r"a dictionary, not \[\]"),
    ],
)  # fmt: skip
def test_what_is_not_of_an_annotated_type(value, hint, bounds, expected):
    with pytest.raises(ValueError, match=f"^a must be {expected}"):
        v.typed("a", value, hint, **bounds)


def test_shown_values_fit_a_line():
    class Unprintable:
        def __repr__(self):
            raise RuntimeError

    assert v.shown("a\nb") == r"'a\nb'"
    assert v.shown(torch.zeros(2, 2)).count("\n") == 0
    assert v.shown(10**5000) == "a value of type int"
    assert v.shown(Unprintable()) == "a value of type Unprintable"
    assert v.shown("x" * 1000) == "'" + "x" * 56 + "..."
