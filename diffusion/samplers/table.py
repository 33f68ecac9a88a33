"""The samplers: each is a function that writes a reverse process down as one row of numbers a step.

A row (`kernels.reverse_step`) is

    out    = uncond + guidance_scale * (cond - uncond)
    x0     = clip(p_x * x + p_o * out)
    x_next = a * x + b * x0 + d * x0_prev + e * out + s * z,   z ~ N(0, I)

and everything here is float64. All samplers take the same first arguments:

schedule: the model's NoiseSchedule. steps: number of steps, 1..T; None is the full chain. prediction_type:
"epsilon", "sample" (x_0) or "v_prediction". spacing: see `timesteps.spaced_timesteps`. clip: x_0 is clipped
to [-clip, clip]; None or inf leaves it. guidance_scale, guidance_interval: see `guidance.guidance_scales`.

They raise ValueError for values outside these, and for epsilon prediction where the first timestep visited
has zero SNR, since x_0 is undetermined there. Each step leads to the timestep of the next row, and the last
to x_0, without noise. A `SpacingWarning` tells, once a process, of a start too far below T - 1.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from ..kernels import Row
from ..process.bound import VARIANCES
from ..process.prediction import check_x0_determined, epsilon_coefficients, x0_coefficients
from ..process.schedule import NoiseSchedule
from ..utils.validation import choice, number, switch
from .guidance import guidance_scales
from .timesteps import spaced_timesteps

# sqrt(alphas_cumprod) where sampling starts, beyond that at T - 1. Above it, 2 % of the pixels in the bundled
# model's background are grey; at 0.7, nearly all.
MOST_SIGNAL = 0.2


class SpacingWarning(UserWarning):
    """Sampling starts, from pure noise, at a timestep whose images still have signal. Told once a process."""


_warned = False


@dataclass(frozen=True, eq=False)
class StepTable:
    """A sampler's steps. table: float64 [n, 12], one `Row` a step in the order in which they are taken.

    learned_variance: the variance of each step is the model's (its output has 2C channels).
    """

    table: torch.Tensor
    learned_variance: bool = False

    def __post_init__(self) -> None:
        # The steps run in float32; only the clip may be infinite.
        numbers = self.table.clone()
        numbers[:, Row._fields.index("clip")] = 0
        if not (numbers.abs() <= torch.finfo(torch.float32).max).all():
            raise ValueError(
                "the schedule or an option is too extreme: a step's coefficients overflow float32"
            )

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def timesteps(self) -> torch.Tensor:
        """int64 [n], strictly decreasing."""
        return self.table[:, Row._fields.index("timestep")].to(torch.int64)

    @cached_property
    def needs_x0_prev(self) -> bool:
        """Whether a step uses the x_0 of the step before."""
        return bool((self.table[:, Row._fields.index("d")] != 0).any())

    def column(self, name: str) -> list[float]:
        """One field of `kernels.Row` for all steps."""
        return self.table[:, Row._fields.index(name)].tolist()

    def row(self, i: int) -> Row:
        """Step i, as Python floats."""
        return Row(*self.table[i].tolist())


def _step_table(
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
    clip: float | None,
    guidance_scale: float,
    guidance_interval: tuple[float, float] | None,
    learned_variance: bool = False,
    **columns: torch.Tensor,
) -> StepTable:
    """The table with the columns that all samplers share, and a sampler's own: a, b, and those not 0."""
    clip = math.inf if clip is None else number("clip", clip, 0, infinite=True)
    columns["timestep"] = timesteps
    columns["guidance_scale"] = guidance_scales(timesteps, guidance_scale, guidance_interval)
    columns["p_x"], columns["p_o"] = x0_coefficients(prediction_type, alphas_cumprod)
    columns["clip"] = torch.full_like(alphas_cumprod, clip)
    table = alphas_cumprod.new_zeros(len(timesteps), len(Row._fields))
    for name, column in columns.items():
        table[:, Row._fields.index(name)] = column
    table[-1, Row._fields.index("s")] = 0
    return StepTable(table, learned_variance)


def _timesteps(schedule: NoiseSchedule, steps: int | None, spacing: str, **how: bool) -> torch.Tensor:
    """`spaced_timesteps`; warns of a start too far below T - 1."""
    global _warned
    timesteps = spaced_timesteps(schedule.T, steps, spacing, **how)
    first = int(timesteps[0])
    signal, at_end = schedule.alphas_cumprod[[first, -1]].sqrt().tolist()
    if not _warned and signal - at_end > MOST_SIGNAL:
        _warned = True
        warnings.warn(
            f"spacing {spacing!r} with steps={len(timesteps)} starts at timestep {first} of "
            f"0..{schedule.T - 1}. Images there have a signal of {signal:.0%}, the initial noise has none, "
            "and samples turn out grey. Use spacing='trailing', which starts at the last timestep",
            SpacingWarning,
            stacklevel=3,
        )
    return timesteps


def _following(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """alphas_cumprod at the timestep that each step leads to: the next one's, and 1 (no noise) at the end."""
    return torch.cat([alphas_cumprod[1:], alphas_cumprod.new_ones(1)])


def ddpm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = 1.0,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    variance: str = "fixed_small",
) -> StepTable:
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2 and eq. 7), strided where steps < T.

    variance: "fixed_small" is the posterior's, "fixed_large" beta, both for the stride taken; "learned_range"
    interpolates between their logarithms by the model's second half of channels (Nichol & Dhariwal 2021,
    arXiv 2102.09672, eq. 15). diffusers adds noise in the last step too where that is not at timestep 0
    (trailing, fixed_large or learned_range); this does not.
    """
    choice("variance", variance, VARIANCES)
    timesteps = _timesteps(schedule, steps, spacing)
    current = schedule.alphas_cumprod[timesteps]
    following = _following(current)
    alpha = current / following
    beta = 1 - alpha
    posterior_variance = (1 - following) / (1 - current) * beta
    if variance == "learned_range":
        # The posterior variance of the last step is 0, and its logarithm is clipped; s is 0 there.
        noise = {
            "s": torch.ones_like(beta),
            "log_var_min": posterior_variance.clamp(min=1e-20).log(),
            "log_var_max": beta.log(),
        }
    else:
        noise = {"s": (posterior_variance if variance == "fixed_small" else beta).sqrt()}
    return _step_table(
        timesteps,
        current,
        prediction_type,
        clip,
        guidance_scale,
        guidance_interval,
        learned_variance=variance == "learned_range",
        a=alpha.sqrt() * (1 - following) / (1 - current),
        b=following.sqrt() * beta / (1 - current),
        **noise,
    )


def ddim(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = 1.0,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
) -> StepTable:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16). eta: 0 is deterministic, 1 is ancestral.

    use_clipped_model_output: whether the noise prediction follows from the clipped x_0, as in
    guided-diffusion, or is the model's own, as in diffusers unless told otherwise. Under guidance the
    difference is large: where x_0 is clipped and the noise prediction is not, the two no longer make up x,
    and images fall apart.

    Every step leads to the next timestep visited, the paper's tau_{i-1}. diffusers' DDIMScheduler leads from
    t to t - T // steps instead. That is the same timestep with leading, and with trailing where steps divides
    T. Elsewhere it is another one, and images of diffusers keep noise. ValueError for an eta that is negative
    or so large that some step would add more noise than its timestep has.
    """
    eta = number("eta", eta, 0)
    switch("use_clipped_model_output", use_clipped_model_output)
    timesteps = _timesteps(schedule, steps, spacing)
    current = schedule.alphas_cumprod[timesteps]
    following = _following(current)
    s = eta * ((1 - following) / (1 - current) * (1 - current / following)).sqrt()
    remaining = 1 - following - s**2
    if (remaining < -1e-12).any():
        raise ValueError(f"eta {eta} is too large: a step would add more noise than its timestep has; try 1")
    direction = remaining.clamp(min=0).sqrt()
    if use_clipped_model_output:  # eps = (x - alpha x_0) / sigma
        a = direction / (1 - current).sqrt()
        columns = {"a": a, "b": following.sqrt() - a * current.sqrt()}
    else:
        q_x, q_o = epsilon_coefficients(prediction_type, current)
        columns = {"a": direction * q_x, "b": following.sqrt(), "e": direction * q_o}
    return _step_table(
        timesteps,
        current,
        prediction_type,
        clip,
        guidance_scale,
        guidance_interval,
        s=s,
        **columns,
    )


def dpmpp_2m(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = 1.0,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    sde: bool = False,
) -> StepTable:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), or its SDE form (eq. 19).

    The first and the last step, which goes to x_0 without noise, are of first order. Timesteps: leading and
    linspace leave out 0 (see `timesteps.spaced_timesteps`), but for the full chain, which visits every
    timestep; there the grids of diffusers would repeat one.
    """
    switch("sde", sde)
    timesteps = _timesteps(schedule, steps, spacing, skip_zero=True)
    current = schedule.alphas_cumprod[timesteps]
    check_x0_determined(prediction_type, current)
    # The solver runs in lambda = log(alpha / sigma), so zero SNR stands for 2^-24 (as in diffusers), or for
    # less where the next timestep is nearly as noisy.
    current = torch.where(current > 0, current, (_following(current) / 2).clamp(max=2**-24))
    following = _following(current)
    log_snr_half = 0.5 * torch.log(current / (1 - current))
    h = torch.cat([log_snr_half[1:], log_snr_half.new_full((1,), math.inf)]) - log_snr_half
    gain = -torch.expm1(-2 * h if sde else -h)
    b = following.sqrt() * gain
    # D = x0 + (x0 - x0_prev) / (2 r), r = h_prev / h; without the second term in the first and last step.
    extrapolation = torch.zeros_like(h)
    extrapolation[1:-1] = 0.5 * h[1:-1] / h[:-2]
    a = ((1 - following) / (1 - current)).sqrt()
    return _step_table(
        timesteps,
        current,
        prediction_type,
        clip,
        guidance_scale,
        guidance_interval,
        a=a * torch.exp(-h) if sde else a,
        b=b * (1 + extrapolation),
        d=-b * extrapolation,
        s=((1 - following) * gain).sqrt() if sde else torch.zeros_like(h),
    )


SAMPLERS: dict[str, Callable[..., StepTable]] = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpmpp_2m}
