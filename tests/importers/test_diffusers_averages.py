"""Averages of weights beside those of a UNet of diffusers."""

import pytest

from helpers.diffusers_folders import AVERAGE, LINEAR, assert_is, load, save_checkpoint, save_pipeline, scaled
from helpers.unet2d import SMALL, original


def test_the_keys_of_an_average():
    """AVERAGE has the keys that diffusers' own EMAModel writes."""
    from diffusers.training_utils import EMAModel

    ema = EMAModel(original(SMALL).parameters(), use_ema_warmup=True)
    assert ema.state_dict().keys() - {"shadow_params"} == AVERAGE.keys()


def test_a_checkpoint_of_the_training_script(tmp_path):
    model = original(SMALL)
    folder = tmp_path / "checkpoint-500"
    save_checkpoint(folder, model, None)
    with pytest.raises(
        ValueError, match=r"checkpoint-500 has no scheduler_config\.json, .*--schedule.*linear"
    ):
        load(folder)
    found = load(folder, schedule="linear", num_train_timesteps=100, prediction_type="sample")
    assert_is(found, model)
    assert (found.schedule.T, found.prediction_type) == (100, "sample")


def test_averages_are_preferred(tmp_path):
    model = original(SMALL)
    save_checkpoint(tmp_path, model, scaled(model))
    with pytest.warns(UserWarning, match="assumed: weights=unet_ema num_train_timesteps=1000"):
        found = load(tmp_path, schedule="cosine")
    assert_is(found, scaled(model))
    assert_is(load(tmp_path, weights="unet", **LINEAR), model)
    with pytest.raises(ValueError, match="unknown part of weights 'ema'; choose from: unet, unet_ema"):
        load(tmp_path, schedule="cosine", weights="ema")


def test_a_pipeline_says_that_it_has_an_average_too(tmp_path):
    """diffusers itself loads `unet`, which the pipeline's index names."""
    model = original(SMALL)
    save_pipeline(tmp_path, model)
    scaled(model).save_pretrained(tmp_path / "unet_ema")
    with pytest.warns(UserWarning, match="assumed: weights=unet$"):
        assert_is(load(tmp_path), model)
    assert_is(load(tmp_path, weights="unet_ema"), scaled(model))
