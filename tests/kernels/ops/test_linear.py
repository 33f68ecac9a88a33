"""convolution_ as a linear map: 1x1 kernels over sequences and maps, and the activations of outputs."""

import pytest
import torch
import torch.nn.functional as F

from diffusion.kernels import _native
from diffusion.kernels._tolerance import wrong
from diffusion.kernels.ops.convolution.library import ACTIVATIONS, convolution_, convolution_arguments
from diffusion.kernels.ops.convolution.native import multiplies_bf16_pairs
from diffusion.kernels.ops.convolution.packing import Packing, interleave_gates, pack
from helpers.native import requires_native
from helpers.tensors import channels_last

pytestmark = requires_native
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Every packing that this processor can multiply.
PACKINGS = [Packing(), Packing(panel=16)]
PACKINGS += [Packing(bf16_pairs=True)] if multiplies_bf16_pairs() else []
PACKINGS += [Packing(amx_limbs=1), Packing(amx_limbs=3)] if "amx" in _native.simd_variants() else []
# Images, positions, channels, outputs: those of one tile, of less and of more, and of many blocks.
SIZES = [(2, 77, 96, 70), (3, 1, 32, 16), (1, 3, 64, 33), (5, 16, 20, 3), (2, 7, 33, 131), (2, 16411, 64, 40)]
FUNCTIONS = {
    "none": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "geglu": lambda y: y.chunk(2, -1)[0] * F.gelu(y.chunk(2, -1)[1]),
}


def as_map(sequence):
    """[B, S, C] as a map [B, C, S, 1] of the same memory."""
    return sequence.transpose(1, 2).unsqueeze(-1)


def linear(x, weight, bias, residual, activation, packing, **more):
    """The map by convolution_. weight, bias: as in torch.nn.functional.linear."""
    if activation == "geglu":
        weight, bias = interleave_gates(weight, packing), interleave_gates(bias, packing)
    packed = pack(weight[:, :, None, None], packing)
    assert packed.packing == packing
    wide = torch.full((*residual.shape[:2], residual.shape[2] + 5), 7.0, dtype=x.dtype)
    out = wide[..., 2 : residual.shape[2] + 2]
    arguments = convolution_arguments(
        as_map(x), packed, as_map(out), bias=bias, residual=as_map(residual), activation=activation, **more
    )
    convolution_(*arguments)
    assert (wide[..., :2] == 7).all()
    assert (wide[..., -3:] == 7).all()
    return out, packed


@pytest.mark.thinned
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(size, dtype, packing, activation):
    torch.manual_seed(0)
    batch, positions, c, k = size
    columns = 2 * k if activation == "geglu" else k
    x = torch.randn(batch, positions, c + 32).to(dtype)[..., :c]
    weight, bias = torch.randn(columns, c) / c**0.5, torch.randn(columns)
    residual = torch.randn(batch, positions, k).to(dtype)
    out, packed = linear(x, weight, bias, residual, activation, packing)

    def composed(x, weight, bias, residual):
        return FUNCTIONS[activation](F.linear(x, weight, bias)) + residual

    peer = composed(x, weight.to(dtype), bias.to(dtype), residual)
    exact = composed(x.double(), weight.double(), bias.double(), residual.double())
    assert wrong(out, peer, exact, accuracy=packed.accuracy) is None


@pytest.mark.thinned
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(dtype, activation, simd):
    test_parity((2, 7, 33, 131), dtype, Packing(), activation)


@pytest.mark.thinned
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_activations(dtype, activation, simd):
    """By a product with the identity, which is exact: the error of each number, relative to that number."""
    # Below these numbers the rounding of the exponent counts, and the result is within 2e-4 of 0.
    x = torch.linspace(-4 if activation == "gelu_tanh" else -5, 12, 16 * 4000).view(1, -1, 16).to(dtype)
    zeros = torch.zeros_like(x)
    out, _ = linear(x, torch.eye(16), torch.zeros(16), zeros, activation, Packing())
    exact = FUNCTIONS[activation](x.double())
    if activation == "gelu":  # without the cancellation of 1 + erf
        exact = x.double() * torch.special.ndtr(x.double())
    # Of 16 bits: half a unit in the last place for rounding, and a tenth of one for the activation.
    bound = 2e-6 if dtype == torch.float32 else 0.6 * torch.finfo(dtype).eps
    normal = exact.abs() > torch.finfo(dtype).smallest_normal
    error = ((out.double() - exact) / exact.where(normal, 1)).abs()[normal]
    assert error.max() < bound


@pytest.mark.thinned
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e20, 1e30, 60.0, -60.0])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_of_large_numbers(dtype, activation, value, simd):
    x = torch.zeros(1, 2, 16, dtype=dtype)
    x[0, 0, 0] = value
    weight = torch.zeros(16, 16)
    weight[3, 0] = 1
    out, _ = linear(x, weight, torch.zeros(16), torch.zeros_like(x), activation, Packing())
    expected = FUNCTIONS[activation](x[0, 0, 0].double()) if value != -1e20 else torch.tensor(0.0)
    torch.testing.assert_close(out[0, 0, 3].double(), expected.double(), equal_nan=True, rtol=1e-2, atol=1e-8)


@pytest.mark.thinned
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("activation", ["none", "geglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_image_does_not_depend_on_its_batch_or_the_threads(dtype, activation, packing):
    torch.manual_seed(0)
    x, residual = torch.randn(3, 77, 64).to(dtype), torch.randn(3, 77, 48).to(dtype)
    columns = 96 if activation == "geglu" else 48
    weight, bias = torch.randn(columns, 64), torch.randn(columns)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together, _ = linear(x, weight, bias, residual, activation, packing)
        torch.set_num_threads(1)
        for i in range(3):
            alone, _ = linear(x[i : i + 1], weight, bias, residual[i : i + 1], activation, packing)
            assert torch.equal(alone[0], together[i])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_nan_stays_in_its_row(packing):
    """Rows of x are read in tiles of sixteen; GEGLU has half as many outputs as columns."""
    x = torch.ones(2, 5, 64)
    x[1, 2, 7] = float("nan")
    zeros = torch.zeros(2, 5, 20)
    for dtype in (torch.float32, torch.bfloat16):
        out, _ = linear(x.to(dtype), torch.ones(40, 64), torch.ones(40), zeros.to(dtype), "geglu", packing)
        assert out[1, 2].isnan().all()
        assert out.isnan().sum() == 20


@pytest.mark.thinned
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("winograd_m", [0, 2, 4])
def test_after_a_3x3_convolution(winograd_m, activation):
    torch.manual_seed(0)
    x, weight, bias = channels_last(2, 24, 9, 7), torch.randn(20, 24, 3, 3) / 15, torch.randn(20)
    packed, out = pack(weight, Packing(winograd_m)), channels_last(2, 20, 9, 7)
    convolution_(*convolution_arguments(x, packed, out, bias=bias, activation=activation))
    peer = FUNCTIONS[activation](F.conv2d(x, weight, bias, padding=1))
    exact = FUNCTIONS[activation](F.conv2d(x.double(), weight.double(), bias.double(), padding=1))
    assert wrong(out, peer, exact, accuracy=packed.accuracy) is None


@pytest.mark.thinned
@pytest.mark.parametrize("factor", [0.5**0.5, -2.0])
@pytest.mark.parametrize("activation", ["none", "silu", "geglu"])
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_of_the_sum(dtype, packing, activation, factor, simd):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 37, 64).to(dtype), torch.randn(2, 37, 40).to(dtype)
    weight, bias = torch.randn(80 if activation == "geglu" else 40, 64) / 8, torch.randn(40)
    bias = torch.cat([bias, bias]) if activation == "geglu" else bias

    def expected(dtype):
        y = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
        return (FUNCTIONS[activation](y) + residual.to(dtype)) * factor

    if (packing.amx_limbs and simd != "amx") or (packing.bf16_pairs and simd not in ("avx512_bf16", "amx")):
        pytest.skip("this instruction set does not multiply it")
    out, packed = linear(x, weight, bias, residual, activation, packing, factor=factor)
    assert wrong(out, expected(dtype), expected(torch.float64), accuracy=packed.accuracy) is None


@pytest.mark.thinned
@pytest.mark.parametrize("winograd_m", [0, 2, 4])
def test_a_factor_after_a_3x3_convolution(winograd_m):
    torch.manual_seed(0)
    x, residual = channels_last(2, 24, 9, 7), channels_last(2, 20, 9, 7)
    weight = torch.randn(20, 24, 3, 3) / 15
    packed, out = pack(weight, Packing(winograd_m)), residual.clone(memory_format=torch.preserve_format)
    convolution_(*convolution_arguments(x, packed, out, residual=out, factor=0.5**0.5))
    peer = (F.conv2d(x, weight, padding=1) + residual) * 0.5**0.5
    exact = (F.conv2d(x.double(), weight.double(), padding=1) + residual) * 0.5**0.5
    assert wrong(out, peer, exact, accuracy=packed.accuracy) is None


def test_the_order_of_gates():
    rows = torch.arange(40)
    assert interleave_gates(rows, Packing())[:4].tolist() == [0, 20, 1, 21]
    tiles = interleave_gates(rows, Packing(amx_limbs=1)).view(4, 16)
    assert tiles[:2].tolist() == [list(range(16)), list(range(20, 36))]
    assert tiles[2:].tolist() == [[16, 17, 18, 19] + [0] * 12, [36, 37, 38, 39] + [0] * 12]


def test_wrong_arguments():
    x = channels_last(1, 16, 3, 3)
    packed, out = pack(torch.ones(16, 16, 1, 1), Packing()), torch.empty_like(x)
    with pytest.raises(ValueError, match="there is no activation 'relu'; choose from none, silu"):
        convolution_arguments(x, packed, out, activation="relu")
    arguments = convolution_arguments(x, packed, out)
    with pytest.raises(RuntimeError, match="there is no activation 5"):
        convolution_(*arguments._replace(activation=5))
    with pytest.raises(RuntimeError, match="not packed for this convolution"):
        convolution_(*arguments._replace(activation=ACTIVATIONS.index("geglu")))
    transformed = convolution_arguments(x, pack(torch.ones(16, 16, 3, 3), Packing(2)), out)
    with pytest.raises(RuntimeError, match="with GEGLU, winograd_m must be 0"):
        convolution_(*transformed._replace(activation=ACTIVATIONS.index("geglu")))
