"""Attention, linear maps and norms of planned UNets: pytest benchmarks/test_transformer.py --benchmark-only.

The shapes are those of Stable Diffusion's UNet at batch 2, and attention's also those of networks for pixels.
Nothing whose result is wrong is timed.
"""

import pytest
import torch
import torch.nn.functional as F

from diffusion.kernels import _native
from diffusion.kernels._recorded_calls import recording
from diffusion.kernels._tolerance import wrong
from diffusion.kernels.ops.attention.library import attention_
from diffusion.kernels.ops.convolution.library import convolution_, convolution_arguments
from diffusion.kernels.ops.convolution.packing import choose_packing, interleave_gates, pack
from diffusion.kernels.ops.layer_norm.library import layer_norm_

pytestmark = [
    pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=False),
    pytest.mark.skipif(_native.CPP_MISSING is not None, reason=str(_native.CPP_MISSING)),
]
DTYPES = [torch.float32, torch.bfloat16]
BATCH = 2
# Positions, channels, outputs: projections of attention, the second layer of an MLP, keys of the text, and
# embeddings of the time.
LINEAR = [
    (4096, 320, 320),
    (4096, 320, 960),
    (4096, 1280, 320),
    (1024, 640, 640),
    (1024, 2560, 640),
    (256, 1280, 1280),
    (256, 5120, 1280),
    (77, 768, 320),
    (1, 1280, 320),
    (1, 1280, 1280),
]
GEGLU = [(4096, 320, 1280), (1024, 640, 2560), (256, 1280, 5120)]
# Batch, heads, positions of queries and of keys, width: Stable Diffusion's, guided-diffusion's, EDM's.
ATTENTION = [
    (2, 8, 4096, 4096, 40),
    (2, 8, 1024, 1024, 80),
    (2, 8, 256, 256, 160),
    (2, 8, 4096, 77, 40),
    (1, 3, 1024, 1024, 64),
    (1, 1, 256, 256, 256),
]
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", ATTENTION, ids=str)
@pytest.mark.parametrize("run", ["cpp", "torch"])
@torch.no_grad()
def test_attention(benchmark, run, sizes, dtype):
    batch, heads, positions, keys, width = sizes
    q, out = (torch.randn(batch, positions, heads, width).to(dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(batch, keys, heads, width).to(dtype).transpose(1, 2) for _ in range(2))
    with recording() as recorded:
        attention_(q, k, v, width**-0.5, dtype == torch.bfloat16, out)
    recorded.run()
    exact = F.scaled_dot_product_attention(*(t[:1, :1].double() for t in (q, k, v)))
    peer = F.scaled_dot_product_attention(q, k, v)
    assert wrong(out[:1, :1], peer[:1, :1], exact) is None
    benchmark.group = f"attention {sizes} {dtype}"
    benchmark(recorded.run if run == "cpp" else lambda: F.scaled_dot_product_attention(q, k, v))
