"""Stand-ins for a UNet in a model: they have a UNet's configuration, or are refused in one line."""

import pytest
import torch
from torch import nn

from diffusion import DDPM
from diffusion.evaluation.likelihood import bits_per_dimension
from helpers.alterations import loop, make, sample


class NoParameters(nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.config = unet.config


def distributed(unet):
    """A DistributedDataParallel module, made without the processes that it needs."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = unet
    return wrapper


WRAPPERS = {
    "DataParallel": (nn.DataParallel, "a UNet's `config`, not DataParallel of .*; its `module` is one"),
    "DistributedDataParallel": (distributed, "not DistributedDataParallel of .*; its `module` is one"),
    "Sequential": (nn.Sequential, "a UNet's `config`, not torch.nn.Sequential$"),
    "None": (lambda unet: None, "a UNet's `config`, not None$"),
    "no parameters": (NoParameters, "have parameters, and NoParameters of .* has none"),
}
CALLS = {
    "sample": lambda model: model.sample(labels=[3]),
    "sample without labels": lambda model: model.sample(),
    "explain": lambda model: model.explain(),
    "num_classes": lambda model: model.num_classes,
    "steps": lambda model: model.steps("ddpm", variance="learned_range"),
    "loss": lambda model: model.loss(torch.zeros(1, 2, 8, 8), torch.tensor([1]), network=make().unet),
    "bound": lambda model: bits_per_dimension(model, torch.zeros(1, 2, 8, 8, dtype=torch.uint8)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_without_a_configuration(name, tmp_path):
    wrap, message = WRAPPERS[name]
    model = make()
    model.unet = wrap(model.unet)
    for call in (*CALLS.values(), lambda model: model.save(tmp_path / "model")):
        with pytest.raises(ValueError, match=f"^model.unet must .*{message}") as error:
            call(model)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^model\.unet must "):
        DDPM(model.unet, model.schedule, variance="fixed_small")


def test_the_module_of_a_wrapper():
    model = make()
    before = sample(model)
    model.unet = nn.DataParallel(model.unet)
    model.unet = model.unet.module
    assert torch.equal(sample(model), before)


@pytest.mark.exhaustive  # as test_another_network_after_samples[compiled]
def test_a_compiled_network():
    model = make()
    model.unet = torch.compile(model.unet, backend="eager")
    assert model.num_classes == 10
    assert (sample(model) - loop(model)).abs().max() <= 5e-4
