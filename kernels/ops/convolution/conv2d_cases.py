"""Named inputs of conv2d, for the tests and the benchmarks."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """shape: of x, [N, C, H, W]. channels: K. side: of the kernel; the padding is half of it.

    layout: "contiguous", "channels_last" or "slice", some of the channels of a wider channels_last tensor.
    """

    shape: tuple[int, int, int, int]
    channels: int
    side: int = 3
    bias: bool = True
    layout: str = "channels_last"

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
        return (x[:, :c], weight, bias), {"padding": self.side // 2}


# Of DDPM's CIFAR-10 network, as it is trained.
BENCHMARKED = {
    "ddpm_32": Case((16, 128, 32, 32), 128),
    "ddpm_16": Case((16, 256, 16, 16), 256),
    "ddpm_8": Case((16, 256, 8, 8), 256),
    "ddpm_4": Case((16, 256, 4, 4), 256),
    "ddpm_up_32": Case((16, 256, 32, 32), 256),
    "ddpm_skip_32": Case((16, 384, 32, 32), 128, side=1),
    "ddpm_skip_8": Case((16, 512, 8, 8), 256, side=1),
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
}
