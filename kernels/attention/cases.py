"""Named inputs of attention, for the tests and the benchmarks."""

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """q, k and v are [batch, heads, positions, width], normal with this standard deviation.

    packed: they are views of one [batch, positions, 3, heads, width] tensor, as in a UNet.
    """

    batch: int
    heads: int
    positions: int
    width: int
    scale: float | None = None
    std: float = 1.0
    packed: bool = False

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> tuple[tuple, dict]:
        """Positional and keyword arguments of one call, the same for one seed on every device."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.positions, 3, self.heads, self.width)
        qkv = (torch.randn(shape, dtype=torch.float64, generator=generator) * self.std).to(device, dtype)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q, k, v = (qkv if self.packed else qkv.contiguous()).unbind(0)
        return (q, k, v), {"scale": self.scale}


CASES = {
    "mnist": Case(16, 1, 196, 64, packed=True),
    "mnist_coarse": Case(16, 4, 49, 32, packed=True),
    "cifar10": Case(8, 1, 256, 256, packed=True),
    "adm": Case(2, 6, 256, 64, packed=True),
    "contiguous": Case(2, 3, 100, 40),
    "scaled": Case(2, 2, 65, 16, scale=0.5),
    "peaked": Case(2, 2, 64, 32, std=8.0),
    "one_position": Case(3, 2, 1, 8),
    "odd": Case(1, 1, 17, 7),
    "empty_batch": Case(0, 2, 16, 8),
}
