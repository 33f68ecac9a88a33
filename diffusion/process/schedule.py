"""The noise schedule: the variances of signal and noise in x_t, for every timestep, in float64."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..utils.validation import choice, number, numbers, shown, switch, typed, whole_number

MOST_TIMESTEPS = 1_000_000  # T; published models have up to 4,000


def _linspace(start: float, end: float, T: int) -> torch.Tensor:
    return torch.linspace(start, end, T, dtype=torch.float64, device="cpu")


def _linear(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    return _linspace(beta_start, beta_end, T)


def _scaled_linear(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    beta_start, beta_end = number("beta_start", beta_start, 0), number("beta_end", beta_end, 0)
    return _linspace(beta_start**0.5, beta_end**0.5, T) ** 2


def _cosine(T: int, s: float, max_beta: float) -> torch.Tensor:
    s = number("s", s, above=-1)
    alphas_cumprod = torch.cos((_linspace(0, 1, T + 1) + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=max_beta)


def _sigmoid(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    return torch.sigmoid(_linspace(-6, 6, T)) * (beta_end - beta_start) + beta_start


# Each kind of schedule: the function that makes its betas, and the names of its numbers.
_KINDS = {
    "linear": (_linear, ("beta_start", "beta_end")),
    "scaled_linear": (_scaled_linear, ("beta_start", "beta_end")),
    "cosine": (_cosine, ("s", "max_beta")),
    "sigmoid": (_sigmoid, ("beta_start", "beta_end")),
}


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps for t = 0..T-1 (Ho et al. 2020,
    arXiv 2006.11239, eq. 4).

    Made by `linear`, `scaled_linear`, `cosine`, `sigmoid`, `from_betas` or `from_config`. The tables are
    float64 on the CPU, each [T]. Callers compute coefficients in float64 and cast only the results.

    betas: float64 [T] such that alphas_cumprod falls strictly, starts below 1 and stays above 0, but for
    the last, which may be 0 (zero terminal SNR). ValueError otherwise, and for a T above a million.
    """

    betas: torch.Tensor
    _config: dict[str, Any]

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or len(self.betas) == 0:
            raise ValueError(
                f"betas must be a list of at least one number, not of shape {list(self.betas.shape)}"
            )
        whole_number("T", len(self.betas), 1, MOST_TIMESTEPS)
        if not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError(
                f"betas must be in (0, 1]; these lie in [{self.betas.min():g}, {self.betas.max():g}]"
            )
        before = torch.cat([self.betas.new_ones(1), self.alphas_cumprod[:-1]])
        if not (self.alphas_cumprod < before).all():
            raise ValueError(
                "betas must let alphas_cumprod fall at every timestep, and reach 0 at the last one only; "
                "make them larger than 1e-15 or fewer, and only the last of them 1"
            )

    @property
    def T(self) -> int:
        """Number of timesteps, which are 0..T-1."""
        return len(self.betas)

    @cached_property
    def alphas(self) -> torch.Tensor:
        """1 - betas, float64 [T]."""
        return 1 - self.betas

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """Product of alphas[0..t], float64 [T]: the signal's share of x_t's variance."""
        return torch.cumprod(self.alphas, dim=0)

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "NoiseSchedule":
        """Betas evenly spaced from beta_start to beta_end, both in (0, 1) (Ho et al. 2020, section 4)."""
        return cls.from_config({"kind": "linear", "T": T, "beta_start": beta_start, "beta_end": beta_end})

    @classmethod
    def scaled_linear(
        cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> "NoiseSchedule":
        """Square roots of the betas evenly spaced (Rombach et al. 2022, arXiv 2112.10752)."""
        return cls.from_config(
            {"kind": "scaled_linear", "T": T, "beta_start": beta_start, "beta_end": beta_end}
        )

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> "NoiseSchedule":
        """alphas_cumprod a squared cosine with offset s > -1, betas at most max_beta (Nichol & Dhariwal 2021,
        arXiv 2102.09672, eq. 17)."""
        return cls.from_config({"kind": "cosine", "T": T, "s": s, "max_beta": max_beta})

    @classmethod
    def sigmoid(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "NoiseSchedule":
        """Betas on a logistic curve, over [-6, 6], from beta_start to beta_end (Xu et al. 2022, GeoDiff,
        arXiv 2203.02923)."""
        return cls.from_config({"kind": "sigmoid", "T": T, "beta_start": beta_start, "beta_end": beta_end})

    @classmethod
    def from_betas(cls, betas: Any) -> "NoiseSchedule":
        """A schedule from T numbers: a sequence, array or tensor, with the conditions of the class."""
        betas = numbers("betas", betas)
        return cls(betas, {"kind": "betas", "betas": betas.tolist()})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """The schedule that `to_config` described; ValueError for an unknown kind or other keys."""
        values = dict(typed("a schedule's configuration", config, dict))
        kind = choice("kind of schedule", values.pop("kind", None), (*_KINDS, "betas"))
        zero_terminal_snr = switch("zero_terminal_snr", values.pop("zero_terminal_snr", False))
        make_betas, names = _KINDS.get(kind, (None, ()))
        needed = ("betas",) if make_betas is None else ("T", *names)
        if set(values) != set(needed):
            raise ValueError(
                f"a schedule of kind {kind!r} needs the keys {', '.join(needed)}, not {shown(list(values))}"
            )
        if make_betas is None:
            schedule = cls.from_betas(values["betas"])
        else:
            T = whole_number("T", values.pop("T"), 1, MOST_TIMESTEPS)
            ends = {name: number(name, value) for name, value in values.items()}
            schedule = cls(make_betas(T, **ends), {"kind": kind, "T": T, **ends})
        return schedule.rescale_zero_terminal_snr() if zero_terminal_snr else schedule

    def to_config(self) -> dict[str, Any]:
        """The schedule as a dictionary that JSON can hold; `from_config` makes the same schedule of it."""
        return dict(self._config)

    def rescale_zero_terminal_snr(self) -> "NoiseSchedule":
        """This schedule shifted and scaled so that alphas_cumprod[T-1] is 0 and alphas_cumprod[0] stays.

        Lin et al. 2023, arXiv 2305.08891, algorithm 1. ValueError when T is 1.

        Epsilon prediction does not determine x_0 at the last timestep of such a schedule.
        """
        if self.T == 1:
            raise ValueError("zero terminal SNR needs T of at least 2")
        root = self.alphas_cumprod.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alphas_cumprod = root**2
        alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
        return NoiseSchedule(1 - alphas, {**self._config, "zero_terminal_snr": True})
