"""Named inputs of conv3x3, for the tests and the benchmarks."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
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

    def inputs(self, dtype: torch.dtype, device="cpu", seed: int = 0) -> tuple[tuple, dict[str, Any]]:
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


def _block(shape, channels, **options) -> Case:
    return Case(shape, channels, num_groups=32, activation="silu", **options)


# Half a residual block of DDPM at its four resolutions, and of the bundled model.
BENCHMARKED = {
    "ddpm_32": _block((1, 128, 32, 32), 128, residual=True),
    "ddpm_32_batch": _block((8, 128, 32, 32), 128, residual=True),
    "ddpm_16": _block((1, 256, 16, 16), 256, residual=True),
    "ddpm_16_batch": _block((8, 256, 16, 16), 256, residual=True),
    "ddpm_8": _block((1, 256, 8, 8), 256, residual=True),
    "ddpm_8_batch": _block((8, 256, 8, 8), 256, residual=True),
    "ddpm_4_batch": _block((8, 256, 4, 4), 256, residual=True),
    "ddpm_up_32": Case((1, 256, 16, 16), 256, upsample=True),
}

CASES = {
    "plain": Case((2, 16, 8, 8), 16),
    "no_bias": Case((1, 32, 9, 12), 48, bias=False),
    "rgb": Case((2, 3, 16, 16), 64),
    "to_rgb": _block((2, 64, 16, 16), 3),
    "odd": Case((3, 20, 7, 9), 70, num_groups=5, activation="silu", add=True),
    "prime": Case((2, 33, 5, 13), 131, num_groups=3, modulated=True, activation="silu", residual=True),
    "linear": Case((1, 24, 14, 14), 24, num_groups=4, affine=False),
    "one_pixel": Case((2, 16, 1, 1), 16, num_groups=4, activation="silu"),
    "one_row": Case((2, 8, 1, 40), 8),
    "two_pixels": Case((1, 8, 2, 2), 24, residual=True),
    "four_pixels": _block((3, 64, 4, 4), 64, residual=True),
    "upsampled": _block((2, 64, 7, 5), 40, upsample=True, residual=True),
    "upsampled_4": Case((1, 16, 4, 4), 16, upsample=True),
    "off_centre": _block((2, 64, 8, 8), 64, mean=1e3),
    "contiguous": _block((2, 32, 8, 8), 32, layout="contiguous"),
    "slice": _block((2, 32, 8, 8), 32, layout="slice"),
    "many_blocks": _block((3, 128, 40, 40), 192, residual=True),
    "wide": Case((1, 8, 5, 300), 8),
    "empty_batch": Case((0, 16, 8, 8), 16, num_groups=4, activation="silu"),
    "no_outputs": Case((2, 16, 8, 8), 0),
    "no_pixels": Case((2, 16, 0, 8), 8),
}
