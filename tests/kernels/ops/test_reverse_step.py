"""One reverse step against its equations in float64, on every backend."""

import math
import re

import pytest
import torch

from diffusion.kernels import StepCoefficients, _triton, philox_normal, reverse_step
from diffusion.kernels.ops.philox.library import as_int64, sample_ids_tensor
from diffusion.kernels.ops.reverse_step import op
from diffusion.kernels.ops.reverse_step.arguments import Arguments
from diffusion.kernels.ops.reverse_step.cases import CASES, EPSILON
from diffusion.kernels.ops.reverse_step.coefficients import ROW_LENGTH
from helpers.native import every_variant, requires_native
from helpers.paths import ROOT
from helpers.reverse_step import PARAMETERS, formula
from helpers.tensors import cast
from helpers.thinning import exhaustive_but
from helpers.tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def call(case, dtype=torch.float32):
    args, kwargs = CASES[case].inputs(dtype)
    return args, kwargs


def backends():
    args, kwargs = call("mnist")
    return op.serving(Arguments(*args, **kwargs))


BACKENDS = backends()


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value(backend, case, dtype):
    args, kwargs = call(case, dtype)
    actual = reverse_step(*args, backend=backend, **kwargs)
    exact_args, exact_kwargs = cast(args, kwargs, torch.float64)
    peer_args, peer_kwargs = cast(args, kwargs, torch.float32)
    expected = formula(*exact_args, **exact_kwargs)
    peer = formula(*peer_args, **peer_kwargs)
    for one, other, truth in zip(actual, peer, expected, strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other, truth)


@pytest.mark.parametrize("case", CASES)
def test_reference_in_float64(case):
    args, kwargs = cast(*call(case), torch.float64)
    for one, truth in zip(reverse_step(*args, **kwargs), formula(*args, **kwargs), strict=True):
        assert_close(one, None, truth)


@requires_native
@pytest.mark.parametrize("case", CASES)
def test_instruction_sets_and_threads_give_the_same_bits(case):
    args, kwargs = call(case, torch.float16)
    expected = reverse_step(*args, backend="cpp", **kwargs)
    for variant in every_variant():
        actual = reverse_step(*args, backend="cpp", **kwargs)
        assert all(map(torch.equal, actual, expected)), variant


def test_rows_are_as_long_in_cpp():
    found = re.findall(r"kRowLength = (\d+);", (ROOT / "csrc" / "reverse_step" / "math.h").read_text())
    assert found == [str(ROW_LENGTH)]


@requires_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_converts_exactly(dtype):
    out = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, 1, -1)
    row = StepCoefficients(0, 1.0, 0.0, 1.0, math.inf, 0.0, 1.0, 0.0, 0.0, 0.0)
    for _ in every_variant():
        _, x0 = reverse_step(torch.zeros(out.shape), out, row, backend="cpp")
        torch.testing.assert_close(x0, out.float(), rtol=0, atol=0, equal_nan=True)


@requires_native
def test_learned_sigma_over_the_range_of_exp():
    """exp from underflow to overflow, in float32, within 2 ulps of float64."""
    v = torch.linspace(-1, 1, 400_001).reshape(1, 1, -1)
    x = torch.zeros(v.shape)
    out = torch.cat([x, v], 1)
    row = StepCoefficients(0, 1.0, 1.0, 0.0, math.inf, 0.0, 0.0, 0.0, 0.0, 1.0, -172.0, 176.0)
    sigma, _ = reverse_step(x, out, row, noise=torch.ones(v.shape), backend="cpp")
    fraction = (v + 1) * 0.5
    log_variance = fraction * 176.0 + (1 - fraction) * -172.0  # the float32 operations before exp
    expected = torch.exp((0.5 * log_variance).double())
    assert ((sigma.double() - expected).abs() / expected).max() < 2 * 2.0**-23
    extreme = row._replace(log_var_min=-2000.0, log_var_max=2000.0)
    sigma, _ = reverse_step(x, out, extreme, noise=torch.ones(v.shape), backend="cpp")
    assert (sigma[..., 0].item(), sigma[..., -1].item()) == (0.0, math.inf)


@pytest.mark.parametrize("backend", BACKENDS)
class TestMeaning:
    def test_no_noise_is_drawn_where_sigma_is_zero(self, backend):
        """The last step: noise and seed do not matter, not even infinite noise."""
        args, kwargs = call("last_step")
        expected, _ = reverse_step(*args, backend=backend, **kwargs)
        for change in (dict(noise=None), dict(noise=torch.full_like(args[0], math.inf)), dict(seed=99)):
            x_next, _ = reverse_step(*args, backend=backend, **{**kwargs, **change})
            assert torch.equal(x_next, expected)

    def test_x0_prev_is_not_read_where_d_is_zero(self, backend):
        args, kwargs = call("sample")
        expected = reverse_step(*args, backend=backend, **kwargs)
        actual = reverse_step(
            *args, backend=backend, **{**kwargs, "x0_prev": torch.full_like(args[0], math.nan)}
        )
        assert all(map(torch.equal, actual, expected))

    def test_noise_is_that_of_philox_normal(self, backend):
        args, kwargs = call("sequence" if _triton.INTERPRETED else "many_tiles")
        ids = kwargs["sample_ids"]
        z = philox_normal(args[0].shape, seed=0, sample_ids=ids, stream=1, backend=backend)
        expected, _ = reverse_step(*args, backend=backend, **{**kwargs, "noise": z})
        x_next, _ = reverse_step(*args, backend=backend, **kwargs)
        assert torch.equal(x_next, expected)

    def test_a_sample_does_not_depend_on_its_batch(self, backend):
        (x, out, row), kwargs = call("learned_guided")
        ids = torch.tensor([7, 2**35, 0])
        batch, _ = reverse_step(x, out, row, backend=backend, **{**kwargs, "sample_ids": ids})
        for i in range(3):
            one = {**kwargs, "sample_ids": ids[i : i + 1]}
            one["model_output_uncond"] = kwargs["model_output_uncond"][i : i + 1]
            alone, _ = reverse_step(x[i : i + 1], out[i : i + 1], row, backend=backend, **one)
            assert torch.equal(alone[0], batch[i])

    def test_inputs_are_left_alone(self, backend):
        args, kwargs = call("multistep_sde")
        tensors = [*args[:2], kwargs["x0_prev"], kwargs["noise"]]
        before = [t.clone() for t in tensors]
        reverse_step(*args, backend=backend, **kwargs)
        assert all(map(torch.equal, tensors, before))

    def test_nan_stays_nan(self, backend):
        (x, out, row), kwargs = call("odd")
        out[2, 0, 3, 4] = math.nan
        for result in reverse_step(x, out, row, backend=backend, **kwargs):
            assert result.isnan().nonzero().tolist() == [[2, 0, 3, 4]]

    def test_a_row_is_a_row_in_any_form(self, backend):
        (x, out, row), kwargs = call("sample")
        expected = reverse_step(x, out, row, backend=backend, **kwargs)
        for form in (list(row), torch.tensor(row, dtype=torch.float64)):
            assert all(map(torch.equal, reverse_step(x, out, form, backend=backend, **kwargs), expected))

    @pytest.mark.thinned
    @pytest.mark.parametrize(
        "case",
        exhaustive_but(
            ["mnist", "learned_guided", "multistep_sde", "last_step"],
            default=["learned_guided", "multistep_sde"],
        ),
    )
    def test_compiles_into_one_graph(self, backend, case):
        compiled = torch.compile(reverse_step, fullgraph=True, backend="aot_eager")
        args, kwargs = call(case)
        expected = reverse_step(*args, backend=backend, **kwargs)
        for one, other in zip(compiled(*args, backend=backend, **kwargs), expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(3)), "x is a 1-dimensional"),
        (dict(x=torch.zeros(2, 3, dtype=torch.int64)), "x is a 2-dimensional torch.int64"),
        (dict(model_output=torch.zeros(2, 5)), "model_output is torch.float32"),
        (dict(model_output=torch.zeros(2, 3, dtype=torch.int64)), "model_output is torch.int64"),
        (dict(model_output_uncond=torch.zeros(2, 6)), "model_output_uncond has shape"),
        (dict(x0_prev=torch.zeros(1, 3)), "x0_prev has shape"),
        (dict(noise=torch.zeros(2, 4)), "noise has shape"),
        (dict(noise=torch.zeros(2, 3, device="meta")), "noise is on meta, not on x's cpu"),
        (dict(row=EPSILON._replace(coef_x0_prev=0.5)), "x0_prev .* is needed"),
        (dict(row=[1.0] * 11), "row has 11 entries"),
        (dict(row=torch.zeros(2, 12)), "row has 2 entries"),
        (dict(row=[math.nan] * 12), "row holds NaN"),
        (dict(seed=-1), "seed is -1"),
        (dict(stream=-1), "stream is -1"),
        (dict(sample_ids=[1, 2, 3]), "3 sample_ids for a batch of 2"),
        (dict(backend="quantum"), "no backend 'quantum'; choose from: auto, "),
    ],
)
def test_nonsense_is_refused(change, message):
    call = {"x": torch.zeros(2, 3), "model_output": torch.zeros(2, 3), "row": EPSILON, **change}
    with pytest.raises(ValueError, match=message):
        reverse_step(**call)


@requires_native
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(x=torch.zeros(2, 3, 4, dtype=torch.float64)), "x is torch.float64, not float32"),
        (dict(model_output=torch.zeros(2, 3, 4, dtype=torch.float64)), "model_output is torch.float64"),
        (dict(model_output_uncond=torch.zeros(2, 3, 4).half()), "model_output_uncond is torch.float16"),
        (dict(noise=torch.zeros(2, 3, 4).double()), "noise is torch.float64, not float32"),
        (dict(noise=torch.zeros(2, 4, 3).mT), "noise is not contiguous"),
        (dict(x=torch.zeros(2, 3, 4, requires_grad=True)), "x requires a gradient"),
    ],
)
def test_the_cpp_backend_declines_with_a_reason(change, reason):
    call = {"x": torch.zeros(2, 3, 4), "model_output": torch.zeros(2, 3, 4), "row": EPSILON, **change}
    with pytest.raises(ValueError, match=reason):
        reverse_step(**call, backend="cpp")
    reverse_step(**call)


def test_the_reference_is_differentiable():
    (x, out, row), kwargs = cast(*call("learned_guided"), torch.float64)
    row = row._replace(clip_x0=math.inf)
    x, out = x[:1, :1, :2, :2].clone(), out[:1, :2, :2, :2].clone()
    kwargs |= {"model_output_uncond": out.flip(1), "sample_ids": [4]}
    inputs = (x.requires_grad_(), out.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, out: reverse_step(x, out, row, **kwargs), inputs)


def op_arguments(case, dtype=torch.float32):
    (x, out, row), kwargs = call(case, dtype)
    rows = torch.tensor([[math.nan] * 12, row, [math.nan] * 12], dtype=torch.float64)
    counter = torch.tensor([1, as_int64(kwargs["seed"]), kwargs["stream"] - 1, 0])
    ids = sample_ids_tensor(kwargs["sample_ids"], len(x), "cpu")
    return [x, out, kwargs["model_output_uncond"], kwargs["x0_prev"], kwargs["noise"], rows, counter, ids]


@requires_native
@pytest.mark.parametrize("case", ["odd", "learned_guided", "multistep_sde", "empty_batch", "large_ids"])
def test_opcheck(case):
    torch.library.opcheck(
        torch.ops.fused_diffusion.reverse_step.default, tuple(op_arguments(case, torch.bfloat16))
    )


@requires_native
@pytest.mark.parametrize("case", ["mnist", "learned_variance"])
def test_the_op_takes_its_row_and_stream_from_the_counter(case):
    """Row 1 of the table, and the noise stream of the counter plus 1."""
    args, kwargs = call(case)
    actual = torch.ops.fused_diffusion.reverse_step(*op_arguments(case))
    assert all(map(torch.equal, actual, reverse_step(*args, backend="cpp", **kwargs)))


@requires_native
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(16, 1, 28, 28, dtype=torch.float64), "x must be contiguous float32"),
        (1, torch.zeros(16, 3, 28, 28), "model_output must be"),
        (1, torch.zeros(16, 1, 28, 28, dtype=torch.float64), "model_output must be float32"),
        (2, torch.zeros(16, 1, 28, 27), "model_output_uncond must"),
        (3, torch.zeros(15, 1, 28, 28), "x0_prev must be"),
        (4, torch.zeros(16, 1, 28, 28).transpose(2, 3), "noise must be"),
        (5, torch.zeros(3, 11, dtype=torch.float64), "table must be"),
        (5, torch.zeros(0, 12, dtype=torch.float64), "table must be"),
        (5, torch.zeros(1, 12, dtype=torch.float64), "step 1 is outside of the table's 1"),
        (
            5,
            torch.ones(3, 12, dtype=torch.float64),
            "row.coef_x0_prev is not 0, so the previous x0 is needed",
        ),
        (6, torch.tensor([-1, 0, 0, 0]), "step -1 is outside"),
        (6, torch.zeros(3, dtype=torch.int64), "counter must be"),
        (7, torch.zeros(15, dtype=torch.int64), "sample_ids must be"),
    ],
)
def test_the_op_checks_what_it_is_given(position, value, message):
    arguments = op_arguments("mnist")
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_diffusion.reverse_step(*arguments)
