"""JSON lines, appended one result at a time, so that results survive a later crash."""

import json
import os
from pathlib import Path
from typing import Any


def append(path: Path, **values: Any) -> None:
    """Appends one line in one write, so that lines of several processes do not mix."""
    line = json.dumps(values, default=str) + "\n"
    with open(path, "rb+" if path.exists() else "wb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            line = line if file.read(1) == b"\n" else "\n" + line  # a writer was killed in mid-line
    handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines; none if there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off
            continue
    return [row for row in rows if isinstance(row, dict)]
