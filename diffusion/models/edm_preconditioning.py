"""The preconditionings of EDM: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

They are those of table 1 in Karras et al. 2022, arXiv 2206.00364. Each takes noise levels [B] to (c_skip,
c_out, c_in, c_noise), each [B].
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

PRECONDITIONINGS = ("edm", "vp", "ve", "iddpm")
Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]
BETA_D, BETA_MIN = 19.9, 0.1  # of VP: beta(t) = BETA_MIN + BETA_D t for t in [0, 1]
VP_TIMESTEPS = 1000
IDDPM_C1, IDDPM_C2 = 0.001, 0.008
UNIT = 2.0**-40


def preconditioning(name: str, sigma_data: float, num_levels: int) -> Callable[[Tensor], Coefficients]:
    """The preconditioning of this name: "edm", or "vp", "ve" or "iddpm", the earlier work's.

    sigma_data: standard deviation of the training images, for "edm". num_levels: discrete noise levels of
    "iddpm", which is a module, since it has a table of them.
    """
    if name == "edm":
        return EDM(sigma_data)
    if name == "iddpm":
        return IDDPM(num_levels)
    return vp if name == "vp" else ve


class EDM:
    """EDM's own, by the standard deviation of the training images."""

    def __init__(self, sigma_data: float):
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> Coefficients:
        total = sigma**2 + self.sigma_data**2
        skip, output = self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt()
        return skip, output, 1 / total.sqrt(), sigma.log() / 4


def vp(sigma: Tensor) -> Coefficients:
    """Variance preserving: that of DDPM++ in Song et al. 2021, arXiv 2011.13456."""
    time = ((BETA_MIN**2 + 2 * BETA_D * (1 + sigma**2).log()).sqrt() - BETA_MIN) / BETA_D
    return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), (VP_TIMESTEPS - 1) * time


def ve(sigma: Tensor) -> Coefficients:
    """Variance exploding: that of NCSN++ in Song et al. 2021."""
    return torch.ones_like(sigma), sigma, torch.ones_like(sigma), (0.5 * sigma).log()


class IDDPM(nn.Module):
    """Improved DDPM's (Nichol & Dhariwal 2021, arXiv 2102.09672), which knows discrete noise levels only."""

    fixed_levels: Tensor

    def __init__(self, num_levels: int):
        super().__init__()
        self.register_buffer("fixed_levels", to_fixed(iddpm_levels(num_levels)))

    def levels(self) -> Tensor:
        """The noise levels, float32 [num_levels + 1], falling to 0."""
        return from_fixed(self.fixed_levels, torch.float32)

    def forward(self, sigma: Tensor) -> Coefficients:
        levels = self.levels().to(sigma.dtype)
        nearest = (sigma[:, None] - levels).abs().argmin(1)
        noise = (len(levels) - 2 - nearest).to(sigma.dtype)
        return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), noise


def to_fixed(numbers: Tensor) -> Tensor:
    """Numbers below 2^22 as fixed-point ones, int64 in units of 2^-40.

    A buffer of these keeps its digits when the dtype of its model is changed, which would round floats.
    """
    return (numbers.double() / UNIT).round().long()


def from_fixed(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_fixed`; exact for float32 numbers of at least 2^-17."""
    return numbers.to(dtype) * UNIT


def iddpm_levels(num_levels: int) -> Tensor:
    """The noise levels of improved DDPM, float32 [num_levels + 1], falling to 0 (table 1 of the paper)."""

    def alpha_bar(j: int) -> float:
        return math.sin(0.5 * math.pi * j / num_levels / (IDDPM_C2 + 1)) ** 2

    levels = [0.0]
    for j in range(num_levels, 0, -1):
        ratio = max(alpha_bar(j - 1) / alpha_bar(j), IDDPM_C1)
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / ratio - 1))
    return torch.tensor(levels[::-1], dtype=torch.float32, device="cpu")
