"""A UNet on a CUDA device in fewer kernels and bytes than its modules.

Convolutions run without biases, which PyTorch would add in kernels of their own. The bias of a block's first
convolution goes into the embedding that its second normalisation adds. One kernel adds the other biases and
the residual, and writes the result where it is read: doubled for an upsampling, or into its range of the
channels that a later block reads joined. The 1 x 1 convolution of a residual is added to the second
convolution's output as it is computed. The padding of an asymmetric downsampling is a row and a column of
zeros in its filter.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import _native
from ..kernels.ops.biased_sum.library import DTYPES, biased_sum_
from ..models.blocks import Attention, Downsample, Level, Middle, ResBlock, Upsample
from ..models.unet import UNet

Write = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]  # of x, bias and residual, as `biased_sum_`


def unfoldable(unet: nn.Module, dtype: torch.dtype) -> str | None:
    """The reason why an unaltered UNet runs as its modules on a CUDA device, or None."""
    if _native.CUDA_MISSING:
        return _native.CUDA_MISSING
    if not isinstance(unet, UNet):
        return f"it is {type(unet).__name__}, not UNet"
    if dtype not in DTYPES:
        return f"the dtype is {dtype}, not float32, bfloat16 or float16"
    return _unusual(unet)


def _unusual(unet: UNet) -> str | None:
    config = unet.config
    common = {"activation": "silu", "patch_size": 1, "center_input": False, "mid_divisor": 1}
    for name, usual in common.items():
        if getattr(config, name) != usual:
            return f"{name} is {getattr(config, name)!r}, not {usual!r}"
    if config.time_embedding == "fourier":
        return "its output is divided by the noise level"
    if not config.has_middle:
        return "it has no block in the middle"
    for level in (*unet.down, *unet.up):
        if level.resample is not None and not isinstance(getattr(level.resample, "conv", None), nn.Conv2d):
            return "its resolution changes otherwise than by a convolution"
    if any(isinstance(module, Attention) and module.norm is None for module in unet.modules()):
        return "an attention has no normalisation"
    return None


class FoldedUNet:
    """`UNet.embed` and `UNet.denoise` together, for the weights of a UNet in channels_last, which it changes.

    The UNet must be one's own, and no `unfoldable` reason may hold but that of the device.
    """

    @torch.no_grad()
    def __init__(self, unet: UNet):
        self._unet = unet.requires_grad_(False)
        self._out_biases = {block: _out_bias(block) for block in _blocks(unet)}
        self._filters = {level: _filter(level.resample) for level in unet.down if level.resample is not None}
        parts = unet.embedding_projection.bias.float().split(unet.embedding_sizes)
        folded = [
            part if block.scale_shift else part + _bias(block.conv1).float()
            for part, block in zip(parts, _blocks(unet), strict=True)
        ]
        unet.embedding_projection.bias.copy_(torch.cat(folded))
        # In the order in which they are joined with what was computed last.
        up = [block for level in reversed(unet.up) for block in level.blocks]
        self._joined_channels = [block.norm1.weight.numel() for block in up]

    def embed(self, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `UNet.embed`, with the biases that `denoise` leaves out."""
        return self._unet.embed(timesteps, labels)

    def denoise(self, x: Tensor, embedding: Tensor) -> Tensor:
        """As `UNet.denoise`, of this `embed`'s embeddings."""
        unet, skips = self._unet, _Skips(self._joined_channels)
        parts = iter(embedding.split(unet.embedding_sizes, dim=1))
        convolution = unet.input_conv
        x = x.to(convolution.weight.dtype).contiguous(memory_format=torch.channels_last)
        h = skips.push(_convolve(x, convolution.weight), convolution.bias, None)
        for level in unet.down:
            for i, block in enumerate(level.blocks):
                h = self._block(block, _attention(level, i), h, next(parts), skips.push)
            if level.resample is not None:
                weight, bias = self._filters[level]
                h = skips.push(_convolve(h, weight, stride=2), bias, None)
        first, last = unet.mid.blocks
        h = self._block(first, unet.mid.attention, h, next(parts), _in_place)
        h = self._block(last, None, h, next(parts), skips.join)
        for level in reversed(unet.up):
            for i, block in enumerate(level.blocks):
                joined = skips.pop()
                ends = i + 1 == len(level.blocks)
                write = _doubled if ends and level.resample is not None else skips.join
                h = self._block(block, _attention(level, i), joined, next(parts), write)
            if level.resample is not None:
                assert isinstance(level.resample, Upsample)
                assert level.resample.conv is not None
                convolution = level.resample.conv
                h = skips.join(_convolve(h, convolution.weight), convolution.bias, None)
        h = unet.output_norm(h)
        return _convolve(h, unet.output_conv.weight, unet.output_conv.bias)

    def _block(
        self, block: ResBlock, attention: Attention | None, x: Tensor, part: Tensor, write: Write
    ) -> Tensor:
        """A residual block and the attention after it; `write` gets the terms of its output."""
        h = _convolve(block.norm1(x), block.conv1.weight)
        if block.scale_shift:
            scale, shift = part.chunk(2, dim=1)
            h = block.norm2(h, scale=scale, shift=shift, add=_bias(block.conv1).expand(len(x), -1))
        else:
            h = block.norm2(h, add=part)
        h = _convolve(h, block.conv2.weight)
        bias: Tensor | None = self._out_biases[block]
        residual: Tensor | None = x
        if block.skip is not None:
            _rows(h).addmm_(_rows(x), block.skip.weight.flatten(1).t())
            residual = None
        if attention is None:
            return write(h, bias, residual)
        if residual is not None:
            h, bias = _in_place(h, bias, residual), None
        added = {} if bias is None else {"add": bias.expand(len(h), -1)}
        assert attention.norm is not None
        attended = attention.attend(attention.norm(h, **added))  # [B, H * W, C]
        return write(attended.transpose(1, 2).unflatten(2, h.shape[2:]), bias, h)


class _Skips:
    """The maps that blocks on the way up read: what was computed last, joined with what was on the way down.

    channels: of each, the first one first. Each half is written into its range of the channels.
    """

    def __init__(self, channels: list[int]):
        self._channels = list(channels)
        self._joined: list[Tensor] = []

    def push(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """Writes a map of the way down: into the second range, and in its own place, for the next block."""
        n, c, h, w = x.shape
        joined = _empty(x, (n, self._channels.pop(), h, w))
        self._joined.append(joined)
        biased_sum_(x, bias, residual, x, joined[:, -c:])
        return x

    def join(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """Writes a map of the way up: into the first range, or in its own place if nothing joins it."""
        if not self._joined:
            return _in_place(x, bias, residual)
        biased_sum_(x, bias, residual, self._joined[-1][:, : x.shape[1]])
        return x

    def pop(self) -> Tensor:
        """The next joined map, both of whose ranges were written."""
        return self._joined.pop()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """F.conv2d with a padding of 1 in channels_last, as cuDNN gives it for weights in channels_last."""
    h = F.conv2d(x, weight, bias, stride, padding=1)
    return h.contiguous(memory_format=torch.channels_last)


def _in_place(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    biased_sum_(x, bias, residual, x)
    return x


def _doubled(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    n, c, h, w = x.shape
    out = _empty(x, (n, c, 2 * h, 2 * w))
    biased_sum_(x, bias, residual, out, scale=2)
    return out


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """A map in channels_last as the rows [B H W, C] of its memory."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def _attention(level: Level, i: int) -> Attention | None:
    return level.attentions[i] if len(level.attentions) else None


def _blocks(unet: UNet) -> Iterator[ResBlock]:
    """The blocks that take an embedding, in the order in which the network calls them."""
    parts: list[Level | Middle] = [*unet.down, unet.mid, *reversed(unet.up)]
    for part in parts:
        yield from part.residual_blocks()


def _bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None  # an unaltered UNet's have biases
    return convolution.bias


def _out_bias(block: ResBlock) -> Tensor:
    bias = _bias(block.conv2)
    return bias if block.skip is None else (bias.float() + _bias(block.skip).float()).to(bias.dtype)


def _filter(resample: ResBlock | Downsample | Upsample) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a downsampling; a filter of 4 x 4 also pads on the right and below."""
    assert isinstance(resample, Downsample)
    assert resample.conv is not None
    weight, bias = resample.conv.weight.detach(), _bias(resample.conv)
    if not resample.asymmetric:
        return weight, bias
    return F.pad(weight, (1, 0, 1, 0)).contiguous(memory_format=torch.channels_last), bias
