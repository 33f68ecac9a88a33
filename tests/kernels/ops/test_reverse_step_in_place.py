"""The step that a sampler runs in its own buffers, against the one that returns new tensors."""

import math

import pytest
import torch

from diffusion.kernels import (
    StepCoefficients,
    explain,
    philox_normal,
    reverse_step,
    reverse_step_,
    step_counter,
)
from diffusion.kernels.ops.reverse_step.arguments import InPlaceArguments
from diffusion.kernels.ops.reverse_step.cases import CASES, EPSILON
from diffusion.kernels.ops.reverse_step.in_place import op
from helpers.native import every_variant, requires_native
from helpers.reverse_step import PARAMETERS

SHAPE = (3, 3, 5, 7)
ROWS = [
    EPSILON._replace(guidance_scale=2.5),
    EPSILON._replace(coef_x=0.9, coef_x0=0.4, coef_x0_prev=-0.13, sigma=0.2, guidance_scale=1.5),
    EPSILON._replace(sigma=0.0, coef_output=0.3, guidance_scale=0.5),
]
NAN = [math.nan] * 12


def buffers(dtype=torch.float32, channels_last=False, shape=SHAPE, seed=0, learned=False):
    """x, model_output for both halves, x0, and the table with its sample ids."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    both = torch.randn(2 * shape[0], shape[1] * (1 + learned), *shape[2:], generator=generator).to(dtype)
    if channels_last:
        both = both.contiguous(memory_format=torch.channels_last)
    table = torch.tensor(ROWS, dtype=torch.float64)
    return x, both, torch.randn(shape, generator=generator), table, torch.tensor([5, 2**35, 9][: shape[0]])


def backends():
    x, both, x0, table, ids = buffers()
    cond, uncond = both.chunk(2)
    return op.serving(InPlaceArguments(x, cond, table, step_counter(0), ids, uncond, x0))


BACKENDS = backends()


@pytest.mark.thinned
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chain_is_that_of_single_steps(backend, dtype, channels_last, learned):
    """Rows, streams and x0 follow each other; the UNet's input is x_next, twice, in its dtype and layout."""
    x, both, x0, table, ids = buffers(dtype, channels_last, learned=learned)
    cond, uncond = both.chunk(2)
    counter = step_counter(7, stream=4)
    unet_input = torch.full((2 * len(x), *SHAPE[1:]), math.nan, dtype=dtype)
    if channels_last:
        unet_input = unet_input.contiguous(memory_format=torch.channels_last)
    x_expected, x0_expected = x.clone(), x0.clone()
    for i, row in enumerate(ROWS):
        x_expected, x0_expected = reverse_step(
            x_expected,
            cond.contiguous(),
            row,
            model_output_uncond=uncond.contiguous(),
            x0_prev=x0_expected,
            seed=7,
            sample_ids=ids,
            stream=4 + i,
            backend=backend,
        )
        reverse_step_(
            x,
            cond,
            table,
            counter,
            sample_ids=ids,
            model_output_uncond=uncond,
            x0=x0,
            unet_input=unet_input,
            backend=backend,
        )
        assert torch.equal(x, x_expected)
        assert torch.equal(x0, x0_expected)
        assert torch.equal(unet_input, torch.cat([x, x]).to(dtype))
        assert counter.tolist() == [i + 1, 7, 4, 0]


@pytest.mark.thinned
@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_case(backend, case):
    (x, out, row), kwargs = CASES[case].inputs(torch.bfloat16)
    expected = reverse_step(x, out, row, backend=backend, **kwargs)
    x0 = kwargs["x0_prev"] if row.coef_x0_prev else torch.full_like(x, math.nan)
    ids = torch.arange(len(x)) if kwargs["sample_ids"] is None else kwargs["sample_ids"]
    unet_input = torch.full_like(x, math.nan)
    reverse_step_(
        x,
        out,
        torch.tensor([row], dtype=torch.float64),
        step_counter(kwargs["seed"], stream=kwargs["stream"]),
        sample_ids=ids,
        model_output_uncond=kwargs["model_output_uncond"],
        x0=x0,
        noise=kwargs["noise"],
        unet_input=unet_input,
        backend=backend,
    )
    for one, other in zip((x, x0, unet_input), (*expected, expected[0]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.thinned
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (2, 0)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_elements(backend, channels_last, shape):
    """Empty batches have their steps, too, with an empty previous x0."""
    if channels_last and len(shape) < 4:
        return
    x, x0, table = torch.zeros(shape), torch.zeros(shape), torch.tensor(ROWS, dtype=torch.float64)
    output, unet_input = torch.zeros(shape), torch.zeros(2 * shape[0], *shape[1:])
    if channels_last and len(shape) == 4:
        output, unet_input = (t.to(memory_format=torch.channels_last) for t in (output, unet_input))
    counter, options = step_counter(0), {"sample_ids": torch.arange(shape[0]), "backend": backend}
    options |= {"model_output_uncond": output.clone()}
    for _ in ROWS:
        reverse_step_(x, output, table, counter, x0=x0, unet_input=unet_input, **options)
    assert counter[0] == len(ROWS)
    if backend != "triton":  # written for devices, where looking at the row would mean waiting
        with pytest.raises(RuntimeError, match="the previous x0 is needed"):
            reverse_step_(x, output, table[1:], step_counter(0), **options)
    for row in ROWS:
        x, x0 = reverse_step(x, output, row, x0_prev=x0, backend=backend)
    assert x.shape == x0.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_of_a_wider_output(backend):
    """The image's half of an output with a variance that is not used: a slice."""
    x, both, _, table, ids = buffers(learned=True)
    cond, uncond = (half[:, : SHAPE[1]] for half in both.chunk(2))
    expected, _ = reverse_step(
        x, cond.contiguous(), ROWS[0], model_output_uncond=uncond.contiguous(), seed=3, sample_ids=ids
    )
    options = dict(sample_ids=ids, model_output_uncond=uncond, backend=backend)
    reverse_step_(x, cond, table, step_counter(3, stream=0), **options)
    torch.testing.assert_close(x, expected)


@requires_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_input_is_rounded_as_pytorch_rounds(dtype):
    """Around every 16-bit number: ties, subnormals, overflow, infinities and NaN."""
    near = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float().view(torch.int32)
    bits = torch.stack([near + step for step in (-1, 0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)])
    x = bits.view(torch.float32).reshape(1, 1, -1)
    identity = StepCoefficients(0, 1.0, 1.0, 0.0, math.inf, 1.0, 0.0, 0.0, 0.0, 0.0)
    table = torch.tensor([identity], dtype=torch.float64)
    for variant in every_variant():
        unet_input, out = torch.zeros(x.shape, dtype=dtype), torch.zeros(x.shape)
        state, ids = x.clone(), torch.zeros(1, dtype=torch.int64)
        reverse_step_(
            state, out, table, step_counter(0), sample_ids=ids, unet_input=unet_input, backend="cpp"
        )
        assert torch.equal(unet_input.isnan(), state.to(dtype).isnan()), variant
        torch.testing.assert_close(unet_input, state.to(dtype), rtol=0, atol=0, equal_nan=True)


@requires_native
def test_opcheck():
    x, both, x0, table, ids = buffers(torch.bfloat16)
    cond, uncond = both.chunk(2)
    unet_input = torch.zeros(2 * len(x), *SHAPE[1:])
    arguments = (x, cond, uncond, x0, None, table, step_counter(1), ids, unet_input)
    torch.library.opcheck(torch.ops.fused_diffusion.reverse_step_.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_follows_the_counter(backend):
    row = EPSILON._replace(x0_from_x=0.0, x0_from_output=0.0, coef_x=0.0, coef_x0=0.0, sigma=1.0)
    table, counter = torch.tensor([NAN, row], dtype=torch.float64), step_counter(2**64 - 1, stream=11)
    counter[0] = 1
    x = torch.zeros(2, 1, 4, 4)
    ids = torch.tensor([8, 3])
    reverse_step_(x, torch.zeros_like(x), table, counter, sample_ids=ids, backend=backend)
    z = philox_normal(x.shape, seed=2**64 - 1, sample_ids=ids, stream=12, backend=backend)
    assert torch.equal(x, z)


@requires_native
@pytest.mark.parametrize("step", [-1, 3])
def test_a_counter_beyond_the_table_is_refused(step):
    x, both, _, table, ids = buffers()
    counter = step_counter(0)
    counter[0] = step
    with pytest.raises(RuntimeError, match=f"step {step} is outside of the table's 3"):
        reverse_step_(x, both[:3], table, counter, sample_ids=ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(3)), "x is a 1-dimensional"),
        (dict(model_output=torch.zeros(3, 4, 5, 7)), "model_output has shape"),
        (dict(model_output_uncond=torch.zeros(3, 3, 5, 6)), "model_output_uncond has shape"),
        (dict(x0=torch.zeros(1)), "x0 has shape"),
        (dict(noise=torch.zeros(2)), "noise has shape"),
        (dict(noise=torch.zeros(SHAPE, device="meta")), "noise is on meta, not on x's cpu"),
        (dict(unet_input=torch.zeros(4, 3, 5, 7)), "unet_input has shape"),
        (dict(table=torch.zeros(2, 11)), "table has shape"),
        (dict(table=torch.zeros(2, 12)), "table must be contiguous torch.float64"),
        (dict(counter=torch.zeros(3, dtype=torch.int64)), "counter has shape"),
        (dict(sample_ids=torch.zeros(3)), "sample_ids must be contiguous torch.int64"),
        (dict(sample_ids=torch.zeros(2, dtype=torch.int64)), "sample_ids has shape"),
    ],
)
def test_nonsense_is_refused(change, message):
    x, both, _, table, ids = buffers()
    call = dict(x=x, model_output=both[:3], table=table, counter=step_counter(0), sample_ids=ids) | change
    with pytest.raises(ValueError, match=message):
        reverse_step_(**call)


@requires_native
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(x=torch.zeros(SHAPE, dtype=torch.float64)), "x is torch.float64, not float32"),
        (dict(unet_input=torch.zeros(SHAPE, dtype=torch.float64)), "unet_input is torch.float64"),
        (dict(unet_input=torch.zeros(3, 3, 7, 5).mT), "unet_input is neither contiguous nor channels_last"),
        (dict(model_output=torch.zeros(3, 3, 7, 5).mT), "model_output is neither contiguous nor"),
        (dict(model_output_uncond=torch.zeros(SHAPE).half()), "model_output_uncond is torch.float16"),
    ],
)
def test_the_cpp_backend_declines_with_a_reason(change, reason):
    x, both, _, table, ids = buffers()
    call = dict(x=x, model_output=both[:3], table=table, counter=step_counter(0), sample_ids=ids) | change
    with pytest.raises(ValueError, match=reason):
        reverse_step_(**call, backend="cpp")
    assert reason in explain(reverse_step_, **call)
    reverse_step_(**call)


@pytest.mark.parametrize(("seed", "stream"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_a_counter_has_its_ranges(seed, stream):
    with pytest.raises(ValueError, match="not in"):
        step_counter(seed, stream=stream)
