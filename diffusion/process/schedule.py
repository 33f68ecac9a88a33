"""The noise schedule: the variances of signal and noise in x_t, for every timestep, in float64."""

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, wraps
from inspect import signature
from typing import Any, Concatenate, ParamSpec

import torch

from ..utils.validation import choice, number, numbers, shown, switch, typed, whole_number

MAX_TIMESTEPS = 1_000_000  # T; published models have up to 4,000


_dtype = ContextVar("dtype", default=torch.float64)  # of the betas; float32 within `in_float32`


def _linspace(start: float, end: float, T: int) -> torch.Tensor:
    return torch.linspace(start, end, T, dtype=_dtype.get(), device="cpu")


P = ParamSpec("P")
_KINDS: dict[str, tuple[str, ...]] = {}  # kinds of schedule, each with the keys of its configuration


def _kind(
    make: Callable[Concatenate[Any, P], "NoiseSchedule"],
) -> Callable[Concatenate[Any, P], "NoiseSchedule"]:
    """Makes a classmethod of `NoiseSchedule` a kind of schedule, under the name of the method.

    The arguments of the method, T and numbers, are checked here, and are the keys of the configuration.
    """
    arguments = signature(make).replace(parameters=list(signature(make).parameters.values())[1:])

    @wraps(make)
    def checked(cls: Any, *args: P.args, **kwargs: P.kwargs) -> "NoiseSchedule":
        bound = arguments.bind(*args, **kwargs)
        bound.apply_defaults()
        values: dict[str, Any] = {"T": whole_number("T", bound.arguments.pop("T"), 1, MAX_TIMESTEPS)}
        values |= {name: number(name, value) for name, value in bound.arguments.items()}
        build: Callable[..., NoiseSchedule] = make  # a dictionary does not fit P
        schedule = build(cls, **values)
        return cls(schedule.betas, {"kind": make.__name__, **values})

    _KINDS[make.__name__] = tuple(arguments.parameters)
    return checked


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps for t = 0..T-1 (Ho et al. 2020,
    arXiv 2006.11239, eq. 4).

    Made by a classmethod with `@_kind`, such as `linear`, or by `from_config`. A new kind is one more such
    classmethod; configurations and recipes know it by its name and its arguments. The tables are float64 on
    the CPU, each [T]. Callers compute in float64 and cast only the results.

    betas: float64 [T] such that alphas_cumprod falls strictly, starts below 1 and stays above 0, but for
    the last, which may be 0 (zero terminal SNR). ValueError otherwise, and for a T above a million.
    """

    betas: torch.Tensor
    _config: dict[str, Any] | None = None  # by default the configuration of `from_betas`

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or len(self.betas) == 0:
            raise ValueError(
                f"betas must be a list of at least one number, not of shape {list(self.betas.shape)}"
            )
        whole_number("T", len(self.betas), 1, MAX_TIMESTEPS)
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

    @property
    def max_steps(self) -> int:
        """The largest number of steps of a sampler, T."""
        return self.T

    @property
    def summary(self) -> str:
        """The schedule in a few words."""
        return f"T = {self.T}"

    @property
    def name(self) -> str:
        """Kind and number of timesteps, such as "cosine T=1000"; "betas" for one of `from_betas`."""
        return f"{self.to_config()['kind']} T={self.T}"

    def __repr__(self) -> str:
        """One line: the calls that make the schedule, but that betas are shown by number and range."""
        config = dict(self._config or {"kind": "betas"})
        kind, calls = config.pop("kind"), ""
        for key, call in (
            ("zero_terminal_snr", ".rescale_zero_terminal_snr()"),
            ("float32", ".in_float32()"),
        ):
            calls += call if config.pop(key, False) else ""
        if kind == "betas":
            low, high = self.betas.min(), self.betas.max()
            return f"NoiseSchedule.from_betas({self.T} betas in [{low:.4g}, {high:.4g}]){calls}"
        return (
            f"NoiseSchedule.{kind}({', '.join(f'{key}={value:g}' for key, value in config.items())}){calls}"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which samplers compute coefficients: float32 after `in_float32`, else float64."""
        return torch.float32 if (self._config or {}).get("float32") else torch.float64

    @cached_property
    def alphas(self) -> torch.Tensor:
        """1 - betas, float64 [T]."""
        return 1 - self.betas

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """Product of alphas[0..t], float64 [T]: the signal's share of x_t's variance."""
        return torch.cumprod(self.alphas, dim=0)

    @classmethod
    @_kind
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "NoiseSchedule":
        """Betas evenly spaced from beta_start to beta_end, both in (0, 1) (Ho et al. 2020, section 4)."""
        return cls(_linspace(beta_start, beta_end, T))

    @classmethod
    @_kind
    def scaled_linear(
        cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> "NoiseSchedule":
        """Square roots of the betas evenly spaced (Rombach et al. 2022, arXiv 2112.10752)."""
        beta_start, beta_end = number("beta_start", beta_start, 0), number("beta_end", beta_end, 0)
        return cls(_linspace(beta_start**0.5, beta_end**0.5, T) ** 2)

    @classmethod
    @_kind
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> "NoiseSchedule":
        """alphas_cumprod a squared cosine with offset s > -1, betas at most max_beta (Nichol & Dhariwal 2021,
        arXiv 2102.09672, eq. 17)."""
        s = number("s", s, above=-1)
        times = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
        alphas_cumprod = torch.cos((times + s) / (1 + s) * math.pi / 2) ** 2
        betas = (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=max_beta)
        return cls(betas.to(_dtype.get()))

    @classmethod
    @_kind
    def sigmoid(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "NoiseSchedule":
        """Betas on a logistic curve, over [-6, 6], from beta_start to beta_end (Xu et al. 2022, GeoDiff,
        arXiv 2203.02923)."""
        return cls(torch.sigmoid(_linspace(-6, 6, T)) * (beta_end - beta_start) + beta_start)

    @classmethod
    def from_betas(cls, betas: Any) -> "NoiseSchedule":
        """A schedule from T numbers: a sequence, array or tensor, with the conditions of the class."""
        return cls(numbers("betas", betas).to(_dtype.get()))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """The schedule that `to_config` described; ValueError for an unknown kind or other keys."""
        values = dict(typed("a schedule's configuration", config, dict))
        kind = choice("kind of schedule", values.pop("kind", None), (*_KINDS, "betas"))
        zero_terminal_snr = switch("zero_terminal_snr", values.pop("zero_terminal_snr", False))
        float32 = switch("float32", values.pop("float32", False))
        needed = _KINDS.get(kind, ("betas",))
        if set(values) != set(needed):
            raise ValueError(
                f"a schedule of kind {kind!r} needs the keys {', '.join(needed)}, not {shown(list(values))}"
            )
        schedule = cls.from_betas(**values) if kind == "betas" else getattr(cls, kind)(**values)
        schedule = schedule.rescale_zero_terminal_snr() if zero_terminal_snr else schedule
        return schedule.in_float32() if float32 else schedule

    def to_config(self) -> dict[str, Any]:
        """The schedule as a dictionary that JSON can hold; `from_config` makes the same schedule of it."""
        return dict(self._config or {"kind": "betas", "betas": self.betas.tolist()})

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
        return NoiseSchedule(1 - alphas, {**self.to_config(), "zero_terminal_snr": True})

    def in_float32(self) -> "NoiseSchedule":
        """This schedule with the alphas_cumprod that code in float32 computes for it, such as diffusers'.

        They differ by up to 1e-4 of their value, and the images of such code with them, by more than the rest
        of its rounding. The tables here stay float64, but ddpm and ddim compute their steps from them in
        float32: where 1 - alphas_cumprod is small, that code loses digits, too.
        """
        config = self.to_config()
        token = _dtype.set(torch.float32)
        try:
            rounded = NoiseSchedule.from_config({**config, "float32": False}).alphas_cumprod.double()
        finally:
            _dtype.reset(token)
        betas = 1 - rounded / torch.cat([rounded.new_ones(1), rounded[:-1]])
        return NoiseSchedule(betas, {**config, "float32": True})
