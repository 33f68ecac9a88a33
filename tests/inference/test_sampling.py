"""DDPM.sample: against diffusers' schedulers, guidance, batches, conventions, and refusals."""

import copy
import importlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from diffusion import kernels
from diffusion.inference import batches, buffers, captured_steps, loop
from diffusion.inference.batches import Interrupted
from diffusion.inference.buffers import Batch
from diffusion.inference.cpu_plan import PlannedUNet
from diffusion.kernels._tolerance import wrong
from diffusion.models.unet import UNet
from diffusion.samplers.guidance import rescale_guidance
from diffusion.samplers.thresholding import dynamic_threshold
from diffusion.utils import memory
from diffusion.utils.device import multiplies_bfloat16
from helpers.models import make_model
from helpers.samplers import CLIPPED_OUTPUT, TESTED, VARIANTS, peer_of


def fixed_noise(count: int, shape=(2, 8, 8)):
    """k -> standard normals that depend on k alone."""
    return lambda k: torch.randn(count, *shape, generator=torch.Generator().manual_seed(1000 + k))


def diffusers_chain(model, scheduler, noise, steps, **step_options):
    """diffusers' own loop: the scheduler's timesteps and updates, with its noise replaced by ours."""
    scheduler.set_timesteps(steps)
    module = importlib.import_module(type(scheduler).__module__)
    x, drawn = noise(0), []
    with pytest.MonkeyPatch.context() as patch:
        for k, t in enumerate(scheduler.timesteps, 1):
            patch.setattr(module, "randn_tensor", lambda *args, k=k, **kwargs: drawn.append(k) or noise(k))
            with torch.no_grad():
                output = model.unet(x, t.expand(len(x)), None)
            x = scheduler.step(output, t, x, **step_options).prev_sample
    stochastic = isinstance(scheduler, diffusers.DDPMScheduler) or step_options.get("eta")
    stochastic = stochastic or "sde" in scheduler.config.get("algorithm_type", "")
    assert drawn[: steps - 1] == ([*range(1, steps)] if stochastic else [])  # the last step may draw none
    return x


@pytest.mark.thinned
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [v for v in (*VARIANTS, CLIPPED_OUTPUT) if v[1].get("variance") != "learned_range"],  # the next but one
    ids=str,
)
def test_sample_equals_diffusers(sampler, options, prediction_type, steps):
    model, noise = make_model(prediction_type=prediction_type), fixed_noise(3)
    scheduler, step_options = peer_of(
        sampler,
        options,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=prediction_type,
        timestep_spacing="leading",
    )
    peer = diffusers_chain(model, scheduler, noise, steps, **step_options)
    double = copy.deepcopy(model)
    double.unet.double()
    expected = diffusers_chain(double, scheduler, lambda k: noise(k).double(), steps, **step_options)
    clip = {} if TESTED[sampler].clips else {"clip": None}
    x = model.sample(num_samples=3, sampler=sampler, steps=steps, noise=noise, **clip, **options)
    assert expected.abs().max() > 0.1
    assert wrong(x, peer, expected, accuracy=1e-4) is None  # some chains make much of the peer's own rounding


@pytest.mark.parametrize("T", [100, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_full_chain_equals_diffusers(T):
    model, noise = make_model(T=T), fixed_noise(2)
    scheduler = diffusers.DDPMScheduler(T, beta_start=1e-4, beta_end=20 / T)
    expected = diffusers_chain(model, scheduler, noise, T)
    torch.testing.assert_close(model.sample(num_samples=2, noise=noise), expected, atol=1e-4, rtol=1e-4)


def test_learned_variance_equals_diffusers():
    model, noise = make_model(learned_variance=True), fixed_noise(2)
    assert model.variance == "learned_range"
    scheduler = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type="learned_range")
    expected = diffusers_chain(model, scheduler, noise, 50)
    torch.testing.assert_close(
        model.sample(num_samples=2, steps=50, noise=noise), expected, atol=1e-4, rtol=1e-4
    )


def test_a_learned_variance_is_left_aside_where_the_sampler_has_its_own():
    model, noise = make_model(learned_variance=True), fixed_noise(2)
    first_half = make_model()
    state = model.unet.state_dict()
    first_half.unet.load_state_dict(
        state | {f"output_conv.{name}": state[f"output_conv.{name}"][:2] for name in ("weight", "bias")}
    )
    for options in ({"sampler": "ddim", "eta": 1.0}, {"sampler": "ddpm", "variance": "fixed_large"}):
        expected = first_half.sample(num_samples=2, steps=10, noise=noise, **options)
        torch.testing.assert_close(model.sample(num_samples=2, steps=10, noise=noise, **options), expected)


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


BAD = {
    "label too large": ({"labels": [10]}, r"labels must be whole numbers in 0\.\.9, not 10"),
    "negative label": ({"labels": [-1]}, r"labels must be whole numbers in 0\.\.9, not -1"),
    "label of another type": ({"labels": ["three"]}, "unknown label 'three': .* give numbers in 0..9"),
    "fractional label": ({"labels": [1.5]}, "labels must be whole numbers in 0..9, not 1.5"),
    "no labels": ({"labels": []}, "labels are empty"),
    "label count": ({"labels": [1, 2], "num_samples": 3}, "2 labels for 3 images"),
    "no images": ({"num_samples": 0}, "num_samples"),
    "sampler": ({"sampler": "euler"}, "unknown sampler 'euler'"),
    "sampler option": ({"eta": 1.0}, "unknown option of ddpm 'eta'; samplers with it: ddim"),
    "spacing": ({"spacing": "karras"}, "spacing"),
    "variance": ({"variance": "other"}, "variance"),
    "no steps": ({"steps": 0}, "steps"),
    "negative steps": ({"steps": -3}, "steps"),
    "too many steps": ({"steps": 1001}, "1000"),
    "fractional steps": ({"steps": 2.5}, "steps"),
    "seed": ({"seed": -1}, "seed"),
    "seed too large": ({"seed": 2**64}, "seed"),
    "guidance": ({"labels": [1], "guidance_scale": float("nan")}, "guidance_scale"),
    "guidance without labels": ({"guidance_scale": 2.0}, "needs labels"),
    "seed of True": ({"seed": True}, "seed must be a whole number in 0..2.64-1, not True"),
    "labels of True": ({"labels": [True]}, "labels must be whole numbers in 0..9, not True"),
    "giant guidance": ({"labels": 1, "guidance_scale": 10**400}, "guidance_scale must be a finite number"),
    "guidance of text": ({"labels": 1, "guidance_scale": "2"}, "guidance_scale must be a finite number"),
    "images without a count": ({"batch_size": 4}, "made at a time; for 4 images give num_samples=4"),
    "giant batch size": ({"batch_size": 2**62}, "batch_size must be a whole number in 1..2.31-1"),
    "giant count": ({"num_samples": 10**400}, "num_samples must be a whole number in 1"),
    "giant sample id": ({"sample_ids": [2**63]}, "sample_ids must be whole numbers in 0..2.63-1"),
    "empty sample ids": ({"sample_ids": []}, "sample_ids are empty"),
    "eta of text": ({"sampler": "ddim", "eta": "1"}, "eta must be a number in"),
    "clip of text": ({"clip": "1"}, "clip must be a number in"),
    "rescale of text": ({"guidance_rescale": "1"}, "guidance_rescale must be a number in .0, 1., not '1'"),
    "threshold of text": (
        {"dynamic_threshold": "1"},
        "dynamic_threshold must be a number in .0, 1., not '1'",
    ),
    "threshold's maximum": ({"dynamic_threshold_max": 0.5}, "dynamic_threshold_max must be a number in .1, "),
    "guidance interval": ({"guidance_interval": "13"}, "guidance_interval must be two numbers"),
    "callback": ({"callback": 3}, "callback must be a function, or None, not 3"),
    "noise of no function": ({"noise": 3}, "noise must be a function, a tensor .* or None, not 3"),
    "noise of another shape": ({"noise": torch.zeros(1)}, "noise must be a dense tensor .1, 2, 8, 8."),
    "batch size": ({"batch_size": 0}, "batch_size"),
    "sample ids": (
        {"num_samples": 2, "sample_ids": [1, 2, 3]},
        "sample_ids must be 2, one for each image, not 3",
    ),
    "negative sample id": ({"sample_ids": [-1]}, "sample_ids"),
    "backend": ({"backend": "vulkan"}, "backend 'vulkan'"),
    "device": ({"device": "cuda:99"}, "device"),
    "unknown device": ({"device": "abacus"}, "abacus"),
    "dtype": ({"dtype": "int8"}, "unknown dtype 'int8'"),
    "noise shape": ({"noise": lambda k: torch.zeros(1, 3, 8, 8)}, r"noise\(0\)"),
    "sparse noise": ({"noise": lambda k: torch.ones(1, 2, 8, 8).to_sparse()}, r"noise\(0\) must be a dense"),
    "noise without data": (
        {"noise": lambda k: torch.ones(1, 2, 8, 8, device="meta")},
        r"noise\(0\) must be a dense tensor \[1, 2, 8, 8\] of real numbers, not a tensor float32 .* on ",
    ),
    "noise of the second step": (
        {"noise": lambda k: torch.ones(1, 2, 8, 8).to_sparse() if k else torch.ones(1, 2, 8, 8), "steps": 3},
        r"noise\(1\) must be a dense",
    ),
    "complex noise": ({"noise": lambda k: torch.ones(1, 2, 8, 8) + 1j}, r"noise\(0\) must .* not complex64"),
    "nested noise": (
        {"noise": lambda k: torch.nested.nested_tensor([torch.ones(2, 8, 8)], layout=torch.jagged)},
        r"noise\(0\) must be a dense",
    ),
    "noise of a list": ({"noise": lambda k: [0.0]}, r"noise\(0\) must be a dense .* not \[0.0\]"),
    "sparse labels": (
        {"labels": torch.tensor([1, 2]).to_sparse()},
        r"labels must be whole numbers in 0\.\.9, not tensor",
    ),
    "labels without data": ({"labels": torch.tensor([1, 2], device="meta")}, "labels must be whole numbers"),
    "a sparse label": ({"labels": torch.tensor(1).to_sparse()}, "labels must be whole numbers"),
    "a list of sparse labels": ({"labels": [torch.tensor(1).to_sparse()]}, "labels must be whole numbers"),
    "sparse sample ids": ({"sample_ids": torch.tensor([1]).to_sparse()}, "sample_ids must be whole numbers"),
    "a sparse seed": ({"seed": torch.tensor(1).to_sparse()}, "seed must be a whole number"),
    "a sparse interval": (
        {"labels": [1], "guidance_scale": 2.0, "guidance_interval": torch.tensor([1, 2]).to_sparse()},
        "guidance_interval must be two numbers",
    ),
    "rescale": ({"labels": [1], "guidance_scale": 2.0, "guidance_rescale": 2.0}, "rescale"),
    "threshold": ({"dynamic_threshold": 2.0}, "threshold"),
    "learned variance": ({"variance": "learned_range"}, "variance"),
}


def test_injected_noise_says_how_many_images_there_are_and_how_large():
    model, draws = make_model(), []
    noise = fixed_noise(3, (2, 12, 16))  # the model's own images are 8x8

    def counted(k):
        draws.append(k)
        return noise(k)

    images = model.sample(noise=counted, steps=4)
    assert draws == [0, 1, 2, 3]  # each once: a source may draw from a generator
    assert images.shape == (3, 2, 12, 16)
    larger = UNet(replace(model.unet.config, sample_size=(12, 16)))
    larger.load_state_dict(model.unet.state_dict())
    model.unet = larger.eval()
    torch.testing.assert_close(images, model.sample(num_samples=3, noise=noise, steps=4))
    with pytest.raises(ValueError, match=r"noise\(0\) must be a dense tensor \[2, 2, 12, 16\]"):
        model.sample(num_samples=2, noise=noise)
    with pytest.raises(ValueError, match=r"noise\(0\) is \[1, 2, 7, 8\]: images of 7x8 cannot be halved"):
        model.sample(noise=fixed_noise(1, (2, 7, 8)))


@pytest.mark.parametrize("kind", [np.int64, np.array, torch.tensor], ids=["numpy", "array", "tensor"])
def test_numbers_of_numpy_and_torch_are_taken(conditional, kind):
    options = {"sampler": "ddim", "steps": 3, "eta": 0.5}
    plain = conditional.sample(3, num_samples=2, seed=7, batch_size=1, guidance_scale=2.0, **options)
    real = {np.int64: np.float64}.get(kind, kind)
    options = {"sampler": "ddim", "steps": kind(3), "eta": real(0.5), "guidance_scale": real(2.0)}
    other = conditional.sample(kind(3), num_samples=kind(2), seed=kind(7), batch_size=kind(1), **options)
    assert torch.equal(other, plain)
    other = conditional.sample([kind(3), 3], seed=kind(7), sample_ids=[kind(0), kind(1)], **options)
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_in_one_line(conditional, case):
    arguments, expected = BAD[case]
    with pytest.raises(ValueError, match=expected) as caught:
        conditional.sample(**arguments)
    assert "\n" not in str(caught.value)


def test_labels_with_an_unconditional_model_are_refused(model):
    with pytest.raises(ValueError, match="unconditional"):
        model.sample([1])


def test_a_model_that_gives_nan_is_reported(model):
    with torch.no_grad():
        model.unet.output_conv.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.sample(steps=2)


@pytest.mark.thinned
@pytest.mark.parametrize("steps", [20, 50])
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


def failing(monkeypatch, when, error):
    """Has loop.run raise `error` for batches that `when` says; a list of the sizes of all batches."""
    sizes, run = [], loop.run

    def patched(network, table, batch, *args, **options):
        sizes.append(len(batch.sample_ids))
        if when(sizes):
            raise error
        return run(network, table, batch, *args, **options)

    monkeypatch.setattr(loop, "run", patched)
    return sizes


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_batch_too_large_for_the_memory_is_halved(model, monkeypatch, error, capsys):
    expected = model.sample(num_samples=9, steps=3)
    sizes = failing(monkeypatch, lambda sizes: sizes[-1] > 3, error)
    assert torch.equal(model.sample(num_samples=9, steps=3, progress=True), expected)
    assert sizes == [9, 5, 3, 3, 3]
    assert "9/9 images" in capsys.readouterr().err


@pytest.mark.parametrize(("free", "expected"), [(None, [9]), (1 << 40, [9]), (1 << 19, None), (0, [1] * 9)])
def test_the_batch_is_what_free_memory_holds(model, monkeypatch, free, expected):
    monkeypatch.setattr(batches, "free_memory", lambda device: free)
    sizes = failing(monkeypatch, lambda sizes: False, None)
    model.sample(num_samples=9, steps=2)
    if expected is None:  # some, but not all
        assert 1 < max(sizes) < 9
        assert sum(sizes) == 9
    else:
        assert sizes == expected


def test_no_memory_for_a_single_image(model, monkeypatch):
    failing(monkeypatch, lambda sizes: True, OUT_OF_MEMORY[0])
    with pytest.raises(ValueError, match="not enough memory on cpu for one image"):
        model.sample(num_samples=2, steps=3)


def test_other_errors_are_not_taken_for_a_lack_of_memory(model, monkeypatch):
    sizes = failing(monkeypatch, lambda sizes: True, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        model.sample(num_samples=4, steps=3)
    assert sizes == [4]


def test_an_interruption_leaves_the_finished_images(model, monkeypatch):
    expected = model.sample(num_samples=8, steps=3)
    failing(monkeypatch, lambda sizes: len(sizes) == 3, KeyboardInterrupt())
    with pytest.raises(Interrupted) as caught:
        model.sample(num_samples=8, steps=3, batch_size=3)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert torch.equal(caught.value.images, expected[:6])


def test_a_callback_may_keep_and_change_what_it_gets(model):
    expected = model.sample(num_samples=2, steps=5)

    def spoil(i, x, x0):
        x.fill_(float("nan"))
        x0.fill_(float("nan"))

    assert torch.equal(model.sample(num_samples=2, steps=5, callback=spoil), expected)


def test_more_steps_than_are_embedded_at_a_time(conditional, monkeypatch):
    options = {"sampler": "ddim", "steps": 7, "guidance_scale": 2.0}
    expected = conditional.sample([4, 4, 9], **options)
    monkeypatch.setattr(buffers, "STEPS_EMBEDDED", 3)
    conditional = conditional.copy()
    torch.testing.assert_close(conditional.sample([4, 4, 9], **options), expected, atol=1e-4, rtol=0)


def test_unknown_precision(model):
    with pytest.raises(ValueError, match="unknown precision 'quick'; choose from: exact, tf32, fast"):
        model.sample(precision="quick")


@pytest.fixture
def replayed(monkeypatch):
    """Has steps captured as on a CUDA device, where a graph is their call; a list of their graphs' pools."""
    seen, pools = [], itertools.count()

    def capture(function, changed, pool):
        kept = [tensor.clone() for tensor in changed]
        function()  # to warm up
        for tensor, before in zip(changed, kept, strict=True):
            tensor.copy_(before)
        seen.append(pool)
        return lambda count: [function() for _ in range(count)]

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(pools)))
    monkeypatch.setattr(captured_steps, "runs_cuda_kernels", lambda *args: True)
    monkeypatch.setattr(captured_steps, "capture_cuda_graph", capture)
    return seen


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, 1),
        ({"guidance_interval": (300, 600)}, 4),  # steps within, steps without, and those that lead over
        ({"eta": 1.0}, 1),
        ({"sampler": "dpm++"}, 1),
        ({"guidance_scale": 1.0, "batch_size": 3}, 2),
        ({"guidance_rescale": 0.7}, 1),
        ({"guidance_parallel": 0.3, "guidance_interval": (300, 600)}, 4),
        ({"dynamic_threshold": 0.9, "dynamic_threshold_max": 2.0, "eta": 1.0}, 1),
        ({"dynamic_threshold": 0.9, "sampler": "dpm++", "guidance_rescale": 0.7}, 1),
    ],
)
def test_captured_steps_need_nothing_but_their_buffers(replayed, monkeypatch, options, graphs):
    """The same images with steps that are captured once, and replayed for all others and another batch."""
    conditional = make_model(10)  # which has captured nothing
    options = {"sampler": "ddim", "steps": 10, "guidance_scale": 2.0, "seed": 3} | options
    labels = [3, 1, 4, 1, 5]
    first = conditional.sample(labels, **options)
    assert len(replayed) == graphs
    assert len(set(replayed)) == (2 if "batch_size" in options else 1)  # the graphs of a batch share memory
    again = conditional.sample(labels, **options | {"seed": 4})
    once = len(replayed)
    monkeypatch.undo()
    plain = conditional.copy()
    assert torch.equal(first, plain.sample(labels, **options))
    assert torch.equal(again, plain.sample(labels, **options | {"seed": 4}))
    assert once == (graphs if "batch_size" not in options else 2 * graphs)


def test_threads_sample_from_one_model(conditional):
    options = {"sampler": "ddim", "steps": 10, "guidance_scale": 2.0}
    expected = [conditional.sample([1, 2], seed=seed, **options) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        results = pool.map(lambda seed: conditional.sample([1, 2], seed=seed, **options), range(6))
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"dynamic_threshold": 0.995}], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_sampling_within_a_callback(conditional, options, fails):
    """A call within a call has buffers of its own, also where it ends early."""
    outer = {"labels": [3, 1], "steps": 5, "sampler": "ddim", "guidance_scale": 2.0, **options}
    inner = outer | {"labels": [4, 7], "seed": 9}
    expected = conditional.sample(**outer), conditional.sample(**inner, callback=lambda *args: None)
    found = []

    def stop(i, x, x0):
        if fails and i == 2:
            raise LookupError

    def callback(i, x, x0):
        if i == 1:
            try:
                found.append(conditional.sample(**inner, callback=stop))
            except LookupError:
                found.append(None)

    assert torch.equal(conditional.sample(**outer, callback=callback), expected[0])
    assert found == [None] if fails else torch.equal(found[0], expected[1])
    assert torch.equal(conditional.sample(**outer), expected[0])


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


def test_ctrl_c_between_two_batches(model, monkeypatch):
    expected = model.sample(num_samples=2, steps=3)
    begun = []

    def batch(**arguments):
        begun.append(arguments)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return Batch(**arguments)

    monkeypatch.setattr(batches, "Batch", batch)
    with pytest.raises(Interrupted) as caught:
        model.sample(num_samples=5, steps=3, batch_size=2)
    assert torch.equal(caught.value.images, expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), "floats in .-1, 1., not torch.uint8"),
        (torch.full((2, 2, 8, 8), 255.0), "reach from 255 to 255"),
        (torch.full((2, 2, 8, 8), float("nan")), "reach from nan"),
    ],
    ids=["bytes", "floats of 0..255", "NaN"],
)
def test_the_loss_refuses_images_of_another_range(model, images, message):
    with pytest.raises(ValueError, match=message):
        model.loss(images)
    assert model.loss(torch.full((2, 2, 8, 8), 3.0)).isfinite()


def test_the_loss_takes_tensors(conditional):
    x, labels = torch.zeros(2, 2, 8, 8), torch.tensor([1, 2])
    for images in (x.numpy(), x.tolist(), x[0], x[:0]):
        with pytest.raises(ValueError, match="images must be"):
            conditional.loss(images)
    for given in ([1, 2], labels.numpy(), 1):
        with pytest.raises(ValueError, match="labels must be an int64 tensor"):
            conditional.loss(x, given)
        with pytest.raises(ValueError, match="labels must be a tensor of integers"):
            conditional.unet(x, labels, given)


def test_an_image_beyond_memory_is_refused_at_once(model, monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device: 1000)  # an image of 512 bytes fits
    with pytest.raises(ValueError, match=r"the feature maps of one image take .* GiB, and cpu has"):
        model.sample(steps=1)
