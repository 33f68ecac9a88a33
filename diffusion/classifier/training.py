"""Training of the classifier."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..validation import number, whole_number
from .network import Classifier, ClassifierConfig


def augment(images: torch.Tensor, flip: bool = False) -> torch.Tensor:
    """Images uint8 [N, 1, H, W], each slightly turned, scaled, sheared and moved, as float32 in [-1, 1].

    Up to 12 degrees, 12 %, 0.15 and 2 pixels of 28, uniformly, from PyTorch's global generator. flip: also
    mirror half of them.
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


def train_classifier(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    config: ClassifierConfig | None = None,
    flip: bool = False,
    epochs: int = 18,
    batch_size: int = 250,
    lr: float = 4e-3,
    seed: int = 0,
    progress: bool = False,
) -> Classifier:
    """A classifier trained on images uint8 [N, C, H, W] with labels int64 [N], ready for inference.

    AdamW under a one-cycle schedule (Smith and Topin 2017) that ends at zero, label smoothing 0.05. On one
    machine with one number of threads the same seed gives the same weights. ValueError if there are fewer
    images than one batch.
    """
    batch_size, epochs = (
        whole_number("batch_size", batch_size, 1, 2**20),
        whole_number("epochs", epochs, 1, 10**6),
    )
    lr, seed = number("lr", lr, above=0), whole_number("seed", seed, 0)
    steps = len(images) // batch_size
    if steps == 0:
        raise ValueError(f"training needs at least {batch_size} images, not {len(images)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("cpu"):
            classifier = Classifier(config).to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=epochs * steps, pct_start=0.2, final_div_factor=1e4
        )
        bar = tqdm(total=epochs * steps * batch_size, unit="img", disable=not progress)
        for _ in range(epochs):
            order = torch.randperm(len(images), device="cpu")[: steps * batch_size]
            for batch in order.view(steps, batch_size):
                logits = classifier(augment(images[batch], flip))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(batch_size)
            bar.set_postfix(loss=f"{loss.item():.3f}")
        bar.close()
    return classifier.eval().requires_grad_(False)
