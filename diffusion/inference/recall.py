"""Recall: the predictions of earlier steps that a solver uses, in the sampling loop."""

import torch
from torch import Tensor

from ..samplers.table import History
from .buffers import SamplerBuffers


class Recall:
    """Keeps the last m of a `History`, `kept`, and puts what a step takes of them where its row finds it.

    That place is `buffers.x0`, outside of the step, so that a step can still be captured in a CUDA graph.
    """

    def __init__(self, history: History, buffers: SamplerBuffers):
        self._from_x = history.from_x.tolist()
        self._from_x0 = history.from_x0.tolist()
        self._weights = history.weights.tolist()
        self._buffers = buffers
        self.kept: list[Tensor] = []  # m_{i-1}, m_{i-2}, ...
        self._x: Tensor | None = None

    def before(self, i: int) -> None:
        """Before step i: buffers.x0 becomes what the step's row calls x0_prev."""
        assert self._buffers.x0 is not None
        # The first steps have fewer to recall.
        terms = [weight * m for weight, m in zip(self._weights[i], self.kept, strict=False) if weight != 0]
        if terms:
            self._buffers.x0.copy_(torch.stack(terms).sum(dim=0))
        self._x = self._buffers.x.clone() if self._from_x[i] != 0 else None

    def after(self, i: int) -> None:
        """After step i, which left its own x_0 in buffers.x0."""
        assert self._buffers.x0 is not None
        m = self._from_x0[i] * self._buffers.x0
        if self._x is not None:
            m += self._from_x[i] * self._x
        self.kept = [m, *self.kept][: len(self._weights[i])]
