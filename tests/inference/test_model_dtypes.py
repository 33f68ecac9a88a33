"""Models in float64, or in several dtypes: images are those of a plain loop over the modules in float64."""

import pytest
import torch

from diffusion.models.blocks import Norm
from helpers.alterations import OPTIONS, fixed_noise, hook_on_a_level, loop, make, sample
from helpers.models import make_model


def only_in_float64(model):
    """The model with weights that overflow in float32, and the same output."""
    model.double()
    with torch.no_grad():
        model.unet.output_norm.weight.mul_(1e-60)
        model.unet.output_norm.bias.mul_(1e-60)
        model.unet.output_norm.activation = "none"
        model.unet.output_conv.weight.mul_(1e60)


@pytest.mark.thinned
@pytest.mark.parametrize("altered", [False, True], ids=["plain", "altered"])
@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"dtype": "float64"}], ids=str)
def test_float64(options, altered):
    model = make().double()
    if altered:
        hook_on_a_level(model.unet)
    found, dtypes = sample(model, **options), set()
    assert found.dtype == torch.float32
    assert (found - loop(model)).abs().max() <= 1e-5
    model.unet.output_norm.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    sample(model, **options)
    assert dtypes == {torch.float64}


def test_weights_that_only_float64_holds():
    model = make()
    only_in_float64(model)
    expected = loop(model)
    assert expected.isfinite().all()
    assert (sample(model) - expected).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="the UNet gave NaN or infinite values in float32"):
        sample(model, dtype="float32")


def test_float64_is_explained():
    model = make().double()
    reason = "the dtype is torch.float64, not float32, bfloat16 or float16"
    assert model.explain() == f"unet: modules\n  not fused: {reason}"


@pytest.mark.thinned
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("learned_variance", [False, True], ids=["fixed", "learned"])
def test_samplers_in_float64(sampler, learned_variance):
    """Images equal the loop's, as in float32, with every option of a step."""
    model = make_model(10, learned_variance=learned_variance)
    for extra in ({}, {"guidance_rescale": 0.5}, {"dynamic_threshold": 0.9, "dynamic_threshold_max": 2.0}):
        options = {"sampler": sampler, "steps": 6, "guidance_scale": 2.0, "seed": 3, **extra}
        expected = model.copy().sample([1, 2], **options)
        found = model.copy().double().sample([1, 2], **options)
        assert (found - expected).abs().max() <= 5e-4


def test_float64_by_default():
    before = torch.get_default_dtype()
    expected = sample(make())
    torch.set_default_dtype(torch.float64)
    try:
        model = make_model(10)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        noise = {k: fixed_noise(k) for k in range(6)}
        found = model.sample([3, 1], noise=noise.__getitem__, **OPTIONS)
        single = model.copy().float().sample([3, 1], noise=noise.__getitem__, **OPTIONS)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert (found - single).abs().max() <= 5e-4
    assert torch.equal(sample(make()), expected)


@pytest.mark.thinned
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("part", ["time_mlp", "mid", "output_conv", "norms"])
def test_several_dtypes(part, narrow):
    """The widest is computed in, which holds all weights as they are."""
    model = make()
    parts = (
        [m for m in model.modules() if isinstance(m, Norm)]
        if part == "norms"
        else [model.unet.get_submodule(part)]
    )
    for module in parts:
        module.to(narrow)
    dtypes = [p.dtype for p in model.parameters()]
    expected = loop(model.copy().double())
    for options in ({}, {"backend": "reference"}, {"dtype": "float32"}):
        assert (sample(model, **options) - expected).abs().max() <= 5e-4
    assert [p.dtype for p in model.parameters()] == dtypes


def test_several_dtypes_in_an_altered_network():
    model = make()
    hook_on_a_level(model.unet)
    model.unet.mid.half()
    with pytest.raises(
        ValueError, match=r"several dtypes: float32 \(time_mlp.0.weight\), float16 \(mid\."
    ) as error:
        sample(model)
    assert "\n" not in str(error.value)
    assert "model.float() makes them one" in str(error.value)
    model.float()
    assert (sample(model) - loop(model)).abs().max() <= 5e-4


def test_a_dtype_that_no_network_computes_in():
    model = make()
    model.unet.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match='float8_e4m3fn; choose dtype="float32", or convert the model by'):
        sample(model)
    assert (sample(model, dtype="float32") - loop(model.copy().float())).abs().max() <= 5e-4
