"""average_pool_: PyTorch's averages of what a norm and SiLU give, over layouts and instruction sets."""

import pytest
import torch
import torch.nn.functional as F

from diffusion.kernels._recorded_calls import recording
from diffusion.kernels._tolerance import wrong
from diffusion.kernels.ops.convolution.library import average_pool_
from diffusion.kernels.ops.group_norm_silu.library import group_norm_affine_
from helpers.native import requires_native
from helpers.tensors import channels_last

pytestmark = requires_native
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.thinned
@pytest.mark.parametrize("norm", ["none", "norm", "silu"])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 20, 4, 6), (1, 3, 5, 3), (3, 64, 2, 2), (1, 33, 1, 7)], ids=str)
def test_parity(shape, dtype, window, norm, simd):
    torch.manual_seed(0)
    n, c, height, width = shape
    x = (channels_last(n, c + 5, height, width) * 3 + 1).to(dtype)[:, 2 : c + 2]
    wide = channels_last(n, c + 9, height // window, width // window, dtype=dtype)
    before, out = wide.clone(), wide[:, 4 : c + 4]
    weight, bias, affine = torch.rand(c) + 0.5, torch.randn(c), torch.empty(3, n, c)
    if norm != "none":
        group_norm_affine_(x, 1, weight, bias, 1e-5, None, None, None, norm == "silu", affine)
    average_pool_(x, None if norm == "none" else affine, norm == "silu", window, out)

    def expected(dtype):
        y = x.to(dtype)
        if norm != "none":
            y = F.group_norm(y, 1, weight.to(dtype), bias.to(dtype))
        y = F.silu(y) if norm == "silu" else y
        return F.avg_pool2d(y, window) if min(height, width) >= window else y[:, :, :0, :0]

    if out.numel():
        assert wrong(out, expected(dtype), expected(torch.float64)) is None
    assert torch.equal(wide[:, :4], before[:, :4])
    assert torch.equal(wide[:, c + 4 :], before[:, c + 4 :])


def test_recorded():
    x, out = channels_last(2, 24, 4, 4), torch.empty(2, 24, 2, 2).to(memory_format=torch.channels_last)
    with recording() as recorded:
        average_pool_(x, None, False, 2, out)
    assert len(recorded) == 1
    x.mul_(2)
    recorded.run()
    torch.testing.assert_close(out, F.avg_pool2d(x, 2))


def test_wrong_arguments():
    x, out = channels_last(1, 4, 4, 4), channels_last(1, 4, 2, 2)
    for arguments, complaint in (
        ((x, None, False, 3, out), "window must be 1 or 2"),
        ((x, None, False, 1, out), "out \\[N, C, H / window, W / window\\]"),
        ((x, None, True, 2, out), "without affine there is no activation"),
        ((x, torch.zeros(3, 1, 5), False, 2, out), "affine must be contiguous float32"),
        ((x.double(), None, False, 2, out.double()), "float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=complaint):
            average_pool_(*arguments)
