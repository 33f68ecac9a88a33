"""Trajectories of a step table, and the stand-in for a model that they are made with."""

import math

import torch

from diffusion.kernels import reverse_step
from diffusion.process.schedule import NoiseSchedule
from diffusion.samplers import StepTable
from diffusion.samplers.thresholding import thresholded_step

SHAPE = (2, 2, 2, 2)


class Denoiser:
    """A stand-in for a trained model, nonlinear in x and t: its x_0 is bounded and often beyond the clip.

    Like a trained model, it puts out an epsilon of a few units and the v that goes with its x_0, even for
    an x that is noisier than t says.
    """

    def __init__(
        self, schedule: NoiseSchedule, prediction_type: str, learned: bool = False, dtype=torch.float32
    ):
        self.alphas = schedule.alphas_cumprod.sqrt().tolist()
        self.sigmas = (1 - schedule.alphas_cumprod).sqrt().tolist()
        self.prediction_type = prediction_type
        self.learned = learned
        self.bias = torch.linspace(-1, 1, math.prod(SHAPE)).reshape(SHAPE).to(dtype)

    def __call__(self, x: torch.Tensor, t: int) -> torch.Tensor:
        alpha, sigma, phase = self.alphas[t], self.sigmas[t], t / len(self.alphas)
        x0 = 1.5 * torch.tanh(0.8 * x + self.bias + math.sin(6 * phase)) + 0.2 * torch.tanh(x.flip(-1))
        epsilon = ((x - alpha * x0) / sigma).clamp(-6, 6)
        if alpha > 0.1:  # below, the clamp does nothing, and x_0 from x would only lose digits
            x0 = (x - sigma * epsilon) / alpha
        if self.prediction_type == "epsilon":
            output = epsilon
        else:
            output = x0 if self.prediction_type == "sample" else alpha * epsilon - sigma * x0
        return torch.cat([output, torch.tanh(x.flip(1) - phase)], dim=1) if self.learned else output


def noises(steps: int) -> list[torch.Tensor]:
    """The initial noise, and one per step."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator) for _ in range(steps + 1)]


def run_table(table: StepTable, model, noise: list[torch.Tensor], thresholding=None) -> list[torch.Tensor]:
    """x after every step."""
    x, x0, trajectory, kept = noise[0], None, [], []
    for i, t in enumerate(table.timesteps.tolist()):
        row, output, x0_prev, start = table.row(i), model(x, t), x0, x
        if table.history and row.coef_x0_prev:
            x0_prev = sum(w * m for w, m in zip(table.history.weights[i].tolist(), kept, strict=False) if w)
        if thresholding:
            out = output[:, : x.shape[1]]
            row, x0_prev, x0 = thresholded_step(row, x, out, x0_prev, **thresholding)
            x, _ = reverse_step(x, output, row, x0_prev=x0_prev, noise=noise[i + 1], backend="reference")
        else:
            x, x0 = reverse_step(x, output, row, x0_prev=x0_prev, noise=noise[i + 1], backend="reference")
        if table.history:
            m = table.history.from_x[i].item() * start + table.history.from_x0[i].item() * x0
            kept = [m, *kept][: table.history.weights.shape[1]]
        trajectory.append(x)
    return trajectory


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Largest difference at any step of the chain."""
    assert all(x.isfinite().all() for x in (*ours, *theirs))
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
