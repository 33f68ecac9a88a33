"""Exported folders: diffusers loads them, and its own loop gives the model's own images."""

import json
import sys

import diffusers
import pytest
import torch
from safetensors import safe_open

import diffusion
from diffusion import DDPM, NoiseSchedule
from diffusion.exporters.diffusers import FILES, to_diffusers
from diffusion.models.conv_stack import ConvStackConfig
from diffusion.models.registry import build
from helpers.models import make_model
from helpers.thinning import exhaustive_but
from helpers.unets import VARIANTS, randomized

TOLERANCE = 1e-4
T = 40
SCHEDULES = {
    "linear": NoiseSchedule.linear(T, beta_end=0.4),
    "scaled_linear": NoiseSchedule.scaled_linear(T, beta_end=0.3),
    "sigmoid": NoiseSchedule.sigmoid(T, beta_end=0.4),
    "cosine": NoiseSchedule.cosine(T),
    "cosine of another offset": NoiseSchedule.cosine(T, s=0.02),
    "zero SNR": NoiseSchedule.linear(T, beta_end=0.4).rescale_zero_terminal_snr(),
    "betas": NoiseSchedule.from_betas([0.01 + 0.005 * i for i in range(T)]),
}
SAMPLERS = {
    "none": None,
    "ddpm": {"name": "ddpm", "steps": 8},
    "ddpm of all steps": {"name": "ddpm", "spacing": "trailing"},
    "ddpm trailing": {"name": "ddpm", "steps": 8, "spacing": "trailing"},
    "ddpm linspace": {"name": "ddpm", "steps": 14, "spacing": "linspace", "variance": "fixed_small"},
    "ddpm fixed_large": {"name": "ddpm", "steps": 10, "variance": "fixed_large", "clip": None},
    "ddpm offset": {"name": "ddpm", "steps": 10, "steps_offset": 1, "noise_in_last_step": True},
    "ddim": {"name": "ddim", "steps": 10},
    "ddim eta": {"name": "ddim", "steps": 10, "eta": 0.7, "clip": 0.8},
    "ddim clipped": {"name": "ddim", "steps": 10, "spacing": "trailing", "use_clipped_model_output": True},
    "ddim fixed stride": {"name": "ddim", "steps": 9, "spacing": "linspace", "fixed_stride": True},
    "ddim other end": {"name": "ddim", "steps": 10, "steps_offset": 1, "set_alpha_to_one": False},
    "dpm++": {"name": "dpm++", "steps": 10},
    "dpm++ trailing": {"name": "dpm++", "steps": 8, "spacing": "trailing", "clip": None},
    "dpm++ of all steps": {"name": "dpm++"},
    "dpm++ sde": {"name": "dpm++", "steps": 10, "sde": True, "clip": None},
    "dpm++ heun": {"name": "dpm++", "steps": 10, "solver_type": "heun", "spacing": "linspace", "clip": None},
    "dpm++ third order": {"name": "dpm++", "steps": 16, "solver_order": 3, "clip": None},
    "dpm++ karras": {"name": "dpm++", "steps": 10, "sigmas": "karras", "clip": None},
    "dpm++ lu": {
        "name": "dpm++",
        "steps": 10,
        "sigmas": "lu",
        "final_sigmas_type": "sigma_min",
        "clip": None,
    },
    "thresholds": {"name": "ddim", "steps": 10, "dynamic_threshold": 0.9, "dynamic_threshold_max": 1.5},
}


@pytest.fixture(autouse=True)
def quiet():
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


def noise_of(model: DDPM, steps: int) -> torch.Tensor:
    config, generator = model.unet.config, torch.Generator().manual_seed(3)
    return torch.randn(steps + 1, 2, config.in_channels, *config.image_shape, generator=generator)


def images_of_diffusers(folder, noise: torch.Tensor, call: dict, monkeypatch) -> torch.Tensor:
    """The images in [0, 1] of the folder's pipeline, called with these arguments, for given noise."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    draws = iter(noise)
    for module in (
        "schedulers.scheduling_ddpm",
        "schedulers.scheduling_ddim",
        "pipelines.ddpm.pipeline_ddpm",
    ):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *_, **__: next(draws))
    for module in ("schedulers.scheduling_dpmsolver_multistep", "pipelines.ddim.pipeline_ddim"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *_, **__: next(draws))
    return pipeline(batch_size=noise.shape[1], output_type="pt", **call).images


def assert_same_images(model: DDPM, folder, monkeypatch) -> dict:
    """The model's own images are those of the exported pipeline; the result is the pipeline's call."""
    call = to_diffusers(model, folder)
    noise = noise_of(model, call["num_inference_steps"])
    expected = images_of_diffusers(folder, noise, call, monkeypatch)
    images = model.sample(num_samples=2, noise=lambda k: noise[k])
    low, high = model.value_range
    found = ((images - low) / (high - low)).clamp(0, 1)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= TOLERANCE
    return call


# Those of `test_predictions`, and those whose options others have.
OTHERS = ("ddpm", "ddim", "dpm++", "ddpm of all steps", "dpm++ trailing")


@pytest.mark.parametrize("name", exhaustive_but(SAMPLERS, default=SAMPLERS.keys() - OTHERS))
def test_the_pipeline_gives_the_images_of_the_own_sampler(name, tmp_path, monkeypatch):
    model = make_model(channels=3, T=T, sampler=SAMPLERS[name], prediction_type="v_prediction")
    call = assert_same_images(model, tmp_path, monkeypatch)
    assert call["num_inference_steps"] == (SAMPLERS[name] or {}).get("steps", T)


@pytest.mark.thinned
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_predictions(prediction_type, sampler, tmp_path, monkeypatch):
    model = make_model(channels=3, T=T, sampler=SAMPLERS[sampler], prediction_type=prediction_type)
    assert_same_images(model, tmp_path, monkeypatch)


@pytest.mark.thinned
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim trailing clipped", "dpm++"])
def test_schedules(name, sampler, tmp_path, monkeypatch):
    sampler = SAMPLERS.get(sampler) or SAMPLERS["ddim clipped"]
    unet = make_model(channels=3).unet
    model = DDPM(unet, SCHEDULES[name], prediction_type="v_prediction", sampler=sampler).eval()
    assert_same_images(model, tmp_path, monkeypatch)


def test_images_of_another_range(tmp_path, monkeypatch):
    assert_same_images(make_model(channels=3, T=T, value_range=(0.0, 1.0)), tmp_path, monkeypatch)
    model = make_model(channels=3, T=T, value_range=(0.0, 255.0), clip=None, clip_output=True)
    assert_same_images(model, tmp_path, monkeypatch)


def test_a_learned_variance(tmp_path, monkeypatch):
    model = make_model(channels=3, T=T, learned_variance=True, sampler={"name": "ddpm", "steps": 8})
    assert_same_images(model, tmp_path, monkeypatch)
    solver = DDPM(model.unet, model.schedule, sampler=SAMPLERS["dpm++"]).eval()
    assert_same_images(solver, tmp_path / "solver", monkeypatch)


def test_labels_and_guidance(tmp_path):
    """The null label there is the number of classes: a guided loop with it gives the same images."""
    model = make_model(5, channels=3, T=T, sampler=SAMPLERS["ddim clipped"], guidance_scale=2.5)
    call = to_diffusers(model, tmp_path)
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    assert unet.config.num_class_embeds == 6
    noise, labels = noise_of(model, call["num_inference_steps"]), torch.tensor([4, 1])
    scheduler.set_timesteps(call.pop("num_inference_steps"))
    x = noise[0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond = unet(x, t, class_labels=labels).sample
            uncond = unet(x, t, class_labels=torch.tensor([5, 5])).sample
            x = scheduler.step(uncond + 2.5 * (cond - uncond), t, x, **call).prev_sample
    images = model.sample(labels, noise=lambda k: noise[k])
    assert (images - x).abs().max() <= TOLERANCE


def test_the_bundled_model(tmp_path):
    """Its upsampling without a convolution is one that copies; clipping is a threshold of at most 1."""
    bundled = diffusion.load("mnist")
    sampler = {"name": "dpm++", "steps": 10, "spacing": "trailing"}
    model = DDPM(bundled.unet, bundled.schedule, **(bundled.conventions() | {"sampler": sampler})).eval()
    assert to_diffusers(model, tmp_path) == {"num_inference_steps": 10}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    noise, labels = noise_of(model, 10), torch.tensor([3, 7])
    x, scheduler = noise[0], pipeline.scheduler
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t, class_labels=labels).sample, t, x).prev_sample
    images = model.sample(labels, guidance_scale=1.0, noise=lambda k: noise[k])
    assert (images - x).abs().max() <= TOLERANCE


ROUND_TRIPS = {
    "plain": {},
    "labels": {"num_classes": 5, "guidance_scale": 3.0, "sampler": SAMPLERS["ddim eta"]},
    "range": {"value_range": (0.0, 1.0), "clip_output": True, "sampler": SAMPLERS["dpm++"]},
    "options": {"sampler_options": {"ddim": {"eta": 1.0}}, "clip": 0.7, "metadata": {"by": "test"}},
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_the_import_of_an_export_is_the_same_model(name, tmp_path):
    model = make_model(channels=3, T=T, **ROUND_TRIPS[name])
    to_diffusers(model, tmp_path)
    again = diffusion.load(tmp_path)
    assert again.conventions() == model.conventions()
    assert again.unet.config.null_label == model.unet.config.null_label
    assert torch.equal(again.schedule.betas, model.schedule.betas)
    labels = None if model.num_classes is None else [0, 4]
    assert torch.equal(again.sample(labels, num_samples=2), model.sample(labels, num_samples=2))


def test_a_scheduler_that_was_changed_counts(tmp_path):
    model = make_model(5, channels=3, T=T, sampler=SAMPLERS["ddim"])
    to_diffusers(model, tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample_range": 0.5}))
    again = diffusion.load(tmp_path)
    assert again.clip == 0.5
    assert again.unet.config.null_label == 5  # the UNet's file is as it was


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_keep_their_dtype(dtype, tmp_path):
    model = make_model(T=T).to(dtype)
    to_diffusers(model, tmp_path)
    with safe_open(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118


def hooked() -> DDPM:
    model = make_model(T=T)
    model.unet.mid.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


REFUSED = {
    "unipc": (
        lambda: make_model(T=T, sampler={"name": "unipc", "steps": 8}),
        "the sampler unipc cannot be exported: .*; export another one by sampler and steps: ddpm, ddim, dpm",
    ),
    "another network": (
        lambda: DDPM(build(ConvStackConfig(sample_size=6)), SCHEDULES["linear"]),
        "a network of class ConvStack cannot be exported to diffusers",
    ),
    "altered": (hooked, "the network cannot be exported to diffusers: "),
    "patches": (
        lambda: DDPM(randomized(VARIANTS["patches"]), SCHEDULES["linear"]),
        "patch_size=2 cannot be exported",
    ),
    "range": (
        lambda: make_model(T=T, value_range=(0.0, 1.0), normalize=False),
        r"value_range=\[0.0, 1.0\] with normalize=False cannot be exported",
    ),
    "spacing": (
        lambda: make_model(T=T, sampler={"name": "ddim", "steps": 5, "spacing": "quad"}),
        "spacing 'quad' cannot be exported: diffusers has leading, linspace, trailing",
    ),
    "stride": (
        lambda: make_model(T=T, sampler={"name": "ddim", "steps": 9, "spacing": "trailing"}),
        "the sampler ddim with its options and 9 steps cannot be exported: diffusers' DDIMScheduler takes",
    ),
    "last noise": (
        lambda: make_model(
            T=T, sampler={"name": "ddpm", "steps": 8, "spacing": "trailing", "variance": "fixed_large"}
        ),
        "diffusers' DDPMScheduler takes other steps",
    ),
    "end of ddpm": (
        lambda: make_model(T=T, sampler={"name": "ddpm", "steps": 8, "set_alpha_to_one": False}),
        "diffusers' DDPMScheduler takes other steps",
    ),
    "clip of a solver": (
        lambda: make_model(T=T, clip=0.5, sampler={"name": "dpm++", "steps": 8}),
        r"clip=0.5 cannot be exported: diffusers' DPM-Solver clips to 1 or not at all",
    ),
    "variance of ddim": (
        lambda: make_model(T=T, learned_variance=True, sampler={"name": "ddim", "steps": 8}),
        "diffusers' DDIMScheduler does not take its output",
    ),
    "guided interval": (
        lambda: make_model(5, T=T, sampler={"name": "ddim", "guidance_interval": (0, 9)}),
        "guidance_interval cannot be exported",
    ),
    "not finite": (
        lambda: make_model(T=T).apply(lambda module: [p.data.fill_(torch.nan) for p in module.parameters()]),
        "NaN or infinite values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_diffusers_cannot_express_is_refused_by_name(name, tmp_path):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        to_diffusers(make(), tmp_path / "folder")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_package_is_not_written_into(tmp_path):
    model = make_model(T=T)
    model.save(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="it holds a model of this package"):
        to_diffusers(model, tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_diffusers_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    to_diffusers(make_model(T=T), tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == sorted(FILES)
