"""Named inputs of group_norm_silu, for the tests and the benchmarks."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """x is [shape], of this mean and standard deviation; the other tensors are standard normal."""

    shape: tuple[int, ...]
    groups: int
    add: bool = False
    scale_shift: bool = False
    affine: bool = True
    activation: str = "silu"
    channels_last: bool = False
    mean: float = 0.0
    std: float = 1.0

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> tuple[tuple, dict]:
        """Positional and keyword arguments of one call, the same for one seed on every device."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
            draw = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
            return (draw * std + mean).to(device, dtype)

        n, c = self.shape[:2]
        x = normal(*self.shape, mean=self.mean, std=self.std)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
        weight, bias = (normal(c), normal(c)) if self.affine else (None, None)
        modulation: dict[str, Any] = {"activation": self.activation}
        if self.add:
            modulation["add"] = normal(n, c)
        if self.scale_shift:
            modulation |= {"scale": normal(n, c), "shift": normal(n, c)}
        return (x, self.groups, weight, bias), modulation


CASES = {
    "mnist": Case((16, 32, 28, 28), 32, add=True),
    "mnist_channels_last": Case((16, 32, 28, 28), 32, add=True, channels_last=True),
    "cifar10": Case((8, 128, 32, 32), 32, add=True),
    "cifar10_coarse": Case((8, 512, 4, 4), 32),
    "adm": Case((2, 192, 64, 64), 32, scale_shift=True),
    "adm_channels_last": Case((2, 192, 64, 64), 32, scale_shift=True, channels_last=True),
    "cifar10_channels_last": Case((8, 128, 32, 32), 32, channels_last=True),
    "cifar10_middle_channels_last": Case((8, 256, 16, 16), 32, channels_last=True),
    "batch_one_channels_last": Case((1, 128, 32, 32), 32, add=True, channels_last=True),
    "improved": Case((1, 576, 8, 8), 32, add=True),
    "improved_channels_last": Case((1, 576, 8, 8), 32, add=True, channels_last=True),
    "adm_skip_channels_last": Case((1, 1152, 8, 8), 32, scale_shift=True, channels_last=True),
    "adm_wide": Case((1, 2048, 4, 4), 32, scale_shift=True),
    "adm_wide_channels_last": Case((1, 2048, 4, 4), 32, scale_shift=True, channels_last=True),
    "attention_norm": Case((4, 96, 8, 8), 16, activation="none"),
    "no_affine": Case((3, 12, 5, 7), 4, add=True, scale_shift=True, affine=False),
    "one_group": Case((2, 6, 3, 3), 1),
    "one_channel_groups": Case((2, 6, 5, 3), 6, channels_last=True),
    "odd_channels_last": Case((3, 35, 7, 5), 7, add=True, scale_shift=True, channels_last=True),
    "vectors": Case((4, 24), 3),
    "one_dimension": Case((2, 8, 33), 2, add=True),
    "three_dimensions": Case((2, 8, 3, 4, 5), 2, scale_shift=True),
    "three_dimensions_channels_last": Case((2, 24, 3, 4, 5), 4, add=True, channels_last=True),
    "off_centre": Case((2, 64, 16, 16), 8, mean=1e3),
    "off_centre_channels_last": Case((2, 64, 16, 16), 8, mean=1e3, channels_last=True),
    "large": Case((2, 64, 16, 16), 8, std=1e3),
    "one_position": Case((2, 8, 1, 1), 4),
    "empty_batch": Case((0, 8, 4, 4), 4, add=True),
}

# The shapes of real models.
BENCHMARKED = (
    "mnist",
    "mnist_channels_last",
    "cifar10",
    "cifar10_coarse",
    "cifar10_channels_last",
    "cifar10_middle_channels_last",
    "batch_one_channels_last",
    "adm",
    "adm_channels_last",
    "improved_channels_last",
    "adm_skip_channels_last",
    "adm_wide",
    "adm_wide_channels_last",
)
