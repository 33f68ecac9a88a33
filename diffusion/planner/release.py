"""Moves a module's weights out of memory, into a file without a name, from which plans still read them."""

import mmap
import tempfile
from collections.abc import Iterable

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes, of a weight in the file


class ReleasedWeights:
    """The parameters of a module on the CPU as a mapped file, which takes disk space instead of memory.

    The parameters stay what they are: they can be read, written, saved and copied. Those that share memory
    with another parameter or buffer stay where they are. The file is in the folder of
    `tempfile.gettempdir()`, and it is gone with the last tensor that reads it.
    OSError: the disk is full.
    """

    def __init__(self, module: nn.Module):
        shared = _overlapping([*module.parameters(), *module.buffers()])
        parameters = (p for p in module.parameters() if p.device.type == "cpu" and p.numel())
        alone = [parameter for parameter in parameters if id(parameter) not in shared]
        starts, size = [], 0
        for parameter in alone:
            starts.append(size)
            size += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
        self._map: mmap.mmap | None = None
        self.bytes = size
        if not alone:
            return
        with tempfile.TemporaryFile() as file:
            for start, parameter in zip(starts, alone, strict=True):
                file.seek(start)
                numbers = parameter.detach().contiguous().view(-1).view(torch.uint8)
                file.write(numbers.numpy().data)
            file.truncate(size)
            file.flush()
            self._map = mmap.mmap(file.fileno(), size)
        with torch.no_grad():
            for start, parameter in zip(starts, alone, strict=True):
                parameter.data = _mapped(self._map, start, parameter)
        self.leave_memory()

    def leave_memory(self) -> None:
        """Takes the pages that were read out of this process's memory; the next read brings them back."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


def _overlapping(tensors: Iterable[Tensor]) -> set[int]:
    """The ids of the tensors on the CPU whose storages have bytes in common with another one's."""
    storages = [(t.untyped_storage(), id(t)) for t in tensors if t.device.type == "cpu"]
    spans = sorted((s.data_ptr(), s.data_ptr() + s.nbytes(), identity) for s, identity in storages)
    found: set[int] = set()
    reach, widest = 0, 0  # the highest end so far, and the tensor that it is of
    for start, end, identity in spans:
        if start < reach:
            found |= {identity, widest}
        if end > reach:
            reach, widest = end, identity
    return found


def _mapped(file: mmap.mmap, start: int, like: Tensor) -> Tensor:
    numbers = torch.frombuffer(file, dtype=like.dtype, count=like.numel(), offset=start)
    return numbers.view(like.shape)
