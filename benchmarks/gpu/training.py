"""Training steps in bfloat16: this package's trainer, and diffusers' loop under autocast."""

import time
from functools import partial

import torch

from diffusion.training.recipe import load_recipe
from diffusion.training.trainer import Trainer

from . import networks
from .part import Finding, Job, Run

BATCH, STEPS, WARM = 128, 20, 5


def jobs(run: Run) -> list[Job]:
    return [
        ("ours", partial(measure, run, "ours", ours)),
        ("diffusers", partial(measure, run, "diffusers", theirs)),
    ]


def ours(run: Run, size: int):
    recipe, unet = load_recipe("cifar10-ddpm"), networks.ours(run.dry_run).unet
    values = {**recipe.__dict__, "unet": unet.config.to_dict(), "batch_size": size, "more_ema_decays": ()}
    generator = torch.Generator().manual_seed(0)
    shape = (8 * size, 3, *unet.config.image_shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.tensor(networks.labels(len(images)))
    trainer = Trainer(type(recipe)(**values), images, labels, None, run.device, autocast=torch.bfloat16)
    trainer.model.unet.load_state_dict(unet.state_dict())

    def step() -> float:
        trainer.train_step()
        return trainer.log_line.losses[-1].item()

    return step


def theirs(run: Run, size: int):
    from benchmarks.training import of_diffusers

    return of_diffusers(networks.pair(run.dry_run), size, run.device, torch.bfloat16)


def measure(run: Run, name: str, make) -> None:
    size, steps, warm = (4, 2, 1) if run.dry_run else (BATCH, STEPS, WARM)
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    step = make(run, size)
    losses = [step() for _ in range(warm)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    losses += [step() for _ in range(steps)]
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    if not all(0 < loss < 100 for loss in losses):
        raise Finding(f"a loss is {max(losses)}")
    run.record(
        loop=name,
        batch=size,
        step=seconds,
        images_per_second=size / seconds,
        allocated=torch.cuda.max_memory_allocated(),
        losses=losses,
    )
