"""Weights packed for convolutions: their layouts, and which packing is chosen."""

import pytest
import torch

from diffusion.kernels import conv3x3
from diffusion.kernels.ops.convolution.packing import PANEL, Packing, choose_packing, pack
from helpers.native import requires_amx, requires_native
from helpers.tensors import channels_last


def test_the_packed_weight_is_whole():
    """Zero beyond the weight, and each number of it where the product reads it."""
    weight = torch.arange(70 * 5 * 9, dtype=torch.float32).reshape(70, 5, 3, 3)
    data = pack(weight, Packing()).data.flatten()
    first, last = data[: 9 * 5 * PANEL].reshape(9, 5, PANEL), data[9 * 5 * PANEL :].reshape(9, 5, 16)
    taps = weight.permute(2, 3, 1, 0).flatten(0, 1)
    assert torch.equal(first, taps[:, :, :PANEL])
    assert torch.equal(last[:, :, :6], taps[:, :, PANEL:])
    assert not last[:, :, 6:].any()


def test_the_weight_in_tiles_is_whole():
    """[panel][chunk][tap][tile][pair of channels][output][2], zero beyond the weight."""
    weight = torch.randn(40, 35, 3, 3, generator=torch.Generator().manual_seed(0))
    data = pack(weight, Packing(amx_limbs=1)).data
    words = 2 * 9 * 512  # a tile for each chunk and tap
    assert data.dtype == torch.bfloat16
    assert data.shape == (3 * words,)
    panels = data[: 2 * words].view(2, 9, 2, 16, 16, 2), data[2 * words :].view(2, 9, 1, 16, 16, 2)
    found = torch.cat(panels, 2).permute(2, 4, 0, 3, 5, 1).reshape(48, 64, 3, 3)
    assert not found[40:].any()
    assert not found[:, 35:].any()
    assert torch.equal(found[:40, :35], weight.bfloat16())


def test_the_weight_in_limbs_is_whole():
    """[scales][panel: 16 scales, [chunk][tap][limb][tile]]; tiles [4i + j][output][k] of 16j + 4i + k."""
    weight = torch.randn(20, 70, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[3] *= 1e-42
    weight[17] = 0
    weight[18] *= 1e30
    weight[:, 5] *= 1e-3
    weight[:, 6] = 0
    data = pack(weight, Packing(amx_limbs=3)).data
    assert data.dtype == torch.int8
    channel_scales, data = data[: 4 * 128].view(torch.float32).double(), data[4 * 128 :]
    heads, tiles = data.view(2, -1).split([256, 2 * 9 * 3 * 1024], 1)
    scales = heads[:, :64].contiguous().view(torch.float32).flatten().double()
    limbs = tiles.reshape(2, 2, 9, 3, 4, 4, 16, 4).double()  # [panel, chunk, tap, limb, i, j, output, k]
    whole = limbs[:, :, :, 0] + limbs[:, :, :, 1] / 2**8 + limbs[:, :, :, 2] / 2**16
    found = whole.permute(0, 5, 1, 4, 3, 6, 2).reshape(32, 128, 3, 3) * scales[:, None, None, None]
    assert limbs[:, :, :, 0].abs().max() == 127
    sums = heads[:, 64:].contiguous().view(torch.int32).view(2, 3, 16)
    assert torch.equal(sums, 96 * limbs.sum((1, 2, 4, 5, 7)).int())
    found *= channel_scales[:, None, None]
    assert not channel_scales[70:].any()
    assert torch.equal(channel_scales.log2().round(), channel_scales.log2())
    assert not found[20:].any()
    assert not found[:, 70:].any()
    largest = (weight.double() / channel_scales[:70, None, None]).abs().amax((1, 2, 3), keepdim=True)
    errors = (found[:20, :70] - weight.double()).abs() / channel_scales[:70, None, None]
    assert (errors <= largest * 2.0**-23.5 + 2.0**-143).all()


@pytest.mark.parametrize(("channels", "beside"), [(5, 3), (16, 3), (17, 2), (32, 2)])
def test_few_channels_stand_beside_those_of_the_next_taps(channels, beside):
    weight = torch.randn(20, channels, 3, 3, generator=torch.Generator().manual_seed(0))
    taps, own = -(-3 // beside), 16 if channels <= 16 else 32
    channel_scales, data = pack(weight, Packing(amx_limbs=3)).data.tensor_split([4 * 64])
    channel_scales = channel_scales.view(torch.float32)[:channels, None]
    heads, tiles = data.view(2, -1).split([256, 3 * taps * 3 * 1024], 1)
    limbs = tiles.reshape(2, 3, taps, 3, 4, 4, 16, 4).double()  # [panel, row, taps, limb, i, j, output, k]
    whole = limbs[:, :, :, 0] + limbs[:, :, :, 1] / 2**8 + limbs[:, :, :, 2] / 2**16
    found = whole.permute(0, 5, 4, 3, 6, 1, 2).reshape(32, 64, 3, taps)  # [output, j i k, row, taps]
    found *= heads[:, :64].contiguous().view(torch.float32).flatten()[:, None, None, None]
    for column in range(3):
        first = column % beside * own
        part = found[:20, first : first + channels, :, column // beside] * channel_scales
        torch.testing.assert_close(part, weight[:, :, :, column].double(), rtol=1e-6, atol=1e-6)
    assert found.count_nonzero() <= weight.numel()


@requires_native
@requires_amx
@pytest.mark.parametrize("channels", [12, 70])
def test_channels_of_unequal_size(channels):
    """Channels a thousand times as large as others, with weights as much smaller, cost the others nothing."""
    x, weight = channels_last(2, channels, 9, 9), channels_last(20, channels, 3, 3, seed=1)
    sizes = torch.logspace(-6, 6, channels)
    packed = pack(weight / sizes[:, None, None], Packing(amx_limbs=3))
    unequal = x * sizes[:, None, None]
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    actual = conv3x3(unequal, packed, backend="cpp")
    assert (actual - expected).abs().max() <= 4e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("size", "small", "large", "pairs"),
    [(1, 0, 0, 0), (2, 0, 0, 0), (4, 2, 2, 2), (8, 4, 2, 2), (14, 4, 4, 2)],
)
def test_packings_by_size(size, small, large, pairs):
    single, half, vectors = torch.float32, torch.bfloat16, "avx512_bf16"
    assert choose_packing((96, 96, 3, 3), size, 64, single, vectors) == Packing(small)
    assert choose_packing((256, 256, 3, 3), 64, size, single, vectors) == Packing(large)
    assert choose_packing((96, 96, 3, 3), size, size, half, vectors) == Packing(pairs, bf16_pairs=True)
    assert choose_packing((96, 96, 3, 3), size, size, half, "avx512") == Packing(small)
    assert choose_packing((96, 96, 3, 3), size, size, single, vectors, winograd=False) == Packing()
    assert choose_packing((64, 3, 3, 3), size, size, single, "amx") == Packing()
    for narrow in ("avx2", "baseline"):
        assert choose_packing((96, 96, 3, 3), size, size, single, narrow) == Packing(small, panel=16)
        assert choose_packing((64, 3, 3, 3), size, size, half, narrow) == Packing(panel=16)
    for shape in ((96, 96, 3, 3), (256, 256, 3, 3), (256, 256, 1, 1)):
        assert choose_packing(shape, size, 64, single, "amx", winograd=shape[2] == 3) == Packing(amx_limbs=3)
    assert choose_packing((16, 3884, 3, 3), size, size, single, "amx") == Packing(large)
    assert choose_packing((96, 96, 3, 3), size, size, half, "amx") == Packing(amx_limbs=1)


@pytest.mark.parametrize(
    ("shape", "packing"),
    [
        ((8, 8, 1, 1), Packing(2)),
        ((8, 8, 3, 1), Packing()),
        ((8, 8, 5, 5), Packing()),
        ((8, 8, 3, 3), Packing(3)),
        ((8, 8, 3, 3), Packing(amx_limbs=2)),
        ((8, 8, 3, 3), Packing(panel=32)),
        ((8, 8, 3, 3), Packing(2, amx_limbs=1)),
        ((8, 8, 3, 3), Packing(4, amx_limbs=3)),
        ((8, 8, 3, 3), Packing(bf16_pairs=True, amx_limbs=1)),
    ],
    ids=str,
)
def test_what_cannot_be_packed(shape, packing):
    with pytest.raises(ValueError, match="cannot be packed as"):
        pack(torch.zeros(shape), packing)
