"""The results of `sample`: tensors, arrays, or images of PIL."""

import numpy as np
import pytest
import torch

from diffusion import save_grid
from helpers.models import make_model


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value_range", [(-1, 1), (0, 1)])
def test_arrays_and_pictures_are_the_rounded_tensor(channels, value_range, tmp_path):
    model = make_model(channels=channels, value_range=value_range)
    options = {"num_samples": 3, "steps": 2, "sampler": "ddim"}
    x = model.sample(**options)
    low, high = value_range
    expected = (255 * (x.double() - low) / (high - low)).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    array = model.sample(**options, output="numpy")
    assert array.dtype == np.uint8
    assert abs(array - expected).max() < 0.501
    pictures = model.sample(**options, output="pil")
    assert [picture.mode for picture in pictures] == 3 * ["L" if channels == 1 else "RGB"]
    np.testing.assert_array_equal(np.stack([np.asarray(p).reshape(8, 8, channels) for p in pictures]), array)
    assert torch.equal(model.sample(**options, output="tensor"), x)
    for name, images in (("a.png", array), ("b.png", pictures)):
        save_grid(images, tmp_path / name)
    save_grid(x, tmp_path / "c.png", value_range=value_range)
    assert len({(tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png")}) == 1


def test_outputs_that_are_none(model):  # of two channels
    with pytest.raises(ValueError, match="unknown output 'jpeg'; choose from: tensor, pil, numpy"):
        model.sample(steps=1, output="jpeg")
    with pytest.raises(ValueError, match="'pil' needs images of 1 or 3 channels, not 2; take 'numpy'"):
        model.sample(steps=1, output="pil")
    assert model.sample(steps=1, output="numpy").shape == (1, 8, 8, 2)


@pytest.mark.parametrize("value_range", [(-1, 1), (0, 1)])
def test_the_predicted_images_of_every_step(value_range):
    model, seen = make_model(value_range=value_range), []
    options = {"num_samples": 3, "steps": 4, "sampler": "ddim", "batch_size": 2}
    x, x0s = model.sample(**options, return_x0=True, callback=lambda i, x, x0: seen.append((i, x0)))
    assert torch.equal(x, model.sample(**options))
    assert x0s.shape == (4, 3, 2, 8, 8)
    low, high = value_range
    for i, step in enumerate(x0s):
        expected = torch.cat([x0 for k, x0 in seen if k == i])
        torch.testing.assert_close(step, (expected + 1) / 2 * (high - low) + low)
    torch.testing.assert_close(x0s[-1], x)
    assert len(model.sample(steps=4, sampler="heun", return_x0=True)[1]) == len(model.steps("heun", 4)) == 7
    with pytest.raises(ValueError, match="return_x0 needs output='tensor'"):
        model.sample(steps=1, output="numpy", return_x0=True)
