"""Noise: the published integers, normals that are normal, and the same on every backend."""

import math

import pytest
import torch
from scipy import stats

from diffusion.kernels import _triton, philox_normal
from diffusion.kernels.ops.philox import op
from diffusion.kernels.ops.philox.arguments import Arguments
from diffusion.kernels.ops.philox.cases import CASES
from diffusion.kernels.ops.philox.library import operator_arguments
from diffusion.kernels.ops.philox.reference import box_muller, philox_bits
from helpers.native import every_variant, requires_native
from helpers.thinning import exhaustive_but

BACKENDS = op.serving(Arguments((1,), seed=0))
ONES = 0xFFFFFFFF
# Triton's interpreter takes seconds for a case of more elements.
PARAMETERS = exhaustive_but(
    CASES,
    [name for name, case in CASES.items() if not _triton.INTERPRETED or math.prod(case.shape) <= 15_000],
)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([ONES] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    words = philox_bits(torch.tensor(counter), key)
    assert " ".join(f"{word:08x}" for word in words.tolist()) == expected


def formula(w0: int, w1: int) -> tuple[float, float]:
    """Box & Muller 1958 in float64, on uniforms that are rounded to float32."""
    u1, u2 = (float(torch.tensor(float(w), dtype=torch.float32) * 2.0**-32 + 2.0**-33) for w in (w0, w1))
    radius = math.sqrt(-2 * math.log(u1))
    return radius * math.cos(2 * math.pi * u2), radius * math.sin(2 * math.pi * u2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x299F31D0_A4093822])
def test_normals_are_box_muller_of_the_counters(backend, seed):
    """Element, stream and sample id go where the documentation says."""
    ids, stream = [3, 2**40 + 5], 9
    z = philox_normal((2, 3, 2), seed=seed, sample_ids=ids, stream=stream, backend=backend)
    for sample, sample_id in zip(z.flatten(1), ids, strict=True):
        for element in (0, 1, 2, 3, 4, 5):
            counter = torch.tensor([element // 4, stream, sample_id & ONES, sample_id >> 32])
            words = philox_bits(counter, seed).tolist()
            pair = element % 4 // 2
            expected = formula(words[2 * pair], words[2 * pair + 1])[element % 2]
            assert sample[element].item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_box_muller_at_the_ends():
    words = torch.tensor([[0, 0], [0, ONES], [ONES, 0], [1, 1 << 30], [ONES - 200, 3 << 30], [7, 1 << 31]])
    expected = torch.tensor([formula(*pair) for pair in words.tolist()])
    torch.testing.assert_close(box_muller(words), expected, rtol=1e-6, atol=1e-6)
    assert box_muller(words)[2].tolist() == [0.0, 0.0]  # u1 = 1
    assert box_muller(words)[0, 0] == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)  # u1 = 2^-33


@pytest.mark.thinned
@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree(backend, case):
    args, kwargs = CASES[case].inputs()
    z = philox_normal(*args, backend=backend, **kwargs)
    expected = philox_normal(*args, backend="reference", **kwargs)
    assert (z.shape, z.dtype) == (expected.shape, torch.float32)
    assert largest_ulps(z, expected) <= 2


def largest_ulps(z, expected):
    ulp = torch.nextafter(expected.abs(), torch.tensor(math.inf)).double() - expected.abs().double()
    return ((z.double() - expected.double()).abs() / ulp).max().item() if z.numel() else 0.0


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_two_ulps_over_millions_of_draws(backend):
    for seed in (11, 12):
        z = philox_normal((8, 2**18), seed=seed, backend=backend)
        assert largest_ulps(z, philox_normal((8, 2**18), seed=seed, backend="reference")) <= 2


@requires_native
@pytest.mark.parametrize("case", CASES)
def test_instruction_sets_and_threads_give_the_same_bits(case):
    args, kwargs = CASES[case].inputs()
    expected = philox_normal(*args, backend="cpp", **kwargs)
    for variant in every_variant():
        assert torch.equal(philox_normal(*args, backend="cpp", **kwargs), expected), variant


@pytest.mark.parametrize("backend", BACKENDS)
class TestDistribution:
    """z-scores of statistics whose distribution is known; 4.5 standard errors, fixed seeds."""

    def test_moments(self, backend):
        z = philox_normal((64, 2**14), seed=1, backend=backend).double().flatten()
        n = len(z)
        for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10170)}.items():
            assert abs((z**power).mean().item() - mean) < 4.5 * math.sqrt(variance / n)

    @pytest.mark.parametrize("seed", [0, 1, 2**63 + 17])
    def test_kolmogorov_smirnov(self, backend, seed):
        z = philox_normal((16, 3, 64, 64), seed=seed, stream=3, backend=backend)
        assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3

    def test_tails(self, backend):
        """Beyond 4 standard deviations: binomial with p = 2 (1 - Phi(4))."""
        z = philox_normal((32, 2**16), seed=2, backend=backend)
        expected = z.numel() * 2 * stats.norm.sf(4)
        assert abs((z.abs() > 4).sum().item() - expected) < 4.5 * math.sqrt(expected)
        assert z.abs().max() < math.sqrt(66 * math.log(2)) + 1e-5

    def test_no_correlation(self, backend):
        """Over samples, steps, seeds, words of a block and neighbouring blocks."""
        n = 2**16
        draws = [
            philox_normal((4, n), seed=seed, stream=stream, backend=backend)
            for seed, stream in ((5, 0), (5, 1), (6, 0), (2**32 + 5, 0))
        ]
        lanes = draws[0][0].reshape(-1, 4)
        series = torch.cat([*draws, draws[0][:1].roll(1, 1), draws[0][:1].roll(4, 1)]).double()
        bound = 4.5 / math.sqrt(n)
        for values, limit in ((series, bound), (lanes.T.double(), 2 * bound)):
            for power in (1, 2):  # squares too: Box-Muller ties the sizes of a pair
                off_diagonal = torch.corrcoef(values**power) - torch.eye(len(values))
                assert off_diagonal.abs().max() < limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_does_not_depend_on_its_batch(backend):
    ids = [4711, 3, 2**33]
    batch = philox_normal((3, 3, 9, 9), seed=8, sample_ids=ids, stream=2, backend=backend)
    for sample, sample_id in zip(batch, ids, strict=True):
        alone = philox_normal((1, 3, 9, 9), seed=8, sample_ids=[sample_id], stream=2, backend=backend)
        assert torch.equal(alone[0], sample)


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_ids_count_from_zero(backend):
    expected = philox_normal((3, 5), seed=1, sample_ids=[0, 1, 2], backend=backend)
    assert torch.equal(philox_normal((3, 5), seed=1, backend=backend), expected)
    assert torch.equal(
        philox_normal((3, 5), seed=1, sample_ids=torch.tensor([0, 1, 2]), backend=backend), expected
    )


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((2, 3), dict(seed=-1), "seed is -1"),
        ((2, 3), dict(seed=2**64), "seed is"),
        ((2, 3), dict(seed=0, stream=2**32), "stream is"),
        ((2, 3), dict(seed=0, sample_ids=[1]), "1 sample_ids for a batch of 2"),
        ((2, 3), dict(seed=0, sample_ids=[1, -1]), "sample_ids are"),
        ((2, 3), dict(seed=0, sample_ids=[1, 2**63]), "sample_ids are"),
        ((2, 3), dict(seed=0, sample_ids=torch.tensor([1.0, 2.0])), "not int64"),
        ((2, 3), dict(seed=0, sample_ids=torch.tensor([1, 2, 3])), "not int64"),
        ((), dict(seed=0), "shape is"),
        ((-1, 3), dict(seed=0), "shape is"),
        ((1, 2**34 + 1), dict(seed=0), "more than"),
        ((2, 3), dict(seed=0, backend="cuda"), "runs on CUDA devices"),
        ((2, 3), dict(seed=0, backend="gpu"), "no backend 'gpu'"),
    ],
)
def test_nonsense_is_refused(shape, kwargs, message):
    with pytest.raises(ValueError, match=message):
        philox_normal(shape, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend):
    compiled = torch.compile(philox_normal, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 2**64 - 1):
        z = compiled((2, 3, 5), seed=seed, sample_ids=[1, 2], stream=4, backend=backend)
        expected = philox_normal((2, 3, 5), seed=seed, sample_ids=[1, 2], stream=4, backend=backend)
        assert torch.equal(z, expected)


@requires_native
@pytest.mark.parametrize("case", ["odd", "empty_batch", "large_ids"])
def test_opcheck(case):
    (shape,), kwargs = CASES[case].inputs()
    arguments = operator_arguments(Arguments(shape, **kwargs))
    torch.library.opcheck(torch.ops.fused_diffusion.philox_normal.default, arguments)
