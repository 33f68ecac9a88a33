"""Compiles diffusers' network in the background, while nothing is timed: `peer` finds it in Inductor's cache.

First in Inductor's default mode, then with all that it can tune; as much of it as time allows.
"""

import time
from functools import cache, partial

import torch

from . import peer
from .part import Job, Run


def jobs(run: Run) -> list[Job]:
    network = cache(lambda: peer.network(run))
    return [(f"{mode}, batch {n}", partial(fill, run, network, mode, n)) for mode, n in compiled(run)]


def compiled(run: Run) -> list[tuple[str, int]]:
    """Modes of torch.compile and batches, the most important first."""
    batches = (2,) if run.dry_run else (512, 1, 64)
    return [(mode, n) for mode in ("default", "max-autotune-no-cudagraphs") for n in batches]


def fill(run: Run, network, mode: str, batch: int) -> None:
    begun = time.perf_counter()
    evaluate = peer.compiled(run, network(), mode)
    with torch.no_grad():
        evaluate(*peer.inputs(run, batch))
    torch.cuda.synchronize()
    run.record(mode=mode, batch=batch, compiled_in=time.perf_counter() - begun)
