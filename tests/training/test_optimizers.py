"""The optimizers against torch.optim on a model that is trained by hand."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion import NoiseSchedule
from diffusion.process.objective import lognormal_timesteps, random_timesteps
from diffusion.training import optimizers
from helpers.kernel_counts import KernelCounts
from helpers.thinning import exhaustive_but
from helpers.training import RECIPE, assert_same_run, make_trainer, run, run_until

MUON = replace(
    RECIPE, optimizer="muon", unet=RECIPE.unet | {"attention_levels": [1], "dropout": 0.0}, weight_decay=0.1
)


CPU = torch.device("cpu")

WAYS = {
    "as here": None,
    "as on a GPU": lambda _: optimizers.orthogonalised_in_batches,
    "without bfloat16": lambda _: optimizers.orthogonalised_in_float32,
}


@pytest.mark.thinned
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_muon_moves_the_matrices_of_the_levels_and_adam_the_rest(channels_last, way, monkeypatch):
    """Orthogonalisation does not see the order of a matrix's columns, so a filter may be flattened in any."""
    if WAYS[way]:
        monkeypatch.setattr(optimizers, "_way_to_orthogonalise", WAYS[way])
    in_float32 = optimizers._way_to_orthogonalise(CPU) is optimizers.orthogonalised_in_float32
    trainer, reference = (make_trainer(MUON, channels_last=channels_last) for _ in range(2))
    parameters = dict(reference.model.unet.named_parameters())
    matrices = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.ndim > 1 and name.startswith(("down", "mid", "up"))
    }
    assert {p.ndim for p in matrices.values()} == {2, 4}  # attention has linear maps
    rest = [parameter for name, parameter in parameters.items() if name not in matrices]
    flat = [parameter.detach().flatten(1).clone().requires_grad_() for parameter in matrices.values()]
    options = {"lr": 1.0, "weight_decay": 0.1}
    muon = torch.optim.Muon(flat, adjust_lr_fn="match_rms_adamw", momentum=0.95, **options)
    adam = torch.optim.Adam(rest, **options)
    for step in range(3):
        x, labels, t, noise = reference._rank_batch()
        reference.model.unet.zero_grad()
        reference.model.loss(x, labels, t=t, noise=noise).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), MUON.gradient_clip)
        for weight, parameter in zip(flat, matrices.values(), strict=True):
            weight.grad = parameter.grad.flatten(1)
        for optimizer in (muon, adam):
            optimizer.param_groups[0]["lr"] = MUON.learning_rate_at(step)
        with monkeypatch.context() as patch:
            if in_float32:
                patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # of torch.optim.Muon's iteration
            muon.step()
        adam.step()
        with torch.no_grad():
            for weight, parameter in zip(flat, matrices.values(), strict=True):
                parameter.copy_(weight.view_as(parameter))
        reference.step += 1
        trainer.train_step()
    for name, parameter in trainer.model.unet.named_parameters():
        # In bfloat16 the order of the iteration's sums shows.
        atol = 3e-4 if name in matrices and not in_float32 else 1e-4
        torch.testing.assert_close(parameter, parameters[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize(
    ("way", "error"),
    [
        (optimizers.orthogonalised_in_batches, 0.05),  # bfloat16 has 8 bits
        (optimizers.orthogonalised_in_float32, 2e-6),
    ],
)
def test_matrices_are_orthogonalised(way, error):
    """Against the iteration of Jordan et al. 2024 in float64, one matrix at a time."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 20), (20, 6), (6, 20), (8, 8), (6, 20)]
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    a, b, c = coefficients = (3.4445, -4.775, 2.0315)
    options = {"ns_coefficients": coefficients, "ns_steps": 5, "eps": 1e-7}
    found = way(matrices, options)
    for matrix, result in zip(matrices, found, strict=True):
        x = matrix.double() / matrix.double().norm()
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        assert result.shape == matrix.shape
        assert (result.double() - x).norm() <= error * x.norm()


def test_processors_without_products_of_bfloat16_orthogonalise_in_float32(monkeypatch):
    """PyTorch takes ten times as long there in bfloat16."""
    monkeypatch.setattr(optimizers, "supports", lambda device: False)
    for multiplies, way in ((False, optimizers.orthogonalised_in_float32), (True, None)):
        monkeypatch.setattr(optimizers, "torch_multiplies_bfloat16", lambda device, answer=multiplies: answer)
        assert optimizers._way_to_orthogonalise(CPU) is way


def test_few_kernels_orthogonalise_many_matrices():
    with FakeTensorMode(), torch.device("cuda"), KernelCounts() as counts:
        matrices = [torch.empty(64, 576) for _ in range(20)]
        options = {"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 5, "eps": 1e-7}
        optimizers.orthogonalised_in_batches(matrices, options)
    assert 15 < counts.kernels.total() <= 25


@pytest.mark.parametrize("channels_last", exhaustive_but([True, False], default=[True]))
def test_muon_resumes_as_if_it_had_not_stopped(channels_last, tmp_path):
    run(tmp_path / "whole", make_trainer(MUON, channels_last=channels_last))
    run_until(7, tmp_path / "broken", make_trainer(MUON, channels_last=channels_last))
    run(tmp_path / "broken", make_trainer(MUON, channels_last=channels_last), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_state_without_the_fields_that_came_since_resumes(tmp_path):
    """Version 0.1.0 wrote recipes without noise levels."""
    run(tmp_path / "whole")
    run_until(7, tmp_path / "old")
    path = tmp_path / "old" / "state.safetensors"
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["training"])
    for name in ("timestep_sampling", "noise_mean", "noise_std"):
        del about["recipe"][name]
    save_file(load_file(path), path, metadata={"training": json.dumps(about)})
    run(tmp_path / "old", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "old")


def test_lognormal_noise_levels():
    """Each timestep has the probability of its noise levels under N(-1.2, 1.2^2), and is drawn so often."""
    schedule = NoiseSchedule.cosine()
    level = 0.5 * torch.log((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    cumulative = lognormal_timesteps(schedule, -1.2, 1.2)
    edges = (level[1:] + level[:-1]) / 2
    assert cumulative[:-1].numpy() == pytest.approx(norm.cdf(edges.numpy(), -1.2, 1.2), abs=1e-12)
    assert cumulative[-1] == 1
    torch.manual_seed(0)
    drawn = torch.cat([random_timesteps(1000, 1000, cumulative=cumulative) for _ in range(20)])
    levels = level[drawn]
    assert levels.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert levels.std().item() == pytest.approx(1.2, abs=0.03)
    counts = torch.bincount(drawn, minlength=1000).double().cumsum(0) / len(drawn)
    assert (counts - cumulative).abs().max() < 1.5e-3  # 1000 draws are evenly spread: 1 / 1000, and rounding


def test_a_schedule_of_zero_snr_has_lognormal_levels_too():
    cumulative = lognormal_timesteps(NoiseSchedule.linear().rescale_zero_terminal_snr(), -1.2, 1.2)
    assert cumulative.isfinite().all()
    assert (cumulative.diff() >= 0).all()
    assert cumulative[-1] == 1


def test_the_trainer_draws_them():
    recipe = replace(RECIPE, timestep_sampling="lognormal", noise_mean=-3.0, noise_std=0.01)
    trainer = make_trainer(recipe)
    schedule = trainer.model.schedule
    level = 0.5 * torch.log((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    t = trainer._rank_batch()[2]
    assert (level[t] + 3).abs().max() < 0.1
