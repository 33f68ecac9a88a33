"""Images to start from, and masks: loops in float64 written from the papers, and diffusers."""

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import kernels
from diffusion.inference.repaint import can_resample, repaint_rows
from diffusion.samplers import EVALUATE_TWICE, SAMPLERS
from diffusion.storage.given_images import given_images, given_mask
from helpers.models import make_model

T = 20
SHAPE = (3, 2, 8, 8)


def noises(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, *SHAPE, generator=generator))


@pytest.fixture(scope="module")
def trained():
    """A model of 20 timesteps, and its network in float64 as a function of x and t."""
    model = make_model(T=T, clip=None)
    double = model.copy().double().unet

    @torch.no_grad()
    def epsilon(x, t):
        return double(x, torch.full((len(x),), t), None)

    return model, epsilon


@pytest.fixture
def image():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("strength", "first"), [(0.5, 9), (0.99, 18), (0.05, 0), (1.0, 19)])
def test_sdedit_removes_the_noise_that_the_image_got(trained, image, strength, first):
    model, epsilon = trained
    signal, z = model.schedule.alphas_cumprod.tolist(), noises(T + 1)
    x = math.sqrt(signal[first]) * image.double() + math.sqrt(1 - signal[first]) * z[0].double()
    for i, t in enumerate(range(first, -1, -1)):  # DDPM, algorithm 2
        alpha = signal[t] / (signal[t - 1] if t else 1.0)
        eps = epsilon(x, t)
        x = (x - (1 - alpha) / math.sqrt(1 - signal[t]) * eps) / math.sqrt(alpha)
        if t:
            x = x + math.sqrt((1 - signal[t - 1]) / (1 - signal[t]) * (1 - alpha)) * z[i + 1].double()
    found = model.sample(image=image, strength=strength, sampler="ddpm", noise=lambda k: z[k])
    torch.testing.assert_close(found.double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize(
    ("sampler", "options", "scheduler", "config"),
    [
        (
            "ddim",
            {"fixed_stride": True},
            diffusers.DDIMScheduler,
            {"clip_sample": False, "timestep_spacing": "trailing"},
        ),
        ("dpm++", {}, diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
        (
            "dpm++",
            {"solver_order": 3},
            diffusers.DPMSolverMultistepScheduler,
            {"timestep_spacing": "trailing", "solver_order": 3},
        ),
    ],
)
def test_strength_is_that_of_diffusers(sampler, options, scheduler, config, strength, image):
    model = make_model(clip=None)
    z, steps = noises(1)[0], 12
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    theirs = scheduler(num_train_timesteps=1000, **betas, **config)
    theirs.set_timesteps(steps)
    first = max(steps - min(int(steps * strength), steps), 0)
    timesteps = theirs.timesteps[first:]
    if sampler == "dpm++":
        theirs.set_begin_index(first)
    x = theirs.add_noise(image, z, timesteps[:1])
    with torch.no_grad():
        for t in timesteps:
            x = theirs.step(model.unet(x, t.expand(len(x)), None), t, x).prev_sample
    options = {"sampler": sampler, "steps": steps, "spacing": "trailing", **options}
    found = model.sample(image=image, strength=strength, noise=z, **options)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("resamples", [1, 3])
def test_repaint_is_algorithm_1(trained, image, resamples):
    model, epsilon = trained
    signal = [1.0, *model.schedule.alphas_cumprod.tolist()]  # of t = 0..T as in the paper
    known = torch.rand(1, 1, 8, 8) < 0.5
    total = (T - 1) * resamples + 1
    z = [noise.double() for noise in noises(3 * total + 1)]
    x, evaluation = z[0], 0
    for t in range(T, 0, -1):
        alpha = signal[t] / signal[t - 1]
        for u in range(resamples if t > 1 else 1):
            kept = math.sqrt(signal[t - 1]) * image.double()
            kept = kept + math.sqrt(1 - signal[t - 1]) * z[total + 1 + evaluation]
            new = (x - (1 - alpha) / math.sqrt(1 - signal[t]) * epsilon(x, t - 1)) / math.sqrt(alpha)
            if t > 1:
                deviation = math.sqrt((1 - signal[t - 1]) / (1 - signal[t]) * (1 - alpha))
                new = new + deviation * z[evaluation + 1]
            x = torch.where(known, kept, new)
            if u < resamples - 1 and t > 1:  # the paper's beta_{t-1} is that of the step from t - 1 to t
                again = z[2 * total + 1 + evaluation]
                x = math.sqrt(alpha) * x + math.sqrt(1 - alpha) * again
            evaluation += 1
    options = {"image": image, "mask": ~known, "resamples": resamples, "sampler": "ddpm"}
    found = model.sample(**options, noise=lambda k: z[k].float())
    torch.testing.assert_close(found.double(), x, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[known.expand(SHAPE)], image[known.expand(SHAPE)])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("options", [{"sampler": "ddpm"}, {"sampler": "dpm++", "steps": 6}], ids=str)
def test_the_noise_of_repaint_belongs_to_the_image(trained, image, backend, options):
    model, _ = trained
    mask = torch.zeros(8, 8)
    mask[2:6] = 1

    def noise(k):
        return kernels.philox_normal(SHAPE, seed=5, sample_ids=[7, 8, 9], stream=k)

    options = {"image": image, "mask": mask, "resamples": 2, "backend": backend, **options}
    expected = model.sample(noise=noise, sample_ids=[7, 8, 9], **options)
    found = model.sample(seed=5, sample_ids=[7, 8, 9], batch_size=2, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_jumps_of_repaint(trained, image):
    """The published schedule of jumps (Lugmayr et al. 2022, appendix), and more rows than are embedded
    together."""
    steps, jump, resamples = 90, 10, 3
    jumps = {t: resamples - 1 for t in range(0, steps - jump, jump)}
    t, visited = steps, []
    while t >= 1:
        t -= 1
        visited.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump):
                t += 1
                visited.append(t)
    visited.append(-1)
    rows = [steps - 1 - a for a, b in pairwise(visited) if b < a]
    assert repaint_rows(steps, resamples, jump) == rows
    model = make_model(clip=None)
    options = {
        "sampler": "ddim",
        "steps": steps,
        "image": image[:1],
        "mask": torch.ones(8, 8),
        "jump_length": 70,
    }
    found = model.sample(resamples=2, **options)
    plain = make_model(clip=None)
    plain.unet.register_forward_hook(lambda *arguments: None)  # which embeds timesteps step by step
    torch.testing.assert_close(found, plain.sample(resamples=2, **options), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "heun"])
def test_a_mask_of_ones_paints_all_and_one_of_zeros_nothing(trained, image, sampler):
    model, _ = trained
    options = {"sampler": sampler, "steps": 6, "image": image, "resamples": 1}
    new = model.sample(mask=torch.ones(8, 8), **options)
    torch.testing.assert_close(
        new, model.sample(num_samples=3, sampler=sampler, steps=6), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(model.sample(mask=torch.zeros(8, 8), **options), image)


def test_every_kind_of_image_and_mask():
    model = make_model(channels=1, T=T, value_range=(0, 1))
    pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8)
    options = {"sampler": "ddim", "steps": 4, "resamples": 2}
    half = torch.zeros(8, 8, dtype=torch.bool)
    half[:4] = True
    kinds = [
        (pixels[None], half),
        (pixels[None, None].float() / 255, half[None].float()),
        (pixels[..., None].numpy(), half[None, None].numpy()),
        (Image.fromarray(pixels.numpy()), Image.fromarray(half.numpy())),
        ([Image.fromarray(pixels.numpy()).convert("RGB")], half.to(torch.uint8) * 255),
        (pixels[None].numpy(), half.to(torch.uint8)),  # 0 and 1
        (pixels[None, None].float().numpy().astype(">f8"), half.numpy().astype(np.uint8)),
        (pixels[None, None].float().numpy().astype(np.longdouble), half.numpy().astype(">f4")),
        (Image.fromarray(pixels.numpy()), Image.fromarray(half.numpy().astype(np.uint8))),
        (Image.fromarray(pixels.numpy()), Image.fromarray(half.numpy().astype(np.uint8)).resize((16, 16), 0)),
    ]
    kinds[6:8] = [(image / np.float64(255), mask) for image, mask in kinds[6:8]]
    expected = model.sample(image=kinds[0][0], mask=kinds[0][1], **options)
    torch.testing.assert_close(expected[0, 0, 4:], pixels[4:].float() / 255, rtol=1e-6, atol=1e-6)
    for image, mask in kinds[1:]:
        torch.testing.assert_close(model.sample(image=image, mask=mask, **options), expected)
    large = Image.fromarray(np.asarray(kinds[3][0]).repeat(2, 0).repeat(2, 1)).resize((16, 16), 0)
    wide = Image.new("L", (32, 16))
    wide.paste(large, (8, 0))
    found = model.sample(image=wide, mask=half, **options)
    cut = wide.crop((8, 0, 24, 16)).resize((8, 8), Image.Resampling.LANCZOS)
    assert torch.equal(found, model.sample(image=cut, mask=half, **options))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
@pytest.mark.parametrize("size", [8, 16])
def test_transparency_is_dropped_at_every_size(mode, size):
    """As from images to train on: the colour below counts, whether the picture is scaled or not."""
    picture = Image.new("RGBA", (size, size), (255, 255, 255, 0)).convert("LA" if mode == "LA" else "RGBA")
    if mode in ("PA", "P"):
        picture = Image.new(mode, (size, size))
        picture.putpalette([255, 255, 255])
        picture.info["transparency"] = 0
    for channels in (1, 3):
        config = make_model(channels=channels).unet.config
        assert (given_images("image", picture, config, (-1, 1)) == 1).all()
        assert (given_mask(picture, config) == 1).all()


def test_arrays_that_cannot_be_written(recwarn):
    model = make_model(channels=1, T=T)
    image, mask = np.zeros((1, 1, 8, 8), np.float32), np.ones((8, 8), np.float32)
    image.flags.writeable = mask.flags.writeable = False
    model.sample(image=image, mask=mask, sampler="ddim", steps=2)
    given_images("image", [np.broadcast_to(np.uint8(3), (1, 8, 8))], model.unet.config, (-1, 1))
    assert not recwarn.list


@pytest.mark.parametrize("name", ["noise", "callback", "step"])
def test_the_caller_is_named_where_its_values_are_not_finite(model, name):
    nan = torch.full((1, 2, 8, 8), math.nan)
    arguments = {
        "noise": {"noise": nan},
        "step": {"noise": lambda k: nan.nan_to_num(0) if k < 2 else nan, "eta": 1.0},
        "callback": {"callback": lambda i, x, x0: nan},
    }
    cause = {"noise": "noise", "step": r"noise\(2\)", "callback": "x that the callback returns"}[name]
    with pytest.raises(ValueError, match=f"{cause} has NaN or infinite values"):
        model.sample(sampler="ddim", steps=4, **arguments[name])


def test_a_callback_is_not_blamed_for_the_network(model):
    with torch.no_grad():
        next(model.unet.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="the UNet gave NaN"):
        model.sample(sampler="ddim", steps=2, callback=lambda i, x, x0: x)


def test_strength_is_no_option_of_a_model(image):
    for options in (
        {"sampler": {"name": "ddim", "strength": 0.5}},
        {"sampler_options": {"dpm++": {"strength": 0.5}}},
    ):
        with pytest.raises(ValueError, match="strength is no option of a model; give it to sample"):
            make_model(**options)


def test_one_image_for_many_labels_and_many_for_one(conditional):
    image = torch.rand(2, 2, 8, 8) * 2 - 1
    options = {"sampler": "ddim", "steps": 4, "strength": 0.5}
    one = conditional.sample([3, 1, 4], image=image[0], **options)
    assert torch.equal(one[1:2], conditional.sample(1, image=image[:1], sample_ids=[1], **options))
    assert conditional.sample(3, image=image, **options).shape == image.shape


def test_initial_noise_as_a_tensor(conditional):
    z = torch.randn(3, 2, 8, 8)
    for options in ({"sampler": "ddim"}, {"sampler": "dpm++"}):
        options |= {"steps": 4, "labels": [3, 1, 4]}
        assert torch.equal(
            conditional.sample(noise=z, batch_size=2, **options),
            conditional.sample(noise=lambda k: z, **options),
        )
    own = kernels.philox_normal(z.shape, seed=3, sample_ids=[0, 1, 2])
    options = {"labels": [3, 1, 4], "sampler": "ddim", "eta": 1.0, "steps": 4, "seed": 3}
    assert torch.equal(conditional.sample(noise=own, **options), conditional.sample(**options))
    assert conditional.sample(noise=torch.randn(2, 2, 16, 8), steps=1).shape == (2, 2, 16, 8)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_which_samplers_repeat_their_steps(sampler):
    assert can_resample(make_model().steps(sampler, 5)) == (sampler not in EVALUATE_TWICE)


BAD = [
    ({"strength": 0.5}, "strength needs an image"),
    ({"mask": torch.ones(8, 8)}, "mask needs an image"),
    ({"strength": 0.0, "image": 0}, "strength must be a number in .0, 1., not 0.0"),
    ({"strength": 1.5, "image": 0}, "strength must be a number in .0, 1., not 1.5"),
    (
        {"strength": 0.1, "image": 0, "steps": 4},
        "strength 0.1 of 4 steps leaves none; give at least 0.25",
    ),
    ({"image": torch.full((2, 2, 8, 8), 255.0)}, "reaches from 255 to 255; images of 0..255 are uint8"),
    (
        {"image": torch.zeros(1, 3, 8, 8)},
        r"image must be \[N, 2, H, W\] or PIL images, not \[1, 3, 8, 8\]",
    ),
    ({"image": torch.zeros(1, 2, 8, 8, dtype=torch.int64)}, "uint8 in 0..255, not torch.int64"),
    ({"image": torch.zeros(1, 2, 9, 8)}, r"image is \[1, 2, 9, 8\]: "),
    ({"image": "cat.png"}, "image must be a tensor or array .* not str"),
    ({"image": []}, "image must be a tensor or array .*, at least one, not"),
    ({"image": [torch.zeros(2, 8, 8), torch.zeros(2, 4, 4)]}, "image must have one size"),
    ({"image": torch.zeros(1, 2, 8, 8).to_sparse()}, "image must be a tensor or array .* with values, not"),
    ({"image": [torch.zeros(2, 8, 8).to_sparse()]}, "image must be a tensor or array .* with values, not"),
    ({"image": torch.zeros(1, 2, 8, 8, device="meta")}, "image must be a tensor or array .* with values"),
    ({"image": 0, "mask": torch.ones(8, 8).to_sparse()}, "mask must be a tensor or array .*sparse"),
    ({"image": 0, "mask": torch.ones(8, 8, device="meta")}, "mask must be a tensor or array .* on meta"),
    ({"image": 0, "mask": torch.ones(8, 8, dtype=torch.complex64)}, "mask must be a tensor or array"),
    ({"image": 0, "mask": [torch.ones(8, 8)]}, "mask must be a tensor or array"),
    ({"image": 0, "mask": np.full((8, 8), None)}, "mask must be a tensor or array"),
    ({"resamples": 2}, "resamples needs a mask"),
    ({"image": 0, "resamples": 2}, "resamples needs a mask"),
    ({"image": 0, "jump_length": 1}, "jump_length needs a mask"),
    ({"image": Image.new("L", (8, 8))}, "PIL images have 1 or 3 channels"),
    ({"image": torch.zeros(2, 2, 8, 8), "num_samples": 3}, "there are 2 images for 3 samples"),
    (
        {"image": 0, "mask": torch.ones(4, 4)},
        "mask must be of the image's size, and they are 4 x 4 and 8 x 8",
    ),
    (
        {"image": 0, "mask": torch.full((8, 8), 2.0)},
        "mask must be 0 where the image is known and 1 where",
    ),
    ({"image": 0, "mask": torch.zeros(1, 3, 8, 8)}, r"mask must be \[H, W\] or \[N, 1, H, W\], not"),
    ({"image": 0, "mask": [1]}, "mask must be a tensor or array"),
    ({"image": 0, "mask": 1, "resamples": 0}, "resamples must be a whole number in 1"),
    ({"image": 0, "mask": 1, "jump_length": 0}, "jump_length must be a whole number in 1"),
    (
        {"image": 0, "mask": 1, "jump_length": 4, "steps": 4},
        "jump_length must be less than the 4 steps, not 4",
    ),
    (
        {"image": 0, "mask": 1, "sampler": "heun", "steps": 4, "resamples": 2},
        "twice in a step cannot be resampled",
    ),
    ({"noise": [1]}, "noise must be a function, a tensor"),
    (
        {"noise": torch.zeros(2, 3, 8, 8), "num_samples": 2},
        r"noise must be a dense tensor \[2, 2, 8, 8\]",
    ),
    (
        {"noise": torch.zeros(2, 2, 8, 8), "num_samples": 3},
        r"noise must be a dense tensor \[3, 2, 8, 8\]",
    ),
    ({"noise": torch.zeros(1, 2, 16, 8), "image": 0}, r"noise must be a dense tensor \[1, 2, 8, 8\]"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_what_does_not_fit(model, arguments, message):
    arguments = dict(arguments)
    if arguments.get("image") is not None and isinstance(arguments["image"], int):
        arguments["image"] = torch.zeros(1, 2, 8, 8)
    if isinstance(arguments.get("mask"), int):
        arguments["mask"] = torch.ones(8, 8)
    with pytest.raises(ValueError, match=message) as error:
        model.sample(**({"sampler": "ddim", "steps": 10} | arguments))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("altered", [False, True])
def test_a_callback_changes_x(conditional, guidance_scale, altered):
    """A chain cut in two: the second half starts from what the callback returned."""
    if altered:
        conditional.unet.register_forward_hook(lambda *arguments: None)
    options = {"sampler": "ddim", "steps": 4, "guidance_scale": guidance_scale, "labels": [3, 1]}
    new, seen = torch.randn(2, 2, 8, 8), []
    found = conditional.sample(**options, callback=lambda i, x, x0: new if i == 1 else seen.append(x))
    table = conditional.steps("ddim", 4, guidance_scale=guidance_scale)
    x = new
    for i in (2, 3):
        t = table.timesteps[i].expand(2)
        with torch.no_grad():
            cond, uncond = (
                conditional.unet(x, t, label) for label in (torch.tensor([3, 1]), torch.tensor([10, 10]))
            )
        x, _ = kernels.reverse_step(x, cond, table.row(i), model_output_uncond=uncond, backend="reference")
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    assert len(seen) == 3
    with pytest.raises(ValueError, match="x that the callback returns must be a dense tensor"):
        conditional.sample(**options, callback=lambda i, x, x0: x[:1])
