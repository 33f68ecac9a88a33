"""Interleaved timing in one process, so that a busy machine slows all candidates alike."""

import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusion import kernels
from diffusion.inference import loop
from diffusion.inference.buffers import Batch
from diffusion.inference.cpu_plan import PlannedUNet
from diffusion.inference.denoiser import Denoiser, SplitUNet
from diffusion.kernels.ops.reverse_step.library import copy_dense_
from diffusion.utils.device import multiplies_bfloat16

from . import peers
from .models import Pair

AGREEMENT = {True: 1e-3, False: 0.1}  # mean difference of images in [-1, 1], in float32 and in 16 bits
REST = 0.03  # seconds between two runs
STEPS = (2, 6)  # steps of two chains; their difference gives the cost of a step
LOOP_STEPS = 64  # of the sampling loop without its network
FIRST = 1  # steps of an uncounted chain before them, because the previous peer's data fill the caches


def seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(
    runs: Mapping[str, Callable[[], object]], device: str, budget: float, least: int = 3
) -> dict[str, float]:
    """Median seconds of each run, taking turns for about `budget` seconds, at least `least` times.

    Threads of a run that just ended go on spinning for some milliseconds, at no cost to the next one.
    """
    for run in runs.values():
        seconds(run, device)
    samples, rounds, end = defaultdict(list), 0, time.perf_counter() + budget
    while runs and (rounds < least or time.perf_counter() < end):
        rounds += 1
        for name, run in runs.items():
            time.sleep(REST)
            samples[name].append(seconds(run, device))
    return {name: statistics.median(values) for name, values in samples.items()}


def compare(
    pair: Pair, count: int, guidance: float, device: str, names: list[str], budget: float
) -> dict[str, dict[str, Any]]:
    """Seconds of a step and of a call of each peer; or, under "reason", the reason why it is not timed."""
    rows, samples = {}, {}
    expected = peers.of_diffusers(pair, count, guidance, device, best=False)(STEPS[0])
    for name in names:
        make, single, devices = peers.PEERS[name]
        if device not in devices:
            continue
        try:
            sample = make(pair, count, guidance, device)
            difference = (sample(STEPS[0]) - expected).abs().mean().item()
        except Exception as error:  # a peer can raise anything: a missing package, a failed compilation
            rows[name] = {
                "reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            }
            continue
        rows[name] = {"difference": difference}
        if not difference <= AGREEMENT[single]:
            rows[name]["reason"] = f"wrong by {difference:.2g} on average, not timed"
            continue
        samples[name] = sample
    runs = {
        (name, steps): (lambda sample=sample, steps=steps: sample(steps))
        for name, sample in samples.items()
        for steps in (FIRST, *STEPS)
    }
    times = medians(runs, device, budget)
    for name in samples:
        short, long = times[name, STEPS[0]], times[name, STEPS[1]]
        step = (long - short) / (STEPS[1] - STEPS[0])
        rows[name] |= {"step": step, "call": max(0.0, short - STEPS[0] * step)}
    return rows


def parts(pair: Pair, count: int, guidance: float, precision: str, rounds: int = 7) -> dict[str, float]:
    """Seconds of one step on the CPU, by kind of op; medians of a few rounds.

    "convolution", "norm", "attention" and "rest" are the network's calls, timed one by one, and "step" is the
    reverse step. "network" is an evaluation of the network, and "chain" a whole step: the evaluation, and a
    step of the sampling loop with a network that costs nothing.
    """
    fast = precision == "fast" and multiplies_bfloat16(torch.device("cpu"))
    dtype = torch.bfloat16 if fast else torch.float32
    network = PlannedUNet(pair.ours.unet, dtype)
    images = count if guidance == 1 else 2 * count
    x = torch.randn(images, *pair.shape).to(dtype, memory_format=torch.channels_last)
    t = torch.full((images,), 500)
    table = pair.ours.steps("ddim", 1, guidance_scale=guidance)
    samples = defaultdict(list)
    with torch.no_grad():
        embedding = pair.ours.unet.embed(t, peers.labels(images))
        output = network.denoise(x, embedding).clone().chunk(images // count)
        loop_alone = _loop_alone(pair, count, guidance, dtype)
        loop_alone()
        for _ in range(rounds):
            spent = defaultdict(float)
            for name, call in network.calls():
                spent[name] += seconds(call, "cpu")
            spent["step"] = seconds(_reverse_step(pair, count, table, output), "cpu")
            spent["network"] = seconds(lambda: network.denoise(x, embedding), "cpu")
            spent["chain"] = spent["network"] + seconds(loop_alone, "cpu") / LOOP_STEPS
            for name, value in spent.items():
                samples[name].append(value)
    return {name: statistics.median(values) for name, values in samples.items()}


def _loop_alone(pair: Pair, count: int, guidance: float, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """The sampling loop over LOOP_STEPS steps of a network whose output is there already."""
    unet, images = pair.ours.unet, count if guidance == 1 else 2 * count
    size = sum(unet.embedding_sizes)
    x = torch.zeros(images, *pair.shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    embedding, output = torch.zeros(images, size), x.clone(memory_format=torch.preserve_format)

    def idle(given: torch.Tensor, given_embedding: torch.Tensor) -> torch.Tensor:
        copy_dense_(given, x)  # as a planned network does
        copy_dense_(given_embedding, embedding)
        return output

    split = SplitUNet(unet.embed, idle, size, recordable=lambda *arguments: True)
    denoiser = Denoiser(split, unet.config.null_label, torch.device("cpu"), dtype)
    table = pair.ours.steps("ddim", LOOP_STEPS, guidance_scale=guidance)
    batch = Batch(peers.labels(count), torch.arange(count), 0, None)
    return partial(loop.run, denoiser, table, batch, pair.shape)


def by_steps(
    pair: Pair, count: int, device: str, names: Sequence[str], steps: Sequence[int], budget: float
) -> dict[str, list[float]]:
    """Seconds of a whole call of each peer, for each number of steps."""
    samples = {name: peers.PEERS[name][0](pair, count, 1.0, device) for name in names}
    runs = {(name, n): partial(sample, n) for name, sample in samples.items() for n in steps}
    times = medians(runs, device, budget)
    return {name: [times[name, n] for n in steps] for name in names}


def _reverse_step(pair: Pair, count: int, table, output) -> Callable[[], None]:
    x, ids, counter = torch.randn(count, *pair.shape), torch.arange(count), kernels.step_counter(0)
    options = {"sample_ids": ids, "model_output_uncond": output[1] if len(output) == 2 else None}
    return lambda: kernels.reverse_step_(x, output[0], table.table, counter, **options)


def in_a_process(*words: object, module: str = "benchmarks.sampling") -> Any:
    """The JSON that `python -m MODULE` prints last; None if it fails.

    In one process, threads and fragmented memory of one comparison slowed the next by up to a half.
    """
    command = [sys.executable, "-m", module, *map(str, words)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else None


def peak_memory() -> int | None:
    """Largest memory of this process so far, in bytes, without that of the process it was forked from."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
