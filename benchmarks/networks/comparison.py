"""One comparison: ways of a network take turns in one process, on the same weights."""

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..sampling import timing
from .ways import MODULE, WAYS, Task, sample

# Largest root-mean-square difference of an output, relative to the output, in float32 and in bfloat16.
AGREEMENT = {True: 1e-3, False: 0.1}


def relative_difference(output: Tensor, expected: Tensor) -> float:
    """The root-mean-square difference, relative to that of what is expected; NaN for another shape."""
    if output.shape != expected.shape:
        return float("nan")
    return ((output - expected).square().mean() / expected.square().mean()).sqrt().item()


def compare(
    task: Task, names: Sequence[str], steps: int, budget: float, repeats: int
) -> dict[str, dict[str, Any]]:
    """Seconds of an evaluation in a loop of `steps`, for each way; or, under "reason", why it is not timed.

    The module in float32 is the reference, whether it is timed or not. The seconds are medians of at least
    `repeats` loops, in about `budget` seconds.
    """
    rows: dict[str, dict[str, Any]] = {}
    network, inputs, runs = functools.cache(task.network), task.inputs(), {}
    with torch.no_grad():
        expected = WAYS[MODULE].make(task, network)(*inputs)
        for name in names:
            way = WAYS[name]
            try:
                evaluate = way.make(task, network)
                difference = relative_difference(evaluate(*inputs), expected)
            except Exception as error:  # a way can raise anything: a missing package, a failed compilation
                text = str(error).splitlines()[0] if str(error) else ""
                rows[name] = {"reason": f"{type(error).__name__}: {text}"}
                continue
            rows[name] = {"difference": difference}
            if not difference <= AGREEMENT[way.single]:
                rows[name]["reason"] = f"wrong by {difference:.2g} of the output, not timed"
                continue
            runs[name] = partial(sample, task, evaluate, inputs, steps)
    for name, seconds in timing.medians(runs, "cpu", budget, repeats).items():
        rows[name]["seconds"] = seconds / steps
    return rows


def peak_memory(task: Task, name: str) -> int | None:
    """Peak resident memory, in bytes, of a process that makes one way and evaluates it twice."""
    evaluate, inputs = WAYS[name].make(task, functools.cache(task.network)), task.inputs()
    with torch.no_grad():
        for _ in range(2):
            evaluate(*inputs)
    return timing.peak_memory()
