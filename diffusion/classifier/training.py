"""Training of the classifier."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..storage.images import to_float
from ..utils.device import multiplies_bfloat16
from ..utils.validation import number, whole_number
from ..utils.words import counted
from .network import Classifier, ClassifierConfig

MUON_RATE = 0.05  # largest learning rate: the length of a step of each row of a kernel


def augment(images: torch.Tensor, flip: bool = False) -> torch.Tensor:
    """Rotates, scales, shears and moves images uint8 [N, C, H, W] a little; gives float32 in [-1, 1].

    The amounts are uniform, up to 12 degrees, 12 %, 0.15 and 2 of 28 pixels, from PyTorch's global generator.
    flip: also mirror half of the images.
    """
    turn, width, height, shear, right, down = torch.rand(6, len(images), device="cpu").mul(2).sub(1).unbind()
    angle = turn * (12 * torch.pi / 180)
    cos, sin, shear = angle.cos(), angle.sin(), shear * 0.15
    width, height = 1 + 0.12 * width, 1 + 0.12 * height
    rows = [
        width * cos,
        height * (shear * cos - sin),
        right / 7,
        width * sin,
        height * (shear * sin + cos),
        down / 7,
    ]
    if flip:
        mirrored = torch.where(torch.rand(len(images), device="cpu") < 0.5, -1.0, 1.0)
        rows[0], rows[3] = rows[0] * mirrored, rows[3] * mirrored
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images.float() / 255, grid, align_corners=False) * 2 - 1


def crop(images: torch.Tensor, shift: int = 2) -> torch.Tensor:
    """Moves images uint8 [N, C, H, W] by up to `shift` pixels, mirrors half; gives float32 in [-1, 1].

    Beyond the edges, images are reflected. Random numbers come from PyTorch's global generator.
    """
    count, _, height, width = images.shape
    padded = F.pad(to_float(images), (shift, shift, shift, shift), mode="reflect")
    device = images.device
    down, right = torch.randint(0, 2 * shift + 1, (2, count, 1), device=device)
    rows, columns = down + torch.arange(height, device=device), right + torch.arange(width, device=device)
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    # With index tensors on both sides of a slice, their dimensions come first: [N, H, W, C].
    chosen = padded[
        torch.arange(count, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]
    ]
    return chosen.permute(0, 3, 1, 2)


def train_classifier(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    config: ClassifierConfig | None = None,
    flip: bool = False,
    epochs: int = 18,
    batch_size: int | None = None,
    lr: float = 4e-3,
    seed: int = 0,
    progress: bool = False,
) -> Classifier:
    """Trains a classifier on images uint8 [N, C, H, W] with labels int64 [N]; it is ready for inference.

    config: the architecture, by default that of the bundled classifier. epochs: passes over the images.
    batch_size: by default 250, or 125 for a residual network, or all images if there are fewer. lr: largest
    learning rate of AdamW. The same seed gives the same weights on one machine with one number of threads.
    progress: show a bar.

    The learning rate follows one cycle (Smith and Topin 2017, arXiv 1708.07120) that ends at zero; labels are
    smoothed by 0.05. A plain network is trained by AdamW, on images that `augment` changes and, with flip,
    mirrors. A residual network is trained by Muon (Jordan et al. 2024) for the kernels of its convolutions
    and by AdamW for all other weights, on images that `crop` changes, and in bfloat16 if the processor
    multiplies it in hardware.

    ValueError if there are fewer images than one batch, or for numbers out of range.
    """
    config = config or ClassifierConfig()
    residual = config.architecture == "residual"
    if batch_size is None:
        batch_size = max(1, min(125 if residual else 250, len(images)))
    batch_size, epochs = (
        whole_number("batch_size", batch_size, 1, 2**20),
        whole_number("epochs", epochs, 1, 10**6),
    )
    lr, seed = number("lr", lr, above=0), whole_number("seed", seed, 0)
    steps = len(images) // batch_size
    if steps == 0:
        raise ValueError(f"training needs at least {counted(batch_size, 'image')}, not {len(images)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("cpu"):
            classifier = Classifier(config).train()
        if not residual:
            layout: dict[str, Any] = {"memory_format": torch.channels_last}  # not in the stub of torch 2.13
            classifier.to(**layout)
        optimizers = _muon_and_adamw(classifier, lr) if residual else [_adamw(classifier.parameters(), lr)]
        schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                optimizer.defaults["lr"],
                total_steps=epochs * steps,
                pct_start=0.2,
                final_div_factor=1e4,
            )
            for optimizer in optimizers
        ]
        half = residual and multiplies_bfloat16(torch.device("cpu"))
        bar = tqdm(total=epochs * steps * batch_size, unit="img", disable=not progress)
        for _ in range(epochs):
            order = torch.randperm(len(images), device="cpu")[: steps * batch_size]
            for batch in order.view(steps, batch_size):
                x = crop(images[batch]) if residual else augment(images[batch], flip)
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    logits = classifier(x).float()
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
                classifier.zero_grad(set_to_none=True)
                loss.backward()
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    schedule.step()
                bar.update(batch_size)
            bar.set_postfix(loss=f"{loss.item():.3f}")
        bar.close()
    return classifier.eval().requires_grad_(False)


def _adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02)


def _muon_and_adamw(classifier: Classifier, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the kernels of all convolutions but the first, as matrices [outputs, inputs * 9]; AdamW."""
    kernels = [module.weight for module in classifier.modules() if isinstance(module, nn.Conv2d)][1:]
    moved = {id(kernel) for kernel in kernels}
    others = [parameter for parameter in classifier.parameters() if id(parameter) not in moved]
    matrices = [kernel.detach().flatten(1).requires_grad_() for kernel in kernels]  # views
    muon = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01)

    def take_gradients(*_: object) -> None:
        for matrix, kernel in zip(matrices, kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)

    muon.register_step_pre_hook(take_gradients)
    return [muon, _adamw(others, lr)]
