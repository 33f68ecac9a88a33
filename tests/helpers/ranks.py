"""Training runs of several processes, one per rank."""

import os

import torch

from helpers.processes import start_python

stores = []  # rendezvous stores of the runs so far
TIMEOUT = 300  # seconds, on a machine however busy
SCRIPT = """
import atexit, os, signal, sys, weakref
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from diffusion.training import run as run_module
from helpers.training import PLAIN, make_trainer, run, run_by, take_time
from diffusion.training.distributed import process_group
from diffusion.utils.ranks import current_ranks
ranks = current_ranks()
def clocked(trainer, seconds):
    clock = [100.0]
    run_module.time = run_by(clock)
    take_time(trainer, clock, seconds)
try:
    with process_group(ranks, torch.device("cpu")):
        group = weakref.ref(torch.distributed.group.WORLD)
        # Its threads have to end before the interpreter does; one that comes too late aborts the process.
        atexit.register(lambda: group() is None or os._exit(3))
        trainer = make_trainer({recipe}, ranks=ranks, {options})
        step = trainer.train_step
        def watched():
            {before}
            return step()
        trainer.train_step = watched
        {setup}
        run(Path(sys.argv[1]), trainer, save_every={save_every}, resume={resume}, **{arguments})
except ValueError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def start(
    out,
    world_size=2,
    recipe="PLAIN",
    options="",
    before="pass",
    save_every=100,
    resume=False,
    setup="pass",
    arguments="{}",
) -> list:
    """The processes of a run; `recipe`, `options` and `arguments` are expressions that may look at `ranks`.

    options: of the trainer. before: a statement that is run before each step. setup: one that is run before
    the first, such as `clocked(trainer, 2)`, by whose clock a step takes 2 s. arguments: a dict, of `train`.
    """
    script = SCRIPT.format(
        recipe=recipe,
        options=options,
        before=before,
        save_every=save_every,
        resume=resume,
        setup=setup,
        arguments=arguments,
    )
    # As under torchrun: a port that is merely free may be taken before the first rank takes it.
    stores.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stores[-1].port)}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    environment |= {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    return [
        start_python(script, str(out), environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]


def finish(processes: list) -> list[tuple[int, str]]:
    """Exit status and last line of standard error of each."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, text.strip()) for process, text in zip(processes, outputs, strict=True)]
