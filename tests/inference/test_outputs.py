"""What `sample` returns: tensors, arrays, or images of PIL."""

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
