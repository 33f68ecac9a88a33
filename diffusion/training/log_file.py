"""log.csv: one row for every few steps of a run."""

import warnings
from pathlib import Path

from ..storage.atomic import replacing
from ..storage.reading import read_text
from ..utils.errors import one_line

COLUMNS = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm", "seconds")


class LogFile:
    """log.csv of a run, to which rows are appended.

    logged: the step of the last row that a resumed run keeps; later rows are removed. None begins a new file.
    columns: their names, the first of which is "step". complete: a UserWarning if the file ends before
    `logged`; it is continued all the same. ValueError if it cannot be written, or is not a log.
    """

    def __init__(
        self,
        path: Path,
        logged: int | None,
        columns: tuple[str, ...] = COLUMNS,
        complete: bool = True,
    ):
        self.path = path
        rows = []
        if logged is not None and path.exists():
            rows = [(step, line) for step, line in read_rows(path, columns) if step <= logged]
        with replacing(path) as (temporary,):
            text = "".join([",".join(columns) + "\n", *(line for _, line in rows)])
            temporary.write_text(text, encoding="utf-8")
        self.last = rows[-1][0] if rows else 0  # the step of the last row
        if complete and self.last < (logged or 0):
            warnings.warn(
                f"{path} lacks lines: it ends at step {self.last}, and the run's last was {logged}",
                stacklevel=2,
            )

    def add(self, step: int, *values: float | None) -> None:
        """Appends a row: the step, and a value for each further column, None for an empty one."""
        self.last = step
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(",".join([str(step), *("" if v is None else f"{v:.6g}" for v in values)]) + "\n")
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {one_line(error)}") from error


def read_rows(path: Path, columns: tuple[str, ...] = COLUMNS) -> list[tuple[int, str]]:
    """Steps and lines of a log, without a last line that was cut off; ValueError if it is no log."""
    header, *lines = read_text(path).splitlines(keepends=True) or [""]
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    if header != ",".join(columns) + "\n":
        raise ValueError(f"{path} is no log of a training run; move it away to begin a new one")
    rows, last = [], 0
    for number, line in enumerate(lines, 2):
        values = line.split(",")
        if len(values) != len(columns) or not values[0].isdecimal() or len(values[0]) > 18:
            raise ValueError(f"{path} is damaged in line {number}; move it away to begin a new log")
        step = int(values[0])
        if step <= last:
            raise ValueError(
                f"{path} is damaged in line {number}: step {step} does not come after {last}; "
                "move it away to begin a new log"
            )
        rows.append((step, line))
        last = step
    return rows
