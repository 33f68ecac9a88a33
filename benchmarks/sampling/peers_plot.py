"""The plot of README.md: a step's time for each way of sampling, from an earlier result."""

import json
from pathlib import Path

from .peers import OURS, PEERS

BATCHES = (1, 8)
LABELS = {
    "exact": "fused-diffusion, exact",
    "fast": "fused-diffusion, fast",
    "reference": "fused-diffusion, plain PyTorch",
    "diffusers, best": "diffusers, compiled",
    "OpenVINO, bf16": "OpenVINO",
}


def draw(result_file: Path, picture: Path, model: str = "cifar10", mode: str = "unconditional") -> None:
    """Draws bars of ms per step, float32 above bfloat16, fastest first, for batches of 1 and 8."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    result = json.loads(result_file.read_text())
    figure, axes = pyplot.subplots(1, len(BATCHES), figsize=(10, 3.6), layout="constrained")
    for axis, batch in zip(axes, BATCHES, strict=True):
        measured = [
            row
            for row in result["chains"]
            if (row["model"], row["mode"], row["batch"]) == (model, mode, batch) and "step" in row
        ]
        measured.sort(key=lambda row: (not PEERS[row["peer"]][1], row["step"]))
        names = [LABELS.get(row["peer"], row["peer"]) for row in measured]
        types = ["float32" if PEERS[row["peer"]][1] else "bfloat16" for row in measured]
        times = [1e3 * row["step"] for row in measured]
        colours = [
            "tab:blue"
            if row["peer"] in ("exact", "fast")
            else "lightsteelblue"
            if row["peer"] in OURS
            else "silver"
            for row in measured
        ]
        positions = [i + 0.6 * (types[i] == "bfloat16") for i in range(len(measured))]  # a gap between dtypes
        bars = axis.barh(positions, times, color=colours)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        axis.set_yticks(
            positions, [f"{name}, {kind}" for name, kind in zip(names, types, strict=True)], fontsize=9
        )
        axis.invert_yaxis()
        axis.set_xlim(right=1.15 * max(times))
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.set_xlabel("milliseconds a step (shorter is better)", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"A step of DDPM's CIFAR-10 network on {result['threads']} threads of {result['device']}, "
        f"{result['build'].get('simd', 'no compiled kernels')}",
        fontsize=10,
    )
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
