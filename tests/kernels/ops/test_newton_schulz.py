"""newton_schulz against the iteration in float64, beside torch.optim.Muon's own in bfloat16."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from diffusion.kernels.ops.newton_schulz import newton_schulz
from helpers.native import requires_amx

COEFFICIENTS = (3.4445, -4.775, 2.0315)
SHAPES = [(1, 1), (1, 40), (5, 7), (16, 16), (31, 33), (32, 64), (33, 70), (96, 288), (192, 864), (100, 2048)]


def normalised(height, width):
    x = torch.randn(height, width, generator=torch.Generator().manual_seed(height))
    return (x / x.norm()).bfloat16()


def in_float64(x, steps):
    a, b, c = COEFFICIENTS
    x = x.double()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@requires_amx
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [1, 5])
def test_the_error_is_that_of_bfloat16(shape, steps):
    x = normalised(*shape)
    expected = in_float64(x, steps)
    peer = _zeropower_via_newtonschulz(x.clone(), COEFFICIENTS, steps, 1e-7)
    error = relative_error(newton_schulz(x, steps, *COEFFICIENTS), expected)
    assert error <= 2 * relative_error(peer, expected) + 2**-8


@requires_amx
def test_no_steps_change_nothing():
    x = normalised(20, 50)
    assert torch.equal(newton_schulz(x, 0, *COEFFICIENTS), x)


@requires_amx
def test_singular_values_come_near_one():
    x = normalised(64, 300)
    values = torch.linalg.svdvals(newton_schulz(x, 5, *COEFFICIENTS).double())
    assert 0.6 < values.min() < values.max() < 1.3


@requires_amx
def test_another_size_leaves_nothing_behind():
    x = normalised(33, 40)
    expected = newton_schulz(x, 5, *COEFFICIENTS)
    newton_schulz(torch.full((64, 300), float("nan")).bfloat16(), 5, *COEFFICIENTS)
    assert torch.equal(newton_schulz(x, 5, *COEFFICIENTS), expected)


@requires_amx
@pytest.mark.parametrize("shape", [(0, 0), (0, 4)])
def test_nothing_stays_nothing(shape):
    assert newton_schulz(torch.zeros(shape).bfloat16(), 5, *COEFFICIENTS).shape == shape


@requires_amx
def test_opcheck():
    torch.library.opcheck(newton_schulz.default, (normalised(20, 50), 5, *COEFFICIENTS))


@requires_amx
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 4), "matrix of bfloat16"),
        (torch.zeros(2, 3, 4).bfloat16(), "matrix of bfloat16"),
        (torch.zeros(4, 3).bfloat16().T, "matrix of bfloat16"),
        (torch.zeros(4, 3).bfloat16(), "taller than wide"),
    ],
)
def test_the_operator_refuses(x, message):
    with pytest.raises(RuntimeError, match=message):
        newton_schulz(x, 5, *COEFFICIENTS)
