"""Attention by wgmma beside the kernel of every device: agreement with float64, then times.

`attention` takes it only where WGMMA in kernels/ops/attention/native.py is set, which these results decide. A
kernel whose barriers are wrong never ends, so this part has nothing else, and its jobs short limits.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diffusion.kernels import attention
from diffusion.kernels._tolerance import wrong
from diffusion.kernels.ops.attention import native
from diffusion.kernels.ops.attention.arguments import Arguments

from . import device, ops, parity
from .part import Finding, Job, Run

SHAPES = tuple((batch, *sizes) for sizes in ops.ATTENTION for batch in ops.BATCHES)


def jobs(run: Run) -> list[Job]:
    shapes = ((2, 16, 32),) if run.dry_run else SHAPES
    first = ops.attend(*shapes[0]).call(run.device, torch.bfloat16)[0]
    reason = None if run.dry_run else native.refuses_wgmma(Arguments(*first))
    if reason is not None:
        return [("refused", lambda: run.record(refused=reason))]
    found: list[Job] = [("tests", lambda: parity.tests(run))]
    found += [(f"float64 {shape}", partial(agree, run, shape)) for shape in shapes]
    return found + [(f"time {shape}", partial(compare, run, shape)) for shape in shapes]


def by_wgmma(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On the CPU, which lacks the operator, what `attention` takes."""
    return native.attention_by_wgmma(Arguments(q, k, v)) if q.is_cuda else attention(q, k, v)


def by_mma(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return native.attention(Arguments(q, k, v)) if q.is_cuda else attention(q, k, v)


KERNELS: dict[str, Callable[..., Tensor]] = {"wgmma": by_wgmma, "mma": by_mma}


def agree(run: Run, shape: tuple[int, int, int]) -> None:
    """Records the largest errors of both kernels; the rule is that of the tests."""
    tensors = ops.attend(*shape).call(run.device, torch.bfloat16)[0]
    exact = attention(*(t.double() for t in tensors), backend="reference")
    peer = attention(*tensors, backend="reference")
    results = {name: kernel(*tensors) for name, kernel in KERNELS.items()}
    errors = {name: (out.double() - exact).abs().max().item() for name, out in results.items()}
    reason = wrong(results["wgmma"], peer, exact)
    run.record(shape=shape, errors=errors, wrong=reason)
    if reason is not None:
        raise Finding(reason)


def compare(run: Run, shape: tuple[int, int, int]) -> None:
    problem = ops.attend(*shape)
    count, _ = device.calls_beyond_cache(problem.nbytes)
    calls = [problem.call(run.device, torch.bfloat16) for _ in range(count)]
    run.record(
        shape=shape, times={name: device.call_seconds(kernel, calls) for name, kernel in KERNELS.items()}
    )
