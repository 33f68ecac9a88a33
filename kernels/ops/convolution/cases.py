"""Named inputs of conv2d and conv3x3, for the tests and the benchmarks."""

from typing import Any, NamedTuple

import torch


class Conv2dCase(NamedTuple):
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

    def inputs(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
    ) -> tuple[tuple, dict[str, Any]]:
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


# Convolutions of DDPM's CIFAR-10 network, and of one with pixel-unshuffled inputs, in their training batches.
CONV2D_BENCHMARKED = {
    "ddpm_32": Conv2dCase((16, 128, 32, 32), 128),
    "ddpm_16": Conv2dCase((16, 256, 16, 16), 256),
    "ddpm_8": Conv2dCase((16, 256, 8, 8), 256),
    "ddpm_4": Conv2dCase((16, 256, 4, 4), 256),
    "ddpm_up_32": Conv2dCase((16, 256, 32, 32), 256),
    "ddpm_skip_32": Conv2dCase((16, 384, 32, 32), 128, side=1),
    "ddpm_skip_8": Conv2dCase((16, 512, 8, 8), 256, side=1),
    "ddpm_down_32": Conv2dCase((16, 128, 32, 32), 128, stride=2),
    "unshuffled_16": Conv2dCase((128, 96, 16, 16), 96),
    "unshuffled_8": Conv2dCase((128, 192, 8, 8), 192),
    "unshuffled_up_16": Conv2dCase((128, 288, 16, 16), 96),
    "unshuffled_skip_8": Conv2dCase((128, 384, 8, 8), 192, side=1),
}

CONV2D_CASES = {
    "plain": Conv2dCase((2, 16, 8, 8), 16),
    "no_bias": Conv2dCase((1, 32, 9, 12), 48, bias=False),
    "odd": Conv2dCase((3, 20, 7, 9), 70),
    "prime": Conv2dCase((2, 33, 5, 13), 131),
    "one_by_one": Conv2dCase((2, 48, 5, 6), 40, side=1),
    "one_by_one_many": Conv2dCase((7, 96, 19, 17), 64, side=1),
    "rgb": Conv2dCase((2, 3, 16, 16), 64),
    "one_channel": Conv2dCase((2, 1, 6, 6), 1),
    "one_pixel": Conv2dCase((2, 16, 1, 1), 16),
    "two_pixels": Conv2dCase((1, 8, 2, 2), 24),
    "one_row": Conv2dCase((2, 8, 1, 40), 16),
    "one_column": Conv2dCase((2, 8, 40, 1), 16),
    "contiguous": Conv2dCase((2, 32, 8, 8), 32, layout="contiguous"),
    "slice": Conv2dCase((2, 32, 8, 8), 32, layout="slice"),
    "many_groups": Conv2dCase((5, 96, 40, 33), 96),
    "wide": Conv2dCase((1, 8, 5, 300), 8),
    "many_pixels": Conv2dCase((1, 16, 90, 310), 16),
    "many_images": Conv2dCase((32, 24, 5, 6), 40),
    "bunches": Conv2dCase((65, 33, 9, 4), 70),
    "bunch_of_one": Conv2dCase((33, 16, 3, 3), 16),
    "many_one_by_one": Conv2dCase((34, 40, 5, 6), 48, side=1),
    "unpadded": Conv2dCase((34, 40, 6, 5), 24, padding=0),
    "widely_padded": Conv2dCase((40, 16, 4, 5), 24, padding=2),
    "strided": Conv2dCase((35, 40, 9, 8), 24, stride=2),
    "strided_even": Conv2dCase((3, 40, 8, 10), 70, stride=2),
    "strided_unpadded": Conv2dCase((34, 24, 9, 7), 40, stride=2, padding=0),
    "strided_one_by_one": Conv2dCase((34, 24, 6, 7), 40, side=1, stride=2),
    "strided_one_pixel": Conv2dCase((40, 16, 1, 1), 24, stride=2, padding=2),
    "strided_slice": Conv2dCase((32, 32, 8, 8), 32, layout="slice", stride=2),
}


class Conv3x3Case(NamedTuple):
    """shape: of x, [N, C, H, W]. channels: K. The rest as in `conv3x3`; mean: of x.

    layout: "contiguous", "channels_last" or "slice", some of the channels of a wider channels_last tensor.
    """

    shape: tuple[int, int, int, int]
    channels: int
    bias: bool = True
    num_groups: int | None = None
    affine: bool = True
    add: bool = False
    modulated: bool = False
    activation: str = "none"
    residual: bool = False
    upsample: bool = False
    mean: float = 0.0
    layout: str = "channels_last"

    def inputs(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
    ) -> tuple[tuple, dict[str, Any]]:
        """Arguments of a call, of order one; the weight has the variance that keeps the output so."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device="cpu")

        n, c, height, width = self.shape
        k, factor = self.channels, 2 if self.upsample else 1
        x = normal(n, c + (8 if self.layout == "slice" else 0), height, width) + self.mean
        x = x.to(device, dtype)
        if self.layout != "contiguous":
            x = x.contiguous(memory_format=torch.channels_last)
        x = x[:, :c]
        options: dict[str, Any] = {"upsample": self.upsample, "activation": self.activation}
        if self.num_groups is not None:
            options["num_groups"] = self.num_groups
            if self.affine:
                options |= {"norm_weight": 1 + 0.2 * normal(c), "norm_bias": 0.2 * normal(c)}
            if self.add:
                options["add"] = normal(n, c)
            if self.modulated:
                options |= {"scale": 0.2 * normal(n, c), "shift": 0.2 * normal(n, c)}
        if self.residual:
            residual = normal(n, k, factor * height, factor * width).to(dtype)
            options["residual"] = residual.contiguous(memory_format=torch.channels_last)
        weight = normal(k, c, 3, 3) / (9 * max(c, 1)) ** 0.5
        bias = normal(k) if self.bias else None
        moved = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in options.items()
        }
        return (x, weight.to(device), None if bias is None else bias.to(device)), moved


def _block(shape: tuple[int, int, int, int], channels: int, **options: Any) -> Conv3x3Case:
    return Conv3x3Case(shape, channels, num_groups=32, activation="silu", **options)


# Half a residual block of DDPM at its four resolutions, and of the bundled digits.
CONV3X3_BENCHMARKED = {
    "ddpm_32": _block((1, 128, 32, 32), 128, residual=True),
    "ddpm_32_batch": _block((8, 128, 32, 32), 128, residual=True),
    "ddpm_16": _block((1, 256, 16, 16), 256, residual=True),
    "ddpm_16_batch": _block((8, 256, 16, 16), 256, residual=True),
    "ddpm_8": _block((1, 256, 8, 8), 256, residual=True),
    "ddpm_8_batch": _block((8, 256, 8, 8), 256, residual=True),
    "ddpm_4_batch": _block((8, 256, 4, 4), 256, residual=True),
    "ddpm_up_32": Conv3x3Case((1, 256, 16, 16), 256, upsample=True),
}

CONV3X3_CASES = {
    "plain": Conv3x3Case((2, 16, 8, 8), 16),
    "no_bias": Conv3x3Case((1, 32, 9, 12), 48, bias=False),
    "rgb": Conv3x3Case((2, 3, 16, 16), 64),
    "to_rgb": _block((2, 64, 16, 16), 3),
    "odd": Conv3x3Case((3, 20, 7, 9), 70, num_groups=5, activation="silu", add=True),
    "prime": Conv3x3Case((2, 33, 5, 13), 131, num_groups=3, modulated=True, activation="silu", residual=True),
    "linear": Conv3x3Case((1, 24, 14, 14), 24, num_groups=4, affine=False),
    "one_pixel": Conv3x3Case((2, 16, 1, 1), 16, num_groups=4, activation="silu"),
    "one_row": Conv3x3Case((2, 8, 1, 40), 8),
    "two_pixels": Conv3x3Case((1, 8, 2, 2), 24, residual=True),
    "four_pixels": _block((3, 64, 4, 4), 64, residual=True),
    "upsampled": _block((2, 64, 7, 5), 40, upsample=True, residual=True),
    "upsampled_4": Conv3x3Case((1, 16, 4, 4), 16, upsample=True),
    "off_centre": _block((2, 64, 8, 8), 64, mean=1e3),
    "contiguous": _block((2, 32, 8, 8), 32, layout="contiguous"),
    "slice": _block((2, 32, 8, 8), 32, layout="slice"),
    "many_blocks": _block((3, 128, 40, 40), 192, residual=True),
    "large_weight": _block((5, 192, 17, 16), 192, residual=True),  # two blocks of Winograd's, as large as it
    "blocks_of_threads": _block((3, 64, 40, 37), 32, residual=True),  # ten or so, across images
    "wide": Conv3x3Case((1, 8, 5, 300), 8),
    "empty_batch": Conv3x3Case((0, 16, 8, 8), 16, num_groups=4, activation="silu"),
    "no_outputs": Conv3x3Case((2, 16, 8, 8), 0),
    "no_pixels": Conv3x3Case((2, 16, 0, 8), 8),
}
