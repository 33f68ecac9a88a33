"""The CUDA kernels of group_norm_silu and its gradient, run on the host, against the formula in float64."""

import sys

import pytest
import torch

from diffusion.kernels.ops.group_norm_silu import library
from diffusion.kernels.ops.group_norm_silu.cases import CASES, Case
from helpers.cuda_on_host import launches, on_host, requires_compiler  # noqa: F401
from helpers.group_norm_silu import DTYPES, SMALL, assert_all_close, formula, torch_ops, with_gradients
from helpers.paths import ROOT
from helpers.tensors import cast
from helpers.tolerance import assert_close

sys.path.append(str(ROOT))  # last, so that the package is the one that is installed

from benchmarks.gpu import sanitized

# Compiling these kernels takes long; by default those of test_cuda_on_host.py are compiled.
pytestmark = [requires_compiler, pytest.mark.exhaustive, pytest.mark.usefixtures("on_host")]
ON_HOST = ("group_norm_silu",)

library.operator.define("on_host_group_norm_silu")
OPS = torch.ops.fused_diffusion

TILES = {  # with ends inside of a pack, of a warp's rows and of a chunk
    "wide_channels_last": Case((1, 192, 9, 9), 32, add=True, scale_shift=True, channels_last=True),
    "narrow_group": Case((2, 48, 7, 7), 16, channels_last=True),
    "one_wide_group": Case((1, 1000, 3, 5), 1, add=True),
    "one_wide_group_channels_last": Case((1, 1000, 3, 5), 1, add=True, channels_last=True),
    "long_rows": Case((1, 4, 61, 67), 2, add=True),
    "long_columns": Case((1, 32, 61, 17), 8, scale_shift=True, channels_last=True),
    "last_block_of_one_pack_less": Case((1, 27), 3),
    "last_block_of_two_packs_less": Case((1, 70), 14),
    "last_block_with_the_most_partial_sums": Case((1, 133, 1, 2), 7, channels_last=True),
    "off_centre_rows": Case((1, 4, 64, 64), 2, mean=1e3),
    "off_centre_columns": Case((1, 16, 64, 32), 2, mean=1e3, channels_last=True),
}
ALL = {name: CASES[name] for name in SMALL} | TILES

# A map stays whole, with few multiprocessors; it is divided, with many; or no map fits in shared memory.
DEVICES = {"few": (1, 227 << 10), "many": (500, 227 << 10), "small": (8, 40 << 10)}


def group_norm_silu(
    x, num_groups, weight=None, bias=None, eps=1e-5, *, add=None, scale=None, shift=None, activation="silu"
):
    silu = activation == "silu"
    return OPS.on_host_group_norm_silu(x, num_groups, weight, bias, eps, add, scale, shift, silu)[0]


@pytest.fixture(params=DEVICES)
def device(request, on_host):  # noqa: F811
    on_host(*DEVICES[request.param])
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL)
def test_value_and_gradient(case, dtype, device):
    if device == "small" and case.startswith("one_wide"):
        pytest.skip("the numbers of its channels alone need more shared memory")
    args, kwargs = ALL[case].inputs(dtype)
    actual = with_gradients(group_norm_silu, args, kwargs)
    assert_all_close(actual, args, kwargs)
    for tensor in actual[:2]:
        assert tensor.stride() == args[0].stride()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_storage_offsets(channels_last, device):
    """Nothing may be read as 16 bytes where it is not aligned."""
    case = Case((2, 16, 8, 8), 4, add=True, channels_last=channels_last)
    for dtype in DTYPES:
        (x, *rest), kwargs = case.inputs(dtype)
        shifted = x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)
        expected = with_gradients(group_norm_silu, (x, *rest), kwargs)
        for one, other in zip(
            with_gradients(group_norm_silu, (shifted, *rest), kwargs), expected, strict=True
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_what_is_added_to_a_channel_alone_in_its_group_has_no_gradient(channels_last, device):
    case = Case((1, 16, 61, 17), 16, add=True, scale_shift=True, channels_last=channels_last, mean=3.0)
    for dtype in DTYPES:
        *_, add, _, _ = with_gradients(group_norm_silu, *case.inputs(dtype))
        assert not add.any()


def test_mixed_dtypes(device):
    """Halves of one embedding, in float32, with an image in bfloat16."""
    (x, groups, *_), _ = CASES["odd_channels_last"].inputs(torch.bfloat16)
    scale, shift = torch.randn(3, 70, generator=torch.Generator().manual_seed(1)).chunk(2, 1)
    weight = torch.randn(35, generator=torch.Generator().manual_seed(2)).half()
    args, kwargs = (x, groups, weight, None), {"scale": scale, "shift": shift}
    exact = cast(args, kwargs, torch.float64)
    peer = torch_ops(x.float(), groups, weight.float(), None, scale=scale, shift=shift).bfloat16()
    bias = torch.zeros(35, dtype=torch.float64)
    truth = formula(*exact[0][:3], bias, **exact[1])
    assert_close(group_norm_silu(*args, **kwargs), peer, truth)


def test_runs_twice_alike(device):
    args, kwargs = TILES["wide_channels_last"].inputs(torch.bfloat16)
    first, second = (with_gradients(group_norm_silu, args, kwargs) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("case", ["odd_channels_last", "empty_batch", "one_dimension"])
def test_opcheck(case):
    (x, groups, weight, bias), kwargs = CASES[case].inputs()
    add, scale, shift = (kwargs.get(name) for name in ("add", "scale", "shift"))
    leaves = [None if t is None else t.requires_grad_() for t in (x, weight, bias, add, scale, shift)]
    x, weight, bias, add, scale, shift = leaves
    torch.library.opcheck(
        OPS.on_host_group_norm_silu.default, (x, groups, weight, bias, 1e-5, add, scale, shift, True)
    )
    x, weight, bias, add, scale, shift = (None if t is None else t.detach() for t in leaves)
    y, mean, rstd = OPS.on_host_group_norm_silu(x, groups, weight, bias, 1e-5, add, scale, shift, True)
    torch.library.opcheck(
        OPS.on_host_group_norm_silu_backward.default,
        (y, x, groups, weight, bias, add, scale, shift, True, mean, rstd),
    )


def test_a_launch_does_not_lower_what_another_thread_asked_for(on_host):  # noqa: F811
    """The device refuses a launch with more shared memory than was asked for last."""
    on_host(1, 227 << 10)
    for side in (50, 35):  # 160 and 78 KB, more than a kernel has by itself
        args, kwargs = Case((1, 16, side, side), 16, channels_last=True).inputs(torch.float32)
        group_norm_silu(*args, **kwargs)
    assert launches("group_norm_silu") == [(1, 1, 1)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_the_sanitizer_sees_every_kernel(channels_last, dtype, on_host):  # noqa: F811
    """Of maps that a block reads whole, and of those that are divided."""
    counts = []
    for shape, last in sanitized.NORMS:
        if last == channels_last:
            on_host(132, 227 << 10)
            with_gradients(group_norm_silu, *Case(shape, 8, channels_last=last).inputs(dtype))
            counts.append(len(launches("group_norm_silu")))
    assert {2, 4} <= set(counts)


def test_a_group_may_be_too_wide():
    with pytest.raises(RuntimeError, match="a group has 1025 channels, more than 1024"):
        group_norm_silu(torch.zeros(1, 1025, 2), 1)
