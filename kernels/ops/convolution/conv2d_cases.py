"""Named inputs of conv2d, for the tests and the benchmarks."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """shape: of x, [N, C, H, W]. channels: K. side: of the kernel. padding: half of the side, if not given.

    layout: "contiguous", "channels_last" or "slice", some of the channels of a wider channels_last tensor.
    """

    shape: tuple[int, int, int, int]
    channels: int
    side: int = 3
    bias: bool = True
    layout: str = "channels_last"
    stride: int = 1
    padding: int | None = None

    def inputs(self, dtype: torch.dtype, device="cpu", seed: int = 0) -> tuple[tuple, dict[str, Any]]:
        """Arguments of a call, of order one; the weight has the variance that keeps the output so."""
        generator = torch.Generator().manual_seed(seed)
        n, c, height, width = self.shape
        x = torch.randn(
            n, c + (8 if self.layout == "slice" else 0), height, width, generator=generator, device="cpu"
        )
        x = x.to(device, dtype)
        weight = torch.randn(self.channels, c, self.side, self.side, generator=generator, device="cpu")
        weight = (weight / (self.side**2 * c) ** 0.5).to(device, dtype)
        if self.layout != "contiguous":
            x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        bias = (
            torch.randn(self.channels, generator=generator, device="cpu").to(device, dtype)
            if self.bias
            else None
        )
        options = {"stride": self.stride, "padding": self.side // 2 if self.padding is None else self.padding}
        return (x[:, :c], weight, bias), options


# Of DDPM's CIFAR-10 network, and of one with pixel-unshuffled inputs, as they are trained.
BENCHMARKED = {
    "ddpm_32": Case((16, 128, 32, 32), 128),
    "ddpm_16": Case((16, 256, 16, 16), 256),
    "ddpm_8": Case((16, 256, 8, 8), 256),
    "ddpm_4": Case((16, 256, 4, 4), 256),
    "ddpm_up_32": Case((16, 256, 32, 32), 256),
    "ddpm_skip_32": Case((16, 384, 32, 32), 128, side=1),
    "ddpm_skip_8": Case((16, 512, 8, 8), 256, side=1),
    "ddpm_down_32": Case((16, 128, 32, 32), 128, stride=2),
    "unshuffled_16": Case((128, 96, 16, 16), 96),
    "unshuffled_8": Case((128, 192, 8, 8), 192),
    "unshuffled_up_16": Case((128, 288, 16, 16), 96),
    "unshuffled_skip_8": Case((128, 384, 8, 8), 192, side=1),
}

CASES = {
    "plain": Case((2, 16, 8, 8), 16),
    "no_bias": Case((1, 32, 9, 12), 48, bias=False),
    "odd": Case((3, 20, 7, 9), 70),
    "prime": Case((2, 33, 5, 13), 131),
    "one_by_one": Case((2, 48, 5, 6), 40, side=1),
    "one_by_one_many": Case((7, 96, 19, 17), 64, side=1),
    "rgb": Case((2, 3, 16, 16), 64),
    "one_channel": Case((2, 1, 6, 6), 1),
    "one_pixel": Case((2, 16, 1, 1), 16),
    "two_pixels": Case((1, 8, 2, 2), 24),
    "one_row": Case((2, 8, 1, 40), 16),
    "one_column": Case((2, 8, 40, 1), 16),
    "contiguous": Case((2, 32, 8, 8), 32, layout="contiguous"),
    "slice": Case((2, 32, 8, 8), 32, layout="slice"),
    "many_groups": Case((5, 96, 40, 33), 96),
    "wide": Case((1, 8, 5, 300), 8),
    "many_pixels": Case((1, 16, 90, 310), 16),
    "many_images": Case((32, 24, 5, 6), 40),
    "bunches": Case((65, 33, 9, 4), 70),
    "bunch_of_one": Case((33, 16, 3, 3), 16),
    "many_one_by_one": Case((34, 40, 5, 6), 48, side=1),
    "unpadded": Case((34, 40, 6, 5), 24, padding=0),
    "widely_padded": Case((40, 16, 4, 5), 24, padding=2),
    "strided": Case((35, 40, 9, 8), 24, stride=2),
    "strided_even": Case((3, 40, 8, 10), 70, stride=2),
    "strided_unpadded": Case((34, 24, 9, 7), 40, stride=2, padding=0),
    "strided_one_by_one": Case((34, 24, 6, 7), 40, side=1, stride=2),
    "strided_one_pixel": Case((40, 16, 1, 1), 24, stride=2, padding=2),
    "strided_slice": Case((32, 32, 8, 8), 32, layout="slice", stride=2),
}
