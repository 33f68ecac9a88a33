"""Usual mistakes: each gets one line that says what would be right."""

import inspect
import re

import numpy as np
import pytest
import torch

import diffusion
from diffusion import DDPM, kernels
from diffusion.importers.diffusers_words import KEYWORDS, NOTEBOOKS
from diffusion.samplers import SAMPLERS, options_of
from diffusion.utils.device import BACKENDS
from helpers.models import make_model

DIGITS = torch.nn.functional.one_hot(torch.tensor([3, 1]), 10)
X, T = torch.zeros(2, 2, 8, 8), torch.tensor([3, 3])


def error(kind: type[Exception], call, *args, **options) -> str:
    with pytest.raises(kind) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 250
    return text


@pytest.fixture(scope="module")
def model():
    return make_model(10)


@pytest.mark.parametrize("word", KEYWORDS)
def test_a_keyword_of_diffusers_names_an_argument_of_this_package(model, word):
    text = error(TypeError, model.sample, **{word: 5})
    assert f"no argument {word!r}, which is diffusers'" in text
    known = {*inspect.signature(DDPM.sample).parameters, *(o for s in SAMPLERS for o in options_of(s))}
    assert word not in known
    assert set(re.findall(r"(\w+)=", text)) <= known


@pytest.mark.parametrize("word", NOTEBOOKS)
def test_a_keyword_of_the_notebooks_names_an_argument_of_this_package(model, word):
    text = error(TypeError, model.sample, 3, **{word: 0.2})
    assert text == f"sample() has no argument {word!r}, which is the notebooks'; {NOTEBOOKS[word]}"
    assert set(re.findall(r"(\w+)=", text)) <= set(inspect.signature(DDPM.sample).parameters)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("num", "do you mean num_samples=?"),
        ("label", "do you mean labels=?"),
        ("step", "do you mean steps=?"),
        ("cfg_rescale", "do you mean guidance_rescale=?"),
        ("sigma", "do you mean sigmas=?"),
        ("zzz", "see help(model.sample)"),
    ],
)
def test_an_unknown_argument_names_the_one_that_is_written_alike(model, word, hint):
    assert error(TypeError, model.sample, 3, **{word: 4}) == f"sample() has no argument {word!r}; {hint}"


def test_a_trainer_takes_no_name_of_a_recipe():
    assert error(
        ValueError, diffusion.Trainer, "mnist", torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None
    ) == ("recipe must be a diffusion.Recipe (diffusion.train also takes a recipe's name), not 'mnist'")


def test_an_image_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    diffusion.save_grid(torch.zeros(1, 1, 8, 8), "a.png")
    text = error(ValueError, diffusion.load, "a.png")
    assert text == (
        "a.png is an image, not a model; diffusion sample --image changes it, and in Python "
        "model.sample(image=Image.open('a.png'))"
    )


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("latents", "write noise=, a tensor [N, C, H, W]"),
        ("mask_image", "write mask=, 1 where the image is painted anew"),
        ("original_image", "write image="),
        ("jump_n_sample", "write resamples=, with mask="),
        ("use_exponential_sigmas", 'write sigmas="exponential", with sampler="dpm++"'),
    ],
)
def test_the_advice_for_a_keyword(model, word, advice):
    assert error(TypeError, model.sample, **{word: 5}).endswith(f"which is diffusers'; {advice}")


def test_keywords_of_diffusers_for_an_inversion(model):
    text = error(TypeError, model.invert, X, **{"num_inference_steps": 5})
    assert text == "invert() has no argument 'num_inference_steps', which is diffusers'; write steps=, " + (
        "the number of steps"
    )
    for word in ("latents", "guess"):  # an inversion has no noise=
        text = error(ValueError, model.invert, X, **{word: 5})
        names = text.partition("choose from: ")[2].split(", ")
        assert names == sorted(names)
        assert "spacing" in names


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        (
            "torch_dtype",
            "load() has no argument 'torch_dtype', which is diffusers'; a model is loaded in float32; "
            "give dtype= to sample",
        ),
        (
            "variant",
            'load() has no argument \'variant\', which is diffusers\'; write flags={"variant": "fp16"}',
        ),
        ("guess", "load() got an unexpected keyword argument 'guess'"),
    ],
)
def test_keywords_for_loading(word, advice):
    assert error(TypeError, diffusion.load, "mnist", **{word: "fp16"}) == advice


def test_the_keywords_are_those_of_diffusers():
    """The arguments of its pipelines of pixels and classes, but for those that are ours, too."""
    pipelines = pytest.importorskip("diffusers")
    ours = {"self", "batch_size", "guidance_scale", "eta", "use_clipped_model_output"}
    for name in ("DDPMPipeline", "DDIMPipeline", "DiTPipeline"):
        words = set(inspect.signature(getattr(pipelines, name).__call__).parameters)
        assert words - ours <= set(KEYWORDS)


def test_an_option_of_another_sampler(model):
    text = error(ValueError, model.sample, sampler="dpm++", eta=0.5)
    assert text == "unknown option of dpm++ 'eta'; samplers with it: ddim"


def test_a_scheduler_in_place_of_a_sampler(model):
    assert "such as 'ddim', not DDIMScheduler" in error(ValueError, model.sample, sampler="DDIMScheduler")
    scheduler = type("DPMSolverMultistepScheduler", (), {})
    for given in (scheduler, scheduler()):
        assert "such as 'dpm++', not DPM" in error(ValueError, model.sample, sampler=given)
    unipc = error(ValueError, model.sample, sampler="UniPCMultistepScheduler")
    assert "such as 'unipc', not UniPCMultistepScheduler" in unipc
    nearest = error(ValueError, model.sample, sampler="EulerDiscreteScheduler")
    assert "'ddim', the nearest to it, not Euler" in nearest


@pytest.mark.parametrize(("args", "options"), [((X, T), {}), ((), {"num_inference_steps": 3})])
def test_a_model_that_is_called(model, args, options):
    assert "model.sample(num_samples=4" in error(TypeError, model, *args, **options)


@pytest.mark.parametrize("timesteps", [3, [3, 3], torch.tensor(3), np.array([3, 3]), None])
def test_timesteps_that_are_not_one_for_each_image(model, timesteps):
    assert "such as torch.full((len(x),), 3), not " in error(ValueError, model.unet, X, timesteps)


def test_images_of_numpy_for_a_network(model):
    text = error(ValueError, model.unet, X.numpy(), T)
    assert text == "x must be a tensor [B, 2, H, W], not an array float32 [2, 2, 8, 8]"


def test_an_array_as_noise(model):
    assert "noise must be a tensor, not" in (text := error(ValueError, model.sample, noise=X.numpy()))
    assert text.endswith("take torch.from_numpy(noise).float()")
    options = {"steps": 2, "sampler": "ddim"}
    found = model.sample(noise=torch.from_numpy(X.numpy()).float(), **options)
    assert torch.equal(found, model.sample(noise=lambda k: X, **options))


@pytest.mark.parametrize("labels", [None, 3, np.int64(3), torch.tensor(3)])
def test_a_batch_size_in_place_of_a_number_of_images(model, labels):
    assert "give num_samples=4" in error(ValueError, model.sample, labels, batch_size=4)


@pytest.mark.parametrize("labels", [DIGITS, DIGITS.numpy(), DIGITS.float()], ids=["int", "array", "float"])
def test_one_hot_labels(model, labels):
    text = error(ValueError, model.sample, labels)
    assert text.endswith(" [2, 10]; of one-hot rows, take labels.argmax(1)")
    assert torch.equal(model.sample(DIGITS.argmax(1), steps=2), model.sample([3, 1], steps=2))


@pytest.mark.parametrize("device", ["gpu", "GPU:0", "nvidia"])
def test_a_gpu_by_another_name(model, device):
    text = error(ValueError, model.sample, device=device)
    assert f"there is no device {device!r}; this machine has: cpu" in text
    assert "'cuda'" in text
    assert text == error(ValueError, diffusion.load, "mnist", device)


def test_a_device_as_backend(model):
    text = error(ValueError, model.sample, backend="gpu")
    assert "choose from: auto, reference, cpp, cuda, triton" in text
    assert 'device="cuda"' in text


def test_the_names_of_backends():
    assert {name for op in kernels.OPS.values() for name in op.op.backends} == set(BACKENDS) - {"auto"}


def test_one_batch_in_place_of_the_frames_of_a_gif(tmp_path):
    text = error(ValueError, diffusion.save_gif, X[:, :1], tmp_path / "a.gif")
    assert "not a tensor float32 [2, 1, 8, 8]" in text
    diffusion.save_gif([X[:, :1]], tmp_path / "a.gif")
    diffusion.save_gif(X[:, :1][:, None], tmp_path / "b.gif")
    assert not (tmp_path / "c.gif").exists()


def test_a_device_as_backend_of_an_explanation(model):
    assert "unknown backend 'gpu'" in error(ValueError, model.explain, backend="gpu")
