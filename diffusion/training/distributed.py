"""Several ranks of one training run: their process group, their gradients, and checks that they agree.

torchrun starts the ranks. Each holds the whole model (torch.nn.parallel.DistributedDataParallel).
"""

import contextlib
import gc
import importlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from .. import __version__
from ..utils.errors import first_line
from ..utils.ranks import Ranks
from .trainer import Trainer

TIMEOUT = timedelta(minutes=10)  # how long a rank waits for the others


@contextlib.contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Opens torch.distributed's default group, nccl on CUDA devices and gloo elsewhere; nothing for one rank.

    Destroys the group on exit and joins its threads: a gloo thread that still owns a tensor at interpreter
    shutdown aborts the process. Do not keep a reference to the group. ValueError if the ranks do not find
    each other.
    """
    if ranks.world_size == 1:
        yield
        return
    # A later import, by DistributedDataParallel, would keep the group as a default argument of its functions.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        distributed.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"rank {ranks.rank} of {ranks.world_size} does not find the others: {first_line(error)}"
        ) from error
    try:
        yield
    finally:
        distributed.destroy_process_group()
        gc.collect()  # a DistributedDataParallel, which holds the group, is part of reference cycles


@contextlib.contextmanager
def shared_gradients(trainer: Trainer) -> Iterator[None]:
    """A context in which the gradients of a step are means over the ranks; nothing changes for one rank."""
    if trainer.ranks.world_size == 1:
        yield
        return
    network = trainer.network
    trainer.network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    try:
        yield
    finally:  # the wrapper holds the process group, which must end even if the trainer lives on
        trainer.network = network


def check_ranks_agree(trainer: Trainer, problem: ValueError | None = None) -> None:
    """ValueError on every rank unless all have the same recipe, data, step, precision and versions.

    Collective: every rank must call it. problem: why this rank cannot begin; then no rank begins.
    """
    if trainer.ranks.world_size == 1:
        if problem is not None:
            raise problem
        return
    mine = {
        "problem": None if problem is None else str(problem),
        "recipe": trainer.recipe.to_json(),
        "data": trainer.data_digest,
        "step": trainer.step,
        "autocast": str(trainer.autocast),
        "micro batch": trainer.micro_batch,
        "versions": f"fused-diffusion {__version__}, torch {torch.__version__}",
    }
    every: list = [None] * trainer.ranks.world_size
    distributed.all_gather_object(every, mine)
    for theirs in every:
        if theirs["problem"] is not None:
            raise ValueError(theirs["problem"]) from problem
    for key in mine:
        differing = [rank for rank, theirs in enumerate(every) if theirs[key] != every[0][key]]
        if differing:
            raise ValueError(
                f"the ranks do not train the same: rank {differing[0]} differs from rank 0 in its {key}"
            )


def any_rank(trainer: Trainer, here: bool) -> bool:
    """Logical OR of `here` over all ranks. Collective: every rank must call it."""
    if trainer.ranks.world_size == 1:
        return here
    held = torch.tensor(float(here), device=trainer.device)
    distributed.all_reduce(held, op=distributed.ReduceOp.MAX)
    return bool(held)


@contextlib.contextmanager
def explain_lost_rank(trainer: Trainer, state: Path) -> Iterator[None]:
    """Turns the error of a broken connection to another rank into a ValueError that says how to go on.

    state: the file to resume from.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        broken = ("Connection", "connection", "socket", "Socket", "NCCL", "Timed out", "timed out")
        if trainer.ranks.world_size == 1 or not any(word in text for word in broken):
            raise
        raise ValueError(
            f"rank {trainer.ranks.rank} lost another rank at step {trainer.step + 1}; start them again with "
            f"--resume, which goes on from {state}: {first_line(error)}"
        ) from error
