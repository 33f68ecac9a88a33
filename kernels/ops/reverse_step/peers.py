"""The cases of reverse_step and reverse_step_, and the code that replaces them in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..._registry import Subject
from . import reference
from .arguments import Arguments
from .cases import BENCHMARKED, CASES, InPlace
from .coefficients import StepCoefficients


def _reverse_step(
    case: object,
    x: Tensor,
    model_output: Tensor,
    row: StepCoefficients,
    *,
    noise: Tensor | None,
    seed: int,
    sample_ids: Tensor,
    stream: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x) if noise is None else noise
    return reference.reverse_step(Arguments(x, model_output, row, noise=noise, **options))


def _reverse_step_(
    case: InPlace,
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    counter: Tensor,
    *,
    sample_ids: Tensor,
    x0: Tensor | None,
    noise: Tensor | None,
    unet_input: Tensor,
    **options: Any,
) -> None:
    noise = torch.randn_like(x) if noise is None else noise
    x_next, predicted = reference.reverse_step(
        Arguments(x, model_output, case.case.row, x0_prev=x0, noise=noise, **options)
    )
    x.copy_(x_next)
    if x0 is not None:
        x0.copy_(predicted)
    unet_input.unflatten(0, (-1, len(x))).copy_(x)


IN_PLACE = {name: InPlace(case) for name, case in CASES.items()}

SUBJECTS = {
    "reverse_step": Subject(CASES, _reverse_step, BENCHMARKED, in_graph=False),
    "reverse_step_": Subject(IN_PLACE, _reverse_step_, BENCHMARKED, in_place=True),
}
