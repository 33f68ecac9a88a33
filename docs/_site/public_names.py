"""The public names of ops and samplers, read from the sources: the site is built without PyTorch."""

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


def sampler_names(root: Path) -> list[str]:
    """The functions of SAMPLERS, in its order."""
    for node in ast.parse((root / "diffusion/samplers/__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SAMPLERS":
            return [ast.unparse(value) for value in node.value.values]
    raise LookupError("diffusion/samplers/__init__.py has no SAMPLERS")


def entries(page: str, root: Path) -> str:
    """The entries of a page, such as "reference/kernels.md", beyond those in its file."""
    names = {
        "reference/kernels.md": [f"diffusion.kernels.{name}" for name in op_names(root)],
        "reference/samplers.md": [f"diffusion.steps.{name}" for name in sampler_names(root)],
    }
    return "".join(f"\n::: {name}\n" for name in names.get(page, []))
