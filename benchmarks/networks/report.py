"""The measurements of networks as a page with a picture, and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..sampling.report import slug
from .models import MODELS
from .ways import EXACT, FAST, MODULE, WAYS

ENGINES = ("OpenVINO", "ONNX Runtime"), ("OpenVINO, bf16",)  # that exact and fast are compared with
LABELS = {MODULE: "PyTorch", "module, bf16": "PyTorch, bf16", EXACT: "accelerate, exact"}
LABELS |= {FAST: "accelerate, fast"}


def stem(result: dict) -> str:
    return f"{slug(result['device'])}-{result['threads']}"


def ratio(rows: dict[str, dict], own: str, others: tuple[str, ...]) -> float | None:
    """Seconds of the fastest of the others, divided by those of `own`; None where one was not timed."""
    times = [rows[name]["seconds"] for name in others if "seconds" in rows.get(name, {})]
    mine = rows.get(own, {}).get("seconds")
    return min(times) / mine if times and mine else None


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def short_table(entry: dict) -> str:
    lines = [f"{entry['network']}, batch {entry['batch']}: ms per evaluation"]
    for name, row in entry["ways"].items():
        found = f"{1e3 * row['seconds']:10.2f}" if "seconds" in row else f"  {row['reason']}"
        memory = f"  {row['memory'] / 2**30:.2f} GiB" if row.get("memory") else ""
        difference = f"  difference {row['difference']:.1e}" if "difference" in row else ""
        lines.append(f"  {name:16}{found}{difference}{memory}")
    return "\n".join(lines)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], optional: Sequence[int] = ()) -> list[str]:
    """A Markdown table. optional: columns that are left out where no row says anything in them."""
    empty = [i for i in optional if not any(row[i] for row in rows)]
    kept = [i for i in range(len(titles)) if i not in empty]
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(line[i] for i in kept) + " |" for line in lines]


def _aims(result: dict) -> list[str]:
    titles = ["network", "batch", "`exact`, to the faster engine", "aim"]
    titles += ["`fast`, to OpenVINO in bfloat16", "aim", "`exact`, to the module"]
    lines = []
    for entry in result["networks"]:
        rows, model = entry["ways"], MODELS[entry["network"]]
        exact, fast = (_times(ratio(rows, own, ENGINES[i])) for i, own in enumerate((EXACT, FAST)))
        aims = [f"{aim:.1f}x" if own else "" for own, aim in ((exact, model.exact), (fast, model.fast))]
        plain = _times(ratio(rows, EXACT, (MODULE,)))
        lines.append([model.origin, str(entry["batch"]), exact, aims[0], fast, aims[1], plain])
    return _table(titles, lines, optional=(2, 3, 4, 5, 6))


def _details(entry: dict) -> list[str]:
    rows = entry["ways"]
    titles = ["", "ms per evaluation", "difference", "peak memory", "`accelerate` in this precision is"]
    lines = []
    for name, row in rows.items():
        label = LABELS.get(name, name)
        if "seconds" not in row:
            lines.append([label, row["reason"], "", "", ""])
            continue
        memory = f"{row['memory'] / 2**30:.2f} GiB" if row.get("memory") else ""
        faster = _times(ratio(rows, EXACT if WAYS[name].single else FAST, (name,)))
        time, difference = f"{1e3 * row['seconds']:.2f}", f"{row['difference']:.1e}"
        lines.append([label, time, difference, memory, faster])
    heading = f"## {MODELS[entry['network']].origin}, batch {entry['batch']}"
    return [heading, "", *_table(titles, lines, optional=(3,))]


def _growth(points: list[dict]) -> list[str]:
    lines = ["## Growth", "", "Milliseconds per evaluation of the CIFAR-10 network."]
    for along in dict.fromkeys(point["along"] for point in points):
        row = [point for point in points if point["along"] == along]
        fixed = ", ".join(f"{key} {row[0][key]}" for key in ("batch", "threads", "size") if key != along)
        lines += ["", f"| {along} ({fixed}) | " + " | ".join(str(point[along]) for point in row) + " |"]
        lines += ["|---" * (len(row) + 1) + "|"]
        for way in row[0]["seconds"]:
            times = [point["seconds"].get(way) for point in row]
            cells = ("" if time is None else f"{1e3 * time:.2f}" for time in times)
            lines.append(f"| {LABELS.get(way, way)} | {' | '.join(cells)} |")
    return lines


def markdown(result: dict, picture: Path | None) -> str:
    """The page. picture: in the same folder; None without matplotlib."""
    lines = ["# Networks beside other engines", ""]
    if picture is not None:
        lines += [f"![Time of an evaluation of each network]({picture.name})", ""]
    lines += [
        f"{result['threads']} threads of {result['device']}, "
        f"{result['build'].get('simd', 'no compiled kernels')}, {result['date']}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + ".",
        "",
        f"Random weights, real configurations{' in small' if result['small'] else ''}. The ways of a "
        "network that compute in one precision take turns in one process, each in the same loop of "
        f"{result['steps']} DDIM steps; times are medians. Guided-diffusion's and EDM's networks are this "
        "package's modules for those checkpoints, in plain PyTorch; the others are their own packages'. "
        "OpenVINO and ONNX Runtime run the module exported as ONNX. Differences are of one output, root mean "
        "square, relative to PyTorch in float32. A ratio of 2x means that `exact` or `fast` takes half of "
        "the time. Memory, where it was measured, is the peak of a process that makes one way and evaluates "
        "it, with Python and PyTorch in it. Made by `python -m benchmarks.networks`.",
        "",
        *_aims(result),
    ]
    for entry in result["networks"]:
        lines += ["", *_details(entry)]
    if result["growth"]:
        lines += ["", *_growth(result["growth"])]
    return "\n".join(lines) + "\n"


def draw(result: dict, picture: Path) -> Path | None:
    """Draws bars of each network's times, in milliseconds. None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot

    entries = result["networks"]
    columns = min(3, len(entries))
    height = -(-len(entries) // columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(4.4 * columns, 2.6 * height), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(entries) :]:
        axis.set_visible(False)
    for axis, entry in zip(axes.flat, entries, strict=False):
        timed = [(name, row["seconds"]) for name, row in entry["ways"].items() if "seconds" in row]
        timed.sort(key=lambda pair: (not WAYS[pair[0]].single, pair[1]))
        names = [LABELS.get(name, name) for name, _ in timed]
        colours = ["tab:blue" if name in (EXACT, FAST) else "silver" for name, _ in timed]
        times = [1e3 * time for _, time in timed]
        bars = axis.barh(names, times, color=colours)
        labels = [f"{time:.0f}" if time >= 1000 else f"{time:.4g}" for time in times]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.tick_params(labelsize=8)
        axis.set_title(f"{entry['network']}, batch {entry['batch']}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("milliseconds an evaluation (shorter is better)", fontsize=9)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    return picture


def write(result: dict, json_file: Path, page: Path) -> list[Path]:
    """Writes the result, the page, and the picture, which is named as the page."""
    for path in (json_file, page):
        path.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result, indent=1) + "\n")
    picture = draw(result, page.with_suffix(".png"))
    page.write_text(markdown(result, picture))
    return [json_file, page, *([] if picture is None else [picture])]
