"""Several ranks of one training run: their process group, and that they agree.

Each holds the whole model (torch.nn.parallel.DistributedDataParallel). They are started by torchrun.
"""

import contextlib
import gc
import importlib
import os
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

PATIENCE = timedelta(minutes=10)  # how long ranks wait for each other


@contextlib.contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """torch.distributed's default group, nccl on CUDA devices and gloo elsewhere; nothing for one rank.

    It ends with its threads, unless the caller keeps it: one that is about to let go of a tensor when the
    interpreter shuts down aborts the process.
    """
    if ranks.world_size == 1:
        yield
        return
    # Imported later, by DistributedDataParallel, it would keep the group as its functions' default argument.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        distributed.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"rank {ranks.rank} of {ranks.world_size} does not find the others: {first_line(error)}"
        ) from error
    try:
        yield
    finally:
        distributed.destroy_process_group()
        gc.collect()  # what still has the group: a DistributedDataParallel is part of cycles


@contextlib.contextmanager
def shared_gradients(trainer: Trainer) -> Iterator[None]:
    """Within, a step's gradients are the means over the ranks; nothing for one rank."""
    if trainer.ranks.world_size == 1:
        yield
        return
    network = trainer.network
    trainer.network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    try:
        yield
    finally:  # it has the process group, which is to end before the trainer may
        trainer.network = network


def agree(trainer: Trainer, problem: ValueError | None = None) -> None:
    """ValueError, on every rank, unless all train the same: recipe, data, step, and how it is computed.

    problem: why this rank cannot begin; then none does.
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
    """Whether something holds on any rank; all must ask."""
    if trainer.ranks.world_size == 1:
        return here
    held = torch.tensor(float(here), device=trainer.device)
    distributed.all_reduce(held, op=distributed.ReduceOp.MAX)
    return bool(held)


@contextlib.contextmanager
def losing_a_rank(trainer: Trainer, out: str | os.PathLike) -> Iterator[None]:
    """Says what to do when the connection to another rank breaks."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        broken = ("Connection", "connection", "socket", "Socket", "NCCL", "Timed out", "timed out")
        if trainer.ranks.world_size == 1 or not any(word in text for word in broken):
            raise
        raise ValueError(
            f"rank {trainer.ranks.rank} lost another rank at step {trainer.step + 1}; start them again with "
            f"--resume, which goes on from {Path(out) / 'state.safetensors'}: {first_line(error)}"
        ) from error
