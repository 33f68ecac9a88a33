"""The losses and gradient norms of the steps since the last row of the log."""

import math
from collections.abc import Iterable

import torch

MAX_GROWTH = 10  # a mean loss of so many times that of the log's first row means that the run diverged
MAX_OVERFLOWS = 30  # steps in a row, after which lowering float16's loss scale further will not help


class LogLine:
    """Collects the losses and gradient norms for the next row of the log.

    losses: scalars on the device, one for each step since the last row. norms: those of the steps' gradients.
    first_loss: the mean loss of the first row, None before there is one.
    """

    def __init__(
        self,
        losses: Iterable[torch.Tensor] = (),
        norms: Iterable[torch.Tensor] = (),
        first_loss: float | None = None,
    ):
        self.losses, self.norms, self.first_loss = list(losses), list(norms), first_loss

    def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Adds the loss and the gradient norm of a step, without waiting for the device."""
        self.losses.append(loss)
        self.norms.append(norm)

    def check_finite(self, step: int, scaled: bool) -> None:
        """ValueError if a loss or a gradient is not finite, or the mean loss grew MAX_GROWTH-fold.

        Waits for the device.

        step: the last one. scaled: the loss is scaled for float16, so that a step whose gradient overflows is
        left out and only lowers the scale; MAX_OVERFLOWS such steps in a row are an error.
        """
        if not self.losses:
            return
        losses, norms = (torch.stack(values).double().cpu() for values in (self.losses, self.norms))
        overflowed = ~norms.isfinite()
        if scaled:
            overflowed &= overflowed.sum() >= MAX_OVERFLOWS and bool(overflowed[-MAX_OVERFLOWS:].all())
        first = step - len(losses) + 1
        for number, (loss, bad) in enumerate(zip(losses.tolist(), overflowed.tolist(), strict=True), first):
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {number}")
            if bad:
                raise ValueError(f"the gradient is not finite at step {number}")
        mean = losses.mean().item()
        if self.first_loss is not None and mean > MAX_GROWTH * self.first_loss:
            raise ValueError(f"the loss grew from {self.first_loss:.3g} to {mean:.3g} by step {step}")

    def finish(self) -> tuple[float, float]:
        """The mean loss and the last gradient norm of the steps, which are then forgotten."""
        norm, mean = self.norms[-1].item(), torch.stack(self.losses).mean().item()
        self.first_loss = mean if self.first_loss is None else self.first_loss
        self.losses.clear()
        self.norms.clear()
        return mean, norm
