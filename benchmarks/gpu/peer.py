"""diffusers on the same network in bfloat16, channels_last: eager, in a CUDA graph, and compiled in a graph.

Its sampler, DDIMScheduler, runs as its pipelines run it. Each network is also timed alone.
"""

import copy
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from . import device, networks
from .part import Finding, Job, Run

BATCHES = (1, 64, 512)
GUIDANCE = (1.0, 3.0)
STEPS = (10, 2)  # steps of a call, and of a call in a dry run

Evaluate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def jobs(run: Run) -> list[Job]:
    pair = cache(lambda: networks.pair(run.dry_run))
    model = cache(lambda: _prepared(run, pair()))
    batches = (2,) if run.dry_run else BATCHES
    found: list[Job] = [("agreement", lambda: agreement(run, pair()))]
    for count in batches:
        for guidance in GUIDANCE:
            where = f"guidance {guidance:.0f}, batch {count}"
            for way in ("eager", "graph"):
                job = partial(measure, run, pair, model, way, None, guidance, count)
                found.append((f"{way}, {where}", job))
    rows = [row for row in run.results("compilation") if "compiled_in" in row]
    for count, mode in {row["batch"]: row["mode"] for row in rows}.items():  # the mode that tunes more
        job = partial(measure, run, pair, model, "compiled", mode, 1.0, count)
        found.append((f"compiled, {mode}, batch {count}", job))
    return found


def _prepared(run: Run, pair: Any) -> torch.nn.Module:
    model = copy.deepcopy(pair.theirs).eval().requires_grad_(False)
    return model.to(run.device, torch.bfloat16, memory_format=torch.channels_last)


def network(run: Run) -> torch.nn.Module:
    return _prepared(run, networks.pair(run.dry_run))


def compiled(run: Run, model: torch.nn.Module, mode: str) -> Evaluate:
    """A dry run compiles nothing."""
    function = torch.compile(model, mode=mode, dynamic=False, disable=run.dry_run)
    return lambda x, t, labels: function(x, t, class_labels=labels, return_dict=False)[0]


def eager(model: torch.nn.Module) -> Evaluate:
    return lambda x, t, labels: model(x, t, class_labels=labels, return_dict=False)[0]


def inputs(run: Run, images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = 8 if run.dry_run else 32
    x = torch.randn(images, 3, size, size, device=run.device, dtype=torch.bfloat16)
    t = torch.full((images,), 500, device=run.device)
    labels = torch.tensor(networks.labels(images), device=run.device)
    return x.contiguous(memory_format=torch.channels_last), t, labels


class Replayed:
    """A network in a CUDA graph. Each call overwrites the inputs of the graph."""

    def __init__(self, run: Run, evaluate: Evaluate, images: int):
        self.inputs = inputs(run, images)
        with device.watched_graphs() as watched:
            self.graph = device.capture(lambda: evaluate(*self.inputs))
            self.output, (self.nodes, self.uncounted) = self.graph.kept, watched.nodes()

    def __call__(self, *values: torch.Tensor) -> torch.Tensor:
        for own, value in zip(self.inputs, values, strict=True):
            own.copy_(value)
        self.graph.replay()
        return self.output


@torch.no_grad()
def measure(run: Run, pair: Any, model: Any, way: str, mode: str | None, guidance: float, count: int) -> None:
    from benchmarks.sampling.peers import looped

    images = count if guidance == 1 else 2 * count
    torch.cuda.reset_peak_memory_stats()
    evaluate = eager(model()) if mode is None else compiled(run, model(), mode)
    steps = STEPS[run.dry_run]
    row = {"way": way, "mode": mode, "guidance": guidance, "batch": count, "steps": steps}
    if way != "eager":
        evaluate = Replayed(run, evaluate, images)
        row |= {"network": device.replay_seconds(evaluate.graph), "nodes": evaluate.nodes}
    last = {"memory_format": torch.channels_last}
    sample = looped(
        lambda x, t, labels: evaluate(x.contiguous(**last), t, labels),
        pair(),
        count,
        guidance,
        run.device,
        torch.bfloat16,
    )
    sample(1)
    times = []
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        sample(steps)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    run.record(**row, step=min(times) / steps, allocated=torch.cuda.max_memory_allocated())
    if way != "eager" and evaluate.uncounted:
        raise Finding(evaluate.uncounted)


def agreement(run: Run, pair: Any) -> None:
    """In float32, without TF32, this package and diffusers draw the same images."""
    from benchmarks.sampling import peers

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours = peers.ours(pair, 4, 2.0, run.device)(4)
        theirs = peers.of_diffusers(pair, 4, 2.0, run.device, best=False)(4)
    difference = (ours - theirs).abs().mean().item()
    run.record(mean_difference=difference)
    if not difference < 1e-3:
        raise Finding(f"images differ from diffusers' by {difference:.3g} on average")
