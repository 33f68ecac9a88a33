"""accelerate: networks of diffusers and others, as planned, equal themselves as they came."""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import diffusion
from diffusion.planner import weights as planner_weights
from diffusion.utils.device import multiplies_bfloat16
from helpers.diffusers_unets import conditional, of_conditional, of_unet2d, unet2d
from helpers.native import requires_native
from helpers.thinning import exhaustive_but

diffusers = pytest.importorskip("diffusers")
pytestmark = requires_native


@pytest.fixture(autouse=True)
def fast_kernels(monkeypatch):
    """Plans the small networks of these tests as large ones are planned."""
    monkeypatch.setattr(planner_weights, "SMALL_NETWORK", 0)


def padded(mode: str) -> nn.Module:
    """Convolutions whose paddings are no zeros."""
    torch.manual_seed(0)
    first, second = (nn.Conv2d(c, 16, 3, padding=1, padding_mode=mode) for c in (3, 16))
    network = unet2d(in_channels=16)
    network.conv_in = nn.Sequential(first, nn.SiLU(), second)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and mode == "circular":
            module.padding_mode = mode
    return network


def of_labelled(batch: int) -> dict[str, Tensor]:
    return of_unet2d(batch) | {"class_labels": torch.arange(batch) % 3}


NETWORKS = {
    "unet2d": (unet2d, of_unet2d),
    "scale_shift": (lambda: unet2d(resnet_time_scale_shift="scale_shift"), of_unet2d),
    "resnet": (lambda: unet2d(downsample_type="resnet", upsample_type="resnet"), of_unet2d),
    "heads": (lambda: unet2d(attention_head_dim=4), of_unet2d),
    "fourier": (lambda: unet2d(time_embedding_type="fourier"), of_unet2d),
    "skip": (
        lambda: unet2d(
            down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            block_out_channels=(32, 64),
        ),
        of_unet2d,
    ),
    "circular": (lambda: padded("circular"), of_unet2d),
    "reflect": (lambda: padded("reflect"), of_unet2d),
    "dropout": (lambda: unet2d(dropout=0.5), of_unet2d),
    "labels": (lambda: unet2d(num_class_embeds=3), of_labelled),
    "conditional": (conditional, of_conditional),
    "linear_projection": (lambda: conditional(use_linear_projection=True), of_conditional),
}


def exact(network: nn.Module, given: dict[str, Tensor]) -> Tensor:
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    return copy.deepcopy(network).double()(**given).sample


@torch.no_grad()
@pytest.mark.thinned
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_networks(name, batch):
    make, inputs = NETWORKS[name]
    network, given = make(), inputs(batch)
    expected = exact(network, given)
    diffusion.accelerate(network)
    actual = network(**given).sample
    assert "planned, exact" in network.report()
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", exhaustive_but(NETWORKS, default=list(NETWORKS)[::3]))
def test_fast_is_as_accurate_as_pytorch_in_bfloat16(name):
    make, inputs = NETWORKS[name]
    network, given = make(), inputs(2)
    expected = exact(network, given)
    peer = (
        copy.deepcopy(network)
        .bfloat16()(
            **{n: value.bfloat16() if value.is_floating_point() else value for n, value in given.items()}
        )
        .sample
    )
    actual = diffusion.accelerate(network, precision="fast")(**given).sample
    assert "planned, fast" in network.report()
    error, allowed = ((y - expected).square().mean().sqrt() for y in (actual, peer))
    assert error <= 2 * allowed


@torch.no_grad()
def test_fast_is_exact_where_bfloat16_is_not_multiplied(simd):
    network, given = unet2d(), of_unet2d(2)
    expected = diffusion.accelerate(copy.deepcopy(network))(**given).sample
    actual = diffusion.accelerate(network, precision="fast")(**given).sample
    assert "planned, fast" in network.report()
    assert torch.equal(actual, expected) != multiplies_bfloat16(torch.device("cpu"))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_modules_in_sixteen_bits(dtype):
    network, given = unet2d(), of_unet2d(2)
    expected = exact(network, given)
    network.to(dtype)
    given["sample"] = given["sample"].to(dtype)
    peer = network(**given).sample
    actual = diffusion.accelerate(network)(**given).sample
    assert "planned" in network.report()
    assert actual.dtype == dtype
    error, allowed = ((y - expected).square().mean().sqrt() for y in (actual, peer))
    assert error <= 2 * allowed


@torch.no_grad()
def test_other_sizes_and_batches_have_plans_of_their_own():
    network = diffusion.accelerate(unet2d())
    plain = unet2d()
    for batch, size in [(1, (16, 16)), (2, (8, 24)), (5, (16, 16)), (1, (16, 16)), (4, (2, 4))]:
        given = of_unet2d(batch, size)
        expected = plain(**given).sample
        assert (network(**given).sample - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert "planned" in network.report()


@torch.no_grad()
def test_a_pipeline_makes_the_same_images():
    pipeline = diffusers.DDIMPipeline(unet2d(), diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def images():
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 5, "output_type": "np"}
        return pipeline(batch_size=2, generator=generator, **options).images

    expected = images()
    pipeline.unet = diffusion.accelerate(pipeline.unet)
    assert abs(images() - expected).max() <= 1e-4
    assert "planned" in pipeline.unet.report()


@torch.no_grad()
def test_the_module_stays_what_it_is():
    network = unet2d()
    keys, signature, config = list(network.state_dict()), inspect.signature(network.forward), network.config
    given = of_unet2d(1)
    plain = network(**given).sample
    assert diffusion.accelerate(network) is network
    assert list(network.state_dict()) == keys
    assert inspect.signature(network.forward) == signature
    assert network.config == config
    assert isinstance(network(**given), type(unet2d()(**given)))
    assert type(network(*given.values(), return_dict=False)) is tuple
    assert "planned" in network.report()
    assert diffusion.restore(network) is network
    assert torch.equal(network(**given).sample, plain)
    assert not hasattr(network, "report")


@pytest.fixture(scope="module")
def planned():
    """A network that was accelerated, with its plans."""
    return diffusion.accelerate(unet2d())


@torch.no_grad()
@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500, 3])], ids=str)
def test_timesteps_of_every_kind(timestep, planned):
    sample = of_unet2d(2)["sample"]
    expected = unet2d()(sample, timestep).sample
    assert (planned(sample, timestep).sample - expected).abs().max() <= 1e-5
    assert "planned" in planned.report()


@torch.no_grad()
def test_one_plan_serves_all_timesteps():
    network, sample = diffusion.accelerate(unet2d()), of_unet2d(1)["sample"]
    for timestep in range(0, 900, 180):
        expected = unet2d()(sample, timestep).sample
        assert (network(sample, timestep).sample - expected).abs().max() <= 1e-5
    assert len(network.forward._thread_local.plans) == 1


def change_in_place(network):
    network.conv_in.weight.mul_(2)


def change_by_data(network):
    network.conv_in.weight.data.mul_(2)


def replace_parameter(network):
    network.conv_in.weight = nn.Parameter(network.conv_in.weight * 2)


def replace_module(network):
    network.conv_in = copy.deepcopy(network.conv_in).requires_grad_(False)
    network.conv_in.bias.add_(1)


def load_others(network):
    network.load_state_dict({name: value * 1.1 for name, value in network.state_dict().items()})


def change_attribute(network):
    network.down_blocks[0].resnets[0].output_scale_factor = 2.0


class Scaled(nn.Module):
    """A module with its factor in a dictionary, as those of peft have theirs."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.scaling = module, {"default": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) * self.scaling["default"]


def change_item(network):
    network.conv_out.scaling["default"] = 2.0


CHANGES = [
    change_in_place,
    change_by_data,
    replace_parameter,
    replace_module,
    load_others,
    change_attribute,
    change_item,
]


@torch.no_grad()
def test_changes_are_noticed():
    """One after the other, in a network that is planned and in another that is not."""
    networks, given = (unet2d(), unet2d()), of_unet2d(1)
    for network in networks:
        network.conv_out = Scaled(network.conv_out)
    planned, plain = diffusion.accelerate(networks[0]), networks[1]
    before = planned(**given).sample
    for change in CHANGES:
        for network in networks:
            change(network)
        actual, expected = planned(**given).sample, plain(**given).sample
        assert "planned" in planned.report(), change
        assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max()), change
        assert (actual - before).abs().max() > 1e-3, change
        before = actual


def pickled(protocol):
    return lambda network: pickle.loads(pickle.dumps(network, protocol))


class Times(nn.Module):
    """A module with a number of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.factor = nn.Conv2d(8, 8, 1), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.factor


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, pickled(2), pickled(pickle.HIGHEST_PROTOCOL)])
def test_a_copy_runs_itself(clone):
    network, plain, x = diffusion.accelerate(Times().eval()), Times().eval(), torch.randn(1, 8, 4, 4)
    expected = network(x)
    other = clone(network)
    assert type(other) is Times
    other.factor = 2.0
    torch.testing.assert_close(other(x), 2 * expected)
    assert "planned, exact" in other.report()
    torch.testing.assert_close(network(x), expected)
    diffusion.restore(other)
    assert not hasattr(other, "report")
    assert "planned, exact" in network.report()
    assert not hasattr(clone(plain), "report")


@torch.no_grad()
@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        pytest.param(lambda net: pickle.loads(pickle.dumps(net)), marks=pytest.mark.exhaustive),
    ],
)
def test_copies_are_accelerated(clone):
    network, given = diffusion.accelerate(unet2d()), of_unet2d(1)
    expected = network(**given).sample
    other = clone(network)
    other.conv_in.weight.mul_(2)
    assert not torch.equal(other(**given).sample, expected)
    assert "planned" in other.report()
    assert torch.equal(network(**given).sample, expected)


@torch.no_grad()
def test_threads_have_plans_of_their_own():
    network = diffusion.accelerate(unet2d())
    inputs = [of_unet2d(1 + k % 2) for k in range(8)]
    expected = [network(**given).sample for given in inputs]

    def call(given):
        with torch.no_grad():
            return network(**given).sample

    with ThreadPoolExecutor(4) as threads:
        for actual, right in zip(threads.map(call, inputs), expected, strict=True):
            assert torch.equal(actual, right)


def test_outputs_are_the_callers_own():
    network, given = diffusion.accelerate(unet2d()), of_unet2d(1)
    with torch.inference_mode():
        first = network(**given).sample
        kept = first.clone()
        network(given["sample"] * 2, given["timestep"])
        assert torch.equal(first, kept)


class Reads(nn.Module):
    """Branches on the values of its input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample) if timestep.sum() > 10 else sample


def hooked() -> nn.Module:
    network = unet2d()
    network.conv_in.register_forward_hook(lambda module, args, output: output * 2)
    return network


def autocast(network: nn.Module, **given: Tensor) -> object:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return network(**given)


def plainly(network: nn.Module, **given: Tensor) -> object:
    with torch.no_grad():
        return network(**given)


@pytest.mark.parametrize(
    ("make", "call", "reason"),
    [
        (lambda: Reads().eval(), plainly, "it reads the values of tensors"),
        (hooked, plainly, "a module within it, Conv2d, has a forward hook"),
        (unet2d, lambda network, **given: network(**given), "a gradient is wanted"),
        (lambda: unet2d(dropout=0.5).train(), plainly, "it is in training mode"),
        (unet2d, autocast, "autocast is enabled"),
        (
            lambda: unet2d().double(),
            lambda net, sample, timestep: plainly(net, sample=sample.double(), timestep=timestep),
            "float64",
        ),
    ],
)
def test_what_is_not_planned_runs_as_it_is(make, call, reason):
    given = of_unet2d(2)
    torch.manual_seed(0)
    network = make()
    torch.manual_seed(1)
    expected = call(copy.deepcopy(network), **given)
    diffusion.accelerate(network)
    torch.manual_seed(1)
    actual = call(network, **given)
    assert reason in network.report()
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (actual, expected)), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_flows():
    network, given = diffusion.accelerate(unet2d()), of_unet2d(1)
    network(**given).sample.sum().backward()
    assert network.conv_in.weight.grad is not None


def test_nonsense():
    with pytest.raises(TypeError, match=r"accelerate takes a torch\.nn\.Module, not function"):
        diffusion.accelerate(lambda x: x)
    with pytest.raises(ValueError, match="precision must be one of exact, fast, not 'half'"):
        diffusion.accelerate(nn.Conv2d(3, 3, 3), precision="half")
    network = nn.Conv2d(3, 3, 3)
    network.forward = lambda x: x
    with pytest.raises(ValueError, match="accelerate needs the forward of Conv2d, and it was replaced"):
        diffusion.accelerate(network)
    with pytest.raises(RuntimeError, match="expected input"):
        diffusion.accelerate(unet2d())(torch.zeros(1, 5, 16, 16), 3)
