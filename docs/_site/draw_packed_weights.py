"""Draws the pictures of docs/packed-weights.md: python docs/_site/draw_packed_weights.py.

Each picture shows the order in memory from the outermost index to the innermost. The marked cell of a strip
is enlarged in the strip below it; the last one is a table.
"""

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "packed-weights"
LEFT, WIDTH, STRIP, GAP, CELL = 150, 680, 30, 26, 20
FONT = 'font-family="Helvetica, Arial, DejaVu Sans, sans-serif"'
MARKED, PLAIN, LINE = "#ddf4ff", "#f6f8fa", "#8b949e"


def text(
    x: float, y: float, words: str, size: float = 12, anchor: str = "middle", colour: str = "#1f2328"
) -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{LINE}"/>'


def draw(
    name: str,
    title: str,
    strips: list[tuple[str, list[str], int]],
    rows: list[str],
    columns: list[str],
    **table,
):
    """Writes one picture.

    strips: (name, cells, marked cell), outermost first. rows, columns: labels of the table in the last cell.
    table: `label`, its name; `cell`, the text of a cell, by row and column; `note`, the line below.
    """
    y, shapes = 34, []
    for label, cells, marked in strips:
        width = WIDTH / len(cells)
        shapes.append(text(LEFT - 12, y + 20, label, anchor="end", colour="#57606a"))
        for i, cell in enumerate(cells):
            shapes += [box(LEFT + i * width, y, width, STRIP, MARKED if i == marked else PLAIN)]
            shapes += [text(LEFT + (i + 0.5) * width, y + 20, cell)]
        ends = (LEFT + marked * width, LEFT + (marked + 1) * width)
        for top, bottom in zip(ends, (LEFT, LEFT + WIDTH), strict=True):
            path = f"M{top:g} {y + STRIP} L{bottom:g} {y + STRIP + GAP}"
            shapes.append(f'<path d="{path}" stroke="{LINE}" stroke-dasharray="3 3" fill="none"/>')
        y += STRIP + GAP
    shapes.append(text(LEFT - 12, y + 14, table["label"], anchor="end", colour="#57606a"))
    width = WIDTH / (len(columns) + 1)
    for j, column in enumerate(columns):
        shapes.append(text(LEFT + (j + 1.5) * width, y + 14, column, 10.5, colour="#57606a"))
    for i, row in enumerate(rows):
        top = y + (i + 1) * CELL
        shapes.append(text(LEFT + width - 8, top + 14, row, 10.5, "end", "#57606a"))
        for j, column in enumerate(columns):
            cell = "..." if "..." in (row, column) else table["cell"](i, j)
            shapes.append(box(LEFT + (j + 1) * width, top, width, CELL, PLAIN))
            shapes.append(text(LEFT + (j + 1.5) * width, top + 14, cell, 10.5))
    y += (len(rows) + 1) * CELL
    shapes.append(text(LEFT, y + 22, table["note"], 12, "start"))
    height = y + 34
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 16} {height:g}" {FONT}>\n'
        f"<title>{escape(title)}</title>\n"
        f'<rect width="100%" height="100%" fill="white"/>\n{text(LEFT, 20, title, 14, "start")}\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def main() -> None:
    outputs = ["output 0", "output 1", "output 2", "...", "output 63"]
    panels = ["panel 0: outputs 0 to 63", "panel 1: 64 to 127", "...", "last: padded to 16"]
    taps = ["tap 0", "tap 1", "...", "tap 8"]
    draw(
        "direct",
        "Direct convolution, float32 or pairs of bfloat16",
        [("packed weight", panels, 0), ("panel", taps, 0)],
        ["channel 0", "channel 1", "...", "channel C - 1"],
        outputs,
        label="tap",
        cell=lambda i, j: f"w[{['0', '1', '2', '', '63'][j]}, {['0', '1', '', 'C-1'][i]}]",
        note="A row is 64 float32. In pairs, a cell is two bfloat16: channels 2 r and 2 r + 1.",
    )
    draw(
        "winograd",
        "Winograd, F(m x m, 3 x 3)",
        [
            ("packed weight", ["frequency 0", "frequency 1", "...", "frequency (m + 2)² - 1"], 0),
            ("frequency", panels, 0),
        ],
        ["channel 0", "channel 1", "...", "channel C - 1"],
        outputs,
        label="panel",
        cell=lambda i, j: f"U[{['0', '1', '2', '', '63'][j]}, {['0', '1', '', 'C-1'][i]}]",
        note="U = G w G^T for each output and channel, computed in float64 and rounded once.",
    )
    draw(
        "bfloat16-tiles",
        "AMX, bfloat16",
        [
            ("packed weight", ["panel 0: outputs 0 to 31", "panel 1: 32 to 63", "..."], 0),
            ("panel", ["chunk 0: channels 0 to 31", "chunk 1: 32 to 63", "..."], 0),
            ("chunk", taps, 0),
            ("tap", ["tile 0: outputs 0 to 15", "tile 1: outputs 16 to 31"], 0),
        ],
        ["pair 0", "pair 1", "...", "pair 15"],
        ["output 0", "output 1", "...", "output 15"],
        label="tile, 1024 bytes",
        cell=lambda i, j: "channels " + ["0, 1", "2, 3", "", "30, 31"][i],
        note="A row of 64 bytes holds two channels of 16 outputs, as TDPBF16PS multiplies them.",
    )
    draw(
        "int8-tiles",
        "AMX, float32 as three int8 limbs",
        [
            ("packed weight", ["channel scales", "panel 0: outputs 0 to 15", "panel 1: 16 to 31", "..."], 1),
            ("panel", ["header, 256 bytes", "chunk 0: channels 0 to 63", "chunk 1: 64 to 127", "..."], 1),
            ("chunk", taps, 0),
            ("tap", ["limb 0 (high)", "limb 1", "limb 2 (low)"], 0),
        ],
        ["row 0", "row 1", "row 2", "row 3", "row 4", "...", "row 15"],
        ["output 0", "output 1", "...", "output 15"],
        label="tile, 1024 bytes",
        cell=lambda i, j: (
            "channels " + ["0 to 3", "16 to 19", "32 to 35", "48 to 51", "4 to 7", "", "60 to 63"][i]
        ),
        note="A cell is four int8. Row 4 i + j holds channels 16 j + 4 i to 16 j + 4 i + 3 of the chunk.",
    )


if __name__ == "__main__":
    main()
