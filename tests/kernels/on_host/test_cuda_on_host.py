"""The CUDA sources, built for the host: every kernel's logic, where there is no GPU."""

import math

import pytest
import torch

from diffusion.kernels import philox_normal, reverse_step_, step_counter
from diffusion.kernels._library import define
from diffusion.kernels.ops.philox import library as philox
from diffusion.kernels.ops.reverse_step import library as step
from diffusion.kernels.ops.reverse_step.arguments import Arguments
from diffusion.kernels.ops.reverse_step.cases import CASES as STEP_CASES
from diffusion.kernels.ops.reverse_step.cases import EPSILON
from helpers.cuda_on_host import on_host, requires_compiler  # noqa: F401
from helpers.reverse_step import formula
from helpers.tensors import cast
from helpers.tolerance import assert_close

pytestmark = [requires_compiler, pytest.mark.slow, pytest.mark.usefixtures("on_host")]
ON_HOST = ("philox", "reverse_step")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = torch.ops.fused_diffusion

philox.define("on_host_philox_normal")
step.define("on_host_reverse_step")
define(
    "on_host_step_embeddings_",
    "(Tensor embeddings, Tensor counter, Tensor label_index, Tensor(a!) out) -> ()",
)


def misaligned(t):
    """The same tensor, one element further on in memory."""
    if not isinstance(t, torch.Tensor) or t.numel() == 0:
        return t
    return t.new_empty(t.numel() + 1)[1:].as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize("elements", [1, 7, 4000])
def test_normals(elements):
    ids = torch.tensor([5, 2**40, 0])
    expected = philox_normal((3, elements), seed=9, sample_ids=ids, stream=2, backend="reference")
    torch.testing.assert_close(
        OPS.on_host_philox_normal(ids, 9, 2, elements), expected, rtol=2.0**-22, atol=0
    )


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STEP_CASES)
def test_reverse_step(case, dtype):
    args, kwargs = STEP_CASES[case].inputs(dtype)
    exact_args, exact_kwargs = cast(args, kwargs, torch.float64)
    peer_args, peer_kwargs = cast(args, kwargs, torch.float32)
    expected, peer = formula(*exact_args, **exact_kwargs), formula(*peer_args, **peer_kwargs)
    aligned = step.operator_arguments(Arguments(*args, **kwargs))
    for arguments in (aligned, tuple(map(misaligned, aligned))):
        for one, other, truth in zip(OPS.on_host_reverse_step(*arguments), peer, expected, strict=True):
            assert_close(one, other, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 3, 5), (4, 4, 4), (1, 6, 6)], ids=str)
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
def test_both_layouts_of_the_output_give_the_same_bits(guided, learned, shape, dtype):
    generator, batch = torch.Generator().manual_seed(0), 2
    channels, *size = shape
    outputs = torch.randn(2 * batch, channels * (1 + learned), *size, generator=generator).to(dtype)
    x, before = (torch.randn(batch, *shape, generator=generator) for _ in range(2))
    row = EPSILON._replace(
        guidance_scale=2.5, coef_x0_prev=-0.1, sigma=0.3, log_var_min=-3.0, log_var_max=-1.0
    )
    table, ids = torch.tensor([row], dtype=torch.float64), torch.tensor([5, 2**40])
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        cond, uncond = outputs.contiguous(memory_format=layout).chunk(2)
        state, x0, counter = x.clone(), before.clone(), step_counter(7)
        unet_input = torch.full((2 * batch, *shape), math.nan, dtype=dtype).contiguous(memory_format=layout)
        given = (state, cond, uncond if guided else None, x0, None, table, counter, ids, unet_input)
        OPS.on_host_reverse_step_(*given)
        results.append((state, x0, unet_input.contiguous(), counter))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_reverse_step_in_place(channels_last, dtype):
    """A chain of steps that follows the counter, and the UNet's next input."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    table = torch.tensor(
        [EPSILON._replace(guidance_scale=2.5), EPSILON._replace(coef_x0_prev=-0.1)], dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (
        torch.randn(6, 3, 8, 8, generator=generator).to(dtype).contiguous(memory_format=layout).chunk(2)
    )
    start, ids = torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([5, 2**40, 0])

    def chain(step):
        x, x0, counter = start.clone(), torch.zeros_like(start), step_counter(7)
        unet_input = torch.full((6, 3, 8, 8), math.nan, dtype=dtype).contiguous(memory_format=layout)
        for _ in table:
            step(x, x0, counter, unet_input)
        return x, x0, unet_input, counter

    def reference(x, x0, counter, unet_input):
        reverse_step_(
            x,
            cond,
            table,
            counter,
            sample_ids=ids,
            model_output_uncond=uncond,
            x0=x0,
            unet_input=unet_input,
            backend="reference",
        )

    def built_for_host(x, x0, counter, unet_input):
        OPS.on_host_reverse_step_(x, cond, uncond, x0, None, table, counter, ids, unet_input)

    x, x0, unet_input, counter = chain(built_for_host)
    expected_x, expected_x0, _, expected_counter = chain(reference)
    torch.testing.assert_close((x, x0), (expected_x, expected_x0), rtol=1e-5, atol=1e-5)
    assert torch.equal(unet_input, torch.cat([x, x]).to(dtype))
    assert torch.equal(counter, expected_counter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 6, 520])
@pytest.mark.parametrize("shift", [lambda t: t, misaligned], ids=["aligned", "misaligned"])
def test_embeddings_of_a_step(shift, width, dtype):
    generator = torch.Generator().manual_seed(0)
    embeddings = shift(torch.randn(4, 3, width, dtype=dtype, generator=generator))
    index, counter = torch.tensor([2, 0, 0, 1, 2]), step_counter(0)
    for now in (0, 3, 11):
        counter[0] = now
        out = shift(torch.zeros(5, width, dtype=dtype))
        OPS.on_host_step_embeddings_(embeddings, counter, index, out)
        assert torch.equal(out, embeddings[now % 4][index])


def test_a_label_without_an_embedding_gives_nan():
    """A kernel cannot refuse it, and must not read beyond its tensor."""
    out, index = torch.zeros(3, 8), torch.tensor([-1, 1, 3])
    OPS.on_host_step_embeddings_(torch.ones(4, 3, 8), step_counter(0), index, out)
    assert out.isnan().all(1).tolist() == [True, False, True]
