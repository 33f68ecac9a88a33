"""Inpainting by RePaint: the known pixels of every x_t come from the image, and steps are repeated.

Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1.
"""

import math
from itertools import pairwise

from torch import Tensor

from ..samplers.table import StepTable
from .buffers import Batch, SamplerBuffers
from .recall import Recall


def repaint_rows(steps: int, resamples: int, jump_length: int = 1) -> list[int]:
    """The rows of a table of `steps`, in the order in which RePaint runs them.

    From every `jump_length`-th noise level, counted from the end, x gets the noise of the level `jump_length`
    steps before, and the steps from there are taken again, until they were taken `resamples` times. With a
    length of 1 that is algorithm 1, whose U is resamples; longer jumps are those of section 4.2.
    """
    repeats = {steps - 1 - k: resamples - 1 for k in range(0, steps - jump_length, jump_length)}
    rows, row = [], 0
    while row < steps:
        rows.append(row)
        row += 1
        if repeats.get(row, 0) > 0:
            repeats[row] -= 1
            row -= jump_length
    return rows


class Repaint:
    """Follows the rows of a batch with a mask: puts in the known pixels, and noise before a jump.

    rows: those that run, from `repaint_rows`. The evaluation number e of all E draws its step's noise from
    stream e + 1, that of the known pixels from E + 1 + e, and that of a jump from 2 E + 1 + e.
    """

    def __init__(
        self, table: StepTable, batch: Batch, rows: list[int], buffers: SamplerBuffers, recall: Recall | None
    ):
        assert batch.image is not None
        assert batch.mask is not None
        self.rows = rows
        self._batch, self._image, self._mask = batch, batch.image, batch.mask
        self._buffers, self._recall = buffers, recall
        # The last row leads to the image.
        self._alphas, self._sigmas = [*table.alphas.tolist(), 1.0], [*table.sigmas.tolist(), 0.0]
        self._begun: dict[int, tuple[Tensor | None, list[Tensor]]] = {}  # x_0 and m of before a row
        self._reach = max((a - b for a, b in pairwise(rows)), default=0)  # rows that a jump goes back

    def before(self, evaluation: int) -> None:
        """Sets the row that runs now, the stream of its noise, and what it takes from the rows before."""
        row, buffers = self.rows[evaluation], self._buffers
        buffers.counter[0], buffers.counter[2] = row, evaluation + 1 - row
        if evaluation == 0 or row > self.rows[evaluation - 1]:
            x0 = None if buffers.x0 is None else buffers.x0.clone()
            self._begun.pop(row - self._reach - 1, None)
            self._begun[row] = (x0, [] if self._recall is None else self._recall.kept)
            return
        x0, kept = self._begun[row]
        if buffers.x0 is not None and x0 is not None:
            buffers.x0.copy_(x0)
        if self._recall is not None:
            self._recall.kept = kept

    def after(self, evaluation: int, backend: str) -> None:
        """x gets the known pixels, with the noise of its level; before a jump, the noise of that, too."""
        count, buffers = len(self.rows), self._buffers
        level = self.rows[evaluation] + 1
        known = self._alphas[level] * self._image
        if self._sigmas[level]:
            known = known + self._sigmas[level] * buffers.draw(self._batch, count + 1 + evaluation, backend)
        x = self._mask * buffers.x + (1 - self._mask) * known
        following = self.rows[evaluation + 1] if evaluation + 1 < count else level
        if following < level:  # q(x_t | x_s) for t > s
            signal = self._alphas[following] / self._alphas[level]
            variance = self._sigmas[following] ** 2 - (signal * self._sigmas[level]) ** 2
            noise = buffers.draw(self._batch, 2 * count + 1 + evaluation, backend)
            x = signal * x + math.sqrt(max(variance, 0)) * noise
        buffers.set_x(x)


def can_resample(table: StepTable) -> bool:
    """Whether every row is a step of its own; two rows of one step cannot be repeated one by one."""
    return not (table.sigmas[1:] == table.sigmas[:-1]).any()
