"""The ways of sampling that are timed: `count` images by DDIM, from the same initial noise."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch

from .. import exported
from .models import CLASSES, Pair

Sample = Callable[[int], torch.Tensor]  # steps -> images


def initial_noise(pair: Pair, count: int) -> torch.Tensor:
    return torch.randn(count, *pair.shape, generator=torch.Generator().manual_seed(1))


def labels(count: int) -> torch.Tensor:
    return torch.arange(count) % CLASSES


def ours(pair: Pair, count: int, guidance: float, device: str, **options) -> Sample:
    noise = initial_noise(pair, count)
    chosen = {"labels": labels(count).tolist(), "sampler": "ddim", "batch_size": count, "device": device}
    chosen |= {"use_clipped_model_output": False, "clip": 1.0, "spacing": "leading"}  # diffusers' defaults
    model = copy.deepcopy(pair.ours).to(device)

    def sample(steps: int) -> torch.Tensor:
        return model.sample(steps=steps, guidance_scale=guidance, noise=lambda k: noise, **chosen, **options)

    return sample


def looped(
    evaluate: Callable, pair: Pair, count: int, guidance: float, device: str, dtype: torch.dtype
) -> Sample:
    """Samples by evaluate(x, timesteps, labels) and diffusers' scheduler, as its pipelines do."""
    noise = initial_noise(pair, count).to(device)
    wanted, betas = labels(count).to(device), pair.ours.schedule.betas.numpy()
    if guidance != 1:
        wanted = torch.cat([wanted, torch.full_like(wanted, CLASSES)])

    @torch.no_grad()
    def sample(steps: int) -> torch.Tensor:
        scheduler = diffusers.DDIMScheduler(
            num_train_timesteps=len(betas), trained_betas=betas, prediction_type=pair.ours.prediction_type
        )
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            inputs = x if guidance == 1 else torch.cat([x, x])
            timesteps = torch.full((len(inputs),), int(t), device=device)
            output = evaluate(inputs.to(dtype), timesteps, wanted).float()
            if guidance != 1:
                conditional, unconditional = output.chunk(2)
                output = unconditional + guidance * (conditional - unconditional)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return x

    return sample


def of_diffusers(pair: Pair, count: int, guidance: float, device: str, best: bool) -> Sample:
    """diffusers as it comes, or at its best: bfloat16, channels_last, torch.compile(mode="max-autotune")."""
    model, dtype = copy.deepcopy(pair.theirs).to(device), torch.float32
    if best:
        dtype = torch.bfloat16
        model = torch.compile(model.to(dtype=dtype, memory_format=torch.channels_last), mode="max-autotune")

    def evaluate(x, t, wanted):
        if best:
            x = x.contiguous(memory_format=torch.channels_last)
        return model(x, t, class_labels=wanted, return_dict=False)[0]

    return looped(evaluate, pair, count, guidance, device, dtype)


class _Exported(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, wanted):
        return self.model(x, t, class_labels=wanted, return_dict=False)[0]


def export(pair: Pair, images: int, folder: Path) -> Path:
    """Exports the network as ONNX, for a fixed number of images."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{pair.name}-{pair.shape[-1]}-{images}.onnx"
    if not path.exists():
        inputs = (torch.zeros(images, *pair.shape), torch.zeros(images, dtype=torch.int64), labels(images))
        exported.export(_Exported(pair.theirs), inputs, path)
    return path


def of_openvino(pair: Pair, count: int, guidance: float, precision: str, folder: Path) -> Sample:
    path = export(pair, count if guidance == 1 else 2 * count, folder)
    return looped(exported.openvino(path, precision), pair, count, guidance, "cpu", torch.float32)


def of_onnxruntime(pair: Pair, count: int, guidance: float, folder: Path) -> Sample:
    path = export(pair, count if guidance == 1 else 2 * count, folder)
    return looped(exported.onnxruntime(path), pair, count, guidance, "cpu", torch.float32)


EXPORTS = Path(tempfile.gettempdir()) / "fused-diffusion-benchmarks"

# name: (how it is made, whether it computes in float32, where it runs)
PEERS: dict[str, tuple[Callable[..., Sample], bool, tuple[str, ...]]] = {
    "exact": (ours, True, ("cpu", "cuda")),
    "fast": (lambda *where: ours(*where, precision="fast"), False, ("cpu", "cuda")),
    "reference": (lambda *where: ours(*where, backend="reference"), True, ("cpu", "cuda")),
    "diffusers": (lambda *where: of_diffusers(*where, best=False), True, ("cpu", "cuda")),
    "diffusers, best": (lambda *where: of_diffusers(*where, best=True), False, ("cpu", "cuda")),
    "ONNX Runtime": (lambda *where: of_onnxruntime(*where[:3], EXPORTS), True, ("cpu",)),
    "OpenVINO": (lambda *where: of_openvino(*where[:3], "f32", EXPORTS), True, ("cpu",)),
    "OpenVINO, bf16": (lambda *where: of_openvino(*where[:3], "bf16", EXPORTS), False, ("cpu",)),
}
OURS = ("exact", "fast", "reference")
