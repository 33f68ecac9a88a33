"""A digit classifier, trained apart from any diffusion model, which judges what a model samples.

`python -m diffusion.classifier --data-dir DIR --out FOLDER` trains it on MNIST's 60,000 training digits and
writes what the package ships: the weights, the moments of their features over the training set, and how far
real test digits are from them.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from .data import load_mnist, to_float
from .files import check_writable, replacing
from .frechet import frechet_distance, moments

BUNDLED = Path(__file__).parent / "weights" / "mnist-classifier"
FORMAT = "fused-diffusion-digit-classifier"
CLASSES = 10


class Classifier(nn.Module):
    """Convolutional network for 28x28 digits: five 3x3 convolutions, 64 features, ten logits.

    `folder` is where `load_classifier` found its weights.
    """

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_block(1, 16, padding=0),
            *_block(16, 16, padding=0),
            nn.MaxPool2d(2),
            *_block(16, 32, padding=1),
            *_block(32, 32, padding=1),
            nn.MaxPool2d(2),
            *_block(32, 64, padding=1),
        )
        self.hidden = nn.Linear(64 * 6 * 6, self.num_features)
        self.dropout = nn.Dropout(0.3)
        self.output = nn.Linear(self.num_features, CLASSES)
        self.folder: Path | None = None

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Penultimate layer after its ReLU, [N, 64], of images float32 [N, 1, 28, 28] in [-1, 1]."""
        if x.ndim != 4 or x.shape[1:] != (1, 28, 28):
            raise ValueError(f"the digit classifier takes images [N, 1, 28, 28], not {list(x.shape)}")
        x = x.contiguous(memory_format=torch.channels_last)
        return F.relu(self.hidden(self.convolutions(x).flatten(1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of images float32 [N, 1, 28, 28] in [-1, 1]."""
        return self.output(self.dropout(self.features(x)))


def _block(in_channels: int, out_channels: int, padding: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=padding, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


@dataclass(frozen=True)
class Reference:
    """What samples are measured against, in the features of one classifier.

    mean [F], cov [F, F]: float64, over a training set. real_random, real_balanced: Fréchet distances from it
    of disjoint samples of `sample_size` real test digits each, drawn at random or as many of each class. A
    random draw varies in its share of each class, so it lies further off; like is to be compared with like.
    test_accuracy: the classifier's share of right answers on all test digits. source: one line that says
    which digits all this was measured on.
    """

    mean: torch.Tensor
    cov: torch.Tensor
    real_random: tuple[float, ...]
    real_balanced: tuple[float, ...]
    sample_size: int
    test_accuracy: float
    source: str


def load_classifier(folder: str | os.PathLike | None = None) -> tuple[Classifier, Reference]:
    """The classifier in a folder, ready for inference on the CPU, and the reference stored beside it.

    folder: what `python -m diffusion.classifier` wrote; by default the one that is bundled. ValueError if a
    file is missing, damaged or of another architecture.
    """
    folder = Path(folder) if folder is not None else BUNDLED
    classifier = Classifier()
    try:
        card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if card.get("format") != FORMAT:
            raise ValueError(f"its config.json does not say format {FORMAT}")
        weights = load_file(folder / "model.safetensors")
        stored = load_file(folder / "statistics.safetensors")
        if not all(tensor.isfinite().all() for tensor in (*weights.values(), *stored.values())):
            raise ValueError("it holds NaN or infinite values")
        classifier.load_state_dict(weights)
        real = {name: tuple(stored[name].tolist()) for name in ("real_random", "real_balanced")}
        reference = Reference(mean=stored["mean"], cov=stored["cov"], **real, **card["reference"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} holds no usable digit classifier: {reason}") from error
    classifier.folder = folder
    return classifier.eval().requires_grad_(False), reference


def save_classifier(
    folder: str | os.PathLike, classifier: Classifier, reference: Reference, training: dict
) -> None:
    """Writes what `load_classifier` reads; `training` (JSON-able) tells how the classifier was made."""
    folder = Path(folder)
    numbers = {
        "mean": reference.mean,
        "cov": reference.cov,
        "real_random": torch.tensor(reference.real_random, dtype=torch.float64),
        "real_balanced": torch.tensor(reference.real_balanced, dtype=torch.float64),
    }
    card = {
        "format": FORMAT,
        "reference": {
            "sample_size": reference.sample_size,
            "test_accuracy": reference.test_accuracy,
            "source": reference.source,
        },
        "training": training,
    }
    targets = [folder / name for name in ("model.safetensors", "statistics.safetensors", "config.json")]
    with replacing(*targets) as (model_path, statistics_path, card_path):
        save_file(_stored(classifier), model_path)
        save_file(numbers, statistics_path)
        card_path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _stored(classifier: Classifier) -> dict[str, torch.Tensor]:
    """Its state as it is stored: kernels and matrices in float16, vectors as they are."""
    return {
        name: (value.half() if value.ndim > 1 else value).contiguous()
        for name, value in classifier.state_dict().items()
    }


@torch.inference_mode()
def classify(classifier: Classifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features float32 [N, 64] and predicted digits int64 [N] of images uint8 [N, 1, 28, 28]."""
    features = torch.cat([classifier.features(to_float(part)) for part in images.split(500)])
    return features, classifier.output(features).argmax(1)


def measure_reference(
    classifier: Classifier, data_dir: str | os.PathLike, sample_size: int = 1000, seed: int = 0
) -> Reference:
    """Moments of MNIST's training digits in a classifier's features, and what its test digits give.

    The test digits are shuffled (by seed) before they are cut into samples: their second half was written by
    other people than the first. ValueError if the data cannot be read or holds too few test digits.
    """
    train_images, _ = load_mnist(data_dir, "train")
    test_images, test_labels = load_mnist(data_dir, "test")
    order = torch.randperm(len(test_images), generator=torch.Generator().manual_seed(seed))
    random = _samples(order, sample_size)
    wanted = torch.bincount(balanced_labels(sample_size), minlength=CLASSES).tolist()
    pools = [_samples(order[test_labels[order] == digit], wanted[digit]) for digit in range(CLASSES)]
    balanced = [torch.cat(parts) for parts in zip(*pools, strict=False)]
    if not balanced:
        raise ValueError(
            f"{data_dir} has {len(test_images):,} test digits, too few for {sample_size:,}, balanced by class"
        )
    mean, cov = moments(classify(classifier, train_images)[0])
    features, digits = classify(classifier, test_images)
    return Reference(
        mean=mean,
        cov=cov,
        real_random=tuple(frechet_distance(*moments(features[part]), mean, cov) for part in random),
        real_balanced=tuple(frechet_distance(*moments(features[part]), mean, cov) for part in balanced),
        sample_size=sample_size,
        test_accuracy=(digits == test_labels).double().mean().item(),
        source=(
            f"MNIST: {len(train_images):,} training digits; {len(test_images):,} test digits shuffled with "
            f"seed {seed}, {len(random)} disjoint samples at random, {len(balanced)} balanced"
        ),
    )


def balanced_labels(count: int) -> torch.Tensor:
    """Labels int64 [count] that hold each digit as often as any other, or once more; at least one of each."""
    if count < CLASSES:
        raise ValueError(f"a balanced sample needs at least {CLASSES} digits, one of each class, not {count}")
    return torch.arange(count) % CLASSES


def _samples(indices: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Disjoint whole samples of `size` from the front of `indices`."""
    return [part for part in indices.split(size) if len(part) == size]


def augment(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 [N, 1, H, W], each slightly turned, scaled, sheared and moved, as float32 in [-1, 1].

    Up to 12 degrees, 12 %, 0.15 and 2 pixels of 28, uniformly, from PyTorch's global generator.
    """
    turn, width, height, shear, right, down = torch.rand(6, len(images)).mul(2).sub(1).unbind()
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
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images.float() / 255, grid, align_corners=False) * 2 - 1


def train_classifier(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int = 18,
    batch_size: int = 250,
    lr: float = 4e-3,
    seed: int = 0,
    progress: bool = False,
) -> Classifier:
    """A classifier trained on images uint8 [N, 1, 28, 28] with labels int64 [N], ready for inference.

    AdamW under a one-cycle schedule (Smith and Topin 2017) that ends at zero, label smoothing 0.05. On one
    machine with one number of threads the same seed gives the same weights. ValueError if there are fewer
    images than one batch.
    """
    steps = len(images) // batch_size
    if steps == 0 or epochs < 1:
        raise ValueError(
            f"training needs at least {batch_size} images and 1 epoch, not {len(images)} and {epochs}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier().to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=epochs * steps, pct_start=0.2, final_div_factor=1e4
        )
        bar = tqdm(total=epochs * steps * batch_size, unit="img", disable=not progress)
        for _ in range(epochs):
            for batch in torch.randperm(len(images))[: steps * batch_size].view(steps, batch_size):
                logits = classifier(augment(images[batch]))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(batch_size)
            bar.set_postfix(loss=f"{loss.item():.3f}")
        bar.close()
    return classifier.eval().requires_grad_(False)


def main(arguments: list[str] | None = None) -> None:
    """Trains, measures and writes a classifier; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m diffusion.classifier", description=main.__doc__)
    parser.add_argument("--data-dir", required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--out", required=True, help="folder to write, as diffusion/weights/mnist-classifier")
    parser.add_argument(
        "--epochs", type=int, default=18, help="passes over the training digits (default: 18)"
    )
    options = parser.parse_args(arguments)
    try:
        check_writable(Path(options.out) / "config.json")
        images, labels = load_mnist(options.data_dir, "train")
        start = time.monotonic()
        classifier = train_classifier(images, labels, epochs=options.epochs, progress=True)
        training = {
            "command": "python -m diffusion.classifier",
            "data": f"MNIST, {len(images):,} training digits",
            "epochs": options.epochs,
            "seconds": round(time.monotonic() - start),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        classifier.load_state_dict(_stored(classifier))  # measured as stored, in half precision
        reference = measure_reference(classifier, options.data_dir)
        save_classifier(options.out, classifier, reference, training)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"{options.out}: {reference.test_accuracy:.2%} of the test digits ({reference.source})")


if __name__ == "__main__":
    main()
