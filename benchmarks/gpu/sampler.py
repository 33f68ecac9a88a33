"""Samples as users do: times of a step and of a call, nodes of the graphs, memory, and time by kernels."""

import gc
import statistics
import time
from collections import defaultdict
from functools import cache, partial

import torch
from torch.profiler import ProfilerActivity, profile

from . import networks
from .device import watched_graphs
from .part import Finding, Job, Run

PRECISIONS = ("fast", "exact")
GUIDANCE = (1.0, 3.0)
STEPS = {1: 50, 16: 50, 64: 20, 512: 10}  # images: steps of a call, fewer where they take long
PROFILED = ((1, 1.0), (512, 1.0))  # images, guidance
TOP = 25


def jobs(run: Run) -> list[Job]:
    model = cache(partial(_model, run))
    steps = {1: 3, 2: 3} if run.dry_run else STEPS
    found: list[Job] = []
    for precision in PRECISIONS:
        for count in steps:
            for guidance in GUIDANCE:
                name = f"{precision}, guidance {guidance:.0f}, batch {count}"
                found.append((name, partial(measure, run, model, precision, guidance, count, steps[count])))
    for count, guidance in ((2, 1.0),) if run.dry_run else PROFILED:
        name = f"profile of batch {count}"
        found.append((name, partial(kernels, run, model, PRECISIONS[0], guidance, count, 5)))
    return found


def _model(run: Run):
    return networks.ours(run.dry_run).to(run.device)


def _sample(model, precision: str, guidance: float, count: int, steps: int) -> torch.Tensor:
    options = {
        "sampler": "ddim",
        "steps": steps,
        "batch_size": count,
        "spacing": "leading",
        "precision": precision,
    }
    return model().sample(networks.labels(count), guidance_scale=guidance, **options)


def measure(run: Run, model, precision: str, guidance: float, count: int, steps: int) -> None:
    """Measures one configuration; sampling a single image first frees the buffers of the job before."""
    sample = partial(_sample, model, precision, guidance, count, steps)
    _sample(model, precision, 1.0, 1, 1)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with watched_graphs() as watched:
        sample()
        times, per_step = [], []
        for _ in range(2 if count > 64 else 3):
            watched.events.clear()
            torch.cuda.synchronize()
            start = time.perf_counter()
            sample()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            per_step.append(watched.step_seconds())
        captured, (nodes, uncounted) = len(watched.graphs), watched.nodes()
    row = {"precision": precision, "guidance": guidance, "batch": count, "steps": steps, "nodes": nodes}
    row["call"] = statistics.median(times)
    row["step"] = statistics.median(per_step) if all(per_step) else row["call"] / steps
    run.record(**row, allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
    if uncounted or (not captured and not run.dry_run):
        raise Finding(uncounted or "nothing was captured")


def kernels(run: Run, model, precision: str, guidance: float, count: int, steps: int) -> None:
    """The kernels that the device ran in a call whose graphs were captured before, by name."""
    sample = partial(_sample, model, precision, guidance, count, steps)
    sample()
    torch.cuda.synchronize()
    activity = ProfilerActivity.CPU if run.dry_run else ProfilerActivity.CUDA
    with profile(activities=[activity]) as profiler:
        sample()
        torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CPU if run.dry_run else torch.autograd.DeviceType.CUDA
    spent, launches = defaultdict(float), defaultdict(int)
    for event in profiler.events():
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False):
            spent[event.name] += event.time_range.elapsed_us() / steps
            launches[event.name] += 1
    if not spent:
        raise Finding("the profiler saw nothing on the device")
    top = sorted(spent, key=spent.get, reverse=True)[:TOP]
    run.record(
        precision=precision,
        guidance=guidance,
        batch=count,
        total_us=sum(spent.values()),
        launches=sum(launches.values()) / steps,
        kernels=[{"name": n[:160], "us": spent[n], "launches": launches[n] / steps} for n in top],
    )
