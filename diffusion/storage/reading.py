"""Reads files that users name: regular files of a bounded size, among them JSON, safetensors and .pt.

Nothing here ever unpickles code. Any fault of a file is a ValueError of one line that names the file.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open

from ..utils.errors import one_line
from ..utils.memory import amount, check_fits, total_memory

MAX_JSON_BYTES = 2**26
MAX_PACKED_PICKLE = 2**24  # bytes; a small file can unpack to a pickle that takes minutes to read
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CPU = torch.device("cpu")
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def is_folder(path: str | os.PathLike) -> bool:
    """Whether there is a folder of this name; ValueError if that cannot be told, as for a name too long."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise ValueError(f"cannot read {path}: {one_line(error)}".replace("\0", "\\0")) from error


@contextlib.contextmanager
def open_regular(path: str | os.PathLike, max_bytes: float | None = None) -> Iterator[io.BufferedReader]:
    """Opens a regular file, or one that a link leads to, for reading; never waits for a pipe or a device.

    max_bytes: largest size of the file; by default the memory of the machine. ValueError for a larger file,
    one that is missing or cannot be read, a pipe, a device, a socket or a folder.
    """
    handle, _ = _open(path, max_bytes)
    with os.fdopen(handle, "rb") as file:
        yield file


def read_bytes(path: str | os.PathLike, max_bytes: float | None = None) -> bytes:
    """The bytes of a regular file; ValueError as from `open_regular`."""
    handle, left = _open(path, max_bytes)
    parts = []
    try:
        while left and (part := os.read(handle, left)):
            parts.append(part)
            left -= len(part)
    except (OSError, MemoryError) as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error
    finally:
        os.close(handle)
    return b"".join(parts)


def read_text(path: str | os.PathLike, max_bytes: float | None = None) -> str:
    """The text of a regular file in UTF-8; ValueError for another encoding, and as from `open_regular`."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {one_line(error)}") from error


def name_of(file: io.BufferedReader, path: str | os.PathLike) -> str:
    """A name of an open file, for libraries that open files themselves; `path` where the system has none.

    The name leads to the very file that was checked, even if another has taken its place since. It is ASCII,
    which some libraries need.
    """
    name = f"/dev/fd/{file.fileno()}"
    return name if os.path.exists(name) else os.fspath(path)


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of the bytes of a regular file, in hexadecimal; ValueError as from `open_regular`."""
    with open_regular(path) as file:
        return _digest(file)


@contextlib.contextmanager
def reading_archive(name: str | os.PathLike) -> Iterator[None]:
    """Turns every error of reading a damaged zip or .npz into a ValueError that names the file."""
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        TypeError,
        AttributeError,
        RuntimeError,
        BadZipFile,
    ) as error:
        raise ValueError(f"cannot read {name}: {one_line(error)}") from error
    except Exception as error:  # zlib.error, lzma.LZMAError and their like have no common base
        raise ValueError(f"cannot read {name}: {type(error).__name__}: {one_line(error)}") from error


def read_json(path: str | os.PathLike) -> dict:
    """The JSON object in a file; ValueError if the file is missing or holds no object."""
    text = read_text(path, MAX_JSON_BYTES)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


class WrongDigest(ValueError):
    """A complete file differs from the one that was saved with the configuration beside it."""


def read_safetensors(path: str | os.PathLike, digest: str | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file; ValueError if it is missing, truncated or damaged.

    digest: the SHA-256 that the file must have, in hexadecimal; WrongDigest if it has another.
    """
    with open_regular(path) as file:
        try:
            with safe_open(name_of(file, path), framework="pt") as tensors:
                weights = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
            raise ValueError(f"{path} is truncated or damaged: {one_line(error)}") from error
        if digest is not None and _digest(file) != digest:
            raise WrongDigest(
                f"{path} is not the file that was saved with the config.json beside it, which has another "
                "SHA-256: one of the two was changed, or saving them was interrupted; save them anew, or "
                "load them as they are with verify=False"
            )
    return weights


def read_pickle(path: str | os.PathLike) -> Any:
    """The contents of a file of `torch.save`: tensors, numbers and text, in lists and dictionaries.

    ValueError if it is missing, truncated or damaged, or holds an object that only code could make.
    """
    with open_regular(path) as file:
        if _unpacked_pickle(file) > MAX_PACKED_PICKLE:
            raise ValueError(f"{path} is damaged: its pickle is packed, and too large for one of torch.save")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise anything
            reason = one_line(error).split(". ")[0]
            raise ValueError(f"{path} is damaged, or holds more than tensors: {reason}") from error


def _unpacked_pickle(file: io.BufferedReader) -> int:
    """The size that the pickles in a zip unpack to; 0 where none is packed, as in files of `torch.save`."""
    try:
        entries = ZipFile(file).infolist()
    except Exception:  # no zip, or a damaged one, which torch.load refuses
        return 0
    packed = (e.file_size for e in entries if e.filename.endswith(".pkl") and e.compress_size < e.file_size)
    return sum(packed)


def read_torch(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The state dict in a file of `torch.save`; ValueError as from `read_pickle`, and for anything else."""
    value = read_pickle(path)
    named = isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if not named or not all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        raise ValueError(f"{path} holds no state dict, which is a dictionary of tensors")
    return value


def check_weights(weights: dict[str, torch.Tensor], path: str | os.PathLike) -> None:
    """ValueError, naming the file and the tensor, unless all are dense and of one of WEIGHT_DTYPES.

    Also if they need more memory than the machine has: a small file can hold a large tensor of one number.
    """
    for name, tensor in weights.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout is not torch.strided or tensor.is_meta:
            kind = "no numbers" if tensor.is_meta else f"numbers in the layout {tensor.layout}"
        elif tensor.dtype in WEIGHT_DTYPES:
            continue
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
        raise ValueError(f"{path}: {name} holds {kind}, and weights are dense tensors of {known}")
    check_fits(f"the tensors in {path}", sum(t.numel() * t.itemsize for t in weights.values()), _CPU)


def check_finite(weights: dict[str, torch.Tensor], path: str | os.PathLike) -> None:
    """ValueError, naming the file and the tensor, unless all numbers are finite, in float32 too."""
    for name, whole in weights.items():
        tensor = whole
        for dim, stride in enumerate(whole.stride()):
            if stride == 0 and whole.shape[dim]:  # an expanded number is looked at once
                tensor = tensor.narrow(dim, 0, 1)
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            kind, dtype = "NaN or infinite values in", str(tensor.dtype).removeprefix("torch.")
            if torch.isfinite(tensor).all():
                kind, dtype = "values beyond the range of", "float32"
            raise ValueError(f"{path}: {name} holds {kind} {dtype}")


def check_architecture(
    module: torch.nn.Module, weights: dict[str, torch.Tensor], path: str | os.PathLike
) -> None:
    """ValueError unless the weights have the names and shapes of the module's."""
    expected = module.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{path} is of another architecture than its configuration: "
            f"{len(missing)} tensors missing {missing[:1]}, {len(unknown)} unknown {unknown[:1]}"
        )
    for key, tensor in weights.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{path} is of another architecture than its configuration: {key} is "
                f"{list(tensor.shape)}, not {list(expected[key].shape)}"
            )


def load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Loads `weights` into a module in float32; ValueError if they do not fit it or are not finite.

    Integers of the module, such as counters, must have its dtype.
    """
    check_architecture(module, weights, path)
    expected = module.state_dict()
    check_weights({key: t for key, t in weights.items() if t.dtype != expected[key].dtype}, path)
    check_finite(weights, path)
    # A module on the meta device has no memory to copy into. The tensors of a safetensors file begin
    # anywhere, and with AVX2 the last bits of PyTorch's products depend on that, so the module gets copies.
    assign = any(tensor.is_meta for tensor in expected.values())
    loaded = {
        key: tensor.to(torch.float32 if expected[key].is_floating_point() else tensor.dtype, copy=assign)
        for key, tensor in weights.items()
    }
    module.load_state_dict(loaded, assign=assign)


def _open(path: str | os.PathLike, max_bytes: float | None) -> tuple[int, int]:
    """The handle and the size of a regular file."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    # Without these flags, opening a pipe waits for a writer, and a terminal becomes the process's own.
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        handle = os.open(path, flags)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        socket = isinstance(error, OSError) and error.errno == errno.ENXIO
        reason = "it is no regular file" if socket else one_line(error)
        raise ValueError(f"cannot read {path}: {reason}".replace("\0", "\\0")) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise ValueError(f"cannot read {path}: it is no regular file but {kind}")
        most = total_memory(_CPU) if max_bytes is None else max_bytes
        if most is not None and status.st_size > most:
            raise ValueError(
                f"cannot read {path}: it is larger than {amount(most)}, at {amount(status.st_size)}"
            )
    except BaseException:
        os.close(handle)
        raise
    return handle, status.st_size


def stored_digest(config: dict, key: str, path: str | os.PathLike) -> str | None:
    """The SHA-256 that a config.json holds under `key`, or None; ValueError for any other value."""
    digest = config.get(key)
    if key in config and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise ValueError(f"{path}: {key} must be 64 hexadecimal digits, not {digest!r}")
    return digest


def add_tensors(digest: "hashlib._Hash", tensors: dict[str, torch.Tensor]) -> None:
    """Adds the names, dtypes, shapes and bytes of tensors to a digest, in the order of their names."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _digest(file: io.BufferedReader) -> str:
    digest, chunk = hashlib.sha256(), memoryview(bytearray(2**18))  # fits a processor's cache
    while size := file.readinto(chunk):
        digest.update(chunk[:size])
    return digest.hexdigest()
