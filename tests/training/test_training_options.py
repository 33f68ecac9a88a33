"""The effects of a recipe's fields and of the options of computation on a step."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import diffusion
from diffusion import NoiseSchedule
from diffusion.kernels import _native
from diffusion.kernels.ops.convolution import winograd
from diffusion.models.blocks import Conv2d
from diffusion.process.objective import LOSS_WEIGHTINGS, loss_weight
from helpers.native import requires_native
from helpers.training import PLAIN, RECIPE, assert_same_run, make_trainer, run, run_until


def weights_after(steps: int, recipe=PLAIN, **options) -> torch.Tensor:
    trainer = make_trainer(recipe, **options)
    for _ in range(steps):
        trainer.train_step()
    return torch.cat([p.detach().flatten() for p in trainer.model.unet.parameters()])


@pytest.mark.parametrize(
    "options",
    [{"micro_batch": 3}, {"micro_batch": 1}, {"activation_checkpointing": True}, {"channels_last": False}],
    ids=str,
)
def test_how_it_is_computed_changes_rounding_only(options):
    expected = weights_after(3)
    start = weights_after(0)
    assert (expected - start).abs().max() > 1e-3
    torch.testing.assert_close(weights_after(3, **options), expected, rtol=0, atol=3e-5)


def test_checkpointing_draws_dropout_once():
    recipe = replace(RECIPE, unet=RECIPE.unet | {"dropout": 0.3})
    torch.testing.assert_close(
        weights_after(2, recipe, activation_checkpointing=True), weights_after(2, recipe)
    )


def test_checkpointing_keeps_less():
    def kept(checkpointing: bool) -> int:
        trainer, sizes = make_trainer(PLAIN, activation_checkpointing=checkpointing), []

        def keep(tensor):
            sizes.append(tensor.numel())
            return tensor

        x, labels, t, noise = trainer._rank_batch()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.model.loss(x, labels, t=t, noise=noise)
        return sum(sizes)

    assert kept(True) < 0.6 * kept(False)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("aot_eager", marks=pytest.mark.slow),
        pytest.param("inductor", marks=pytest.mark.exhaustive),
    ],
)
def test_compiled_steps_are_the_same(backend, monkeypatch):
    """By default the traced graph runs without code generation, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.testing.assert_close(weights_after(2, compile=True), weights_after(2), rtol=0, atol=3e-5)


@requires_native
@pytest.mark.skipif(_native.simd_in_use() == "baseline", reason="the baseline convolves by PyTorch")
def test_a_compiled_network_calls_the_compiled_convolution():
    targets = set()

    def record(module: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs = [part.graph for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
        targets.update(str(node.target) for graph in graphs for node in graph.nodes)
        return module

    torch.compile(Conv2d(64, 64, 3, padding=1), backend=record, fullgraph=True)(torch.zeros(16, 64, 8, 8))
    assert "fused_diffusion.pack_winograd" in targets


def sixty_steps(autocast: torch.dtype | None) -> tuple[float, float]:
    """The validation loss after them, and the norm of the last gradient."""
    trainer = make_trainer(replace(PLAIN, steps=60, learning_rate=3e-3), autocast=autocast)
    for _ in range(60):
        norm = trainer.train_step()
    trainer.check_finite()
    return trainer.validation_loss(), norm.item()


@pytest.fixture(scope="module")
def in_32_bits():
    return sixty_steps(None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.exhaustive)])
def test_steps_in_16_bits_are_close(dtype, in_32_bits):
    """float16's first steps may be left out, while the scale of the loss is still too high."""
    loss, norm = sixty_steps(dtype)
    assert loss == pytest.approx(in_32_bits[0], rel=0.15)
    assert 0.2 < norm / in_32_bits[1] < 5  # the gradient that is clipped is without the scale of the loss


def test_a_scaled_loss_resumes_as_if_it_had_not_stopped(tmp_path):
    recipe = replace(PLAIN, steps=8)
    run(tmp_path / "whole", make_trainer(recipe, autocast=torch.float16))
    run_until(6, tmp_path / "cut", make_trainer(recipe, autocast=torch.float16))
    run(tmp_path / "cut", make_trainer(recipe, autocast=torch.float16), resume=True)
    whole, cut = (diffusion.load(tmp_path / name).unet.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_run_goes_on_in_another_precision(tmp_path):
    recipe = replace(PLAIN, steps=4)
    run(tmp_path, make_trainer(recipe))
    for autocast in (torch.float16, torch.bfloat16, torch.float16):
        recipe = replace(recipe, steps=recipe.steps + 2)
        trainer = make_trainer(recipe, autocast=autocast)
        run(tmp_path, trainer, resume=True, accept_changes=True)
        assert trainer.step == recipe.steps


# A network and a batch large enough for Winograd's convolutions in float32.
WIDE = replace(PLAIN, unet=PLAIN.unet | {"channels": 64, "channel_mult": [1, 1]}, batch_size=16, steps=8)


@requires_native
@pytest.mark.skipif(_native.simd_in_use() == "baseline", reason="the baseline convolves by PyTorch")
def test_steps_by_winograds_convolutions(tmp_path, monkeypatch):
    """They resume bit for bit, also with checkpointing; PyTorch's convolutions change rounding only."""
    run(tmp_path / "whole", make_trainer(WIDE))
    run_until(6, tmp_path / "cut", make_trainer(WIDE))
    run(tmp_path / "cut", make_trainer(WIDE), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    weights = weights_after(4, WIDE)
    assert torch.equal(weights_after(4, WIDE, activation_checkpointing=True), weights)
    monkeypatch.setattr(winograd, "slower", lambda arguments: "PyTorch's own op is wanted")
    expected = weights_after(4, WIDE)
    assert not torch.equal(weights, expected)
    torch.testing.assert_close(weights, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(10), NoiseSchedule.cosine()])
@pytest.mark.parametrize("null_label", [True, False])
def test_every_model_can_show_samples(schedule, null_label, tmp_path):
    """Models of a short chain, and models without the null label that guidance needs, show samples, too."""
    unet = PLAIN.unet | {"has_null_label": null_label}
    dropout = 0.1 if null_label else 0.0
    recipe = replace(PLAIN, steps=1, unet=unet, schedule=schedule.to_config(), label_dropout=dropout)
    run(tmp_path, make_trainer(recipe))
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_half_of_the_images_are_mirrored():
    plain, flipping = make_trainer(PLAIN), make_trainer(replace(PLAIN, horizontal_flip=True))
    mirrored = 0
    for step in range(5):
        plain.step = flipping.step = step
        for before, after in zip(plain._rank_batch()[0], flipping._rank_batch()[0], strict=True):
            assert torch.equal(after, before) or torch.equal(after, before.flip(-1))
            mirrored += not torch.equal(after, before)
    assert 10 <= mirrored <= 30  # of 40; outside of this by chance once in 1,000


def test_every_average_is_kept(tmp_path):
    """Against the averages in float64 of the weights after each step."""
    recipe = replace(PLAIN, more_ema_decays=(0.5, 0.0), steps=6)
    trainer, seen = make_trainer(recipe), []
    step = trainer.train_step
    expected = {decay: trainer.model.unet.input_conv.weight.detach().double() for decay in (0.9, 0.5, 0.0)}

    def watched():
        norm = step()
        seen.append(trainer.model.unet.input_conv.weight.detach().double())
        return norm

    trainer.train_step = watched
    run(tmp_path, trainer)
    for k, weight in enumerate(seen):
        for decay, average in expected.items():
            used = min(decay, (1 + k) / (10 + k))
            expected[decay] = used * average + (1 - used) * weight
    folders = {0.9: tmp_path, 0.5: tmp_path / "ema-0.5", 0.0: tmp_path / "ema-0"}
    for decay, folder in folders.items():
        model = diffusion.load(folder)
        torch.testing.assert_close(
            model.unet.input_conv.weight.detach().double(), expected[decay], rtol=0, atol=1e-6
        )
        assert model.metadata["training"]["ema_decay"] == decay


def test_every_average_resumes_as_if_the_run_had_not_stopped(tmp_path):
    recipe = replace(PLAIN, more_ema_decays=(0.2,), steps=8)  # below the decays of the first steps
    run(tmp_path / "whole", make_trainer(recipe))
    run_until(6, tmp_path / "cut", make_trainer(recipe))
    run(tmp_path / "cut", make_trainer(recipe), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_adamw_decays_weights():
    """Loshchilov & Hutter's decay is apart from the gradient: a step's difference is lr * decay * weight."""
    before = weights_after(0)
    plain = weights_after(1, replace(PLAIN, optimizer="adamw"))
    decayed = weights_after(1, replace(PLAIN, optimizer="adamw", weight_decay=0.5))
    rate = PLAIN.learning_rate_at(0)
    torch.testing.assert_close(plain - decayed, 0.5 * rate * before, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(plain, weights_after(1))


# The weights of the error in x_0, by their papers, with min-SNR's gamma of 5.
IN_X0 = {
    "min_snr": lambda snr: snr.clamp(max=5),
    "truncated_snr": lambda snr: snr.clamp(min=1),
    "snr_plus_one": lambda snr: snr + 1,
    "p2": lambda snr: snr / (1 + snr),
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_weights_mean_the_same_for_every_prediction_type(weighting, prediction_type):
    """From their definitions as weights of the error in x_0, in float64."""
    schedule = NoiseSchedule.linear()
    t = torch.tensor([0, 1, 10, 250, 600, 999])
    signal = schedule.alphas_cumprod[t]
    snr = signal / (1 - signal)
    in_x0 = IN_X0[weighting](snr)
    # |x0 error|^2 is |epsilon error|^2 / SNR, and |v error|^2 / (SNR + 1)
    divisor = {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1}[prediction_type]
    found = loss_weight(schedule, prediction_type, t, weighting)
    torch.testing.assert_close(found.double(), in_x0 / divisor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", ["uniform", *LOSS_WEIGHTINGS])
def test_weights_where_there_is_no_signal(weighting):
    schedule = NoiseSchedule.linear().rescale_zero_terminal_snr()
    t = torch.tensor([999])
    for prediction_type in ("sample", "v_prediction"):
        assert loss_weight(schedule, prediction_type, t, weighting).isfinite().all()
    snr = torch.tensor(1e-300, dtype=torch.float64)
    limit = 1.0 if weighting == "uniform" else (IN_X0[weighting](snr) / snr).item()
    if limit > torch.finfo(torch.float32).max:
        with pytest.raises(ValueError, match="infinitely"):
            loss_weight(schedule, "epsilon", t, weighting)
    else:
        assert loss_weight(schedule, "epsilon", t, weighting).item() == pytest.approx(limit)


def test_a_learned_variance_is_trained_by_the_hybrid_loss(tmp_path):
    """Only the bound reaches the variance, and only the simple loss the mean."""
    recipe = replace(PLAIN, prediction_type="epsilon", unet=PLAIN.unet | {"out_channels": 2}, steps=2)
    trainer = make_trainer(recipe)
    x, labels, t, noise = trainer._rank_batch()
    t = torch.full_like(t, 300)
    output = torch.randn(len(x), 2, 8, 8, generator=torch.Generator().manual_seed(5)).requires_grad_()
    loss = trainer.model.loss(x, labels, t=t, noise=noise, network=lambda *_: output)
    simple = (output[:, :1] - noise).square().mean()
    schedule = trainer.model.schedule
    beta, bar = schedule.betas[300], schedule.alphas_cumprod[300]
    before = schedule.alphas_cumprod[299]
    x_t = bar.sqrt() * x + (1 - bar).sqrt() * noise

    def mean_of(x0):  # the mean of q(x_{t-1} | x_t, x_0), Ho et al. 2020, eq. 7
        return before.sqrt() * beta / (1 - bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x_t

    true_mean, true_variance = mean_of(x), beta * (1 - before) / (1 - bar)
    predicted = mean_of((x_t - (1 - bar).sqrt() * output[:, :1]) / bar.sqrt())
    share = (output[:, 1:].double() + 1) / 2
    log_variance = share * beta.log() + (1 - share) * true_variance.log()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(true_mean, true_variance.sqrt()),
        torch.distributions.Normal(predicted.detach(), (log_variance / 2).exp()),
    )
    expected = simple + recipe.vlb_weight * 1000 * kl.mean() / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-4, atol=0)
    gradient = torch.autograd.grad(loss, output)[0]
    torch.testing.assert_close(gradient[:, :1], torch.autograd.grad(simple, output)[0][:, :1])
    assert gradient[:, 1:].abs().min() > 0
    model = run(tmp_path, trainer)
    assert model.variance == "learned_range"
    assert model.sample(labels=[1], steps=3).isfinite().all()


def test_a_loss_that_explodes_stops_the_run(tmp_path):
    trainer = make_trainer(replace(PLAIN, steps=50))
    step = trainer.train_step

    def grows():
        norm = step()
        trainer.log_line.losses[-1] *= 1.6**trainer.step
        return norm

    trainer.train_step = grows
    with pytest.raises(
        ValueError, match=r"the loss grew from .* by step \d+; .* the last good one; try a lower"
    ):
        run(tmp_path, trainer)


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path):
    """The weights are lost in the step before a loss shows it."""
    trainer = make_trainer(replace(PLAIN, steps=50))
    loss = trainer.model.loss

    def broken(*args, **options):
        value = loss(*args, **options)
        return value + (float("inf") * (value - value.detach()) if trainer.step == 9 else 0)

    trainer.model.loss = broken
    with pytest.raises(
        ValueError, match=r"(loss is nan|gradient is not finite) at step 10; .*step 5, the last"
    ):
        run(tmp_path, trainer, log_every=7)


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    run(tmp_path, make_trainer(replace(PLAIN, steps=2)))
    left = tmp_path / ".state.safetensors.abc.partial.safetensors"
    left.write_bytes(b"half")
    run(tmp_path, make_trainer(replace(PLAIN, steps=2)), resume=True)
    assert not left.exists()


def test_a_gpu_by_another_name():
    with pytest.raises(ValueError, match=r"there is no device 'gpu'; this machine has: cpu.*'cuda'"):
        make_trainer(device="gpu")
