"""Ways to alter a network, and a plain loop over its modules to compare its samples with."""

import copy
import functools
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from diffusion import DDPM, UNet
from diffusion.models.blocks import Attention, Conv2d
from helpers.models import make_model

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


def seamless_from_left_to_right(conv, x, weight, bias):
    """`_conv_forward` with circular padding on the left and right."""
    sides, ends = conv.padding[1], conv.padding[0]
    x = F.pad(F.pad(x, (sides, sides, 0, 0), mode="circular"), (0, 0, ends, ends))
    return F.conv2d(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups)


@change
def seamless_convolutions(unet):
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module._conv_forward = functools.partial(seamless_from_left_to_right, module)


@change
def seamless_convolution_in_a_block(unet):
    conv = block_of(unet).conv2
    conv._conv_forward = MethodType(seamless_from_left_to_right, conv)


@change
def padding_from_the_left(unet):
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            ends, sides = module.padding
            module.padding_mode = "reflect"
            module._reversed_padding_repeated_twice = [2 * sides, 0, ends, ends]


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
    """A low-rank layer beside the layer that it wraps (Hu et al. 2021, arXiv 2106.09685)."""

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
def unaltered(precision: str) -> torch.Tensor:
    return sample(make(), precision=precision)


def altered(name: str, after: bool, precision: str):
    """A model that was altered, before its first samples or after them; and its samples before."""
    model = make()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if after:
            assert torch.equal(sample(model, precision=precision), unaltered(precision))
        CHANGES[name](model.unet)
    model.eval()
    return model, unaltered(precision)
