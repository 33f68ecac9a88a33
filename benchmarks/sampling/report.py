"""The measurements as tables, Markdown and plots."""

import json
from pathlib import Path
from typing import Any

from .peers import OURS, PEERS

PARTS = ("convolution", "norm", "attention", "rest", "step")


def slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _best(rows: dict[str, dict], single: bool) -> float | None:
    """Seconds of a step of the fastest peer in float32, or in 16 bits."""
    steps = [
        row["step"]
        for name, row in rows.items()
        if name not in OURS and PEERS[name][1] == single and row.get("step")
    ]
    return min(steps, default=None)


def short_table(where: dict[str, Any], rows: dict[str, dict]) -> str:
    lines = [f"{where['model']}, {where['mode']}, batch {where['batch']}: ms per step"]
    for name, row in rows.items():
        found = f"{1e3 * row['step']:9.2f}" if "step" in row else f"  {row['reason']}"
        lines.append(f"  {name:16}{found}  mean difference {row.get('difference', float('nan')):.1e}")
    return "\n".join(lines)


def _ratio(peer: float | None, own: float | None) -> str:
    return "" if not peer or not own else f"{peer / own:.2f}x"


def _chain_table(result: dict, group: list[dict]) -> list[str]:
    rows = {row["peer"]: row for row in group}
    titles = ["ms per step", "of the matrix rate", "images/s, 50 steps", "images/s, 1000 steps"]
    measured = any(row.get("memory") for row in group)
    titles += ["peak memory"] * measured + ["`exact` is", "`fast` is"]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    evaluations = group[0]["batch"] * (1 if group[0]["mode"] == "unconditional" else 2)
    for name, row in rows.items():
        if "step" not in row:
            lines.append(f"| {name} | {row['reason']}" + " |" * len(titles))
            continue
        rate = result["matrix_rate"]["float32" if PEERS[name][1] else "bfloat16"]
        share = evaluations * row["flops"] / row["step"] / rate
        images = [row["batch"] / (row["call"] + steps * row["step"]) for steps in (50, 1000)]
        cells = [f"{1e3 * row['step']:.2f}", f"{share:.0%}", *(f"{n:.3g}" for n in images)]
        if measured:
            cells.append(f"{row['memory'] / 2**30:.2f} GiB" if row.get("memory") else "")
        cells += [_ratio(row["step"], rows.get(precision, {}).get("step")) for precision in ("exact", "fast")]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def markdown(result: dict, plots: list[Path]) -> str:
    rates = result["matrix_rate"]
    lines = [
        f"# Sampling on {result['device']}",
        "",
        f"{result['threads']} threads; {result['build'].get('simd', 'no compiled kernels')}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + f". PyTorch multiplies large matrices at {rates['float32'] / 1e9:.0f} GFLOP/s in float32 and "
        f"{rates['bfloat16'] / 1e9:.0f} in bfloat16. The shares of these rates count the FLOPs of direct "
        "convolutions; Winograd's algorithm needs fewer, and with AMX `exact` computes six products of limbs "
        "instead of one of float32. In the last columns, `2x` means that `exact` or `fast` takes half of the "
        "row's time. A step is one of DDIM; guided steps evaluate the network on twice the images. "
        "Made by `python -m benchmarks.sampling`.",
    ]
    keys = dict.fromkeys((row["model"], row["mode"], row["batch"]) for row in result["chains"])
    for key in keys:
        group = [row for row in result["chains"] if (row["model"], row["mode"], row["batch"]) == key]
        lines += ["", f"## {key[0]}, {key[1]}, batch {key[2]}", "", *_chain_table(result, group)]
    if result["parts"]:
        lines += ["", "## Parts of a step, in ms", ""]
        lines += ["| | " + " | ".join(PARTS) + " | network | whole | outside |"]
        lines += ["|---" * (len(PARTS) + 4) + "|"]
        for row in result["parts"]:
            spent = row["seconds"]
            values = [f"{1e3 * spent.get(part, 0):.2f}" for part in (*PARTS, "network", "chain")]
            name = f"{row['model']}, {row['mode']}, batch {row['batch']}, {row['precision']}"
            outside = (spent["chain"] - spent["network"]) / spent["chain"]
            lines.append(f"| {name} | {' | '.join(values)} | {outside:.1%} |")
        lines += [
            "",
            "The first columns are the network's calls by kind of op and the reverse step, each timed alone. "
            "The last three are one evaluation of the network, the whole step, and the share of it outside "
            "the network: the time of a step in a sampling loop whose network costs nothing.",
        ]
    if result["steps"]:
        counted = result["steps"]
        lines += ["", f"## Whole calls, one image of {counted['model']}, in ms", ""]
        lines += ["| steps | " + " | ".join(map(str, counted["steps"])) + " |"]
        lines += ["|---" * (len(counted["steps"]) + 1) + "|"]
        for name, times in counted["seconds"].items():
            lines.append(f"| {name} | {' | '.join(f'{1e3 * t:.1f}' for t in times)} |")
    lines += [line for plot in plots for line in ("", f"![{plot.stem}]({plot.name})")]
    return "\n".join(lines) + "\n"


def draw(result: dict, folder: Path, stem: str) -> list[Path]:
    """Draws bars of every comparison, and a step's time by batch and image size. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("agg")
    from matplotlib import pyplot

    paths = []
    keys = list(dict.fromkeys((row["model"], row["mode"], row["batch"]) for row in result["chains"]))
    if keys:
        columns = min(4, len(keys))
        figure, axes = pyplot.subplots(
            -(-len(keys) // columns),
            columns,
            figsize=(4 * columns, 3 * -(-len(keys) // columns)),
            squeeze=False,
        )
        for axis, key in zip(axes.flat, keys, strict=False):
            rows = [r for r in result["chains"] if (r["model"], r["mode"], r["batch"]) == key and "step" in r]
            colours = ["tab:blue" if row["peer"] in OURS else "tab:grey" for row in rows]
            axis.barh([row["peer"] for row in rows], [1e3 * row["step"] for row in rows], color=colours)
            axis.invert_yaxis()
            axis.set_title(f"{key[0]}, {key[1]}, batch {key[2]}", fontsize=9)
            axis.set_xlabel("ms per step")
        figure.tight_layout()
        paths.append(folder / f"{stem}-steps.png")
        figure.savefig(paths[-1], dpi=80)
        pyplot.close(figure)
    if result["growth"]:
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2))
        sizes = [row["size"] for row in result["growth"]]
        batches = [row["batch"] for row in result["growth"]]
        common = (max(set(sizes), key=sizes.count), max(set(batches), key=batches.count))
        for axis, along, fixed, value in (
            (axes[0], "batch", "size", common[0]),
            (axes[1], "size", "batch", common[1]),
        ):
            rows = sorted(
                (row for row in result["growth"] if row[fixed] == value), key=lambda row: row[along]
            )
            for name in rows[0]["step"] if rows else ():
                per_image = [1e3 * row["step"][name] / row["batch"] for row in rows]
                axis.plot([row[along] for row in rows], per_image, "o-", label=name)
            axis.set(xscale="log", yscale="log", xlabel=along, ylabel="ms per step and image")
            axis.set_title(f"{fixed} {value}", fontsize=9)
            axis.legend(fontsize=8)
        figure.tight_layout()
        paths.append(folder / f"{stem}-growth.png")
        figure.savefig(paths[-1], dpi=80)
        pyplot.close(figure)
    return paths


def write(result: dict, folder: Path, device: str) -> list[Path]:
    """Writes JSON, Markdown and plots, named after the device."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = (
        f"sampling-{slug(result['device'])}-{result['threads']}"
        if device == "cpu"
        else f"sampling-{slug(result['device'])}"
    )
    paths = [folder / f"{stem}.json"]
    paths[0].write_text(json.dumps(result, indent=1) + "\n")
    plots = draw(result, folder, stem)
    paths.append(folder / f"{stem}.md")
    paths[1].write_text(markdown(result, plots))
    return [*paths, *plots]
