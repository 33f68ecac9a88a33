"""NoiseLevels: the process x = x_0 + sigma eps of EDM, over continuous noise levels sigma.

Notation of Karras et al. 2022, arXiv 2206.00364.
"""

from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch

from ..utils.validation import known_names, number, numbers, refuse, typed
from ..utils.words import counted
from .schedule import NoiseSchedule

KIND = "noise_levels"
MAX_STEPS = 1_000_000


@dataclass(frozen=True, repr=False)
class NoiseLevels:
    """x = x_0 + sigma eps for noise levels sigma, which are the timesteps of the network.

    sigma_min, sigma_max: the range of levels that the network knows; None for no upper bound.
    levels: the only levels that it knows, falling; None for all. They end at 0 and so have no sigma_min.

    It stands in a model where others have a `NoiseSchedule`. ValueError for values out of range, and from
    `T`, `betas` and `alphas_cumprod`, which such a process does not have.
    """

    sigma_min: float = 0.0
    sigma_max: float | None = None
    levels: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        low = number("sigma_min", self.sigma_min, 0)
        object.__setattr__(self, "sigma_min", low)
        if self.sigma_max is not None:
            object.__setattr__(self, "sigma_max", number("sigma_max", self.sigma_max, above=low))
        if self.levels is not None:
            levels = numbers("levels", self.levels)
            if len(levels) < 2 or not (levels[:-1] > levels[1:]).all() or levels[-1] < 0:
                refuse("levels", "two or more falling numbers, none below 0", list(self.levels))
            object.__setattr__(self, "levels", tuple(levels.tolist()))

    @classmethod
    def of(cls, preconditioning: str, levels: list[float] | None = None) -> "NoiseLevels":
        """The levels of a preconditioning of `models.edm_preconditioning`; levels: those of "iddpm"."""
        if preconditioning == "iddpm":
            assert levels is not None
            return cls(levels[-2], levels[0], tuple(levels))
        # "vp": the levels of t = 1e-5 and t = 1 in Song et al. 2021, arXiv 2011.13456; "ve": theirs, too.
        ranges = {"edm": (0.0, None), "vp": (9.765626e-4, 152.1674), "ve": (0.02, 100.0)}
        return cls(*ranges[preconditioning])

    def nearest(self, sigma: torch.Tensor) -> torch.Tensor:
        """The levels nearest to sigma, like it; sigma itself where the network knows all levels."""
        if self.levels is None:
            return sigma
        levels = torch.tensor(self.levels, dtype=sigma.dtype, device=sigma.device)
        return levels[(sigma[..., None] - levels).abs().argmin(-1)]

    def to_config(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; `from_config` makes the same levels of it."""
        levels = None if self.levels is None else list(self.levels)
        return {"kind": KIND, "sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "levels": levels}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseLevels":
        """The levels that `to_config` described; ValueError for other keys or values."""
        values = dict(typed("a process's configuration", config, dict))
        values.pop("kind", None)
        known_names("noise level option", values, [field.name for field in fields(cls)])
        if values.get("levels") is not None:
            values["levels"] = typed("levels", values["levels"], tuple[float, ...])
        return cls(**values)

    @property
    def max_steps(self) -> int:
        """The largest number of steps of a sampler."""
        return MAX_STEPS

    @property
    def summary(self) -> str:
        """The levels in a few words."""
        high = "infinity" if self.sigma_max is None else f"{self.sigma_max:g}"
        return f"noise levels {self.sigma_min:g} to {high}"

    @property
    def name(self) -> str:
        """The kind of process."""
        return "noise levels"

    def __repr__(self) -> str:
        """One line, in which known levels are shown by their number."""
        levels = "" if self.levels is None else f", {counted(len(self.levels), 'level')}"
        return f"NoiseLevels(sigma_min={self.sigma_min:g}, sigma_max={self.sigma_max}{levels})"

    @property
    def T(self) -> int:
        """None; ValueError."""
        self._refuse()

    @property
    def betas(self) -> torch.Tensor:
        """None; ValueError."""
        self._refuse()

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """None; ValueError."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            "this model has continuous noise levels (EDM), not a schedule of T timesteps; "
            "it samples by the sampler 'heun'"
        )


def process_from_config(config: dict[str, Any]) -> NoiseSchedule | NoiseLevels:
    """The schedule or noise levels that `to_config` described; ValueError for anything else."""
    if typed("a schedule's configuration", config, dict).get("kind") == KIND:
        return NoiseLevels.from_config(config)
    return NoiseSchedule.from_config(config)


def random_levels(count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Random noise levels, float32 [count]: ln(sigma) from N(-1.2, 1.2^2) (table 1 of the paper)."""
    return torch.exp(torch.randn(count, device=device) * 1.2 - 1.2)
