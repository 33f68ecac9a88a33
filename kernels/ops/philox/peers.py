"""The cases of philox_normal, and the calls that replace it in plain PyTorch."""

import torch

from ..._registry import Subject
from .cases import BENCHMARKED, CASES


def _philox_normal(case: object, shape: tuple[int, ...], *, device: str, **counters: object) -> torch.Tensor:
    return torch.randn(shape, device=device)


SUBJECTS = {
    "philox_normal": Subject(
        CASES,
        _philox_normal,
        BENCHMARKED,
        dtypes=(torch.float32,),
        inputs=lambda case, dtype, device, seed: case.inputs(device),
    )
}
