"""A network that someone altered: images are those of a plain loop over its modules as they then are."""

import contextlib
import copy
import functools
from dataclasses import replace
from types import MethodType

import pytest
import torch
from conftest import make_model
from diffusion.kernels import _native
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune

from diffusion import DDPM, UNet, chain
from diffusion.blocks import Attention, Conv2d, Norm, ResBlock
from diffusion.networks import explain

pytestmark = pytest.mark.skipif(_native.CPP_MISSING is not None, reason=str(_native.CPP_MISSING))

LABELS = [3, 1]
OPTIONS = {"sampler": "ddim", "steps": 5, "spacing": "leading", "guidance_scale": 2.0}


def fixed_noise(k: int) -> torch.Tensor:
    return torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(k))


@torch.no_grad()
def loop(model) -> torch.Tensor:
    """DDIM (Song et al. 2021, eq. 12, eta = 0) under guidance, in plain PyTorch over the modules."""
    unet = model.unet
    alphas = torch.cat([model.schedule.alphas_cumprod.float(), torch.ones(1)])  # the last is that of no noise
    labels, x = torch.tensor([*LABELS, 10, 10]), fixed_noise(0)
    for t in (800, 600, 400, 200, 0):
        conditional, unconditional = unet(torch.cat([x, x]), torch.full((4,), t), labels).float().chunk(2)
        noise = unconditional + 2.0 * (conditional - unconditional)
        now, following = alphas[t], alphas[t - 200 if t else -1]
        x0 = ((x - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-1, 1)
        x = following.sqrt() * x0 + (1 - following).sqrt() * noise
    return x


def sample(model, **options) -> torch.Tensor:
    return model.sample(LABELS, noise=fixed_noise, **OPTIONS | options)


def make() -> DDPM:
    """A model whose attention is sharp, so that it matters."""
    model = make_model(10)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Attention):
                module.qkv.weight.mul_(8)
    return model


CHANGES = {}


def change(function):
    CHANGES[function.__name__] = function
    return function


def set_everywhere(unet, kind, **attributes):
    for module in unet.modules():
        if isinstance(module, kind):
            for name, value in attributes.items():
                setattr(module, name, value)


def block_of(unet):
    return unet.down[0].blocks[0]


def halve(module, args, output):
    return output / 2


# ---- Attributes.


@change
def circular_padding(unet):
    set_everywhere(unet, nn.Conv2d, padding_mode="circular")


@change
def circular_padding_of_one(unet):
    unet.output_conv.padding_mode = "circular"


@change
def dilation(unet):
    block_of(unet).conv2.dilation, block_of(unet).conv2.padding = (2, 2), (2, 2)


@change
def groups_of_a_convolution(unet):
    conv = block_of(unet).conv1
    conv.groups, conv.weight = 2, nn.Parameter(conv.weight[:, :4].detach())


@change
def padding_and_kernel(unet):
    conv = block_of(unet).conv1
    conv.weight = nn.Parameter(F.pad(conv.weight.detach(), (1, 1, 1, 1), value=0.2))
    conv.padding, conv.kernel_size = (2, 2), (5, 5)


@change
def asymmetric(unet):
    unet.down[0].resample.asymmetric = not unet.down[0].resample.asymmetric
    unet.down[0].resample.conv.padding = (1, 1) if unet.down[0].resample.conv.padding == (0, 0) else (0, 0)


@change
def norm_eps(unet):
    block_of(unet).norm1.eps = 0.9


@change
def norm_groups(unet):
    block_of(unet).norm2.groups = 2


@change
def heads(unet):
    unet.mid.attention.heads = 4


@change
def activation(unet):
    block_of(unet).norm1.activation = "none"


@change
def scale_shift(unet):
    block, first = block_of(unet), unet.embedding_sizes[0]
    block.scale_shift, unet.embedding_sizes = True, [2 * first, *unet.embedding_sizes[1:]]
    projection = unet.embedding_projection
    weight = torch.cat([projection.weight[:first].detach() * 0.5, projection.weight.detach()])
    bias = torch.cat([projection.bias[:first].detach() + 0.25, projection.bias.detach()])
    projection.weight, projection.bias = nn.Parameter(weight), nn.Parameter(bias)


@change
def no_resampling_weights(unet):
    unet.up[1].resample.conv = None


@change
def configuration(unet):
    config = copy.copy(unet.config)
    object.__setattr__(config, "timestep_scale", 0.5)
    unet.config = config


# ---- Code.


@change
def forward_of_a_convolution(unet):
    conv = block_of(unet).conv1
    conv.forward = lambda x: F.conv2d(x, conv.weight, conv.bias, padding=1) * 0.5


@change
def forward_of_a_block(unet):
    block, own = block_of(unet), block_of(unet).forward
    block.forward = lambda x, embedding, *backend: own(x, embedding * 0.5, *backend)


@change
def method_of_a_block(unet):
    attention = unet.mid.attention
    attention._forward = MethodType(lambda self, x, backend: x * 0.5, attention)


@change
def forward_of_the_network(unet):
    own = unet.forward
    unet.forward = lambda x, t, labels=None: own(x, t, labels) * 0.5


@change
def denoise(unet):
    own = unet.denoise
    unet.denoise = lambda x, embedding: own(x, embedding) * 0.5


@change
def embed(unet):
    own = unet.embed
    unet.embed = lambda t, labels=None: own(t // 2, labels)


class Halved(UNet):
    def denoise(self, x, embedding, backend="auto"):
        return super().denoise(x, embedding, backend) / 2


class Later(UNet):
    def forward(self, x, timesteps, labels=None):
        assert timesteps.dtype == torch.int64
        return super().forward(x, (timesteps + 150).clamp(max=999), labels)


class Late(UNet):
    def embed(self, timesteps, labels=None):
        return super().embed(timesteps * 0.5, labels)


@change
def denoise_of_a_subclass(unet):
    unet.__class__ = Halved


@change
def forward_of_a_subclass(unet):
    unet.__class__ = Later


@change
def embed_of_a_subclass(unet):
    unet.__class__ = Late


class Louder(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 4


@change
def linear_of_a_subclass(unet):
    unet.mid.attention.proj.__class__ = Louder


# ---- Hooks.


@change
def hook_on_the_network(unet):
    unet.register_forward_hook(halve)


@change
def pre_hook_on_the_network(unet):
    unet.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))


@change
def hook_on_a_level(unet):
    unet.down[0].register_forward_hook(halve)


@change
def hook_on_a_level_above(unet):
    unet.up[1].register_forward_hook(halve)


@change
def pre_hook_on_a_level(unet):
    unet.down[1].register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))


@change
def hook_on_the_middle(unet):
    unet.mid.register_forward_hook(halve)


@change
def hook_on_a_norm(unet):
    block_of(unet).norm1.register_forward_hook(halve)


@change
def hook_on_a_convolution(unet):
    unet.input_conv.register_forward_hook(halve)


@change
def hook_with_keywords(unet):
    def scaled(module, args, options, output):
        return output * (1 + len(options))

    block_of(unet).norm2.register_forward_hook(scaled, with_kwargs=True)


@change
def hook_on_the_time_mlp(unet):
    unet.time_mlp.register_forward_hook(halve)


@change
def hook_on_the_label_embedding(unet):
    unet.label_embedding.register_forward_hook(lambda module, args, output: output * -2)


# ---- Parametrizations and other modules.


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@change
def parametrization(unet):
    parametrize.register_parametrization(block_of(unet).conv1, "weight", Doubled())


@change
def parametrization_of_a_linear_map(unet):
    parametrize.register_parametrization(unet.mid.attention.qkv, "weight", Doubled())


@change
def weight_norm(unet):
    parametrizations.weight_norm(unet.output_conv)
    unet.output_conv.parametrizations.weight.original0.data.mul_(0.5)


@change
def old_weight_norm(unet):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(block_of(unet).conv1)
    block_of(unet).conv1.weight_g.data.mul_(4)


@change
def spectral_norm(unet):
    parametrizations.spectral_norm(unet.output_conv)


@change
def pruning(unet):
    prune.l1_unstructured(block_of(unet).conv1, "weight", 0.9)


class LoRA(nn.Module):
    """Of low rank beside the layer that it wraps (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, base, rank: int = 2):
        super().__init__()
        rows, columns = base.weight.shape[:2]
        generator = torch.Generator().manual_seed(0)
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) * 0.7)
        self.b = nn.Parameter(torch.randn(rows, rank, generator=generator) * 0.7)

    def forward(self, x):
        weight = self.b @ self.a
        if isinstance(self.base, nn.Conv2d):
            return self.base(x) + F.conv2d(x, weight[:, :, None, None])
        return self.base(x) + F.linear(x, weight)


@change
def lora_on_attention(unet):
    unet.mid.attention.qkv = LoRA(unet.mid.attention.qkv)


@change
def lora_on_convolutions(unet):
    for name in ("conv1", "conv2"):
        setattr(block_of(unet), name, LoRA(getattr(block_of(unet), name)))
    unet.input_conv, unet.output_conv = LoRA(unet.input_conv), LoRA(unet.output_conv)


@change
def lora_on_the_embedding(unet):
    unet.time_mlp[0], unet.embedding_projection = LoRA(unet.time_mlp[0]), LoRA(unet.embedding_projection)


@change
def sequential(unet):
    block_of(unet).conv1 = nn.Sequential(block_of(unet).conv1, nn.Hardtanh(-0.2, 0.2))


@change
def sequential_in_place_of_the_input(unet):
    unet.input_conv = nn.Sequential(nn.Tanh(), unet.input_conv)


@change
def identity_in_place_of_a_norm(unet):
    block_of(unet).norm1 = nn.Identity()
    block_of(unet).norm2 = nn.Identity()


@change
def identity_in_place_of_a_block(unet):
    unet.mid.blocks[1] = nn.Identity()
    unet.down[0].blocks[0] = nn.Identity()


@change
def identity_in_place_of_attention(unet):
    unet.mid.attention = nn.Identity()


@change
def no_attention(unet):
    unet.mid.attention = None


@change
def no_norm_before_attention(unet):
    unet.mid.attention.norm = None


@change
def other_resampling(unet):
    unet.down[0].resample = nn.AvgPool2d(2)
    unet.up[1].resample = nn.Upsample(scale_factor=2.0, mode="bilinear")


@change
def wide_convolution(unet):
    block_of(unet).conv1 = nn.Conv2d(8, 8, 5, padding=2)


@change
def grouped_convolution(unet):
    block_of(unet).conv1 = Conv2d(8, 8, 3, padding=1, groups=4)


@change
def group_norm_of_torch(unet):
    block_of(unet).norm1 = nn.Sequential(nn.GroupNorm(2, 8), nn.GELU())
    block_of(unet).norm2 = nn.GroupNorm(2, 8)


@change
def other_nonlinearity(unet):
    unet.time_mlp[1] = nn.Tanh()


@change
def swapped_modules(unet):
    block = block_of(unet)
    block.conv1, block.conv2 = block.conv2, block.conv1


@change
def tied_modules(unet):
    block_of(unet).conv2 = block_of(unet).conv1


@change
def tied_weights(unet):
    block_of(unet).conv2.weight = block_of(unet).conv1.weight


# ---- Weights alone, of which most change no version.


@change
def weight_in_place_through_data(unet):
    block_of(unet).conv1.weight.data.mul_(0.5)


@change
def weight_flipped_through_data(unet):
    weight = block_of(unet).conv1.weight
    weight.data.copy_(weight.data.flip(0))


@change
def other_data(unet):
    weight = unet.mid.attention.qkv.weight
    weight.data = weight.data.flip(1)


@change
def weight_in_inference_mode(unet):
    with torch.inference_mode():
        weight = block_of(unet).conv1.weight
        weight.copy_(weight.flip(1))


@change
def weight_through_numpy(unet):
    values = unet.mid.attention.qkv.weight.detach().numpy()
    values[:] = values[::-1].copy()


@change
def state_dict(unet):
    unet.load_state_dict(make_model(10, seed=5).unet.state_dict())


@change
def assigned_state_dict(unet):
    unet.load_state_dict(make_model(10, seed=5).unet.state_dict(), assign=True)


@change
def no_gradient(unet):
    unet.requires_grad_(False)
    unet.output_norm.bias.add_(1)


@change
def to_and_back(unet):
    unet.half()
    unet.float()
    unet.output_norm.weight.data.mul_(0.5)


@functools.cache
def unaltered(tier: str) -> torch.Tensor:
    return sample(make(), tier=tier)


def _altered(name: str, after: bool, tier: str):
    """A model that was altered, before its first samples or after them; and its samples before."""
    model = make()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if after:
            assert torch.equal(sample(model, tier=tier), unaltered(tier))
        CHANGES[name](model.unet)
    model.eval()
    return model, unaltered(tier)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_samples_are_those_of_the_modules(name, after):
    model, before = _altered(name, after, "exact")
    expected = loop(model)
    assert (expected - before).abs().max() > 0.01, "this change changes nothing"
    assert (sample(model) - expected).abs().max() <= 5e-4
    assert (sample(model) - expected).abs().max() <= 5e-4, "the second time"


@pytest.mark.parametrize(
    "after", [pytest.param(False, marks=pytest.mark.slow), True], ids=["before", "after"]
)
@pytest.mark.parametrize("name", CHANGES)
def test_in_the_fast_tier(name, after):
    """Nearer to the altered network's images, in float32, than those in bfloat16 from before it was."""
    model, before = _altered(name, after, "fast")
    expected = loop(model)
    difference = (sample(model, tier="fast") - expected).abs().mean()
    assert difference <= 0.75 * (expected - before).abs().mean()


@pytest.mark.parametrize("tier", ["exact", "fast"])
@pytest.mark.parametrize("pre", [False, True], ids=["hook", "pre-hook"])
def test_global_hooks(pre, tier):
    """On every module of the process: seen while they are there, and no longer."""
    model = make_model(10)
    before = sample(model, tier=tier)
    register = torch_module.register_module_forward_hook
    function = halve
    if pre:
        register = torch_module.register_module_forward_pre_hook

        def function(module, args):
            return tuple(
                0.5 * a if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
            )

    with contextlib.closing(_closing(register(function))):
        expected, found = loop(model), sample(model, tier=tier)
        reason = model.explain(tier=tier)
    assert (found - expected).abs().mean() <= (1e-5 if tier == "exact" else 0.02)
    assert (found - before).abs().mean() > 0.05
    assert "a forward hook is registered for all modules" in reason
    assert torch.equal(sample(model, tier=tier), before)


def _closing(handle):
    handle.close = handle.remove
    return handle


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "name", ["circular_padding", "hook_on_a_level", "denoise_of_a_subclass", "sequential"]
)
def test_by_an_explicit_backend(name, backend):
    model, _ = _altered(name, False, "exact")
    assert (sample(model, backend=backend) - loop(model)).abs().max() <= 5e-4


def test_a_forward_without_a_backend():
    model, _ = _altered("forward_of_the_network", False, "exact")
    with pytest.raises(ValueError, match="backend 'reference' cannot be chosen: the UNet's `forward` takes"):
        sample(model, backend="reference")


@pytest.mark.parametrize(
    ("own", "dtype"),
    [(torch.float32, "float16"), (torch.bfloat16, "float32"), (torch.float16, None)],
    ids=str,
)
def test_in_another_dtype(own, dtype):
    model, before = _altered("hook_on_a_level", False, "exact")
    model.to(own)
    expected = loop(copy.deepcopy(model).float())
    found = sample(model, dtype=dtype)
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() <= 0.2 * (before - expected).abs().mean()
    assert next(model.parameters()).dtype == own


@pytest.mark.parametrize("name", ["circular_padding", "hook_on_a_level", "lora_on_attention", "dilation"])
def test_of_a_model_that_trains(name):
    """In eval mode, dropout included, also where a part of the model is in training mode; the modes stay."""
    model, _ = _altered(name, False, "exact")
    expected = loop(model)
    set_everywhere(model.unet, ResBlock, dropout=0.5)
    for train in (model.train, model.unet.mid.train):
        model.eval()
        train()
        modes = [module.training for module in model.modules()]
        assert (sample(model) - expected).abs().max() <= 5e-4
        assert [module.training for module in model.modules()] == modes


def test_a_part_that_trains_has_no_dropout():
    model = make()
    set_everywhere(model.unet, ResBlock, dropout=0.5)
    model.unet.config = replace(model.unet.config, dropout=0.5)
    expected = loop(model)
    model.unet.mid.train()
    assert model.explain() == "unet: fused"
    for backend in ("auto", "reference"):
        assert (sample(model, backend=backend) - expected).abs().max() <= 5e-4


@pytest.mark.parametrize("name", ["mid.blocks.0.conv1", "input_conv", "up.1.resample", "time_mlp"])
def test_a_module_that_is_none(name):
    model = make()
    parent, _, last = name.rpartition(".")
    setattr(model.unet.get_submodule(parent), last, None)
    with pytest.raises(ValueError, match=f"unet.{name} is None; "):
        sample(model)


def test_methods_replaced_on_a_class(monkeypatch):
    model = make()
    before = sample(model)
    own = Norm.forward
    monkeypatch.setattr(Norm, "forward", lambda self, *args, **options: own(self, *args, **options) * 0.7)
    expected = loop(model)
    assert (sample(model) - expected).abs().max() <= 5e-4
    assert "Norm.forward was replaced" in model.explain()
    monkeypatch.undo()
    assert torch.equal(sample(model), before)


def test_steps_are_not_captured(monkeypatch):
    """As they are on a CUDA device; a graph would pass over hooks."""
    model = make()
    begin = chain.Chain.begin

    def begin_captured(self, *args):
        self._captures = True
        begin(self, *args)

    captured = []
    monkeypatch.setattr(chain, "captured", lambda function, changed: captured.append(function) or function)
    monkeypatch.setattr(chain.Chain, "begin", begin_captured)
    sample(model)
    assert captured
    captured.clear()
    with contextlib.closing(_closing(torch_module.register_module_forward_hook(halve))):
        assert (sample(model) - loop(model)).abs().max() <= 5e-4
    assert not captured
    hook_on_a_level(model.unet)
    assert (sample(model) - loop(model)).abs().max() <= 5e-4
    assert not captured


def test_explanations():
    model = make()
    assert model.explain() == model.explain(tier="fast") == "unet: fused"
    assert model.explain(backend="reference") == "unet: modules\n  not fused: the backend is 'reference'"
    circular_padding_of_one(model.unet)
    reason = "output_conv.padding_mode is 'circular', not 'zeros'"
    assert model.explain() == f"unet: modules, called whole\n  not fused: {reason}"
    assert "CUDA graph" in explain(model.unet, torch.device("cuda"), torch.float32, "auto")
    with pytest.raises(ValueError, match="unknown tier"):
        model.explain(tier="slow")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_hooks_see_every_evaluation(backend):
    """With the shapes and timesteps of a plain loop, and with tensors that stay as they are."""
    model, seen = make_model(10), []
    handle = model.unet.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    sample(model, backend=backend)
    handle.remove()
    found = [t.clone() for call in seen for t in call]
    seen.clear()
    handle = model.unet.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    loop(model)
    expected = [t.clone() for call in seen for t in call]
    assert len(found) == len(expected) == 5 * 4
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)
