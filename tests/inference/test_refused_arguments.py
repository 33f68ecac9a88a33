"""What DDPM.sample and DDPM.loss refuse, and the kinds of numbers that they take."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.models.unet import UNet
from helpers.models import make_model
from helpers.noise import fixed_noise

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


def test_unknown_precision(model):
    with pytest.raises(ValueError, match="unknown precision 'quick'; choose from: exact, tf32, fast"):
        model.sample(precision="quick")


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
