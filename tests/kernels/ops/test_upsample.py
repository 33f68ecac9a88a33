"""upsample_nearest2x_: PyTorch's nearest-neighbour interpolation, to and from ranges of channels."""

import pytest
import torch
import torch.nn.functional as F

from diffusion.kernels.ops.convolution.library import upsample_nearest2x_
from helpers.native import requires_native
from helpers.tensors import channels_last

pytestmark = requires_native


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 20, 3, 5), (1, 1, 1, 1), (3, 64, 40, 33), (2, 7, 1, 6), (0, 3, 2, 2)], ids=str
)
def test_doubled(shape, dtype):
    n, c, height, width = shape
    x = channels_last(n, c + 5, height, width, dtype=dtype)[:, 2 : c + 2]
    wide = channels_last(n, c + 9, 2 * height, 2 * width, dtype=dtype)
    before, out = wide.clone(), wide[:, 4 : c + 4]
    upsample_nearest2x_(x, out)
    assert torch.equal(out, F.interpolate(x, scale_factor=2.0) if n else out)
    assert torch.equal(wide[:, :4], before[:, :4])
    assert torch.equal(wide[:, c + 4 :], before[:, c + 4 :])


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (channels_last(1, 2, 3, 3), channels_last(1, 2, 6, 5), "2 H, 2 W"),
        (channels_last(1, 2, 3, 3), channels_last(1, 2, 6, 6).bfloat16(), "of its dtype"),
        (torch.zeros(1, 2, 3, 3), channels_last(1, 2, 6, 6), "x must be channels_last"),
        (channels_last(1, 2, 3, 3), torch.zeros(1, 2, 6, 6), "out must be channels_last"),
        (torch.zeros(2, 3, 3), torch.zeros(2, 6, 6), "N, C, H, W"),
    ],
)
def test_wrong_arguments(x, out, message):
    with pytest.raises(RuntimeError, match=message):
        upsample_nearest2x_(x, out)


def test_opcheck():
    torch.library.opcheck(upsample_nearest2x_.default, (channels_last(1, 2, 3, 3), channels_last(1, 2, 6, 6)))
