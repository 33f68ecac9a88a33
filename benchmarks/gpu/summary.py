"""The summary of a run, in at most 60 lines and 8,000 characters: failures first, then figures."""

from collections.abc import Callable, Iterable
from typing import Any

LINES, WIDTH = 60, 131  # with their ends, less than 8,000 characters

Row = dict[str, Any]


def text(rows: list[Row]) -> str:
    """The summary of the lines of gpu.jsonl."""
    parts = {name: [row for row in rows if row.get("part") == name] for name in _names(rows)}
    lines = [_clipped(line) for section in SECTIONS for line in _of(section, parts)]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"... {len(lines) - LINES + 1} lines more; gpu.jsonl has everything"]
    return "\n".join(lines) + "\n"


def _of(section: Callable[[dict[str, list[Row]]], list[str]], parts: dict[str, list[Row]]) -> list[str]:
    """A section's lines; unreadable results of one section do not affect the others."""
    try:
        return section(parts)
    except Exception as error:
        return [f"{section.__name__.strip('_')} cannot be shown: {type(error).__name__}: {error}"]


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(str(row.get("part")) for row in rows))


def _clipped(line: str) -> str:
    line = "".join(c if c.isprintable() and c.isascii() else " " for c in line)
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _with(rows: Iterable[Row], key: str) -> list[Row]:
    return [row for row in rows if key in row]


def _device(parts: dict[str, list[Row]]) -> list[str]:
    lines = []
    for row in _with(parts.get("environment", ()), "device"):
        lines.append(f"{row['device']}, cuda {row['cuda']}, cudnn {row['cudnn']}; {row['nvidia_smi'] or ''}")
    for row in _with(parts.get("environment", ()), "versions"):
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        lines.append(f"{versions}; {row['cores']} cores")
    for row in _with(parts.get("libraries", ()), "build"):
        origin = "built here" if row["built"] else "carried"
        lines.append(f"libraries {origin}: cuda {row['build'].get('cuda')}, cpp {row['build'].get('cpp')}")
    return lines


def _statuses(parts: dict[str, list[Row]]) -> list[str]:
    lines = []
    for name, rows in parts.items():
        for row in _with(rows, "status"):
            counts = [r for r in rows if "counts" in r][-1:]
            tests = "".join(f", {number} {word}" for c in counts for word, number in c["counts"].items())
            compiled = len(_with(rows, "compiled_in"))
            tests += f", {compiled} networks compiled" if name == "compilation" else ""
            first = f": {row['failures'][0]}" if row["failures"] else ""
            lines.append(f"{row['status'].upper():8}{name:12}{row['seconds']:6.1f} s{tests}{first}")
    return lines


def _failures(parts: dict[str, list[Row]]) -> list[str]:
    """Further failures of parts, failed tests, and why tests were skipped."""
    lines = []
    for name, rows in parts.items():
        more = [failure for row in _with(rows, "status") for failure in row["failures"][1:]]
        more += [f"{row['test'].rpartition('::')[2]}: {row['reason']}" for row in _with(rows, "test")]
        lines += [f"  {name}: {line}" for line in more[:4]]
        lines += [f"  {name}: and {len(more) - 4} more"] if len(more) > 4 else []
        for row in [r for r in rows if r.get("skips")][-1:]:
            lines += [f"  {name}: {n} skipped: {reason}" for reason, n in list(row["skips"].items())[:2]]
    return lines[:14]


def _wgmma(parts: dict[str, list[Row]]) -> list[str]:
    """Whether attention by wgmma agrees with float64, and how fast it is beside the kernel by mma."""
    rows = parts.get("wgmma", [])
    lines = [f"attention by wgmma was not tried: {row['refused']}" for row in _with(rows, "refused")]
    compared = _with(rows, "errors")
    if not compared:
        return lines
    wrong = [row for row in compared if row["wrong"] is not None]
    error, other = (max(row["errors"][name] for row in compared) for name in ("wgmma", "mma"))
    verdict = f"IS WRONG: {wrong[0]['wrong']}" if wrong else "agrees with float64"
    lines.append(
        f"attention by wgmma {verdict} ({len(compared) - len(wrong)} of {len(compared)} shapes, "
        f"error {error:.2g}, by mma {other:.2g})"
    )
    groups: dict[tuple, list[str]] = {}
    for row in _with(rows, "times"):
        batch, *size = row["shape"]
        ours, other = (row["times"][name] for name in ("wgmma", "mma"))
        groups.setdefault(tuple(size), []).append(f"{batch}: {1e6 * ours:.1f} {other / ours:.2f}x mma")
    for size, cells in groups.items():
        lines.append(f"attention_wgmma {'x'.join(map(str, size))}, us by batch  {';  '.join(cells)}")
    return lines


def _ops(parts: dict[str, list[Row]]) -> list[str]:
    """A line for each op and shape, batches together: us, share of a copy's bandwidth, and the best peer."""
    rows = parts.get("ops", [])
    copies = _with(rows, "bytes_per_second")
    if not copies:
        return []
    rate = copies[-1]["bytes_per_second"]
    lines = [
        f"ops in bfloat16, batch: us, share of copy's {rate / 1e12:.2f} TB/s, PyTorch's best; * in cache"
    ]
    groups: dict[tuple, list[Row]] = {}
    for row in _with(rows, "backend"):
        groups.setdefault((row["op"], row["backend"], *row["shape"][1:]), []).append(row)
    for (op, backend, *shape), found in groups.items():
        cells = []
        for row in found:
            share = row["bytes"] / row["seconds"] / rate
            peers = {name: s for name, s in row["peers"].items() if isinstance(s, float)}
            best = min(peers, key=peers.get, default=None)
            name = f" {best}" if len(row["peers"]) > 1 else ""
            peer = f" {peers[best] / row['seconds']:.2f}x{name}" if best else ""
            hot = "" if row["beyond_cache"] else "*"
            cells.append(f"{row['shape'][0]}: {1e6 * row['seconds']:.1f} {share:.0%}{peer}{hot}")
        kind = "" if backend == "cuda" else f" {backend}"
        lines.append(f"{op}{kind} {'x'.join(map(str, shape))}  {';  '.join(cells)}")
    return lines


def _sampler(parts: dict[str, list[Row]]) -> list[str]:
    rows = _with(parts.get("sampler", ()), "call")
    lines = ["sampler, ms per step by batch: precision, guidance, (nodes, GiB)"] if rows else []
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["precision"], row["guidance"]), []).append(row)
    for (precision, guidance), found in groups.items():
        cells = []
        for row in found:
            nodes, memory = max(row["nodes"], default="-"), row["reserved"] / 2**30
            cells.append(f"{row['batch']}: {1e3 * row['step']:.2f} ({nodes}, {memory:.1f})")
        lines.append(f"{precision} {guidance:.0f}  {';  '.join(cells)}")
    return lines


def _peer(parts: dict[str, list[Row]]) -> list[str]:
    rows = _with(parts.get("peer", ()), "way")
    lines = ["diffusers bfloat16, ms per step by batch (network alone in its graph, nodes)"] if rows else []
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["way"], row["mode"], row["guidance"]), []).append(row)
    for (way, mode, guidance), found in groups.items():
        cells = []
        for row in found:
            alone = f" ({1e3 * row['network']:.2f}, {row['nodes'][0]})" if "network" in row else ""
            cells.append(f"{row['batch']}: {1e3 * row['step']:.2f}{alone}")
        lines.append(f"{way} {mode or ''} {guidance:.0f}  {';  '.join(cells)}")
    return lines


def _training(parts: dict[str, list[Row]]) -> list[str]:
    return [
        f"training, batch {row['batch']}, {row['loop']}: {row['images_per_second']:.0f} images/s, "
        f"{row['allocated'] / 2**30:.1f} GiB"
        for row in _with(parts.get("training", ()), "loop")
    ]


def _profiles(parts: dict[str, list[Row]]) -> list[str]:
    lines = []
    for row in _with(parts.get("sampler", ()), "kernels"):
        lines.append(
            f"a step of batch {row['batch']} on the device: {row['total_us']:.0f} us, "
            f"{row['launches']:.0f} launches; most of it:"
        )
        for kernel in row["kernels"][:5]:
            lines.append(f"  {kernel['us']:9.1f} us {kernel['launches']:5.0f}  {kernel['name']}")
    return lines


SECTIONS = (_device, _statuses, _failures, _wgmma, _ops, _sampler, _peer, _training, _profiles)
