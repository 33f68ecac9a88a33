"""Times every backend beside PyTorch's own ops: the evidence for the choices of "auto".

Backends and peers run in turn in one process, so that a busy machine slows all of them alike; a time is the
median over the rounds. Inputs are random. A few buffers take turns, so that no call finds the previous call's
input in the nearest cache; together they may well fit into the last cache, as in a model. On a CUDA device,
calls that a graph can hold are replayed from one, where a launch takes as long as it does in a sampler.
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
from torch import Tensor

from . import _registry, _triton, ops
from ._native import build_info
from ._registry import DTYPES, Subject
from ._tolerance import wrong

BUFFERS = 3
NO_CACHE = 1 << 28  # bytes of input; a call with so many needs no second buffer
ROUNDS = (5, 200)  # the smallest and the largest number
MIN_SAMPLE = 2e-4  # seconds; shorter calls are timed several at a time, at most MAX_CALLS
MAX_CALLS = 50
TIE = 1.1  # "auto" may be slower than the fastest backend by this factor, the noise of a quiet machine


def subjects() -> dict[str, Subject]:
    """The cases and peers of every op, by the name of the public function."""
    return _registry.subjects(ops)


def timed_cases(name: str) -> dict[str, Any]:
    """The cases of an op that real models have, by name."""
    subject = subjects()[name]
    return {case: subject.cases[case] for case in subject.benchmarked or subject.cases}


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
        def one(t: Any) -> Any:
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

    backward: with the gradient by every tensor. peers: functions that are timed beside the backends, called
    with the case and the op's arguments. Ratios refer to the first. Default: {"torch": PyTorch's own ops}.

    runs: the functions to time, by name of backend or peer. wrong: the reason, by backend whose result is
    wrong; such a backend is not in `runs`.
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
        self.subject, self.device = subjects()[name], torch.device(device)
        self.function, self.op, self.arguments, _ = _registry.discover(ops)[name]
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
                out = self.function(*args, backend="reference", **kwargs)
            upstream = torch.empty_like(out).copy_(torch.randn(out.shape, generator=generator, device="cpu"))
        return Call.of(args, kwargs, upstream)

    def _check(self) -> None:
        args, kwargs, *_ = self.calls[0]
        arguments = self.arguments(*args, **kwargs)
        self.auto = self.op.choose(arguments)
        serving = self.op.serving(arguments)
        if _triton.INTERPRETED:  # the times would be Python's
            serving = [backend for backend in serving if backend != "triton"]
        backends = {backend: partial(self.function, backend=backend) for backend in serving}
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

        # The reference may read a number from the device, which no graph can do.
        in_graph = self.device.type == "cuda" and self.subject.in_graph and name != "reference"
        return _captured(run, self.device) if in_graph else run

    def one_call(self, name: str) -> Callable[[], Any]:
        """A function that calls on the next buffer each time, and on a CUDA device waits for the result."""
        function, calls = self.runs[name], itertools.cycle(self.calls)

        def run() -> Any:
            out = next(calls).run(function)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return out

        return run

    def medians(self, seconds: float) -> dict[str, float]:
        """Median seconds of one call of each of `runs`, by name. seconds: duration of all measurements."""
        clock = _cuda_clock if self.device.type == "cuda" else _cpu_clock
        with self.grad_mode():
            passes = {name: self._pass(name) for name in self.runs}
            once = {name: min(clock(run, 1) for _ in range(3)) for name, run in passes.items()}
            times = {name: min(MAX_CALLS, max(1, round(MIN_SAMPLE / one))) for name, one in once.items()}
            rounds = int(seconds / sum(times[name] * once[name] for name in passes))
            samples: dict[str, list[float]] = {name: [] for name in passes}
            for _ in range(min(ROUNDS[1], max(ROUNDS[0], rounds))):
                for name, run in passes.items():
                    samples[name].append(clock(run, times[name]))
        return {name: statistics.median(values) / len(self.calls) for name, values in samples.items()}

    def row(self, case_name: str, seconds: float) -> dict[str, Any]:
        """The row of `benchmark_table` for one case."""
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
            "fastest": min(backends, key=lambda name: backends[name]),
            "auto_is_fastest": right and us[self.auto] <= TIE * min(backends.values()),
            "peer": peer,
            "ratio": us[peer] / us[self.auto] if right else None,
        }


def _captured(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A CUDA graph of `run`. It must have run before, since nothing can be tuned during the capture."""
    with torch.cuda.device(device):
        stream, own = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(own)
        with torch.cuda.stream(stream):
            run()
        own.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
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


def device_name(device: torch.device | str = "cpu") -> str:
    """The model of the GPU or of the processor, as its driver or system names it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Everything that the times depend on: device, threads, versions and libraries."""
    return {
        "device": device_name(device),
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
    """The times of every backend that serves and of PyTorch's own ops, and the choice of "auto".

    ops: names of public functions; default: all.
    cases: names of cases that real models have (BENCHMARKED in an op's cases.py); default: all.
    dtypes: default: float32, bfloat16 and float16.
    device: a device of PyTorch.
    backward: whether forward together with backward is timed too, where an op has a gradient.
    seconds: how long each row is measured.

    Returns a row for each op, case, dtype and direction:
        op, case, dtype, device, direction  strings; direction is "forward" or "forward+backward"
        shape            shape of the first tensor, as a list
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
    known_ops = subjects()
    names = list(known_ops) if ops is None else list(ops)
    unknown = [name for name in names if name not in known_ops]
    if unknown:
        raise ValueError(f"unknown op {unknown[0]!r}; choose from: {', '.join(known_ops)}")
    wanted = None if cases is None else list(cases)
    known = {case: None for name in names for case in timed_cases(name)}
    unknown = [case for case in wanted or () if case not in known]
    if unknown:
        raise ValueError(f"unknown case {unknown[0]!r}; choose from: {', '.join(known)}")
    dtypes = DTYPES if dtypes is None else tuple(dtypes)
    others = [dtype for dtype in dtypes if dtype not in DTYPES]
    if others:
        raise ValueError(f"unknown dtype {others[0]!r}; choose from: {', '.join(map(str, DTYPES))}")
    return [
        Comparison(name, case, dtype, device, backward=direction).row(case_name, seconds)
        for name in names
        for case_name, case in timed_cases(name).items()
        if wanted is None or case_name in wanted
        for dtype in dtypes
        if dtype in known_ops[name].dtypes
        for direction in ((False, True) if backward and known_ops[name].differentiable else (False,))
    ]
