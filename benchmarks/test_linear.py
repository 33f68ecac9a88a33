"""The linear maps and norms of a transformer's blocks: pytest benchmarks/test_linear.py --benchmark-only.

The shapes are those of Stable Diffusion's UNet at batch 2. Nothing whose result is wrong is timed.
"""

import pytest
import torch
import torch.nn.functional as F

from diffusion.kernels import _native
from diffusion.kernels._recorded_calls import recording
from diffusion.kernels._tolerance import wrong
from diffusion.kernels.ops.convolution.library import convolution_, convolution_arguments
from diffusion.kernels.ops.convolution.packing import choose_packing, interleave_gates, pack
from diffusion.kernels.ops.layer_norm.library import layer_norm_

pytestmark = [
    pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=False),
    pytest.mark.skipif(_native.CPP_MISSING is not None, reason=str(_native.CPP_MISSING)),
]
DTYPES = [torch.float32, torch.bfloat16]
BATCH = 2
# Positions, channels, outputs: projections of attention, the second layer of an MLP, keys of the text.
LINEAR = [
    (4096, 320, 320),
    (4096, 1280, 320),
    (1024, 640, 640),
    (1024, 2560, 640),
    (256, 1280, 1280),
    (256, 5120, 1280),
    (77, 768, 320),
]
GEGLU = [(4096, 320, 1280), (1024, 640, 2560), (256, 1280, 5120)]
NORMS = [(4096, 320), (1024, 640), (256, 1280)]


def as_map(sequence):
    """[B, S, C] as a map [B, C, S, 1] of the same memory."""
    return sequence.transpose(1, 2).unsqueeze(-1)


def geglu(x, weight, bias):
    value, gate = F.linear(x, weight, bias).chunk(2, -1)
    return value * F.gelu(gate)


def time_linear(benchmark, run, function, sizes, dtype, activation):
    positions, channels, outputs = sizes
    rows = 2 * outputs if activation == "geglu" else outputs
    x = torch.randn(BATCH, positions, channels).to(dtype)
    weight, bias = (torch.randn(rows, channels) / channels**0.5).to(dtype), torch.randn(rows).to(dtype)
    packing = choose_packing(
        (rows, channels, 1, 1), positions, 1, dtype, _native.simd_in_use(), winograd=False
    )
    ordered = [interleave_gates(t, packing) if activation == "geglu" else t for t in (weight, bias)]
    packed, out = pack(ordered[0][:, :, None, None], packing), x.new_empty(BATCH, positions, outputs)
    with recording() as recorded:
        arguments = convolution_arguments(
            as_map(x), packed, as_map(out), bias=ordered[1].float(), activation=activation
        )
        convolution_(*arguments)
    recorded.run()
    exact = function(x.double(), weight.double(), bias.double())
    assert wrong(out, function(x, weight, bias), exact, accuracy=packed.accuracy) is None
    benchmark.group = f"{activation} {sizes} {dtype}"
    benchmark(recorded.run if run == "cpp" else lambda: function(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", LINEAR, ids=str)
@pytest.mark.parametrize("run", ["cpp", "torch"])
@torch.no_grad()
def test_linear(benchmark, run, sizes, dtype):
    time_linear(benchmark, run, F.linear, sizes, dtype, "none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", GEGLU, ids=str)
@pytest.mark.parametrize("run", ["cpp", "torch"])
@torch.no_grad()
def test_geglu(benchmark, run, sizes, dtype):
    time_linear(benchmark, run, geglu, sizes, dtype, "geglu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", NORMS, ids=str)
@pytest.mark.parametrize("run", ["cpp", "torch"])
@torch.no_grad()
def test_layer_norm(benchmark, run, sizes, dtype):
    x, weight, bias = torch.randn(BATCH, *sizes).to(dtype), torch.randn(sizes[1]), torch.randn(sizes[1])
    cast, out = [weight.to(dtype), bias.to(dtype)], torch.empty_like(x)

    def norm(x, weight, bias):
        return F.layer_norm(x, sizes[1:], weight, bias)

    with recording() as recorded:
        layer_norm_(as_map(x), weight, bias, 1e-5, False, as_map(out))
    recorded.run()
    exact = norm(x.double(), weight.double(), bias.double())
    assert wrong(out, norm(x, *cast), exact) is None
    benchmark.group = f"layer norm {sizes} {dtype}"
    benchmark(recorded.run if run == "cpp" else lambda: norm(x, *cast))
