"""Results without data have the shape, dtype and layout that PyTorch gives them, with data and without."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from diffusion.planner.shapes import empty_result


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


CALLS = {
    "convolution": (torch.conv2d, (x(2, 4, 7, 9), x(6, 4, 3, 3)), {}),
    "with a bias": (torch.conv2d, (x(2, 4, 7, 9), x(6, 4, 3, 3), x(6)), {"padding": 1}),
    "of stride 2": (torch.conv2d, (x(2, 4, 8, 9), x(6, 4, 3, 3), x(6), 2, 1), {}),
    "of two sizes": (torch.conv2d, (x(2, 4, 8, 9), x(6, 4, 3, 1), None, (2, 1), (1, 0), (1, 1), 1), {}),
    "of one point": (torch.conv2d, (x(1, 4, 3, 3), x(6, 4, 3, 3), x(6)), {"stride": (5, 5)}),
    "linear": (F.linear, (x(3, 8), x(5, 8), x(5)), {}),
    "linear of three dimensions": (F.linear, (x(3, 7, 8), x(5, 8)), {}),
    "linear by names": (F.linear, (x(3, 7, 8),), {"weight": x(5, 8), "bias": x(5)}),
    "group_norm": (F.group_norm, (x(2, 8, 5, 3), 4, x(8), x(8), 1e-6), {}),
    "torch.group_norm": (torch.group_norm, (x(2, 8, 5), 2), {"eps": 1e-3}),
}
OTHERS = {  # PyTorch says what becomes of them
    "another function": (torch.add, (x(2, 3), x(2, 3)), {}),
    "groups": (torch.conv2d, (x(2, 4, 7, 9), x(6, 2, 3, 3)), {"groups": 2}),
    "dilation": (torch.conv2d, (x(2, 4, 7, 9), x(6, 4, 3, 3)), {"dilation": 2}),
    "a padding by name": (torch.conv2d, (x(2, 4, 7, 9), x(6, 4, 3, 3)), {"padding": "same"}),
    "no batch": (torch.conv2d, (x(4, 7, 9), x(6, 4, 3, 3)), {}),
    "another layout": (torch.conv2d, (x(2, 7, 9, 4).permute(0, 3, 1, 2), x(6, 4, 3, 3)), {}),
    "a layout of the weight": (F.linear, (x(3, 8), x(8, 5).T), {}),
    "two dtypes": (F.group_norm, (x(2, 8, 5).bfloat16(), 4, x(8), x(8)), {}),
    "no images": (F.group_norm, (x(0, 8, 5), 4), {}),
    "a vector": (F.linear, (x(8), x(5, 8)), {}),
}
WRONG = {
    "a small map": (torch.conv2d, (x(2, 4, 2, 9), x(6, 4, 3, 3)), {}),
    "other channels": (torch.conv2d, (x(2, 5, 7, 9), x(6, 4, 3, 3)), {}),
    "a wrong bias": (F.linear, (x(3, 8), x(5, 8), x(4)), {}),
    "other features": (F.linear, (x(3, 7), x(5, 8)), {}),
    "groups that do not divide": (F.group_norm, (x(2, 8, 5), 3), {}),
    "a wrong weight": (F.group_norm, (x(2, 8, 5), 4, x(4)), {}),
    "no weight": (F.linear, (x(3, 8),), {}),
    "too many arguments": (F.linear, (x(3, 8), x(5, 8), x(5), 1), {}),
    "no groups": (F.group_norm, (x(2, 8, 5), 0), {}),
    "groups of one number": (F.group_norm, (x(1, 8, 1, 1), 8), {}),
}


@pytest.fixture(params=["meta", "fake"])
def without_data(request):
    """Turns tensors into those of a trace."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def turned(value):
        if not isinstance(value, Tensor):
            return value
        return fake.from_tensor(value) if request.param == "fake" else value.to("meta")

    return lambda args, options: (tuple(map(turned, args)), {k: turned(v) for k, v in options.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_pytorch(name, dtype, without_data):
    function, args, options = CALLS[name]
    args = tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in args)
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    found = empty_result(function, *without_data(args, options))
    assert found is not None
    given, named = without_data(args, options)
    assert type(found) is type(given[0])
    assert found.device == given[0].device
    for expected in (function(*args, **options), function(*given, **named)):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.is_contiguous() == expected.is_contiguous()


def test_weights_with_data():
    """In a fake trace, a network's own weights have their data."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    weight = torch.nn.Parameter(x(5, 8))
    with torch.no_grad():
        found = empty_result(F.linear, (fake.from_tensor(x(3, 8)), weight), {})
    assert found.shape == (3, 5)
    assert found.fake_mode is fake


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_to_pytorch(name, without_data):
    function, args, options = OTHERS[name]
    assert empty_result(function, *without_data(args, options)) is None


@pytest.mark.parametrize("name", WRONG)
def test_what_pytorch_refuses_is_left_to_it(name, without_data):
    function, args, options = WRONG[name]
    with pytest.raises((RuntimeError, TypeError, ValueError, ZeroDivisionError)):
        function(*args, **options)
    assert empty_result(function, *without_data(args, options)) is None


def test_tensors_with_data_are_left_to_pytorch():
    assert empty_result(F.linear, (x(3, 8), x(5, 8)), {}) is None
