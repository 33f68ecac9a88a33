"""FoldedUNet: the numbers of the UNet's modules, in fewer kernels and bytes. No GPU is needed."""

import copy
import dataclasses

import pytest
import torch

from diffusion import UNetConfig
from diffusion.inference.buffers import BufferSpec, SamplerBuffers, Step
from diffusion.inference.denoiser import explain, make_denoiser
from diffusion.inference.folded_unet import FoldedUNet, unfoldable
from diffusion.inference.loop import take_step
from diffusion.kernels import _native
from diffusion.models.unet import UNet
from helpers.fake_cuda import CUDA, fake_unet, on_fake_cuda
from helpers.kernel_counts import KernelCounts

DDPM = UNetConfig(  # Ho et al. 2020, appendix B
    sample_size=32,
    channels=128,
    channel_mult=(1, 2, 2, 2),
    num_res_blocks=2,
    attention_levels=(1,),
    downsample_padding="asymmetric",
)
SMALL = dataclasses.replace(
    DDPM, sample_size=16, channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4
)
CONFIGS = {
    "ddpm": SMALL,
    "symmetric": dataclasses.replace(SMALL, downsample_padding="symmetric", num_res_blocks=2),
    "scale_shift": dataclasses.replace(SMALL, scale_shift=True, num_heads=2, attention_levels=(0, 2)),
    "no attention": dataclasses.replace(SMALL, attention_levels=(), mid_attention=False, in_channels=1),
    "one level": dataclasses.replace(SMALL, channel_mult=(1,), attention_levels=(0,)),
}


def randomized(config: UNetConfig) -> UNet:
    unet, generator = UNet(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return unet


def inputs(config: UNetConfig) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.in_channels, 16, 16, generator=generator)
    return x, torch.tensor([0, 400, 999])


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_the_modules(name):
    unet = randomized(CONFIGS[name])
    x, timesteps = inputs(unet.config)
    expected = unet.double()(x.double(), timesteps)
    folded = FoldedUNet(copy.deepcopy(unet).float().to(memory_format=torch.channels_last))
    for _ in range(2):  # nothing is left from call to call
        actual = folded.denoise(x, folded.embed(timesteps))
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_no_worse(dtype):
    unet = randomized(CONFIGS["ddpm"])
    x, timesteps = inputs(unet.config)
    expected = copy.deepcopy(unet).double()(x.double(), timesteps)
    unet = unet.to(dtype, memory_format=torch.channels_last)
    peer = unet(x, timesteps, backend="reference")
    folded = FoldedUNet(copy.deepcopy(unet))
    actual = folded.denoise(x, folded.embed(timesteps))
    assert actual.dtype == dtype
    error, allowed = ((y - expected).square().mean().sqrt() for y in (actual, peer))
    assert error <= 1.5 * allowed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"downsample": "resblock", "upsample": "resblock"}, "otherwise than by a convolution"),
        ({"center_input": True}, "center_input is True"),
    ],
)
def test_reasons_against_it(change, reason, monkeypatch):
    monkeypatch.setattr(_native, "CUDA_MISSING", None)
    unet = UNet(dataclasses.replace(SMALL, **change))
    assert reason in unfoldable(unet, torch.float32)
    assert (
        unfoldable(UNet(SMALL), torch.float64)
        == "the dtype is torch.float64, not float32, bfloat16 or float16"
    )
    assert unfoldable(UNet(SMALL), torch.float32) is None


def test_explanations(monkeypatch):
    unet = UNet(SMALL)
    assert (
        explain(unet, CUDA, torch.float32, "triton") == "unet: modules\n  not fused: the backend is 'triton'"
    )
    monkeypatch.setattr(_native, "CUDA_MISSING", None)
    assert explain(unet, CUDA, torch.float32, "auto") == "unet: fused"


def counted_step(folded: bool, batch: int = 512, dtype: torch.dtype = torch.bfloat16) -> KernelCounts:
    """One unguided step of DDPM's network: as its modules with weights as they come, or folded."""
    with on_fake_cuda():
        unet = fake_unet(DDPM, dtype)
        denoiser = make_denoiser(unet, CUDA, dtype, "auto" if folded else "reference")
        spec = BufferSpec((3, 32, 32), batch, 1, 10, store_x0=False, injects_noise=False)
        buffers = SamplerBuffers(spec, denoiser.unet.embedding_size, CUDA, dtype)
        if not folded:
            split = dataclasses.replace(denoiser.unet, denoise=unet.denoise)
            denoiser = dataclasses.replace(denoiser, unet=split, backend="auto")
        with KernelCounts() as counts:
            take_step(denoiser, buffers, Step(False, False, False, False))
    return counts


@torch.no_grad()
def test_kernels_and_bytes_of_a_step(capsys):
    modules, folded = counted_step(False), counted_step(True)
    with capsys.disabled():
        for name, counts in (("modules", modules), ("folded", folded)):
            print(
                f"\nDDPM's network for CIFAR-10, one step in bfloat16, 512 images: {name}\n{counts.table()}"
            )
    assert modules.kernels.total() == 302
    assert modules.bytes.total() == pytest.approx(34.6e9, rel=0.02)
    assert folded.kernels.total() == 168  # the goal was 180
    assert folded.bytes.total() <= 25e9
    assert not {"copy of a weight", "copy of a map", "concatenation", "padding"} & set(folded.kernels)
