"""Weights that a formula makes, so that tests need not store those of a foreign network."""

import torch


def numbers(count: int, key: int) -> torch.Tensor:
    """`count` numbers in [-1, 1), a function of index and key that looks random."""
    h = torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898 + key * 78.233 + 1.0) * 43758.5453
    return (h - h.floor()) * 2 - 1


def images(shape: tuple[int, ...], key: int) -> torch.Tensor:
    """Noise of this shape with a standard deviation of about 1."""
    return (numbers(torch.Size(shape).numel(), key) * 1.7).float().reshape(shape)


def weights(names_by_shape: dict[str, str]) -> dict[str, torch.Tensor]:
    """A tensor for each name: {"8 3 3 3": "first.weight second.weight", "8": "first.bias norm.weight"}.

    Matrices and filters have the variance 1 / fan-in. A vector is near 1 where its name ends in "weight", and
    near 0 elsewhere.
    """
    shapes = {
        name: torch.Size(map(int, shape.split()))
        for shape, names in names_by_shape.items()
        for name in names.split()
    }
    tensors = {}
    for key, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        u = numbers(shape.numel(), key).reshape(shape)
        if len(shape) > 1:
            u = u * (3 / shape[1:].numel()) ** 0.5
        else:
            u = 1 + 0.3 * u if name.endswith("weight") else 0.2 * u
        tensors[name] = u.float()
    return tensors


def with_biases(modules: dict[str, str], without: tuple[str, ...] = ()) -> dict[str, str]:
    """The argument of `weights` for modules by the shape of their weights. A bias has its first dimension.

    without: names of modules that have no bias.
    """
    tensors: dict[str, str] = {}
    for shape, names in modules.items():
        biases = " ".join(f"{name}.bias" for name in names.split() if name not in without)
        for size, found in (
            (shape, " ".join(f"{name}.weight" for name in names.split())),
            (shape.split()[0], biases),
        ):
            tensors[size] = f"{tensors.get(size, '')} {found}".strip()
    return tensors
