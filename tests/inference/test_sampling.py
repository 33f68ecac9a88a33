"""DDPM.sample: guidance, batches, callbacks and conventions."""

import pytest
import torch

from diffusion import kernels
from diffusion.inference.cpu_plan import PlannedUNet
from diffusion.models.unet import UNet
from diffusion.samplers.guidance import rescale_guidance
from diffusion.samplers.thresholding import dynamic_threshold
from diffusion.utils.device import multiplies_bfloat16
from helpers.models import make_model
from helpers.noise import fixed_noise
from helpers.thinning import exhaustive_but


@pytest.mark.parametrize("options", [{}, {"sampler": "ddpm", "steps": 50}, {"sampler": "dpm++", "sde": True}])
def test_an_image_does_not_depend_on_its_batch(conditional, options):
    options = {"sampler": "ddim", "steps": 20, "guidance_scale": 3.0, "seed": 7} | options
    labels = [i % 10 for i in range(64)]
    together = conditional.sample(labels, **options)
    for size in (1, 7):
        torch.testing.assert_close(
            conditional.sample(labels[:14], batch_size=size, **options), together[:14], atol=1e-4, rtol=0
        )
    alone = conditional.sample([labels[41]], sample_ids=[41], **options)
    torch.testing.assert_close(alone[0], together[41], atol=1e-4, rtol=0)
    assert (together[1] - together[11]).abs().max() > 0.01  # same label, another image


def test_the_seed_matters_and_repeats(model):
    first, again = (model.sample(num_samples=2, steps=5, seed=3) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, model.sample(num_samples=2, steps=5, seed=4))


@pytest.fixture(params=["auto", "reference"])
def evaluations(request, monkeypatch):
    """The backend, and a list that receives the images and embeddings of every evaluation of the UNet."""
    seen = []

    def recorded(denoise):
        def run(self, x, embedding, *backend):
            seen.append((x.clone(), embedding.clone()))
            return denoise(self, x, embedding, *backend)

        return run

    for network in (UNet, PlannedUNet):
        monkeypatch.setattr(network, "denoise", recorded(network.denoise))
    return request.param, seen


def test_guidance_evaluates_both_halves_in_one_batch(conditional, evaluations):
    backend, seen = evaluations
    conditional.sample([3, 4], guidance_scale=2.0, sampler="ddim", steps=3, backend=backend)
    assert len(seen) == 3
    for (x, embedding), timestep in zip(seen, (666, 333, 0), strict=True):
        assert torch.equal(x[:2], x[2:])
        expected = conditional.unet.embed(torch.full((4,), timestep), torch.tensor([3, 4, 10, 10]))
        torch.testing.assert_close(embedding, expected)


def test_guidance_interval_skips_the_unconditional_half(conditional, evaluations):
    backend, seen = evaluations
    conditional.sample(
        [3], guidance_scale=2.0, guidance_interval=(300, 600), sampler="ddim", steps=10, backend=backend
    )
    # Timesteps 900, 800, ..., 0; those from 600 to 300 are guided.
    assert [len(x) for x, _ in seen] == [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]


def test_guidance_scales_one_and_zero(conditional, evaluations):
    backend, seen = evaluations
    options = {"sampler": "ddim", "steps": 10, "backend": backend}
    one = conditional.sample([3, 4], guidance_scale=1.0, **options)
    assert [len(x) for x, _ in seen] == [2] * 10
    zero = conditional.sample([3, 4], guidance_scale=0.0, **options)
    unconditional = conditional.sample(num_samples=2, **options)
    torch.testing.assert_close(zero, unconditional, atol=1e-5, rtol=0)
    assert (one - zero).abs().max() > 0.01


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_guided_step_rescale_and_threshold(conditional, sampler):
    """The whole of guidance against its formulas, written out for each step in float64."""
    noise, labels = fixed_noise(2), torch.tensor([3, 4])
    table = conditional.steps(sampler, 8, guidance_scale=4.0, clip=None)
    x, previous = noise(0).double(), None
    unet = conditional.unet
    for i in range(8):
        row = table.row(i)
        t = torch.full((2,), int(row.timestep))
        with torch.no_grad():
            cond, null = unet(x.float(), t, labels).double(), unet(x.float(), t, None).double()
        out = rescale_guidance(null + 4.0 * (cond - null), cond, 0.7)
        x0 = dynamic_threshold(row.x0_from_x * x + row.x0_from_output * out, 0.9, 2.0)
        x = row.coef_x * x + row.coef_x0 * x0 + row.coef_output * out + row.sigma * noise(i + 1)
        x = x + row.coef_x0_prev * previous if row.coef_x0_prev else x
        previous = x0
    sample = conditional.sample(
        [3, 4],
        guidance_scale=4.0,
        guidance_rescale=0.7,
        dynamic_threshold=0.9,
        dynamic_threshold_max=2.0,
        sampler=sampler,
        steps=8,
        noise=noise,
    )
    torch.testing.assert_close(sample.double(), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddpm", {}),
        ("ddpm", {"variance": "fixed_large", "spacing": "trailing"}),
        ("ddim", {"eta": 1.0}),
        ("dpm++", {"sde": True}),
    ],
)
def test_the_last_step_adds_no_noise(model, sampler, options):
    asked, noise = [], fixed_noise(1)

    def recorded(k):
        asked.append(k)
        return noise(k)

    model.sample(sampler=sampler, steps=6, noise=recorded, **options)
    assert asked == [0, 1, 2, 3, 4, 5]  # 6 would be the noise of the last step
    assert model.steps(sampler, 6, **options).row(5).sigma == 0


def test_injected_noise_equals_the_packages_own(model):
    ids = torch.tensor([5, 2**40])

    def noise(k):
        return kernels.philox_normal((2, 2, 8, 8), seed=9, sample_ids=ids, stream=k)

    own = model.sample(sample_ids=ids, seed=9, steps=10)
    assert torch.equal(model.sample(num_samples=2, noise=noise, steps=10), own)


def test_callback_sees_every_step_and_the_result(model):
    seen = []
    result = model.sample(num_samples=3, steps=4, batch_size=2, callback=lambda *args: seen.append(args))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [len(x) for _, x, _ in seen] == [2] * 4 + [1] * 4
    assert torch.equal(torch.cat([seen[3][1], seen[7][1]]), result)
    assert seen[2][2].abs().max() <= 1  # x0 is clipped


def test_progress_counts_images(model, capsys):
    model.sample(num_samples=3, steps=4, batch_size=2, progress=True)
    assert "3/3 images" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_low_precision_stays_close_and_leaves_the_model_alone(conditional, dtype):
    options = {"sampler": "ddim", "steps": 10}
    exact = conditional.sample([1, 2], guidance_scale=2.0, **options)
    rough = conditional.sample([1, 2], guidance_scale=2.0, dtype=dtype, **options)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.05
    assert next(conditional.unet.parameters()).dtype == torch.float32


def test_sampling_a_training_model_uses_no_dropout_and_keeps_its_mode():
    model = make_model(prediction_type="sample")
    expected = model.sample(steps=5)
    model.train()
    for block in model.unet.modules():
        if hasattr(block, "dropout"):
            block.dropout = 0.5
    assert torch.equal(model.sample(steps=5), expected)
    assert model.unet.training


def test_reference_backend_draws_the_same_images(conditional):
    options = {"sampler": "ddpm", "steps": 20, "guidance_scale": 2.0}
    auto = conditional.sample([1, 2], **options)
    torch.testing.assert_close(
        conditional.sample([1, 2], backend="reference", **options), auto, atol=1e-4, rtol=0
    )


def test_a_models_own_sampler_options_are_defaults():
    chosen = make_model(10, sampler_options={"ddim": {"use_clipped_model_output": True}})
    plain = make_model(10)
    options = {"guidance_scale": 5.0, "sampler": "ddim", "steps": 5}
    clipped = plain.sample([1], use_clipped_model_output=True, **options)
    assert torch.equal(chosen.sample([1], **options), clipped)
    as_it_is = plain.sample([1], **options)
    assert torch.equal(chosen.sample([1], use_clipped_model_output=False, **options), as_it_is)
    assert (clipped - as_it_is).abs().max() > 0.01
    assert torch.equal(chosen.sample(steps=3), plain.sample(steps=3))
    for options in ({"euler": {}}, {"ddim": {"variance": 1}}, {"ddim": 3}, [1]):
        with pytest.raises(ValueError, match=r"sampler|option"):
            make_model(sampler_options=options)


@pytest.mark.thinned
@pytest.mark.parametrize("steps", exhaustive_but([20, 50], default=[20]))
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_every_precision_and_backend_samples_the_same_images(conditional, sampler, steps):
    """exact within its bound; fast at most twice as far off as PyTorch's own bfloat16."""
    options = {"sampler": sampler, "steps": steps, "guidance_scale": 3.0, "seed": 5}
    labels = list(range(10))
    exact = conditional.sample(labels, **options)
    assert (conditional.sample(labels, backend="reference", **options) - exact).abs().max() < 1e-3
    fast = conditional.sample(labels, precision="fast", **options)
    assert torch.equal(fast, exact) != multiplies_bfloat16(torch.device("cpu"))
    peer = conditional.sample(labels, backend="reference", dtype="bfloat16", **options)
    assert (fast - exact).abs().mean() < 2 * (peer - exact).abs().mean()


def test_an_image_is_the_same_in_every_batch_to_the_bit(conditional):
    options = {"sampler": "ddim", "steps": 20, "guidance_scale": 3.0, "seed": 7}
    labels = [i % 10 for i in range(24)]
    together = conditional.sample(labels, **options)
    assert torch.equal(conditional.sample(labels, batch_size=5, **options), together)
    alone = conditional.sample([labels[11]], sample_ids=[11], **options)
    assert torch.equal(alone[0], together[11])


def test_a_callback_may_keep_and_change_what_it_gets(model):
    expected = model.sample(num_samples=2, steps=5)

    def spoil(i, x, x0):
        x.fill_(float("nan"))
        x0.fill_(float("nan"))

    assert torch.equal(model.sample(num_samples=2, steps=5, callback=spoil), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(dtype):
    expected = make_model().sample(num_samples=2, steps=3)
    model = make_model()
    torch.set_default_dtype(dtype)
    try:
        found = model.sample(num_samples=2, steps=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_around_a_call_changes_nothing(conditional, backend):
    options = {"labels": [3, 1], "steps": 3, "guidance_scale": 2.0, "backend": backend}
    expected = conditional.sample(**options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conditional.sample(**options), expected)
