"""How fast every backend is beside PyTorch's own ops: the evidence for what "auto" chooses.

What is compared runs in turn in one process, so that a busy machine slows all of it alike; a time is the
median over the rounds. Inputs are random. A few buffers take turns, so that no call finds the input of the
call before in the nearest cache; together they may well fit into the last one, as in a model. On a CUDA
device, calls that a graph can hold are replayed from one, where launches cost what they cost a sampler.
"""

import importlib.metadata
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _triton
from ._dispatch import Op
from ._native import build_info
from ._tolerance import wrong
from .ops.attention import attention
from .ops.attention import cases as attention_cases
from .ops.attention import op as attention_op
from .ops.convolution import cases as conv3x3_cases
from .ops.convolution import conv2d_cases as conv2d_cases
from .ops.convolution.differentiable import conv2d
from .ops.convolution.differentiable import op as conv2d_op
from .ops.convolution.fused import conv3x3, pack_conv3x3
from .ops.convolution.fused import op as conv3x3_op
from .ops.group_norm_silu import cases as norm_cases
from .ops.group_norm_silu import group_norm_silu
from .ops.group_norm_silu import op as norm_op
from .ops.philox import cases as philox_cases
from .ops.philox import op as philox_op
from .ops.philox import philox_normal
from .ops.reverse_step import cases as step_cases
from .ops.reverse_step import op as step_op
from .ops.reverse_step import reference as step_reference
from .ops.reverse_step import reverse_step
from .ops.reverse_step.in_place import op as in_place_op
from .ops.reverse_step.in_place import reverse_step_

BUFFERS = 3
NO_CACHE = 1 << 28  # a call with so many bytes of input needs no second buffer
ROUNDS = (5, 200)  # fewest and most
SAMPLE = 2e-4  # seconds: shorter calls are timed several at once, at most CALLS
CALLS = 50
TIE = 1.1  # auto may be slower than the fastest backend by this factor: the noise of a quiet machine
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Subject(NamedTuple):
    """An op to time.

    cases: by name, those of real models. inputs: arguments of a call, from case, dtype, device and seed.
    torch_ops: what a user of PyTorch alone writes, from the case and the arguments of a call.
    in_place: the op returns None and has overwritten its arguments.
    in_graph: a CUDA graph can hold a call, which copies nothing from the host.
    accuracy: what the op is documented to lose, from its arguments; see `_tolerance.wrong`.
    """

    function: Callable[..., Any]
    op: Op
    cases: dict[str, Any]
    torch_ops: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    inputs: Callable[..., tuple[tuple, dict]] = lambda case, *where: case.inputs(*where)
    differentiable: bool = False
    in_place: bool = False
    in_graph: bool = True
    accuracy: Callable[[tuple], float] = lambda args: 0.0


def _group_norm_silu(
    case,
    x,
    num_groups,
    weight=None,
    bias=None,
    eps=1e-5,
    *,
    add=None,
    scale=None,
    shift=None,
    activation="silu",
):
    spatial = (1,) * (x.ndim - 2)
    if add is not None:
        x = x + add.reshape(*add.shape, *spatial)
    h = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        h = h * (1 + scale.reshape(*scale.shape, *spatial)) + shift.reshape(*shift.shape, *spatial)
    return F.silu(h) if activation == "silu" else h


def _attention(case, q, k, v, *, scale=None):
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _conv2d(case, x, weight, bias, *, padding):
    return F.conv2d(x, weight, bias, padding=padding)


def _conv3x3_inputs(case, dtype, device, seed):
    """With the weight packed for the map that it is used on."""
    (x, weight, bias), options = case.inputs(dtype, device, seed)
    factor = 2 if options["upsample"] else 1
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    packed = pack_conv3x3(weight, *(factor * size for size in x.shape[2:]), dtype)
    options = {name: t.to(dtype) if isinstance(t, Tensor) else t for name, t in options.items()}
    return (x, packed, bias.to(dtype)), options


def _conv3x3(case, x, weight, bias, *, num_groups=None, residual=None, upsample, activation, **norm):
    h = x
    if num_groups is not None:
        h = F.silu(F.group_norm(x, num_groups, norm["norm_weight"], norm["norm_bias"]))
    if upsample:
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
    h = F.conv2d(h, weight.weight, bias, padding=1)
    return h if residual is None else h + residual


def _philox_normal(case, shape, *, device, **counters):
    return torch.randn(shape, device=device)


def _reverse_step(case, x, model_output, row, *, noise, seed, sample_ids, stream, **options):
    noise = torch.randn_like(x) if noise is None else noise
    return step_reference.reverse_step(x, model_output, row, noise=noise, **options)


def _reverse_step_(case, x, model_output, table, counter, *, sample_ids, x0, noise, unet_input, **options):
    noise = torch.randn_like(x) if noise is None else noise
    x_next, predicted = step_reference.reverse_step(
        x, model_output, case.case.row, x0_prev=x0, noise=noise, **options
    )
    x.copy_(x_next)
    if x0 is not None:
        x0.copy_(predicted)
    unet_input.unflatten(0, (-1, len(x))).copy_(x)


def _named(cases: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: cases[name] for name in names}


_NORM_CASES = _named(norm_cases.CASES, norm_cases.BENCHMARKED)
_ATTENTION_CASES = _named(attention_cases.CASES | attention_cases.LARGE, attention_cases.BENCHMARKED)
_PHILOX_CASES = _named(philox_cases.CASES, philox_cases.BENCHMARKED)
_STEP_CASES = _named(step_cases.CASES, step_cases.BENCHMARKED)

SUBJECTS = {
    "group_norm_silu": Subject(group_norm_silu, norm_op, _NORM_CASES, _group_norm_silu, differentiable=True),
    "attention": Subject(attention, attention_op, _ATTENTION_CASES, _attention, differentiable=True),
    "conv3x3": Subject(
        conv3x3,
        conv3x3_op,
        conv3x3_cases.BENCHMARKED,
        _conv3x3,
        inputs=_conv3x3_inputs,
        accuracy=lambda args: args[1].accuracy,
    ),
    "conv2d": Subject(
        conv2d,
        conv2d_op,
        conv2d_cases.BENCHMARKED,
        _conv2d,
        dtypes=(torch.bfloat16,),
        differentiable=True,
    ),
    "philox_normal": Subject(
        philox_normal,
        philox_op,
        _PHILOX_CASES,
        _philox_normal,
        dtypes=(torch.float32,),
        inputs=lambda case, dtype, device, seed: case.inputs(device),
    ),
    "reverse_step": Subject(reverse_step, step_op, _STEP_CASES, _reverse_step, in_graph=False),
    "reverse_step_": Subject(
        reverse_step_,
        in_place_op,
        {name: step_cases.InPlace(case) for name, case in _STEP_CASES.items()},
        _reverse_step_,
        in_place=True,
    ),
}


class Call(NamedTuple):
    """Arguments of an op, and the gradient of its output, where the op is to be differentiated."""

    args: tuple
    kwargs: dict
    upstream: Tensor | None
    leaves: list[Tensor]

    @classmethod
    def of(cls, args: tuple, kwargs: dict, upstream: Tensor | None) -> "Call":
        leaves = []
        if upstream is not None:
            values = (*args, *kwargs.values())
            leaves = [t.requires_grad_() for t in values if isinstance(t, Tensor) and t.is_floating_point()]
        return cls(args, kwargs, upstream, leaves)

    def map(self, convert: Callable[[Tensor], Tensor]) -> "Call":
        def one(t):
            return convert(t.detach()) if isinstance(t, Tensor) else t

        kwargs = {name: one(t) for name, t in self.kwargs.items()}
        return Call.of(tuple(map(one, self.args)), kwargs, one(self.upstream))

    def run(self, function: Callable[..., Any]) -> Any:
        out = function(*self.args, **self.kwargs)
        return out if self.upstream is None else (out, *torch.autograd.grad(out, self.leaves, self.upstream))

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.args, *self.kwargs.values()) if isinstance(t, Tensor))


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


class Comparison:
    """An op's backends and their peers on one case, ready to be timed.

    backward: with the gradient by every tensor. peers: beside the backends, called with the case and the
    arguments of the op; the first is the one that ratios refer to. Default: {"torch": PyTorch's own ops}.

    runs: what can be timed, by name; wrong: the backends that cannot, since their results are not right.
    """

    def __init__(
        self,
        name: str,
        case: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        backward: bool = False,
        peers: Mapping[str, Callable[..., Any]] | None = None,
    ):
        self.name, self.case, self.dtype, self.backward = name, case, dtype, backward
        self.subject, self.device = SUBJECTS[name], torch.device(device)
        self.peers = {"torch": self.subject.torch_ops} if peers is None else dict(peers)
        self.calls = [self._call(0)]
        if self.calls[0].nbytes() < NO_CACHE:
            self.calls += [self._call(seed) for seed in range(1, BUFFERS)]
        with self.grad_mode():
            self._check()

    def grad_mode(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(self.backward)

    def _call(self, seed: int) -> Call:
        args, kwargs = self.subject.inputs(self.case, self.dtype, self.device, seed)
        upstream = None
        if self.backward:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                out = self.subject.function(*args, backend="reference", **kwargs)
            upstream = torch.empty_like(out).copy_(torch.randn(out.shape, generator=generator, device="cpu"))
        return Call.of(args, kwargs, upstream)

    def _check(self) -> None:
        op, (args, kwargs, *_) = self.subject.op, self.calls[0]
        self.auto = op.choose("auto", *args, **kwargs)
        serving = op.serving(*args, **kwargs)
        if _triton.INTERPRETED:  # the time of Python
            serving = [backend for backend in serving if backend != "triton"]
        backends = {backend: partial(self.subject.function, backend=backend) for backend in serving}
        expected = [t.double() for t in self._results(backends["reference"], _double)]
        peers = self._results(backends["reference"])
        self.wrong, self.runs = {}, {}
        for backend, function in backends.items():
            results = zip(self._results(function), peers, expected, strict=True)
            accuracy = self.subject.accuracy(args)
            reason = next(filter(None, (wrong(*three, accuracy=accuracy) for three in results)), None)
            if reason is None:
                self.runs[backend] = function
            else:
                self.wrong[backend] = reason
        self.runs |= {peer: partial(function, self.case) for peer, function in self.peers.items()}

    def _results(
        self, function: Callable[..., Any], convert: Callable[[Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        call = self.calls[0]
        if convert or self.subject.in_place:
            call = call.map(convert or Tensor.clone)
        out = call.run(function)
        if self.subject.in_place:
            out = (call.args[0], *(call.kwargs[name] for name in ("x0", "unet_input")))
        return [t.detach() for t in (out if isinstance(out, tuple) else (out,)) if t is not None]

    def _pass(self, name: str) -> Callable[[], None]:
        """One call on each buffer."""
        function = self.runs[name]

        def run() -> None:
            for call in self.calls:
                call.run(function)

        # The reference may read from the device what a graph would not wait for.
        in_graph = self.device.type == "cuda" and self.subject.in_graph and name != "reference"
        return _captured(run) if in_graph else run

    def one_call(self, name: str) -> Callable[[], Any]:
        """A call on one buffer after another; on a CUDA device it waits for the result."""
        function, calls = self.runs[name], itertools.cycle(self.calls)

        def run() -> Any:
            out = next(calls).run(function)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return out

        return run

    def medians(self, seconds: float) -> dict[str, float]:
        """Seconds of one call of each of `runs`, by name, measured for about so long together."""
        clock = _cuda_clock if self.device.type == "cuda" else _cpu_clock
        with self.grad_mode():
            passes = {name: self._pass(name) for name in self.runs}
            once = {name: min(clock(run, 1) for _ in range(3)) for name, run in passes.items()}
            times = {name: min(CALLS, max(1, round(SAMPLE / one))) for name, one in once.items()}
            rounds = int(seconds / sum(times[name] * once[name] for name in passes))
            samples = {name: [] for name in passes}
            for _ in range(min(ROUNDS[1], max(ROUNDS[0], rounds))):
                for name, run in passes.items():
                    samples[name].append(clock(run, times[name]))
        return {name: statistics.median(values) / len(self.calls) for name, values in samples.items()}

    def row(self, case_name: str, seconds: float) -> dict[str, Any]:
        """What `benchmark_table` has for one case."""
        us = {name: 1e6 * median for name, median in self.medians(seconds).items()}
        args = self.calls[0].args
        backends = {name: time for name, time in us.items() if name not in self.peers}
        peer = next(iter(self.peers))
        right = self.auto in backends
        return {
            "op": self.name,
            "case": case_name,
            "shape": list(args[0].shape if isinstance(args[0], Tensor) else args[0]),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "direction": "forward+backward" if self.backward else "forward",
            "us": us,
            "wrong": self.wrong,
            "auto": self.auto,
            "fastest": min(backends, key=backends.get),
            "auto_is_fastest": right and us[self.auto] <= TIE * min(backends.values()),
            "peer": peer,
            "ratio": us[peer] / us[self.auto] if right else None,
        }


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of `run`, which has run before: nothing is to be tuned while it is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _cpu_clock(run: Callable[[], None], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def _cuda_clock(run: Callable[[], None], times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3 / times


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What figures depend on: device, threads and versions, and what is built."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        models = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None if _triton.MISSING else importlib.metadata.version("triton"),
        "cuda": torch.version.cuda,
        "build": build_info(),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def benchmark_table(
    ops: Iterable[str] | None = None,
    *,
    cases: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    backward: bool = True,
    seconds: float = 0.3,
) -> list[dict[str, Any]]:
    """The time of every backend that serves and of PyTorch's own ops, and which backend "auto" chose.

    ops: names of public functions; default: all. cases: names, of those that BENCHMARKED in an op's cases.py
    holds; default: all. dtypes: default: float32, bfloat16 and float16. backward: whether forward together
    with backward is timed too, where an op has a gradient. seconds: how long each row is measured.

    Returns a row for each op, case, dtype and direction:
        op, case, dtype, device, direction  strings; direction is "forward" or "forward+backward"
        shape            of the first tensor, as a list
        us               median microseconds of a call, by backend, and of the peer
        wrong            the reason, by backend that gave a wrong result; such a backend is not timed
        auto, fastest    names of backends
        auto_is_fastest  whether auto's choice takes at most 1.1 times as long as the fastest backend
        peer, ratio      "torch", and how many times as long as auto's choice it takes (None: auto is wrong)
    ValueError: an unknown op, case or dtype, or no such time.
    """
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds must be a finite number of at least 0, not {seconds}")
    if isinstance(ops, str) or isinstance(cases, str):
        raise ValueError("ops and cases are lists of names")
    ops = list(SUBJECTS) if ops is None else list(ops)
    unknown = [name for name in ops if name not in SUBJECTS]
    if unknown:
        raise ValueError(f"unknown op {unknown[0]!r}; choose from: {', '.join(SUBJECTS)}")
    wanted = None if cases is None else list(cases)
    known = {case: None for name in ops for case in SUBJECTS[name].cases}
    unknown = [case for case in wanted or () if case not in known]
    if unknown:
        raise ValueError(f"unknown case {unknown[0]!r}; choose from: {', '.join(known)}")
    dtypes = DTYPES if dtypes is None else tuple(dtypes)
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    if unknown:
        raise ValueError(f"unknown dtype {unknown[0]!r}; choose from: {', '.join(map(str, DTYPES))}")
    return [
        Comparison(name, case, dtype, device, backward=direction).row(case_name, seconds)
        for name in ops
        for case_name, case in SUBJECTS[name].cases.items()
        if wanted is None or case_name in wanted
        for dtype in dtypes
        if dtype in SUBJECTS[name].dtypes
        for direction in ((False, True) if backward and SUBJECTS[name].differentiable else (False,))
    ]
