"""The digest of the compiled libraries' sources; setup.py records it and `_native.py` compares it.

setup.py runs this file by its path before anything is installed, so it imports the standard library alone.
"""

import hashlib
from pathlib import Path


def digest_of_sources(folder: Path) -> str:
    """SHA-256, in hexadecimal, of the paths below `folder` (csrc/) and contents of all C++ and CUDA files."""
    digest = hashlib.sha256()
    sources = (path for path in folder.rglob("*") if path.suffix in (".h", ".inc", ".cpp", ".cu"))
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in sources):
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
