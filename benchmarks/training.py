"""Training steps beside other loops on the same network, images and batch: python -m benchmarks.training.

This package's trainer, in float32 and in bfloat16, with one average, as diffusers' loop has; the loop of an
educational repository, juraam/stable-diffusion-from-scratch (plain PyTorch: no averaged weights, no
clipping, the loss read back every step), on this package's UNet without its kernels; and diffusers'
training loop on its UNet2DModel (AdamW, clipping, EMAModel), in float32 and under autocast to bfloat16. All
start from the same weights. They take turns in one process; ratios are of medians. A loop whose first loss
is not that of the others, within the noise of a batch, is not timed.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers.training_utils import EMAModel

from diffusion import kernels
from diffusion.kernels.benchmarks import device_name
from diffusion.training.recipe import load_recipe
from diffusion.training.trainer import Trainer

from .sampling.__main__ import versions
from .sampling.models import make
from .sampling.report import slug
from .sampling.timing import medians

BATCHES = {"cifar10": 16, "mnist": 64}
RECIPES = {"cifar10": "cifar10-ddpm", "mnist": "mnist"}  # of each network of the sampling benchmark

Step = Callable[[], float]  # trains on one batch and returns its loss


def batches(pair, size: int):
    """Images of noise, uint8, and labels; the time does not depend on their values."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8 * size, *pair.shape), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (len(images),), generator=generator)


def ours(pair, size: int, device: str, autocast: torch.dtype | None) -> Step:
    recipe = load_recipe(RECIPES[pair.name])
    values = {**recipe.__dict__, "unet": pair.ours.unet.config.to_dict(), "batch_size": size}
    values |= {"schedule": pair.ours.schedule.to_config(), "prediction_type": pair.ours.prediction_type}
    values["more_ema_decays"] = ()
    trainer = Trainer(type(recipe)(**values), *batches(pair, size), None, device, autocast=autocast)
    trainer.model.unet.load_state_dict(pair.ours.unet.state_dict())

    def step() -> float:
        trainer.train_step()
        return trainer.log_line.losses[-1].item()

    return step


def plain(pair, size: int, device: str) -> Step:
    """The loop of the repository that this package grew from."""
    model = pair.ours.copy().to(device)
    unet = model.unet.train().requires_grad_(True)
    optimizer = torch.optim.Adam(unet.parameters(), lr=2e-4)
    images, labels = batches(pair, size)
    loader = _endless(images.float() / 127.5 - 1, labels, size)
    alphas_cumprod = model.schedule.alphas_cumprod.float().to(device)

    def step() -> float:
        x, y = (tensor.to(device) for tensor in next(loader))
        optimizer.zero_grad()
        t = torch.randint(0, len(alphas_cumprod), (size,), device=device)
        noise, bar = torch.randn_like(x), alphas_cumprod[t].view(-1, 1, 1, 1)
        y = torch.where(torch.rand(size, device=device) < 0.1, 10, y)
        noisy = bar.sqrt() * x + (1 - bar).sqrt() * noise
        embedding = unet.embed(t, y)
        output = unet.denoise(noisy, embedding, backend="reference")
        loss = torch.nn.functional.mse_loss(output, _target(pair, bar, x, noise))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def of_diffusers(pair, size: int, device: str, autocast: torch.dtype | None) -> Step:
    """The loop of diffusers' example for unconditional generation, with labels."""
    unet = copy.deepcopy(pair.theirs).to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    average = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True)
    scheduler = diffusers.DDPMScheduler(
        trained_betas=pair.ours.schedule.betas.numpy(), prediction_type=pair.ours.prediction_type
    )
    images, labels = batches(pair, size)
    loader = _endless(images.float() / 127.5 - 1, labels, size)

    def step() -> float:
        x, y = (tensor.to(device) for tensor in next(loader))
        noise = torch.randn_like(x)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (size,), device=device)
        noisy = scheduler.add_noise(x, noise, t)
        y = torch.where(torch.rand(size, device=device) < 0.1, 10, y)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast is not None):
            output = unet(noisy, t, class_labels=y, return_dict=False)[0]
        v = pair.ours.prediction_type == "v_prediction"
        target = scheduler.get_velocity(x, noise, t) if v else noise
        loss = torch.nn.functional.mse_loss(output.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        return loss.item()

    return step


def _target(pair, bar: torch.Tensor, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    if pair.ours.prediction_type == "v_prediction":
        return bar.sqrt() * noise - (1 - bar).sqrt() * x
    return noise


def _endless(images: torch.Tensor, labels: torch.Tensor, size: int):
    dataset = torch.utils.data.TensorDataset(images, labels)
    while True:
        yield from torch.utils.data.DataLoader(dataset, batch_size=size, shuffle=True, drop_last=True)


LOOPS: dict[str, Callable[..., Step]] = {
    "ours, float32": lambda pair, size, device: ours(pair, size, device, None),
    "ours, bfloat16": lambda pair, size, device: ours(pair, size, device, torch.bfloat16),
    "plain PyTorch loop": plain,
    "diffusers": lambda pair, size, device: of_diffusers(pair, size, device, None),
    "diffusers, bfloat16": lambda pair, size, device: of_diffusers(pair, size, device, torch.bfloat16),
}


def measure(model: str, size: int, device: str, names: list[str], budget: float) -> dict:
    pair = make(model)
    steps = {name: LOOPS[name](pair, size, device) for name in names}
    losses = {}
    for name, step in steps.items():
        torch.manual_seed(0)  # the same images, timesteps and noise each time
        losses[name] = sum(step() for _ in range(2)) / 2
    middle = sorted(losses.values())[len(losses) // 2]
    wrong = [name for name, loss in losses.items() if not abs(loss - middle) < 0.25 * middle]
    times = medians({name: step for name, step in steps.items() if name not in wrong}, device, budget)
    return {
        "model": model,
        "batch": size,
        "loops": {
            name: {"loss": loss, "seconds": times.get(name), "images/s": size / times[name]}
            if name in times
            else {"loss": loss, "reason": "its loss is not that of the others"}
            for name, loss in losses.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--models", nargs="+", default=["cifar10", "mnist"], choices=["cifar10", "mnist"])
    add("--batch", type=int, help="images per step (default: 16 for cifar10, 64 for mnist)")
    add("--loops", nargs="+", default=list(LOOPS), choices=list(LOOPS))
    add("--seconds", type=float, default=120.0, help="for each model (default: %(default)s)")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    result = {
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "build": kernels.build_info(),
        "training": [
            measure(model, args.batch or BATCHES[model], args.device, args.loops, args.seconds)
            for model in args.models
        ],
    }
    for entry in result["training"]:
        print(f"{entry['model']}, batch {entry['batch']}")
        for name, row in entry["loops"].items():
            shown = row.get("reason") or f"{1e3 * row['seconds']:8.1f} ms  {row['images/s']:7.1f} images/s"
            print(f"  {name:22s}{shown}  loss {row['loss']:.3f}")
    threads = f"-{result['threads']}" if args.device == "cpu" else ""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"training-{slug(result['device'])}{threads}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
