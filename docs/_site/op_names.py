"""The public names of the ops, read from their sources, because the site is built without PyTorch."""

import ast
from pathlib import Path


def op_names(root: Path) -> list[str]:
    """`__all__` of every folder of kernels/ops, in the order of the folders."""
    names = []
    for path in sorted(root.glob("kernels/ops/*/__init__.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and target.id == "__all__":
                names += ast.literal_eval(node.value)
    return names


def reference(root: Path) -> str:
    """The entries of the ops for the page of the reference on kernels."""
    return "".join(f"\n::: diffusion.kernels.{name}\n" for name in op_names(root))
