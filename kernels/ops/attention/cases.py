"""Named inputs of attention, for the tests and the benchmarks."""

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """q, k and v are [batch, heads, positions, width], normal with this standard deviation.

    packed: they are views of one [batch, positions, 3, heads, width] tensor, as in a UNet.
    offset: where in its storage that tensor begins, so that nothing is aligned.
    """

    batch: int
    heads: int
    positions: int
    width: int
    scale: float | None = None
    std: float = 1.0
    packed: bool = False
    offset: int = 0

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> tuple[tuple, dict]:
        """Positional and keyword arguments of one call, the same for one seed on every device."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.positions, 3, self.heads, self.width)
        numbers = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu") * self.std
        if not self.packed:
            numbers = numbers.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
        storage = torch.full((self.offset + numbers.numel(),), torch.nan, dtype=dtype, device=device)
        qkv = storage[self.offset :].as_strided(shape, numbers.stride())
        q, k, v = qkv.copy_(numbers).permute(2, 0, 3, 1, 4).unbind(0)
        return (q, k, v), {"scale": self.scale}


CASES = {
    "mnist": Case(16, 1, 196, 64, packed=True),
    "mnist_coarse": Case(16, 4, 49, 32, packed=True),
    "cifar10": Case(8, 1, 256, 256, packed=True),
    "adm": Case(2, 6, 256, 64, packed=True),
    "contiguous": Case(2, 3, 100, 40),
    "scaled": Case(2, 2, 65, 16, scale=0.5),
    "peaked": Case(2, 2, 64, 32, std=8.0),
    "extreme": Case(8, 2, 40, 64, std=30.0),  # many positions: with few, single roundings dominate
    "reversed": Case(1, 2, 33, 24, scale=-0.4, std=2.0),
    "uniform": Case(1, 2, 20, 12, scale=0.0),
    "many_tiles": Case(1, 1, 300, 33, packed=True),
    "wide": Case(1, 2, 70, 300, packed=True),
    "misaligned": Case(2, 2, 50, 36, packed=True, offset=1),
    "odd_misaligned": Case(2, 3, 35, 21, packed=True, offset=3),
    "one_column": Case(2, 1, 20, 1),
    "one_position": Case(3, 2, 1, 8),
    "odd": Case(1, 1, 17, 7),
    "empty_batch": Case(0, 2, 16, 8),
}

# Benchmarks only: too large for the tests.
LARGE = {
    "mnist_bundled": Case(64, 1, 49, 64, packed=True),
    "mnist_wide": Case(64, 1, 49, 96, packed=True),
    "cifar10_one": Case(1, 1, 256, 256, packed=True),
    "improved": Case(16, 4, 64, 64, packed=True),
    "adm_fine": Case(1, 4, 1024, 64, packed=True),
    "long": Case(1, 1, 4096, 64, packed=True),
}

# The shapes of real models.
BENCHMARKED = ("mnist", "mnist_coarse", "cifar10", "adm", *LARGE)
