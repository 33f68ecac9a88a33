"""Pipelines and UNets of diffusers in memory: the model is that of the same pipeline in a folder."""

import diffusers
import pytest
import torch

import diffusion
from diffusion import DDPM, NoiseSchedule
from helpers.models import make_model
from helpers.unet2d import SMALL, original


@pytest.fixture(scope="module")
def unet():
    return original(SMALL)


def assert_same(model: DDPM, expected: DDPM) -> None:
    assert model.conventions() == expected.conventions()
    assert torch.equal(model.schedule.betas, expected.schedule.betas)
    weights = expected.unet.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.unet.state_dict().items())
    assert model.unet.config == expected.unet.config


PIPELINES = {
    "ddpm": (diffusers.DDPMPipeline, diffusers.DDPMScheduler(clip_sample=False)),
    "ddim": (diffusers.DDIMPipeline, diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline(name, unet, tmp_path):
    kind, scheduler = PIPELINES[name]
    pipeline = kind(unet, scheduler)
    pipeline.save_pretrained(tmp_path)
    assert_same(diffusion.load(pipeline), diffusion.load(tmp_path))


def test_the_images_of_a_pipeline(unet):
    """DDIM with 4 steps from the same noise."""
    pipeline = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = diffusion.load(pipeline).sample(noise=lambda k: x, steps=4)
    pipeline.scheduler.set_timesteps(4)
    expected = x
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            output = unet(expected, t).sample
            expected = pipeline.scheduler.step(output, t, expected).prev_sample
    assert (found - expected).abs().max() < 1e-4


def test_a_unet_with_a_scheduler(unet, tmp_path):
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction")
    model = diffusion.load(unet, scheduler=scheduler)
    unet.save_pretrained(tmp_path)
    assert_same(model, diffusion.load(tmp_path, scheduler=scheduler))
    config = dict(scheduler.config) | {"_class_name": "DPMSolverMultistepScheduler"}
    assert_same(model, diffusion.load(unet, scheduler=config))
    assert_same(model, diffusion.load(unet, flags={"schedule": config}))
    assert (model.prediction_type, model.sampler["name"]) == ("v_prediction", "dpm++")


@pytest.mark.parametrize("kind", [diffusers.DDPMPipeline, diffusers.DDIMPipeline])
def test_a_scheduler_that_is_given_replaces_the_pipelines(kind, unet, tmp_path):
    """A DDIMPipeline replaces every scheduler by DDIM, but not one that is named in the call."""
    pipeline, scheduler = kind(unet, diffusers.DDIMScheduler()), diffusers.DPMSolverMultistepScheduler()
    pipeline.save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path / "other")
    expected = diffusion.load(unet, scheduler=scheduler)
    assert expected.sampler == {"name": "dpm++", "spacing": "linspace", "steps": 50}
    file = str(tmp_path / "other" / "scheduler_config.json")
    for place in (pipeline, tmp_path):
        assert_same(diffusion.load(place, scheduler=scheduler), expected)
        assert_same(diffusion.load(place, flags={"schedule": file}), expected)
    for place in (pipeline, tmp_path):  # a name of betas leaves the sampler to the pipeline
        with pytest.warns(UserWarning, match="assumed: num_train_timesteps=1000"):
            model = diffusion.load(place, scheduler="linear")
        assert model.sampler["name"] == ("ddim" if kind is diffusers.DDIMPipeline else "ddpm")


def test_the_weights_are_a_copy_in_float32():
    half = original(SMALL).to(torch.bfloat16)
    model = diffusion.load(half, scheduler=diffusers.DDPMScheduler())
    before = model.unet.input_conv.weight.clone()
    assert before.dtype == torch.float32
    with torch.no_grad():
        half.conv_in.weight.zero_()
    assert torch.equal(model.unet.input_conv.weight, before)
    assert not model.training


def test_a_compiled_unet(unet):
    compiled, scheduler = torch.compile(unet), diffusers.DDIMScheduler()
    expected = diffusion.load(unet, scheduler=scheduler)
    assert_same(diffusion.load(compiled, scheduler=scheduler), expected)
    pipeline = diffusers.DDIMPipeline(unet, scheduler)
    pipeline.unet = compiled
    assert_same(diffusion.load(pipeline), expected)


def test_the_assumed_number_of_classes_is_told(tmp_path):
    unet = original(SMALL | {"class_embed_type": "timestep"})
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path)
    for place in (pipeline, tmp_path):
        with pytest.warns(UserWarning, match="assumed: num_classes=1000$"):
            assert diffusion.load(place).num_classes == 1000
        assert diffusion.load(place, flags={"num_classes": 7}).num_classes == 7


def test_a_class_conditional_unet_with_a_null_label():
    unet = original(SMALL | {"num_class_embeds": 4})
    model = diffusion.load(unet, scheduler=diffusers.DDPMScheduler(), flags={"null_label": 3})
    assert (model.num_classes, model.null_label) == (3, 3)
    x, t = torch.zeros(1, 3, 16, 16), torch.tensor([7])
    with torch.no_grad():
        expected = unet(x, t, class_labels=torch.tensor([3])).sample
        assert (model.unet(x, t) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_scheduler_without_a_counterpart(unet):
    with pytest.warns(UserWarning, match="UNet2DModel: EulerDiscreteScheduler is no sampler"):
        diffusion.load(unet, scheduler=diffusers.EulerDiscreteScheduler())


WRONG = {
    "no scheduler": (lambda unet: diffusion.load(unet), ValueError, "UNet2DModel holds no noise schedule"),
    "a class": (
        lambda unet: diffusion.load(unet, scheduler=diffusers.DDPMScheduler),
        TypeError,
        "scheduler must be a scheduler of diffusers or its configuration, not <class",
    ),
    "a schedule": (
        lambda unet: diffusion.load(unet, scheduler=NoiseSchedule.linear()),
        TypeError,
        "scheduler must be a scheduler of diffusers or its configuration, not NoiseSchedule.linear",
    ),
    "a configuration without its class": (
        lambda unet: diffusion.load(unet, scheduler=diffusers.DDIMScheduler().config),
        ValueError,
        "needs its _class_name, .*; give the scheduler itself",
    ),
    "such a flag": (
        lambda unet: diffusion.load(unet, flags={"schedule": {"beta_schedule": "linear"}}),
        ValueError,
        "needs its _class_name",
    ),
    "another process": (
        lambda unet: diffusion.load(unet, scheduler=diffusers.FlowMatchEulerDiscreteScheduler()),
        ValueError,
        "its process is not that of DDPM",
    ),
    "a model": (lambda unet: diffusion.load(make_model()), TypeError, "hf:owner/name, or from a pipeline"),
    "a network": (lambda unet: diffusion.load(make_model().unet), TypeError, "of diffusers, not from a UNet"),
    "a number": (lambda unet: diffusion.load(5), TypeError, "not from 5"),
    "a file's flag": (
        lambda unet: diffusion.load(unet, scheduler={}, flags={"variant": "fp16"}),
        ValueError,
        "unknown flag 'variant'",
    ),
    "a bundled model": (
        lambda unet: diffusion.load("mnist", scheduler=diffusers.DDPMScheduler()),
        ValueError,
        "mnist takes no flag schedule",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_loaded(case, unet):
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=message) as caught:
        call(unet)
    assert "\n" not in str(caught.value)


def test_a_pipeline_of_latents(unet):
    vqvae = diffusers.VQModel(block_out_channels=[8], norm_num_groups=4)
    pipeline = diffusers.LDMPipeline(vqvae=vqvae, unet=unet, scheduler=diffusers.DDIMScheduler())
    message = r"LDMPipeline: a pipeline with the component vqvae \(diffusers.VQModel\)"
    with pytest.raises(ValueError, match=message):
        diffusion.load(pipeline)


def test_a_folder_of_images(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").touch()
    for folder in (tmp_path, tmp_path / "cat"):
        with pytest.raises(
            ValueError, match=f"images, not of a model; diffusion train --data {folder} --out"
        ):
            diffusion.load(folder)
