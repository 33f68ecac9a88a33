"""The ops of DDPM's network for CIFAR-10: time, share of a copy's bandwidth, and PyTorch's best beside them.

Every call of a graph has buffers of its own, so that none finds them in the cache, where as many fit into the
memory. A result that is wrong is not timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion.kernels import attention, group_norm_silu, reverse_step_, step_counter
from diffusion.kernels._tolerance import wrong
from diffusion.kernels.ops.biased_sum.library import biased_sum_
from diffusion.kernels.ops.reverse_step import StepCoefficients

from . import device
from .part import Finding, Job, Run

BATCHES = (1, 64, 512)
STEP_BATCHES = (1, 16, 128, 512)
ATTENTION = ((256, 256), (64, 64))  # positions, width
# Channels and side of every map that is normalised.
NORMS = (
    (128, 32), (128, 16), (256, 16), (256, 8), (256, 4), (512, 4), (512, 8), (512, 16), (384, 16), (384, 32),
    (256, 32),
)  # fmt: skip
SUMS = ((128, 32), (256, 16))  # channels and side of maps with residuals
ROW = StepCoefficients(
    500,
    3.0,
    3.5791,
    -3.4365,
    1.0,
    coef_x=0.9949,
    coef_x0=0.0051,
    coef_x0_prev=0.0,
    coef_output=0.0,
    sigma=0.1003,
)
ROWS = 64  # rows of a call's table: more than its replays
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

Call = tuple[tuple, dict]


@dataclass(frozen=True)
class Problem:
    """An op on one shape.

    call: (device, dtype) -> arguments. ours: takes them and a backend. peers: take them. nbytes: bytes that
    must be read and written. check: (problem, call, backend) -> why the result is wrong, or None.
    """

    op: str
    shape: tuple[int, ...]
    call: Callable[[Any, torch.dtype], Call]
    ours: Callable[..., Any]
    peers: dict[str, Callable[..., Any]]
    nbytes: int
    check: Callable[..., str | None]

    @property
    def name(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))}"


def jobs(run: Run) -> list[Job]:
    found: list[Job] = [("copy", lambda: copy(run))]
    for problem in problems(run.dry_run):
        found.append((problem.name, partial(compare, run, problem, "auto" if run.dry_run else "cuda")))
    if not run.dry_run:
        for problem in (step(512), attend(512, 256, 256), norm(512, 128, 32), norm(512, 512, 16)):
            found.append((f"{problem.name}, triton", partial(compare, run, problem, "triton")))
    return found


def problems(dry_run: bool) -> list[Problem]:
    """In a dry run, one case of each kind; all cases are called once with fake tensors on a CUDA device."""
    real = [
        *(step(batch) for batch in STEP_BATCHES),
        *(attend(batch, *sizes) for sizes in ATTENTION for batch in BATCHES),
        *(norm(batch, *sizes) for sizes in NORMS for batch in BATCHES),
        *(summed(batch, *sizes) for sizes in SUMS for batch in BATCHES),
    ]
    if not dry_run:
        return real
    for problem in real:
        rehearse(problem)
    return [step(2, 8), attend(2, 16, 32), norm(2, 32, 8), summed(2, 32, 8)]


def rehearse(problem: Problem) -> None:
    """Calls the reference on fake tensors: device, shapes and layouts without memory."""
    with FakeTensorMode():
        args, kwargs = problem.call("cuda", torch.bfloat16)
        if problem.op != "reverse_step_":  # the reference reads its row on the host
            problem.ours(*args, backend="reference", **kwargs)
        next(reversed(problem.peers.values()))(*args, **kwargs)


# ---- The problems.


def norm(batch: int, channels: int, side: int) -> Problem:
    def call(where: Any, dtype: torch.dtype) -> Call:
        x = torch.randn(batch, channels, side, side, device=where, dtype=dtype)
        weight, bias = (torch.randn(channels, device=where, dtype=dtype) for _ in range(2))
        return (x.contiguous(memory_format=torch.channels_last), 32, weight, bias), {}

    def peer(x, groups, weight, bias):
        return F.silu(F.group_norm(x, groups, weight, bias))

    shape, nbytes = (batch, channels, side, side), 4 * batch * channels * side * side
    return Problem("group_norm_silu", shape, call, group_norm_silu, {"torch": peer}, nbytes, output_is_wrong)


def attend(batch: int, positions: int, width: int) -> Problem:
    def call(where: Any, dtype: torch.dtype) -> Call:
        packed = torch.randn(batch, positions, 3, 1, width, device=where, dtype=dtype)
        return packed.permute(2, 0, 3, 1, 4).unbind(0), {}

    def peer(backend, q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    peers = {name: partial(peer, backend) for name, backend in SDPA.items()}
    shape, nbytes = (batch, 1, positions, width), 8 * batch * positions * width
    return Problem("attention", shape, call, attention, peers, nbytes, output_is_wrong)


def summed(batch: int, channels: int, side: int) -> Problem:
    """Bias and residual, written into the first half of the channels that a later block reads joined."""

    def call(where: Any, dtype: torch.dtype) -> Call:
        def last(count: int) -> torch.Tensor:
            x = torch.randn(batch, count, side, side, device=where, dtype=dtype)
            return x.contiguous(memory_format=torch.channels_last)

        bias = torch.randn(channels, device=where, dtype=dtype)
        return (last(channels), bias, last(channels), last(2 * channels)[:, :channels]), {}

    def ours(x, bias, residual, out, *, backend):
        biased_sum_(x, bias, residual, out)

    def peer(x, bias, residual, out):
        torch.add(x + bias[:, None, None], residual, out=out)

    shape, nbytes = (batch, channels, side, side), 6 * batch * channels * side * side
    return Problem("biased_sum_", shape, call, ours, {"torch": peer}, nbytes, sum_is_wrong)


def step(batch: int, side: int = 32) -> Problem:
    """The guided step of a captured graph, on the output of a network in channels_last."""

    def call(where: Any, dtype: torch.dtype) -> Call:
        def last(count: int) -> torch.Tensor:
            x = torch.randn(count, 3, side, side, device=where, dtype=dtype)
            return x.contiguous(memory_format=torch.channels_last)

        conditional, unconditional = last(2 * batch).chunk(2)
        table = torch.tensor([ROW], dtype=torch.float64).to(where).repeat(ROWS, 1)
        args = (torch.randn(batch, 3, side, side, device=where), conditional, table)
        counter = torch.tensor([0, 0, 1, 0]).to(where)
        ids = torch.arange(batch, device=where)
        options = {"sample_ids": ids, "model_output_uncond": unconditional, "unet_input": last(2 * batch)}
        return (*args, counter), options

    def peer(x, conditional, table, counter, *, sample_ids, model_output_uncond, unet_input):
        uncond = model_output_uncond.float()
        out = uncond + ROW.guidance_scale * (conditional.float() - uncond)
        x0 = (ROW.x0_from_x * x + ROW.x0_from_output * out).clamp(-ROW.clip_x0, ROW.clip_x0)
        x.copy_(ROW.coef_x * x + ROW.coef_x0 * x0 + ROW.sigma * torch.randn_like(x))
        unet_input.unflatten(0, (2, -1)).copy_(x)

    shape, nbytes = (batch, 3, side, side), 16 * batch * 3 * side * side
    return Problem("reverse_step_", shape, call, reverse_step_, {"torch": peer}, nbytes, step_is_wrong)


# ---- Right or wrong.


def output_is_wrong(problem: Problem, call: Call, backend: str) -> str | None:
    args, kwargs = call
    exact = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    expected = problem.ours(*exact, backend="reference", **kwargs)
    peer = problem.ours(*args, backend="reference", **kwargs)
    return wrong(problem.ours(*args, backend=backend, **kwargs), peer, expected)


def sum_is_wrong(problem: Problem, call: Call, backend: str) -> str | None:
    """The sum is rounded once."""
    x, bias, residual, out = call[0]
    problem.ours(*call[0], backend=backend)
    expected = x.double() + bias.double()[:, None, None] + residual.double()
    excess = (out - expected).abs() - 0.51 * torch.finfo(out.dtype).eps * expected.abs()
    return None if excess.max().item() <= 1e-6 else f"it differs by {excess.max().item():.3g} from the sum"


def step_is_wrong(problem: Problem, call: Call, backend: str) -> str | None:
    """Every backend draws the same noise, to the last bits."""
    (x, output, table, _), options = call
    results = []
    for chosen in (backend, "reference"):
        state, unet_input = x.clone(), torch.empty_like(options["unet_input"])
        where = step_counter(0, device=x.device)
        problem.ours(state, output, table, where, backend=chosen, **options | {"unet_input": unet_input})
        results.append((state, unet_input))
    (ours, written), (expected, _) = results
    error = (ours - expected).abs().max().item()
    if not error <= 1e-4 * expected.abs().max().item():
        return f"x differs from the reference by {error:.3g}"
    same = torch.equal(written, torch.cat([ours, ours]).to(written.dtype))
    return None if same else "unet_input is not the x that was written"


# ---- Times.


def copy(run: Run) -> None:
    run.record(bytes_per_second=device.copy_bandwidth())


def compare(run: Run, problem: Problem, backend: str) -> None:
    """The op and its peers, each in a graph of its own."""
    dtype = torch.bfloat16
    first = problem.call(run.device, dtype)
    count, cold = device.calls_beyond_cache(problem.nbytes)
    reason = problem.check(problem, first, backend)
    if reason is not None:
        raise Finding(f"{backend} is wrong: {reason}")
    calls = [first, *(problem.call(run.device, dtype) for _ in range(count - 1))]
    row = {"op": problem.op, "shape": problem.shape, "backend": backend, "bytes": problem.nbytes}
    row |= {"calls": count, "beyond_cache": cold}
    row["seconds"] = device.call_seconds(partial(problem.ours, backend=backend), calls)
    peers = {}
    for name, peer in problem.peers.items() if backend != "triton" else ():
        refusal = _refusal(peer, first)
        peers[name] = refusal or device.call_seconds(peer, calls)
    run.record(**row, peers=peers)


def _refusal(peer: Callable[..., Any], call: Call) -> str | None:
    """The reason why PyTorch has no such kernel for these arguments; asked before any capture."""
    try:
        peer(*call[0], **call[1])
    except RuntimeError as error:
        torch.cuda.synchronize()  # raises if it is the device that failed
        return str(error).strip().splitlines()[0][:100]
    return None
