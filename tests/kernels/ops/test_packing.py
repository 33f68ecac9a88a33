"""The formats of docs/packed-weights.md: every number of a weight is where the page says."""

import pytest
import torch

from diffusion.kernels.ops.convolution.packing import Packing, pack

K, C = 80, 70  # a full panel and a narrow one, and channels that fill no chunk
PANEL, LANES, CHUNK, BYTE_CHUNK, ZERO = 64, 16, 32, 64, 96


@pytest.fixture
def weight():
    return torch.randn(K, C, 3, 3, generator=torch.Generator().manual_seed(0))


def taps(weight: torch.Tensor) -> torch.Tensor:
    """[9, K, C], tap 3 * row + column."""
    return weight.flatten(2).permute(2, 0, 1)


def padded(x: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] = -shape[dim] % multiple
    return torch.cat([x, x.new_zeros(shape)], dim)


def test_panels_of_64_outputs(weight):
    expected = [taps(panel).transpose(1, 2).flatten() for panel in weight.split(PANEL)]
    assert torch.equal(pack(weight, Packing()).data.flatten(), torch.cat(expected))


def test_panels_of_16_outputs(weight):
    expected = [taps(panel).transpose(1, 2).flatten() for panel in weight.split(LANES)]
    assert torch.equal(pack(weight, Packing(panel=16)).data.flatten(), torch.cat(expected))


def test_panels_of_pairs(weight):
    expected = [
        taps(panel).transpose(1, 2).unflatten(1, (-1, 2)).transpose(2, 3).flatten()
        for panel in weight.bfloat16().split(PANEL)
    ]
    assert torch.equal(pack(weight, Packing(0, True)).data.flatten(), torch.cat(expected))


def test_panels_of_winograds_frequencies(weight):
    # G of F(2 x 2, 3 x 3), Lavin & Gray 2016, section 4.1.
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    frequencies = (g @ weight.double() @ g.T).flatten(2).permute(2, 1, 0).float()  # [16, C, K]
    expected = torch.cat([panel.flatten(1) for panel in frequencies.split(PANEL, 2)], 1)
    torch.testing.assert_close(pack(weight, Packing(2)).data, expected, rtol=1e-6, atol=1e-7)


def test_tiles_of_bfloat16(weight):
    expected = []
    for panel in padded(weight.bfloat16(), 0, LANES).split(2 * LANES):
        wide = padded(taps(panel), 2, CHUNK)  # [tap, output, channel]
        tiles = wide.unflatten(2, (-1, CHUNK // 2, 2)).unflatten(1, (-1, LANES))
        expected.append(tiles.permute(3, 0, 1, 4, 2, 5).flatten())  # [chunk, tap, tile, pair, output, 2]
    assert torch.equal(pack(weight, Packing(0, False, 1)).data.flatten(), torch.cat(expected))


def unpack_limbs(data: torch.Tensor, k: int, c: int, taps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of the int8 tiles times their outputs' scales, float64 [tap, k, row of channels], and the
    channel scales [c]."""
    data, chunks, panels = data.view(torch.int8).flatten(), -(-c // BYTE_CHUNK), -(-k // LANES)
    head = 4 * BYTE_CHUNK * chunks
    channel_scales = data[:head].view(torch.float32).double()[:c]
    assert torch.equal(channel_scales.log2(), channel_scales.log2().round())  # powers of two
    numbers = []
    for panel in data[head:].view(panels, 256 + chunks * taps * 3 * 1024):
        scales, sums = panel[:64].view(torch.float32).double(), panel[64:256].view(torch.int32).view(3, LANES)
        limbs = panel[256:].view(chunks, taps, 3, LANES, LANES, 4).long()
        assert torch.equal(sums.long(), ZERO * limbs.sum((0, 1, 3, 5)))
        whole = (
            limbs[:, :, 0] * 2**16 + limbs[:, :, 1] * 2**8 + limbs[:, :, 2]
        )  # [chunk, tap, row, output, 4]
        whole = whole.unflatten(2, (4, 4)).permute(1, 4, 0, 3, 2, 5)  # row 4 i + j: channels 16 j + 4 i
        numbers.append(whole.flatten(2) / 2**16 * scales[:, None])
    return torch.cat(numbers, 1)[:, :k], channel_scales


def test_tiles_of_int8_limbs(weight):
    numbers, channel_scales = unpack_limbs(pack(weight, Packing(0, False, 3)).data, K, C, 9)
    unit = weight.abs().max() / 127 / 2**16  # channel scales are at most 1
    assert (numbers[:, :, :C] * channel_scales - taps(weight)).abs().max() <= unit
    assert not numbers[:, :, C:].any()


def test_few_channels_share_a_row():
    """20 channels, padded to 32: a row of 64 holds the horizontal taps 0 and 1, the next row tap 2."""
    weight = torch.randn(16, 20, 3, 3, generator=torch.Generator().manual_seed(0))
    numbers, channel_scales = unpack_limbs(pack(weight, Packing(0, False, 3)).data, 16, 20, 6)
    found = (
        numbers.unflatten(0, (3, 2)).unflatten(3, (2, 32)).permute(2, 4, 0, 1, 3).flatten(3)
    )  # [k, c, 3, 4]
    assert not found[:, 20:].any()
    assert not found[..., 3].any()
    unit = weight.abs().max() / 127 / 2**16
    assert (found[:, :20, :, :3] * channel_scales.view(-1, 1, 1) - weight).abs().max() <= unit
