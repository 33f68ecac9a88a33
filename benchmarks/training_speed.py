"""Speed of training recipes on one CPU thread, as a share of the processor's rate of matrix products:
python -m benchmarks.training_speed RECIPE [RECIPE ...] [--set FIELD=VALUE].

Times are CPU seconds of this process, the least of several steps, so that other work on the machine counts
for little. A step counts as three times the multiplications and additions of the network's forward pass
(PyTorch's count): the gradients of its inputs and of its weights cost as much each. Optimizer, averages,
normalisations and activations take time and count as no work, so the share of the matrix rate is that of the
whole step. Convolutions by Winograd's algorithm, in float32, count as if they multiplied directly, so the
share can exceed 100 %.
"""

import argparse
import time
from collections.abc import Callable

import torch

from diffusion.training.recipe import changed, load_recipe
from diffusion.training.trainer import Trainer
from diffusion.utils.device import multiplies_bfloat16

from .flops import flops_of_unet
from .matrix_rate import matrix_rate

BATCHES = 4  # batches of images, which steps use in turn
WARM_UP = 2  # steps before the timed ones; they allocate memory


def cpu_seconds(run: Callable[[], object], times: int = 5) -> float:
    """The least CPU time of `run`."""
    least = float("inf")
    for _ in range(times):
        start = time.process_time()
        run()
        least = min(least, time.process_time() - start)
    return least


def trainer_of(name: str, changes: list[str], autocast: torch.dtype | None) -> Trainer:
    """A run of a recipe by name or file, on noise, because the time does not depend on the images."""
    recipe = changed(load_recipe(name), changes)
    config, count = recipe.unet, BATCHES * recipe.batch_size
    size = config["sample_size"]
    shape = (config["in_channels"], *((size, size) if isinstance(size, int) else size))
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8)
    classes = config.get("num_classes")
    labels = None if classes is None else torch.randint(0, classes, (count,))
    return Trainer(recipe, images, labels, autocast=autocast)


def measure(name: str, changes: list[str], autocast: torch.dtype | None, steps: int) -> dict[str, float]:
    """The CPU seconds of a step, images per CPU second, FLOP of an image, and FLOP per CPU second."""
    trainer = trainer_of(name, changes, autocast)
    for _ in range(WARM_UP):
        trainer.train_step()
    seconds, size = cpu_seconds(trainer.train_step, steps), trainer.recipe.batch_size
    flop = 3 * flops_of_unet(trainer.ema.unet)
    return {"seconds": seconds, "images/s": size / seconds, "flop": flop, "rate": flop * size / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_speed", description=__doc__)
    add = parser.add_argument
    add("recipes", nargs="+", metavar="RECIPE", help="a recipe of the package, or a .json file")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="changes of the recipes: batch_size=16")
    add(
        "--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 where the processor multiplies it"
    )
    add(
        "--steps",
        type=int,
        default=10,
        help="number of timed steps; the fastest counts (default: %(default)s)",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    default = "bfloat16" if multiplies_bfloat16(torch.device("cpu")) else "float32"
    dtype = getattr(torch, args.dtype or default)
    autocast = None if dtype == torch.float32 else dtype
    try:
        rows = {name: measure(name, args.set, autocast, args.steps) for name in args.recipes}
    except ValueError as error:
        parser.error(str(error))
    peak = matrix_rate(dtype, cpu_seconds)
    print(f"{dtype}, one thread; products of large matrices: {peak / 1e12:.3f} TFLOP/s")
    for name, row in rows.items():
        print(
            f"{name}: {row['seconds']:.3f} s a step, {row['images/s']:.1f} images/s, {row['flop'] / 1e9:.2f} "
            f"GFLOP an image, {row['rate'] / 1e12:.3f} TFLOP/s, {row['rate'] / peak:.0%} of the matrix rate"
        )


if __name__ == "__main__":
    main()
